"""The record of a connection: events, time-outs, the pre-cooked header."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import NEVER, addr, log
from passt.tcp_engine import conn as tcp_conn
from passt.tcp_engine.conn import (
    ESTABLISHED,
    KEEPALIVE_IDLE,
    KEEPALIVE_INTERVAL,
    L2,
    RTO_MAX,
    TAP_FIN_SENT,
    TAP_SYN_ACK_SENT,
    TAP_SYN_RCVD,
    TcpConn,
    build_header,
    event_text,
    set_event,
    set_segmentation,
    timeout,
)
from passt.tcp_engine.scoreboard import Scoreboard
from passt.wire.virtio import F_NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, VNET
from tests.unit.support import GUEST4, GUEST6, GUEST_MAC, OUR_MAC

PEER4, PEER6 = addr.packed("198.51.100.7"), addr.packed("2001:db8:ffff::7")
PORTS = bytes.fromhex("9c40 0050")
ENDS = {True: GUEST4 + PEER4, False: GUEST6 + PEER6}
OPEN = TAP_SYN_RCVD | TAP_SYN_ACK_SENT | ESTABLISHED


def new(v4: bool = True, **fields: Any) -> TcpConn:
    conn = TcpConn(ENDS[v4] + PORTS)
    conn.index = 0
    for name, value in fields.items():
        setattr(conn, name, value)
    return conn


# Events ------------------------------------------------------------------------------------------------------------


def test_names_are_those_of_the_bits() -> None:
    for i, name in enumerate(tcp_conn.EVENT_NAMES):
        assert getattr(tcp_conn, name) == 1 << i
        assert event_text(1 << i) == name
    assert event_text(0) == "none"
    assert event_text(OPEN) == "TAP_SYN_RCVD|TAP_SYN_ACK_SENT|ESTABLISHED"


def test_transitions_are_logged_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(log, "trace_on", True)
    monkeypatch.setattr(log, "trace", lines.append)
    conn = new()
    set_event(conn, TAP_SYN_RCVD)
    set_event(conn, TAP_SYN_RCVD)
    set_event(conn, TAP_FIN_SENT)
    set_event(conn, ESTABLISHED, clear=TAP_FIN_SENT)
    assert conn.events == TAP_SYN_RCVD | ESTABLISHED
    assert lines == [
        "Flow 0 (TCP connection): none -> TAP_SYN_RCVD",
        "Flow 0 (TCP connection): TAP_SYN_RCVD -> TAP_SYN_RCVD|TAP_FIN_SENT",
        "Flow 0 (TCP connection): TAP_SYN_RCVD|TAP_FIN_SENT -> TAP_SYN_RCVD|ESTABLISHED",
    ]


@pytest.mark.parametrize(
    ("v4", "text"),
    [
        (True, "192.0.2.2:40000 -> 198.51.100.7:80"),
        (False, "[2001:db8::2]:40000 -> [2001:db8:ffff::7]:80"),
    ],
)
def test_endpoints(v4: bool, text: str) -> None:
    assert str(new(v4).endpoints()) == text


def test_no_attribute_beside_the_slots() -> None:
    """A dict per connection would cost more than everything in it."""
    assert not hasattr(new(), "__dict__")
    with pytest.raises(AttributeError):
        new().typo = 1  # type: ignore[attr-defined]


# Time --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    fields: dict[str, Any]
    seconds: float


CASES = {
    "connecting": Case({"events": TAP_SYN_RCVD, "snd_nxt": 5}, NEVER),
    "SYN,ACK": Case({"events": TAP_SYN_RCVD | TAP_SYN_ACK_SENT, "snd_nxt": 1, "rto": 0.02}, 0.02),
    "data": Case({"snd_nxt": 100, "snd_wnd": 1000, "rto": 0.2, "pto": 0.1}, 0.1),
    "data, window closed": Case({"snd_nxt": 100, "snd_wnd": 0, "rto": 0.2, "pto": 0.1}, 0.1),
    "data, again": Case({"snd_nxt": 100, "snd_wnd": 1000, "rto": 0.2, "pto": 0.1, "retries": 1}, 0.2),
    "data, a loss known": Case(
        {"snd_nxt": 100, "snd_wnd": 1000, "rto": 0.2, "pto": 0.1, "scoreboard": Scoreboard(0, 0, 100)}, 0.2
    ),
    "zero window": Case({"drained": False}, 0.05),
    "zero window, probed": Case({"drained": False, "retries": 3}, 0.4),
    "zero window, for a day": Case({"drained": False, "retries": 1440}, RTO_MAX),
    "zero window, nothing to send": Case({"drained": True}, KEEPALIVE_IDLE),
    "idle": Case({"snd_wnd": 1000}, KEEPALIVE_IDLE),
    "idle, probed": Case({"snd_wnd": 1000, "retries": 1}, KEEPALIVE_INTERVAL),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_timeout(case: Case) -> None:
    assert timeout(new(**{"events": OPEN, **case.fields})) == pytest.approx(case.seconds)


# The header ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v4", [True, False])
def test_cooked_header(v4: bool) -> None:
    conn = new(v4, index=41)
    build_header(conn, GUEST_MAC, OUR_MAC, 1500, tso=True)
    assert VNET.unpack_from(conn.hdr) == (F_NEEDS_CSUM, GSO_NONE, 0, 0, 34 if v4 else 54, 16)
    frame = Ether(bytes(conn.hdr[L2:]))
    assert (frame.dst, frame.src) == (addr.mac_text(GUEST_MAC), addr.mac_text(OUR_MAC))
    segment = TCP(bytes(conn.hdr[conn.l4 :]))
    assert (segment.sport, segment.dport) == (80, 40000)
    if v4:
        packet = frame[IP]
        assert (packet.src, packet.dst) == (addr.text(PEER4), addr.text(GUEST4))
        assert (packet.ttl, packet.id, int(packet.flags), packet.ihl) == (255, 0, 0, 5)
    else:
        packet = frame[IPv6]
        assert (packet.src, packet.dst) == (addr.text(PEER6), addr.text(GUEST6))
        assert (packet.hlim, packet.fl, packet.tc, packet.nh) == (255, 42, 0, 6)
    assert len(conn.hdr) == conn.l4 + 20


@pytest.mark.parametrize(("index", "label"), [(0, 1), (0xFFFFE, 0xFFFFF), (0xFFFFF, 1), (0x100000, 1)])
def test_flow_label_is_never_zero(index: int, label: int) -> None:
    conn = new(False, index=index)
    build_header(conn, GUEST_MAC, OUR_MAC, 1500, tso=True)
    assert IPv6(bytes(conn.hdr[L2 + 14 :])).fl == label


@given(st.booleans(), st.integers(28, 0xFFFF), st.just(0) | st.integers(68, 0xFFFF), st.booleans())
def test_what_a_frame_may_carry(v4: bool, mss: int, mtu: int, tso: bool) -> None:
    """At most the guest's MSS and the MTU per segment, a whole number of segments, within an IP length field."""
    conn = new(v4, mss=mss)
    build_header(conn, GUEST_MAC, OUR_MAC, mtu, tso=tso)
    headers = 40 if v4 else 60
    assert 0 < conn.mss <= mss
    assert not mtu or conn.mss + headers <= mtu
    assert conn.chunk % conn.mss == 0 and conn.chunk
    counted = conn.chunk + (headers if v4 else 20)
    assert counted <= 65535
    if tso:
        assert counted + conn.mss > 65535, "as many as there is room for"
    else:
        assert conn.chunk == conn.mss


@pytest.mark.parametrize(("v4", "most"), [(True, 65535 - 40), (False, 65535 - 20)])
def test_the_longest_segment_of_each_family(v4: bool, most: int) -> None:
    """The length field of IPv4 counts the IP header, that of IPv6 does not."""
    conn = new(v4, mss=0xFFFF)
    build_header(conn, GUEST_MAC, OUR_MAC, 0, tso=True)
    assert (conn.mss, conn.chunk) == (most, most)


@pytest.mark.parametrize(("v4", "gso_type", "hdr_len"), [(True, GSO_TCPV4, 54), (False, GSO_TCPV6, 74)])
def test_segmentation_on_and_off(v4: bool, gso_type: int, hdr_len: int) -> None:
    conn = new(v4, mss=1000)
    build_header(conn, GUEST_MAC, OUR_MAC, 1500, tso=True)
    plain = bytes(conn.hdr)
    set_segmentation(conn, gso_type)
    assert conn.gso
    assert VNET.unpack_from(conn.hdr) == (F_NEEDS_CSUM, gso_type, hdr_len, 1000, hdr_len - 20, 16)
    set_segmentation(conn, GSO_NONE)
    assert not conn.gso and conn.hdr == plain
