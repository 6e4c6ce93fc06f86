"""Policy of --follow: the guest's view when the host's addresses, routes or interfaces have changed.

Pure: the view in force, the host's tables as they are now, and the options are the input; another view, and a line for
the log, are the output. `conf/decide.py` decides anew, as at a start. Then each family of the result is taken or not:

    host has, in this family                        guest gets                                    verdict
    ----------------------------------------------  --------------------------------------------  ---------
    a default route through an interface with a     address, gateway, routes of that interface    taken
      usable address
    no default route, but the interface that is     its address; the gateway stays                taken
      the template already has an address, or
      the guest was in local mode
    nothing of this, IPv6, while IPv4 has a         no IPv6 address, no IPv6 router: programs     withdrawn
      default route                                   need not try in vain
    nothing of this, otherwise                      what it has: the host is offline, and may     stays
      come back with the same addresses

A change of the template is a change of the default route: a tunnel takes it and gives it back. A default route without
a gateway (a tunnel) leaves the guest its gateway, which is an address of ours, not of the network: DHCP needs one. If
the guest has none, it gets that of local mode.

    option             effect
    -----------------  -------------------------------------------------------------------------------------------------
    --follow off       nothing is followed: the host's tables are not watched
    --follow routes    gateways, routes and the outbound interface change, the guest's addresses stay
    --follow all       the addresses change as well: the default
    -a, -g, -n         the value stays; all else is followed
    -i, --outbound-if  no other interface is the template. One that was renamed is known by its index; while it is gone,
                         the family stays
    -D, -S             stay; otherwise the names follow resolv.conf (`conf/names.py`)
    -m                 stays: the MTU of the link is no copy of the host's

An address that was forwarded to resolvers stays so: the guest may have been given it. The rules of forwarded ports that
listen on an address which has moved are the matter of `moved`.
"""

from __future__ import annotations

from collections.abc import Iterable

from .. import addr
from ..lean.records import dataclass, replace
from ..linux import routes
from ..linux.routes import Host, Link, NsPlan
from ..log import Fatal
from ..policy.config import ALL, OFF, ROUTES, Config, Ip4, Ip6
from ..policy.rules import Rule
from . import decide, names
from .decide import Decision
from .options import Options
from .resolv_conf import ResolvConf

TAKEN, STAYS, WITHDRAWN = "taken", "stays", "withdrawn"
FAMILIES = ((False, "IPv4"), (True, "IPv6"))

Ip = Ip4 | Ip6


@dataclass(frozen=True, slots=True)
class View:
    """The guest's view, and how each family came to it."""

    decision: Decision
    verdicts: tuple[str, str] = (TAKEN, TAKEN)  # of IPv4 and IPv6

    def template(self, v6: bool) -> Link | None:
        return self.decision.template6 if v6 else self.decision.template4

    def why(self, v6: bool) -> str:
        return self.decision.why6 if v6 else self.decision.why4

    def describe(self) -> str:
        """One line: what each family has, from which interface, and why."""
        config = self.decision.config
        ips = ((config.ip4, False), (config.ip6, True))
        return "; ".join(self._family(ip, v6) for ip, v6 in ips if ip is not None)

    def _family(self, ip: Ip, v6: bool) -> str:
        family, verdict, template = FAMILIES[v6][1], self.verdicts[v6], self.template(v6)
        where = "local mode" if template is None else f"{template.name}: {self.why(v6)}"
        if verdict == WITHDRAWN:
            return f"{family} is withdrawn ({self.why(v6)})"
        has = "no address" if ip.addr is None else f"{addr.text(ip.addr)}/{ip.prefix_len}"
        via = f" via {addr.text(ip.gateway)}" if ip.gateway else ""
        stays = " stays" if verdict == STAYS else ""
        return f"{family} {has}{via}{stays} ({where if verdict == TAKEN else self.why(v6)})"


def wanted(options: Options) -> bool:
    """Whether the host's tables are watched."""
    return options.follow != OFF and not options.splice_only


