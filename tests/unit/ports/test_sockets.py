"""Sockets of rules: what is opened for each kind, what is inherited from them, and what is said when it fails."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from passt import addr, log
from passt.linux import holders
from passt.linux.multicast import MULTICAST_ALL
from passt.linux.sockopt import IP_FREEBIND, IP_PKTINFO, IPV6_FREEBIND, RECEIVE_CLASS, SO_PEEK_OFF
from passt.linux.tcpinfo import probe
from passt.log import Fatal
from passt.policy.config import Config
from passt.policy.rules import Listener, Rule
from passt.ports import sockets as port_sockets
from passt.ports.sockets import RESERVE, Failure, describe, held_by_us, open_port, open_side, reserve, sockets
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import CONFIG, free_ports

V4_ONLY = replace(CONFIG, ip6=None)
V6_ONLY = replace(CONFIG, ip4=None)


def rule(first: int, last: int | None = None, option: str = "-t x", proto: int = PROTO_TCP, **more: Any) -> Rule:
    more.setdefault("outbound", False)
    return Rule(option, proto, first=first, last=first if last is None else last, to=first, **more)


@pytest.fixture
def port() -> int:
    return free_ports()


class Opened:
    """Sockets of ports, closed at the end of the test."""

    def __init__(self) -> None:
        self.socks: list[Any] = []

    def __call__(self, config: Config, wanted: Rule) -> list[Any]:
        found = open_port(config, wanted, wanted.first)
        self.socks += found
        return found


@pytest.fixture
def opened() -> Iterator[Opened]:
    o = Opened()
    yield o
    for sock in o.socks:
        sock.close()


def where(socks: list[Any]) -> list[tuple[str, bool]]:
    """Address, and whether both families arrive there."""
    return [
        (
            sock.getsockname()[0],
            sock.family == socket.AF_INET6 and not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
        )
        for sock in socks
    ]


# Kinds of rules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP])
@pytest.mark.parametrize(
    ("config", "more", "expected"),
    [
        (CONFIG, {}, [("::", True)]),
        (V4_ONLY, {}, [("0.0.0.0", False)]),
        (V6_ONLY, {}, [("::", False)]),
        (CONFIG, {"addr": addr.LOOPBACK4}, [("127.0.0.1", False)]),
        (CONFIG, {"addr": addr.LOOPBACK6}, [("::1", False)]),
        (CONFIG, {"addr": addr.ANY4}, [("0.0.0.0", False)]),
        (CONFIG, {"addr": addr.ANY6}, [("::", False)]),
        (CONFIG, {"outbound": True}, [("127.0.0.1", False), ("::1", False)]),
        (V4_ONLY, {"outbound": True}, [("127.0.0.1", False)]),
        (V6_ONLY, {"outbound": True}, [("::1", False)]),
    ],
)
def test_what_is_opened(
    opened: Opened, port: int, proto: int, config: Config, more: dict[str, Any], expected: list[tuple[str, bool]]
) -> None:
    wanted = rule(port, proto=proto, **more)
    socks = opened(config, wanted)
    assert where(socks) == expected and len(socks) == sockets(config, wanted)
    for sock in socks:
        assert sock.getsockname()[1] == port
        assert not os.get_blocking(sock.fileno()) and not os.get_inheritable(sock.fileno())
        assert type(sock) is socket.SocketType
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == (proto == PROTO_TCP)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR) == (proto == PROTO_TCP)
        assert not sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT)


class FamilyOff:
    """IPv6 that fails at socket() or bind() with an errno."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        class Socket(socket.SocketType):  # type: ignore[misc, valid-type]
            def bind(self, address: Any) -> None:
                if self.family == socket.AF_INET6:
                    raise OSError(number, os.strerror(number))
                super().bind(address)

        monkeypatch.setattr(port_sockets, "new_socket", Socket)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_ipv4_does_where_there_is_no_ipv6(
    opened: Opened, port: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    FamilyOff(monkeypatch, number)
    assert where(opened(CONFIG, rule(port))) == [("0.0.0.0", False)]
    assert where(opened(CONFIG, rule(port, outbound=True, proto=PROTO_UDP))) == [("127.0.0.1", False)]
    for more in ({"addr": addr.LOOPBACK6}, {"addr": addr.ANY6}):
        with pytest.raises(OSError, match=os.strerror(number)):
            opened(CONFIG, rule(port, **more))
    with pytest.raises(OSError, match=os.strerror(number)):
        opened(V6_ONLY, rule(port))


@pytest.mark.parametrize("held", ["::1", "127.0.0.1"])
@pytest.mark.parametrize("outbound", [False, True])
@pytest.mark.parametrize(("proto", "kind"), [(PROTO_TCP, socket.SOCK_STREAM), (PROTO_UDP, socket.SOCK_DGRAM)])
def test_nothing_is_half_bound(opened: Opened, port: int, held: str, outbound: bool, proto: int, kind: int) -> None:
    with socket.socket(addr.family(addr.packed(held)), kind) as holder:
        holder.bind((held, port))
        if proto == PROTO_TCP:
            holder.listen()
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(OSError, match="Address already in use"):
            opened(CONFIG, rule(port, proto=proto, outbound=outbound))
        assert len(os.listdir("/proc/self/fd")) == before


def test_two_of_us_cannot_have_a_udp_port(opened: Opened, port: int) -> None:
    opened(CONFIG, rule(port, proto=PROTO_UDP))
    with pytest.raises(OSError, match="Address already in use"):
        opened(CONFIG, rule(port, proto=PROTO_UDP))


@pytest.mark.parametrize(
    ("config", "address", "family_off"),
    [
        (CONFIG, None, False),
        (CONFIG, None, True),
        (CONFIG, addr.LOOPBACK4, False),
        (CONFIG, addr.LOOPBACK6, False),
        (V4_ONLY, None, False),
        (V6_ONLY, None, False),
    ],
)
def test_a_udp_port_of_our_own_flows_is_told_from_one_of_others(
    port: int, monkeypatch: pytest.MonkeyPatch, config: Config, address: bytes | None, family_off: bool
) -> None:
    if family_off:
        FamilyOff(monkeypatch, errno.EAFNOSUPPORT)
    wanted = rule(port, proto=PROTO_UDP, addr=address)
    v6 = config is V6_ONLY or address == addr.LOOPBACK6
    for shared in (True, False):
        with socket.socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as flow:
            flow.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, shared)
            flow.bind(("::1" if v6 else "127.0.0.1", port))
            before = os.listdir("/proc/self/fd")
            assert held_by_us(config, wanted, port) is shared
            assert os.listdir("/proc/self/fd") == before


