"""The Internet checksum, against the word-by-word definition of RFC 1071."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.wire.checksum import (
    PROTO_ICMPV6,
    PROTO_TCP,
    PROTO_UDP,
    checksum,
    fold,
    ones_sum,
    pseudo_sum,
    transport_checksum,
)

V4 = bytes.fromhex("c0000201"), bytes.fromhex("c6336401")
V6 = bytes.fromhex("20010db8000000000000000000000001"), bytes.fromhex("20010db8ffffffffffffffffffffffff")


def by_words(data: bytes) -> int:
    """RFC 1071, 4.1, as it stands there."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for i in range(0, len(data), 2):
        total += data[i] << 8 | data[i + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


def test_example_of_rfc_1071() -> None:
    """Section 3: the words 0001 f203 f4f5 f6f7 sum to ddf2."""
    assert ones_sum(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2


def test_ipv4_header() -> None:
    header = bytes.fromhex("45000073000040004011 0000 c0a80001c0a800c7")
    assert checksum(header) == 0xB861
    assert checksum(header[:10] + bytes.fromhex("b861") + header[12:]) == 0


@pytest.mark.parametrize(
    ("data", "result"),
    [
        (b"", 0),
        (b"\0" * 8, 0),
        (b"\xff\xff", 0xFFFF),
        (b"\xff\xff" * 3, 0xFFFF),
        (b"\x80\0\x7f\xff", 0xFFFF),
        (b"\x01", 0x100),
    ],
)
def test_both_zeroes(data: bytes, result: int) -> None:
    assert ones_sum(data) == result == by_words(data)


@given(st.binary(max_size=300))
def test_sum_is_that_of_the_words(data: bytes) -> None:
    assert ones_sum(data) == by_words(data)
    assert ones_sum(bytearray(data)) == ones_sum(memoryview(data)) == ones_sum(data)


@given(st.binary(max_size=40).map(lambda b: b + b), st.binary(max_size=41))
def test_parts(even: bytes, last: bytes) -> None:
    assert checksum(even, last) == checksum(even + last) == 0xFFFF - by_words(even + last)


@given(st.integers(0, 0xFFFFFFFF))
def test_fold(total: int) -> None:
    assert fold(total) == by_words(total.to_bytes(4, "big"))


@pytest.mark.parametrize("pair", [V4, V6])
@pytest.mark.parametrize("proto", [PROTO_TCP, PROTO_UDP, PROTO_ICMPV6])
@pytest.mark.parametrize("length", [0, 8, 1480, 65535, 65536, 100_000])
def test_pseudo_header(pair: tuple[bytes, bytes], proto: int, length: int) -> None:
    src, dst = pair
    if len(src) == 4:
        length &= 0xFFFF
        header = src + dst + bytes((0, proto)) + length.to_bytes(2, "big")
    else:
        header = src + dst + length.to_bytes(4, "big") + bytes((0, 0, 0, proto))
    assert pseudo_sum(src, dst, proto, length) == by_words(header)


@given(st.binary(min_size=8, max_size=100), st.sampled_from([V4, V6]))
def test_receiver_finds_it_right(segment: bytes, pair: tuple[bytes, bytes]) -> None:
    """A sum over pseudo-header and segment, checksum included, is 0xffff."""
    segment = segment[:6] + b"\0\0" + segment[8:]
    c = transport_checksum(*pair, PROTO_UDP, segment)
    whole = segment[:6] + c.to_bytes(2, "big") + segment[8:]
    assert fold(pseudo_sum(*pair, PROTO_UDP, len(whole)) + by_words(whole)) == 0xFFFF
