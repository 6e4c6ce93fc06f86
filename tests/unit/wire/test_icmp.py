"""ICMP and ICMPv6 echo and error messages."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.addr import packed
from passt.wire import ether, icmp, ip
from passt.wire.checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP
from tests.unit.oracle import dissect, recomputed

MAC = bytes.fromhex("525400123456")


@dataclass(frozen=True)
class Family:
    guest: bytes
    peer: bytes
    header: int
    most: int  # longest error message, with its IP header
    echo: int
    error_name: str


FOUR = Family(packed("192.0.2.2"), packed("198.51.100.1"), 20, 576, icmp.ECHO_REQUEST, "ICMP")
SIX = Family(packed("2001:db8::2"), packed("2001:db8:1::1"), 40, 1280, icmp.ECHO_REQUEST6, "ICMPv6DestUnreach")
BOTH = pytest.mark.parametrize("family", [FOUR, SIX], ids=["v4", "v6"])

ECHO4 = bytes.fromhex("0800 f2fb 0001 0502 0001")
PORT4 = bytes.fromhex(
    "0303 e94d 00000000"
    "4500001c00000000ff11cf99 c0000202 c6336401"  # the guest's datagram to 198.51.100.1
    "8000 0035 0008 9371"
)


def frame(src: bytes, dst: bytes, message: bytes) -> bytes:
    return ether.ip_frame(MAC, MAC, src, dst, icmp.protocol(src), message)


def test_protocol() -> None:
    assert icmp.protocol(FOUR.guest) == PROTO_ICMP
    assert icmp.protocol(SIX.guest) == PROTO_ICMPV6


def test_echo_literal() -> None:
    fields = icmp.ECHO.unpack(ECHO4[:8])
    assert fields == (icmp.ECHO_REQUEST, 0, 0xF2FB, 1, 0x0502)
    message = icmp.ECHO.pack(icmp.ECHO_REQUEST, 0, 0, 1, 0x0502) + ECHO4[8:]
    assert icmp.complete(FOUR.guest, FOUR.peer, message) == ECHO4


def test_port_unreachable_literal() -> None:
    packet = icmp.quote_udp(FOUR.guest, FOUR.peer, 0x8000, 53, b"")
    assert icmp.port_unreachable(FOUR.peer, FOUR.guest, packet) == PORT4
    assert icmp.ERROR.unpack(PORT4[:8]) == (icmp.UNREACHABLE, icmp.UNREACHABLE_PORT, 0xE94D, 0)


@BOTH
@pytest.mark.parametrize("data", [b"", b"x", bytes(range(100))])
def test_echo_checksum(family: Family, data: bytes) -> None:
    message = icmp.ECHO.pack(family.echo, 0, 0, 0x1234, 7) + data
    whole = frame(family.guest, family.peer, icmp.complete(family.guest, family.peer, message))
    assert whole == recomputed(whole)


@BOTH
def test_port_unreachable_quotes_the_datagram(family: Family) -> None:
    packet = icmp.quote_udp(family.guest, family.peer, 40000, 53, b"query")
    whole = frame(family.peer, family.guest, icmp.port_unreachable(family.peer, family.guest, packet))
    assert whole == recomputed(whole)
    found = dissect(whole.replace(b"query", b""))
    quoted = found["UDPerror"]
    assert (quoted.sport, quoted.dport, quoted.len) == (40000, 53, 13)
    assert family.error_name in found
    inner = whole[14 + family.header + 8 :]
    assert inner == packet
    source, destination = (ip.HEADER4 if family is FOUR else ip.HEADER6).unpack(inner[: family.header])[-2:]
    assert (source, destination) == (family.guest, family.peer)


@BOTH
@pytest.mark.parametrize("size", [0, 1, 520, 521, 1200, 1192, 1193, 60000])
def test_quotes_no_more_than_every_host_takes(family: Family, size: int) -> None:
    packet = icmp.quote_udp(family.guest, family.peer, 1, 2, bytes(size))
    message = icmp.port_unreachable(family.peer, family.guest, packet)
    assert family.header + len(message) == min(family.most, 2 * family.header + 16 + size)
    assert packet.startswith(message[8:])
    whole = frame(family.peer, family.guest, message)
    assert whole == recomputed(whole)


def test_limits() -> None:
    assert (icmp.QUOTE_MAX4, icmp.QUOTE_MAX6) == (548, 1232)


@BOTH
def test_too_big(family: Family) -> None:
    message = icmp.too_big(family.peer, family.guest, 1400, icmp.quote(family.guest, family.peer, PROTO_UDP, bytes(8)))
    whole = frame(family.peer, family.guest, message)
    assert whole == recomputed(whole)
    kind, code, _, word = icmp.ERROR.unpack(message[:8])
    assert word == 1400
    wanted = (3, 4) if family is FOUR else (2, 0)  # RFC 1191, 4; RFC 4443, 3.2
    assert (kind, code) == wanted


def test_mtu_of_v4_has_16_bits() -> None:
    assert icmp.too_big(FOUR.peer, FOUR.guest, 70000, b"")[4:8] == bytes.fromhex("0000ffff")
    assert icmp.too_big(SIX.peer, SIX.guest, 70000, b"")[4:8] == bytes.fromhex("00011170")


@given(st.binary(max_size=1500), st.sampled_from([FOUR, SIX]), st.integers(0, 255), st.integers(0, 0xFFFFFFFF))
def test_any_error_verifies(packet: bytes, family: Family, code: int, word: int) -> None:
    message = icmp.error(family.peer, family.guest, 3, code, word, packet)
    assert icmp.complete(family.peer, family.guest, message[:2] + b"\0\0" + message[4:]) == message
    assert packet.startswith(message[8:])
