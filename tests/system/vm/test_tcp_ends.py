"""The ends of TCP connections: what a program reads, and the errno that it gets, in a guest as on the bare kernel.

Each case runs between two sockets, `near` and `far`. On the bare kernel they are on the host and on the peer, or both
on the host; behind a daemon `near` is in the guest, in both modes and in both directions. Both ends must see
the same. The daemon is stopped while the far or the near end acts, so that it finds everything at once: data, FIN and
RST in one event, a connection that was reset before it was noticed.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import socket
import struct
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from bench.adverse_ends import BLOCK, Seen, reset, seen, written

from ..support import User, wait_for
from ..traffic.support import HOST, HOST6, PEER, PEER6, Lan, Namespace
from .support import guest_behind, passt

PASTA_IN, PASST_IN, SPLICED_IN, SPLICED_OUT = 18171, 18172, 18173, 18174
ARRIVES = 0.05  # s in which segments on a veth have come
FAR = "from passt.tcp_engine import window\nwindow.NEAR_US = 0\n"  # the peer is as close as no real one is


@dataclass
class Way:
    """Where a connection runs, and the daemon between its ends, if there is one."""

    near: Namespace
    far: Namespace
    outbound: bool  # `near` connects
    server: str  # address that the server binds, port 0: any
    port: int
    client: str  # address and port that the client connects to, 0: the server's
    to: int
    daemon: int = 0

    def pair(self) -> tuple[socket.socket, socket.socket]:
        """(near, far), connected."""
        with self.listener() as listener:
            a = self.make(self.outbound)
            a.connect((self.client, self.to or listener.getsockname()[1]))
            b = listener.accept()[0]
        b.settimeout(10)
        return (a, b) if self.outbound else (b, a)

    def listener(self) -> socket.socket:
        made = self.make(not self.outbound)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.server, self.port))
        made.listen()
        return made

    def make(self, near: bool) -> socket.socket:
        made = (self.near if near else self.far).make_socket(socket.AF_INET6 if ":" in self.client else socket.AF_INET)
        made.settimeout(10)
        return made

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The daemon does nothing meanwhile: what is sent arrives there, or waits before it."""
        if not self.daemon:
            yield
            return
        os.kill(self.daemon, signal.SIGSTOP)
        try:
            wait_for(lambda: _state(self.daemon) == "T", "it is stopped")
            yield
            time.sleep(ARRIVES)
        finally:
            os.kill(self.daemon, signal.SIGCONT)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def unsent(sock: socket.socket) -> int:
    """Bytes that the other kernel has not acknowledged: SIOCOUTQ."""
    return int(struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0])


# Cases: one end acts, and the other one sees what is returned ---------------------------------------------------------


