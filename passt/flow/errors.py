"""ICMP errors to the guest, for packets of all protocols.

The host's kernel reports them on sockets with IP_RECVERR, or as errno of connect(2) and of sends. The guest gets the
message that a router would send. It quotes the guest's own packet, with the guest's addresses, ports and identifiers.

    origin of the error                           source address that the guest sees
    --------------------------------------------  -----------------------------------------------
    a router or another host                      its own
    the host itself, loopback, a mapped host      the destination that the guest wrote to

Messages beyond ERRORS_PER_SECOND are counted and not sent (RFC 1812, 4.3.2.8; RFC 4443, 2.4 f). A packet to a group or
to a broadcast address causes no error (RFC 1122, 3.2.2; RFC 4443, 2.4 e).
"""

from __future__ import annotations

import errno

from .. import addr
from ..drops import Drop
from ..linux.sockopt import (
    ORIGIN_ICMP,
    ORIGIN_ICMP6,
    ExtendedError,
)
from ..wire import ether, icmp
from .context import Context

ERRORS_PER_SECOND = 200

# (type, code) for an errno, IPv4 (RFC 792, RFC 1812) and IPv6 (RFC 4443)
_UNREACHABLE4 = {
    errno.ECONNREFUSED: icmp.UNREACHABLE_PORT,
    errno.ENETUNREACH: icmp.UNREACHABLE_NET,
    errno.EAFNOSUPPORT: icmp.UNREACHABLE_NET,
    errno.ENOPROTOOPT: icmp.UNREACHABLE_PROTOCOL,
    errno.EACCES: icmp.UNREACHABLE_ADMIN,
    errno.EPERM: icmp.UNREACHABLE_ADMIN,
}
_UNREACHABLE6 = {
    errno.ECONNREFUSED: icmp.UNREACHABLE6_PORT,
    errno.ENETUNREACH: icmp.UNREACHABLE6_ROUTE,
    errno.EAFNOSUPPORT: icmp.UNREACHABLE6_ROUTE,
    errno.EACCES: icmp.UNREACHABLE6_ADMIN,
    errno.EPERM: icmp.UNREACHABLE6_ADMIN,
}


def from_errno(number: int, mtu: int, *, v4: bool) -> tuple[int, int, int]:
    """(type, code, word) of the message for errno `number`; an errno not listed is an unreachable host."""
    if number == errno.EMSGSIZE:
        return (icmp.UNREACHABLE, icmp.UNREACHABLE_FRAGMENTATION, mtu) if v4 else (icmp.PACKET_TOO_BIG6, 0, mtu)
    if v4:
        return icmp.UNREACHABLE, _UNREACHABLE4.get(number, icmp.UNREACHABLE_HOST), 0
    return icmp.UNREACHABLE6, _UNREACHABLE6.get(number, icmp.UNREACHABLE6_ADDRESS), 0


def from_extended(error: ExtendedError, *, v4: bool) -> tuple[int, int, int]:
    """(type, code, word) of the message that the host's kernel received, or of one for its errno."""
    if error.origin != (ORIGIN_ICMP if v4 else ORIGIN_ICMP6):
        return from_errno(error.errno, error.info, v4=v4)
    # The kernel reports the MTU (of the next hop, 16 bits in IPv4) or, for a parameter problem, a pointer into a packet
    # that is not the guest's.
    too_big = (icmp.UNREACHABLE, icmp.UNREACHABLE_FRAGMENTATION) if v4 else (icmp.PACKET_TOO_BIG6, 0)
    word = error.info if (error.type, error.code) == too_big else 0
    return error.type, error.code, word


class Errors:
    """ICMP errors to the guest at a bounded rate. One object per protocol, so that none starves another."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._second = 0.0
        self._left = 0

    def refused(self, number: int, guest: bytes, dst: bytes, packet: bytes, now: float, mtu: int = 0) -> None:
        """The host's kernel refused to send `packet` of `guest` to `dst`, with errno `number`.

        `mtu` is that of the link or path, where the packet is too big for it.
        """
        self._send(dst, guest, *from_errno(number, mtu, v4=len(dst) == 4), packet, now)

    def reported(self, error: ExtendedError, guest: bytes, dst: bytes, host: bytes, packet: bytes, now: float) -> None:
        """`error` is about `packet`, which `guest` sent to `dst`; on the host that is `host`."""
        src = self._source(error.offender, dst, host)
        self._send(src, guest, *from_extended(error, v4=len(dst) == 4), packet, now)

    def _source(self, offender: bytes | None, dst: bytes, host: bytes) -> bytes:
        """The source address for a message of `offender`, as in the table above."""
        if offender is None or len(offender) != len(dst) or offender == host or not addr.is_unicast(offender):
            return dst
        settings = self._ctx.fwd.family(dst)
        ours = addr.is_loopback(offender) or (settings is not None and offender in (settings.addr, settings.host_addr))
        return dst if ours else offender

    def _send(self, src: bytes, dst: bytes, kind: int, code: int, word: int, packet: bytes, now: float) -> None:
        ctx = self._ctx
        if not addr.is_unicast(src) or not self._allowed(now):
            ctx.drops[Drop.ICMP_ERROR_NOT_SENT] += 1
            return
        message = icmp.error(src, dst, kind, code, word, packet)
        mac = ctx.guest.mac_of(dst)
        ctx.link.send_frame(ether.ip_frame(mac, ctx.lan.mac_of(src), src, dst, icmp.protocol(src), message))

    def _allowed(self, now: float) -> bool:
        if now - self._second >= 1:
            self._second, self._left = now, ERRORS_PER_SECOND
        self._left -= 1
        return self._left >= 0
