"""Fields of IP headers that a flow keeps: TTL or hop limit, traffic class, don't fragment. One int holds all of them.

    bits 0-7     TTL or hop limit; 0: not known, the socket keeps it and the traffic class
    bits 8-15    TOS or traffic class: DSCP (RFC 2474) and ECN (RFC 3168)
    bit 16       DF
    bit 17       the socket is new, and the kernel's default decides about DF

`tap.py` reads them off each datagram and each message of ICMP of the guest, and `apply` sets the socket's options
where they have changed. A flow whose packets are alike costs one comparison of ints, and no system call. A packet that
came in fragments has the fields of the last one, without DF.

Don't fragment. IPv4 has a bit. An IPv6 packet is never fragmented by a router, so it counts as set unless the guest has
fragmented the datagram. A datagram that is too big for the next link or for the path is refused then, with the MTU that
fits (RFC 1191, RFC 8201), also if the narrow link is the host's own: path MTU discovery of the guest and of QUIC (RFC
8899, RFC 9000, 14.3) finds what a host without us would find.

DF_MAX. The MTU of the guest's link may be far beyond that of any network, for the sake of TCP, and Linux sets DF in all
that fits the link. So a packet above 1500 bytes does not say that its program wants no fragments: on the host itself it
would have been fragmented by default. It is fragmented here. Datagrams to groups are, too: no error about them reaches
the guest.
"""

from __future__ import annotations

from typing import Any, Final

from .. import addr
from ..linux.sockopt import HOPS, MTU_DISCOVER, TRAFFIC_CLASS, hops_option, setting
from ..wire import ip, udp

DF: Final = 1 << 16
UNSET: Final = 1 << 17
DF_MAX: Final = 1500  # bytes of a packet
DF_MESSAGE_MAX: Final = {4: DF_MAX - ip.HEADER4.size, 16: DF_MAX - ip.HEADER6.size}  # by length of the address
DF_PAYLOAD_MAX4: Final = DF_MESSAGE_MAX[4] - udp.HEADER.size
DF_PAYLOAD_MAX6: Final = DF_MESSAGE_MAX[16] - udp.HEADER.size

HOPS_MASK: Final = 0xFF
CLASS: Final = 0xFF00
_DO, _DONT = 2, 0  # IP_PMTUDISC_DO, IP_PMTUDISC_DONT

CALLS = setting(*HOPS, *TRAFFIC_CLASS, *MTU_DISCOVER)


def apply(sock: Any, host: bytes, former: int, fields: int) -> int:
    """Let what `sock` sends to `host` have `fields`, where it had `former`; returns what it has. Raises OSError."""
    v6 = len(host) == 16
    if not fields & HOPS_MASK:
        fields = former & (HOPS_MASK | CLASS) | fields & DF
    changed = former ^ fields
    if changed & HOPS_MASK:
        sock.setsockopt(*hops_option(host), fields & HOPS_MASK)
    if changed & CLASS:
        sock.setsockopt(*TRAFFIC_CLASS[v6], (fields & CLASS) >> 8)
    if changed & (DF | UNSET):
        sock.setsockopt(*MTU_DISCOVER[v6], _DO if fields & DF and addr.is_unicast(host) else _DONT)
    return fields