def test_connections_have_the_options_of_their_listener(opened: Opened, port: int) -> None:
    (server,) = opened(CONFIG, rule(port))
    with socket.create_connection(("127.0.0.1", port)), socket.socket(fileno=server._accept()[0]) as s:
        assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
        if probe().peek_off:
            assert s.getsockopt(socket.SOL_SOCKET, SO_PEEK_OFF) == 0


@pytest.mark.parametrize(
    ("address", "option"),
    [
        (addr.LOOPBACK4, (socket.IPPROTO_IP, IP_PKTINFO)),
        (addr.LOOPBACK6, (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)),
        (None, (socket.IPPROTO_IP, IP_PKTINFO)),
        (None, (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)),
    ],
)
def test_datagrams_tell_where_they_were_sent(
    opened: Opened, port: int, address: bytes | None, option: tuple[int, int]
) -> None:
    (sock,) = opened(CONFIG, rule(port, proto=PROTO_UDP, addr=address))
    assert sock.getsockopt(*option)
    assert sock.getsockopt(*RECEIVE_CLASS[option[0] == socket.IPPROTO_IPV6])


@pytest.mark.parametrize(("config", "families"), [(CONFIG, (False, True)), (V4_ONLY, (False,)), (V6_ONLY, (True,))])
def test_datagrams_to_groups_come_by_other_sockets(
    opened: Opened, port: int, config: Config, families: tuple[bool, ...]
) -> None:
    (sock,) = opened(config, rule(port, proto=PROTO_UDP))
    assert [sock.getsockopt(*MULTICAST_ALL[v6]) for v6 in families] == [0] * len(families)


def test_one_interface_only(opened: Opened, port: int) -> None:
    (sock,) = opened(CONFIG, rule(port, ifname="lo"))
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0") == b"lo"
    with pytest.raises(OSError, match="No such device"):
        opened(CONFIG, rule(port, ifname="nosuch"))


