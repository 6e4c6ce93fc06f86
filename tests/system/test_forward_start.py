"""Forwarded ports from start to end: bound before we are ready, said when they cannot be, followed while automatic.

Everything happens in a host made of a network namespace, whose ports are its own. The test holds sockets in it and in
the guest's namespace.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt.linux.netns import open_ns, run_in
from passt.linux.syscall import CLONE_NEWNET

from .support import DEADLINE, Host, Runner, User, alive, enter, leftovers, new_host, wait_for

NONE = {"-t": "none", "-u": "none", "-T": "none", "-U": "none"}
TCP_CLOSE = 7  # of TCP_INFO
LOW = 81  # a port that takes privileges
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}


@pytest.fixture
def hosted(anyone: User, host: Host) -> Iterator[Runner]:
    """pasta on `host`, for the ordinary user and for root."""
    runner = Runner(anyone, host)
    yield runner
    runner.close()


def options(**given: str) -> list[str]:
    """-t none -u none -T none -U none, but for what is given as t="80"."""
    return [word for pair in {**NONE, **{f"-{k}": v for k, v in given.items()}}.items() for word in pair]


class Place:
    """Sockets in a network namespace, for the test to hold; a context that closes them."""

    def __init__(self, path: str) -> None:
        self._fd = open_ns(path, CLONE_NEWNET)
        self._socks: list[socket.socket] = []

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        for s in self._socks:
            s.close()
        os.close(self._fd)

    def sock(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM) -> socket.socket:
        s = run_in(self._fd, lambda: socket.socket(family, kind))
        s.settimeout(DEADLINE)
        self._socks.append(s)
        return s

    def server(self, port: int, kind: int = socket.SOCK_STREAM, address: str = "0.0.0.0") -> socket.socket:
        s = self.sock(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        if kind == socket.SOCK_STREAM:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind((address, port))
        if kind == socket.SOCK_STREAM:
            s.listen()
        return s

    def client(self, port: int, family: int = socket.AF_INET) -> socket.socket:
        s = self.sock(family)
        s.connect((LOOPBACK[socket.AddressFamily(family)], port))
        return s

    def listening(self, port: int, kind: int = socket.SOCK_STREAM) -> bool:
        """Whether a socket listens on `port` of 127.0.0.1."""
        with self.sock(kind=kind) as s:
            if kind == socket.SOCK_STREAM:
                return s.connect_ex(("127.0.0.1", port)) != errno.ECONNREFUSED  # it may reset us at once
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                return True
            return False


@pytest.fixture
def on_host(host: Host) -> Iterator[Place]:
    with Place(host.path) as place:
        yield place


def guest(pid: int) -> Place:
    return Place(f"/proc/{pid}/ns/net")


def talk(server: socket.socket, client: socket.socket) -> None:
    """A question and an answer, over a connection that `server` accepts."""
    accepted, _ = server.accept()
    with accepted:
        accepted.settimeout(DEADLINE)
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer")
        assert client.recv(100) == b"answer"


# Bound when we are ready ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", LOOPBACK)
def test_a_thousand_ports(hosted: Runner, on_host: Place, family: int) -> None:
    target = hosted.namespace()
    hosted.daemon("--config-net", *options(t="20000-20999"), str(target))
    with guest(target) as place:
        for port in (20000, 20500, 20999):
            talk(place.server(port), on_host.client(port, family))
        assert on_host.sock().connect_ex(("127.0.0.1", 21000)) != 0


def test_outbound_ports(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    hosted.daemon("--config-net", *options(T="20000-20001:30000-30001"), str(target))
    with guest(target) as place:
        for family in LOOPBACK:
            talk(on_host.server(30001, address=LOOPBACK[family]), place.client(20001, family))


def test_ports_are_bound_when_a_command_starts(hosted: Runner) -> None:
    done = hosted.run("--config-net", *options(T="2222"), "--", "sh", "-c", "ss -Htln | grep -c :2222")
    assert (done.returncode, done.stdout) == (0, "2\n")


def test_restart_on_the_same_ports(hosted: Runner, on_host: Place) -> None:
    """The predecessor is told to end and not waited for, with connections that linger."""
    target = hosted.namespace()
    with guest(target) as place:
        server = place.server(20003)
        for _ in range(20):
            daemon = hosted.daemon("--config-net", *options(t="20000-20009", u="20000-20009"), str(target))
            talk(server, on_host.client(20003))
            os.kill(daemon, signal.SIGTERM)
        wait_for(lambda: not alive(daemon), "the end of pasta")


def test_low_ports(hosted: Runner, on_host: Place) -> None:
    """Root binds them and then becomes nobody; other users get advice."""
    target = hosted.namespace(userns=not hosted.user.is_root)
    if not hosted.user.is_root:
        done = hosted.run(*options(t=f"{LOW}"), str(target))
        assert done.returncode == 1
        assert done.stderr == (
            f"Failed to bind port {LOW} (Permission denied) for option '-t {LOW}'\n"
            f"To let all users bind ports from {LOW} up: sysctl -w net.ipv4.ip_unprivileged_port_start={LOW}\n"
        )
        return
    daemon = hosted.daemon("--config-net", *options(t=f"{LOW}"), str(target))
    assert os.stat(f"/proc/{daemon}").st_uid != 0
    with guest(target) as place:
        talk(place.server(LOW), on_host.client(LOW))
    done = hosted.run("--config-net", *options(u=f"{LOW}"), "--", "id", "-u")  # the command runs as `nobody`, too
    assert (done.returncode, done.stdout) == (0, "0\n"), done.stderr


# Not to be had --------------------------------------------------------------------------------------------------------


def holder(runner: Runner) -> str:
    """The name of this test, which root runs, in messages to the user of `runner`."""
    if not runner.user.is_root:
        return "a process of root"
    return f"{Path('/proc/self/comm').read_text().strip()} (PID {os.getpid()})"


@pytest.mark.parametrize(("option", "kind"), [("t", socket.SOCK_STREAM), ("u", socket.SOCK_DGRAM)])
def test_port_in_use(hosted: Runner, on_host: Place, option: str, kind: int) -> None:
    on_host.server(8080, kind)
    mark = f"sleep 1000.{os.getpid()}"
    done = hosted.run(*options(**{option: "8080"}), "--", *mark.split())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"Failed to bind port 8080 (Address already in use) for option '-{option} 8080'\n"
        f"{'TCP' if option == 't' else 'UDP'} port 8080 is held by {holder(hosted)}\n"
    )
    assert leftovers(mark.replace(" ", "\0")) == []


def test_port_in_use_inside(hosted: Runner) -> None:
    target = hosted.namespace()
    with guest(target) as place:
        place.server(8080, address="127.0.0.1")
        done = hosted.run(*options(T="8079-8081"), str(target))
        assert done.returncode == 1
        first, second = done.stderr.splitlines()
        assert first == "Failed to bind port 8080 (Address already in use) for option '-T 8079-8081'"
        assert second.startswith("TCP port 8080 is held by ")
    # Nothing is left behind, neither the port nor the interface
    hosted.daemon("-I", "tap0", *options(T="8079-8081"), str(target))


def test_range_partly_in_use(hosted: Runner, on_host: Place) -> None:
    for port in (8002, 8003, 8004, 8008):
        on_host.server(port, address="127.0.0.1")
    on_host.server(9000, socket.SOCK_DGRAM)
    target = hosted.namespace()
    done = hosted.run(*options(t="8000-8009", u="9000"), str(target))
    assert done.returncode == 1
    assert done.stderr.splitlines() == [
        "Failed to bind ports 8002-8004 (Address already in use) for option '-t 8000-8009'",
        "Failed to bind port 8008 (Address already in use) for option '-t 8000-8009'",
        "Failed to bind port 9000 (Address already in use) for option '-u 9000'",
        *(f"TCP port {port} is held by {holder(hosted)}" for port in (8002, 8003, 8004)),
    ]


def test_exclusions_alone_take_what_there_is(hosted: Runner, on_host: Place) -> None:
    """As `all` does, which takes more descriptors than a machine may allow."""
    on_host.server(8080)
    target = hosted.namespace()
    hosted.daemon("--config-net", *options(t="~1-7999,~8100-65535"), str(target))
    with guest(target) as place:
        talk(place.server(8081), on_host.client(8081))


def test_too_many_ports(hosted: Runner) -> None:
    target = hosted.namespace()
    done = limited(hosted, 256, *options(t="2000-3000"), str(target))
    assert done.returncode == 1
    assert "Can't open enough sockets for port specifier: -t 2000-3000 (needs 11" in done.stderr
    assert done.stderr.endswith("descriptors, the limit is 256: raise ulimit -Hn)\n")


def test_unknown_interface(hosted: Runner) -> None:
    done = hosted.run(*options(t="%eth9/80"), "--", "true")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Invalid interface name eth9: No such device (option '-t %eth9/80')\n"


# Automatic ------------------------------------------------------------------------------------------------------------


def test_ports_appear_and_vanish(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    with guest(target) as place:
        early = place.server(7001)
        hosted.daemon("--config-net", *options(t="auto", T="auto"), str(target))
        talk(early, on_host.client(7001))  # what was there at start needs no waiting for
        late, ours = place.server(7002), on_host.server(7003)
        wait_for(lambda: on_host.listening(7002), "the port of the guest")
        late.accept()[0].close()
        talk(late, on_host.client(7002, socket.AF_INET6))
        wait_for(lambda: place.listening(7003), "the port of the host")
        ours.accept()[0].close()
        client = on_host.client(7002)
        accepted, _ = late.accept()
        late.close()
        ours.close()
        wait_for(lambda: not on_host.listening(7002), "the end of the port of the guest")
        wait_for(lambda: not place.listening(7003), "the end of the port of the host")
        with accepted:
            accepted.settimeout(DEADLINE)
            client.sendall(b"still there")
            assert accepted.recv(100) == b"still there"


def test_udp_ports_appear_and_vanish(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    with guest(target) as place:
        hosted.daemon("--config-net", *options(u="auto"), str(target))
        server = place.server(7005, socket.SOCK_DGRAM)
        wait_for(lambda: on_host.listening(7005, socket.SOCK_DGRAM), "the port of the guest")
        client = on_host.sock(kind=socket.SOCK_DGRAM)
        client.connect(("127.0.0.1", 7005))
        client.send(b"question")
        data, sender = server.recvfrom(100)
        server.sendto(data[::-1], sender)
        assert client.recv(100) == b"noitseuq"
        server.close()
        client.close()
        wait_for(lambda: not on_host.listening(7005, socket.SOCK_DGRAM), "the end of the port")


def test_no_echo(hosted: Runner, on_host: Place) -> None:
    """Servers on both sides: each is followed from the other one, and goes when it goes, not kept alive by its echo."""
    target = hosted.namespace()
    with guest(target) as place:
        inner, outer = place.server(7010), on_host.server(7011)
        hosted.daemon("--config-net", *options(t="auto", u="auto", T="auto", U="auto"), str(target))
        talk(inner, on_host.client(7010))
        talk(outer, place.client(7011))
        for port in (7010, 7011):
            here, there = (on_host, place) if port == 7010 else (place, on_host)
            assert here.listening(port, socket.SOCK_DGRAM) and not there.listening(port, socket.SOCK_DGRAM)
        inner.close()
        outer.close()
        for place_, port in ((on_host, 7010), (place, 7011)):
            wait_for(lambda p=place_, n=port: not p.listening(n), "the end of a port")  # type: ignore[misc]
            assert not place_.listening(port, socket.SOCK_DGRAM)


# Idle -----------------------------------------------------------------------------------------------------------------


QUIET = 1.2  # s: longer than a look at automatic ports is apart from the next


def switches(pid: int) -> list[str]:
    status = Path(f"/proc/{pid}/status").read_text()
    return [line for line in status.splitlines() if "ctxt_switches" in line]


@pytest.mark.parametrize("more", [[], ["--splice-only"]])
def test_nothing_wakes_us_without_automatic_ports(hosted: Runner, more: list[str]) -> None:
    target = hosted.namespace()
    daemon = hosted.daemon(*more, *options(t="8000-8009"), str(target))  # the interface stays down: no frames
    wait_for(lambda: sleeps(daemon, QUIET), "a quiet moment")  # the host's addresses are new: there are changes to read


def sleeps(pid: int, seconds: float) -> bool:
    before = switches(pid)
    time.sleep(seconds)
    return switches(pid) == before


# Rights ---------------------------------------------------------------------------------------------------------------


def test_root_keeps_no_capability_for_namespaces_of_others(root_pasta: Runner, host: Host) -> None:
    """Low ports that are bound already are followed all the same."""
    root_pasta.host = host
    with new_host() as target, Place(host.path) as outside, Place(target.path) as within:
        ports = options(t="8000", T="auto")
        low = outside.server(LOW)
        daemon = root_pasta.daemon("--config-net", "-I", "tap9", *ports, "--netns", target.name)
        status = dict(line.split(":\t") for line in Path(f"/proc/{daemon}/status").read_text().splitlines())
        held = [int(status[f"Cap{kind}"], 16) for kind in ("Inh", "Prm", "Eff", "Amb")]
        assert held == [0, 0, 0, 0]
        assert status["Uid"].split() == ["65534"] * 4
        talk(within.server(8000), outside.client(8000))
        assert within.listening(LOW)
        low.accept()[0].close()
        outside.server(LOW + 1)
        outside.server(1024)
        wait_for(lambda: within.listening(1024), "a port that appears later")
        assert not within.listening(LOW + 1)
        assert alive(daemon)


# Without a tap --------------------------------------------------------------------------------------------------------


def test_splice_only(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    hosted.daemon("--splice-only", *options(t="8000", u="8000", T="8001"), str(target))
    with guest(target) as place:
        links = [line.split() for line in enter(target, "ip", "-br", "link").decode().splitlines()]
        assert [(link[0], "UP" in link[-1]) for link in links] == [("lo", True)]
        talk(place.server(8000), on_host.client(8000))
        talk(on_host.server(8001), place.client(8001))
        server = place.server(8000, socket.SOCK_DGRAM)
        client = on_host.sock(kind=socket.SOCK_DGRAM)
        client.connect(("127.0.0.1", 8000))
        client.send(b"question")
        server.sendto(b"answer", server.recvfrom(100)[1])
        assert client.recv(100) == b"answer"
        stranger = on_host.sock()
        stranger.connect_ex(("198.51.100.7", 8000))  # may be reset at once
        wait_for(lambda: is_closed(stranger), "a refusal")


# Without descriptors --------------------------------------------------------------------------------------------------


def test_without_descriptors_connections_are_refused_and_none_is_harmed(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    limited_daemon(hosted, 400, "--config-net", *options(t="8000"), str(target))
    with guest(target) as place:
        server = place.server(8000)
        client = on_host.client(8000)
        accepted, _ = server.accept()
        with accepted:
            crowd = [on_host.sock() for _ in range(400)]
            for c in crowd:
                c.connect_ex(("127.0.0.1", 8000))  # some are reset at once
            wait_for(lambda: any(is_closed(c) for c in crowd), "a refusal")
            accepted.settimeout(DEADLINE)
            client.sendall(b"still there")
            assert accepted.recv(100) == b"still there"
        for c in crowd:
            c.close()
        wait_for(lambda: served(on_host, server), "a connection when there is room again")


def test_a_guest_that_binds_ports_does_not_take_all_descriptors(hosted: Runner, on_host: Place) -> None:
    """They are followed up to a quarter of them; beyond, as soon as others vanish."""
    target = hosted.namespace()
    with guest(target) as place:
        servers = [place.server(port) for port in range(9000, 9150)]
        pid = limited_daemon(hosted, 400, "--config-net", *options(t="auto", u="auto"), str(target))
        assert len(os.listdir(f"/proc/{pid}/fd")) < 250
        assert on_host.listening(9099) and not on_host.listening(9100)
        servers[0].close()
        wait_for(lambda: on_host.listening(9100), "the next port")
        assert not on_host.listening(9000)
        talk(servers[50], on_host.client(9050))


def test_all_ports_with_too_few_descriptors_are_those_that_servers_have(hosted: Runner, on_host: Place) -> None:
    target = hosted.namespace()
    with guest(target) as place:
        server = place.server(8099)
        pid = limited_daemon(hosted, 400, "--config-net", *options(t="all", u="all"), str(target))
        assert len(os.listdir(f"/proc/{pid}/fd")) < 200
        assert not on_host.listening(8097)
        talk(server, on_host.client(8099))
        later = [place.server(port) for port in (8097, 8098)]
        wait_for(lambda: on_host.listening(8097), "the ports of servers that came later")
        talk(later[1], on_host.client(8098))


def limited_daemon(pasta: Runner, descriptors: int, *args: str) -> int:
    """The PID of pasta ARGS that may have only so many."""
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        pid_file = Path(directory, "pid")
        done = limited(pasta, descriptors, "-P", str(pid_file), *args)
        assert done.returncode == 0, done.stderr
        pasta.daemons.append(int(pid_file.read_text()))
    return pasta.daemons[-1]


def limited(pasta: Runner, descriptors: int, *args: str) -> subprocess.CompletedProcess[str]:
    """pasta ARGS that may have only so many."""
    argv = ["prlimit", f"--nofile={descriptors}", "--", *pasta.user.pasta(*args, host=pasta.host)]
    return subprocess.run(argv, cwd="/", env=pasta.user.env, capture_output=True, text=True, check=False)


def served(on_host: Place, server: socket.socket) -> bool:
    """Whether a new client is heard, by a server that others have left connections at."""
    server.settimeout(0.2)
    try:
        client = on_host.client(8000)
        client.sendall(b"after that")
        while not heard(server.accept()[0]):
            pass  # one of the crowd
    except (ConnectionError, TimeoutError):
        return False
    return True


def is_closed(client: socket.socket) -> bool:
    state: int = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state == TCP_CLOSE


def heard(accepted: socket.socket) -> bytes:
    """The first data of a connection; empty if it ends without data."""
    with accepted:
        accepted.settimeout(DEADLINE)
        try:
            return accepted.recv(100)
        except ConnectionResetError:
            return b""
