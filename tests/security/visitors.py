"""Traffic that makes the handlers of a daemon run: guests, clients of the host, the user's signals and requests.

`Prison` starts daemons that tell which of their handlers ran (`informer.py`); the visits of a mode are methods of
`Visitors` and of one of its subclasses. All visits are repeated until the daemon has reported the expected handlers, or
has ended. Answers are not checked: other tests do that.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scapy.packet import Packet

from fuzz.frames import VALID
from passt import PASST, PASTA
from passt.wire.virtio import VNET_LEN

from ..system.support import User
from ..system.traffic.support import GATEWAY, HOST, PEER, Lan, Namespace
from ..system.vm.client import Answer, Client, framed
from .informer import GIVEN_TAP

DEADLINE = 15.0  # s for a daemon to tell what it should
PATIENCE = 0.05  # s for an answer
IN, OUT = 5001, 5011  # ports of the host: one leads to the guest, and at the other there are servers
BULK = bytes(300_000)
OPTIONS = "-a 192.0.2.2/24 -g 192.0.2.1 -a 2001:db8::2/64 -g fe80::1 --dns-forward 192.0.2.53"
MAPPED = "192.0.2.1"  # the host's loopback, for the guest
RESOLVER = "192.0.2.53"
LOG_SIZE = 40960
QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\7example\3org\0\0\1\0\1"
FRAMES = [frame[VNET_LEN:] for frame in VALID]
NAMES = f"nameserver {HOST}\n", f"nameserver {PEER}\nnameserver 2001:db8:ffff::1\n"  # no resolver answers
REQUESTS = (
    '{"command":"show"}',
    '{"command":"stats"}',
    '{"command":"flows"}',
    '{"command":"metrics"}',
    '{"command":"info"}',
    '{"command":"add","rules":["-t 5002","-u 5002"]}',
    '{"command":"add","rules":["-t 1-9999"]}',  # ports that cannot be had
    '{"command":"add","rules":["-t caf\u00e9"]}',
    '{"command":"delete","rules":["-t 5002","-u 5002"]}',
    "{}",
    "\xff",
)
SLIRP = (
    '{"execute":"add_hostfwd","arguments":{"proto":"tcp","host_addr":"0.0.0.0","host_port":5003,"guest_port":80}}',
    '{"execute":"list_hostfwd"}',
    '{"execute":"remove_hostfwd","arguments":{"id":1000}}',
    '{"execute":"list_info"}',
    "[" * 3000,
)
WITH_GUEST = "plain", "faulty", "starved", "given"
SIGNALS = {  # sent at the end of a way; a faulty handler may ignore the first ones
    "faulty": (signal.SIGTERM,) * 5,
    "spawning": (signal.SIGTERM, signal.SIGINT),
    **dict.fromkeys(("leaving", "polling", "named", "given"), ()),
}
AT_END = "the end"  # what is told then was told for that
NAMED = "/run/guest"  # of the host's own
RESET = struct.pack("ii", 1, 0)  # struct linger

Visit = Callable[[], None]


class Guest(Client):
    """A client that does not wait for long."""

    def expect(self, wanted: Callable[[Packet], Answer | None], deadline: float = 6 * PATIENCE) -> Answer:
        return super().expect(wanted, deadline)


class Inmate:
    """A daemon, and what it has told."""

    def __init__(self, pid: int, lines: Callable[[float], Iterator[str]]) -> None:
        self.pid = pid
        self._lines = lines
        self.locked = False
        self.status: int | None = None
        self.known: set[str] = set()
        self.ran: dict[str, str] = {}  # by which visit
        self.faults: list[str] = []

    def listen(self, seconds: float = 0.0, visit: str = "") -> None:
        """Take what it tells for so long, or to its end."""
        for line in self._lines(seconds) if self.status is None else ():
            sign, _, text = line.partition(" ")
            if sign == "+":
                self.known.add(text)
            elif sign == "-":
                self.ran.setdefault(text, visit)
            elif sign == "!":
                self.faults.append(text)
            elif sign == "*":
                self.locked = True
                break
            elif sign == "=":
                self.status = int(text)
                break

    def wait(self, done: Callable[[], bool], seconds: float = DEADLINE) -> bool:
        """Whether done() comes true in time; it does not if the daemon ends before."""
        end = time.monotonic() + seconds
        while not done() and self.status is None and (left := end - time.monotonic()) > 0:
            self.listen(min(left, PATIENCE))
        return done()

    def kill(self, number: int) -> None:
        if self.status is None:
            os.kill(self.pid, number)


class Prison:
    """Runs daemons of a mode for a user on the host of a laboratory, one after the other."""

    def __init__(self, lan: Lan, user: User, mode: str, directory: Path) -> None:
        self.lan, self.user, self.mode, self.directory = lan, user, mode, directory
        command = lan.host.argv(user.command([user.python, "-m", "tests.security.informer"]))
        self.said = (directory / "said").open("wb")
        self._process = subprocess.Popen(
            command, env=user.env, cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said
        )
        self._input = b""
        self._guest: Namespace | None = None
        self.names = directory / "resolv.conf"

    @contextlib.contextmanager
    def inmate(self, way: str, victim: str, *options: str) -> Iterator[Inmate]:
        """A daemon, which is in its sandbox."""
        stdin = self._process.stdin
        assert stdin is not None
        self.names.write_text(NAMES[0])
        stdin.write("\t".join((way, victim, str(self.names), self.mode, "-f", *options)).encode() + b"\n")
        stdin.flush()
        begin = next(self._lines(DEADLINE))
        assert begin.startswith("@ "), begin
        inmate = Inmate(int(begin[2:]), self._lines)
        try:
            inmate.wait(lambda: inmate.locked)
            yield inmate
        finally:
            inmate.kill(signal.SIGKILL)
            inmate.wait(lambda: inmate.status is not None)

    def _lines(self, seconds: float) -> Iterator[str]:
        """Reports, until `seconds` have passed."""
        assert self._process.stdout is not None
        fd, end = self._process.stdout.fileno(), time.monotonic() + seconds
        while True:
            while b"\n" in self._input:
                line, _, self._input = self._input.partition(b"\n")
                yield line.decode()
            if not select.select([fd], [], [], max(0.0, end - time.monotonic()))[0]:
                return
            data = os.read(fd, 65536)
            assert data, "no more prison"
            self._input += data

    @property
    def guest(self) -> Namespace:
        """A network namespace of the user's, which stays."""
        if self._guest is None:
            command = self.user.command(["unshare", "--user", "--map-root-user", "--net", "--mount"])
            self._guest = Namespace(self.lan.host.argv(command), self.user)
            self._guest.run("ip", "link", "set", "lo", "up")
            self._guest.run("ip", "route", "add", "blackhole", PEER)  # for a client that never gets an answer
        return self._guest

    def end_guest(self) -> None:
        """Let it go, if there is one."""
        if self._guest is not None:
            self._guest.close()
            self._guest = None

    @contextlib.contextmanager
    def identity(self) -> Iterator[None]:
        """Run with the user's identity: the meaning of root depends on the user namespace of the caller."""
        before = os.geteuid()
        os.seteuid(self.user.uid)
        try:
            yield
        finally:
            os.seteuid(before)

    def complaints(self) -> str:
        """The output on standard error."""
        return (self.directory / "said").read_text()

    def close(self) -> None:
        self.end_guest()
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(DEADLINE)
        self._process.stdout.close()
        self.said.close()