def follow(
    options: Options, former: View, current: Config, host: Host, found: ResolvConf, *, have_v6: bool = True
) -> View:
    """The view that follows from the host's tables; its configuration equals `current` if nothing has changed.

    `found` are the contents of resolv.conf.
    """
    now = _with_current_names(options, former, host)
    try:
        new = decide.decide(now, host, found, have_v6=have_v6, former=current)
    except Fatal as e:
        return _stay(former, current, str(e))
    verdicts = tuple(_verdict(former, new, host, current, v6=v6) for v6, _ in FAMILIES)
    return _merge(now, former, current, new, verdicts, found)


def _stay(former: View, current: Config, why: str) -> View:
    decision = replace(former.decision, config=current, why4=why, why6=why)
    return View(decision, (STAYS, STAYS))


def _with_current_names(options: Options, former: View, host: Host) -> Options:
    """The options, with the present names of interfaces that were renamed."""
    given: dict[str, object] = {}
    template = former.template(False) or former.template(True)
    if options.interface is not None and host.named(options.interface) is None and template is not None:
        given["interface"] = _renamed(host, template, options.interface)
    pair = options.outbound_if
    for v6, field in ((False, "v4"), (True, "v6")):
        name, link = pair.get(v6), former.template(v6)
        if name and host.named(name) is None and link is not None:
            pair = pair._replace(**{field: _renamed(host, link, name)})
    if pair != options.outbound_if:
        given["outbound_if"] = pair
    return Options(**(options.__dict__ | given)) if given else options


def _renamed(host: Host, former: Link, name: str) -> str:
    link = host.link(former.index)
    return link.name if link is not None and link.mac == former.mac else name


# Each family -------------------------------------------------------------------------------------------------------


def _verdict(former: View, new: Decision, host: Host, current: Config, *, v6: bool) -> str:
    template = new.template6 if v6 else new.template4
    before = former.template(v6)
    if template is not None and (_online(host, template, v6) or before is None or before.index == template.index):
        return TAKEN
    other = new.template4 if v6 else None
    given = current.ip6 is not None and current.ip6.fixed
    if v6 and not given and before is not None and other is not None and _online(host, other, v6=False):
        return WITHDRAWN
    return TAKEN if template is None and before is None else STAYS


def _online(host: Host, template: Link, v6: bool) -> bool:
    """Whether a default route leads through the interface."""
    return routes.has_default(host, template.index, v6)


def settled(view: View, host: Host) -> tuple[set[bool], set[bool]]:
    """The families (True is IPv6) that the host is in, and those that it has lost: it is online without them, so that
    an address which is gone does not come back.
    """
    verdicts = dict(zip((v6 for v6, _ in FAMILIES), view.verdicts, strict=True))
    taken = {v6 for v6, verdict in verdicts.items() if verdict == TAKEN}
    templates = [(template, v6) for v6 in taken if (template := view.template(v6)) is not None]
    online = any(_online(host, template, v6) for template, v6 in templates)
    return taken, verdicts.keys() - taken if online else set()


def _merge(
    options: Options, former: View, current: Config, new: Decision, verdicts: tuple[str, ...], found: ResolvConf
) -> View:
    four, six = verdicts
    ip4 = _ip4(options, current.ip4, new.config.ip4, four)
    ip6 = _ip6(options, current.ip6, new.config.ip6, six)
    template4 = new.template4 if four == TAKEN else former.decision.template4
    template6 = new.template6 if six == TAKEN else former.decision.template6
    scope = template6 or template4
    config = replace(
        new.config,
        ip4=ip4,
        ip6=ip6,
        mtu=current.mtu,
        forwards=current.forwards,
        scope_id=scope.index if scope else 0,
        no_dhcp=options.no_dhcp or ip4 is None or ip4.gateway is None,
        no_dhcpv6=options.no_dhcpv6 or ip6 is None or ip6.addr is None,
    )
    config = names.apply(options, config, found)
    config = replace(config, dns_match=tuple(dict.fromkeys((*config.dns_match, *current.dns_match))))
    plan = _plan(options, former.decision.plan, new.plan, config, verdicts)
    decision = Decision(config, plan, template4, template6, new.why4, new.why6, former.decision.remarks)
    return View(decision, (four, six))


