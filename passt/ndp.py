"""Neighbour discovery towards the guest (RFC 4861): we answer for every neighbour, and are the router.

    from the guest                  answer                                          not if
    ------------------------------  ----------------------------------------------  ----------------------
    neighbour solicitation          advertisement: the target's MAC address, ours   --no-ndp
                                      or that of a neighbour (`policy/lan.py`)
    the same from ::, a probe for   for an address of ours (`Config.ours`), to all  --no-ndp
      duplicates (RFC 4862, 5.4)      nodes; none for another: it is free, and
                                      going to be the guest's (`neighbours.py`)
    either for an address of        none: that one answers
      another machine of the link
    router solicitation             router advertisement to the sender              --no-ndp, --no-ra
    advertisements, redirects       none

    event                           sent
    ------------------------------  -----------------------------------------------------------------------
    the guest's link comes up       advertisements of our addresses to all nodes (RFC 4861, 7.2.6), and a router
                                      advertisement: the guest need not have noticed
    the guest's MAC is not known    a solicitation from our address (`flow/neighbours.py`)
    an address has another MAC      an advertisement to all nodes (RFC 4861, 7.2.6)
      than the guest was told

    timer                           value           consequence
    ------------------------------  --------------  ---------------------------------------------------
    unsolicited advertisement       200..599 s,     router advertisement to all nodes (RFC 4861,
                                    drawn each time   6.2.4), and armed again

    change of the configuration                       consequence
    ------------------------------------------------  ---------------------------------------------------
    contents of an advertisement: resolvers,          one to all nodes at once, with lifetime 0 for resolvers
      search domains, MTU, prefix                       and domains that were removed (RFC 8106, 5.1)
    another prefix                                    lifetime 0 for the former one, in each advertisement for
                                                        GONE_TIME, since a guest may have missed one. Its addresses
                                                        are deprecated: flows from them go on (RFC 4862, 5.5.4)
    another link-local address of ours                the former one is no router any more: lifetime 0
    the host has lost IPv6 (--follow)                 router lifetime 0: the guest does not try it in vain
    IPv6 turned off, or on again                      advertisements end, or begin again

A router advertisement carries the /64 of the guest's address for autoconfiguration, our MAC, the MTU, resolvers and
search list, as many of its domains as fit into one packet; all lifetimes are as long as the format allows. Its M flag
is set if our DHCPv6 server has an address to assign.

An advertisement for an address of ours, or of a host that is known, overrides an existing neighbour cache entry. One
that we send as a proxy for the network (RFC 4861, 7.2.4) does not: a neighbour that has the address itself prevails.

Left out: other tasks of a router. No redirects, no duplicate address detection for our own link-local address (the
guest is the only other node), no reachability state: the guest's MAC is that of its last frame.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .flow.ip_fields import HOPS_MASK
from .lean.records import replace
from .policy.config import Config, Ip6
from .wire import ether, ip, ndp
from .wire.cursor import Malformed
from .wire.ndp import NeighbourAdvertisement, NeighbourSolicitation, RouterAdvertisement, RouterSolicitation

RA_INTERVAL = 200, 599  # s; RFC 4861, 6.2.1: MinRtrAdvInterval and MaxRtrAdvInterval, 600 by default
ROUTER_LIFETIME = 65535  # s; RFC 8319, 4
HOP_LIMIT = 255  # of all messages of neighbour discovery, and what the guest is told to use
GONE_TIME = 7200.0  # s; RFC 4862, 5.5.3 e: a guest keeps the addresses of a prefix that was withdrawn for as long
GONE_MAX = 8  # former prefixes
PREFIX_LEN = 64  # required by SLAAC (RFC 4862, 5.5.3 d, with interface identifiers of 64 bits)


def check_source(src: bytes, options: tuple[ndp.Option, ...]) -> None:
    """A solicitation without a source has no source link-layer address either (RFC 4861, 6.1.1 and 7.1.1)."""
    if addr.is_unspecified(src) and ndp.has_link_address(options):
        raise Malformed(Drop.NDP_NO_SOURCE)


def check_destination(src: bytes, dst: bytes, target: bytes) -> None:
    """A neighbour solicitation without a source goes to the group of nodes with such a target (RFC 4861, 7.1.1)."""
    if addr.is_unspecified(src) and dst != ndp.SOLICITED_NODE + target[13:]:
        raise Malformed(Drop.NDP_PROBE)


def ignore(src: bytes, target: bytes, config: Config) -> bool:
    """Whether a neighbour solicitation from `src` for `target` gets no answer."""
    if config.no_ndp or config.ip6 is None:
        return True
    return addr.is_unspecified(src) and not config.ours(target)


def advertises(config: Config) -> bool:
    """Whether we send router advertisements, solicited and unsolicited."""
    return config.ip6 is not None and not config.no_ndp and not config.no_ra


def neighbour_advertisement(src: bytes, target: bytes, mac: bytes, *, override: bool) -> NeighbourAdvertisement:
    """Our answer to `src`: the target is reached at `mac`."""
    flags = NeighbourAdvertisement.ROUTER
    flags |= NeighbourAdvertisement.OVERRIDE if override else 0
    flags |= 0 if addr.is_unspecified(src) else NeighbourAdvertisement.SOLICITED
    return NeighbourAdvertisement(flags, target, (ndp.LinkAddress(ndp.LinkAddress.TARGET, mac),))


def prefix_of(ip6: Ip6 | None) -> bytes | None:
    """The prefix that the guest's address is in."""
    half = PREFIX_LEN // 8
    return None if ip6 is None or ip6.addr is None else ip6.addr[:half] + bytes(16 - half)


