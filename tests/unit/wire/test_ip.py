"""IPv4 and IPv6 headers, and the walk over extension headers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6, IPv6ExtHdrDestOpt, IPv6ExtHdrHopByHop, IPv6ExtHdrRouting, PadN
from scapy.layers.ipsec import AH

from passt.addr import packed
from passt.wire import ip
from passt.wire.cursor import Malformed

SRC4, DST4 = packed("192.0.2.1"), packed("192.0.2.2")
SRC6, DST6 = packed("fe80::1"), packed("2001:db8::2")

# 28 bytes in all, TTL 255, UDP, checksum 0x37cd
HEADER4 = bytes.fromhex("4500001c00000000 ff1137cd c0000201 c0000202")
HEADER6 = bytes.fromhex("600abcde 00083aff fe800000000000000000000000000001 20010db8000000000000000000000002")

EXTENSION = st.tuples(st.sampled_from([0, 43, 60, 51, 44]), st.integers(0, 3), st.binary(min_size=6, max_size=6))


def test_header4() -> None:
    assert ip.header4(SRC4, DST4, 17, 8) == HEADER4
    assert ip.header(SRC4, DST4, 17, 8) == HEADER4
    fields = ip.HEADER4.unpack(HEADER4)
    assert fields == (ip.VERSION_IHL4, 0, 28, 0, 0, ip.TTL, 17, 0x37CD, SRC4, DST4)


def test_header6() -> None:
    assert ip.header6(SRC6, DST6, 58, 8, 0xABCDE) == HEADER6
    assert ip.header(SRC6, DST6, 58, 8, 0x7ABCDE) == HEADER6, "a flow label has 20 bits"
    fields = ip.HEADER6.unpack(HEADER6)
    assert fields == (ip.VERSION6 | 0xABCDE, 8, 58, ip.TTL, SRC6, DST6)


def test_scapy_agrees() -> None:
    four, six = IP(HEADER4), IPv6(HEADER6)
    assert (four.src, four.dst, four.ttl, four.proto, four.len) == ("192.0.2.1", "192.0.2.2", 255, 17, 28)
    del four.chksum
    assert bytes(four) == HEADER4
    assert (six.src, six.dst, six.hlim, six.nh, six.plen, six.fl) == ("fe80::1", "2001:db8::2", 255, 58, 8, 0xABCDE)


# Extension headers -------------------------------------------------------------------------------------------------


def walk(data: bytes, next_header: int) -> tuple[int, int]:
    return ip.skip_extensions(data, 0, len(data), next_header)


@pytest.mark.parametrize("proto", [6, 17, 58, 50, 132, 255])
def test_nothing_to_skip(proto: int) -> None:
    assert walk(b"", proto) == (proto, 0)


def test_chain_written_by_scapy() -> None:
    packet = (
        IPv6(src="fe80::1", dst="fe80::2")
        / IPv6ExtHdrHopByHop(options=[PadN(optdata=bytes(20))])
        / IPv6ExtHdrRouting(addresses=["2001:db8::1", "2001:db8::2"])
        / IPv6ExtHdrDestOpt(options=[PadN(optdata=bytes(4))])
        / AH(nh=17, payloadlen=4, spi=1, seq=2, icv=bytes(12))
        / UDP(sport=1, dport=2)
    )
    raw = bytes(packet)
    assert ip.skip_extensions(raw, 40, len(raw), raw[6]) == (17, len(raw) - 8)
    assert ip.skip_extensions(memoryview(bytearray(raw)), 40, len(raw), raw[6]) == (17, len(raw) - 8)


def test_authentication_header_counts_in_words() -> None:
    """RFC 4302, 2.2: 96 bits of ICV make 24 bytes, length field 4."""
    assert walk(bytes.fromhex("0604") + bytes(22), ip.AUTHENTICATION) == (6, 24)


@pytest.mark.parametrize("offset_and_flags", ["0001", "0008", "fff8", "8001"])
def test_fragment_is_reported(offset_and_flags: str) -> None:
    data = bytes.fromhex("1100" + offset_and_flags + "12345678") + bytes(8)
    assert walk(data, ip.FRAGMENT) == (ip.FRAGMENT, 0)
    assert walk(b"\x2c\0" + bytes(6) + data, ip.HOP_BY_HOP) == (ip.FRAGMENT, 8)


@pytest.mark.parametrize("offset_and_flags", ["0000", "0002", "0004", "0006"])
def test_atomic_fragment_is_walked_over(offset_and_flags: str) -> None:
    """RFC 6946; the reserved bits are to be ignored."""
    assert walk(bytes.fromhex("1100" + offset_and_flags + "12345678"), ip.FRAGMENT) == (17, 8)


@pytest.mark.parametrize("data", [b"", b"\x11", b"\x11\0\0\0\0\0\0", b"\x11\1" + bytes(13), b"\x11\xff" + bytes(100)])
@pytest.mark.parametrize("kind", [ip.HOP_BY_HOP, ip.ROUTING, ip.DESTINATION_OPTIONS])
def test_truncated(data: bytes, kind: int) -> None:
    with pytest.raises(Malformed, match=r"^IPv6 extension header truncated$"):
        walk(data, kind)


def test_end_binds_not_the_buffer() -> None:
    data = b"\x11\1" + bytes(30)
    with pytest.raises(Malformed, match="truncated"):
        ip.skip_extensions(data, 0, 15, ip.HOP_BY_HOP)
    assert ip.skip_extensions(data, 0, 16, ip.HOP_BY_HOP) == (17, 16)


def test_no_next_header() -> None:
    with pytest.raises(Malformed, match=r"^IPv6 no next header$"):
        walk(b"", ip.NO_NEXT_HEADER)
    with pytest.raises(Malformed, match=r"^IPv6 no next header$"):
        walk(b"\x3b" + bytes(7), ip.DESTINATION_OPTIONS)


def test_bounded() -> None:
    header = b"\x3c" + bytes(7)
    most = ip.EXTENSIONS_MAX - 1
    assert walk(header * (most - 1) + b"\x11" + bytes(7), ip.DESTINATION_OPTIONS) == (17, 8 * most)
    with pytest.raises(Malformed, match=r"^IPv6 too many extension headers$"):
        walk(header * 8000, ip.DESTINATION_OPTIONS)


@given(st.binary(max_size=80), st.integers(0, 255), st.integers(0, 80))
def test_walks_or_malformed(data: bytes, next_header: int, end: int) -> None:
    end = min(end, len(data))
    try:
        proto, offset = ip.skip_extensions(data, 0, end, next_header)
    except Malformed:
        return
    assert 0 <= offset <= end
    assert proto not in (ip.HOP_BY_HOP, ip.ROUTING, ip.DESTINATION_OPTIONS, ip.AUTHENTICATION, ip.NO_NEXT_HEADER)


@given(st.lists(EXTENSION, max_size=8), st.sampled_from([6, 17, 58]))
def test_any_chain(chain: list[tuple[int, int, bytes]], proto: int) -> None:
    kinds = [kind for kind, _, _ in chain] + [proto]
    data = b""
    for (kind, length, fill), following in zip(chain, kinds[1:], strict=True):
        if kind == ip.FRAGMENT:
            data += bytes((following, 0, 0, 0)) + fill[:4]
        else:
            size = 4 * length + 8 if kind == ip.AUTHENTICATION else 8 * length + 8
            data += (bytes((following, length)) + fill).ljust(size, b"\xaa")
    assert walk(data, kinds[0]) == (proto, len(data))
