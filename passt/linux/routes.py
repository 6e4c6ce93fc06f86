"""Routes, addresses and links as plain values, and all decisions about them: pure functions, no socket.

The tables of hosts vary widely (a /32 with an on-link gateway, equal-cost paths, next-hop objects, tunnels without
addresses, several defaults, none). So no function here fails: each uses the entries that it can use and ignores the
rest, and the caller logs one line about ignored entries.

    template interface   that of the best default route of a family, else that of its first route beyond link-local
    addresses            all of it, except those of link scope (the namespace has its own), duplicates that another host
                         has (RFC 4862, 5.4.5), and deprecated ones (5.5.4), unless there are no others
    main address         what DHCP and DHCPv6 give: one that lasts, since it is not changed later. In this order: not
                         deprecated, not tentative (duplicate address detection goes on, for a second or two), not
                         temporary (RFC 8981: it is replaced after a day; RFC 6724 prefers it for clients, rule 7, and
                         those are the host's own sockets here), with the longest prefix, the first one
    routes               unicast, main table, through that interface; hops through other interfaces are left out
    default routes       of the main table; without one, of the tables that rules name (ip-rule(8)), in the order of
                         the rules: those without a selector come first, those for forwarded packets (`iif`) not at all
    metrics              of routes, as they are: MTU, advertised MSS, windows, hop limit

Routes are sorted so that each gateway is reachable when its route is added: on-link routes first. Lifetimes and
preferred sources are not copied: they belong to the host's link.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .. import addr
from ..lean.records import dataclass, replace

RT_SCOPE_UNIVERSE = 0
RT_SCOPE_LINK = 253
RT_SCOPE_HOST = 254
RTPROT_BOOT = 3
COPY_LIMIT = 4096  # a namespace does not need a full Internet table
METRICS = frozenset(  # numbers among the metrics of a route
    f"RTAX_{name}"
    for name in (
        "LOCK", "MTU", "WINDOW", "RTT", "RTTVAR", "SSTHRESH", "CWND", "ADVMSS", "REORDERING", "HOPLIMIT", "INITCWND",
        "FEATURES", "RTO_MIN", "INITRWND", "QUICKACK",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface."""

    index: int
    name: str
    mac: bytes  # 6 bytes; empty where the link has none (tunnels)
    mtu: int
    loopback: bool = False
    altnames: tuple[str, ...] = ()  # ip-link(8), `property add altname`
    up: bool = True  # it is up, and has a carrier


@dataclass(frozen=True, slots=True)
class Address:
    """An address of an interface; `peer` is the far end of a point-to-point link."""

    index: int
    addr: bytes
    prefix_len: int
    scope: int = RT_SCOPE_UNIVERSE
    peer: bytes | None = None
    deprecated: bool = False
    tentative: bool = False
    temporary: bool = False
    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Hop:
    """A next hop of a route. A gateway of the other family (RFC 5549) has the other length."""

    index: int
    gateway: bytes | None = None
    weight: int = 1
    onlink: bool = False  # the gateway is on the link although no prefix says so


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route; the family is that of `dst`."""

    dst: bytes
    prefix_len: int
    hops: tuple[Hop, ...]
    metric: int = 0
    scope: int = RT_SCOPE_UNIVERSE
    proto: int = RTPROT_BOOT
    tos: int = 0
    metrics: tuple[tuple[str, int], ...] = ()  # RTAX_MTU, RTAX_ADVMSS ...: numbers by the kernel's names

    @property
    def default(self) -> bool:
        return self.prefix_len == 0

    def __str__(self) -> str:
        hops = " ".join(f"via {addr.text(h.gateway)}" for h in self.hops if h.gateway)
        return f"{'default' if self.default else f'{addr.text(self.dst)}/{self.prefix_len}'} {hops}".rstrip()


@dataclass(frozen=True, slots=True)
class RoutingRule:
    """A rule that names a table to look up (ip-rule(8))."""

    priority: int
    table: int
    selects: bool = False  # by source, mark, user ...: not for all packets


@dataclass(frozen=True, slots=True)
class Host:
    """The host's configuration, read by netlink at start, and after changes."""

    links: tuple[Link, ...] = ()
    addresses: tuple[Address, ...] = ()
    routes4: tuple[Route, ...] = ()
    routes6: tuple[Route, ...] = ()

    def link(self, index: int) -> Link | None:
        return next((link for link in self.links if link.index == index), None)

    def named(self, name: str) -> Link | None:
        """The interface of that name or alternative name: the kernel lets no two have the same."""
        return next((link for link in self.links if link.name == name or name in link.altnames), None)

    @property
    def indices(self) -> dict[str, int]:
        """Indices of interfaces, by name and alternative names."""
        return {name: link.index for link in self.links for name in (link.name, *link.altnames)}

    @property
    def altnames(self) -> dict[str, str]:
        """Alternative names of interfaces, and the name of each."""
        return {alt: link.name for link in self.links for alt in link.altnames}

    def routes(self, v6: bool) -> tuple[Route, ...]:
        return self.routes6 if v6 else self.routes4


