"""Domain names in search lists."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNSRR

from passt.wire import domain
from passt.wire.cursor import Malformed

LABEL = st.text("abcdefghijklmnopqrstuvwxyz0123456789-_", min_size=1, max_size=20)
NAMES = st.lists(st.lists(LABEL, min_size=1, max_size=5).map(".".join), max_size=8)

# The example of RFC 3397, section 2: "eng.apple.com" and "marketing.apple.com"
RFC3397 = b"\x03eng\x05apple\x03com\x00\x09marketing\xc0\x04"


def test_encode() -> None:
    assert domain.encode("example.com") == b"\x07example\x03com\0"
    assert domain.encode("example.com.") == b"\x07example\x03com\0", "the dot at the end adds nothing"
    assert domain.encode("a") == b"\x01a\0"


@pytest.mark.parametrize(("room", "count"), [(-1, 0), (0, 0), (2, 0), (3, 1), (7, 1), (8, 2), (9, 2), (11, 3), (99, 3)])
def test_leading(room: int, count: int) -> None:
    names = ("a", "bcd", "e.")  # 3, 5 and 3 bytes
    assert domain.leading(names, room) == names[:count]


@pytest.mark.parametrize("name", ["", ".", "..", "a..b", ".a", "a" * 64, "ü.example", "a.b.."])
def test_not_a_name(name: str) -> None:
    with pytest.raises(ValueError, match="domain name"):
        domain.encode(name)


def test_longest_name() -> None:
    label = "a" * 63
    longest = f"{label}.{label}.{label}.{'a' * 61}"
    assert len(domain.encode(longest)) == domain.NAME_MAX
    assert domain.decode_list(domain.encode(longest)) == (longest,)
    with pytest.raises(ValueError, match="too long"):
        domain.encode(longest + "a")


def test_example_of_rfc_3397() -> None:
    names = ("eng.apple.com", "marketing.apple.com")
    assert domain.compress_list(names) == RFC3397
    assert domain.decode_list(RFC3397) == names


def test_whole_name_again_is_one_pointer() -> None:
    assert domain.compress_list(["a.b", "a.b", "b"]) == b"\1a\1b\0" + b"\xc0\0" + b"\xc0\2"


def test_no_pointer_beyond_its_range() -> None:
    names = [f"{i:061}.{i:061}.{i:061}" for i in range(100)]
    packed = domain.compress_list([*names, names[-1], names[0]])
    assert len(packed) > domain.OFFSET_MAX
    assert domain.decode_list(packed) == (*names, names[-1], names[0])


@given(NAMES)
def test_both_ways(names: list[str]) -> None:
    assert domain.decode_list(domain.encode_list(names)) == tuple(names)
    packed = domain.compress_list(names)
    assert domain.decode_list(packed) == tuple(names)
    assert len(packed) <= len(domain.encode_list(names))


@given(NAMES.filter(bool))
def test_scapy_agrees(names: list[str]) -> None:
    record = DNSRR(rrname="x.", type="NS", rdata=names[0] + ".")
    assert bytes(record)[-len(domain.encode(names[0])) :] == domain.encode(names[0])


def test_padding_is_no_name() -> None:
    assert domain.decode_list(b"\1a\0" + bytes(5)) == ("a",)
    assert domain.decode_list(b"") == ()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\5abc", "truncated"),
        (b"\1a", "truncated"),
        (b"\xc0", "truncated"),
        (b"\1a\xc0", "truncated"),
        (b"\xc0\0", "pointer not backwards"),
        (b"\1a\xc0\0", "pointer not backwards"),
        (b"\1a\0\1b\xc0\5", "pointer not backwards"),
        (b"\1a\0\xc0\xff", "pointer not backwards"),
        (b"\x40a\0", "label type"),
        (b"\x80a\0", "label type"),
        (b"\1\xe4\0", "not text"),
        (b"\3a.b\0", "not text"),
        (b"\x3f" + b"a" * 63 + (b"\x3f" + b"a" * 63) * 3 + b"\0", "too long"),
        (b"\0" + b"".join((0xC000 | max(0, 2 * i - 1)).to_bytes(2, "big") for i in range(300)), "too many pointers"),
    ],
)
def test_malformed(data: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        domain.decode_list(data)


@given(st.binary(max_size=64) | st.lists(st.sampled_from([b"\xc0", b"\0", b"\1", b"\2", b"a"])).map(b"".join))
def test_parses_or_malformed(data: bytes) -> None:
    try:
        names = domain.decode_list(data)
    except Malformed:
        return
    assert domain.decode_list(domain.encode_list(names)) == names
