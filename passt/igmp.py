"""Multicast membership of the guest: IGMPv1, v2, v3 and MLDv1, v2, as the querier of its link (RFC 3376, RFC 3810).

The host joins the guest's groups on its template interface, or on that of --outbound-if4/6 (`udp_engine/groups.py`), so
that datagrams to the group reach both. The guest's kernel filters once more, by what its programs want.

    from the guest                         consequence
    -------------------------------------  -----------------------------------------------------------------------------
    report of IGMPv1, v2 or MLDv1          the group is followed, from any source
    v3: exclude, whatever the list         the same: lists of excluded sources are not followed (RFC 5790, 4)
    v3: include, allow, with sources       the group is followed from these sources (RFC 4607); from any source if they
                                             are more than SOURCES_MAX
    v3: include without sources, block     left at once, if no other host on the link is in the group
      of the last source
    leave of IGMPv2, done of MLDv1         the same; a query asks for others, which did not report because this one had
    query                                  ignored: we stay the querier, whatever address the other has

Hosts are told apart by MAC address, and each has its own membership: no host cuts another one off (RFC 3376, A.2), and
a group is left without waiting for answers (the last member query time of RFC 3376, 8.8 and 8.9, is 0).

Not followed, since nothing is sent there that a host on the link lacks: groups of the link's own protocols, which end
here (all nodes, all routers, solicited nodes, IGMP, MLD, DHCPv6), and groups within an interface (ff01::/16).

A message comes from this link: TTL or hop limit is 1, and MLD has a link-local source, or none (RFC 3810, 5.1.14 and
5.2.13). Router Alert is not demanded, as it only makes a router look.

    timer                       value      consequence
    --------------------------  ---------  ----------------------------------------------------------------------------
    startup query               20 ms      after the guest's link has come up: a general query, as the guest may have
                                             joined before. One (RFC 3376, 8.7): the link does not lose it
    query interval              125 s      while there are members: general queries (8.2)
    again                       2 s        after a join that was one too many in a second: a general query
    membership interval         260 s      the membership of a host ends: 2 * 125 + 10 (8.4), as seen at the next query

    bound                       value      consequence
    --------------------------  ---------  ----------------------------------------------------------------------------
    GROUPS_MAX                  64         no further group, counted; the guest's kernel reports again when asked
    HOSTS_MAX                   16         no further host in a group, counted
    JOINS_PER_SECOND            16         reports that would change what the host joins are dropped, counted: the host
                                             tells its own network of each; leaves are bounded by these

Left out: groups of other protocols than UDP (a raw socket would be needed), routing between links.
"""

from __future__ import annotations

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .flow.ip_fields import HOPS_MASK
from .lean.records import dataclass, field
from .linux.multicast import Sources
from .loop.each import each, record
from .udp_engine.groups import Groups, way
from .wire import ether, igmp
from .wire.cursor import Malformed
from .wire.igmp import Query, Record, Report, Single
from .wire.ndp import SOLICITED_NODE

ROBUSTNESS = 2  # RFC 3376, 8.1
QUERY_INTERVAL = 125  # s; below 128 the code is the value (RFC 3376, 4.1.7)
QUERY_RESPONSE = 10  # s; the longest time until a host answers a general query
STARTUP_RESPONSE = LAST_MEMBER_RESPONSE = 1  # s; there is one host, or a few
MEMBERSHIP_INTERVAL = ROBUSTNESS * QUERY_INTERVAL + QUERY_RESPONSE

GROUPS_MAX = 64
HOSTS_MAX = 16
SOURCES_MAX = 10  # net.ipv4.igmp_max_msf
JOINS_PER_SECOND = 16
AGAIN = 2.0  # s

ALL_SYSTEMS4 = addr.packed("224.0.0.1")
_OWN4 = frozenset(addr.packed(a) for a in ("224.0.0.1", "224.0.0.2", "224.0.0.22"))
_OWN6 = frozenset(addr.packed(a) for a in ("ff02::1", "ff02::2", "ff02::16", "ff02::1:2"))

_INCLUDES = frozenset((igmp.IS_INCLUDE, igmp.TO_INCLUDE, igmp.ALLOW))
_EXCLUDES = frozenset((igmp.IS_EXCLUDE, igmp.TO_EXCLUDE))


