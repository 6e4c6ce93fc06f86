"""Sockets of UDP flows, on the loopback."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, cast

import pytest

from passt import addr
from passt.flow.context import Context
from passt.linux.sockopt import (
    IP_PKTINFO,
    MTU_DISCOVER,
    RECEIVE_CLASS,
    SOL_UDP,
    TRAFFIC_CLASS,
    UDP_SEGMENT,
    hops_option,
    read_errors,
)
from passt.policy.config import Ip4
from passt.policy.forwarding import Forwarding
from passt.policy.rules import Listener, Rule
from passt.policy.settings import Settings
from passt.udp_engine.sock import (
    BUFFER_FIRST,
    UNCONNECTED_MAX,
    Client,
    SharedSocket,
    _drain_misdelivered,
    open_client,
    open_socket,
    open_target,
    opener,
)
from passt.wire.checksum import PROTO_UDP

from ..support import CONFIG, GUEST4, IP4, free_ports, make_context
from ..udp_support import REUSE, Between, PlainSockets, second_bind

PEER4 = addr.packed("198.51.100.9")
ANOTHER = 54321  # a user's number


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        s.settimeout(5)
        yield s


def port_of(s: socket.socket) -> int:
    port: int = s.getsockname()[1]
    return port


FWD = Forwarding(Settings(CONFIG))


def test_the_socket_has_the_guests_port_and_its_peer(server: socket.socket) -> None:
    port = free_ports()
    with open_socket(FWD, addr.LOOPBACK4, port, port_of(server)) as s:
        assert s.getsockname() == ("127.0.0.1", port)
        assert s.getpeername() == server.getsockname()
        assert not s.getblocking()
        assert s.getsockopt(socket.IPPROTO_IP, 11) == 1


def test_ipv6_sockets_leave_ipv4_alone() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.bind(("::1", 0))
        with open_socket(FWD, addr.LOOPBACK6, 0, port_of(server)) as s:
            assert s.getpeername()[:2] == ("::1", port_of(server))
            assert s.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1
            assert s.getsockopt(socket.IPPROTO_IPV6, 25) == 1


def test_one_guest_port_to_several_peers(server: socket.socket) -> None:
    port = free_ports()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.1", 0))
        with (
            open_socket(FWD, addr.LOOPBACK4, port, port_of(server)) as a,
            open_socket(FWD, addr.LOOPBACK4, port, port_of(other)) as b,
        ):
            assert port_of(a) == port_of(b) == port
            other.sendto(b"to b", ("127.0.0.1", port))
            server.sendto(b"to a", ("127.0.0.1", port))
            assert (a.recv(10), b.recv(10)) == (b"to a", b"to b")


class Flooded(socket.socket):
    """A socket whose peer sends faster than it is read."""

    reads = 0

    def recv(self, size: int, flags: int = 0) -> bytes:
        Flooded.reads += 1
        assert Flooded.reads < 5000, "read for ever"
        return b"x"

    def recvfrom(self, size: int, flags: int = 0) -> Any:
        return self.recv(size), ("127.0.0.1", 7)


def test_a_flood_while_a_socket_connects_costs_bounded_work(
    server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Flooded, "reads", 0)
    fwd = Forwarding(Settings(CONFIG))

    def make() -> Flooded:
        return Flooded(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    with open_target(make, fwd, None, None, 0, addr.LOOPBACK4, port_of(server)):
        assert Flooded.reads <= UNCONNECTED_MAX


def test_a_full_buffer_is_emptied_before_the_first_answer(server: socket.socket) -> None:
    """Of the smallest datagrams, which are the most; and it is large from then on."""

    class Late(socket.socket):
        def connect(self, address: Any) -> None:
            for _ in range(3 * UNCONNECTED_MAX):
                server.sendto(b"", ("127.0.0.1", port_of(self)))
            super().connect(address)

    def make() -> Late:
        return Late(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    with open_target(make, FWD, None, None, 0, addr.LOOPBACK4, port_of(server)) as s:
        server.sendto(b"answer", s.getsockname())
        assert s.recv(16) == b"answer"
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 2 * BUFFER_FIRST


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_no_other_user_gets_at_a_flows_port(server: socket.socket) -> None:
    with open_socket(FWD, addr.LOOPBACK4, free_ports(), port_of(server)) as s:
        for options in REUSE:
            for host in ("", "127.0.0.1"):
                with pytest.raises(OSError, match="in use"):
                    second_bind((host, port_of(s)), options, uid=ANOTHER)


def test_a_port_of_the_kernels_choice_is_shared_with_nobody(server: socket.socket) -> None:
    with open_socket(FWD, addr.LOOPBACK4, 0, port_of(server)) as s:
        for options in REUSE:
            with pytest.raises(OSError, match="in use"):
                second_bind(("", port_of(s)), options)


@pytest.mark.parametrize("option", [socket.SO_REUSEADDR, socket.SO_REUSEPORT])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_a_port_that_another_user_would_share_is_replaced(server: socket.socket, option: int) -> None:
    with plain() as holder:
        os.fchown(holder.fileno(), ANOTHER, -1)
        holder.setsockopt(socket.SOL_SOCKET, option, 1)
        holder.bind(("", 0))
        with open_socket(FWD, addr.LOOPBACK4, port_of(holder), port_of(server)) as s:
            assert port_of(s) not in (0, port_of(holder))


def test_a_port_that_others_have_is_replaced(server: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        with open_socket(FWD, addr.LOOPBACK4, port_of(holder), port_of(server)) as s:
            assert port_of(s) not in (0, port_of(holder)) and shares(s) == ALONE
            s.send(b"x")
            assert server.recvfrom(10) == (b"x", s.getsockname())


class Bound(socket.socket):
    """A socket on a system that keeps low ports for itself."""

    def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        if 0 < address[1] < 1024:
            raise PermissionError(errno.EACCES, "Permission denied")
        super().bind(address)


def test_a_port_that_is_forbidden_is_replaced(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Bound)
    with open_socket(FWD, addr.LOOPBACK4, 500, port_of(server)) as s:
        assert port_of(s) >= 1024


def test_a_socket_never_talks_to_itself() -> None:
    port = free_ports()
    with open_socket(FWD, addr.LOOPBACK4, port, port) as s:
        assert s.getpeername() == ("127.0.0.1", port)
        assert port_of(s) != port and port_of(s) >= 1024
    with open_socket(FWD, addr.LOOPBACK6, port, port) as s:
        assert s.getpeername()[:2] == ("::1", port)
        assert port_of(s) != port and port_of(s) >= 1024


def test_the_port_of_the_peer_is_free_at_another_address() -> None:
    port = free_ports()
    with open_socket(FWD, addr.packed("127.0.0.9"), port, port) as s:
        assert port_of(s) == port


def test_broadcast_is_allowed_when_it_turns_out_to_be_one(server: socket.socket) -> None:
    with open_socket(FWD, addr.packed("127.255.255.255"), free_ports(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1
    with open_socket(FWD, addr.LOOPBACK4, free_ports(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 0


RealSocket = socket.socket


class Stranger(socket.socket):
    """A socket that gets a datagram of a stranger between bind() and connect()."""

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        with RealSocket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"stranger", ("127.0.0.1", self.getsockname()[1]))
        super().connect(address)


def test_what_strangers_sent_is_thrown_away(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Stranger)
    with open_socket(FWD, addr.LOOPBACK4, free_ports(), port_of(server)) as s, pytest.raises(BlockingIOError):
        s.recv(10)


def test_no_socket_is_left_over_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []

    class Refused(socket.socket):
        def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
            made.append(self)
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    monkeypatch.setattr(socket, "socket", Refused)
    with pytest.raises(OSError, match="unreachable"):
        open_socket(FWD, addr.LOOPBACK4, 0, 9)
    assert [s.fileno() for s in made] == [-1]


class Recorder(socket.socket):
    """Records what it is bound to, and is connected to nothing."""

    bound: tuple[tuple[str, int], str] = (("", 0), "")

    def setsockopt(self, *args: object) -> None:
        level, option, value = args
        if (level, option) == (socket.SOL_SOCKET, socket.SO_BINDTODEVICE):
            assert isinstance(value, bytes)
            Recorder.bound = Recorder.bound[0], value.decode()

    def bind(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        Recorder.bound = address, Recorder.bound[1]

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("host", "bound"),
    [(PEER4, (("203.0.113.7", 5000), "eth7")), (addr.LOOPBACK4, (("0.0.0.0", 5000), ""))],
)
def test_outbound_address_and_interface(
    host: bytes, bound: tuple[tuple[str, int], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "socket", Recorder)
    monkeypatch.setattr(Recorder, "bound", (("", 0), ""))
    ip4 = Ip4(
        addr=GUEST4,
        prefix_len=24,
        gateway=IP4.gateway,
        our_addr=IP4.our_addr,
        if_out="eth7",
        addr_out=addr.packed("203.0.113.7"),
    )
    open_socket(make_context(ip4=ip4).fwd, host, 5000, 9).close()
    assert Recorder.bound == bound


# Clients of a listener -----------------------------------------------------------------------------------------------


@pytest.fixture
def listener() -> Iterator[Listener]:
    """On all addresses of IPv4."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", 0))
        yield Listener(Rule("-u", PROTO_UDP, False, port_of(s), port_of(s), 53), port_of(s), s)


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    """A client's socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.9", 0))
        s.settimeout(5)
        yield s


def client_of(listener: Listener, peer: socket.socket, local: str = "127.0.0.5") -> Client:
    host, port = peer.getsockname()[:2]
    return Client(listener, addr.packed(host), port, addr.packed(local))


def plain() -> socket.socket:
    return socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)


def shares(s: socket.socket) -> tuple[bool, bool]:
    """SO_REUSEADDR, SO_REUSEPORT."""
    return tuple(bool(s.getsockopt(socket.SOL_SOCKET, option)) for option in REUSE[-1])  # type: ignore[return-value]


ALONE = False, False


def test_a_clients_socket(listener: Listener, peer: socket.socket) -> None:
    misdelivered: list[Any] = []
    with open_client(plain, client_of(listener, peer), misdelivered) as s:
        assert s.getsockname() == ("127.0.0.5", listener.port)
        assert s.getpeername() == peer.getsockname()
        assert shares(s) == (True, False) and shares(listener.sock) == ALONE
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) > 2 * BUFFER_FIRST
        assert s.getsockopt(socket.IPPROTO_IP, 11) == 1
        peer.sendto(b"?", s.getsockname())
        assert s.recv(9) == b"?"
        s.send(b"!")
        assert peer.recvfrom(9) == (b"!", ("127.0.0.5", listener.port))
    assert misdelivered == []


def test_clients_share_the_port_with_each_other_and_nobody_else(listener: Listener, peer: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.bind(("127.0.0.8", port_of(peer)))
        with (
            open_client(plain, client_of(listener, peer), []) as a,
            open_client(plain, client_of(listener, other), []) as b,
            open_client(plain, client_of(listener, peer, "127.0.0.6"), []) as c,
        ):
            for sender, where, receiver in ((peer, "127.0.0.5", a), (other, "127.0.0.5", b), (peer, "127.0.0.6", c)):
                sender.sendto(b"x", (where, listener.port))
                assert receiver.recv(9) == b"x"
            for host in ("", "127.0.0.5", "127.0.0.7"):
                for options in REUSE:
                    with pytest.raises(OSError, match="in use"):
                        second_bind((host, listener.port), options)


@pytest.fixture
def listener_at() -> Iterator[Listener]:
    """On 127.0.0.5 only."""
    with plain() as s:
        s.bind(("127.0.0.5", 0))
        rule = Rule("-u", PROTO_UDP, False, port_of(s), port_of(s), 53, addr=addr.packed("127.0.0.5"))
        yield Listener(rule, port_of(s), s)


@pytest.mark.parametrize("which", ["listener", "listener_at"])
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_no_other_user_gets_in_while_a_client_is_bound(
    which: str, peer: socket.socket, request: pytest.FixtureRequest
) -> None:
    """Neither before nor after bind(), when the listener shares its port."""
    listener: Listener = request.getfixturevalue(which)
    attempts = []

    class Watched(socket.socket):
        def bind(self, address: Any) -> None:
            self.others_try()
            super().bind(address)
            self.others_try()

        def others_try(self) -> None:
            for options in REUSE:
                for host in ("", "127.0.0.5"):
                    attempts.append(host)
                    with pytest.raises(OSError, match="in use"):
                        second_bind((host, listener.port), options, uid=ANOTHER)

    make = partial(Watched, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    with open_client(make, client_of(listener, peer), []) as s:
        s.others_try()
    assert len(attempts) == 24


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_guests_own_flows_from_the_port_of_a_listener_at_an_address(
    listener_at: Listener, server: socket.socket, peer: socket.socket
) -> None:
    """They are where the listener is not, and do not see to it that others have to stay away."""
    theirs = Client(listener_at, addr.LOOPBACK4, port_of(server), addr.ANY4)
    with (
        open_client(plain, client_of(listener_at, peer), []) as a,
        open_client(plain, theirs, []) as b,
        open_client(plain, theirs._replace(peer=addr.packed("127.0.0.77")), []) as c,
    ):
        assert shares(a) == shares(b) == (False, True)
        assert b.getsockname() == c.getsockname() == ("127.0.0.1", listener_at.port)
        for options in REUSE:
            with pytest.raises(OSError, match="in use"):
                second_bind(("127.0.0.1", listener_at.port), options, uid=ANOTHER)


@pytest.mark.parametrize("which", ["listener", "listener_at"])
def test_each_client_has_its_socket_and_new_ones_have_the_listener(which: str, request: pytest.FixtureRequest) -> None:
    """The kernel does not balance datagrams among these sockets, though they share a port."""
    listener: Listener = request.getfixturevalue(which)
    where = "127.0.0.5", listener.port
    with ExitStack() as stack:
        peers = [stack.enter_context(plain()) for _ in range(40)]
        for sock in peers:
            sock.bind(("127.0.0.9", 0))
        socks = [stack.enter_context(open_client(plain, client_of(listener, p), [])) for p in peers[:20]]
        for i, sock in enumerate(peers):
            sock.sendto(b"%d" % i, where)
        assert [s.recv(9) for s in socks] == [b"%d" % i for i in range(20)]
        assert [listener.sock.recv(9) for _ in range(20)] == [b"%d" % i for i in range(20, 40)]


def test_a_client_of_ipv4_beside_a_dual_stack_listener(peer: socket.socket) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::", 0))
        listener = Listener(Rule("-u", PROTO_UDP, False, port_of(s), port_of(s), 53), port_of(s), s)
        with open_client(plain, client_of(listener, peer), []) as a:
            peer.sendto(b"?", ("127.0.0.5", listener.port))
            assert a.recv(9) == b"?"
        assert shares(s) == ALONE


def test_another_socket_has_the_address(listener: Listener, peer: socket.socket) -> None:
    """The listener does not keep sharing its port after a failure, and no socket is left over."""
    listener.sock.close()
    made: list[socket.socket] = []

    def make() -> socket.socket:
        made.append(plain())
        return made[-1]

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as theirs, plain() as mine:
        theirs.bind(("127.0.0.5", listener.port))
        listener.sock = mine
        with pytest.raises(OSError, match="in use"):
            open_client(make, client_of(listener, peer), [])
        assert shares(mine) == ALONE
    assert [s.fileno() for s in made] == [-1]


def test_misdelivered_datagrams(listener: Listener, peer: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.bind(("127.0.0.3", 0))

        def meanwhile(where: tuple[str, int]) -> None:
            stranger.sendto(b"stranger", where)
            stranger.sendto(b"", where)
            peer.sendto(b"client", where)

        Between.happens = meanwhile
        misdelivered: list[tuple[Client, bytes]] = []
        client = client_of(listener, peer)
        make = partial(Between, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with open_client(make, client, misdelivered) as s:
            other = client_of(listener, stranger)
            assert misdelivered == [(other, b"stranger"), (other, b""), (client, b"client")]
            stranger.sendto(b"late", s.getsockname())
            with pytest.raises(BlockingIOError):
                s.recv(9)
            assert listener.sock.recv(9) == b"late"


def test_no_flood_leaves_a_strangers_datagram_behind(listener: Listener, peer: socket.socket) -> None:
    """The buffer of a socket without its client holds no more than are taken out."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:

        def flood(where: tuple[str, int]) -> None:
            for _ in range(2 * UNCONNECTED_MAX):
                stranger.sendto(b"", where)

        Between.happens = flood
        misdelivered: list[tuple[Client, bytes]] = []
        make = partial(Between, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        with open_client(make, client_of(listener, peer), misdelivered) as s, pytest.raises(BlockingIOError):
            s.recv(9)
        assert 10 < len(misdelivered) < UNCONNECTED_MAX


class Journal(socket.socket):
    """Notes what it is asked for, and is bound and connected to nothing."""

    options: list[tuple[Any, ...]]
    bound: list[Any]
    peers: list[Any]
    foreign = False  # the address to bind is no address of this host

    def setsockopt(self, *args: Any) -> None:
        Journal.options.append(args)

    def bind(self, address: Any) -> None:
        Journal.bound.append(address)
        if Journal.foreign and (self._freebind not in Journal.options):
            raise OSError(errno.EADDRNOTAVAIL, "Cannot assign requested address")

    def connect(self, address: Any) -> None:
        Journal.peers.append(address)

    @property
    def _freebind(self) -> tuple[int, int, int]:
        v6 = self.family == socket.AF_INET6
        return (socket.IPPROTO_IPV6, 78, 1) if v6 else (socket.IPPROTO_IP, 15, 1)


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> type[Journal]:
    for name in ("options", "bound", "peers"):
        monkeypatch.setattr(Journal, name, [], raising=False)
    return Journal


@pytest.mark.parametrize("local", ["203.0.113.5", "2001:db8::5"])
def test_an_address_that_is_on_no_interface(
    journal: type[Journal], listener: Listener, monkeypatch: pytest.MonkeyPatch, local: str
) -> None:
    monkeypatch.setattr(Journal, "foreign", True)
    a = addr.packed(local)
    make = partial(Journal, addr.family(a), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    open_client(make, Client(listener, a, 9, a), []).close()
    assert [b[0] for b in journal.bound] == [local, local]
    assert shares(listener.sock) == ALONE


def test_the_rules_interface(journal: type[Journal], listener: Listener, peer: socket.socket) -> None:
    listener.rule = replace(listener.rule, ifname="eth7")
    make = partial(Journal, socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    open_client(make, client_of(listener, peer), []).close()
    assert (socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth7") in journal.options


def test_link_local_clients_have_their_scope(journal: type[Journal], listener: Listener) -> None:
    make = partial(Journal, socket.AF_INET6, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    client = Client(listener, addr.packed("fe80::9"), 9, addr.packed("fe80::1"), 7)
    open_client(make, client, []).close()
    assert journal.bound == [("fe80::1", listener.port, 0, 7)]
    assert journal.peers == [("fe80::9", 9, 0, 7)]
    assert str(client) == f"[fe80::9]:9 -> [fe80::1]:{listener.port}"


@pytest.mark.parametrize("v6", [False, True])
def test_errors_are_asked_for_and_ipv6_leaves_ipv4_alone(v6: bool, journal: type[Journal], listener: Listener) -> None:
    family, host = (socket.AF_INET6, "2001:db8::9") if v6 else (socket.AF_INET, "198.51.100.9")
    make = partial(Journal, family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    open_client(make, Client(listener, addr.packed(host), 9, addr.packed(host)), []).close()
    level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
    assert (level, 25 if v6 else 11, 1) in journal.options  # IPV6_RECVERR, IP_RECVERR
    assert ((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1) in journal.options) is v6


def test_sockets_are_opened_on_the_side_that_is_asked_for(ctx: Context) -> None:
    ns = PlainSockets()
    ctx.ns = cast(Any, ns)
    for namespace, taken in ((False, 0), (True, 1)):
        opener(ctx, namespace)(socket.AF_INET, socket.SOCK_DGRAM).close()
        assert ns.taken == taken


class Forbidden(socket.socket):
    def bind(self, address: Any) -> None:
        raise PermissionError(errno.EACCES, "")


def test_a_port_that_must_not_be_bound_is_shared(listener: Listener, peer: socket.socket) -> None:
    made: list[socket.socket] = []

    def make() -> socket.socket:
        made.append(Forbidden(socket.AF_INET, socket.SOCK_DGRAM))
        return made[-1]

    shared = open_client(make, client_of(listener, peer), [])
    assert isinstance(shared, SharedSocket)
    assert (made[0].fileno(), shared.fileno(), shares(listener.sock)) == (-1, -1, ALONE)
    assert read_errors(cast(Any, shared)) == []
    shared.send(b"!")
    assert peer.recvfrom(9) == (b"!", ("127.0.0.5", listener.port))
    shared.setsockopt(SOL_UDP, UDP_SEGMENT, 2)
    shared.setsockopt(*MTU_DISCOVER[0], 2)
    shared.write([memoryview(b"abc"), memoryview(b"de")])
    assert [peer.recv(9) for _ in range(3)] == [b"ab", b"cd", b"e"]
    shared.close()
    assert listener.sock.fileno() >= 0


@pytest.mark.parametrize("form", ["ipv4", "dual", "ipv6"])
def test_a_shared_socket_sends_with_the_fields_of_its_flow(form: str) -> None:
    """TTL and traffic class of each client apply to its datagrams alone."""
    v6 = form == "ipv6"
    host = addr.LOOPBACK6 if v6 else addr.LOOPBACK4
    with (
        socket.socket(socket.AF_INET if form == "ipv4" else socket.AF_INET6, socket.SOCK_DGRAM) as s,
        socket.socket(addr.family(host), socket.SOCK_DGRAM) as peer,
    ):
        peer.bind((addr.text(host), 0))
        peer.settimeout(5)
        peer.setsockopt(*RECEIVE_CLASS[v6], 1)
        peer.setsockopt(*((socket.IPPROTO_IPV6, socket.IPV6_RECVHOPLIMIT) if v6 else (socket.IPPROTO_IP, 12)), 1)
        listener = Listener(Rule("-u", PROTO_UDP, False, 9, 9, 53), 9, s)
        plain, marked = (SharedSocket(Client(listener, host, port_of(peer), host)) for _ in range(2))
        for option, value in ((hops_option(host), 9), (TRAFFIC_CLASS[v6], 0xB9)):
            marked.setsockopt(*option, value)
        for shared, expected in ((marked, {9, 0xB9}), (plain, {64, 0})):
            shared.send(b"x")
            data, control, _, _ = peer.recvmsg(9, 256)
            assert (data, {value[0] for _, _, value in control}) == (b"x", expected)


@pytest.mark.parametrize("dual", [False, True])
def test_a_shared_socket_sends_from_the_address_that_the_client_wrote_to(dual: bool) -> None:
    """The kernel chooses the interface."""
    with socket.socket(socket.AF_INET6 if dual else socket.AF_INET, socket.SOCK_DGRAM) as s:
        rule = Rule("-u", PROTO_UDP, False, 9, 9, 53)
        shared = SharedSocket(Client(Listener(rule, 9, s), PEER4, 7, addr.packed("192.0.2.3")))
        assert shared._to == (("::ffff:198.51.100.9", 7, 0, 0) if dual else ("198.51.100.9", 7))
        info = bytes(4) + addr.packed("192.0.2.3") + bytes(4)
        assert shared._from == (socket.IPPROTO_IP, IP_PKTINFO, info)
        assert shared.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


class Queue:
    """A socket with these datagrams, that came before connect(2)."""

    def __init__(self, *datagrams: tuple[bytes, tuple[Any, ...]]) -> None:
        self.datagrams = list(datagrams)

    def recvfrom(self, size: int) -> tuple[bytes, tuple[Any, ...]]:
        assert size == 65535
        if not self.datagrams:
            raise BlockingIOError
        return self.datagrams.pop(0)


def test_misdelivered_datagrams_have_the_scope_of_their_sender(listener: Listener) -> None:
    client = Client(listener, addr.packed("fe80::9"), 9, addr.packed("fe80::1"), 7)
    sock = Queue((b"a", ("fe80::8", 8, 0, 6)), (b"b", ("2001:db8::8", 8, 0, 0)))
    found = _drain_misdelivered(sock, client)
    assert [(c.peer, c.port, c.local, c.scope, data) for c, data in found] == [
        (addr.packed("fe80::8"), 8, client.local, 6, b"a"),
        (addr.packed("2001:db8::8"), 8, client.local, 7, b"b"),
    ]
    client = Client(listener, PEER4, 9, addr.LOOPBACK4)
    ((stranger, data),) = _drain_misdelivered(Queue((b"c", ("198.51.100.8", 8))), client)
    assert (stranger.scope, data) == (0, b"c")


def test_other_reasons_not_to_bind_are_failures(listener: Listener, peer: socket.socket) -> None:
    class Never(socket.socket):
        def bind(self, address: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

    with pytest.raises(PermissionError):
        open_client(partial(Never, socket.AF_INET, socket.SOCK_DGRAM), client_of(listener, peer), [])
