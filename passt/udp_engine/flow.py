"""A UDP flow: its socket on the host, and its pre-cooked header towards the guest.

    +----------+-------------+------------+--------+
    | vnet  10 | Ethernet 14 | IP 20 / 40 | UDP 8  |  `hdr`, written when the flow begins
    +----------+-------------+------------+--------+

Only lengths, gso_size, the traffic class and two checksums depend on the datagram. A stream of equal datagrams leaves
these alone, too: `header` compares with the values that the header has.

The UDP checksum field holds the sum of the pseudo-header. The guest's kernel completes it where it needs one
(VIRTIO_NET_HDR_F_NEEDS_CSUM). A super-frame has GSO_UDP_L4 and the size of its datagrams; its length fields count all
of it, as the kernel's software segmentation expects.

Both kinds of flows are alike here, those of the guest and those of clients of a listener. The key is that of a packet
from the guest, so the guest is the source. `client` is the client of a listener, None if the guest began the flow.

DNS is known by its look, not by its port: a flow that begins with a query (`wire/dns.py`) ends after DNS_TIMEOUT. Where
the guest asked, the first datagram that comes back must be the answer, or the flow is one like any other.
"""

from __future__ import annotations

from struct import Struct
from typing import ClassVar, Final

from .. import addr
from ..drops import Drop
from ..flow.idle import IdleFlow
from ..flow.ip_fields import CLASS, UNSET, apply
from ..flow.table import GUEST, HOST, Endpoints
from ..wire import dns, ether, ip, udp
from ..wire.checksum import PROTO_UDP, fold, ones_sum, pseudo_sum
from ..wire.virtio import F_NEEDS_CSUM, GSO_NONE, GSO_UDP_L4, VNET
from .sock import Client

FLOW_TIMEOUT: Final = 180.0  # s
DNS_TIMEOUT: Final = 30.0  # s; a DNS query from a port of its own has one response, and resolvers give up before

_IP_AT: Final = VNET.size + ether.HEADER.size
_VNET_GSO: Final = Struct("=BBHH")  # flags, gso_type, hdr_len, gso_size
_U16: Final = Struct("!H")
_U32: Final = Struct("!I")
_LENGTH_CSUM: Final = Struct("!HH")


def timeout(first: dns.Buffer) -> float:
    """Idle time in seconds after which a flow ends that begins with the datagram `first`."""
    return FLOW_TIMEOUT if dns.query_ident(first) < 0 else DNS_TIMEOUT