def test_link_local_address_is_one_of_the_interface() -> None:
    ll = addr.packed("fe80::7")
    config = replace(CONFIG, scope_id=99)
    bound_already = rule(80, addr=ll, ifname="lo")
    assert port_sockets._sockaddr(config, bound_already, 80, ll) == ("fe80::7", 80)
    assert port_sockets._sockaddr(config, rule(80, addr=ll), 80, ll) == ("fe80::7", 80, 0, 99)
    assert port_sockets._sockaddr(config, rule(80), 80, addr.packed("169.254.1.1")) == ("169.254.1.1", 80)


def test_link_local_address_is_the_interfaces_without_its_number(opened: Opened, port: int) -> None:
    """The kernel does so; with IPV6_FREEBIND, since `lo` need not have such an address."""
    ll = addr.packed("fe80::7")
    (sock,) = opened(replace(CONFIG, freebind=True), rule(port, addr=ll, ifname="lo"))
    assert sock.getsockname() == ("fe80::7", port, 0, socket.if_nametoindex("lo"))


@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP])
def test_link_local_address_is_one_of_the_template_interface(opened: Opened, port: int, proto: int) -> None:
    lo = socket.if_nametoindex("lo")
    wanted = rule(port, proto=proto, addr=addr.packed("fe80::7"))
    (sock,) = opened(replace(CONFIG, freebind=True, scope_id=lo), wanted)
    assert sock.getsockname() == ("fe80::7", port, 0, lo)


@pytest.mark.parametrize("outbound", [False, True])
def test_tables_for_rules_that_may_come(outbound: bool) -> None:
    config = replace(CONFIG, forwards=())
    assert open_side(config, outbound).tables is None
    side = open_side(config, outbound, changing=True)
    assert side.tables is not None
    side.tables.close()


@pytest.mark.parametrize(
    ("more", "expected"),
    [({}, True), ({"addr": addr.LOOPBACK4}, False), ({"target": addr.packed("192.0.2.9")}, False)],
)
def test_tables_show_which_address_of_the_host_a_port_of_the_namespace_leads_to(
    port: int, more: dict[str, Any], expected: bool
) -> None:
    config = replace(CONFIG, forwards=(rule(port, outbound=True, **more),))
    tables = open_side(config, False).tables
    assert (tables is not None) == expected
    if tables is not None:
        tables.close()
    side = open_side(config, True)
    assert side.tables is None
    for listener in side.listeners:
        listener.sock.close()


def test_rules_may_come_that_are_not_automatic(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.ENOENT, "No such file or directory", "/proc/net/tcp")

    monkeypatch.setattr(port_sockets, "open_tables", refuse)
    assert open_side(replace(CONFIG, forwards=()), False, changing=True).tables is None


@pytest.mark.parametrize(
    ("address", "option"),
    [("192.0.2.77", (socket.IPPROTO_IP, IP_FREEBIND)), ("2001:db8::77", (socket.IPPROTO_IPV6, IPV6_FREEBIND))],
)
def test_freebind(opened: Opened, port: int, address: str, option: tuple[int, int]) -> None:
    wanted = rule(port, addr=addr.packed(address))
    with pytest.raises(OSError, match="Cannot assign requested address"):
        opened(CONFIG, wanted)
    (sock,) = opened(replace(CONFIG, freebind=True), wanted)
    assert (sock.getsockname()[0], sock.getsockopt(*option)) == (address, 1)


# All of a side -------------------------------------------------------------------------------------------------------


class Sides:
    """Listeners of a side, closed at the end of the test."""

    def __init__(self) -> None:
        self.all: list[Listener] = []

    def __call__(self, *forwards: Rule, outbound: bool = False, config: Config = CONFIG) -> list[int]:
        side = open_side(replace(config, forwards=forwards), outbound)
        self.all += side.listeners
        if side.tables:
            side.tables.close()
        return [listener.port for listener in side.listeners]


@pytest.fixture
def sides() -> Iterator[Sides]:
    s = Sides()
    yield s
    for listener in s.all:
        listener.sock.close()


@pytest.fixture
def taken(port: int) -> Iterator[socket.socket]:
    """A server on `port`."""
    with socket.create_server(("::1", port), family=socket.AF_INET6) as s:
        yield s


