"""ICMP errors of the guest, about packets that it was sent (RFC 792; RFC 4443, 3).

    type                            codes       handed on as
    ------------------------------  ----------  ----------------------------------------------------
    destination unreachable         all but 4   unreachable: host, network, port, or by an administrator. A guest with
    (4: fragmentation needed)                   a packet filter that rejects sends these, and one that routes
    time exceeded                   0           unreachable: too many routers behind the guest

An error quotes the packet that it is about. The protocol that sent it registers with `Services.take_errors`, and gets
the key of the flow and the first 8 bytes behind the quoted IP header, which tell whether the quote is true: a packet
that was never sent cannot be quoted (RFC 5927, 4.1). Anything else is dropped and counted.
"""

from __future__ import annotations

from ..drops import Drop
from ..wire import icmp, ip
from ..wire.cursor import Malformed
from .context import Context

_QUOTED = 8  # bytes of the upper layer that every error has


class GuestErrors:
    """Takes the messages, and hands them to the protocols."""

    def __init__(self, ctx: Context) -> None:
        self._handlers = ctx.services.errors
        self._drops = ctx.drops
        ctx.services.take_icmp(True, (icmp.UNREACHABLE, icmp.TIME_EXCEEDED), self.tap_handler)
        ctx.services.take_icmp(False, (icmp.UNREACHABLE6, icmp.TIME_EXCEEDED6), self.tap_handler)

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, message: memoryview, now: float, fields: int = 0
    ) -> None:
        """An error from its type byte on. Raises Malformed."""
        v4 = len(src) == 4
        if v4 and message[0] == icmp.UNREACHABLE and message[1] == icmp.UNREACHABLE_FRAGMENTATION:
            raise Malformed(Drop.ICMP_TYPE)
        proto, key, upper = parse_quote(bytes(message[icmp.ERROR.size :]), v4=v4)
        handler = self._handlers.get(proto)
        if handler is None or not handler(key, upper, now):
            self._drops[Drop.GUEST_ERROR_STRANGE] += 1


def parse_quote(packet: bytes, *, v4: bool) -> tuple[int, bytes, bytes]:
    """(protocol, key of the flow, 8 bytes of the upper layer) of a quoted packet to the guest. Raises Malformed."""
    header = ip.HEADER4 if v4 else ip.HEADER6
    if len(packet) < header.size + _QUOTED or packet[0] >> 4 != (4 if v4 else 6):
        raise Malformed(Drop.GUEST_ERROR_QUOTE)
    if v4:
        _, _, _, _, fragment, _, proto, _, src, dst = header.unpack_from(packet)
        l4 = (packet[0] & 0xF) * 4
        if l4 < header.size or fragment & 0x1FFF:
            raise Malformed(Drop.GUEST_ERROR_QUOTE)
    else:
        _, _, proto, _, src, dst = header.unpack_from(packet)
        l4 = header.size
    upper = packet[l4 : l4 + _QUOTED]
    if len(upper) < _QUOTED:
        raise Malformed(Drop.GUEST_ERROR_QUOTE)
    return proto, dst + src + upper[2:4] + upper[:2], upper
