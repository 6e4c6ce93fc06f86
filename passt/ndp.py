"""Neighbour discovery towards the guest (RFC 4861): our MAC address answers for every neighbour; we are the router.

    from the guest                  answer                                          not if
    ------------------------------  ----------------------------------------------  ----------------------
    neighbour solicitation          advertisement: our MAC, whatever the target     --no-ndp
    the same from ::, a probe for   for an address of ours (`Config.ours`), to all  --no-ndp
      duplicates (RFC 4862, 5.4)      nodes; none for another: it is free
    router solicitation             router advertisement to the sender              --no-ndp, --no-ra
    advertisements, redirects       none

    timer                           value           consequence
    ------------------------------  --------------  ---------------------------------------------------
    unsolicited advertisement       200..599 s,     router advertisement to all nodes (RFC 4861,
                                    drawn each time   6.2.4), and armed again

    change of the configuration                       consequence
    ------------------------------------------------  ---------------------------------------------------
    contents of an advertisement: resolvers,          one to all nodes at once, with lifetime 0 for resolvers
      search domains, MTU, prefix                       and domains that were removed (RFC 8106, 5.1)
    IPv6 turned off, or on again                      advertisements end, or begin again

A router advertisement carries the /64 of the guest's address for autoconfiguration, our MAC, the MTU, resolvers and
search list, as many of its domains as fit into one packet; all lifetimes are as long as the format allows. Its M flag
is set if our DHCPv6 server has an address to assign.

An advertisement for an address of ours overrides an existing neighbour cache entry. One that we send as a proxy for
the network (RFC 4861, 7.2.4) does not: a neighbour that has the address itself prevails.

Left out: other tasks of a router. No redirects, no duplicate address detection for our own link-local address (the
guest is the only other node), no reachability state: the guest's MAC is that of its last frame.
"""

from __future__ import annotations

import random
from dataclasses import replace

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .policy.config import MTU_MAX, Config, Ip6
from .wire import ether, ip, ndp
from .wire.cursor import Malformed
from .wire.ndp import NeighbourAdvertisement, NeighbourSolicitation, RouterAdvertisement, RouterSolicitation

RA_INTERVAL = 200, 599  # s; RFC 4861, 6.2.1: MinRtrAdvInterval and MaxRtrAdvInterval, 600 by default
ROUTER_LIFETIME = 65535  # s; RFC 8319, 4
HOP_LIMIT = 255  # of all messages of neighbour discovery, and what the guest is told to use
SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")  # and the last 3 bytes of an address (RFC 4291, 2.7.1)
PREFIX_LEN = 64  # required by SLAAC (RFC 4862, 5.5.3 d, with interface identifiers of 64 bits)


def check_source(src: bytes, options: tuple[ndp.Option, ...]) -> None:
    """A solicitation without a source has no source link-layer address either (RFC 4861, 6.1.1 and 7.1.1)."""
    if addr.is_unspecified(src) and ndp.has_link_address(options):
        raise Malformed(Drop.NDP_NO_SOURCE)


def check_destination(src: bytes, dst: bytes, target: bytes) -> None:
    """A neighbour solicitation without a source goes to the group of nodes with such a target (RFC 4861, 7.1.1)."""
    if addr.is_unspecified(src) and dst != SOLICITED_NODE + target[13:]:
        raise Malformed(Drop.NDP_PROBE)


def ignore(src: bytes, target: bytes, config: Config) -> bool:
    """Whether a neighbour solicitation from `src` for `target` gets no answer."""
    if config.no_ndp or config.ip6 is None:
        return True
    return addr.is_unspecified(src) and not config.ours(target)


def advertises(config: Config) -> bool:
    """Whether we send router advertisements, solicited and unsolicited."""
    return config.ip6 is not None and not config.no_ndp and not config.no_ra


def neighbour_advertisement(src: bytes, target: bytes, config: Config) -> NeighbourAdvertisement:
    """Our answer to `src`: the target is reached at our MAC."""
    flags = NeighbourAdvertisement.ROUTER
    flags |= NeighbourAdvertisement.OVERRIDE if config.ours(target) else 0
    flags |= 0 if addr.is_unspecified(src) else NeighbourAdvertisement.SOLICITED
    return NeighbourAdvertisement(flags, target, (ndp.LinkAddress(ndp.LinkAddress.TARGET, config.our_mac),))


