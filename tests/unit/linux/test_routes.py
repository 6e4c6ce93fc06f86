"""Decisions about routes and addresses: a corpus of host tables, as values."""

from __future__ import annotations

import errno
import itertools
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.linux import routes
from passt.linux.routes import RT_SCOPE_LINK, Address, Hop, Host, Link, Route, add_in_passes


def ip(text: str) -> bytes:
    return addr.packed(text)


def route(dst: str, *hops: Hop, metric: int = 0) -> Route:
    """`default4`, `default6` or ADDR/LENGTH."""
    if dst.startswith("default"):
        return Route(bytes(4 if dst == "default4" else 16), 0, hops, metric)
    plain, _, length = dst.partition("/")
    return Route(ip(plain), int(length), hops, metric)


def via(index: int, gateway: str | None = None, weight: int = 1, *, onlink: bool = False) -> Hop:
    return Hop(index, ip(gateway) if gateway else None, weight, onlink)


LINKS = (Link(1, "lo", bytes(6), 65536, loopback=True), Link(2, "eth0", b"\2" * 6, 1500), Link(3, "ppp0", b"", 1492))


def host(*tables: Route, addresses: tuple[Address, ...] = ()) -> Host:
    return Host(
        LINKS,
        addresses,
        tuple(r for r in tables if len(r.dst) == 4),
        tuple(r for r in tables if len(r.dst) == 16),
    )


HETZNER = (route("default4", via(2, "172.31.1.1")), route("172.31.1.1/32", via(2)))
HETZNER_ONLINK = (route("default4", via(2, "172.31.1.1", onlink=True)),)
ECMP = (route("default4", via(2, "192.0.2.1", 1), via(2, "192.0.2.2", 3), via(2, "192.0.2.3", 3)),)
ECMP_TWO_LINKS = (route("default4", via(3, "198.51.100.1", 9), via(2, "192.0.2.1", 1)),)
WIREGUARD = (route("0.0.0.0/1", via(3)), route("128.0.0.0/1", via(3)), route("default4", via(2, "192.0.2.1")))
PPP = (route("default4", via(3)), route("10.64.64.1/32", via(3)))
SEVERAL = (
    route("default4", via(3, "198.51.100.1"), metric=600),
    route("default4", via(2, "192.0.2.1"), metric=100),
)
EQUAL = (route("default4", via(3), metric=5), route("default4", via(2), metric=5))
NO_DEFAULT = (route("169.254.0.0/16", via(3)), route("192.0.2.0/24", via(2)))
UNREACHABLE = (route("default4", via(1)), route("default4", via(0)), route("192.0.2.0/24", via(2)))
V6_LL_ONLY = (route("fe80::/64", via(2)), route("ff00::/8", via(2)))
VIA6 = (route("default4", via(2, "fe80::1")),)


@pytest.mark.parametrize(
    ("table", "v6", "index", "why"),
    [
        (HETZNER, False, 2, "the default route"),
        (ECMP, False, 2, "the default route"),
        (ECMP_TWO_LINKS, False, 3, "the default route"),
        (WIREGUARD, False, 2, "the default route"),
        (PPP, False, 3, "the default route"),
        (SEVERAL, False, 2, "the default route with the lowest metric, 100 (ppp0 has 600)"),
        (EQUAL, False, 3, "the default route, the first of several with metric 5 (eth0 has 5)"),
        (NO_DEFAULT, False, 2, "the only interface with a route, which is no default one"),
        (UNREACHABLE, False, 2, "the only interface with a route, which is no default one"),
        (V6_LL_ONLY, True, 0, "no interface has a usable route"),
        (HETZNER, True, 0, "no interface has a usable route"),
        ((), False, 0, "no interface has a usable route"),
        (
            (route("192.0.2.0/24", via(2)), route("10.0.0.0/8", via(3))),
            False,
            2,
            "the first route of several interfaces, none of them default (ppp0)",
        ),
    ],
)
def test_pick_interface(table: tuple[Route, ...], v6: bool, index: int, why: str) -> None:
    assert routes.pick_interface(host(*table), v6) == (index, why)


@pytest.mark.parametrize(
    ("table", "index", "gateway"),
    [
        (HETZNER, 2, "172.31.1.1"),
        (HETZNER_ONLINK, 2, "172.31.1.1"),
        (ECMP, 2, "192.0.2.2"),  # the highest weight, the first of equals
        (ECMP_TWO_LINKS, 2, "192.0.2.1"),
        (SEVERAL, 3, "198.51.100.1"),
        (SEVERAL, 2, "192.0.2.1"),
        (PPP, 3, None),
        (VIA6, 2, None),
        (NO_DEFAULT, 2, None),
    ],
)
def test_pick_gateway(table: tuple[Route, ...], index: int, gateway: str | None) -> None:
    assert routes.pick_gateway(host(*table), index, v6=False) == (ip(gateway) if gateway else None)


