"""The way in: frames of the guest, read in batches, classified, grouped by flow, handed on.

    back end -> pool -> Ethernet, priority tag -> ARP ...   -> service that took the EtherType (arp)
                                    IPv4, IPv6 -> ICMP      -> service that took the type (icmp, ndp)
                                                  UDP       -> service that took the port (dhcp, dhcpv6), or
                                                  UDP, TCP  -> by flow, in order of arrival -> udp, tcp
                                                  others    -> service that took the IP protocol

Services register themselves (`flow/services.py`): a new one is its own module and a line in `daemon/wiring.py`.

The guest's addresses are learned from packets that were found to be sound (`flow/neighbours.py`). Frames come from one
MAC address until one comes from another: what was grouped is handed on before, so that each IP address is learned with
its own.

A priority tag (IEEE 802.1Q, VLAN 0) is passed over; answers have none. Frames of a VLAN are not for this link.

Length fields. A packet ends where its IP header says, at most where the frame ends (frames may be padded). Every
header is inside the packet before it is read. Each check that fails drops the packet, and counts its reason:

    where       check                                              counter
    ----------  -------------------------------------------------  ---------------------------------
    frame       at least an Ethernet header                        truncated
                at most 65535 bytes of packet                      oversized frame
                a tag has VLAN 0, and there is one                 vlan
                an EtherType that is IP, or that a service takes   ethertype
    IPv4        version and header length, total length            ipv4 header, ipv4 length
    IPv6        version, payload length, extension headers         ipv6 header, ipv6 length, IPv6 ...
    fragments   see link/reassembly.py                             fragment: ...
    TCP         20 bytes of header in the packet                   tcp truncated
                data offset                                        tcp header length
    UDP         8 bytes of header, length field in the packet      udp truncated, udp length
                at most DATAGRAMS_MAX datagrams in a super-frame   udp: too many datagrams in a frame
    ICMP        8 bytes                                            icmp truncated
    family off  IPv4 or IPv6 is disabled                           ipv4 disabled, ipv6 disabled
    addresses   loopback, or IPv4 mapped into IPv6: looked at      tcp endpoint, udp: martian address,
                when a flow begins, since later ones have its key  icmp: martian address
    others      no handler for it (SCTP ...)                       ip protocol, icmp type
    services    what each demands of its messages                  ndp hop limit ... (their modules)

    checksums   see link/verify.py                                 ipv4, tcp, udp, icmp checksum

A fault in a handler costs the frame, and ends the TCP connection or UDP flow that it was about; it is counted as
"fault" and logged.
"""

from __future__ import annotations

from operator import call
from struct import Struct
from typing import Final

from . import log
from .drops import Drop
from .flow.batch import Batch
from .flow.context import Context
from .flow.ip_fields import DF, DF_PAYLOAD_MAX4, DF_PAYLOAD_MAX6, HOPS_MASK
from .flow.services import PortHandler, Taken
from .link import fragments
from .link.backend import Receiver
from .link.packet import ETH_IP4_UNPACK, FRAME_ROOM
from .link.reassembly import Reassembly
from .link.verify import VERIFIED
from .loop.each import each, record
from .policy.config import Config
from .tcp import Tcp
from .udp import Udp
from .wire import ip
from .wire.checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_TCP, PROTO_UDP
from .wire.cursor import Malformed
from .wire.ether import HEADER_LEN, TYPE_IPV4, TYPE_IPV6
from .wire.virtio import NO_OFFLOAD, VNET, VNET_LEN

_IP6: Final = Struct("!IHBB")  # version and flow label, payload length, next header, hop limit
_UDP: Final = Struct("!HHH")  # ports, length
_TYPE: Final = Struct("!H")
_TAGS: Final = (0x8100, 0x88A8)  # IEEE 802.1Q: customer and service VLAN tags
_TAG_LEN: Final = 4
_VLAN_MASK: Final = 0xFFF
DATAGRAMS_MAX: Final = 128  # UDP_MAX_SEGMENTS of Linux since 6.9: 64 KiB in datagrams of a byte would cost 65,000 sends


