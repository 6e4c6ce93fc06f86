"""The register of half-open connections: which one makes way for a new one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.flow.half_open import SHARE, HalfOpen
from passt.flow.table import Flow

LIMIT = 8


def flow(index: int) -> Flow:
    made = Flow(b"")
    made.index = index
    return made


def filled(count: int, to: Any = lambda i: b"%d" % i) -> tuple[HalfOpen[Flow], list[Flow]]:
    half_open: HalfOpen[Flow] = HalfOpen(LIMIT)
    flows = [flow(i) for i in range(count)]
    for f in flows:
        half_open.add(f, to(f.index))
    return half_open, flows


def test_below_the_limit_nothing_makes_way() -> None:
    half_open, _ = filled(LIMIT - 1)
    assert half_open.in_the_way(b"new") is None and len(half_open) == LIMIT - 1


def test_at_the_limit_the_oldest_makes_way() -> None:
    half_open, flows = filled(LIMIT)
    assert half_open.in_the_way(b"new") is flows[0]
    half_open.discard(flows[0])
    assert half_open.in_the_way(b"new") is None
    assert half_open.in_the_way(b"new", taken=1) is flows[1], "a place of the limit that has no entry"


def test_a_destination_has_its_share() -> None:
    half_open, flows = filled(LIMIT // SHARE, lambda i: b"silent")
    assert half_open.in_the_way(b"silent") is flows[0]
    assert half_open.in_the_way(b"other") is None


def test_an_answer_frees_the_place() -> None:
    half_open, flows = filled(LIMIT // SHARE, lambda i: b"slow")
    half_open.discard(flows[2])
    half_open.discard(flows[2])  # twice: answered, and then ended
    assert half_open.in_the_way(b"slow") is None and list(half_open.all()) == [flows[0], flows[1], flows[3]]


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_small_limit_has_room_for_one(limit: int) -> None:
    half_open: HalfOpen[Flow] = HalfOpen(limit)
    assert half_open.in_the_way(b"x") is None
    half_open.add(flow(1), b"x")
    assert (half_open.in_the_way(b"x") is None) == (limit == 3)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.sampled_from([b"a", b"b", b"c"])), max_size=200))
def test_whatever_comes_and_goes(steps: list[tuple[bool, int, bytes]]) -> None:
    """Neither limit is exceeded, and what makes way is the oldest of its kind."""
    half_open: HalfOpen[Flow] = HalfOpen(LIMIT)
    model: list[tuple[Flow, bytes]] = []
    for comes, index, to in steps:
        if not comes:
            gone = [f for f, _ in model if f.index == index]
            half_open.discard(gone[0] if gone else flow(index))
            model = [(f, d) for f, d in model if f.index != index]
        elif all(f.index != index for f, _ in model):
            same = [f for f, d in model if d == to]
            wanted = same[0] if len(same) >= LIMIT // SHARE else model[0][0] if len(model) >= LIMIT else None
            found = half_open.in_the_way(to)
            assert found is wanted
            if found is not None:
                half_open.discard(found)
                model = [(f, d) for f, d in model if f is not found]
            model.append((flow(index), to))
            half_open.add(*model[-1])
        assert list(half_open.all()) == [f for f, _ in model] and len(half_open) == len(model)
        assert half_open.oldest() is (model[0][0] if model else None)
    for f, _ in model:
        half_open.discard(f)
    assert not half_open._by_destination
