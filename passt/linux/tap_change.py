"""Changes of addresses and routes of the tap in the namespace, while programs use it.

`Made` is what pasta has made there: the addresses and routes of the last plan that was carried out. Nothing else is
changed or removed: additions of the namespace's owner stay, and what the owner has removed is not made again.

    step                     IPv4                                          IPv6
    -----------------------  --------------------------------------------  -----------------------------------------
    1 a former address       gets the prefix length 32 and host scope: the  is deprecated (preferred lifetime 0): the
      stays for its flows      kernel takes it for no new connection          same effect (RFC 4862, 5.5.4)
    2 it is removed with     yes: a new address of the same subnet would   no
      its former prefix        be second to it otherwise
    3 new addresses          are added                                     likewise, without a check for duplicates
    4 addresses of others    that went with step 2, as secondary ones      are not touched
                               (net.ipv4.conf.*.promote_secondaries is
                               off), are added again
    5 routes                 those that are no longer wanted are removed, new ones are added. One that takes the place
                               of another (same destination, metric and class) replaces it without a gap

A former address is removed (`release`) when no flow has it any more. Its connections go on until then.

The interface always has an address of each family that had one: without any the kernel would flush all IPv4 routes of
the interface, those of others among them. So an address that only gets another prefix length is removed after step 3.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any

from .. import addr
from ..lean.records import dataclass, replace
from .netlink import NLM_F_CREATE, NLM_F_REPLACE, RTM_NEWADDR, RTM_NEWROUTE, Rtnetlink
from .routes import RT_SCOPE_HOST, Address, Link, NsPlan, Route, add_in_passes
from .rtnl_messages import address_message, route_message

RTM_DELADDR, RTM_DELROUTE = 21, 25
ADDRESS_BITS = 32  # prefix length of an IPv4 address alone
METRIC6 = 1024  # IP6_RT_PRIO_USER
FOREVER = 0xFFFFFFFF  # s, of lifetimes
GONE = frozenset((errno.ESRCH, errno.EADDRNOTAVAIL, errno.ENODEV, errno.ENOENT))


@dataclass(frozen=True, slots=True)
class Made:
    """All that pasta has made on the tap, and former addresses, the oldest first, that stay for their flows."""

    addresses: tuple[Address, ...] = ()
    routes: tuple[Route, ...] = ()
    former: tuple[bytes, ...] = ()


def change(nl: Rtnetlink, name: str, mac: bytes, made: Made, plan: NsPlan) -> tuple[Made, list[str]]:
    """Lead the interface, which was made as `name` with `mac`, from `made` to the addresses and routes of `plan`.

    Returns what is made now, and a line for each step that failed. Raises OSError if the tables cannot be read.
    """
    index, problems = find(nl, name, mac).index, _Problems()
    former = _change_addresses(nl, index, made, plan, problems)
    routes = tuple(map(_here, plan.routes))
    _change_routes(nl, index, made.routes, routes, problems)
    return Made(plan.addresses, routes, former), problems.lines


def made_by(plan: NsPlan) -> Made:
    """All that the set-up of the interface has made."""
    return Made(plan.addresses, tuple(map(_here, plan.routes))) if plan.configure else Made()


def release(nl: Rtnetlink, name: str, mac: bytes, made: Made, unused: Iterable[bytes]) -> Made:
    """Remove former addresses that no flow has any more. Raises OSError if the tables cannot be read."""
    index, unused = find(nl, name, mac).index, set(unused)
    own = [a for a in nl.addresses() if a.index == index and a.addr in unused & set(made.former)]
    for a in own:
        _delete(nl, index, a)
    return replace(made, former=tuple(a for a in made.former if a not in unused))


class _Problems:
    """Steps that failed, as lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, what: str, step: Any, *args: Any) -> bool:
        """Call step(*args); returns whether it did not fail."""
        try:
            step(*args)
        except FileExistsError:
            pass  # the owner of the namespace has made the same
        except OSError as e:
            self.lines.append(f"Couldn't {what} in namespace: {e.strerror}")
            return False
        return True


def find(nl: Rtnetlink, name: str, mac: bytes) -> Link:
    """The interface of that name, or, if the owner of the namespace has renamed it, with that MAC address.

    Raises OSError.
    """
    links = nl.links()
    link = next((link for link in links if link.name == name), None)
    link = link or next((link for link in links if link.mac == mac), None)
    if link is None:
        raise OSError(errno.ENODEV, f"there is no interface {name} any more")
    return link


def told_down(nl: Rtnetlink, name: str, mac: bytes) -> bool:
    """Whether the kernel has told programs that the interface, which was made so, is down. Raises OSError."""
    return not nl.link(find(nl, name, mac).index).up


def _where(a: Address) -> tuple[bytes, int, bytes | None]:
    return a.addr, a.prefix_len, a.peer


def _text(a: Address) -> str:
    return f"{addr.text(a.addr)}/{a.prefix_len}"


# Addresses ---------------------------------------------------------------------------------------------------------


