"""Which resolver is asked, and which one next: tables, and a clock that is handed in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr, log
from passt.policy.config import Config
from passt.policy.resolvers import HOLD, Resolver, Resolvers
from passt.policy.settings import Settings

FORWARDED = addr.packed("169.254.1.1")
T0 = 1000.0


def make(*hosts: str) -> Resolvers:
    return Resolvers(settings(*hosts))


def settings(*hosts: str) -> Settings:
    return Settings(Config(dns_match=(FORWARDED,), dns_hosts=tuple(map(addr.packed, hosts))))


def order(resolvers: Resolvers, now: float, v6: bool = False) -> list[str]:
    """All of them, as one query after the other fails."""
    tried: tuple[Resolver, ...] = ()
    while resolver := resolvers.pick(v6, now, tried):
        tried += (resolver,)
    return [addr.text(r.addr) for r in tried]


@pytest.mark.parametrize(
    ("dst", "port", "served"),
    [
        ("169.254.1.1", 53, True),
        ("169.254.1.1", 853, True),
        ("169.254.1.1", 54, False),
        ("169.254.1.2", 53, False),
        ("2001:db8::1", 53, False),
    ],
)
def test_what_is_for_a_resolver(dst: str, port: int, served: bool) -> None:
    assert make("192.0.2.1").serve(addr.packed(dst), port) == served
    assert not make().serve(addr.packed(dst), port)


def test_the_own_family_comes_first_then_the_order_of_the_list() -> None:
    resolvers = make("192.0.2.1", "2001:db8::1", "192.0.2.2", "2001:db8::2", "192.0.2.1")
    assert order(resolvers, T0) == ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2"]
    assert order(resolvers, T0, v6=True) == ["2001:db8::1", "2001:db8::2", "192.0.2.1", "192.0.2.2"]
    assert order(make("2001:db8::1"), T0) == ["2001:db8::1"]
    assert make().pick(False, T0) is None


def test_failure_puts_a_resolver_behind_the_others_for_some_time() -> None:
    resolvers = make("192.0.2.1", "192.0.2.2", "2001:db8::1")
    first = resolvers.hosts[0]
    resolvers.failed(first, "no answer", T0)
    assert order(resolvers, T0) == ["192.0.2.2", "2001:db8::1", "192.0.2.1"]
    assert order(resolvers, T0 + HOLD - 0.1) == ["192.0.2.2", "2001:db8::1", "192.0.2.1"]


def test_one_query_finds_out_whether_it_is_well_again() -> None:
    resolvers = make("192.0.2.1", "192.0.2.2")
    first, second = resolvers.hosts
    resolvers.failed(first, "no answer", T0)
    now = T0 + HOLD
    assert resolvers.pick(False, now) is first
    assert resolvers.pick(False, now) is second
    resolvers.answered(first, now + 0.1)
    assert resolvers.pick(False, now + 0.1) is first
    resolvers.failed(first, "no answer", now + 1)
    resolvers.failed(second, "no answer", now + 2)
    assert order(resolvers, now + 3) == ["192.0.2.1", "192.0.2.2"]


def test_silence_counts_unless_something_else_was_answered() -> None:
    resolvers = make("192.0.2.1", "192.0.2.2")
    first, second = resolvers.hosts
    resolvers.answered(first, T0 + 0.5)
    assert not resolvers.silent(first, T0, T0 + 1.5)
    assert resolvers.pick(False, T0 + 1.5) is first
    assert resolvers.silent(first, T0 + 1, T0 + 2.5)
    assert resolvers.pick(False, T0 + 2.5) is second


def test_those_that_stay_keep_their_health() -> None:
    holder = settings("192.0.2.1", "192.0.2.2")
    resolvers = Resolvers(holder)
    resolvers.failed(resolvers.hosts[0], "no answer", T0)
    holder.replace(Config(dns_hosts=tuple(map(addr.packed, ("192.0.2.1", "192.0.2.3")))), T0)
    assert order(resolvers, T0 + 1) == ["192.0.2.3", "192.0.2.1"]
    assert not resolvers.serve(FORWARDED, 53)


def test_it_is_said_when_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    resolvers = make("192.0.2.1", "192.0.2.2")
    first, second = resolvers.hosts
    resolvers.failed(first, "no answer", T0 + 1)
    resolvers.exhausted(T0, T0 + 2)
    assert not said
    resolvers.failed(second, "Connection refused", T0 + 2)
    resolvers.exhausted(T0, T0 + 2)
    listed = "192.0.2.1 (no answer), 192.0.2.2 (Connection refused)"
    assert said == [f"No resolver of the host answers: {listed}; names cannot be looked up"]
    resolvers.answered(first, T0 + 100)
    resolvers.exhausted(T0 + 99, T0 + 100)
    assert len(said) == 1


@given(st.data())
def test_every_resolver_is_tried_once_whatever_has_happened(data: st.DataObject) -> None:
    resolvers = make("192.0.2.1", "2001:db8::1", "192.0.2.2")
    now = T0
    for _ in range(data.draw(st.integers(0, 10))):
        now += data.draw(st.floats(0, 2 * HOLD))
        resolver = data.draw(st.sampled_from(resolvers.hosts))
        happens = data.draw(st.sampled_from(("failed", "silent", "answered", "picked")))
        if happens == "failed":
            resolvers.failed(resolver, "x", now)
        elif happens == "silent":
            resolvers.silent(resolver, now - 1.5, now)
        elif happens == "answered":
            resolvers.answered(resolver, now)
        else:
            resolvers.pick(True, now)
    held = {addr.text(r.addr): r.held > now for r in resolvers.hosts}
    found = order(resolvers, now, v6=True)
    assert sorted(found) == sorted(held)
    assert [held[a] for a in found] == sorted(held[a] for a in found)
