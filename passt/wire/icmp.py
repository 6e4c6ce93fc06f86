"""ICMP (RFC 792) and ICMPv6 (RFC 4443): echo and error messages. Neighbour discovery is in `ndp.py`.

    0        8        16                32
    +--------+--------+-----------------+
    |  type  |  code  |    checksum     |
    +--------+--------+-----------------+
    |  identifier     |    sequence     |   echo; in errors: zero, or the MTU of the next hop
    +-----------------+-----------------+
    |  echo data, or the packet that caused the error, truncated

An error quotes the packet up to the size that every host must be able to receive: 576 bytes (RFC 1812, 4.3.2.3) or 1280
(RFC 4443, 2.4 c). The packet itself was not kept; `quote` rebuilds it from the flow and the payload that the socket's
error queue returns.
"""

from __future__ import annotations

from struct import Struct

from . import ip, udp
from .checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP, checksum, transport_checksum

ECHO = Struct("!BBHHH")  # type, code, checksum, identifier, sequence number
ERROR = Struct("!BBHI")  # type, code, checksum, and a word that depends on the type

# RFC 792
ECHO_REPLY = 0
UNREACHABLE = 3
ECHO_REQUEST = 8
TIME_EXCEEDED = 11
PARAMETER_PROBLEM = 12

UNREACHABLE_NET = 0
UNREACHABLE_HOST = 1
UNREACHABLE_PROTOCOL = 2
UNREACHABLE_PORT = 3
UNREACHABLE_FRAGMENTATION = 4  # fragmentation needed and DF set: the low 16 bits of the word are the MTU (RFC 1191)
UNREACHABLE_ADMIN = 13  # RFC 1812, 5.2.7.1

# RFC 4443
UNREACHABLE6 = 1
PACKET_TOO_BIG6 = 2  # the word is the MTU
TIME_EXCEEDED6 = 3
PARAMETER_PROBLEM6 = 4
ECHO_REQUEST6 = 128
ECHO_REPLY6 = 129

UNREACHABLE6_ROUTE = 0
UNREACHABLE6_ADMIN = 1
UNREACHABLE6_ADDRESS = 3
UNREACHABLE6_PORT = 4

ERROR_MAX4 = 576
ERROR_MAX6 = 1280
QUOTE_MAX4 = ERROR_MAX4 - ip.HEADER4.size - ERROR.size
QUOTE_MAX6 = ERROR_MAX6 - ip.HEADER6.size - ERROR.size


def protocol(a: bytes) -> int:
    """The IP protocol number of ICMP in the family of address `a`."""
    return PROTO_ICMP if len(a) == 4 else PROTO_ICMPV6


def complete(src: bytes, dst: bytes, message: bytes) -> bytes:
    """`message`, whose checksum field is zero, with its checksum; the family is that of the addresses."""
    c = checksum(message) if len(src) == 4 else transport_checksum(src, dst, PROTO_ICMPV6, message)
    return message[:2] + c.to_bytes(2, "big") + message[4:]


def error(src: bytes, dst: bytes, kind: int, code: int, word: int, packet: bytes) -> bytes:
    """A complete error message from `src` to `dst` about `packet`, an IP packet that `dst` had sent."""
    quoted = packet[: QUOTE_MAX4 if len(src) == 4 else QUOTE_MAX6]
    return complete(src, dst, ERROR.pack(kind, code, 0, word) + quoted)


def port_unreachable(src: bytes, dst: bytes, packet: bytes) -> bytes:
    """A complete Port Unreachable about `packet`, from `src` to `dst`."""
    if len(src) == 4:
        return error(src, dst, UNREACHABLE, UNREACHABLE_PORT, 0, packet)
    return error(src, dst, UNREACHABLE6, UNREACHABLE6_PORT, 0, packet)


def too_big(src: bytes, dst: bytes, mtu: int, packet: bytes) -> bytes:
    """A complete Fragmentation Needed or Packet Too Big about `packet`, with the `mtu` of the next hop."""
    if len(src) == 4:
        return error(src, dst, UNREACHABLE, UNREACHABLE_FRAGMENTATION, min(mtu, 0xFFFF), packet)
    return error(src, dst, PACKET_TOO_BIG6, 0, mtu, packet)


def quote(src: bytes, dst: bytes, proto: int, segment: bytes) -> bytes:
    """The IP packet with `segment` that `src` had sent to `dst`, as an error message quotes it."""
    return ip.header(src, dst, proto, len(segment)) + segment


def quote_udp(src: bytes, dst: bytes, sport: int, dport: int, payload: bytes) -> bytes:
    """The packet with a UDP datagram that `src` had sent to `dst`, as an error message quotes it."""
    return quote(src, dst, PROTO_UDP, udp.datagram(src, dst, sport, dport, payload))
