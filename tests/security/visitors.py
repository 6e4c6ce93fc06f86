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
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from scapy.layers.inet import ICMP, IP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from fuzz.frames import VALID
from passt import PASST, PASTA, addr, repair
from passt.log import Fatal
from passt.migration.steps import LINGER
from passt.udp_engine.io import UDP_SEGMENT
from passt.wire import igmp
from passt.wire.igmp import Single
from passt.wire.vhost import Invalid
from passt.wire.virtio import VNET_LEN

from ..system.support import User
from ..system.traffic.support import GATEWAY, HOST, HOST6, PEER, Lan, Namespace
from ..system.vm.client import ACK, Answer, Client, framed
from ..system.vm.vhost import VhostClient
from .informer import FAULTY, GIVEN_TAP, SPEED

DEADLINE = 120.0  # s for a daemon to tell what it should, on a machine that others use as well
PATIENCE = 0.05  # s for an answer, and as much more in each round of visits: the daemon may not get a processor in time
PATIENCE_MAX = 1.0  # s
IN, OUT = 5001, 5011  # ports of the host: one leads to the guest, and at the other there are servers
BULK = bytes(300_000)
OPTIONS = "-a 192.0.2.2/24 -g 192.0.2.1 -g fe80::1 --dns-forward 192.0.2.53"
MAPPED = "192.0.2.1"  # the host's loopback, for the guest
RESOLVER = "192.0.2.53"
LOG_SIZE = 40960
GROUP, DISCOVERY = "239.255.255.250", 1900  # SSDP
MORE_PORTS = '{"command":"add","rules":["-u 5004"]}\n{"command":"delete","rules":["-u 5004"]}\n'
ALL_ROUTERS = addr.packed("224.0.0.22")
QUERY = b"\x12\x34\1\0\0\1\0\0\0\0\0\0\7example\3org\0\0\1\0\1"
FRAMES = [frame[VNET_LEN:] for frame in VALID]
OTHER_ADDRESS = f"{HOST6}6/128"  # the longer prefix is the better one
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
SHARING = "sharing", *(way for way in FAULTY if way.startswith("sharing"))  # the machine's memory: --vhost-user
WITH_GUEST = *FAULTY, *SHARING, "plain", "starved", "given"
SIGNALS = {  # sent at the end of a way; a faulty handler may ignore the first ones
    **dict.fromkeys(FAULTY, (signal.SIGTERM,) * 5),
    "spawning": (signal.SIGTERM, signal.SIGINT),
    **dict.fromkeys(("leaving", "polling", "named", "given"), ()),
}
FORWARDED = {f"passt.daemon.common.End.{name}" for name in ("_forward", "_forward_unless_typed")}
AT_END = "the end"  # what is told then was told for that
NAMED = "/run/guest"  # of the host's own
RESET = struct.pack("ii", 1, 0)  # struct linger

Visit = Callable[[], None]


class Guest(Client):
    """A client that does not wait for long."""

    def expect(self, wanted: Callable[[Packet], Answer | None], deadline: float = 6 * PATIENCE) -> Answer:
        return super().expect(wanted, deadline)


class SharingGuest(Guest, VhostClient):
    """The same, whose frames lie in the rings of a memory that it shares."""