def _ip4(options: Options, current: Ip4 | None, new: Ip4 | None, verdict: str) -> Ip4 | None:
    if current is None or new is None or verdict != TAKEN:
        return current
    if new.gateway is None:
        kept = current.map_host_loopback if new.map_host_loopback is None else new.map_host_loopback
        new = replace(new, gateway=current.gateway, our_addr=current.our_addr, map_host_loopback=kept)
    if options.follow == ROUTES:
        new = replace(new, addr=current.addr, prefix_len=current.prefix_len, host_addr=_own(new, current))
    return new


def _ip6(options: Options, current: Ip6 | None, new: Ip6 | None, verdict: str) -> Ip6 | None:
    if current is None or new is None or verdict == STAYS:
        return current
    if verdict == WITHDRAWN:
        return replace(current, addr=None, gateway=None)
    if new.gateway in (None, current.gateway):
        kept = current.map_host_loopback if new.map_host_loopback is None else new.map_host_loopback
        new = replace(new, gateway=current.gateway, our_ll=current.our_ll, map_host_loopback=kept)
    if options.follow == ROUTES:
        new = replace(new, addr=current.addr, prefix_len=current.prefix_len, host_addr=_own(new, current))
    return new


def _own(new: Ip, current: Ip) -> bytes | None:
    """The host's own address, if the guest's is another one."""
    return None if new.addr == current.addr else new.addr


def _plan(
    options: Options, former: NsPlan | None, new: NsPlan | None, config: Config, verdicts: tuple[str, ...]
) -> NsPlan | None:
    """The plan of the namespace; the interface there keeps its name, MTU and MAC address."""
    if former is None or new is None:
        return None
    addresses, found = [], []
    for (v6, _), verdict, ip in zip(FAMILIES, verdicts, (config.ip4, config.ip6), strict=True):
        if ip is None or verdict == WITHDRAWN:
            continue
        source = new if verdict == TAKEN else former
        at = source if options.follow == ALL else former
        addresses += [a for a in at.addresses if (len(a.addr) == 16) == v6]
        through = [r for r in source.routes if (len(r.dst) == 16) == v6]
        if ip.gateway and not any(r.default for r in through):
            through += routes.single_routes(ip.gateway, ip.addr, ip.prefix_len)
        found += through
    return replace(former, addresses=tuple(addresses), routes=tuple(found))


# Forwarded ports ---------------------------------------------------------------------------------------------------


Homes = dict[bytes, tuple[int, bool]]  # address -> (index of its interface, whether a default route led through it)


def note_homes(rules: Iterable[Rule], homes: Homes, host: Host) -> None:
    """Keep in `homes` where the addresses are that `rules` listen on, and forget all others."""
    wanted = {rule.addr for rule in rules if rule.addr is not None}
    for gone in homes.keys() - wanted:
        del homes[gone]
    online = {h.index for v6, _ in FAMILIES for r in host.routes(v6) if r.default for h in r.hops}
    for a in host.addresses:
        if a.addr in wanted:
            homes[a.addr] = a.index, a.index in online


def moved(rules: Iterable[Rule], homes: Homes, host: Host) -> dict[Rule, Rule]:
    """Rules that listen on an address which the host has no more, and the same rules on the one that took its place:
    that of the same interface, or, if a default route led through it and it has none, that of the template now.
    """
    there = {a.addr for a in host.addresses}
    found = {}
    for rule in rules:
        if rule.addr is None or rule.addr in there or rule.addr not in homes:
            continue
        v6 = len(rule.addr) == 16
        index, was_online = homes[rule.addr]
        near = routes.pick_address(host, index, v6)
        if near is None and was_online:
            near = routes.pick_address(host, routes.pick_interface(host, v6)[0], v6)
        if near is not None:
            found[rule] = replace(rule, addr=near.addr)
    return found