def withdrawn(ip6: Ip6) -> bool:
    """Whether the guest has no IPv6 beyond the link any more."""
    return ip6.addr is None and ip6.gateway is None


def router_advertisement(
    ip6: Ip6, config: Config, mac: bytes, former: Config | None = None, gone: Iterable[bytes] = ()
) -> RouterAdvertisement:
    """The router advertisement, the same for all receivers; the router has `mac`. DNS settings of `former` alone get
    lifetime 0, and so do the prefixes `gone`.
    """
    options: list[ndp.Option] = []
    prefix = prefix_of(ip6)
    if prefix is not None:
        options.append(ndp.Prefix(prefix, PREFIX_LEN))
    options += [ndp.Prefix(old, PREFIX_LEN, valid=0, preferred=0) for old in gone]
    options.append(ndp.LinkAddress(ndp.LinkAddress.SOURCE, mac))
    if config.mtu:
        options.append(ndp.Mtu(config.mtu))
    if config.advertise_dns and ip6.dns:
        options.append(ndp.Rdnss(ip6.dns))
    if config.advertise_dns and former is not None and former.ip6:
        removed = tuple(s for s in former.ip6.dns if s not in ip6.dns)
        options += [ndp.Rdnss(removed, 0)] if removed else []
    managed = ip6.addr is not None and not config.no_dhcpv6
    flags = RouterAdvertisement.MANAGED if managed else 0
    lifetime = 0 if withdrawn(ip6) else ROUTER_LIFETIME
    advertisement = RouterAdvertisement(HOP_LIMIT, flags, lifetime, tuple(options))
    room = (config.mtu or ip.MTU_MAX) - ip.HEADER6.size - len(advertisement.emit())
    if not config.advertise_search:
        return advertisement
    for names, validity in ((config.dns_search, ndp.INFINITE), (_no_more(former, config), 0)):
        fitting = ndp.Dnssl.leading(names, room)
        if fitting:
            options.append(ndp.Dnssl(fitting, validity))
            room -= len(options[-1].emit())
    return replace(advertisement, options=tuple(options))