def router_advertisement(ip6: Ip6, config: Config, former: Config | None = None) -> RouterAdvertisement:
    """The router advertisement, the same for all receivers. DNS settings of `former` alone get lifetime 0."""
    options: list[ndp.Option] = []
    if ip6.addr is not None:
        half = PREFIX_LEN // 8
        options.append(ndp.Prefix(ip6.addr[:half] + bytes(16 - half), PREFIX_LEN))
    options.append(ndp.LinkAddress(ndp.LinkAddress.SOURCE, config.our_mac))
    if config.mtu:
        options.append(ndp.Mtu(config.mtu))
    if config.advertise_dns and ip6.dns:
        options.append(ndp.Rdnss(ip6.dns))
    if config.advertise_dns and former is not None and former.ip6:
        gone = tuple(s for s in former.ip6.dns if s not in ip6.dns)
        options += [ndp.Rdnss(gone, 0)] if gone else []
    managed = ip6.addr is not None and not config.no_dhcpv6
    flags = RouterAdvertisement.MANAGED if managed else 0
    advertisement = RouterAdvertisement(HOP_LIMIT, flags, ROUTER_LIFETIME, tuple(options))
    room = (config.mtu or MTU_MAX) - ip.HEADER6.size - len(advertisement.emit())
    if not config.advertise_search:
        return advertisement
    for names, lifetime in ((config.dns_search, ndp.INFINITE), (_no_more(former, config), 0)):
        fitting = ndp.Dnssl.leading(names, room)
        if fitting:
            options.append(ndp.Dnssl(fitting, lifetime))
            room -= len(options[-1].emit())
    return replace(advertisement, options=tuple(options))


def _no_more(former: Config | None, config: Config) -> tuple[str, ...]:
    """Search domains of `former` that `config` lacks."""
    return () if former is None else tuple(name for name in former.dns_search if name not in config.dns_search)


class Ndp:
    """Answers solicitations, and advertises the router from time to time."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._timer = -1
        ctx.services.take_icmp(False, ndp.TYPES, self.tap_handler)

    def start(self, now: float) -> None:
        """Start unsolicited router advertisements, for as long as the configuration has them. Raises OSError."""
        self._begin(now)
        self._ctx.settings.react(self._changed)

    def _begin(self, now: float) -> None:
        """Arm the timer, if it is needed. Raises OSError."""
        if advertises(self._ctx.config):
            if self._timer < 0:
                self._timer = self._ctx.timers.services.new(self._unsolicited)
            self._arm(now)

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, message: memoryview, now: float, hops: int
    ) -> None:
        """A message of neighbour discovery from the guest. Raises Malformed.

        Its hop limit shows that it comes from this link: no router has decremented it (RFC 4861, 6.1 and 7.1).
        """
        if hops != HOP_LIMIT:
            raise Malformed(Drop.NDP_HOP_LIMIT)
        icmp = bytes(message)
        if icmp[:1] == bytes((ndp.NEIGHBOUR_SOLICITATION,)):
            self._neighbour(src_mac, src, dst, icmp)
        elif icmp[:1] == bytes((ndp.ROUTER_SOLICITATION,)):
            self._router(src_mac, src, icmp)

    def _neighbour(self, src_mac: bytes, src: bytes, dst: bytes, icmp: bytes) -> None:
        solicitation = NeighbourSolicitation.parse(icmp)
        target = solicitation.target
        check_source(src, solicitation.options)
        check_destination(src, dst, target)
        config = self._ctx.config
        if ignore(src, target, config):
            return
        log.debug("NDP: received NS, sending NA")
        answer = neighbour_advertisement(src, target, config).emit()
        if addr.is_unspecified(src):
            self._send(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6, answer)
        else:
            self._send(src_mac, src, answer)

    def _router(self, src_mac: bytes, src: bytes, icmp: bytes) -> None:
        check_source(src, RouterSolicitation.parse(icmp).options)
        if not advertises(self._ctx.config):
            return
        log.debug("NDP: received RS, sending RA")
        # The answer to a solicitation without a source goes to all nodes (RFC 4861, 6.2.6)
        self._send_ra(src_mac, addr.ALL_NODES6 if addr.is_unspecified(src) else src)

    def _unsolicited(self, now: float) -> None:
        if not advertises(self._ctx.config):
            return
        delay = self._arm(now)
        log.debug(f"NDP: sending unsolicited RA, next in {delay}s")
        self._send_ra(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6)

    def _changed(self, former: Config, now: float) -> None:
        """Advertise a changed configuration at once. A timer that is armed stays so."""
        config = self._ctx.config
        if config.ip6 is None or not advertises(config):
            return
        last = former if advertises(former) else None
        if last is None:
            self._begin(now)
        elif last.ip6 is not None and router_advertisement(last.ip6, last) == router_advertisement(config.ip6, config):
            return
        log.debug("NDP: sending RA, the configuration has changed")
        self._send_ra(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6, last)

    def _arm(self, now: float) -> int:
        """Draw the time until the next unsolicited advertisement; returns it, in seconds."""
        delay = random.randint(*RA_INTERVAL)
        self._ctx.timers.services.arm(self._timer, now + delay)
        return delay

    def _send_ra(self, dst_mac: bytes, dst: bytes, former: Config | None = None) -> None:
        ip6 = self._ctx.config.ip6
        assert ip6 is not None, "`advertises` has checked it"
        self._send(dst_mac, dst, router_advertisement(ip6, self._ctx.config, former).emit())

    def _send(self, dst_mac: bytes, dst: bytes, message: bytes) -> None:
        config = self._ctx.config
        assert config.ip6 is not None, "there is no message without IPv6"
        self._ctx.link.send_frame(ether.icmp6_frame(dst_mac, config.our_mac, config.ip6.our_ll, dst, message))