def test_only_the_rules_of_the_side(sides: Sides) -> None:
    first = free_ports(4)
    forwards = (rule(first, first + 1), rule(first + 2, outbound=True), rule(first + 3, auto=True, weak=True))
    assert sides(*forwards) == [first, first + 1]
    assert sides(*forwards, outbound=True) == [first + 2, first + 2]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_udp_ports_are_given_to_the_later_uid() -> None:
    first = free_ports(2)
    config = replace(CONFIG, forwards=(rule(first), rule(first + 1, proto=PROTO_UDP)))
    for uid in (65534, None):
        opened = open_side(config, False, owner=uid).listeners
        assert [os.fstat(listener.fd).st_uid for listener in opened] == [0, uid or 0]
        assert {os.fstat(listener.fd).st_gid for listener in opened} == {os.getegid()}
        for listener in opened:
            listener.sock.close()


def test_a_udp_port_that_cannot_be_given_to_another_uid(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuse)
    config, before = replace(CONFIG, forwards=(rule(port, proto=PROTO_UDP),)), os.listdir("/proc/self/fd")
    with pytest.raises(Fatal, match=rf"^Couldn't give UDP port {port} to UID 99: .* \(CAP_CHOWN\)$"):
        open_side(config, False, owner=99)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("outbound", [False, True])
def test_tables_are_opened_where_automatic_rules_lead(outbound: bool) -> None:
    config = replace(CONFIG, forwards=(rule(1, 65535, auto=True, weak=True, outbound=outbound),))
    tables = open_side(config, not outbound).tables
    assert tables is not None
    tables.close()
    assert open_side(config, outbound).tables is None


def test_no_proc_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/thread-self/net/tcp")

    monkeypatch.setattr(port_sockets, "open_tables", missing)
    config = replace(CONFIG, forwards=(rule(1, 65535, auto=True, weak=True),))
    with pytest.raises(Fatal, match=r"^Couldn't open /proc/thread-self/net/tcp, which .* needs: No such file"):
        open_side(config, True)


