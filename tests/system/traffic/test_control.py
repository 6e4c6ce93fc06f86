"""Changes of ports while pasta runs, by pesto and by the API of slirp4netns, and hostile clients."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pty
import select
import socket
import stat
import subprocess
import tempfile
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.content import CHUNK, content, digest

from ..support import DEADLINE, Runner, User, wait_for
from .support import HOST, PEER, Guest, Lan, Namespace, in_thread, read_all, refused
from .test_forward import server_in

NOTHING = ("-t", "none", "-u", "none", "-T", "none", "-U", "none")
STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM
MANY = 200_000  # requests of one client


@dataclass
class Controlled:
    """A guest whose pasta has control sockets."""

    guest: Guest
    user: User
    path: str
    api: str

    def pesto(self, *args: str, user: User | None = None) -> subprocess.CompletedProcess[str]:
        """pesto ARGS SOCKET, to its end."""
        who = user or self.user
        return subprocess.run(
            who.command([who.python, "-m", "passt.pesto", *args, self.path]),
            cwd="/", env=who.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=DEADLINE,
        )  # fmt: skip

    def change(self, *args: str) -> None:
        """A change without output."""
        done = self.pesto(*args)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def fails(self, *args: str) -> str:
        """The error of pesto, with no rule changed."""
        before = self.rules()
        done = self.pesto(*args)
        assert (done.returncode, done.stdout) == (1, "")
        assert self.rules() == before
        return done.stderr

    def rules(self) -> list[str]:
        return [rule["rule"] for rule in self.ask({"command": "show"})["rules"]]

    def connect(self, path: str | None = None) -> socket.socket:
        """A client, who is the user: the kernel notes the effective id."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(DEADLINE)
        before = os.geteuid()
        os.seteuid(self.user.uid)
        try:
            sock.connect(path or self.path)
        finally:
            os.seteuid(before)
        return sock

    def ask(self, request: dict[str, Any]) -> Any:
        with self.connect() as sock, sock.makefile("rb") as file:
            sock.sendall(json.dumps(request).encode() + b"\n")
            return json.loads(file.readline())

    def call(self, execute: str, **arguments: Any) -> Any:
        """As rootlesskit does it: a line, shutdown, and everything that comes."""
        with self.connect(self.api) as sock:
            request = {"execute": execute, "arguments": arguments or None}
            sock.sendall(json.dumps(request).encode() + b"\n")
            sock.shutdown(socket.SHUT_WR)
            return json.loads(read_all(sock))


@contextlib.contextmanager
def started(lan: Lan, user: User, *options: str) -> Iterator[Controlled]:
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, user.uid, user.gid)
        os.chmod(name, 0o755)
        path, api = f"{name}/control", f"{name}/api"
        with lan.pasta(user, "-q", "--config-net", *options, "-c", path, "--api-socket", api) as guest:
            yield Controlled(guest, user, path, api)


@pytest.fixture(scope="module")
def standing(lan: Lan, someone: User) -> Iterator[Controlled]:
    with started(lan, someone, *NOTHING) as made:
        yield made


@pytest.fixture
def controlled(standing: Controlled, lan: Lan) -> Iterator[Controlled]:
    """The module's guest, without any rule."""
    for _ in lan.lend(standing.guest):
        yield standing
    standing.ask({"command": "clear"})


def is_free(host: Namespace, port: int, kind: int = STREAM) -> bool:
    """Whether a server of the host could bind the port, in spite of old connections."""
    with host.make_socket(socket.AF_INET6, kind) as sock:
        try:
            if kind == STREAM:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("::", port))
        except OSError:
            return False
        return True


def converse(client: socket.socket, server: socket.socket) -> None:
    """A few bytes either way, on a connection."""
    client.sendall(b"question")
    assert server.recv(100) == b"question"
    server.sendall(b"answer")
    assert client.recv(100) == b"answer"


