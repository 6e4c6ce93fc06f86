"""Which datagrams of a group are the guest's own."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from passt.udp_engine.own_copies import COPIES, KEPT, OwnCopies

from ..support import T0

GROUP, OTHER = b"\xe0\0\0\xfb", b"\xe0\0\0\xfc"


def test_one_copy_for_each_datagram() -> None:
    copies = OwnCopies()
    copies.sent(GROUP, 5353, 5353, b"query", T0)
    copies.sent(GROUP, 5353, 5353, b"query", T0)
    assert [copies.take(GROUP, 5353, 5353, b"query", T0) for _ in range(3)] == [True, True, False]
    assert len(copies) == 0


def test_what_is_of_another() -> None:
    copies = OwnCopies()
    copies.sent(GROUP, 5353, 5353, b"query", T0)
    assert not copies.take(OTHER, 5353, 5353, b"query", T0)
    assert not copies.take(GROUP, 5355, 5353, b"query", T0)
    assert not copies.take(GROUP, 5353, 40000, b"query", T0)
    assert not copies.take(GROUP, 5353, 5353, b"answer", T0)
    assert copies.take(GROUP, 5353, 5353, b"query", T0)


def test_a_copy_that_does_not_come_is_forgotten() -> None:
    copies = OwnCopies()
    copies.sent(GROUP, 5353, 5353, b"query", T0)
    assert not copies.take(GROUP, 5353, 5353, b"query", T0 + KEPT)
    assert len(copies) == 0


def test_what_was_taken_does_not_age_what_follows() -> None:
    copies = OwnCopies()
    copies.sent(GROUP, 5353, 5353, b"query", T0)
    assert copies.take(GROUP, 5353, 5353, b"query", T0)
    copies.sent(GROUP, 5353, 5353, b"query", T0 + 0.9)
    assert copies.take(GROUP, 5353, 5353, b"query", T0 + 1.5)


def test_bounded() -> None:
    copies = OwnCopies()
    for i in range(2 * COPIES):
        copies.sent(GROUP, 5353, 5353, i.to_bytes(2, "big"), T0)
    assert len(copies) == COPIES
    assert not copies.take(GROUP, 5353, 5353, (COPIES - 1).to_bytes(2, "big"), T0)
    assert copies.take(GROUP, 5353, 5353, (2 * COPIES - 1).to_bytes(2, "big"), T0)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 3)), max_size=60))
def test_as_many_as_were_sent(steps: list[tuple[bool, int, int]]) -> None:
    """Against a plain list: a copy is taken if one was sent within KEPT, and not taken since."""
    copies, model, now = OwnCopies(), [], T0
    for is_sent, what, wait in steps:
        now += wait / 4
        payload = bytes((what,))
        model = [(t, p) for t, p in model if t > now - KEPT]
        if is_sent:
            copies.sent(GROUP, 1, 2, payload, now)
            model.append((now, payload))
        else:
            found = next((m for m in model if m[1] == payload), None)
            assert copies.take(GROUP, 1, 2, payload, now) == (found is not None)
            if found is not None:
                model.remove(found)