class Visitors:
    """Those who come in both modes."""

    def __init__(self, prison: Prison, inmate: Inmate) -> None:
        self.prison, self.inmate = prison, inmate
        self.host = prison.lan.host
        self._open: list[socket.socket] = []
        self._round = 0

    def visits(self) -> dict[str, Visit]:
        """By name."""
        names = [name for name in dir(self) if name.startswith("visit_")]
        return {name: getattr(self, name) for name in names}

    def play(self, done: Callable[[], bool], first: str = "") -> None:
        """Come and go until done(), or until the inmate is no more."""
        end = time.monotonic() + DEADLINE
        visits = self.visits()
        order = sorted(visits, key=lambda name: name != first)
        while not done() and self.inmate.status is None and time.monotonic() < end:
            for name in order:
                with contextlib.suppress(OSError, AssertionError, EOFError):
                    visits[name]()
                self.inmate.listen(0, name)
                if done() or self.inmate.status is not None:
                    break
            self._round += 1

    def close(self) -> None:
        for sock in self._open:
            sock.close()

    def make(self, where: Namespace, kind: int = socket.SOCK_STREAM, family: int = socket.AF_INET) -> socket.socket:
        """A socket that lasts as long as this."""
        sock = where.make_socket(family, kind, socket.htons(3) if family == socket.AF_PACKET else 0)
        sock.settimeout(PATIENCE)
        self._open.append(sock)
        return sock

    def listener(self, where: Namespace, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        sock = self.make(where, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        return sock

    # Conversations ---------------------------------------------------------------------------------------------------

    def stream(self, where: Namespace, address: str, port: int, server: socket.socket | None) -> None:
        """A connection with data in both directions, more than either end reads; ended by one end, or reset."""
        with where.make_socket() as client:
            client.settimeout(PATIENCE)
            client.connect((address, port))
            client.send(b"hello")
            if server is None:
                client.recv(1)
                return
            with server.accept()[0] as other:
                other.settimeout(PATIENCE)
                other.recv(5)
                for sender, taker in ((client, other), (other, client)):
                    sender.send(BULK)
                    with contextlib.suppress(TimeoutError):
                        taker.recv(len(BULK), socket.MSG_WAITALL)
                other.send(b"!", socket.MSG_OOB)
                client.shutdown(socket.SHUT_WR)
                other.recv(1)
                if self._round % 2:
                    other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    def datagrams(self, where: Namespace, address: str, port: int, server: socket.socket | None) -> None:
        """Several at once, both ways."""
        with where.make_socket(kind=socket.SOCK_DGRAM) as client:
            client.settimeout(PATIENCE)
            client.connect((address, port))
            for _ in range(8):
                client.send(QUERY if port == 53 else b"hello")
            if server is not None:
                _, there = server.recvfrom(100)
                for _ in range(8):
                    server.sendto(b"hello", there)
            client.recv(100)
            client.send(b"again")

    # Clients of the host, and the operator ---------------------------------------------------------------------------

    def visit_control(self) -> None:
        self._control("control", "".join(f"{request}\n" for request in REQUESTS))
        for request in SLIRP:
            self._control("api", request)
        self._control("control", "")

    def _control(self, name: str, text: str) -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            with self.prison.identity():
                client.connect(str(self.prison.directory / name))
            client.sendall(text.encode("latin-1"))
            client.shutdown(socket.SHUT_WR)
            while client.recv(1 << 16):
                pass

    def visit_names(self) -> None:
        new = self.prison.directory / "new"
        new.write_text(NAMES[(self._round + 1) % 2])
        new.rename(self.prison.names)

    def visit_operator(self) -> None:
        self.inmate.kill(signal.SIGUSR1)


class Neighbours(Visitors):
    """Those of pasta. The guest is a namespace, with a kernel; its frames are sent beside that."""

    def __init__(self, prison: Prison, inmate: Inmate) -> None:
        super().__init__(prison, inmate)
        self._guest = guest = prison.guest
        self._servers = {
            kind: (self.listener(self.host, "127.0.0.1", OUT, kind), self.listener(guest, "0.0.0.0", IN, kind))
            for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
        }

    def visits(self) -> dict[str, Visit]:
        streams, datagrams = self._servers[socket.SOCK_STREAM], self._servers[socket.SOCK_DGRAM]
        talks = {}
        for where, addresses, port, which in (
            (self.host, ("127.0.0.1", HOST), IN, 1),  # from loopback to loopback, and by the tap
            (self._guest, ("127.0.0.1", MAPPED), OUT, 0),
        ):
            for address in addresses:
                talks[f"datagrams {port} {address}"] = partial(self.datagrams, where, address, port, datagrams[which])
                talks[f"stream {port} {address}"] = partial(self.stream, where, address, port, streams[which])
        for address, port in ((RESOLVER, 53), (MAPPED, 9), (GATEWAY, 9), ("203.0.113.1", 9)):  # no host is there
            talks[f"datagrams {address}"] = partial(self.datagrams, self._guest, address, port, None)
            talks[f"stream {address}"] = partial(self.stream, self._guest, address, port, None)
        # The last, since what it has not read by then is gone
        return super().visits() | talks | {"without tap": self._without_tap}

    def visit_unheard(self) -> None:
        self.make(self.prison.lan.peer).connect((HOST, IN))

    def visit_frames(self) -> None:
        wire = self.make(self._guest, socket.SOCK_RAW, socket.AF_PACKET)
        wire.settimeout(1.0)  # it takes as many as the daemon has read
        wire.bind(("tap0", 0))
        mac = wire.getsockname()[4]
        for frame in FRAMES:
            with contextlib.suppress(OSError):  # longer than the interface takes
                wire.send(frame[:6] + mac + frame[12:])

    def _without_tap(self) -> None:
        for _ in range(2):
            self._guest.run("ip", "link", "delete", "tap0", check=False)


class Machines(Visitors):
    """Those of passt. The guest is what its client makes of frames."""

    def __init__(self, prison: Prison, inmate: Inmate) -> None:
        super().__init__(prison, inmate)
        self._path = str(prison.directory / "guest")
        self._guest: Guest | None = None
        self._server = self.listener(self.host, "127.0.0.1", OUT)
        self._echo = self.listener(self.host, "127.0.0.1", OUT, socket.SOCK_DGRAM)

    def close(self) -> None:
        super().close()
        self.leave()

    def guest(self) -> Client:
        """The connected client, or the next one."""
        if self._guest is None:
            self._guest = Guest(socket.socket(socket.AF_UNIX))
            self._guest.sock.connect(self._path)
        if not self._guest.address:
            self._guest.configure()
        return self._guest

    def leave(self) -> None:
        if self._guest is not None:
            self._guest.sock.close()
            self._guest = None

    def visit_from_host(self) -> None:
        self.guest()
        for address in ("127.0.0.1", HOST):
            for talk in (self.datagrams, self.stream):
                with contextlib.suppress(OSError):
                    talk(self.host, address, IN, None)

    def visit_frames(self) -> None:
        self.guest().send(*FRAMES)

    def visit_from_guest(self) -> None:
        guest = self.guest()
        guest.send(*[guest.udp(MAPPED, OUT, b"hello")] * 4, guest.udp(RESOLVER, 53, QUERY))
        _, there = self._echo.recvfrom(100)
        for _ in range(8):
            self._echo.sendto(b"hello", there)
        guest.ping(GATEWAY)

    def visit_stream(self) -> None:
        connection = self.guest().connect(MAPPED, OUT)
        with self._server.accept()[0] as other:
            other.settimeout(PATIENCE)
            connection.send(b"hello")
            other.recv(5)
            for _ in range(8):
                other.send(BULK)  # more than is taken: the socket of the guest is full, too
            connection.receive(5000)

    def visit_other_guest(self) -> None:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as other:
                other.settimeout(PATIENCE)
                other.connect(self._path)
                other.recv(1)

    def visit_leave(self) -> None:
        try:
            self.guest().sock.settimeout(PATIENCE)
            self.guest().sock.sendall(framed(FRAMES) + b"\xff" * 100)
        finally:
            self.leave()


# Ways to be there ----------------------------------------------------------------------------------------------------


def stay(
    prison: Prison, way: str, done: Callable[[Inmate], bool] = lambda _: True, victim: str = "", first: str = ""
) -> Inmate:
    """A daemon from its beginning to its end: visited until it is done(), by `first` first, and then told to end."""
    with prison.inmate(way, victim, *_options(prison, way, quiet=bool(victim))) as inmate:
        assert inmate.locked, (way, victim, inmate.status, prison.complaints())
        if way in WITH_GUEST:
            visitors = (Neighbours if prison.mode == PASTA else Machines)(prison, inmate)
            try:
                visitors.play(lambda: done(inmate), first)
            finally:
                visitors.close()
        _end(prison, inmate, way)
    return inmate


def _options(prison: Prison, way: str, *, quiet: bool) -> list[str]:
    """Of a daemon that has everything."""
    here = prison.directory
    words = f"{OPTIONS} -p {here}/pcap -c {here}/control --api-socket {here}/api --stats 1 -t {IN} -u {IN}".split()
    words += ["-q"] if quiet else ["-l", f"{here}/{way}", "--log-size", f"{LOG_SIZE}", "--trace"]
    if prison.mode == PASST:
        return [*words, "-s", f"{here}/guest"]
    words += ["--config-net", "-T", "auto", "-U", "auto"]
    words += ["--fd", f"{GIVEN_TAP}"] if way == "given" else ["-I", "tap0"]
    if way == "spawning":
        with contextlib.suppress(FileExistsError):
            os.mkfifo(here / "end")
        os.chmod(here / "end", 0o666)
        return [*words, "--", "sh", "-c", f"trap : TERM INT; cat {here}/end"]
    pid = prison.guest.pid
    if way != "named":
        return [*words, str(pid)]
    prison.lan.host.run("sh", "-c", f"touch {NAMED}; mount --bind /proc/{pid}/ns/net {NAMED}")
    return [*words, "--netns", NAMED, "--userns", f"/proc/{pid}/ns/user"]


def _end(prison: Prison, inmate: Inmate, way: str) -> None:
    """Let it end."""
    if way == "named":
        prison.lan.host.run("sh", "-c", f"umount -l {NAMED}; rm {NAMED}")
    elif way in ("leaving", "polling"):
        prison.end_guest()
    for number in SIGNALS.get(way, (signal.SIGTERM,)):
        inmate.listen(PATIENCE, AT_END)
        inmate.kill(number)
    if way == "spawning":
        with contextlib.suppress(OSError):
            os.close(os.open(prison.directory / "end", os.O_WRONLY | os.O_NONBLOCK))
    end = time.monotonic() + DEADLINE
    while inmate.status is None and time.monotonic() < end:
        inmate.listen(PATIENCE, AT_END)