ADDRESSES = (
    Address(2, ip("127.0.0.7"), 8, routes.RT_SCOPE_HOST),
    Address(2, ip("192.0.2.2"), 24),
    Address(2, ip("192.0.2.3"), 30, deprecated=True),
    Address(2, ip("192.0.2.4"), 28),
    Address(2, ip("192.0.2.5"), 28),
    Address(3, ip("198.51.100.2"), 32),
    Address(2, ip("fe80::2"), 64, RT_SCOPE_LINK),
    Address(2, ip("2001:db8::2"), 64),
)


def test_pick_address() -> None:
    h = host(addresses=ADDRESSES)
    assert routes.pick_address(h, 2, v6=False) == ADDRESSES[3]
    assert routes.pick_address(h, 2, v6=True) == ADDRESSES[7]
    assert routes.pick_address(h, 3, v6=True) is None
    assert routes.pick_link_local(h, 2) == ip("fe80::2")
    assert routes.pick_link_local(h, 3) is None


def six(last: int, prefix_len: int = 64, **state: bool) -> Address:
    return Address(2, ip(f"2001:db8::{last}"), prefix_len, **state)


OLD, NEW, PRIVATE = six(1, deprecated=True), six(2, tentative=True), six(3, temporary=True)


@pytest.mark.parametrize(
    ("addresses", "chosen", "copied"),
    [
        ([OLD], 1, [1]),
        ([six(1, deprecated=True), six(9, 128, deprecated=True)], 9, [1, 9]),
        ([OLD, six(4, deprecated=True, temporary=True)], 1, [1, 4]),
        ([PRIVATE, six(5)], 5, [3, 5]),
        ([PRIVATE, OLD], 3, [3]),
        ([PRIVATE, six(3, 128, deprecated=True)], 3, [3]),
        ([NEW], 2, [2]),
        ([NEW, PRIVATE], 3, [2, 3]),
        ([NEW, OLD], 2, [2]),  # which is in use when the guest is
        ([six(6, 128, temporary=True), six(7, 64)], 7, [6, 7]),
        ([six(6), six(7, 128)], 7, [6, 7]),
        ([six(8, duplicate=True), OLD], 1, [1]),
        ([six(8, duplicate=True, tentative=True)], 0, []),
    ],
)
def test_which_address_lasts(addresses: list[Address], chosen: int, copied: list[int]) -> None:
    h = host(addresses=tuple(addresses))
    found = routes.pick_address(h, 2, v6=True)
    assert (found.addr[-1] if found else 0) == chosen
    assert [a.addr[-1] for a in routes.addresses_to_copy(h, 2, v6=True)] == copied


def test_deprecated_ipv4_address() -> None:
    h = host(addresses=(ADDRESSES[2],))
    assert routes.pick_address(h, 2, v6=False) == ADDRESSES[2]
    assert routes.addresses_to_copy(h, 2, v6=False) == (ADDRESSES[2],)


def test_link_local_address_that_another_host_has() -> None:
    twice = Address(2, ip("fe80::1"), 64, RT_SCOPE_LINK, duplicate=True)
    assert routes.pick_link_local(host(addresses=(twice, ADDRESSES[6])), 2) == ip("fe80::2")
    assert routes.pick_link_local(host(addresses=(twice,)), 2) is None


def test_addresses_to_copy() -> None:
    h = host(addresses=ADDRESSES)
    assert [a.addr[-1] for a in routes.addresses_to_copy(h, 2, v6=False)] == [2, 4, 5]
    assert routes.addresses_to_copy(h, 2, v6=True) == (ADDRESSES[7],)


def test_links_by_index_and_name() -> None:
    assert host().link(3) is host().named("ppp0")
    assert host().link(9) is None
    assert host().named("x") is None


# Copying -----------------------------------------------------------------------------------------------------------


def test_routes_are_copied_in_an_order_in_which_gateways_are_reachable() -> None:
    chain = (
        route("default4", via(2, "10.2.0.1")),
        route("10.2.0.0/16", via(2, "10.1.0.1")),
        route("10.1.0.1/32", via(2)),
        route("192.0.2.0/24", via(3)),
    )
    assert routes.routes_to_copy(host(*chain), 2, v6=False) == (chain[2], chain[1], chain[0])


def test_hops_through_other_interfaces_are_left_out() -> None:
    assert routes.routes_to_copy(host(*ECMP_TWO_LINKS), 2, v6=False) == (route("default4", via(2, "192.0.2.1")),)


