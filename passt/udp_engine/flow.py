"""A UDP flow: its socket on the host, and its pre-cooked header towards the guest.

    +----------+-------------+------------+--------+
    | vnet  10 | Ethernet 14 | IP 20 / 40 | UDP 8  |  `hdr`, written when the flow begins
    +----------+-------------+------------+--------+

Only lengths, gso_size and two checksums depend on the datagram. A stream of equal datagrams leaves these alone, too:
`header` compares with the values that the header has.

The UDP checksum field holds the sum of the pseudo-header. The guest's kernel completes it where it needs one
(VIRTIO_NET_HDR_F_NEEDS_CSUM). A super-frame has GSO_UDP_L4 and the size of its datagrams; its length fields count all
of it, as the kernel's software segmentation expects.

Both kinds of flows are alike here, those of the guest and those of clients of a listener. The key is that of a packet
from the guest, so the guest is the source. `client` is the client of a listener, None if the guest began the flow.
"""

from __future__ import annotations

from struct import Struct

from .. import addr
from ..drops import Drop
from ..flow.idle import IdleFlow
from ..flow.table import GUEST, HOST, Endpoints
from ..linux.sockopt import HOPS, hops_option, setting
from ..policy.resolvers import DNS_PORT
from ..wire import ether, ip, udp
from ..wire.checksum import PROTO_UDP, fold, ones_sum, pseudo_sum
from ..wire.virtio import F_NEEDS_CSUM, GSO_NONE, GSO_UDP_L4, VNET
from .sock import Client

FLOW_TIMEOUT = 180.0  # s
DNS_TIMEOUT = 30.0  # s; a query from a port of its own has one response, and resolvers give up before

CALLS = setting(*HOPS)

_IP_AT = VNET.size + ether.HEADER.size
_VNET_GSO = Struct("=BBHH")  # flags, gso_type, hdr_len, gso_size
_U16 = Struct("!H")
_LENGTH_CSUM = Struct("!HH")


def timeout(*ports: int) -> float:
    """Idle time after which a flow between these ports ends, in seconds."""
    return DNS_TIMEOUT if DNS_PORT in ports else FLOW_TIMEOUT


class UdpFlow(IdleFlow):
    """`gro`: UDP_GRO is on. `gso_size`: of UDP_SEGMENT, 0 is off. `gso_max_segs`: most datagrams in a send."""

    __slots__ = (
        "_csum_at",
        "_ip_sum",
        "_pseudo_sum",
        "_size",
        "_total",
        "_udp_at",
        "client",
        "dst",
        "gro",
        "gso_max_segs",
        "gso_size",
        "hdr",
        "hops",
        "host",
        "payload_max",
        "reply_expected",
        "src",
    )
    kind = "UDP flow"
    label = "udp"
    evicted = Drop.UDP_EVICTED

    def __init__(self, key: bytes, host: bytes, now: float, hops: int = 0, client: Client | None = None) -> None:
        half = (len(key) - 4) // 2
        super().__init__(key, timeout(int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")), now)
        self.src = key[:half]  # the guest
        self.dst = key[half : 2 * half]  # the peer, as the guest knows it
        self.host = host  # the peer that the socket is connected to
        self.client = client
        self.gro = False
        self.reply_expected = False  # the guest sent since the last receive: one datagram, the reply, is likely
        self.gso_size = 0
        self.gso_max_segs = 1
        self.hops = hops  # TTL or hop limit of the socket, 0: not known

    @property
    def foreign(self) -> bool:
        return self.client is not None

    def endpoints(self) -> Endpoints:
        guest, peer = addr.host_port(self.src, self.sport), addr.host_port(self.dst, self.dport)
        return Endpoints(GUEST if self.client is None else HOST, guest, peer, addr.host_port(self.host, self.dport))

    def build_header(self, guest_mac: bytes, our_mac: bytes, mtu: int) -> None:
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
                ether.HEADER.pack(guest_mac, our_mac, ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6),
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

    def set_guest_mac(self, mac: bytes) -> None:
        self.hdr[VNET.size : VNET.size + 6] = mac

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

    def set_hops(self, hops: int) -> None:
        """Send with this TTL or hop limit from now on. Raises OSError."""
        self.sock.setsockopt(*hops_option(self.host), hops)
        self.hops = hops

    @property
    def sport(self) -> int:
        return int.from_bytes(self.key[-4:-2], "big")

    @property
    def dport(self) -> int:
        return int.from_bytes(self.key[-2:], "big")
