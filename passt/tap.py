"""The way in: frames of the guest, read in batches, classified, grouped by flow, handed on.

    back end -> pool -> Ethernet -> ARP ...                 -> service that took the EtherType (arp)
                                    IPv4, IPv6 -> ICMP      -> service that took the type (icmp, ndp)
                                                  UDP       -> service that took the port (dhcp, dhcpv6), or
                                                  UDP, TCP  -> by flow, in order of arrival -> udp, tcp
                                                  others    -> service that took the IP protocol

Services register themselves (`flow/services.py`): a new one is its own module and a line in `daemon/wiring.py`.

Only this module writes what was observed of the guest (`ctx.guest`).

Length fields. A packet ends where its IP header says, at most where the frame ends (frames may be padded). Every
header is inside the packet before it is read. Each check that fails drops the packet, and counts its reason:

    where       check                                              counter
    ----------  -------------------------------------------------  ---------------------------------
    frame       at least an Ethernet header                        truncated
                at most 65535 bytes of packet                      oversized frame
                an EtherType that is IP, or that a service takes   ethertype
    IPv4        version and header length, total length            ipv4 header, ipv4 length
    IPv6        version, payload length, extension headers         ipv6 header, ipv6 length, IPv6 ...
    fragments   see link/reassembly.py                             fragment: ...
    TCP         20 bytes of header in the packet                   tcp truncated
                data offset                                        tcp header length
    UDP         8 bytes of header, length field in the packet      udp truncated, udp length
    ICMP        8 bytes                                            icmp truncated
    family off  IPv4 or IPv6 is disabled                           ipv4 disabled, ipv6 disabled
    addresses   loopback, or IPv4 mapped into IPv6: looked at      tcp endpoint, udp: martian address,
                when a flow begins, since later ones have its key  icmp: martian address
    others      no handler for it (IGMP, MLD, SCTP ...)            ip protocol, icmp type
    services    what each demands of its messages                  ndp hop limit ... (their modules)

Checksums of the guest are not verified: they are partial (the offload), or came through memory that does not flip bits.
A fault in a handler costs the frame, and ends the TCP connection or UDP flow that it was about; it is counted as
"fault" and logged.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .flow.services import PortHandler, Taken
from .link.backend import Receiver
from .link.packet import FRAME_ROOM
from .link.reassembly import LENGTH_MAX, Reassembly
from .loop.each import each, record
from .policy.config import Config
from .tcp import Tcp
from .udp import Udp
from .wire import ip
from .wire.checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP
from .wire.cursor import Malformed
from .wire.ether import HEADER_LEN, TYPE_IPV4, TYPE_IPV6
from .wire.virtio import NO_OFFLOAD, VNET, VNET_LEN

_ETH_IP4 = Struct("!HBBHHHBB")  # from the EtherType: type, version and length, TOS, total, id, fragment, TTL, protocol
_ETH_IP4_UNPACK = _ETH_IP4.unpack_from
_IP6 = Struct("!IHBB")  # version and flow label, payload length, next header, hop limit
_UDP = Struct("!HHH")  # ports, length
_TYPE = Struct("!H")
Groups = dict[bytes, list[int]]


class Tap(Receiver):
    """Dispatches frames to what services took, and to UDP and TCP."""

    def __init__(self, ctx: Context, *, udp: Udp, tcp: Tcp) -> None:
        self._ctx = ctx
        self._link = ctx.link
        self._vnet = ctx.link.reads_vnet  # fixed for each back end
        self._pool, self._guest = ctx.pool, ctx.guest
        self._services = ctx.services
        self._ports4, self._ports6 = ctx.services.ports4, ctx.services.ports6
        self._udp, self._tcp = udp, tcp
        self._behind: frozenset[bytes] = frozenset()
        ctx.settings.subscribe(self._adopt)
        self._reassembly = Reassembly(ctx.drops)
        self._stats = ctx.stats
        self._tcp_groups: Groups = {}
        self._udp_groups: Groups = {}
        self._udp_hops: dict[bytes, int] = {}  # TTL or hop limit of the first datagram of a group

    def _adopt(self, config: Config) -> None:
        """Hosts behind the guest are those that rules lead to: what they answer does not tell where the guest is.

        They stay that while they have flows: connections outlive the rule that they came by.
        """
        self._have4, self._have6 = config.ip4 is not None, config.ip6 is not None
        behind = frozenset(rule.target for rule in config.forwards if rule.target is not None and not rule.outbound)
        if gone := self._behind - behind:
            keys = [flow.key for flow in self._ctx.flows.by_index if flow is not None]
            behind |= {a for a in gone if any(len(key) == 2 * len(a) + 4 and key.startswith(a) for key in keys)}
        self._behind = behind

    # A batch -------------------------------------------------------------------------------------------------------

    def received(self, frames: list[int], octets: int, now: float) -> None:
        """Count and handle a batch, a flat list of (start, end) in the pool, with `octets` bytes of Ethernet."""
        stats = self._stats
        stats.frames_from_guest += len(frames) >> 1
        stats.bytes_from_guest += octets
        self.batch(frames, now)

    def batch(self, frames: list[int], now: float) -> None:
        """Classify frames, a flat list of (start, end), and hand groups of one flow to their protocol."""
        if frames[1] - frames[0] >= VNET_LEN + HEADER_LEN:
            mac = self._pool.mv[frames[0] + VNET_LEN + 6 : frames[0] + VNET_LEN + 12]
            if mac != self._guest.mac:
                self._new_mac(mac.tobytes())
        capture = self._link.capture
        for i in range(0, len(frames), 2):
            if capture is not None:
                header = frames[i] + VNET_LEN
                before = self._pool.copy(frames[i], header) if self._vnet else NO_OFFLOAD
                capture(False, before + self._pool.copy(header, max(header, frames[i + 1])))
            try:
                self._frame(frames[i], frames[i + 1], now)
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
            except Exception as e:
                self._fault("a frame", e, now)
        if self._tcp_groups:
            groups, self._tcp_groups = self._tcp_groups, {}
            for key, segments in groups.items():
                try:
                    self._tcp.tap_handler(key, segments, now)
                except Exception as e:
                    self._fault("TCP segments", e, now)
                    self._tcp.fault_key(key)
        if self._udp_groups:
            self._hand_over_udp(now)

    def _hand_over_udp(self, now: float) -> None:
        """Hand the datagrams that were classified so far to their flows."""
        groups, self._udp_groups = self._udp_groups, {}
        hops, self._udp_hops = self._udp_hops, {}
        for key, datagrams in groups.items():
            try:
                self._udp.tap_handler(key, datagrams, now, hops[key])
            except Exception as e:
                self._fault("UDP datagrams", e, now)
                self._udp.fault_key(key)

    def _fault(self, what: str, e: Exception, now: float) -> None:
        """A handler failed on `what`: a defect of ours, which must not become one of the whole guest."""
        self._ctx.drops[Drop.FAULT] += 1
        log.warn_ratelimited(f"fault {what}", f"Handling {what} failed: {e!r}", now, 1.0)

    # One frame ---------------------------------------------------------------------------------------------------

    def _frame(self, start: int, end: int, now: float) -> None:
        """Classify one frame; TCP and UDP are added to the groups, everything else is handled.

        Longer than most on purpose: it runs for every frame, and a call for each header would double its price.
        """
        pool = self._pool
        if end - start >= FRAME_ROOM:
            raise Malformed(Drop.OVERSIZED_FRAME)
        l3 = start + VNET_LEN + HEADER_LEN
        if end - l3 < 20:
            self._short(start, end)
            return
        # Inside the frame, as was just checked: this one look is made without the accessor.
        ethertype, vihl, _, total, ident, fragment, hops, proto = _ETH_IP4_UNPACK(pool.buf, l3 - 2)
        if ethertype == TYPE_IPV4:
            if not self._have4:
                raise Malformed(Drop.IPV4_DISABLED)
            if l3 + total > end or total < 20:
                raise Malformed(Drop.IPV4_LENGTH)
            end = l3 + total
            l4 = l3 + 20
            if vihl != 0x45:
                l4 = l3 + (vihl & 0xF) * 4
                if vihl >> 4 != 4 or l4 < l3 + 20 or l4 > end:
                    raise Malformed(Drop.IPV4_HEADER)
            addresses = l3 + 12, l3 + 20
            if fragment & ip.FRAGMENT_MASK:
                self._fragment4(addresses, proto, ident, fragment, l4, end, now)
                return
        elif ethertype == TYPE_IPV6:
            if not self._have6:
                raise Malformed(Drop.IPV6_DISABLED)
            version, length, proto, hops = pool.unpack(_IP6, l3, end)
            l4 = l3 + 40
            if version >> 28 != 6:
                raise Malformed(Drop.IPV6_HEADER)
            if l4 + length > end:
                raise Malformed(Drop.IPV6_LENGTH)
            end = l4 + length
            addresses = l3 + 8, l4
            if proto != PROTO_TCP and proto != PROTO_UDP and proto != PROTO_ICMPV6:
                proto, l4 = ip.skip_extensions(pool.buf, l4, end, proto)
                if proto == ip.FRAGMENT:
                    self._fragment6(addresses, l4, end, now)
                    return
        else:
            handler = self._services.ethertypes.get(ethertype)
            if handler is None:
                raise Malformed(Drop.ETHERTYPE)
            handler(pool.copy(l3 - 8, l3 - 2), pool.copy(l3, end), now)
            return
        if proto == PROTO_TCP:
            if end - l4 < 20:
                raise Malformed(Drop.TCP_TRUNCATED)
            key = self._key(addresses, l4)
            group = self._tcp_groups.get(key)
            if group is None:
                self._tcp_groups[key] = [l4, end]
            else:
                group.append(l4)
                group.append(end)
        elif proto == PROTO_UDP:
            self._udp_datagram(start, addresses, hops, l4, end, now)
        else:
            self._message(start, addresses, proto, hops, l4, end, now)

    def _key(self, addresses: tuple[int, int], l4: int) -> bytes:
        """The flow's key: addresses and ports as they stand in the packet, one slice where they are neighbours."""
        mv, (a, b) = self._pool.mv, addresses
        key = mv[a : b + 4].tobytes() if b == l4 else mv[a:b].tobytes() + mv[l4 : l4 + 4].tobytes()
        if b - a == 8:
            if key[:4] != self._guest.addr4:
                self._seen(key[:4])
        elif key[:16] != self._guest.addr6 and key[:16] != self._guest.addr6_ll:
            self._seen(key[:16])
        return key

    def _udp_datagram(self, start: int, addresses: tuple[int, int], hops: int, l4: int, end: int, now: float) -> None:
        """Group a datagram, or a super-frame of them, by flow; services take theirs."""
        pool = self._pool
        if end - l4 < 8:
            raise Malformed(Drop.UDP_TRUNCATED)
        sport, dport, length = pool.unpack(_UDP, l4, end)
        if length < 8 or l4 + length > end:
            raise Malformed(Drop.UDP_LENGTH)
        end = l4 + length
        ports = self._ports4 if addresses[1] - addresses[0] == 8 else self._ports6
        if dport in ports:
            self._to_port(ports[dport], start, addresses, sport, l4 + 8, end, now)
            return
        key = self._key(addresses, l4)
        gso_size = pool.unpack(VNET, start, end)[3] if self._vnet else 0
        group = self._udp_groups.get(key)
        if group is None:
            self._udp_groups[key] = [l4 + 8, end, gso_size]
            self._udp_hops[key] = hops
        else:
            group += (l4 + 8, end, gso_size)

    def _to_port(
        self, handler: PortHandler, start: int, addresses: tuple[int, int], sport: int, data: int, end: int, now: float
    ) -> None:
        """A datagram to a port that a service took."""
        src, dst = self._addresses(addresses)
        known = handler(self._mac(start), src, dst, sport, self._pool.copy(data, end), now)
        if known is not None:
            self._seen(known)

    def _message(
        self, start: int, addresses: tuple[int, int], proto: int, hops: int, l4: int, end: int, now: float
    ) -> None:
        """ICMP, or another protocol that a service took."""
        v4 = addresses[1] - addresses[0] == 8
        taken = self._taken(proto, l4, end, v4)
        if taken is None:
            raise Malformed(Drop.ICMP_TYPE if proto == (PROTO_ICMP if v4 else PROTO_ICMPV6) else Drop.IP_PROTOCOL)
        self._hand_over(taken, start, addresses, hops, l4, end, now)

    def _taken(self, proto: int, l4: int, end: int, v4: bool) -> Taken | None:
        """The service that took a message, if one did. Raises Malformed."""
        services = self._services
        if proto != (PROTO_ICMP if v4 else PROTO_ICMPV6):
            return (services.protocols4 if v4 else services.protocols6).get(proto)
        if end - l4 < 8:
            raise Malformed(Drop.ICMP_TRUNCATED)
        return (services.icmp4 if v4 else services.icmp6).get(self._pool.buf[l4])

    def _hand_over(
        self, taken: Taken, start: int, addresses: tuple[int, int], hops: int, l4: int, end: int, now: float
    ) -> None:
        """Its sender is taken for the guest's address when the service has found no fault with the message."""
        src, dst = self._addresses(addresses)
        taken.handler(self._mac(start), src, dst, self._pool.view(l4, end), now, hops)
        self._seen(src)

    def _mac(self, start: int) -> bytes:
        """The sender of a frame."""
        return self._pool.copy(start + VNET_LEN + 6, start + VNET_LEN + 12)

    def _short(self, start: int, end: int) -> None:
        """Frames of less than 20 bytes after the Ethernet header hold nothing that we know."""
        at = start + VNET_LEN + 12
        ethertype = self._pool.unpack(_TYPE, at, end)[0]
        raise Malformed({TYPE_IPV4: Drop.IPV4_LENGTH, TYPE_IPV6: Drop.IPV6_LENGTH}.get(ethertype, Drop.TRUNCATED))

    # Fragments ---------------------------------------------------------------------------------------------------

    def _fragment4(
        self, addresses: tuple[int, int], proto: int, ident: int, fragment: int, l4: int, end: int, now: float
    ) -> None:
        """An IPv4 fragment (RFC 791, 3.2)."""
        key = self._pool.copy(*addresses) + bytes((proto,)) + ident.to_bytes(2, "big")
        more = bool(fragment & ip.MF)
        offset, payload = (fragment & 0x1FFF) * 8, self._pool.view(l4, end)
        whole = self._reassembly.add(key, offset, more, payload, now, LENGTH_MAX - ip.HEADER4.size)
        if whole is not None:
            self._reassembled(addresses, proto, whole, now)

    def _fragment6(self, addresses: tuple[int, int], l4: int, end: int, now: float) -> None:
        """An IPv6 fragment: `l4` is where its fragment header stands (RFC 8200, 4.5)."""
        pool = self._pool
        proto, where = pool.buf[l4], int.from_bytes(pool.view(l4 + 2, l4 + 4), "big")
        key = pool.copy(*addresses) + bytes((proto,)) + pool.copy(l4 + 4, l4 + 8)
        whole = self._reassembly.add(key, where & 0xFFF8, bool(where & 1), pool.view(l4 + 8, end), now)
        if whole is not None:
            self._reassembled(addresses, proto, whole, now)

    def _reassembled(self, addresses: tuple[int, int], proto: int, whole: bytes, now: float) -> None:
        """Put a reassembled packet into the room behind the batch, in the shape of a frame, and handle it at once.

        The Ethernet header is that of the last fragment to come.
        """
        pool = self._pool
        a, b = addresses
        src_dst = pool.copy(a, b)
        ether_at = a - (12 if b - a == 8 else 8) - HEADER_LEN
        start = pool.size - FRAME_ROOM
        l3 = start + VNET_LEN + HEADER_LEN
        pool.buf[start:l3] = bytes(VNET_LEN) + pool.copy(ether_at, ether_at + HEADER_LEN)
        l4 = l3 + 40
        end = l4 + len(whole)
        pool.buf[l4 - len(src_dst) : l4] = src_dst
        pool.buf[l4:end] = whole
        addresses = l4 - len(src_dst), l4
        if proto == PROTO_UDP:
            self._hand_over_udp(now)  # what came before it
            self._udp_datagram(start, addresses, 0, l4, end, now)
            self._hand_over_udp(now)  # before its room is used again
            return
        taken = self._taken(proto, l4, end, b - a == 8)
        if taken is None or not taken.fragments:
            raise Malformed(Drop.FRAGMENT_PROTOCOL)
        self._hand_over(taken, start, addresses, 0, l4, end, now)

    # Observed addresses of the guest -----------------------------------------------------------------------------

    def _addresses(self, addresses: tuple[int, int]) -> tuple[bytes, bytes]:
        """(source, destination), packed."""
        both = self._pool.copy(*addresses)
        n = len(both) // 2
        return both[:n], both[n:]

    def _seen(self, src: bytes) -> None:
        """Remember the source address of the guest."""
        guest = self._guest
        if addr.is_martian(src) or not addr.is_unicast(src) or src in self._behind:
            return
        if len(src) == 4:
            guest.addr4 = src
        elif addr.is_link_local(src):
            guest.addr6_ll = src
        else:
            guest.addr6 = src

    def forget(self) -> None:
        """Another guest comes: end the flows of this one, and know nothing of its fragments and addresses."""
        each(self._services.on_forget, _forget, self._fault_of_service)
        self._reassembly = Reassembly(self._ctx.drops)
        self._adopt(self._ctx.config)  # hosts behind that guest had flows, perhaps
        ip4, ip6 = self._ctx.config.ip4, self._ctx.config.ip6
        guest = self._guest
        guest.mac, guest.addr6_ll = addr.BROADCAST_MAC, addr.ANY6
        guest.addr4 = ip4.addr if ip4 else addr.ANY4
        guest.addr6 = ip6.addr if ip6 and ip6.addr else addr.ANY6

    def _new_mac(self, mac: bytes) -> None:
        """The guest sends from another address: frames to it go there from now on."""
        log.debug(f"Guest MAC address: {addr.mac_text(mac)}")
        self._guest.mac = mac
        each(self._services.on_mac, _tell_mac, self._fault_of_service, mac)

    def _fault_of_service(self, callback: object, e: Exception) -> None:
        """It failed to follow the guest: the others do."""
        record(self._ctx.drops, "a change of the guest", e)


def _forget(callback: Callable[[], None]) -> None:
    callback()


def _tell_mac(callback: Callable[[bytes], None], mac: bytes) -> None:
    callback(mac)
