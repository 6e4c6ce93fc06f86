"""Names: which resolvers and search domains the guest is told, and where its queries go.

Pure: the options and what /etc/resolv.conf says come in, the part of a `Config` that is about names goes out. That is
done at start, and again whenever the file has changed (`follow`), by the same function.

    what                           by option        else
    -----------------------------  ---------------  ------------------------------------------------------------------
    told to the guest, by family   -D               the host's resolvers of that family, as the guest can reach them
    search domains                 -S               those of resolv.conf
    forwarded (`dns_match`)        --dns-forward    none; and in any case those of the next table that stand for others
    resolvers (`dns_hosts`)        --dns-host       the host's, of both families

    a resolver of the host                     is told as
    -----------------------------------------  ----------------------------------------------------------------------
    on its loopback; or at the address that    the address of --dns-forward, or that which maps the host's loopback:
    maps the host's loopback for the guest     the gateway, usually. Without either it is not told
    anywhere else                              itself
    there are only such of a family that the   the same two, so that the guest has something to ask at all
    guest does not have

What is forwarded stands for all of the host's resolvers, of whatever family (`policy/resolvers.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from .. import addr, log
from ..policy.config import Config, Ip4, Ip6
from .actions import DNS_MAX, SEARCH_MAX
from .options import Options
from .resolv_conf import RESOLV_CONF, ResolvConf

if TYPE_CHECKING:
    from ..flow.context import Context

Warn = Callable[[str], None]


def apply(options: Options, config: Config, found: ResolvConf) -> Config:
    """`config` with what follows for names from the options and from `found`."""
    ips: dict[bool, Ip4 | Ip6 | None] = {False: config.ip4, True: config.ip6}
    proxies = {v6: _proxy(options, ip, v6) for v6, ip in ips.items() if ip is not None}
    shown: dict[bool, tuple[bytes, ...]] = {False: (), True: ()}  # resolvers of the host, as the guest can reach them
    if not options.dns_none:
        shown |= {v6: _shown(ips[v6], proxy, _own(found.servers, v6)) for v6, proxy in proxies.items()}
        if found.servers and not any(shown.values()):
            shown |= {v6: (proxy,) for v6, proxy in proxies.items() if proxy is not None}
    given = {v6: _own(options.dns, v6) for v6 in shown}
    standing = [p for v6, p in proxies.items() if p is not None and p in shown[v6] and not given[v6]]
    forwarded = [a for a in options.dns_forward if (len(a) == 16) in proxies]
    return replace(
        config,
        ip4=replace(config.ip4, dns=given[False] or shown[False]) if config.ip4 else None,
        ip6=replace(config.ip6, dns=given[True] or shown[True]) if config.ip6 else None,
        dns_search=() if options.search_none else options.search or found.search[:SEARCH_MAX],
        dns_match=tuple(dict.fromkeys((*forwarded, *standing))),
        dns_hosts=options.dns_host or _first(found.servers),
    )


def _own(addresses: Iterable[bytes], v6: bool) -> tuple[bytes, ...]:
    return tuple(a for a in addresses if (len(a) == 16) == v6)


def _first(servers: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """As many of each family as count."""
    kept = _own(servers, False)[:DNS_MAX] + _own(servers, True)[:DNS_MAX]
    return tuple(s for s in servers if s in kept)


def _proxy(options: Options, ip: Ip4 | Ip6 | None, v6: bool) -> bytes | None:
    """The address that stands for resolvers which the guest cannot reach by their own."""
    return next(iter(_own(options.dns_forward, v6)), ip.map_host_loopback if ip else None)


def _shown(ip: Ip4 | Ip6 | None, proxy: bytes | None, servers: Iterable[bytes]) -> tuple[bytes, ...]:
    mapped = ip.map_host_loopback if ip else None
    told = (proxy if addr.is_loopback(s) or s == mapped else s for s in servers)
    return tuple(dict.fromkeys(s for s in told if s is not None))[:DNS_MAX]


def remark(options: Options, config: Config, found: ResolvConf, warn: Warn) -> None:
    """What is missing."""
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
    """Whether anything depends on resolv.conf."""
    told = bool(options.dns) or options.dns_none
    return not (options.splice_only or (told and options.dns_host and (options.search or options.search_none)))


def follow(ctx: Context, options: Options, found: ResolvConf, now: float) -> None:
    """resolv.conf says something else: from now on the guest is told so, and its queries go there.

    An address that stood for resolvers goes on to do so: the guest may have been told of it, and asks it.
    """
    former, config = ctx.config, apply(options, ctx.config, found)
    config = replace(config, dns_match=tuple(dict.fromkeys((*config.dns_match, *former.dns_match))))
    if config == former:
        return
    hosts = ", ".join(map(addr.text, config.dns_hosts))
    log.info(f"{RESOLV_CONF} has changed: resolvers {hosts}; search domains {', '.join(config.dns_search) or 'none'}")
    ctx.settings.replace(config, now)
