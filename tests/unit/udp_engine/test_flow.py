from __future__ import annotations

import os
import socket

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.flow.context import Context
from passt.udp_engine.flow import DNS_TIMEOUT, FLOW_TIMEOUT, UdpFlow, timeout

from ..offload import received
from ..oracle import recomputed
from ..support import GUEST4, GUEST6, GUEST_MAC, OUR_MAC, T0, link
from ..udp_support import QUERY

PEER4, PEER6 = addr.packed("198.51.100.9"), addr.packed("2001:db8:9::9")
OTHER_MAC = bytes.fromhex("525400999999")


def flow_key(src: bytes, dst: bytes, sport: int, dport: int) -> bytes:
    return src + dst + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")


def cooked(v4: bool, mtu: int = 65520, index: int = 4) -> UdpFlow:
    src, dst = (GUEST4, PEER4) if v4 else (GUEST6, PEER6)
    flow = UdpFlow(flow_key(src, dst, 5000, 9000), dst, T0)
    flow.index = index
    flow.build_header(GUEST_MAC, OUR_MAC, mtu)
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


def test_other_macs(ctx: Context) -> None:
    flow = cooked(True)
    flow.header(1, 1)
    flow.set_macs(OTHER_MAC, GUEST_MAC)
    ctx.link.send_payload((flow.header(1, 1), b"x"))
    assert link(ctx).take_one()[:12] == OTHER_MAC + GUEST_MAC


@pytest.mark.parametrize(("v4", "mtu", "room"), [(True, 1500, 1472), (False, 1500, 1452), (True, 0, 65535)])
def test_what_fits_the_mtu(v4: bool, mtu: int, room: int) -> None:
    assert cooked(v4, mtu).payload_max == room


@pytest.mark.parametrize("dport", [53, 5353, 9000])
@pytest.mark.parametrize("look", [QUERY, b"no query"])
def test_a_query_is_known_by_its_look_on_any_port(dport: int, look: bytes) -> None:
    flow = UdpFlow(flow_key(GUEST4, PEER4, 5000, dport), PEER4, T0)
    assert (flow.timeout, flow.sport, flow.dport) == (FLOW_TIMEOUT, 5000, dport)
    flow.begins_with(look)
    assert flow.timeout == timeout(look) == (DNS_TIMEOUT if look == QUERY else FLOW_TIMEOUT)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (QUERY[:2] + b"\x81\x80" + QUERY[4:], DNS_TIMEOUT),
        (QUERY, FLOW_TIMEOUT),
        (b"\0\1\x81\x80" + QUERY[4:], FLOW_TIMEOUT),
    ],
)
def test_a_flow_without_an_answer_to_its_query_is_like_any_other(reply: bytes, expected: float) -> None:
    flow = UdpFlow(flow_key(GUEST4, PEER4, 5000, 53), PEER4, T0)
    flow.begins_with(QUERY)
    flow.answered(reply)
    assert (flow.timeout, flow.asked) == (expected, -1)


def test_hops_are_set_on_the_socket() -> None:
    flow = UdpFlow(flow_key(GUEST4, addr.LOOPBACK4, 5000, 9000), addr.LOOPBACK4, T0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flow.sock:
        flow.set_fields(3)
        assert flow.sock.getsockopt(socket.IPPROTO_IP, socket.IP_TTL) == flow.fields & 0xFF == 3