# Ports ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["tap", "loopback"])
def test_tcp(controlled: Controlled, lan: Lan, path: str) -> None:
    """As rootlesskit does it. Open connections stay, new ones are refused."""
    where, address = (lan.peer, HOST) if path == "tap" else (lan.host, "127.0.0.1")
    server = server_in(controlled.guest, socket.AF_INET, 80)
    assert refused(lambda: where.connect(address, 8080))
    controlled.change("-A", "--tcp-ports=0.0.0.0/8080:80")
    client = where.connect(address, 8080)
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        converse(client, accepted)
        controlled.change("-D", "--tcp-ports=0.0.0.0/8080:80")
        assert is_free(lan.host, 8080)
        assert refused(lambda: where.connect(address, 8080))
        converse(client, accepted)


@pytest.mark.parametrize("path", ["tap", "loopback"])
def test_udp(controlled: Controlled, lan: Lan, path: str) -> None:
    where, address = (lan.peer, HOST) if path == "tap" else (lan.host, "127.0.0.1")
    server = server_in(controlled.guest, socket.AF_INET, 53, DATAGRAM)
    for _ in range(2):
        controlled.change("--add", "-u", "5353:53")
        client = where.connect(address, 5353, DATAGRAM)
        client.send(b"question")
        data, seen = server.recvfrom(100)
        server.sendto(data + b" answered", seen)
        assert client.recv(100) == b"question answered"
        controlled.change("--delete", "-u", "5353:53")
        assert is_free(lan.host, 5353, DATAGRAM)


def test_both_families_in_one_call(controlled: Controlled, lan: Lan) -> None:
    """As podman does it."""
    controlled.change("--add", "-t", "0.0.0.0/8080", "-t", "[::]/8080", "-u", "0.0.0.0/8080", "-u", "[::]/8080")
    for address in ("127.0.0.1", "::1"):
        server = server_in(controlled.guest, socket.AF_INET6 if ":" in address else socket.AF_INET, 8080)
        client = lan.host.connect(address, 8080)
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(DEADLINE)
            converse(client, accepted)
    controlled.change("--delete", "-t", "0.0.0.0/8080", "-t", "::/8080", "-u", "0.0.0.0/8080", "-u", "[::]/8080")
    assert controlled.rules() == [] and is_free(lan.host, 8080) and is_free(lan.host, 8080, DATAGRAM)


def test_ranges_in_part(controlled: Controlled, lan: Lan) -> None:
    controlled.change("-A", "-t", "7000-7009:8000-8009,~7005")
    controlled.change("-D", "-t", "7002-7003:8002-8003")
    assert controlled.rules() == ["-t 7000-7001:8000-8001", "-t 7006-7009:8006-8009", "-t 7004:8004"]
    assert [port for port in range(7000, 7010) if is_free(lan.host, port)] == [7002, 7003, 7005]
    server = server_in(controlled.guest, socket.AF_INET, 8004)
    client = lan.host.connect("127.0.0.1", 7004)
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        converse(client, accepted)


@pytest.mark.parametrize("kind", [STREAM, DATAGRAM])
def test_outbound(controlled: Controlled, lan: Lan, kind: int) -> None:
    letter = "-T" if kind == STREAM else "-U"
    with contextlib.suppress(ConnectionRefusedError):  # a datagram is refused when there is an answer to it
        controlled.guest.connect("127.0.0.1", 5432, kind).send(b"x")
        assert kind == DATAGRAM
    controlled.change("-A", letter, "5432:5433")
    server = server_in(lan.host, socket.AF_INET, 5433, kind)
    client = controlled.guest.connect("127.0.0.1", 5432, kind)
    if kind == STREAM:
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(DEADLINE)
            converse(client, accepted)
    else:
        client.send(b"question")
        assert server.recvfrom(100)[0] == b"question"
    controlled.change("-D", letter, "5432:5433")
    assert is_free(controlled.guest, 5432, kind)


