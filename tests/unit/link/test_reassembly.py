from __future__ import annotations

import os
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.link.reassembly import MEMORY, OVERHEAD, PACKETS, TIMEOUT, Reassembly

T0 = 1000.0
Piece = tuple[int, bool, bytes]
KEY = b"key"


def pieces(data: bytes, *cuts: int) -> list[Piece]:
    """`data` in fragments that end at `cuts`."""
    ends = [*cuts, len(data)]
    return [(a, b < len(data), data[a:b]) for a, b in pairwise([0, *ends])]


@pytest.fixture
def drops() -> Counter[str]:
    return Counter()


@pytest.fixture
def queue(drops: Counter[str]) -> Reassembly:
    return Reassembly(drops)


def feed(queue: Reassembly, what: list[Piece], key: bytes = KEY, now: float = T0) -> list[bytes]:
    answers = [queue.add(key, offset, more, payload, now) for offset, more, payload in what]
    return [a for a in answers if a is not None]


DATA = bytes(range(40))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0), (0, 2, 1)])
def test_any_order(queue: Reassembly, drops: Counter[str], order: tuple[int, ...]) -> None:
    parts = pieces(DATA, 16, 24)
    assert feed(queue, [parts[i] for i in order]) == [DATA]
    assert (len(queue), queue.memory, drops) == (0, 0, Counter())


def test_what_is_no_fragment_passes_and_disturbs_nothing(queue: Reassembly) -> None:
    first, last = pieces(DATA, 16)
    assert feed(queue, [first]) == []
    assert queue.add(KEY, 0, False, b"atomic", T0) == b"atomic"
    assert feed(queue, [last]) == [DATA]


def test_payload_is_copied(queue: Reassembly) -> None:
    buffer = bytearray(DATA)
    view = memoryview(buffer)
    assert queue.add(KEY, 0, True, view[:16], T0) is None
    buffer[:16] = bytes(16)
    assert queue.add(KEY, 16, False, view[16:], T0) == DATA


def test_packets_of_different_keys_are_apart(queue: Reassembly) -> None:
    other = os.urandom(40)
    a, b = pieces(DATA, 16), pieces(other, 16)
    assert feed(queue, a[:1], b"a") + feed(queue, b[:1], b"b") == []
    assert feed(queue, a[1:], b"b") == [other[:16] + DATA[16:]]
    assert feed(queue, b[1:], b"a") == [DATA[:16] + other[16:]]


def test_a_copy_of_a_fragment_is_ignored_alone(queue: Reassembly, drops: Counter[str]) -> None:
    first, middle, last = pieces(DATA, 16, 24)
    assert feed(queue, [first, first, last, last, middle]) == [DATA]
    assert drops == {"fragment: duplicate": 2}


@pytest.mark.parametrize(
    "intruder",
    [(8, True, b"x" * 16), (0, True, b"x" * 8), (0, True, b"x" * 16), (0, True, DATA[:24]), (8, False, b"x")],
)
def test_an_overlap_spoils_the_packet_and_what_still_comes(
    queue: Reassembly, drops: Counter[str], intruder: Piece
) -> None:
    first, last = pieces(DATA, 16)
    assert feed(queue, [first, intruder, last, first]) == []
    assert drops["fragment: overlap"] == 3
    assert queue.memory == 0
    # The identification may be used again when the packet would have timed out.
    assert feed(queue, [first, last], now=T0 + TIMEOUT) == [DATA]


@pytest.mark.parametrize(
    "bad",
    [(8, True, b"seven.."), (8, True, b""), (8, False, b""), (65528, False, b"12345678"), (65528, True, b"x" * 8)],
)
def test_a_bad_fragment_is_dropped_alone(queue: Reassembly, drops: Counter[str], bad: Piece) -> None:
    first, last = pieces(DATA, 16)
    assert feed(queue, [first, bad, last]) == [DATA]
    assert drops == {"fragment: bad": 1}


def test_the_end_is_where_the_last_fragment_said(queue: Reassembly, drops: Counter[str]) -> None:
    first, last = pieces(DATA, 16)
    beyond = (48, True, b"x" * 8)
    assert feed(queue, [last, beyond, (48, False, b"other end"), first]) == [DATA]
    assert drops == {"fragment: bad": 2}


def test_a_last_fragment_that_ends_before_what_came(queue: Reassembly, drops: Counter[str]) -> None:
    assert feed(queue, [(0, True, DATA[:8]), (24, True, DATA[24:32]), (8, False, DATA[8:16])]) == []
    assert drops == {"fragment: bad": 1}


def test_what_is_late_is_discarded_when_the_next_comes(queue: Reassembly, drops: Counter[str]) -> None:
    first, last = pieces(DATA, 16)
    assert feed(queue, [first]) == []
    assert feed(queue, [last], now=T0 + TIMEOUT) == []
    assert drops == {"fragment: timeout": 1}
    assert len(queue) == 1


def test_too_many_packets_cost_the_oldest(queue: Reassembly, drops: Counter[str]) -> None:
    first, last = pieces(DATA, 16)
    for i in range(PACKETS + 1):
        assert feed(queue, [first], bytes((i,))) == []
    assert len(queue) == PACKETS
    assert drops == {"fragment: queue full": 1}
    assert feed(queue, [last], bytes((1,))) == [DATA]
    assert feed(queue, [last], bytes((0,))) == []


def test_memory_counts_what_small_fragments_really_cost(queue: Reassembly, drops: Counter[str]) -> None:
    for i in range(8):
        for offset in range(8, 65528, 16):
            queue.add(bytes((i,)), offset, True, b"x" * 8, T0)
    assert queue.memory <= MEMORY
    assert drops["fragment: queue full"] > 0
    assert 65528 // 16 * 8 * (8 + OVERHEAD) > MEMORY


@st.composite
def split(draw: st.DrawFn) -> tuple[bytes, list[Piece]]:
    """A packet and its fragments in any order, some of them repeated."""
    data = draw(st.binary(min_size=1, max_size=200))
    cuts = sorted(draw(st.sets(st.integers(1, 25).map(lambda n: n * 8).filter(lambda n: n < len(data)))))
    parts = pieces(data, *cuts)
    copies = draw(st.lists(st.sampled_from(parts), max_size=3))
    return data, draw(st.permutations(parts + copies))


@given(split())
def test_every_split_in_every_order_gives_the_packet(case: tuple[bytes, list[Piece]]) -> None:
    data, parts = case
    queue = Reassembly(Counter())
    done = feed(queue, parts)
    assert data in done
    assert set(done) == {data}
    assert queue.memory == sum(p.cost() for p in queue._packets.values())


fragment = st.tuples(
    st.integers(0, 12).map(lambda n: n * 8), st.booleans(), st.integers(0, 5).map(lambda n: n * 8) | st.integers(0, 40)
)


@given(st.lists(fragment, max_size=20))
def test_nonsense_never_corrupts(parts: list[tuple[int, bool, int]]) -> None:
    """Each fragment is made of a byte of its own: what comes out is without gap, and no byte is of two fragments."""
    queue = Reassembly(Counter())
    given_parts: list[Piece] = []
    for i, (offset, more, length) in enumerate(parts):
        payload = bytes((i + 1,)) * length
        whole = queue.add(KEY, offset, more, payload, T0)
        given_parts.append((offset, more, payload))
        if whole is None:
            continue
        for number in set(whole):
            start, _, body = given_parts[number - 1]
            assert whole[start : start + len(body)] == body
            assert whole.count(number) == len(body)
    assert 0 <= queue.memory == sum(p.cost() for p in queue._packets.values())