class UdpFlow(IdleFlow):
    """`gro`: UDP_GRO is on. `gso_size`: of UDP_SEGMENT, 0 is off. `gso_max_segs`: most datagrams in a send."""

    __slots__ = (
        "_csum_at",
        "_ip_sum",
        "_pseudo_sum",
        "_size",
        "_total",
        "_udp_at",
        "asked",
        "client",
        "dst",
        "fields",
        "gro",
        "gso_max_segs",
        "gso_size",
        "hdr",
        "host",
        "payload_max",
        "plain",
        "reply_expected",
        "src",
        "tos",
    )
    kind = "UDP flow"
    label: ClassVar[str] = "udp"
    evicted = Drop.UDP_EVICTED

    def __init__(self, key: bytes, host: bytes, now: float, hops: int = 0, client: Client | None = None) -> None:
        half = (len(key) - 4) // 2
        super().__init__(key, FLOW_TIMEOUT, now)
        self.src = key[:half]  # the guest
        self.dst = key[half : 2 * half]  # the peer, as the guest knows it
        self.host = host  # the peer that the socket is connected to
        self.client = client
        self.asked = -1  # identifier of the DNS query that the flow began with, until the first datagram comes back
        self.gro = False
        self.reply_expected = False  # the guest sent since the last receive: one datagram, the reply, is likely
        self.gso_size = 0
        self.gso_max_segs = 1
        self.tos = 0  # traffic class of the header, which is that of the last datagram received
        self.plain = 0  # so many single replies are received next without a look at the class
        self.fields = UNSET | hops  # of the IP headers of what the socket sends (`flow.ip_fields`)

    @property
    def foreign(self) -> bool:
        return self.client is not None

    def begins_with(self, first: dns.Buffer) -> None:
        """A DNS query, to whatever port, and a flow that ends soon; or anything else."""
        self.asked = dns.query_ident(first)
        if self.asked >= 0:
            self.timeout = DNS_TIMEOUT

    def answered(self, reply: dns.Buffer) -> None:
        """The first datagram that comes back tells whether the query was one."""
        if not dns.is_answer(reply, self.asked):
            self.timeout = FLOW_TIMEOUT
        self.asked = -1

    def endpoints(self) -> Endpoints:
        guest, peer = addr.host_port(self.src, self.sport), addr.host_port(self.dst, self.dport)
        return Endpoints(GUEST if self.client is None else HOST, guest, peer, addr.host_port(self.host, self.dport))

    def build_header(self, guest_mac: bytes, peer_mac: bytes, mtu: int) -> None:
        """Write the header: from `dst` to the guest, with the ports swapped. Needs the flow's index for its label."""
        sport, dport = self.key[-4:-2], self.key[-2:]
        v4 = len(self.src) == 4
        label = (self.index + 1) & ip.FLOW_LABEL_MASK or 1
        ip_header = ip.header(self.dst, self.src, PROTO_UDP, 0, label)
        udp_at = _IP_AT + len(ip_header)
        hdr_len = udp_at + udp.HEADER.size - VNET.size
        self.hdr = bytearray().join(
            (
                VNET.pack(F_NEEDS_CSUM, GSO_NONE, hdr_len, 0, udp_at - VNET.size, 6),
                ether.HEADER.pack(guest_mac, peer_mac, ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6),
                ip_header,
                dport + sport + bytes(4),
            )
        )
        self._udp_at = udp_at
        # Without its length and checksum fields, which are at 2 and 10 of the IPv4 header
        self._ip_sum = ones_sum(ip_header[:2] + ip_header[4:10] + ip_header[12:]) if v4 else -1
        self._pseudo_sum = pseudo_sum(self.dst, self.src, PROTO_UDP, 0)
        self._total = self._size = -1
        room = mtu - len(ip_header) - udp.HEADER.size
        self.payload_max = room if mtu else 65535

    def set_class(self, tos: int) -> None:
        """Send frames with this traffic class to the guest from now on."""
        hdr = self.hdr
        self.tos, self.plain = tos, 0
        self._total = self._size = -1
        if self._ip_sum < 0:
            (word,) = _U32.unpack_from(hdr, _IP_AT)
            _U32.pack_into(hdr, _IP_AT, word & 0xF00FFFFF | tos << 20)
        else:
            self._ip_sum += tos - hdr[_IP_AT + 1]
            hdr[_IP_AT + 1] = tos

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        self.hdr[VNET.size : VNET.size + 12] = guest + peer

    def header(self, total: int, size: int) -> bytearray:
        """The header for `total` bytes of payload: one datagram, or several of `size` bytes each if that is less."""
        if total != self._total or size != self._size:
            self._fill(total, size)
        return self.hdr

    def _fill(self, total: int, size: int) -> None:
        self._total, self._size = total, size
        hdr, at = self.hdr, self._udp_at
        length = udp.HEADER.size + total
        gso = (GSO_UDP_L4, size) if size < total else (GSO_NONE, 0)
        _VNET_GSO.pack_into(hdr, 0, F_NEEDS_CSUM, gso[0], at + udp.HEADER.size - VNET.size, gso[1])
        if self._ip_sum >= 0:
            ip_length = ip.HEADER4.size + length
            _U16.pack_into(hdr, _IP_AT + 2, ip_length)
            _U16.pack_into(hdr, _IP_AT + 10, 0xFFFF - fold(self._ip_sum + ip_length))
        else:
            _U16.pack_into(hdr, _IP_AT + 4, length)
        _LENGTH_CSUM.pack_into(hdr, at + 4, length, fold(self._pseudo_sum + length))

    def set_fields(self, fields: int) -> None:
        """Send with these fields of the IP header from now on. Raises OSError."""
        self.fields = apply(self.sock, self.host, self.fields, fields)
        if fields & CLASS:
            self.plain = 0

    @property
    def sport(self) -> int:
        return int.from_bytes(self.key[-4:-2], "big")

    @property
    def dport(self) -> int:
        return int.from_bytes(self.key[-2:], "big")