def followed(group: bytes) -> bool:
    """Whether the host joins `group` when the guest does."""
    if not addr.is_multicast(group):
        return False
    if len(group) == 4:
        return group not in _OWN4
    return group[1] & 0xF > 1 and group not in _OWN6 and not group.startswith(SOLICITED_NODE)


@dataclass(slots=True)
class Member:
    """A host's membership in a group."""

    any_until: float = 0.0  # the host wants all sources, up to this time
    until: dict[bytes, float] = field(default_factory=dict)  # it wants this source

    def apply(self, report: Record, now: float) -> None:
        """The host has reported this (RFC 3376, 6.4, without its timers for the answers of other hosts)."""
        end, kind = now + MEMBERSHIP_INTERVAL, report.kind
        if kind in _EXCLUDES:
            self.any_until = end
            self.until.clear()
        elif kind == igmp.BLOCK:
            for source in report.sources:
                self.until.pop(source, None)
        elif kind in _INCLUDES:
            if kind != igmp.ALLOW:
                self.any_until = 0.0
            if kind == igmp.TO_INCLUDE:
                self.until.clear()
            if not self.any_until:
                self.until.update(dict.fromkeys(report.sources, end))
        if len(self.until) > SOURCES_MAX:
            self.any_until = end
            self.until.clear()

    def expire(self, now: float) -> None:
        """Forget what has not been reported for too long."""
        self.any_until = self.any_until if self.any_until > now else 0.0
        self.until = {source: end for source, end in self.until.items() if end > now}

    @property
    def gone(self) -> bool:
        return not self.any_until and not self.until


Members = dict[bytes, Member]  # by MAC address


def wanted(members: Members) -> Sources:
    """The sources that hosts of a group want together."""
    if any(member.any_until for member in members.values()):
        return None
    sources = frozenset(source for member in members.values() for source in member.until)
    return sources if len(sources) <= SOURCES_MAX else None