def _told(ip6: Ip6, config: Config) -> tuple[bytes, RouterAdvertisement]:
    """The source and the contents of an advertisement, but for the router's MAC address, which is no setting."""
    return ip6.our_ll, router_advertisement(ip6, config, config.our_mac)


def _no_more(former: Config | None, config: Config) -> tuple[str, ...]:
    """Search domains of `former` that `config` lacks."""
    return () if former is None else tuple(name for name in former.dns_search if name not in config.dns_search)


class Ndp:
    """Answers solicitations, and advertises the router from time to time."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._lan = ctx, ctx.lan
        self._timer = -1
        self._gone: dict[bytes, float] = {}  # former prefixes, and until when they are advertised
        ctx.services.take_icmp(False, ndp.TYPES, self.tap_handler)
        ctx.services.solicit6 = self.solicit
        ctx.services.announce6 = self._announce
        ctx.services.on_link_up.append(self.announce)

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

    def tap_handler(self, src_mac: bytes, src: bytes, dst: bytes, message: memoryview, now: float, fields: int) -> None:
        """A message of neighbour discovery from the guest. Raises Malformed.

        Its hop limit shows that it comes from this link: no router has decremented it (RFC 4861, 6.1 and 7.1).
        """
        if fields & HOPS_MASK != HOP_LIMIT:
            raise Malformed(Drop.NDP_HOP_LIMIT)
        icmp = bytes(message)
        if icmp[:1] == bytes((ndp.NEIGHBOUR_SOLICITATION,)):
            self._neighbour(src_mac, src, dst, icmp)
        elif icmp[:1] == bytes((ndp.ROUTER_SOLICITATION,)):
            self._router(src_mac, src, icmp, now)

    def _neighbour(self, src_mac: bytes, src: bytes, dst: bytes, icmp: bytes) -> None:
        solicitation = NeighbourSolicitation.parse(icmp)
        target = solicitation.target
        check_source(src, solicitation.options)
        check_destination(src, dst, target)
        config = self._ctx.config
        if addr.is_unspecified(src) and not config.ours(target):
            self._ctx.neighbours.probed(target)
        if ignore(src, target, config) or self._ctx.guest.is_beside(target, src_mac):
            return
        log.debug("NDP: received NS, sending NA")
        if addr.is_unspecified(src):
            self._advertise(ether.multicast_mac(addr.ALL_NODES6), addr.ANY6, target)
        else:
            self._advertise(src_mac, src, target)

    def _advertise(self, dst_mac: bytes, to: bytes, target: bytes) -> None:
        """Tell the guest the MAC address of `target`, in an answer `to` an address, or to all nodes. A neighbour that
        is known speaks for itself, with its own address as the source.
        """
        known = self._lan.knows(target)
        override = known or self._ctx.config.ours(target)
        message = neighbour_advertisement(to, target, self._lan.tell(target), override=override).emit()
        dst = addr.ALL_NODES6 if addr.is_unspecified(to) else to
        self._send(dst_mac, dst, message, target if known else None)

    def _announce(self, a: bytes) -> None:
        """The guest was told another MAC address of `a` than it has now (RFC 4861, 7.2.6)."""
        config = self._ctx.config
        if config.ip6 is not None and not config.no_ndp:
            self._advertise(ether.multicast_mac(addr.ALL_NODES6), addr.ANY6, a)

    def _router(self, src_mac: bytes, src: bytes, icmp: bytes, now: float) -> None:
        check_source(src, RouterSolicitation.parse(icmp).options)
        if not advertises(self._ctx.config):
            return
        log.debug("NDP: received RS, sending RA")
        # The answer to a solicitation without a source goes to all nodes (RFC 4861, 6.2.6)
        self._send_ra(src_mac, addr.ALL_NODES6 if addr.is_unspecified(src) else src, now=now)

    def solicit(self, target: bytes) -> None:
        """Ask who has `target`, an address of the guest (RFC 4861, 7.2.2)."""
        config = self._ctx.config
        if config.ip6 is not None and not config.no_ndp:
            group = ndp.SOLICITED_NODE + target[13:]
            source = ndp.LinkAddress(ndp.LinkAddress.SOURCE, self._lan.tell(config.ip6.our_ll))
            self._send(ether.multicast_mac(group), group, NeighbourSolicitation(target, (source,)).emit())

    def announce(self) -> None:
        """The guest's link has come up."""
        config = self._ctx.config
        if config.ip6 is None or config.no_ndp:
            return
        for own in dict.fromkeys((config.ip6.our_ll, config.ip6.gateway)):
            if own is not None and config.ours(own):
                self._announce(own)
        if config.ip6.addr is not None and config.ip6.addr != self._ctx.guest.addr6:
            self.solicit(config.ip6.addr)
        if advertises(config):
            self._send_ra(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6)

    def _unsolicited(self, now: float) -> None:
        if not advertises(self._ctx.config):
            return
        delay = self._arm(now)
        log.debug(f"NDP: sending unsolicited RA, next in {delay}s")
        self._send_ra(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6, now=now)

    def _changed(self, former: Config, now: float) -> None:
        """Advertise a changed configuration at once. A timer that is armed stays so."""
        config = self._ctx.config
        if config.ip6 is None or not advertises(config):
            return
        last = former if advertises(former) else None
        if last is None:
            self._begin(now)
        elif last.ip6 is not None and _told(last.ip6, last) == _told(config.ip6, config):
            return
        log.debug("NDP: sending RA, the configuration has changed")
        if last is not None and last.ip6 is not None:
            self._leave_prefix(prefix_of(last.ip6), prefix_of(config.ip6), now)
            if last.ip6.our_ll != config.ip6.our_ll:
                self._resign(last.ip6.our_ll)
        self._send_ra(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6, last, now)

    def _leave_prefix(self, former: bytes | None, prefix: bytes | None, now: float) -> None:
        """The guest's prefix is another one, or the same."""
        if former is not None and former != prefix:
            if former not in self._gone and len(self._gone) >= GONE_MAX:
                del self._gone[next(iter(self._gone))]
            self._gone[former] = now + GONE_TIME
        if prefix is not None:
            self._gone.pop(prefix, None)

    def _resign(self, our_ll: bytes) -> None:
        """A former link-local address of ours is no router any more (RFC 4861, 6.2.5)."""
        message = RouterAdvertisement(HOP_LIMIT, 0, 0, ()).emit()
        self._send(ether.multicast_mac(addr.ALL_NODES6), addr.ALL_NODES6, message, our_ll)

    def _arm(self, now: float) -> int:
        """Draw the time until the next unsolicited advertisement; returns it, in seconds."""
        delay = random.randint(*RA_INTERVAL)
        self._ctx.timers.services.arm(self._timer, now + delay)
        return delay

    def _send_ra(self, dst_mac: bytes, dst: bytes, former: Config | None = None, now: float | None = None) -> None:
        ip6 = self._ctx.config.ip6
        assert ip6 is not None, "`advertises` has checked it"
        if self._gone:
            now = time.monotonic() if now is None else now
            self._gone = {prefix: until for prefix, until in self._gone.items() if until > now}
        mac = self._lan.tell(ip6.our_ll)
        self._send(dst_mac, dst, router_advertisement(ip6, self._ctx.config, mac, former, self._gone).emit())

    def _send(self, dst_mac: bytes, dst: bytes, message: bytes, source: bytes | None = None) -> None:
        """Send a message from `source`, or from our link-local address."""
        ip6 = self._ctx.config.ip6
        assert ip6 is not None, "there is no message without IPv6"
        src = source or ip6.our_ll
        self._ctx.link.send_frame(ether.icmp6_frame(dst_mac, self._lan.mac_of(src), src, dst, message))