def _change_addresses(nl: Rtnetlink, index: int, made: Made, plan: NsPlan, problems: _Problems) -> tuple[bytes, ...]:
    """Steps 1 to 4; returns the former addresses that stay. Raises OSError if the tables cannot be read."""
    before = [a for a in nl.addresses() if a.index == index]
    there, ours = {_where(a) for a in before}, {_where(a) for a in made.addresses}
    wanted = {_where(a): a.addr for a in plan.addresses}
    gone = [a for a in made.addresses if _where(a) not in wanted and _where(a) in there]
    kept = [a for a in gone if a.addr not in wanted.values()]
    single = [a for a in kept if a.prefix_len == ADDRESS_BITS]  # is in the way of the same address as a former one
    back = [a for a in plan.addresses if a.addr in made.former]
    for a in kept:
        if a not in single:
            _retire(nl, index, a, problems)
    for a in back:
        if a.prefix_len == ADDRESS_BITS:
            problems.note(f"take back {_text(a)}", _delete, nl, index, _former(a.addr))
    for a in plan.addresses:
        if _where(a) not in ours or a in back:
            problems.note(f"set address {_text(a)}", nl.add_address, index, a)
    for a in gone:
        if a in single or a not in kept:
            problems.note(f"remove {_text(a)}", _delete, nl, index, a)
    for a in single:
        problems.note(f"keep {_text(a)}", nl.add_address, index, _former(a.addr))
    _restore(nl, index, before, gone, problems)
    for a in back:
        if len(a.addr) == 4 and a.prefix_len != ADDRESS_BITS:
            problems.note(f"take back {_text(a)}", _delete, nl, index, _former(a.addr))
    stay = [a for a in made.former if all(a != b.addr for b in back)]
    return tuple(dict.fromkeys((*stay, *(a.addr for a in kept))))


def _former(address: bytes) -> Address:
    """An IPv4 address as it stays for its flows."""
    return Address(0, address, ADDRESS_BITS, RT_SCOPE_HOST)


def _retire(nl: Rtnetlink, index: int, a: Address, problems: _Problems) -> None:
    """Take an address out of use; its connections go on."""
    if len(a.addr) == 16:
        message = address_message(index, a)
        lifetimes = {"ifa_preferred": 0, "ifa_valid": FOREVER, "cstamp": 0, "tstamp": 0}
        message["attrs"].append(("IFA_CACHEINFO", lifetimes))
        problems.note(f"deprecate {_text(a)}", nl.do, message, RTM_NEWADDR, NLM_F_REPLACE)
        return
    if problems.note(f"keep {addr.text(a.addr)}", nl.add_address, index, _former(a.addr)):
        problems.note(f"remove {_text(a)}", _delete, nl, index, a)


def _delete(nl: Rtnetlink, index: int, a: Address) -> None:
    try:
        nl.do(address_message(index, a), RTM_DELADDR)
    except OSError as e:
        if e.errno not in GONE:
            raise


def _restore(
    nl: Rtnetlink, index: int, before: Iterable[Address], gone: Iterable[Address], problems: _Problems
) -> None:
    """Add addresses of others again that the kernel has removed together with ours."""
    removed = {_where(a) for a in gone}
    there = {_where(a) for a in nl.addresses() if a.index == index}
    for a in before:
        if len(a.addr) == 4 and _where(a) not in removed | there:
            problems.note(f"restore address {_text(a)}", nl.add_address, index, a)


# Routes ------------------------------------------------------------------------------------------------------------


def _here(route: Route) -> Route:
    """The route without the indices of the host's interfaces: all hops are through the tap."""
    return replace(route, hops=tuple(replace(hop, index=0) for hop in route.hops))


def _slot(route: Route) -> tuple[bytes, int, int, int]:
    """Two routes of one slot cannot be there at once. The kernel gives IPv6 routes a metric where they have none."""
    metric = route.metric or (METRIC6 if len(route.dst) == 16 else 0)
    return route.dst, route.prefix_len, metric, route.tos


def _change_routes(
    nl: Rtnetlink, index: int, made: tuple[Route, ...], wanted: tuple[Route, ...], problems: _Problems
) -> None:
    new = [route for route in wanted if route not in made]
    gone = [route for route in made if route not in wanted]
    there = {_slot(r) for v6 in (False, True) for r in nl.routes(v6) if all(h.index == index for h in r.hops)}
    left = {_slot(route) for route in gone} & there
    failed = add_in_passes(new, lambda route: _put(nl, index, route, replacing=_slot(route) in left))
    problems.lines += [f"Couldn't set route {route} in namespace: {e.strerror}" for route, e in failed]
    replaced = {_slot(route) for route in new} - {_slot(route) for route, _ in failed}
    for route in gone:
        if _slot(route) not in replaced:
            problems.note(f"remove route {route}", _delete_route, nl, index, route)


def _put(nl: Rtnetlink, index: int, route: Route, *, replacing: bool) -> None:
    if replacing:
        nl.do(route_message(index, route), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE)
    else:
        nl.add_route(index, route)


def _delete_route(nl: Rtnetlink, index: int, route: Route) -> None:
    message = route_message(index, route)
    message["flags"] = 0
    try:
        nl.do(message, RTM_DELROUTE)
    except OSError as e:
        if e.errno not in GONE:
            raise