class Igmp:
    """Follows reports, and asks for them."""

    def __init__(self, ctx: Context, groups: Groups) -> None:
        self._ctx = ctx
        self._followed = groups
        self._members: dict[bytes, Members] = {}  # by group
        self._following: dict[bytes, Sources] = {}  # what `groups` has been told
        self._timer = ctx.timers.services.new(self._fired)
        self._refused = False  # a join, for which hosts are asked again soon
        self._second, self._left = 0.0, JOINS_PER_SECOND
        ctx.services.take_protocol(True, igmp.PROTO_IGMP, self.tap_handler)
        ctx.services.take_icmp(False, igmp.MLD_TYPES, self.tap_handler)
        ctx.services.on_link_up.append(self.link_up)
        ctx.services.on_forget.append(self.forget)

    # Reports ---------------------------------------------------------------------------------------------------------

    def tap_handler(self, src_mac: bytes, src: bytes, dst: bytes, message: memoryview, now: float, fields: int) -> None:
        """A message of the guest, from its type on. Raises Malformed."""
        if fields & HOPS_MASK != igmp.HOPS:
            raise Malformed(Drop.MEMBERSHIP_HOPS)
        if len(src) == 16 and any(src) and not addr.is_link_local(src):
            raise Malformed(Drop.MEMBERSHIP_SOURCE)
        parsed = igmp.parse(bytes(message), len(src))
        if not self._on(src):
            self._ctx.drops[Drop.MULTICAST_DISABLED] += 1
        elif isinstance(parsed, Report):
            each(parsed.records, self._record, self._fault_at, src_mac, now)
        elif isinstance(parsed, Single):
            self._single(parsed, src_mac, now)

    def _on(self, like: bytes) -> bool:
        """Whether groups of a family are followed."""
        config = self._ctx.config
        family_on = (config.ip4 if len(like) == 4 else config.ip6) is not None
        return family_on and not config.no_multicast and not config.no_udp and way(config, like).interface > 0

    def _single(self, message: Single, mac: bytes, now: float) -> None:
        if message.kind not in igmp.LEAVES:
            self._record(Record(igmp.IS_EXCLUDE, message.group), mac, now)
            return
        self._record(Record(igmp.TO_INCLUDE, message.group), mac, now)
        if followed(message.group) and message.group not in self._members and self._allowed(now):
            self._send(message.group, message.group, LAST_MEMBER_RESPONSE)

    def _record(self, report: Record, mac: bytes, now: float) -> None:
        """One group of a report."""
        group, drops = report.group, self._ctx.drops
        if not followed(group):
            return
        members = self._members.get(group, {})
        former = members.get(mac)
        member = Member() if former is None else Member(former.any_until, dict(former.until))
        member.apply(report, now)
        if member.gone:
            if former is not None:
                del members[mac]
                self._follow(group, now)
            return
        if not members and len(self._members) >= GROUPS_MAX:
            drops[Drop.GROUPS_TOO_MANY] += 1
            log.warn_ratelimited("groups", f"The guest joins more than {GROUPS_MAX} multicast groups", now)
            return
        if former is None and len(members) >= HOSTS_MAX:
            drops[Drop.GROUP_HOSTS_TOO_MANY] += 1
            return
        after = {**members, mac: member}
        if wanted(after) != self._following.get(group, ()) and not self._allowed(now):
            drops[Drop.GROUP_JOINS_TOO_FAST] += 1
            if not self._refused:
                self._refused = True
                self._arm(now + AGAIN)
            return
        if not self._members and not self._refused:
            self._arm(now + QUERY_INTERVAL)
        self._members[group] = after
        self._follow(group, now)

    def _allowed(self, now: float) -> bool:
        """Whether another change may be told to the host's network in this second."""
        if now - self._second >= 1:
            self._second, self._left = now, JOINS_PER_SECOND
        self._left -= 1
        return self._left >= 0

    def _follow(self, group: bytes, now: float) -> None:
        """Let the host join what the hosts of a group want together, again if that could not be had."""
        if not self._members[group]:
            del self._members[group]
            self._following.pop(group, None)
            self._followed.leave(group)
            return
        self._following[group] = sources = wanted(self._members[group])
        self._followed.follow(group, sources, now)

    def _fault_at(self, what: object, e: Exception) -> None:
        record(self._ctx.drops, "a multicast membership", e)

    def forget(self) -> None:
        """The guest is gone, and its memberships with it."""
        self._members.clear()
        self._following.clear()
        self._followed.leave_all()

    # Queries ---------------------------------------------------------------------------------------------------------

    def link_up(self) -> None:
        """The guest's link has come up."""
        self._query(STARTUP_RESPONSE)

    def _query(self, response: int) -> None:
        """Ask for all memberships."""
        for group, to in ((addr.ANY4, ALL_SYSTEMS4), (addr.ANY6, addr.ALL_NODES6)):
            if self._on(group):
                self._send(group, to, response)

    def _send(self, group: bytes, to: bytes, response: int) -> None:
        """Send a query to `to`, with `response` seconds for the answer."""
        config = self._ctx.config
        assert config.ip4 is not None or config.ip6 is not None, "`_on` has checked it"
        v4 = len(group) == 4
        src = (config.ip4.our_addr if v4 and config.ip4 else config.ip6.our_ll if config.ip6 else None) or addr.ANY4
        query = Query(group, response * (10 if v4 else 1000), ROBUSTNESS, QUERY_INTERVAL).emit()
        ethertype = ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6
        header = ether.HEADER.pack(ether.multicast_mac(to), self._ctx.lan.mac_of(src), ethertype)
        self._ctx.link.send_frame(header + igmp.packet(src, to, query))

    def _arm(self, deadline: float) -> None:
        self._ctx.timers.services.arm(self._timer, deadline)

    def _fired(self, now: float) -> None:
        """Forget memberships that ended, and ask for all, as long as there are any."""
        each(list(self._members), self._expire, self._fault_at, now)
        again, self._refused = self._refused, False
        if self._members or again:
            self._query(LAST_MEMBER_RESPONSE if again else QUERY_RESPONSE)
            self._arm(now + QUERY_INTERVAL)

    def _expire(self, group: bytes, now: float) -> None:
        members = self._members[group]
        for member in members.values():
            member.expire(now)
        self._members[group] = {mac: member for mac, member in members.items() if not member.gone}
        self._follow(group, now)