class Inmate:
    """A daemon, and what it has told."""

    def __init__(self, pid: int, lines: Callable[[float], Iterator[str]]) -> None:
        self.pid = pid
        self._lines = lines
        self.locked = False
        self.status: int | None = None
        self.way = ""
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

    def wait(self, done: Callable[[], bool], seconds: float = DEADLINE, visit: str = "") -> bool:
        """Whether done() comes true in time, by a visit; it does not if the daemon ends before."""
        end = time.monotonic() + seconds
        while not done() and self.status is None and (left := end - time.monotonic()) > 0:
            self.listen(min(left, PATIENCE), visit)
        return done()

    def kill(self, number: int) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):  # it has not told its end yet
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

    @property
    def patience(self) -> float:
        """Seconds for an answer."""
        return min(PATIENCE * (1 + self._round), PATIENCE_MAX)

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
                with contextlib.suppress(OSError, AssertionError, EOFError, Invalid):
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
        sock.settimeout(self.patience)
        self._open.append(sock)
        return sock

    def listener(self, where: Namespace, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        sock = self.make(where, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(64)
        return sock

    def device(self, sock: socket.socket) -> None:
        """Make `sock` one of a device on the host's network, which others search for."""
        sock.settimeout(1.0)  # the daemon is busy
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", DISCOVERY))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _request(GROUP))

    def answer(self, device: socket.socket) -> None:
        """A device answers a search, and speaks to the group."""
        _, there = device.recvfrom(100)
        device.sendto(b"200 OK", there)
        device.sendto(b"NOTIFY", (GROUP, DISCOVERY))

    # Conversations ---------------------------------------------------------------------------------------------------

    def stream(self, where: Namespace, address: str, port: int, server: socket.socket | None) -> None:
        """A connection with data in both directions, more than either end reads; ended by one end, or reset."""
        with where.make_socket() as client:
            client.settimeout(self.patience)
            client.connect((address, port))
            client.send(b"hello")
            if server is None:
                client.recv(1)
                return
            with server.accept()[0] as other:
                other.settimeout(self.patience)
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
            client.settimeout(self.patience)
            client.connect((address, port))
            for _ in range(8):
                client.send(QUERY if port == 53 else b"hello")
            if server is not None:
                _, there = server.recvfrom(100)
                burst(server, there)
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
            client.settimeout(self.patience)
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

    def visit_network(self) -> None:
        """The host gets another IPv6 address, or loses it again: the guest's follows."""
        self.host.run("ip", "address", ("del", "add")[self._round % 2], OTHER_ADDRESS, "dev", "eth0", check=False)

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
        if self.prison.user.is_root and self.inmate.way != "given":
            return super().visits() | talks  # it may not create another tap
        # The last, since what it has not read by then is gone
        return super().visits() | talks | {"without tap": self._without_tap}

    def visit_unheard(self) -> None:
        self.make(self.prison.lan.peer).connect((HOST, IN))

    def visit_probe(self) -> None:
        """Keep-alive of the guest's kernel, after a second of silence."""
        client = self.make(self._guest)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        client.connect((MAPPED, OUT))
        with self._servers[socket.SOCK_STREAM][0].accept()[0]:
            time.sleep(1.3)

    def visit_multicast(self) -> None:
        """A search in a group that is joined, its answer, and a datagram to the group; a port opens meanwhile."""
        kind = socket.SOCK_DGRAM
        with self._guest.make_socket(kind=kind) as member, self.host.make_socket(kind=kind) as device:
            self.device(device)
            member.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, _request(GROUP))
            member.sendto(b"M-SEARCH", (GROUP, DISCOVERY))
            self.answer(device)
            self._control("control", MORE_PORTS)

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
        self._guest: Client | None = None
        self._server = self.listener(self.host, "127.0.0.1", OUT)
        self._echo = self.listener(self.host, "127.0.0.1", OUT, socket.SOCK_DGRAM)

    def close(self) -> None:
        super().close()
        self.leave()

    def guest(self) -> Client:
        """The connected client, or the next one."""
        if self._guest is None:
            self._guest = self.come(Guest)
        if not self._guest.address:
            self._guest.configure()
        return self._guest

    def come(self, kind: Callable[[socket.socket], Client]) -> Client:
        """Connect as a guest."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(1.0)
            sock.connect(self._path)
            return kind(sock)
        except BaseException:
            sock.close()
            raise

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
        burst(self._echo, there)
        guest.ping(GATEWAY)
        guest.send(guest.ip(MAPPED) / ICMP(type=3, code=3) / IP(src=MAPPED) / bytes(8))  # about nothing

    def visit_multicast(self) -> None:
        """The same as a namespace's."""
        guest = self.guest()
        report = igmp.packet(addr.packed(guest.address), ALL_ROUTERS, Single(igmp.REPORT_V2, addr.packed(GROUP)).emit())
        with self.host.make_socket(kind=socket.SOCK_DGRAM) as device:
            self.device(device)
            guest.send(bytes(Ether(src=guest.mac, dst="01:00:5e:00:00:16", type=0x800)) + report)
            guest.send(guest.udp(GROUP, DISCOVERY, b"M-SEARCH"))
            self.answer(device)
            self._control("control", MORE_PORTS)

    def visit_stream(self) -> None:
        connection = self.guest().connect(MAPPED, OUT)
        with self._server.accept()[0] as other:
            other.settimeout(self.patience)
            connection.send(b"hello")
            other.recv(5)
            for _ in range(8):
                other.send(BULK)  # more than is taken: the socket of the guest is full, too
            connection.receive(5000)

    def visit_other_guest(self) -> None:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as other:
                other.settimeout(self.patience)
                other.connect(self._path)
                other.recv(1)

    def visit_probe(self) -> None:
        """Keep-alive: after a second of silence, since before it a probe needs no question."""
        connection = self.guest().connect(MAPPED, OUT)
        with self._server.accept()[0]:
            time.sleep(1.1)
            connection.sent -= 1
            connection.send_segment(ACK)
            connection.sent += 1
            connection.expect(lambda tcp: tcp.ack == connection.sent or None)

    def visit_leave(self) -> None:
        try:
            self.guest().sock.settimeout(self.patience)
            self.guest().sock.sendall(framed(FRAMES) + b"\xff" * 100)
        finally:
            self.leave()


class SharingMachines(Machines):
    """Those that share their memory, and may move with it."""

    def guest(self) -> SharingGuest:
        if self._guest is None:
            self._guest = self.come(SharingGuest)
        guest = super().guest()
        assert isinstance(guest, SharingGuest)
        return guest

    def leave(self) -> None:
        if self._guest is not None:
            assert isinstance(self._guest, SharingGuest)
            self._guest.machine.close()
            self._guest = None

    def visit_stay(self) -> None:
        """A migration that fails: the machine stops, there is no helper, and it goes on here."""
        guest = self.guest()
        guest.stop()
        guest.machine.check_state()
        guest.go_on()
        guest.ping(GATEWAY)

    def visit_move(self) -> None:
        """It leaves with a connection. When its sockets are closed, it comes here, as to another host."""
        guest = self.guest()
        connection = guest.connect(MAPPED, OUT)
        with self._server.accept()[0] as other:
            try:
                with self._helper():
                    state = guest.stop()
                    guest.machine.check_state()
                former = guest.machine
                former.sock.close()
                self.inmate.listen(1.1 * LINGER / SPEED, "visit_move")
                with self._helper():
                    guest.move_to(self._path, state)
                    former.close()
                    guest.go_on()
                    connection.send(b"hello again")
                    other.settimeout(self.patience)
                    other.recv(5)
            finally:
                self.leave()

    @contextlib.contextmanager
    def _helper(self) -> Iterator[None]:
        """passt-repair, which may fail: where the tests do not run as root, it lacks the right."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{self._path}.repair")

            def serve() -> None:
                with contextlib.suppress(Fatal):
                    repair.serve(sock)
                sock.shutdown(socket.SHUT_RDWR)

            thread = threading.Thread(target=serve)
            thread.start()
            try:
                yield
            finally:
                sock.shutdown(socket.SHUT_RDWR)
                thread.join()


def burst(server: socket.socket, there: object) -> None:
    """An answer, and a stream of them that arrives at once."""
    server.sendto(b"hello", there)  # type: ignore[arg-type]
    server.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 5)
    server.sendto(b"hello" * 16, there)  # type: ignore[arg-type]
    server.setsockopt(socket.SOL_UDP, UDP_SEGMENT, 0)


def _request(group: str) -> bytes:
    """struct ip_mreq: a group, on the interface that the routes say."""
    return socket.inet_aton(group) + bytes(4)


# Ways to be there ----------------------------------------------------------------------------------------------------


def stay(
    prison: Prison, way: str, done: Callable[[Inmate], bool] = lambda _: True, victim: str = "", first: str = ""
) -> Inmate:
    """A daemon from its beginning to its end: visited until it is done(), by `first` first, and then told to end."""
    with prison.inmate(way, victim, *_options(prison, way, quiet=bool(victim))) as inmate:
        assert inmate.locked, (way, victim, inmate.status, prison.complaints())
        inmate.way = way
        if way in WITH_GUEST:
            kind = Neighbours if prison.mode == PASTA else SharingMachines if way in SHARING else Machines
            visitors = kind(prison, inmate)
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
        return [*words, "-s", f"{here}/guest", *(["--vhost-user"] if way in SHARING else [])]
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
        inmate.wait(lambda: inmate.ran.keys() >= FORWARDED, visit=AT_END)  # the end of the command would be faster
        with contextlib.suppress(OSError):
            os.close(os.open(prison.directory / "end", os.O_WRONLY | os.O_NONBLOCK))
    end = time.monotonic() + DEADLINE
    while inmate.status is None and time.monotonic() < end:
        inmate.listen(PATIENCE, AT_END)