def test_leading_elsewhere(controlled: Controlled, lan: Lan) -> None:
    """The port is never closed, and open connections keep their target."""
    first, second = (server_in(controlled.guest, socket.AF_INET, port) for port in (8001, 8002))
    controlled.change("-t", "7001:8001")
    early = lan.host.connect("127.0.0.1", 7001)
    was, _ = first.accept()
    controlled.change("-t", "7001:8002")
    late = lan.host.connect("127.0.0.1", 7001)
    now, _ = second.accept()
    with was, now:
        for client, server in ((early, was), (late, now)):
            server.settimeout(DEADLINE)
            converse(client, server)
    assert controlled.rules() == ["-t 7001:8002"]


BEHIND = "192.0.2.20"  # an address that the guest has besides its own, as of a container behind it


def test_a_target_behind_the_guest_leaves_other_ports_alone(lan: Lan, someone: User) -> None:
    """The target of a rule that came later answers from an address that is not the guest's."""
    with started(lan, someone, "-t", "7001", "-u", "none", "-T", "none", "-U", "none") as controlled:
        guest = controlled.guest
        guest.run("ip", "address", "add", f"{BEHIND}/32", "dev", "lo")
        servers = {}
        for address, port in ((HOST, 7001), (BEHIND, 7000)):
            servers[port] = guest.make_socket()
            servers[port].bind((address, port))
            servers[port].listen()

        def talk(where: Namespace, address: str, port: int) -> None:
            client = where.connect(address, port)
            accepted, _ = servers[port].accept()
            with accepted:
                accepted.settimeout(DEADLINE)
                converse(client, accepted)

        talk(lan.peer, HOST, 7001)
        controlled.change("-A", "-t", f"7000:{BEHIND}/7000")
        for where, address in ((lan.peer, HOST), (lan.host, "127.0.0.1")):
            for port in (7000, 7001):
                talk(where, address, port)
        assert controlled.ask({"command": "info"})["info"]["guest"]["address"] == HOST

        # A connection outlives the rule that it came by, and its segments tell no more of the guest than before.
        client = lan.peer.connect(HOST, 7000)
        accepted, _ = servers[7000].accept()
        with accepted:
            accepted.settimeout(DEADLINE)
            controlled.change("-D", "-t", f"7000:{BEHIND}/7000")
            converse(client, accepted)
            talk(lan.peer, HOST, 7001)


def test_automatic_ones(controlled: Controlled, lan: Lan) -> None:
    """They find what is bound already at once, what comes later soon, and leave alone what is asked for by name."""
    server = server_in(controlled.guest, socket.AF_INET, 7100)
    controlled.change("-A", "-t", "auto,7100-7110")
    client = lan.host.connect("127.0.0.1", 7100)
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        converse(client, accepted)
    controlled.change("-A", "-t", "7100:7200")
    assert not is_free(lan.host, 7100) and len(controlled.rules()) == 2
    server_in(controlled.guest, socket.AF_INET, 7101)
    wait_for(lambda: not refused(lambda: lan.host.connect("127.0.0.1", 7101)), "a port appears")
    controlled.change("-C")
    assert is_free(lan.host, 7101)


# Failures ------------------------------------------------------------------------------------------------------------


def test_all_or_nothing(controlled: Controlled, lan: Lan) -> None:
    taken = lan.host.make_socket(socket.AF_INET6)
    taken.bind(("::", 7302))
    taken.listen()
    controlled.change("-A", "-t", "7310")
    said = controlled.fails("-D", "-t", "7310", "-A", "-t", "7300-7304", "-u", "7300", "-T", "7305")
    assert said == "Failed to bind port 7302 (Address already in use) for option '-t 7300-7304'\n"
    assert [port for port in range(7300, 7311) if not is_free(lan.host, port)] == [7302, 7310]
    assert is_free(lan.host, 7300, DATAGRAM) and is_free(controlled.guest, 7305)


