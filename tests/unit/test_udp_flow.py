from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.core.config import Ip4
from passt.core.context import Context
from passt.core.fwd import Forwarding
from passt.linux.sockopt import SOL_UDP, UDP_SEGMENT
from passt.udp_flow import DNS_TIMEOUT, FLOW_TIMEOUT, UdpFlow, open_socket

from .offload import received
from .oracle import recomputed
from .support import CONFIG, GUEST4, GUEST6, GUEST_MAC, IP4, OUR_MAC, T0, link, make_context

PEER4, PEER6 = addr.packed("198.51.100.9"), addr.packed("2001:db8:9::9")
OTHER_MAC = bytes.fromhex("525400999999")


def flow_key(src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
    return src + dst + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")


def cooked(v4: bool, mtu: int = 65520, index: int = 4) -> UdpFlow:
    src, dst = (GUEST4, PEER4) if v4 else (GUEST6, PEER6)
    flow = UdpFlow(flow_key(src, dst, 5000, 9000), dst, T0)
    flow.index = index
    flow.cook(GUEST_MAC, OUR_MAC, mtu)
    return flow


both = pytest.mark.parametrize("v4", [True, False], ids=["IPv4", "IPv6"])


@both
@pytest.mark.parametrize("size", [0, 1, 2, 1399, 65000])
def test_a_datagram(ctx: Context, v4: bool, size: int) -> None:
    flow, payload = cooked(v4), os.urandom(size)
    ctx.link.send_payload((flow.header(size, size), payload))
    (frame,) = received(link(ctx))
    assert recomputed(frame) == frame
    p = Ether(frame)
    assert (p.dst, p.src) == (addr.mac_text(GUEST_MAC), addr.mac_text(OUR_MAC))
    packet = p[IP if v4 else IPv6]
    assert (packet.src, packet.dst) == (addr.text(flow.dst), addr.text(flow.src))
    assert (packet.ttl if v4 else packet.hlim) == 255
    assert (p[UDP].sport, p[UDP].dport) == (9000, 5000)
    assert bytes(p[UDP].payload) == payload


@both
@pytest.mark.parametrize(("total", "size"), [(3000, 1000), (2500, 1000), (65473, 1400), (3, 1)])
def test_a_super_frame_becomes_its_datagrams(ctx: Context, v4: bool, total: int, size: int) -> None:
    flow, payload = cooked(v4), os.urandom(total)
    ctx.link.send_payload((flow.header(total, size), payload))
    frames = received(link(ctx))
    assert [bytes(Ether(f)[UDP].payload) for f in frames] == [payload[i : i + size] for i in range(0, total, size)]
    assert [recomputed(f) for f in frames] == frames


@both
def test_the_header_follows_every_change(ctx: Context, v4: bool) -> None:
    flow = cooked(v4)
    for total, size in ((100, 100), (300, 100), (300, 300), (100, 100), (100, 100), (300, 150)):
        ctx.link.send_payload((flow.header(total, size), bytes(total)))
        frames = received(link(ctx))
        assert [len(Ether(f)[UDP].payload) for f in frames] == [size] * (total // size)
        assert [recomputed(f) for f in frames] == frames


def test_each_flow_has_a_label_of_its_own_and_none_is_zero(ctx: Context) -> None:
    labels = []
    for index in (0, 1, 131070, 0xFFFFF):
        ctx.link.send_payload((cooked(False, index=index).header(0, 0),))
        labels.append(Ether(link(ctx).take_one())[IPv6].fl)
    assert labels == [1, 2, 131071, 1]


def test_another_guest_mac(ctx: Context) -> None:
    flow = cooked(True)
    flow.header(1, 1)
    flow.set_guest_mac(OTHER_MAC)
    ctx.link.send_payload((flow.header(1, 1), b"x"))
    assert link(ctx).take_one()[:12] == OTHER_MAC + OUR_MAC


@pytest.mark.parametrize(("v4", "mtu", "room"), [(True, 1500, 1472), (False, 1500, 1452), (True, 0, 65535)])
def test_what_fits_the_mtu(v4: bool, mtu: int, room: int) -> None:
    assert cooked(v4, mtu).payload_max == room


@pytest.mark.parametrize(("dport", "timeout"), [(53, DNS_TIMEOUT), (853, FLOW_TIMEOUT), (9, FLOW_TIMEOUT)])
def test_timeouts(dport: int, timeout: float) -> None:
    flow = UdpFlow(flow_key(GUEST4, PEER4, 5000, dport), PEER4, T0)
    assert (flow.timeout, flow.sport, flow.dport) == (timeout, 5000, dport)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        s.settimeout(5)
        yield s


def port_of(s: socket.socket) -> int:
    port: int = s.getsockname()[1]
    return port


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("", 0))
        return port_of(s)


FWD = Forwarding(CONFIG)


def test_the_socket_has_the_guests_port_and_its_peer(server: socket.socket) -> None:
    port = free_port()
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
    port = free_port()
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


def test_a_port_that_others_have_is_replaced(server: socket.socket) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as holder:
        holder.bind(("", 0))
        with open_socket(FWD, addr.LOOPBACK4, port_of(holder), port_of(server)) as s:
            assert port_of(s) not in (0, port_of(holder))
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
    port = free_port()
    with open_socket(FWD, addr.LOOPBACK4, port, port) as s:
        assert s.getpeername() == ("127.0.0.1", port)
        assert port_of(s) != port


def test_broadcast_is_allowed_when_it_turns_out_to_be_one(server: socket.socket) -> None:
    with open_socket(FWD, addr.packed("127.255.255.255"), free_port(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 1
    with open_socket(FWD, addr.LOOPBACK4, free_port(), port_of(server)) as s:
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST) == 0


RealSocket = socket.socket


class Stranger(socket.socket):
    """A socket that gets a datagram from somebody between bind() and connect()."""

    def connect(self, address: tuple[str, int]) -> None:  # type: ignore[override]
        with RealSocket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.sendto(b"stranger", ("127.0.0.1", self.getsockname()[1]))
        super().connect(address)


def test_what_strangers_sent_is_thrown_away(server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Stranger)
    with open_socket(FWD, addr.LOOPBACK4, free_port(), port_of(server)) as s, pytest.raises(BlockingIOError):
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
    ip4 = Ip4(addr=GUEST4, prefix_len=24, gateway=IP4.gateway, our_addr=IP4.our_addr, if_out="eth7",
              addr_out=addr.packed("203.0.113.7"))
    open_socket(make_context(ip4=ip4).fwd, host, 5000, 9).close()
    assert Recorder.bound == bound


def test_segment_and_hops_are_set_on_the_socket(server: socket.socket) -> None:
    flow = UdpFlow(flow_key(GUEST4, addr.LOOPBACK4, 5000, 9000), addr.LOOPBACK4, T0)
    with open_socket(FWD, addr.LOOPBACK4, 0, port_of(server)) as flow.sock:
        flow.set_segment(700)
        assert flow.sock.getsockopt(SOL_UDP, UDP_SEGMENT) == flow.segment == 700
        flow.set_hops(3)
        assert flow.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == flow.hops == 3
