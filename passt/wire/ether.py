"""Ethernet (RFC 894, RFC 2464): the header, and whole frames of the control plane with every checksum complete."""

from __future__ import annotations

from struct import Struct
from typing import Final

from . import ip, udp
from .checksum import PROTO_ICMPV6, PROTO_UDP, transport_checksum

HEADER: Final[Struct] = Struct("!6s6sH")  # destination, source, EtherType
HEADER_LEN: Final[int] = HEADER.size  # 14

TYPE_IPV4: Final = 0x0800
TYPE_ARP: Final = 0x0806
TYPE_IPV6: Final = 0x86DD
GROUP: Final = 0x01  # of the first byte of a MAC address: a group, which sends nothing


def multicast_mac(group: bytes) -> bytes:
    """The MAC address of a multicast group (RFC 2464, 7; RFC 1112, 6.4: the low 23 bits)."""
    if len(group) == 16:
        return b"\x33\x33" + group[12:]
    return bytes((1, 0, 0x5E, group[1] & 0x7F)) + group[2:]


def ip_frame(
    dst_mac: bytes, src_mac: bytes, src: bytes, dst: bytes, proto: int, segment: bytes, flow_label: int = 0
) -> bytes:
    """A frame with an IP packet of the family of `src` and `dst`; `segment` is a complete upper-layer message."""
    ethertype = TYPE_IPV4 if len(src) == 4 else TYPE_IPV6
    return HEADER.pack(dst_mac, src_mac, ethertype) + ip.header(src, dst, proto, len(segment), flow_label) + segment


def udp_frame(
    dst_mac: bytes, src_mac: bytes, src: bytes, dst: bytes, sport: int, dport: int, payload: bytes, flow_label: int = 0
) -> bytes:
    """A frame with a UDP datagram, over the family of `src` and `dst`."""
    segment = udp.datagram(src, dst, sport, dport, payload)
    return ip_frame(dst_mac, src_mac, src, dst, PROTO_UDP, segment, flow_label)


def icmp6_frame(dst_mac: bytes, src_mac: bytes, src: bytes, dst: bytes, message: bytes) -> bytes:
    """A frame with an ICMPv6 message, whose checksum field (RFC 4443, 2.1) is zero in `message` and filled in here."""
    c = transport_checksum(src, dst, PROTO_ICMPV6, message)
    return ip_frame(dst_mac, src_mac, src, dst, PROTO_ICMPV6, message[:2] + c.to_bytes(2, "big") + message[4:])