def test_low_ports(controlled: Controlled) -> None:
    """Refused for root as well, since pasta runs as `nobody` by now."""
    said = controlled.fails("-A", "-t", "81")
    assert said.splitlines() == [
        "Failed to bind port 81 (Permission denied) for option '-t 81'",
        "To let all users bind ports from 81 up: sysctl -w net.ipv4.ip_unprivileged_port_start=81",
    ]


def test_again_and_again(controlled: Controlled) -> None:
    controlled.change("-A", "-t", "7400")
    done = controlled.pesto("-A", "-t", "7400", "-t", "7401")
    assert (done.returncode, done.stderr) == (0, "'-t 7400' is there already\n")
    assert controlled.fails("-A", "-t", "127.0.0.1/7400").startswith("Port 7400 is forwarded already, by '-t 7400'")
    controlled.change("-D", "-t", "7400-7401")
    assert controlled.fails("-D", "-t", "7400") == "Port 7400 of '-t 7400' is not forwarded\n"
    assert controlled.fails("-A", "-t", "7400:0").startswith("Invalid port specifier -t 7400:0: '0' at character 6")


# Queries -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def connection(controlled: Controlled, lan: Lan) -> Iterator[None]:
    """One that is open, and has some traffic."""
    server = server_in(controlled.guest, socket.AF_INET, 7500)
    controlled.change("-A", "-t", "7500")
    client = lan.peer.make_socket()
    client.bind((PEER, 0))
    client.connect((HOST, 7500))
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        converse(client, accepted)
        yield


def test_questions(controlled: Controlled, lan: Lan) -> None:
    with connection(controlled, lan):
        (line,) = (li for li in controlled.pesto("--flows").stdout.splitlines() if ":7500" in li)
        assert line.split()[:2] == ["tcp", next(word for word in line.split() if word.startswith(PEER))]
        shown = controlled.pesto("--show", "--stats", "--metrics", "--info").stdout
        exposed = controlled.pesto("--metrics").stdout
        counted = {f.name: sum(s.value for s in f.samples) for f in text_string_to_metric_families(exposed)}
        assert counted["passt_flows"] >= 1 and counted["passt_guest_receive_bytes"] > 0 and counted["passt_info"] == 1
        for text in (
            "-t 7500",
            "guest -> host",
            'passt_flows{kind="tcp"} 1',
            "mode:        pasta",
        ):
            assert text in shown
        (flow,) = controlled.ask({"command": "flows"})["flows"]
        assert (flow["bytes_to_guest"], flow["bytes_to_host"]) == (len("question"), len("answer"))


def test_the_live_view(controlled: Controlled, lan: Lan) -> None:
    """On a terminal of 80 columns, until q is pressed."""
    user = controlled.user
    with connection(controlled, lan):
        pid, fd = pty.fork()
        if pid == 0:
            argv = user.command([user.python, "-m", "passt.pesto", "--top", controlled.path])
            os.chdir("/")
            os.execvpe(argv[0], argv, user.env)
        termios.tcsetwinsize(fd, (24, 80))
        screen = bytearray()
        end = time.monotonic() + DEADLINE
        try:
            while b"TOTAL" not in screen or PEER.encode() not in screen:
                assert select.select([fd], [], [], end - time.monotonic())[0], screen
                screen += os.read(fd, 65536)
            os.write(fd, b"q")
            with contextlib.suppress(OSError):  # EIO: the other end is closed
                while data := os.read(fd, 65536):
                    screen += data
        finally:
            os.close(fd)
            _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert screen.endswith(b"\x1b[?25h\x1b[?1049l"), "the terminal is as it was"


# Hostile clients -----------------------------------------------------------------------------------------------------