def test_equal_routes_are_copied_once() -> None:
    twice = (route("192.0.2.0/24", via(2)), route("192.0.2.0/24", via(2)), route("192.0.2.0/24", via(2), metric=5))
    assert len(routes.routes_to_copy(host(*twice), 2, v6=False)) == 2


def test_a_full_internet_table_is_cut() -> None:
    many = [Route(i.to_bytes(4, "big"), 32, (Hop(2),)) for i in range(1, routes.COPY_LIMIT + 10)]
    default = route("default4", via(2, "192.0.2.1"))
    kept = routes.cut(routes.routes_to_copy(host(default, *many), 2, v6=False))
    assert len(kept) == routes.COPY_LIMIT
    assert kept[-1] == default


def test_routes_by_next_hop_objects_are_counted() -> None:
    table = host(route("default4", via(2, "192.0.2.1")), route("198.51.100.0/24", via(0)))
    assert routes.unresolved(table, v6=False) == 1


@pytest.mark.parametrize(
    ("gateway", "address", "prefix_len", "onlink"),
    [
        ("192.0.2.1", "192.0.2.9", 24, False),
        ("192.0.3.1", "192.0.2.9", 24, True),
        ("192.0.2.1", "192.0.2.9", 32, True),
        ("fe80::1", "2001:db8::1", 64, False),
        ("fe80::1", None, 64, False),
        ("2001:db8:1::1", "2001:db8::1", 64, True),
    ],
)
def test_single_route(gateway: str, address: str | None, prefix_len: int, onlink: bool) -> None:
    (only,) = routes.single_routes(ip(gateway), ip(address) if address else None, prefix_len)
    assert only.default
    assert only.hops == (Hop(0, ip(gateway), onlink=onlink),)


class Kernel:
    """Accepts a route when its gateways are covered by a route on the link, or declared to be."""

    def __init__(self) -> None:
        self.table: list[Route] = []

    def add(self, r: Route) -> None:
        if r in self.table:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        for hop in r.hops:
            if hop.gateway and not hop.onlink and not self._covered(hop.gateway):
                raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))
        self.table.append(r)

    def _covered(self, a: bytes) -> bool:
        return any(r.prefix_len and addr.in_subnet(a, r.dst, r.prefix_len) for r in self.table)


CHAIN = (
    route("10.1.0.0/24", via(2)),
    route("10.2.0.0/24", via(2, "10.1.0.1")),
    route("10.3.0.0/24", via(2, "10.2.0.1")),
    route("default4", via(2, "10.3.0.1")),
)


@pytest.mark.parametrize("order", list(itertools.permutations(CHAIN)))
def test_passes_resolve_any_order(order: tuple[Route, ...]) -> None:
    kernel = Kernel()
    assert add_in_passes(order, kernel.add) == []
    assert set(kernel.table) == set(CHAIN)


def test_gateway_outside_every_prefix_is_declared_onlink() -> None:
    kernel = Kernel()
    assert add_in_passes(HETZNER[:1], kernel.add) == []
    assert kernel.table == list(HETZNER_ONLINK)


def test_what_exists_already_is_fine() -> None:
    kernel = Kernel()
    assert add_in_passes(CHAIN, kernel.add) == []
    assert add_in_passes(CHAIN, kernel.add) == []


def test_what_cannot_be_added_is_returned_with_the_reason() -> None:
    tried: list[Route] = []

    def refuse(r: Route) -> None:
        tried.append(r)
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    failed = add_in_passes(CHAIN[:2], refuse)
    assert [(str(r), e.errno) for r, e in failed] == [
        ("10.1.0.0/24", errno.EINVAL),
        ("10.2.0.0/24 via 10.1.0.1", errno.EINVAL),
    ]
    assert len(tried) == 4


ROUTES = st.builds(
    Route,
    st.binary(min_size=4, max_size=4),
    st.integers(0, 32),
    st.lists(
        st.builds(Hop, st.integers(0, 4), st.none() | st.binary(min_size=4, max_size=4)), min_size=1, max_size=3
    ).map(tuple),
    st.integers(0, 3),
)


@given(st.lists(ROUTES, max_size=12), st.booleans())
def test_any_table_is_dealt_with(table: list[Route], v6: bool) -> None:
    h = host(*table)
    index, _ = routes.pick_interface(h, v6)
    assert index in {0, *(hop.index for r in table for hop in r.hops)} - {1}
    copied = routes.routes_to_copy(h, index, v6)
    assert {hop.index for r in copied for hop in r.hops} <= {index}
    on_link = [all(hop.gateway is None for hop in r.hops) for r in copied]
    assert on_link == sorted(on_link, reverse=True)
