"""The bounded cursor: nothing beyond the end is seen, and every overrun is Malformed."""

from __future__ import annotations

from struct import Struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.drops import Reason
from passt.wire.cursor import Cursor, Malformed

THING, TRAILING = Reason("thing truncated"), Reason("thing trailing bytes")


def test_reads_forward() -> None:
    c = Cursor(bytes.fromhex("01 0203 04050607 08"), THING)
    assert c.left == 8
    assert c.u8() == 1
    assert c.u16() == 0x0203
    assert c.unpack(Struct("!HH")) == (0x0405, 0x0607)
    assert c.rest() == b"\x08"
    assert c.left == 0
    assert c.rest() == b""


@pytest.mark.parametrize("n", [-1, 4, 1 << 40])
def test_overrun(n: int) -> None:
    c = Cursor(b"abc", THING)
    with pytest.raises(Malformed, match=r"^thing truncated$") as e:
        c.take(n)
    assert e.value.reason == "thing truncated"
    assert c.take(3) == b"abc"  # the position did not move


def test_unpack_overrun() -> None:
    with pytest.raises(Malformed, match="truncated"):
        Cursor(b"abc", THING).unpack(Struct("!I"))


def test_region_hides_what_follows() -> None:
    c = Cursor(b"abcdef", THING)
    with c.exactly(2, TRAILING):
        assert c.left == 2
        with pytest.raises(Malformed):
            c.take(3)
        assert c.rest() == b"ab"
    assert c.rest() == b"cdef"


def test_region_must_be_consumed() -> None:
    c = Cursor(b"abcdef", THING)
    with pytest.raises(Malformed, match="trailing bytes"), c.exactly(3, TRAILING):
        c.take(2)


@pytest.mark.parametrize("n", [-1, 7])
def test_region_beyond_the_end(n: int) -> None:
    with pytest.raises(Malformed, match="truncated"), Cursor(b"abcdef", THING).exactly(n, TRAILING):
        pytest.fail("entered")


def test_regions_nest() -> None:
    c = Cursor(b"abcdef", THING)
    with c.exactly(5, TRAILING):
        with pytest.raises(Malformed), c.exactly(6, TRAILING):
            pytest.fail("entered")
        with c.exactly(1, TRAILING):
            c.u8()
        c.take(4)
    assert c.rest() == b"f"


@given(st.binary(max_size=64), st.lists(st.integers(-8, 80), max_size=16))
def test_takes_are_the_data_in_order(data: bytes, sizes: list[int]) -> None:
    c = Cursor(data, THING)
    seen = b""
    for n in sizes:
        try:
            seen += c.take(n)
        except Malformed:
            assert n < 0 or n > c.left
    assert data.startswith(seen)
    assert c.left == len(data) - len(seen)
