"""A host, a peer and guests for the traffic tests, and sockets in each of them for the test to hold.

    guest --tap-- pasta --sockets-- host ==veth== peer
                                     lo

`Lan` makes the host and the peer as network namespaces: the machine's own network and settings stay as they are. A
guest is whatever pasta makes of `pasta [OPTIONS] -- AGENT`; when the agent ends, pasta has to end with status 0 and
without having complained, and closing a guest checks that.

The test plays both ends of a conversation by itself: `guest.make_socket()` and `lan.host.make_socket()` are ordinary
sockets that live in the other namespace. Real programs run there by `run` and `popen`.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from bench.lab import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6

from ..support import DEADLINE, User, descendants, environment, wait_for

__all__ = [
    "GATEWAY",
    "GATEWAY6",
    "HOST",
    "HOST6",
    "PEER",
    "PEER6",
    "Guest",
    "Lan",
    "Namespace",
    "in_thread",
    "read_all",
]

AGENT = Path(__file__).with_name("agent.py")
AGENT_PYTHON = "/usr/bin/python3"  # all users may execute it, and it starts fast
PASTA = os.environ.get("PASTA")  # another pasta than ours, to try the tests themselves
START = "\nimport sys; from passt.cli import main; sys.exit(main(['pasta', *sys.argv[1:]]))"
NAMESPACES = {"user": "-U", "mnt": "-m", "net": "-n", "pid": "-p"}


def _differing(pid: int) -> list[str]:
    """Flags for nsenter(1) for those namespaces of `pid` that are not ours."""
    flags = []
    for name, flag in NAMESPACES.items():
        if os.readlink(f"/proc/{pid}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}"):
            flags.append(flag)
    return [*flags, "--preserve-credentials"] if "-U" in flags else flags


Done = subprocess.CompletedProcess[str]


class Namespace:
    """The namespaces of an agent: run programs there, and make sockets there."""

    def __init__(self, command: Sequence[str], user: User, stderr: IO[bytes] | None = None) -> None:
        self.user = user
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        argv = [*command, AGENT_PYTHON, "-SE", str(AGENT)]
        with theirs:
            self.process = subprocess.Popen(argv, stdin=theirs.fileno(), stderr=stderr, env=user.env, cwd="/")
        self._control = ours
        self._control.settimeout(DEADLINE)
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        if not self._control.recv(256):
            raise RuntimeError(f"{command} ended with status {self.process.wait()}")

    @property
    def pid(self) -> int:
        """PID of a process in the namespaces, as the test sees it."""
        return self.process.pid

    def argv(self, command: Sequence[str]) -> list[str]:
        """`command` as to be executed by the test.

        A user namespace is entered as its owner, who is root inside: an unmapped user would lose all privileges there
        on executing a program.
        """
        flags = _differing(self.pid)
        owner = os.stat(f"/proc/{self.pid}")
        become = ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
        change = "-U" in flags and owner.st_uid != os.geteuid()
        return [*(become if change else []), "nsenter", "-t", str(self.pid), *flags, "--", *command]

    def run(self, *command: str, check: bool = True, timeout: float = DEADLINE, **kw: Any) -> Done:
        """`command` to its end; with `check` it must succeed."""
        if "input" not in kw:
            kw.setdefault("stdin", subprocess.DEVNULL)
        kw.setdefault("env", self.user.env)
        done = subprocess.run(
            self.argv(command), cwd="/", capture_output=True, text=True, timeout=timeout, check=False, **kw
        )
        assert not check or done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def show(self, *args: str) -> Any:
        """ip -j, decoded."""
        return json.loads(self.run("ip", "-j", *args).stdout or "[]")

    @contextlib.contextmanager
    def popen(self, *command: str, **kw: Any) -> Iterator[subprocess.Popen[str]]:
        """`command`, running while the context lasts; killed by the kernel if the test is."""
        kw.setdefault("stdin", subprocess.DEVNULL)
        kw.setdefault("env", self.user.env)
        argv = self.argv(["setpriv", "--pdeathsig", "KILL", *command])
        with subprocess.Popen(argv, cwd="/", text=True, **kw) as process:
            try:
                yield process
            finally:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()

    def write(self, path: str, text: str) -> None:
        """Write a file as seen there, as /proc/sys/net/..."""
        self.run("sh", "-c", 'printf %s "$1" > "$2"', "sh", text, path)

    def make_socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        """A new socket there, with a timeout; closed with the namespace at the latest."""
        with self._lock:
            self._control.send(json.dumps([int(family), int(kind), protocol]).encode())
            reply, fds, _, _ = socket.recv_fds(self._control, 256, 1)
            if fds:
                self._control.recv(256)  # the agent has closed its copy
        answer = json.loads(reply)
        if "errno" in answer:
            raise OSError(answer["errno"], os.strerror(answer["errno"]))
        made = socket.socket(fileno=fds[0])
        made.settimeout(DEADLINE)
        self._sockets.append(made)
        return made

    def listen(self, address: str, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket bound to `address` and a free port; a stream socket listens."""
        made = self.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        made.bind((address, 0))
        if kind == socket.SOCK_STREAM:
            made.listen(128)
        return made

    def connect(self, address: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        """A socket connected to `address`."""
        made = self.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        made.connect((address, port))
        return made

    def close_sockets(self) -> None:
        """Close what `make_socket` made."""
        for made in self._sockets:
            made.close()
        self._sockets.clear()

    def close(self) -> None:
        """End the agent."""
        self.close_sockets()
        self._control.close()
        try:
            self.process.wait(DEADLINE)
        finally:
            self.process.kill()
            self.process.wait()


class Guest(Namespace):
    """The guest of a pasta that runs for `user` on `host`."""

    def __init__(self, host: Namespace, user: User, *options: str, descriptors: int = 0, before: str = "") -> None:
        pasta = [PASTA] if PASTA else [user.python, *(["-c", before + START] if before else ["-m", "passt"])]
        if descriptors:
            pasta = ["prlimit", f"--nofile={descriptors}:{descriptors}", *pasta]
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the guest
        on_host = ["nsenter", "-t", str(host.pid), *_differing(host.pid), "--"]
        argv = [*on_host, *user.command([*pasta, *options, "--"])]
        super().__init__(argv, user, stderr=self._stderr)
        self._agent = descendants(self.process.pid)[-1]

    @property
    def pid(self) -> int:
        """PID of the agent."""
        return self._agent

    @property
    def daemon(self) -> int:
        """PID of pasta."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether pasta still runs."""
        return self.process.poll() is None

    def said(self) -> str:
        """Output of pasta on standard error so far."""
        # Its position in the file is pasta's, too.
        return os.pread(self._stderr.fileno(), 1 << 20, 0).decode(errors="replace")

    def abandon(self) -> str:
        """End everything at once, after a failure; what pasta had said."""
        self.close_sockets()
        self._control.close()
        self.process.kill()
        self.process.wait()
        with self._stderr:
            return self.said()

    def close(self) -> None:
        """End the agent; pasta must follow with status 0, and have no traceback to show."""
        super().close()
        said = self.said()
        self._stderr.close()
        assert self.process.returncode == 0, f"pasta ended with {self.process.returncode}: {said}"
        assert "Traceback" not in said, said


@dataclass
class Lan:
    """The host and the peer."""

    host: Namespace
    peer: Namespace
    guests: list[Guest] = field(default_factory=list)

    @contextlib.contextmanager
    def pasta(self, user: User, *options: str, descriptors: int = 0, before: str = "") -> Iterator[Guest]:
        """A guest of `pasta OPTIONS`, which may have so many descriptors; `before` is Python to be executed first."""
        guest = Guest(self.host, user, *options, descriptors=descriptors, before=before)
        try:
            yield guest
        except BaseException:
            print(guest.abandon())
            raise
        guest.close()

    def lend(self, guest: Guest) -> Iterator[Guest]:
        """For the fixture of a test: a guest that others use after it. Sockets of the test end with it, and the guest
        must not have.
        """
        yield guest
        for namespace in (guest, self.host, self.peer):
            namespace.close_sockets()
        assert guest.alive(), guest.said()


@contextlib.contextmanager
def new_lan(root: User, v4: bool = True, v6: bool = True, pings: bool = True) -> Iterator[Lan]:
    """A host with the families asked for, which may allow ping sockets, and a peer on the wire of its gateway."""
    unshare = ["unshare", "--net", "--mount"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    host = Namespace(unshare, root)
    peer = Namespace(["nsenter", "-t", str(host.pid), *_differing(host.pid), "unshare", "--net"], root)
    try:
        host.run("mount", "-t", "tmpfs", "tmpfs", "/run")  # for the servers' own files
        host.run("ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(peer.pid))
        for namespace, addresses in ((host, ((HOST, HOST6),)), (peer, ((GATEWAY, GATEWAY6), (PEER, PEER6)))):
            for address, address6 in addresses:
                if v4:
                    namespace.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
                if v6:
                    namespace.run("ip", "address", "add", f"{address6}/64", "dev", "eth0", "nodad")
            namespace.run("ip", "link", "set", "lo", "up")
            namespace.run("ip", "link", "set", "eth0", "up")
        if v4:
            host.run("ip", "route", "add", "default", "via", GATEWAY)
        if v6:
            host.run("ip", "route", "add", "default", "via", GATEWAY6)
            wait_for(lambda: "tentative" not in host.run("ip", "-6", "address").stdout, "link-local address")
        if pings:  # a new namespace has none
            highest = "0" if os.geteuid() else "2147483647"
            host.write("/proc/sys/net/ipv4/ping_group_range", f"0 {highest}")
        yield Lan(host, peer)
    finally:
        peer.close()
        host.close()


def root_user() -> User:
    """The owner of the namespaces: root, or an ordinary user who is root in a user namespace of its own."""
    return User("root", os.geteuid(), os.getegid(), AGENT_PYTHON, environment(HOME="/tmp", SHELL="/bin/sh"))


@contextlib.contextmanager
def in_thread(function: Callable[..., Any], *args: Any) -> Iterator[Callable[[], Any]]:
    """`function(*args)` meanwhile; the value is a call that gives its result or raises its exception."""
    result: list[Any] = []
    failure: list[BaseException] = []

    def body() -> None:
        try:
            result.append(function(*args))
        except BaseException as e:  # handed to the test, by `outcome`
            failure.append(e)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()

    def outcome() -> Any:
        thread.join(4 * DEADLINE)
        assert not thread.is_alive(), f"{function.__name__} did not end"
        if failure:
            raise failure[0]
        return result[0]

    yield outcome
    outcome()


def read_all(sock: socket.socket) -> bytes:
    """Everything up to the end of the stream."""
    data = bytearray()
    while chunk := sock.recv(1 << 20):
        data += chunk
    return bytes(data)


def refused(call: Callable[[], Any]) -> bool:
    """Whether `call` fails with ECONNREFUSED; another error is raised."""
    try:
        call()
    except OSError as e:
        if e.errno != errno.ECONNREFUSED:
            raise
        return True
    return False