@dataclass(frozen=True, slots=True)
class NsPlan:
    """The configuration of the tap in the namespace."""

    ifname: str
    mac: bytes | None = None  # None: the kernel's random address
    mtu: int = 0  # 0: not set
    txqlen: int = 1000
    configure: bool = False  # whether addresses and routes are set
    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()


def policy_defaults(rules: Iterable[RoutingRule], tables: dict[int, list[Route]]) -> tuple[Route, ...]:
    """The default routes of the `tables` that `rules` name, in the order in which they would be found."""
    order = dict.fromkeys(r.table for r in sorted(rules, key=lambda r: (r.selects, r.priority)))
    return tuple(route for table in order for route in tables.get(table, ()) if route.default)


# Choosing ----------------------------------------------------------------------------------------------------------


def pick_interface(host: Host, v6: bool) -> tuple[int, str]:
    """Index of the template interface of a family (0: none), and the reason.

    The default route with the lowest metric decides, the first of equals; else the first route beyond link-local.
    """
    loopback = {link.index for link in host.links if link.loopback}
    usable = [r for r in host.routes(v6) if _first_index(r, loopback)]
    defaults = [r for r in usable if r.default]
    if defaults:
        best = min(defaults, key=lambda r: r.metric)
        index = _first_index(best, loopback)
        others = {_first_index(r, loopback): r.metric for r in reversed(defaults)}
        return index, f"the default route{_among(host, index, best.metric, others)}"
    usable = [r for r in usable if not addr.is_link_local(r.dst) and not addr.is_multicast(r.dst)]
    if usable:
        indices = list(dict.fromkeys(_first_index(r, loopback) for r in usable))
        rest = ", ".join(_name(host, i) for i in indices[1:])
        return indices[0], f"the first route of several interfaces, none of them default ({rest})" if rest else (
            "the only interface with a route, which is no default one"
        )
    return 0, "no interface has a usable route"


def _among(host: Host, index: int, metric: int, metrics: dict[int, int]) -> str:
    """The difference of the default route through `index` from those through other interfaces."""
    others = ", ".join(f"{_name(host, i)} has {m}" for i, m in sorted(metrics.items()) if i != index)
    if not others:
        return ""
    if metric in (m for i, m in metrics.items() if i != index):
        return f", the first of several with metric {metric} ({others})"
    return f" with the lowest metric, {metric} ({others})"


def _first_index(route: Route, loopback: set[int]) -> int:
    return next((h.index for h in route.hops if h.index and h.index not in loopback), 0)


def _name(host: Host, index: int) -> str:
    link = host.link(index)
    return link.name if link else f"interface {index}"


def pick_address(host: Host, index: int, v6: bool) -> Address | None:
    """The main address of interface `index`."""
    return max(_usable(host, index, v6), key=_lasting, default=None)


def _usable(host: Host, index: int, v6: bool) -> list[Address]:
    """The addresses of interface `index` beyond the link."""
    own = [a for a in host.addresses if a.index == index and (len(a.addr) == 16) == v6]
    return [a for a in own if a.scope < RT_SCOPE_LINK and not a.duplicate]


def _lasting(address: Address) -> tuple[bool, bool, bool, int]:
    return not address.deprecated, not address.tentative, not address.temporary, address.prefix_len


