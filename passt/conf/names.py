"""DNS settings: the resolvers and search domains that the guest is given, and the destination of its queries.

Pure: the options and the contents of /etc/resolv.conf are the input, the DNS fields of a `Config` are the output. The
same function runs at start and after each change of the file (`follow`).

    setting                        option           default
    -----------------------------  ---------------  ------------------------------------------------------------------
    given to the guest, by family  -D               the host's resolvers of that family, as the guest can reach them
    search domains                 -S               those of resolv.conf
    forwarded (`dns_match`)        --dns-forward    none. In any case, the replacement addresses of the next table
    resolvers (`dns_hosts`)        --dns-host       the host's, of both families

    resolver of the host                       address given to the guest
    -----------------------------------------  ----------------------------------------------------------------------
    on the host's loopback; or at the address  the address of --dns-forward, or the one that maps the host's loopback:
    that maps it for the guest                 the gateway, usually. Without either, the guest is not given it
    any other                                  its own
    a link-local one of another link of the    the same replacement: on the guest's link another host may have that
    host (fe80::1%eth1)                        address
    all are of a family that the guest lacks   the same replacement, so that the guest has a resolver

A forwarded address stands for all of the host's resolvers, of both families (`policy/resolvers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from typing import TYPE_CHECKING

from .. import addr, log
from ..lean.records import replace
from ..policy.config import Config, Ip4, Ip6
from .actions import DNS_MAX, SEARCH_MAX
from .options import Options
from .resolv_conf import RESOLV_CONF, ResolvConf

if TYPE_CHECKING:
    from ..flow.context import Context

Warn = Callable[[str], None]


def apply(options: Options, config: Config, found: ResolvConf) -> Config:
    """`config` with the DNS settings that follow from the options and from `found`."""
    ips: dict[bool, Ip4 | Ip6 | None] = {False: config.ip4, True: config.ip6}
    scopes = _scopes(config, found.zones)
    far = {a for a, index in scopes.items() if index != config.scope_id}
    proxies = {v6: _proxy(options, ip, v6) for v6, ip in ips.items() if ip is not None}
    shown: dict[bool, tuple[bytes, ...]] = {False: (), True: ()}  # resolvers of the host, as the guest can reach them
    if not options.dns_none:
        shown |= {v6: _shown(ips[v6], proxy, _own(found.servers, v6), far) for v6, proxy in proxies.items()}
        if found.servers and not any(shown.values()):
            shown |= {v6: (proxy,) for v6, proxy in proxies.items() if proxy is not None}
    given = {v6: _own(options.dns, v6)[:DNS_MAX] for v6 in shown}
    standing = [p for v6, p in proxies.items() if p is not None and p in shown[v6] and not given[v6]]
    forwarded = [a for a in options.dns_forward if (len(a) == 16) in proxies]
    return replace(
        config,
        ip4=replace(config.ip4, dns=given[False] or shown[False]) if config.ip4 else None,
        ip6=replace(config.ip6, dns=given[True] or shown[True]) if config.ip6 else None,
        dns_search=() if options.search_none else options.search or found.search[:SEARCH_MAX],
        dns_match=tuple(dict.fromkeys((*forwarded, *standing))),
        dns_hosts=options.dns_host or _first(found.servers),
        dns_scopes=tuple((_scopes(config, options.dns_zones) if options.dns_host else scopes).items()),
    )


def _scopes(config: Config, zones: Iterable[tuple[bytes, str]]) -> dict[bytes, int]:
    """Link-local resolvers and the indices of their interfaces; those of interfaces that are not there are left out."""
    indices = dict(config.interfaces)
    found = ((a, int(zone) if zone.isdecimal() else indices.get(zone, 0)) for a, zone in zones)
    return {a: index for a, index in found if index}


def _own(addresses: Iterable[bytes], v6: bool) -> tuple[bytes, ...]:
    return tuple(a for a in addresses if (len(a) == 16) == v6)


def _first(servers: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """The first DNS_MAX servers of each family, in their order."""
    kept = _own(servers, False)[:DNS_MAX] + _own(servers, True)[:DNS_MAX]
    return tuple(s for s in servers if s in kept)


def _proxy(options: Options, ip: Ip4 | Ip6 | None, v6: bool) -> bytes | None:
    """The replacement address for resolvers that the guest cannot reach directly."""
    return next(iter(_own(options.dns_forward, v6)), ip.map_host_loopback if ip else None)


def _shown(
    ip: Ip4 | Ip6 | None, proxy: bytes | None, servers: Iterable[bytes], far: Container[bytes]
) -> tuple[bytes, ...]:
    mapped = ip.map_host_loopback if ip else None
    told = (proxy if addr.is_loopback(s) or s == mapped or s in far else s for s in servers)
    return tuple(dict.fromkeys(s for s in told if s is not None))[:DNS_MAX]


def remark(options: Options, config: Config, found: ResolvConf, warn: Warn, info: Warn) -> None:
    """Warn about missing resolvers, and tell of those that are too many."""
    for v6 in (False, True):
        if extra := _own(options.dns, v6)[DNS_MAX:]:
            info(f"No use for resolvers after the first {DNS_MAX} of a family: {', '.join(map(addr.text, extra))}")
    if options.dns_forward and not config.dns_hosts:
        asked = ", ".join(map(addr.text, options.dns_forward))
        warn(f"Nothing to forward queries to {asked} to: no nameserver known (give --dns-host)")
    if not any(ip.dns for ip in (config.ip4, config.ip6) if ip) and not options.dns_none:
        why = ""
        if found.servers:
            listed = ", ".join(map(addr.text, found.servers))
            why = f": {listed} cannot be reached from the guest (give --dns-forward, or leave out --no-map-gw)"
        warn("Couldn't get any nameserver address" + why)
    if not options.dhcp_dns or options.dns_none:
        return
    if config.ip4 and not config.no_dhcp and not config.ip4.dns:
        warn("No IPv4 nameserver available for DHCP")
    advertised = not (config.no_ndp or config.no_ra)
    if config.ip6 and (advertised or not config.no_dhcpv6) and not config.ip6.dns:
        warn("No IPv6 nameserver available for NDP/DHCPv6")


# Changes -----------------------------------------------------------------------------------------------------------


def follows(options: Options) -> bool:
    """Whether any setting depends on resolv.conf."""
    told = bool(options.dns) or options.dns_none
    return not (options.splice_only or (told and options.dns_host and (options.search or options.search_none)))


def follow(ctx: Context, options: Options, found: ResolvConf, now: float) -> None:
    """Apply changed contents of resolv.conf: DHCP and NDP announce them, and queries go to the new resolvers.

    An address that was forwarded stays forwarded: the guest may have been given it, and may go on to query it.
    """
    former, config = ctx.config, apply(options, ctx.config, found)
    config = replace(config, dns_match=tuple(dict.fromkeys((*config.dns_match, *former.dns_match))))
    if config == former:
        return
    hosts = ", ".join(map(addr.text, config.dns_hosts))
    log.info(f"{RESOLV_CONF} has changed: resolvers {hosts}; search domains {', '.join(config.dns_search) or 'none'}")
    ctx.settings.replace(config, now)