def garbage(c: Controlled) -> None:
    for data in (
        b"garbage\n",
        b"\0" * 100_000,
        b"[" * 65_000 + b"\n",
        b'{"a":' * 9_000 + b"\n",
        os.urandom(1000) + b"\n",
    ):
        for path in (c.path, c.api):
            with c.connect(path) as sock, contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
                sock.shutdown(socket.SHUT_WR)
                assert b"error" in read_all(sock)


def half_a_message(c: Controlled) -> None:
    socks = [c.connect() for _ in range(8)]
    for sock in socks:
        sock.sendall(b'{"command": ')
    assert c.ask({"command": "show"})["ok"]
    for sock in socks:
        sock.close()


def a_million_requests(c: Controlled) -> None:
    """All of them are answered, to who reads the answers."""
    request = b'{"command":"info","x":1}\n'
    with c.connect() as sock, sock.makefile("rb") as file:

        def send() -> None:
            for _ in range(MANY // 1000):
                sock.sendall(request * 1000)

        with in_thread(send) as sent:
            answers = sum(file.readline().startswith(b'{"ok":false') for _ in range(MANY))
            sent()
        assert answers == MANY


def no_answers_read(c: Controlled) -> None:
    """Until nothing more is taken from it."""
    with c.connect() as sock:
        sock.settimeout(0.5)
        with contextlib.suppress(TimeoutError):
            for _ in range(MANY):
                sock.sendall(b'{"command":"show"}\n' * 100)
            raise AssertionError("whatever is sent is taken")
        assert c.ask({"command": "show"})["ok"]


def a_hundred_connections(c: Controlled) -> None:
    socks = [c.connect() for _ in range(100)]
    told = [
        sock
        for sock in socks[20:]
        if sock.recv(1000).startswith(b'{"ok":false,"error":"there are 16 clients already"}')
    ]
    assert len(told) == 80
    for sock in socks:
        sock.close()
    wait_for(lambda: c.pesto("--show").returncode == 0, "there is room again")


@pytest.mark.parametrize("hurt", [garbage, half_a_message, a_million_requests, no_answers_read, a_hundred_connections])
def test_hostile_clients(controlled: Controlled, lan: Lan, hurt: Callable[[Controlled], None]) -> None:
    """A transfer goes on, and is intact; afterwards everything is as it was."""
    size = 256 * CHUNK
    server = server_in(controlled.guest, socket.AF_INET, 7600)
    controlled.change("-A", "-t", "7600")
    client = lan.peer.connect(HOST, 7600)
    accepted, _ = server.accept()
    done = False

    def send() -> None:
        with accepted:
            for chunk in content(size):
                accepted.sendall(chunk)
            while not done:
                accepted.sendall(b"\0" * 1000)  # as long as it takes
                time.sleep(0.01)

    def receive() -> str:
        sha, left = hashlib.sha256(), size
        while left:
            data = client.recv(min(left, CHUNK))
            assert data
            sha.update(data)
            left -= len(data)
        while client.recv(CHUNK):
            pass
        return sha.hexdigest()

    accepted.settimeout(DEADLINE)
    with in_thread(send), in_thread(receive) as received:
        try:
            hurt(controlled)
        finally:
            done = True
        assert received() == digest(size)
    assert controlled.rules() == ["-t 7600"]
    assert "Traceback" not in controlled.guest.said()


# Access --------------------------------------------------------------------------------------------------------------


def test_others_may_not(controlled: Controlled) -> None:
    """Even if the modes of the file system let them."""
    assert stat.S_IMODE(os.stat(controlled.path).st_mode) == 0o700
    other = User("other", 54321, 54321, "/usr/bin/python3", controlled.user.env)
    done = controlled.pesto("--show", user=other)
    assert (done.returncode, done.stderr.count("Permission denied")) == (1, 1)
    os.chmod(controlled.path, 0o777)
    try:
        done = controlled.pesto("--show", user=other)
    finally:
        os.chmod(controlled.path, 0o700)
    if controlled.user.is_root:  # an unmapped user looks like the user who started it, root, in its user namespace
        assert done.returncode == 0
    else:
        assert done.returncode == 1 and "is not allowed: connect as the user who started it" in done.stderr


def test_root_may(controlled: Controlled, root: User) -> None:
    assert controlled.pesto("--show", user=root).returncode == 0


# slirp4netns ---------------------------------------------------------------------------------------------------------


def test_the_api_of_slirp4netns(controlled: Controlled, lan: Lan) -> None:
    server = server_in(controlled.guest, socket.AF_INET, 80)
    added = controlled.call(
        "add_hostfwd", proto="tcp", host_addr="0.0.0.0", host_port=8080, guest_addr="10.0.2.100", guest_port=80
    )
    number = added["return"]["id"]
    client = lan.host.connect("127.0.0.1", 8080)
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        converse(client, accepted)
    (entry,) = controlled.call("list_hostfwd")["return"]["entries"]
    assert (entry["id"], entry["proto"], entry["host_addr"], entry["host_port"], entry["guest_port"]) == (
        number, "tcp", "0.0.0.0", 8080, 80,
    )  # fmt: skip
    again = controlled.call("add_hostfwd", proto="tcp", host_addr="127.0.0.1", host_port=8080, guest_port=81)
    assert "8080" in again["error"]["desc"]
    assert controlled.call("remove_hostfwd", id=number) == {"return": {}}
    assert is_free(lan.host, 8080)
    assert controlled.call("remove_hostfwd", id=number)["error"] == {
        "desc": "bad request: remove_hostfwd: bad arguments.id"
    }


def test_a_request_without_a_newline(controlled: Controlled) -> None:
    with controlled.connect(controlled.api) as sock:
        sock.sendall(b'{"execute": "list_hostfwd"}')
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == b'{"return": {"entries": []}, "entries": []}'


# Start and end -------------------------------------------------------------------------------------------------------


def test_paths(pasta: Runner, open_dir: Path) -> None:
    """A stale socket is replaced, a live one is not; a failed start leaves no socket."""
    path = str(open_dir / "socket")
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    os.chown(path, pasta.user.uid, pasta.user.gid)
    stale.close()
    namespace = pasta.namespace()
    pasta.daemon("-q", "-c", path, *NOTHING, str(namespace))
    done = pasta.run("-q", "-c", path, *NOTHING, "--", "true")
    assert (done.returncode, done.stderr.splitlines()[-1:]) == (1, [f"Socket path {path} already in use"])
    other = str(open_dir / "other")
    done = pasta.run("-q", "-c", other, "-t", "192.0.2.99/7700", "--", "true")
    assert done.returncode == 1 and "Failed to bind port 7700" in done.stderr
    assert not os.path.exists(other) or pasta.user.is_root
    done = pasta.run("-q", "-c", str(open_dir / "no" / "socket"), "--", "true")
    assert done.returncode == 1 and "No such file or directory" in done.stderr


def test_splice_only(lan: Lan, ordinary_user: User) -> None:
    """There is no tap; ports change all the same."""
    with started(lan, ordinary_user, "--splice-only", *NOTHING) as c:
        server = server_in(c.guest, socket.AF_INET, 7800)
        c.change("-A", "-t", "7800")
        client = lan.host.connect("127.0.0.1", 7800)
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(DEADLINE)
            converse(client, accepted)


def test_from_the_start(lan: Lan, ordinary_user: User) -> None:
    """Rules that were given then are in the table, and can be deleted."""
    with started(lan, ordinary_user, "-t", "7900-7909,~7905", "-u", "auto", "-T", "none", "-U", "none") as c:
        assert c.rules() == ["-t 7900-7904", "-t 7906-7909", "-u auto"]
        c.change("-D", "-t", "7900-7904", "-u", "auto")
        assert c.rules() == ["-t 7906-7909"] and is_free(lan.host, 7900)