class Tap(Receiver):
    """Dispatches frames to what services took, and to UDP and TCP."""

    def __init__(self, ctx: Context, *, udp: Udp, tcp: Tcp) -> None:
        self._ctx = ctx
        self._link = ctx.link
        self._vnet = ctx.link.reads_vnet  # fixed for each back end
        self._pool, self._guest, self._neighbours = ctx.pool, ctx.guest, ctx.neighbours
        self._by_group = not self._vnet  # how checksums are verified
        self._verifier = ctx.link.verifier(ctx.pool)
        self._sender = ctx.guest.mac  # of the frames that are being handled
        self._source = b""  # address of the last packet from it that was learned
        self._services = ctx.services
        self._ports4, self._ports6 = ctx.services.ports4, ctx.services.ports6
        self._udp, self.tcp = udp, tcp
        self._batch = Batch(ctx.pool, ctx.services, ctx.classes, vnet=self._vnet)
        ctx.settings.subscribe(self._adopt)
        self._reassembly = Reassembly(ctx.drops)
        self._stats = ctx.stats
        self._classes = ctx.classes
        self._changed_classes: list[bytes] = []

    def _adopt(self, config: Config) -> None:
        self._have4, self._have6 = config.ip4 is not None, config.ip6 is not None
        self._sent_by(self._sender)

    # A batch -------------------------------------------------------------------------------------------------------

    def received(self, frames: list[int], octets: int, now: float) -> None:
        """Count and handle a batch, a flat list of (start, end) in the pool, with `octets` bytes of Ethernet."""
        stats = self._stats
        stats.frames_from_guest += len(frames) >> 1
        stats.bytes_from_guest += octets
        self._ctx.reactor.moved += octets
        self.batch(frames, now)

    def batch(self, frames: list[int], now: float) -> None:
        """Classify frames, a flat list of (start, end), and hand groups of one flow to their protocol."""
        capture, batch = self._link.capture, self._batch
        for i in range(0, len(frames), 2):
            if capture is not None:
                header = frames[i] + VNET_LEN
                before = self._pool.copy(frames[i], header) if self._vnet else NO_OFFLOAD
                capture(False, before + self._pool.copy(header, max(header, frames[i + 1])))
            try:
                if not batch.plain(frames[i], frames[i + 1]):
                    self._frame(frames[i], frames[i + 1], now)
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
            except Exception as e:
                self._fault("a frame", e, now)
        self._flush(now)

    def _flush(self, now: float) -> None:
        """Hand over what was classified so far."""
        if self._batch.tcp:
            self._hand_over_tcp(now, self._by_group)
        if self._batch.udp:
            self._hand_over_udp(now, self._by_group)

    def _hand_over_tcp(self, now: float, verify: bool) -> None:
        """Hand the segments that were classified so far to their connections."""
        groups, hops = self._batch.take_tcp()
        changed, self._changed_classes = self._changed_classes, []
        if changed:
            each(changed, self.tcp.set_class, self._fault_of_class)
        for key, segments in groups.items():
            try:
                if verify and not (segments := self._verifier.segments(key, segments)):
                    continue
                if (source := key[: len(key) // 2 - 2]) != self._source:
                    self._seen(source)
                self.tcp.tap_handler(key, segments, now, hops[key])
            except Exception as e:
                self._fault("TCP segments", e, now)
                self.tcp.fault_key(key)
        if changed:
            each(changed, self.tcp.forget_class, self._fault_of_class)

    def _hand_over_udp(self, now: float, verify: bool) -> None:
        """Hand the datagrams that were classified so far to their flows."""
        groups, fields = self._batch.take_udp()
        for key, datagrams in groups.items():
            try:
                sound = self._verifier.datagrams(key, datagrams) if verify else datagrams
                if not sound:
                    continue
                if (source := key[: len(key) // 2 - 2]) != self._source:
                    self._seen(source)
                self._udp.tap_handler(key, sound, now, fields[key])
            except Exception as e:
                self._fault("UDP datagrams", e, now)
                self._udp.fault_key(key)

    def _fault(self, what: str, e: Exception, now: float) -> None:
        """A handler failed on `what`: a defect of ours, which must not become one of the whole guest."""
        self._ctx.drops[Drop.FAULT] += 1
        log.warn_ratelimited(f"fault {what}", f"Handling {what} failed: {e!r}", now, 1.0)

    # One frame ---------------------------------------------------------------------------------------------------

    def _frame(self, start: int, end: int, now: float, tag: int = 0) -> None:
        """Classify one frame that is not plain; TCP and UDP are added to the groups, everything else is handled.

        Longer than most on purpose: a call for each header would double its price.
        """
        pool = self._pool
        if end - start >= FRAME_ROOM:
            raise Malformed(Drop.OVERSIZED_FRAME)
        l3 = start + VNET_LEN + HEADER_LEN + tag
        if end - l3 < 20:
            self._short(l3, end)
            return
        # Inside the frame, as was just checked: this one look is made without the accessor.
        mac, ethertype, vihl, tos, total, ident, fragment, hops, proto = ETH_IP4_UNPACK(pool.buf, l3 - 8)
        if mac != self._sender and not tag:
            self._other_sender(mac, now)
        check = self._vnet and not pool.buf[start] & VERIFIED  # now; groups are verified when they are handed over
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
                check = check or self._by_group  # groups have no options
            addresses = l3 + 12, l3 + 20
            if check:
                self._verifier.header(l3, l4)
            if fragment & ip.FRAGMENT_MASK:
                if self._by_group and not check:
                    self._verifier.header(l3, l4)
                whole = fragments.ipv4(self._reassembly, pool, addresses, proto, ident, fragment, l4, end, now)
                if whole is not None:
                    self._reassembled(addresses, proto, hops | tos << 8, whole, now)
                return
        elif ethertype == TYPE_IPV6:
            if not self._have6:
                raise Malformed(Drop.IPV6_DISABLED)
            version, length, proto, hops = pool.unpack(_IP6, l3, end)
            l4 = l3 + 40
            tos = version >> 20 & 0xFF
            if version >> 28 != 6:
                raise Malformed(Drop.IPV6_HEADER)
            if l4 + length > end:
                raise Malformed(Drop.IPV6_LENGTH)
            end = l4 + length
            addresses = l3 + 8, l4
            if proto != PROTO_TCP and proto != PROTO_UDP and proto != PROTO_ICMPV6:
                proto, l4 = ip.skip_extensions(pool.buf, l4, end, proto)
                if proto == ip.FRAGMENT:
                    proto = pool.buf[l4]
                    whole = fragments.ipv6(self._reassembly, pool, addresses, l4, end, now)
                    if whole is not None:
                        self._reassembled(addresses, proto, hops | tos << 8, whole, now)
                    return
        else:
            self._other_type(ethertype, start, l3, end, now, tag)
            return
        if proto == PROTO_TCP:
            if end - l4 < 20:
                raise Malformed(Drop.TCP_TRUNCATED)
            key = self._key(addresses, l4)
            if check:
                self._verifier.message(addresses, proto, l4, end)
                if self._by_group:
                    self._segment_alone(key, hops, l4, end, now)
                    return
            if tos > ip.ECN_MASK or self._classes:
                self._tcp_class(key, tos & ~ip.ECN_MASK)
            self._batch.segment(key, hops, l4, end)
            return
        fields = hops | tos << 8 | (DF if ethertype == TYPE_IPV6 or fragment & ip.DF else 0)
        if proto != PROTO_UDP:
            self._message(addresses, proto, fields, l4, end, now, check)
        elif check and self._by_group:
            self._datagram_alone(start, addresses, fields, l4, end, now)
        else:
            self._udp_datagram(start, addresses, fields, l4, end, now, check)

    def _other_type(self, ethertype: int, start: int, l3: int, end: int, now: float, tag: int) -> None:
        """A frame that is neither IPv4 nor IPv6: a tag stands before one, or a service takes it."""
        if ethertype in _TAGS and not tag:
            if int.from_bytes(self._pool.view(l3, l3 + 2), "big") & _VLAN_MASK:
                raise Malformed(Drop.VLAN)
            self._frame(start, end, now, _TAG_LEN)
            return
        handler = self._services.ethertypes.get(ethertype)
        if handler is None:
            raise Malformed(Drop.ETHERTYPE)
        known = handler(self._sender, self._pool.copy(l3, end), now)
        if known is not None:
            self._seen(known)

    def _segment_alone(self, key: bytes, hops: int, l4: int, end: int, now: float) -> None:
        """A verified segment that came in fragments, or with options: groups that are verified have none of these."""
        self._flush(now)  # what came before it
        self._batch.segment(key, hops, l4, end)
        self._hand_over_tcp(now, False)  # before its room is used again

    def _datagram_alone(
        self, start: int, addresses: tuple[int, int], fields: int, l4: int, end: int, now: float
    ) -> None:
        """A datagram that came in fragments, or with options."""
        self._hand_over_udp(now, self._by_group)  # those that came before it
        self._udp_datagram(start, addresses, fields, l4, end, now, True)
        self._hand_over_udp(now, False)  # before its room is used again

    def _verify(self, addresses: tuple[int, int], proto: int, l4: int, end: int) -> None:
        """Verify a packet without options that is not of a group. Raises Malformed."""
        if addresses[1] - addresses[0] == 8:
            self._verifier.header(l4 - 20, l4)
        if proto in (PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP):
            self._verifier.message(addresses, proto, l4, end)

    def _tcp_class(self, key: bytes, tos: int) -> None:
        """A segment of a connection that has a traffic class, or of any while some have. ECN is between the guest and
        us, as TCP negotiates it (RFC 3168, 6.1.1).
        """
        if self._classes.get(key, 0) != tos:
            self._classes[key] = tos
            self._changed_classes.append(key)

    def _fault_of_class(self, key: bytes, e: Exception) -> None:
        record(self._ctx.drops, "a traffic class", e)
        self.tcp.fault_key(key)

    def _key(self, addresses: tuple[int, int], l4: int) -> bytes:
        """The flow's key: addresses and ports as they stand in the packet, one slice where they are neighbours."""
        mv, (a, b) = self._pool.mv, addresses
        return mv[a : b + 4].tobytes() if b == l4 else mv[a:b].tobytes() + mv[l4 : l4 + 4].tobytes()

    def _udp_datagram(
        self, start: int, addresses: tuple[int, int], fields: int, l4: int, end: int, now: float, check: bool | int
    ) -> None:
        """Group a datagram, or a super-frame of them, by flow and fields of the IP header; services take theirs.

        `check`: verify it now.
        """
        pool = self._pool
        if end - l4 < 8:
            raise Malformed(Drop.UDP_TRUNCATED)
        sport, dport, length = pool.unpack(_UDP, l4, end)
        if length < 8 or l4 + length > end:
            raise Malformed(Drop.UDP_LENGTH)
        end = l4 + length
        ports = self._ports4 if addresses[1] - addresses[0] == 8 else self._ports6
        if check:
            self._verifier.message(addresses, PROTO_UDP, l4, end)
        if dport in ports:
            if self._by_group and not check:
                self._verify(addresses, PROTO_UDP, l4, end)
            self._to_port(ports[dport], addresses, sport, l4 + 8, end, now)
            return
        key = self._key(addresses, l4)
        gso_size = pool.unpack(VNET, start, end)[3] if self._vnet else 0
        if gso_size and end - l4 - 8 > gso_size * DATAGRAMS_MAX:
            raise Malformed(Drop.UDP_DATAGRAMS)
        if (gso_size or end - l4 - 8) > (DF_PAYLOAD_MAX4 if addresses[1] - addresses[0] == 8 else DF_PAYLOAD_MAX6):
            fields &= ~DF
        if not self._batch.datagram(key, fields, l4 + 8, end, gso_size):
            self._hand_over_udp(now, self._by_group)
            self._batch.datagram(key, fields, l4 + 8, end, gso_size)

    def _to_port(
        self, handler: PortHandler, addresses: tuple[int, int], sport: int, data: int, end: int, now: float
    ) -> None:
        """A datagram to a port that a service took."""
        src, dst = self._pool.pair(*addresses)
        known = handler(self._sender, src, dst, sport, self._pool.copy(data, end), now)
        if known is not None:
            self._seen(known)

    def _message(
        self, addresses: tuple[int, int], proto: int, fields: int, l4: int, end: int, now: float, check: bool | int
    ) -> None:
        """ICMP, or another protocol that a service took."""
        v4 = addresses[1] - addresses[0] == 8
        taken = self._taken(proto, l4, end, v4)
        if taken is None:
            raise Malformed(Drop.ICMP_TYPE if proto == (PROTO_ICMP if v4 else PROTO_ICMPV6) else Drop.IP_PROTOCOL)
        if self._by_group and not check:
            self._verify(addresses, proto, l4, end)
        elif check and proto in (PROTO_ICMP, PROTO_ICMPV6):
            self._verifier.message(addresses, proto, l4, end)
        self._hand_over(taken, addresses, fields, l4, end, now)

    def _taken(self, proto: int, l4: int, end: int, v4: bool) -> Taken | None:
        """The service that took a message, if one did. Raises Malformed."""
        if end - l4 < 8 and proto == (PROTO_ICMP if v4 else PROTO_ICMPV6):
            raise Malformed(Drop.ICMP_TRUNCATED)
        return self._services.taken(v4, proto, self._pool.buf[l4])

    def _hand_over(self, taken: Taken, addresses: tuple[int, int], fields: int, l4: int, end: int, now: float) -> None:
        """Its sender is taken for the guest's address when the service has found no fault with the message."""
        src, dst = self._pool.pair(*addresses)
        taken.handler(self._sender, src, dst, self._pool.view(l4, end), now, fields)
        self._seen(src)

    def _short(self, l3: int, end: int) -> None:
        """Frames of less than 20 bytes after the Ethernet header hold nothing that we know."""
        ethertype = self._pool.unpack(_TYPE, l3 - 2, end)[0]
        raise Malformed({TYPE_IPV4: Drop.IPV4_LENGTH, TYPE_IPV6: Drop.IPV6_LENGTH}.get(ethertype, Drop.TRUNCATED))

    def _reassembled(self, addresses: tuple[int, int], proto: int, fields: int, whole: bytes, now: float) -> None:
        """Handle a reassembled packet at once, in the room behind the batch. `fields` are those of the last fragment.

        Its checksum is verified whatever the fragments say: each was made by a kernel that left nothing to do.
        """
        v4 = addresses[1] - addresses[0] == 8
        start, addresses, l4, end = fragments.place(self._pool, addresses, whole)
        if proto == PROTO_UDP:
            self._datagram_alone(start, addresses, fields, l4, end, now)
            return
        if proto == PROTO_TCP:
            if end - l4 < 20:
                raise Malformed(Drop.TCP_TRUNCATED)
            self._verifier.message(addresses, proto, l4, end)
            self._segment_alone(self._key(addresses, l4), fields & HOPS_MASK, l4, end, now)
            return
        taken = self._taken(proto, l4, end, v4)
        if taken is None or not taken.fragments:
            raise Malformed(Drop.FRAGMENT_PROTOCOL)
        self._verifier.message(addresses, proto, l4, end)
        self._hand_over(taken, addresses, fields, l4, end, now)

    # Observed addresses of the guest -----------------------------------------------------------------------------

    def _seen(self, src: bytes) -> None:
        """A sound packet came from `src`."""
        self._source = src
        self._neighbours.learn(src, self._sender)

    def forget(self) -> None:
        """The guest has gone: end its flows, and know nothing of its fragments and of where it was."""
        each(self._services.on_forget, call, self._fault_of_service)
        self._reassembly = Reassembly(self._ctx.drops)
        self._sent_by(b"")
        self._neighbours.forget()

    def _other_sender(self, mac: bytes, now: float) -> None:
        """Frames come from another MAC address than those before, which are handed on first."""
        self._flush(now)
        self._sent_by(mac)
        self._neighbours.sender(mac)

    def _sent_by(self, mac: bytes) -> None:
        self._sender, self._source = mac, b""
        self._batch.expect(mac, ip4=self._have4, ip6=self._have6)

    def _fault_of_service(self, callback: object, e: Exception) -> None:
        """It failed to follow the guest: the others do."""
        record(self._ctx.drops, "a change of the guest", e)
