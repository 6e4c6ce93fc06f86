"""The TCP segments and UDP datagrams of one batch of frames, by flow, in order of arrival.

`tap` classifies frames and adds to the groups. `plain` does both for a frame that has nothing unusual, which is nearly
every one of them, in half the time: one look at the headers, from the virtio-net header to the ports.

    virtio-net 10  Ethernet 14                 IPv4 20                                          ports 4
    flags, size    | destination, source, type | version, TOS, length, ... hops, protocol, addresses |
                                 '------- one comparison -------'                       '----- key -----'

A group of segments is [TCP header, end]*, one of datagrams [payload, end, size of the datagrams in it or 0]*, both in
offsets of the packet pool. The key of a flow is what stands in the packet: addresses and ports.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct
from typing import Final

from ..link.packet import FRAME_ROOM, PacketPool
from ..link.verify import VERIFIED
from ..wire import ip, tcp, udp
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from ..wire.ether import HEADER_LEN, TYPE_IPV4, TYPE_IPV6
from ..wire.virtio import VNET_LEN
from .ip_fields import DF, DF_PAYLOAD_MAX4, DF_PAYLOAD_MAX6
from .services import Services

Groups = dict[bytes, list[int]]
_Plain4 = tuple[int, int, bytes, int, int, int, int, int, bytes, int]
_Plain6 = tuple[int, int, bytes, int, int, int, int, bytes, int]

# flags, gso_size; source MAC, EtherType; what comes first in the packet ... addresses and ports; the next two bytes,
# which are the length of a UDP datagram
_PLAIN4: Final[Callable[[bytearray, int], _Plain4]] = Struct("!B3xH4x6x9sBH2xHBB2x12sH").unpack_from
_PLAIN6: Final[Callable[[bytearray, int], _Plain6]] = Struct("!B3xH4x6x8sIHBB36sH").unpack_from
_L3: Final = VNET_LEN + HEADER_LEN
_HEAD4: Final = TYPE_IPV4.to_bytes(2, "big") + b"\x45"  # no options
_HEAD6: Final = TYPE_IPV6.to_bytes(2, "big")
_NO_HEAD: Final = b""  # that of no frame
# Names of this module: a look-up in another one costs a frame twice as much
_IP4_LEN: Final = ip.HEADER4.size
_IP6_LEN: Final = ip.HEADER6.size
_ADDRESSES4: Final = 8  # bytes of both
_ADDRESSES6: Final = 32
_UDP_LEN: Final = udp.HEADER.size
_TCP_LEN: Final = tcp.HEADER_LEN
_SHORTEST: Final = _IP4_LEN + _UDP_LEN
_LONGEST: Final = FRAME_ROOM - _L3 - 1
_FRAGMENT: Final = ip.FRAGMENT_MASK
_DF: Final = ip.DF
_ECN: Final = ip.ECN_MASK


class Batch:
    """`classes` are the traffic classes that connections have: while there are any, no segment is plain.

    `vnet`: frames have a virtio-net header that the guest's kernel wrote.
    """

    def __init__(self, pool: PacketPool, services: Services, classes: dict[bytes, int], *, vnet: bool) -> None:
        self._buf = pool.buf
        self._vnet = vnet
        self._ports4, self._ports6 = services.ports4, services.ports6
        self._classes = classes
        self._head4 = self._head6 = _NO_HEAD
        self.tcp: Groups = {}
        self.hops: dict[bytes, int] = {}  # TTL or hop limit of the first segment of a group
        self.udp: Groups = {}
        self.fields: dict[bytes, int] = {}  # of the IP headers of a group of datagrams (`ip_fields.py`)

    def expect(self, sender: bytes, *, ip4: bool, ip6: bool) -> None:
        """Plain frames are those of this MAC address, and of these families."""
        self._head4 = sender + _HEAD4 if ip4 else _NO_HEAD
        self._head6 = sender + _HEAD6 if ip6 else _NO_HEAD

    def plain(self, start: int, end: int) -> bool:
        """Add the frame [start, end) to its group. False: it is not plain, and nothing was done.

        Longer than most on purpose: it runs for every frame.
        """
        room = end - start - _L3
        if not _SHORTEST <= room <= _LONGEST:
            return False
        flags, gso_size, head, tos, total, fragment, hops, proto, key, length = _PLAIN4(self._buf, start)
        if head == self._head4:
            l4, df, most, ports = start + _L3 + _IP4_LEN, fragment & _DF, DF_PAYLOAD_MAX4, self._ports4
            if total > room or fragment & _FRAGMENT:
                return False
        else:
            flags, gso_size, head, flow, total, proto, hops, key, length = _PLAIN6(self._buf, start)
            l4, df, most, ports = start + _L3 + _IP6_LEN, DF, DF_PAYLOAD_MAX6, self._ports6
            total += _IP6_LEN
            if head != self._head6 or flow >> 28 != 6 or total > room:
                return False
            tos = flow >> 20 & 0xFF
        if self._vnet and not flags & VERIFIED and not self._sound(start + _L3, l4, start + _L3 + total, proto):
            return False
        end = start + _L3 + total
        if proto == PROTO_TCP:
            if end - l4 < _TCP_LEN or tos > _ECN or self._classes:
                return False
            self.segment(key, hops, l4, end)
            return True
        if proto != PROTO_UDP or l4 + length > end or not _UDP_LEN <= length <= most + _UDP_LEN:
            return False
        if (gso_size and self._vnet) or (self._buf[l4 + 2] << 8 | self._buf[l4 + 3]) in ports:
            return False
        fields = hops | tos << 8 | (DF if df else 0)
        return self.datagram(key, fields, l4 + _UDP_LEN, l4 + length, 0)

    def _sound(self, l3: int, l4: int, end: int, proto: int) -> bool:
        """Whether a packet that no kernel has verified is a segment without payload whose checksums are right.

        Linux sums these itself where a connection has no socket any more: a server that ends a connection first sends
        its last acknowledgement from TIME-WAIT.
        """
        buf, length = self._buf, end - l4
        if proto != PROTO_TCP or length < _TCP_LEN or (buf[l4 + 12] >> 2 & 0x3C) != length:
            return False
        addresses = l4 - _ADDRESSES6
        if l4 - l3 == _IP4_LEN:
            addresses = l4 - _ADDRESSES4
            if int.from_bytes(buf[l3:l4], "little") % 0xFFFF:
                return False
        return (int.from_bytes(buf[addresses:end], "little") + (PROTO_TCP + length << 8)) % 0xFFFF == 0

    def segment(self, key: bytes, hops: int, l4: int, end: int) -> None:
        """Add a TCP segment: its header begins at `l4`."""
        group = self.tcp.get(key)
        if group is None:
            self.tcp[key] = [l4, end]
            self.hops[key] = hops
        else:
            group += (l4, end)

    def datagram(self, key: bytes, fields: int, data: int, end: int, size: int) -> bool:
        """Add a datagram, or several of `size` bytes. False: the group has other fields, and has to go first."""
        before = self.fields.get(key)
        if before is None:
            self.udp[key] = [data, end, size]
            self.fields[key] = fields
        elif before == fields:
            self.udp[key] += (data, end, size)
        else:
            return False
        return True

    def take_tcp(self) -> tuple[Groups, dict[bytes, int]]:
        """The groups of segments so far, and their hops; others begin."""
        taken = self.tcp, self.hops
        self.tcp, self.hops = {}, {}
        return taken

    def take_udp(self) -> tuple[Groups, dict[bytes, int]]:
        """The groups of datagrams so far, and their fields; others begin."""
        taken = self.udp, self.fields
        self.udp, self.fields = {}, {}
        return taken
