"""Lease times: short after a change, as long as the network has been quiet otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt import addr
from passt.policy.lease import LEASE_MAX, LEASE_MIN, Quiet, told
from passt.wire.dhcpv6 import INFINITE

from ..support import CONFIG, IP4, IP6, T0

FOLLOWED = replace(CONFIG, followed=True)


@pytest.mark.parametrize(
    ("age", "seconds"), [(0, LEASE_MIN), (59, 60), (61.5, 61), (3600, 3600), (86400, 86400), (1e6, LEASE_MAX)]
)
def test_lease_is_as_long_as_it_was_quiet(age: float, seconds: int) -> None:
    assert Quiet(T0).lease(FOLLOWED, T0 + age) == seconds


def test_lease_never_ends_where_nothing_is_followed() -> None:
    assert Quiet(T0).lease(CONFIG, T0) == INFINITE


def test_a_guest_renews_a_few_times_on_a_quiet_day() -> None:
    """At half of each lease."""
    quiet, now, renewals = Quiet(T0), T0, 0
    while now < T0 + 86400:
        now += quiet.lease(FOLLOWED, now) / 2
        renewals += 1
    assert renewals <= 22


@pytest.mark.parametrize(
    "changed",
    [
        {"ip4": replace(IP4, addr=addr.packed("192.0.2.9"))},
        {"ip4": replace(IP4, gateway=addr.packed("192.0.2.9"))},
        {"ip6": replace(IP6, addr=None)},
        {"ip4": replace(IP4, dns=(addr.packed("192.0.2.9"),))},
        {"dns_search": ("example.org",)},
    ],
)
def test_another_thing_told_makes_leases_short(changed: dict[str, object]) -> None:
    quiet, other = Quiet(T0), replace(FOLLOWED, **changed)  # type: ignore[arg-type]
    quiet.changed(FOLLOWED, other, T0 + 5000)
    assert quiet.lease(other, T0 + 5000) == LEASE_MIN
    assert quiet.lease(other, T0 + 5100) == 100


def test_a_change_that_no_guest_is_told_leaves_them_long() -> None:
    quiet, other = Quiet(T0), replace(FOLLOWED, scope_id=7, interfaces=(("eth7", 7),))
    assert told(FOLLOWED) == told(other)
    quiet.changed(FOLLOWED, other, T0 + 5000)
    assert quiet.lease(other, T0 + 5000) == 5000