def data_and_end(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        actor.shutdown(socket.SHUT_WR)
    return seen(other)


def data_and_close(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        actor.close()
    return seen(other)


def data_and_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        reset(actor)
    return seen(other)


def end_and_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    with way.stopped():
        actor.sendall(BLOCK)
        actor.shutdown(socket.SHUT_WR)
        reset(actor)
    return [*seen(other), written(other)]


def reset_only(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    reset(actor)
    return seen(other)


def close_with_unread_data(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    other.sendall(BLOCK)
    wait_for(lambda: actor.recv(1, socket.MSG_PEEK), "it is there")
    with way.stopped():
        actor.sendall(BLOCK)
        actor.close()
    return seen(other)


def lingers(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    """close(2) returns when the other end has everything, and well before its time is over."""
    actor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    actor.settimeout(None)
    actor.sendall(BLOCK)
    began = time.monotonic()
    actor.close()
    return [*seen(other), time.monotonic() - began < 10]


def half_closed_and_reset(way: Way, actor: socket.socket, other: socket.socket) -> Seen:
    """It has sent FIN long before, and answers data by RST."""
    actor.sendall(BLOCK)
    actor.shutdown(socket.SHUT_WR)
    first = seen(other)
    with way.stopped():
        other.sendall(BLOCK)
        reset(actor)
    return [*first, written(other)]


Case = Callable[[Way, socket.socket, socket.socket], Seen]
BY_FAR = (data_and_end, data_and_reset, end_and_reset, reset_only, close_with_unread_data, half_closed_and_reset)
BY_NEAR = (data_and_close, data_and_reset, end_and_reset, lingers)
CASES: dict[str, tuple[Case, bool]] = {  # whether the near end acts
    **{f"far: {case.__name__}": (case, False) for case in BY_FAR},
    **{f"near: {case.__name__}": (case, True) for case in BY_NEAR},
}


# Ways -----------------------------------------------------------------------------------------------------------------


@dataclass
class Ways:
    lan: Lan
    by_name: dict[str, Way]


def guest_ways(name: str, lan: Lan, guest: Namespace, daemon: int, port: int) -> dict[str, Way]:
    return {
        f"{name} out": Way(guest, lan.peer, True, PEER, 0, PEER, 0, daemon),
        f"{name} out, IPv6": Way(guest, lan.peer, True, PEER6, 0, PEER6, 0, daemon),
        f"{name} in": Way(guest, lan.peer, False, "0.0.0.0", port, HOST, port, daemon),
        f"{name} in, IPv6": Way(guest, lan.peer, False, "::", port, HOST6, port, daemon),
    }


@pytest.fixture(scope="module")
def ways(lan: Lan, ordinary_user: User) -> Iterator[Ways]:
    """A guest of each mode. No peer is near: see `test_tcp_dead_peer.py`."""
    forwards = ["-t", f"{PASTA_IN},{SPLICED_IN}", "-T", str(SPLICED_OUT)]
    with (
        lan.pasta(ordinary_user, "-q", "--config-net", *forwards, before=FAR) as pasta,
        passt(lan, ordinary_user, "-t", str(PASST_IN), "-m", "1500", before=FAR) as server,
        guest_behind(lan, server, 1500) as (machine, _),
    ):
        for namespace in (lan.host, pasta, machine):
            namespace.run("sysctl", "-qw", "net.ipv4.tcp_syn_retries=1", "net.ipv4.tcp_retries2=2")
        lan.host.run("sysctl", "-qw", "net.ipv4.neigh.eth0.mcast_solicit=1")  # a host that is not there: 1 s
        lan.peer.run("sysctl", "-qw", "net.ipv4.tcp_syn_retries=1", "net.ipv4.icmp_ratelimit=0")
        yield Ways(
            lan,
            {
                "bare out": Way(lan.host, lan.peer, True, PEER, 0, PEER, 0),
                "bare in": Way(lan.host, lan.peer, False, HOST, 0, HOST, 0),
                **guest_ways("pasta", lan, pasta, pasta.daemon, PASTA_IN),
                **guest_ways("passt", lan, machine, server.daemon, PASST_IN),
                "spliced out": Way(
                    pasta, lan.host, True, "127.0.0.1", SPLICED_OUT, "127.0.0.1", SPLICED_OUT, pasta.daemon
                ),
                "spliced in": Way(pasta, lan.host, False, "0.0.0.0", SPLICED_IN, "127.0.0.1", SPLICED_IN, pasta.daemon),
            },
        )


WAYS = [
    *(f"{mode} {way}" for mode in ("pasta", "passt") for way in ("out", "out, IPv6", "in", "in, IPv6")),
    *("spliced out", "spliced in"),
]
_bare: dict[tuple[str, str], Seen] = {}


def outcome(way: Way, case: str) -> Seen:
    act, by_near = CASES[case]
    near, far = way.pair()
    with near, far:
        return act(way, near, far) if by_near else act(way, far, near)


def on_the_bare_kernel(ways: Ways, case: str, name: str) -> Seen:
    """The outcome of the case there; asked once."""
    bare = "bare out" if " out" in name else "bare in"
    if (case, bare) not in _bare:
        _bare[case, bare] = outcome(ways.by_name[bare], case)
    return _bare[case, bare]


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_an_end_is_that_of_the_bare_kernel(ways: Ways, case: str, name: str) -> None:
    wanted = on_the_bare_kernel(ways, case, name)
    assert outcome(ways.by_name[name], case) == wanted


@pytest.mark.parametrize("name", WAYS)
def test_a_reset_waits_for_a_slow_reader(ways: Ways, name: str) -> None:
    """All that the far kernel knows to be delivered comes before ECONNRESET, with a window that has no room for it."""
    way = ways.by_name[name]
    with way.listener() as listener:
        client, server = way.make(way.outbound), listener
        small = client if way.outbound else server
        small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((way.client, way.to or listener.getsockname()[1]))
        accepted = listener.accept()[0]
    accepted.settimeout(10)
    near, far = (client, accepted) if way.outbound else (accepted, client)
    with near, far:
        far.sendall(BLOCK * 50)
        wait_for(lambda: not unsent(far), "the far kernel knows that it was delivered")
        reset(far)
        time.sleep(0.05)
        assert seen(near) == [50 * len(BLOCK), "ECONNRESET"]


@pytest.mark.parametrize("name", [name for name in WAYS if " in" in name])
def test_a_client_that_sends_and_resets_before_it_is_noticed(ways: Ways, name: str) -> None:
    way = ways.by_name[name]
    with way.listener() as listener:
        far = way.make(False)
        with way.stopped():
            far.connect((way.client, way.to))
            far.sendall(BLOCK)
            reset(far)
        near = listener.accept()[0]
    with near:
        near.settimeout(10)
        assert seen(near) == [len(BLOCK), "ECONNRESET"]


@pytest.mark.parametrize("name", ["bare out", "pasta out", "passt out"])
def test_a_server_that_sends_and_resets_before_it_is_noticed(ways: Ways, name: str) -> None:
    """The first SYN gets lost, so that there is time to stop the daemon between connect(2) and its result."""
    way = ways.by_name[name]
    with way.listener() as listener, way.make(True) as near:
        ways.lan.peer.run("ip", "route", "add", "blackhole", HOST)
        try:
            near.setblocking(False)
            assert near.connect_ex((way.client, listener.getsockname()[1])) == errno.EINPROGRESS
            wait_for(lambda: "SYN-SENT" in ways.lan.host.run("ss", "-Htn").stdout, "the host connects")
            with way.stopped():
                ways.lan.peer.run("ip", "route", "del", "blackhole", HOST)
                far = listener.accept()[0]
                far.sendall(BLOCK)
                reset(far)
        except BaseException:
            ways.lan.peer.run("ip", "route", "del", "blackhole", HOST, check=False)
            raise
        near.settimeout(10)
        assert seen(near) == [len(BLOCK), "ECONNRESET"]


# Connecting -----------------------------------------------------------------------------------------------------------

REJECT = """
table inet rejects {
    chain input {
        type filter hook input priority 0;
        meta l4proto tcp reject with icmpx type host-unreachable
    }
}
"""
REFUSALS = {
    "a closed port": (PEER, "ECONNREFUSED"),
    "a closed port, IPv6": (PEER6, "ECONNREFUSED"),
    "a router without a route": ("198.19.0.9", "EHOSTUNREACH"),
    "a host that is not there": ("198.51.100.250", "EHOSTUNREACH"),
    "silence": ("198.18.0.9", "ETIMEDOUT"),
}


@pytest.fixture(scope="module")
def refusing(ways: Ways) -> Iterator[None]:
    """The peer is a router that rejects some packets, and drops others."""
    routes = [["unreachable", "198.19.0.0/16"], ["blackhole", "198.18.0.0/16"]]
    ways.lan.peer.write("/proc/sys/net/ipv4/ip_forward", "1")
    for route in routes:
        ways.lan.peer.run("ip", "route", "add", *route)
    yield
    for route in routes:
        ways.lan.peer.run("ip", "route", "del", *route)
    ways.lan.peer.write("/proc/sys/net/ipv4/ip_forward", "0")


@pytest.mark.usefixtures("refusing")
def test_connect_fails_as_on_the_bare_kernel(ways: Ways) -> None:
    """All at once, since silence and a missing host take seconds."""
    names = ["bare out", "pasta out", "passt out"]
    waiting: dict[socket.socket, tuple[str, str]] = {}
    for name in names:
        for what, (address, _) in REFUSALS.items():
            where = ways.by_name[name].near
            sock = where.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
            sock.setblocking(False)
            assert sock.connect_ex((address, 9)) in (errno.EINPROGRESS, errno.ECONNREFUSED)
            waiting[sock] = name, what
    found: dict[tuple[str, str], str] = {}

    def look() -> bool:
        for sock, what in list(waiting.items()):
            error = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                found[what] = errno.errorcode[error]
                del waiting[sock]
        return not waiting

    wait_for(look, "all have failed")
    for what, (_, wanted) in REFUSALS.items():
        assert [found[name, what] for name in names] == [wanted] * len(names), what


@pytest.mark.parametrize("told", [False, True], ids=["silence", "a router that tells"])
def test_a_peer_that_vanishes(ways: Ways, told: bool) -> None:
    """The kernel of the application gives up after its retransmissions, with the reason that it knows."""
    peer = ways.lan.peer
    pairs = {name: ways.by_name[name].pair() for name in ("bare out", "pasta out", "passt out")}
    for near, far in pairs.values():
        near.sendall(b"?")
        assert far.recv(1) == b"?"
    with contextlib.ExitStack() as stack:
        if told:
            peer.run("nft", "-f", "-", input=REJECT)
            stack.callback(peer.run, "nft", "delete", "table", "inet", "rejects")
        else:
            peer.run("ip", "route", "add", "blackhole", HOST)
            stack.callback(peer.run, "ip", "route", "del", "blackhole", HOST)
        for near, _ in pairs.values():
            near.sendall(b"lost")
        found = {name: seen(near) for name, (near, _) in pairs.items()}
    for ends in pairs.values():
        for end in ends:
            end.close()
    assert found == {name: [0, "EHOSTUNREACH" if told else "ETIMEDOUT"] for name in pairs}