def pick_link_local(host: Host, index: int) -> bytes | None:
    """The IPv6 link-local address of interface `index`."""
    candidates = (a.addr for a in host.addresses if a.index == index and len(a.addr) == 16 and not a.duplicate)
    return next((a for a in candidates if addr.is_link_local(a)), None)


def pick_gateway(host: Host, index: int, v6: bool) -> bytes | None:
    """Gateway of the default route through `index`; of several paths that with the highest weight, first of equals.

    An IPv4 route through an IPv6 gateway has none that DHCP could send.
    """
    through = [r for r in host.routes(v6) if r.default and any(h.index == index for h in r.hops)]
    for route in sorted(through, key=lambda r: r.metric):
        hops = [h for h in route.hops if h.index == index and h.gateway and (len(h.gateway) == 16) == v6]
        if hops:
            return max(hops, key=lambda h: h.weight).gateway
    return None


def has_default(host: Host, index: int, v6: bool) -> bool:
    """Whether a default route leads through interface `index`, with a gateway or without one."""
    return any(h.index == index for r in host.routes(v6) if r.default for h in r.hops)


# Copying -----------------------------------------------------------------------------------------------------------


def addresses_to_copy(host: Host, index: int, v6: bool) -> tuple[Address, ...]:
    """All addresses of the template interface that are copied to the namespace."""
    usable = _usable(host, index, v6)
    return tuple(a for a in usable if not a.deprecated) or tuple(usable)


def routes_to_copy(host: Host, index: int, v6: bool) -> tuple[Route, ...]:
    """The routes through the template interface, each once, in the order in which they can be added."""
    unique: dict[tuple[object, ...], Route] = {}
    for route in host.routes(v6):
        hops = tuple(h for h in route.hops if h.index == index)
        if hops:
            unique.setdefault((route.dst, route.prefix_len, route.metric, route.tos, hops), replace(route, hops=hops))
    return tuple(sorted(unique.values(), key=_dependence))


def cut(found: tuple[Route, ...]) -> tuple[Route, ...]:
    """At most COPY_LIMIT of `found`, in their order: the widest ones, so that the default routes are among them."""
    kept = set(sorted(range(len(found)), key=lambda i: found[i].prefix_len)[:COPY_LIMIT])
    return tuple(route for i, route in enumerate(found) if i in kept)


def unresolved(host: Host, v6: bool) -> int:
    """Number of routes without an interface: next-hop objects that the kernel does not expand."""
    return sum(not any(h.index for h in r.hops) for r in host.routes(v6))


def _dependence(route: Route) -> tuple[bool, int]:
    """On-link routes first, then more specific ones: a gateway may itself be reached by a route via another."""
    return any(h.gateway for h in route.hops), -route.prefix_len


def single_routes(gateway: bytes, address: bytes | None, prefix_len: int) -> tuple[Route, ...]:
    """The default route via `gateway`, which is declared to be on the link where the prefix does not contain it."""
    any_ = bytes(len(gateway))
    near = addr.is_link_local(gateway) if len(gateway) == 16 else False
    onlink = not near and not (address and addr.in_subnet(gateway, address, prefix_len))
    return (Route(any_, 0, (Hop(0, gateway, onlink=onlink),)),)


def add_in_passes(routes: Iterable[Route], add: Callable[[Route], None]) -> list[tuple[Route, OSError]]:
    """add(route) for all, repeating failed ones until a pass makes no progress; returns failed ones with their errors.

    A route that still fails is tried once more with its gateways declared on-link: so a gateway outside every prefix
    was reachable on the host.
    """
    pending = list(routes)
    while True:
        failed = _one_pass(pending, add)
        if not failed or len(failed) == len(pending):
            break
        pending = [route for route, _ in failed]
    onlink = [replace(r, hops=tuple(replace(h, onlink=h.gateway is not None) for h in r.hops)) for r, _ in failed]
    return _one_pass(onlink, add)


def _one_pass(routes: Sequence[Route], add: Callable[[Route], None]) -> list[tuple[Route, OSError]]:
    failed = []
    for route in routes:
        try:
            add(route)
        except FileExistsError:
            continue  # the kernel has added it together with an address
        except OSError as e:
            failed.append((route, e))
    return failed