def test_predecessor_may_take_a_moment_to_end(
    sides: Sides, port: int, taken: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []

    def sleep(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 3:
            taken.close()

    monkeypatch.setattr(time, "sleep", sleep)
    assert sides(rule(port)) == [port]
    assert naps == [port_sockets.RETRY_INTERVAL] * 3


def test_only_a_port_in_use_is_tried_again(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports(2)
    tried: list[int] = []

    class Socket(socket.SocketType):  # type: ignore[misc, valid-type]
        def bind(self, address: Any) -> None:
            tried.append(address[1])
            if tried == [first, first + 1]:
                raise OSError(errno.EADDRINUSE, "Address already in use")
            if address[1] == first:
                raise PermissionError(errno.EACCES, "Permission denied")
            super().bind(address)

    monkeypatch.setattr(port_sockets, "new_socket", Socket)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with pytest.raises(Fatal, match=rf"^Failed to bind port {first} \(Permission denied\)"):
        sides(rule(first, first + 1))
    assert tried == [first, first + 1, first + 1]


def test_ports_that_failed_are_listed_and_nothing_stays(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    first = free_ports(10)
    clock = iter([0.0, 0.5, 2.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    asked: list[tuple[int, int, tuple[bytes, ...]]] = []
    monkeypatch.setattr(holders, "describe", lambda *what: asked.append(what) or f"no. {len(asked)}")
    before = len(os.listdir("/proc/self/fd"))
    held = [socket.create_server(("127.0.0.1", first + i)) for i in (2, 3, 4, 6)]
    try:
        with pytest.raises(Fatal) as e:
            sides(rule(first, first + 4, "-t a"), rule(first + 5, first + 9, "-t b"))
    finally:
        for s in held:
            s.close()
    assert e.value.args == (
        f"Failed to bind ports {first + 2}-{first + 4} (Address already in use) for option '-t a'",
        f"Failed to bind port {first + 6} (Address already in use) for option '-t b'",
        *(f"TCP port {first + i} is held by no. {i - 1}" for i in (2, 3, 4)),
    )
    assert asked == [(PROTO_TCP, first + i, ()) for i in (2, 3, 4)], "the first ones are enough to understand it"
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (rule(80, addr=addr.LOOPBACK4), "TCP 80 127.0.0.1"),
        (rule(80, proto=PROTO_UDP), "UDP 80"),
        (rule(80, outbound=True), "TCP 80 127.0.0.1 ::1"),
    ],
)
def test_holder_is_looked_for_where_it_is_in_the_way(
    wanted: Rule, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def describe(proto: int, port: int, addresses: tuple[bytes, ...]) -> str:
        return " ".join(("TCP" if proto == PROTO_TCP else "UDP", str(port), *map(addr.text, addresses)))

    monkeypatch.setattr(holders, "describe", describe)
    failed = [Failure(wanted, 80, errno.EADDRINUSE), Failure(wanted, 81, errno.EACCES)]
    assert list(port_sockets.holders_of(failed)) == [f"{expected[:3]} port 80 is held by {expected}"]
    monkeypatch.setattr(holders, "describe", lambda *_: "")
    assert list(port_sockets.holders_of(failed)) == []


@pytest.mark.usefixtures("taken")
def test_one_port_of_an_option_is_enough(sides: Sides, port: int) -> None:
    """`-t all,22`: port 22 is there, and no other one could be bound."""
    other = free_ports()
    assert sides(rule(other, option="-t all,x"), rule(port, option="-t all,x", weak=True)) == [other]


@pytest.mark.usefixtures("taken")
def test_weak_rules_leave_out_what_is_taken_and_do_not_wait(
    sides: Sides, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    said: list[str] = []
    monkeypatch.setattr(log, "debug_on", True)
    monkeypatch.setattr(log, "debug", said.append)
    other = free_ports()
    assert sides(rule(port, option="-t all", weak=True), rule(other, option="-t all", weak=True)) == [other]
    assert said == [f"Failed to bind port {port} (Address already in use) for option '-t all'"]
    with pytest.raises(Fatal, match=r"^Failed to bind any port for '-t all', exiting$"):
        sides(rule(port, option="-t all", weak=True))


def test_interface_that_does_not_exist(sides: Sides, port: int) -> None:
    for more in ({}, {"auto": True, "weak": True}):
        with pytest.raises(Fatal, match=r"^Invalid interface name nosuch0: No such device \(option '-t %nosuch0/5'\)$"):
            sides(rule(port, option="-t %nosuch0/5", ifname="nosuch0", **more))


@pytest.mark.parametrize("weak", [False, True])
def test_out_of_descriptors(sides: Sides, monkeypatch: pytest.MonkeyPatch, weak: bool) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(port_sockets, "new_socket", none)
    with pytest.raises(Fatal, match=r"^Can't open enough sockets for port specifier: -t 5-6 \(Too many open files\)$"):
        sides(rule(5, 6, "-t 5-6", weak=weak))


def test_without_descriptors_the_rest_is_not_tried(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """58001 attempts would take a second, in which a running daemon does nothing else."""
    tried = []

    def none(*_: object) -> None:
        tried.append(1)
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(port_sockets, "new_socket", none)
    many = rule(2000, 60000, "-t 2000-60000")
    failed = port_sockets.open_ports(CONFIG, [(many, p) for p in many.ports], [])
    assert len(tried) == 1
    assert [f.port for f in failed] == list(many.ports)
    assert {(f.rule, f.errno) for f in failed} == {(many, errno.EMFILE)}


def test_some_descriptors_are_left_free() -> None:
    assert reserve(7) == 3, "half of few"
    assert reserve(1 << 20) == RESERVE


# Words ---------------------------------------------------------------------------------------------------------------


def test_runs_and_reasons() -> None:
    a, b = rule(20, 30, "-t 20-30"), rule(31, 33, "-t 31-33")
    used, denied = errno.EADDRINUSE, errno.EACCES
    failed = [Failure(a, 20, used), Failure(a, 21, used), Failure(a, 22, denied), Failure(a, 30, denied)]
    failed += [Failure(b, 31, denied), Failure(b, 32, denied), Failure(b, 33, denied)]
    assert describe(failed) == [
        "Failed to bind ports 20-21 (Address already in use) for option '-t 20-30'",
        "Failed to bind port 22 (Permission denied) for option '-t 20-30'",
        "Failed to bind port 30 (Permission denied) for option '-t 20-30'",
        "Failed to bind ports 31-33 (Permission denied) for option '-t 31-33'",
        "To let all users bind ports from 22 up: sysctl -w net.ipv4.ip_unprivileged_port_start=22",
    ]
    for port in (0, 3):
        said = f"Failed to bind port {port} (Address already in use) for option '-t x'"
        assert describe([Failure(rule(port), port, used)]) == [said]
