"""Socket options that CPython 3.11 has no name for, entries of error queues, and probes of the kernel's features.

Numbers are those of include/uapi/linux/{udp,in,in6,errqueue}.h and asm-generic/socket.h (all architectures that Debian
supports use the generic ones for the options named here). A probe tries the option on a socket of its own: features are
never inferred from the kernel's version.

    option              since   purpose
    ------------------  ------  -----------------------------------------------------------------
    UDP_SEGMENT         4.18    send a GSO batch of equal-sized datagrams
    UDP_GRO             5.0     receive such a batch; a control message has the datagram size
    IP(V6)_RECVERR      2.2     ICMP errors, with their offender and the quoted packet
    SO_PEEK_OFF (TCP)   6.9     a peek continues where the last one ended
    SO_MEMINFO          4.6     use of a socket's buffers
"""

from __future__ import annotations

import errno
import socket
from struct import Struct

from .. import addr
from ..calls import Call, Calls, Condition, calls
from ..drops import Drop
from ..lean.records import dataclass
from ..wire.cursor import Cursor

SOL_UDP = socket.IPPROTO_UDP
UDP_SEGMENT = 103
UDP_GRO = 104

IP_PKTINFO = 8
IP_RECVERR = 11
IPV6_RECVERR = 25
IP_BIND_ADDRESS_NO_PORT = 24
IP_FREEBIND = 15
IPV6_FREEBIND = 78

# By family, IPv4 and IPv6: (level, option)
TRAFFIC_CLASS = (socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, socket.IPV6_TCLASS)
RECEIVE_CLASS = (socket.IPPROTO_IP, 13), (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS)  # IP_RECVTOS
MTU_DISCOVER = (socket.IPPROTO_IP, 10), (socket.IPPROTO_IPV6, 23)  # IP_MTU_DISCOVER, IPV6_MTU_DISCOVER
PATH_MTU = (socket.IPPROTO_IP, 14), (socket.IPPROTO_IPV6, 24)  # IP_MTU, IPV6_MTU

SO_PEEK_OFF = 42
SO_MEMINFO = 55
REUSEPORT = socket.SOL_SOCKET, socket.SO_REUSEPORT

# (level, option) that sets the TTL or hop limit, by length of the destination and whether it is a group
_HOPS = {
    (4, False): (socket.IPPROTO_IP, socket.IP_TTL),
    (4, True): (socket.IPPROTO_IP, socket.IP_MULTICAST_TTL),
    (16, False): (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS),
    (16, True): (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS),
}

# Origins of an extended error (struct sock_extended_err.ee_origin)
ORIGIN_LOCAL = 1
ORIGIN_ICMP = 2
ORIGIN_ICMP6 = 3

ERRORS_PER_DRAIN = 64  # limit of one call of read_errors; epoll reports the rest
QUOTE_MAX = 1280  # no ICMP error quotes more (RFC 4443, 2.4 (c); RFC 1812, 4.3.2.3 stops at 576)
_CONTROL_SIZE = 256


def creating(family: int, kind: int, proto: int = 0) -> Call:
    """socket(2) of that kind, which may have flags (SOCK_NONBLOCK, SOCK_CLOEXEC), and of that protocol."""
    return Call("socket", (Condition(0, family), Condition(1, kind, 0xF), Condition(2, proto)))


def setting(*options: tuple[int, int], mode: str | None = None) -> Calls:
    """setsockopt(2) of these (level, option) alone. Other options would give a hostile guest access to the host's
    packet filters, to foreign addresses (IP_TRANSPARENT), and to BPF programs (SO_ATTACH_FILTER).
    """
    return tuple(Call("setsockopt", (Condition(1, level), Condition(2, option)), mode) for level, option in options)


# TCP and UDP. A module that sets an option declares it
CALLS = (
    *(
        creating(family, kind)
        for family in (socket.AF_INET, socket.AF_INET6)
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    ),
    *calls("getsockopt", "getsockname", "bind", "connect", "recvmsg", "close"),
)


def recverr(family: int) -> tuple[int, int]:
    """(level, option) that turns a socket's error queue on."""
    return (socket.IPPROTO_IP, IP_RECVERR) if family == socket.AF_INET else (socket.IPPROTO_IPV6, IPV6_RECVERR)


def freebind(family: int) -> tuple[int, int]:
    """(level, option) that allows bind(2) to an address that is on no interface."""
    return (socket.IPPROTO_IP, IP_FREEBIND) if family == socket.AF_INET else (socket.IPPROTO_IPV6, IPV6_FREEBIND)


_LAYOUT = Struct("=IBBBxII")
_FAMILY = Struct("=H")


RECVERR = recverr(socket.AF_INET), recverr(socket.AF_INET6)
FREEBIND = freebind(socket.AF_INET), freebind(socket.AF_INET6)
HOPS = tuple(_HOPS.values())


def path_mtu(sock: socket.socket, v6: bool) -> int:
    """The MTU of the path to the peer of a connected socket, as far as the kernel knows. Raises OSError."""
    return sock.getsockopt(*PATH_MTU[v6])


def hops_option(dst: bytes) -> tuple[int, int]:
    """(level, option) of the TTL or hop limit of packets to `dst`, a packed address."""
    return _HOPS[len(dst), addr.is_multicast(dst)]


@dataclass(frozen=True, slots=True)
class ExtendedError:
    """struct sock_extended_err and the address of its reporter.

    errno u32 | origin u8 | type u8 | code u8 | pad u8 | info u32 | data u32 | struct sockaddr offender
    """

    errno: int
    origin: int
    type: int
    code: int
    info: int  # the next hop's MTU, when the error is about a datagram that is too big
    offender: bytes | None  # packed address, None for an error of the local kernel

    @classmethod
    def parse(cls, data: bytes) -> ExtendedError:
        """From the payload of an IP_RECVERR or IPV6_RECVERR control message; raises Malformed."""
        c = Cursor(data, Drop.EXTENDED_ERROR_TRUNCATED)
        number, origin, kind, code, info, _ = c.unpack(_LAYOUT)
        return cls(number, origin, kind, code, info, cls._offender(c))

    @property
    def too_big_here(self) -> bool:
        """The datagram is too big for the host's own link or route. The send has failed, too, and is reported."""
        return self.origin == ORIGIN_LOCAL and self.errno == errno.EMSGSIZE

    @classmethod
    def _offender(cls, c: Cursor) -> bytes | None:
        """The address in a struct sockaddr_in (port 2, address 4) or sockaddr_in6 (port 2, flow 4, address 16)."""
        if c.left < 2:
            return None
        (family,) = c.unpack(_FAMILY)
        if family == socket.AF_INET:
            c.take(2)
            return c.take(4)
        if family == socket.AF_INET6:
            c.take(6)
            return c.take(16)
        return None  # AF_UNSPEC: a local error

    def emit(self) -> bytes:
        """The control message's payload, as the kernel writes it."""
        head = _LAYOUT.pack(self.errno, self.origin, self.type, self.code, self.info, 0)
        if self.offender is None:
            return head + _FAMILY.pack(socket.AF_UNSPEC) + bytes(14)
        if len(self.offender) == 4:
            return head + _FAMILY.pack(socket.AF_INET) + bytes(2) + self.offender + bytes(8)
        return head + _FAMILY.pack(socket.AF_INET6) + bytes(6) + self.offender + bytes(4)

    def __str__(self) -> str:
        return f"{errno.errorcode.get(self.errno, self.errno)} (type {self.type}, code {self.code})"


# Errors of a datagram socket after its destruction: the first one, and that of each later send
DESTROYED = frozenset((errno.ECONNABORTED, errno.EDESTADDRREQ))


class Destroyed(ConnectionAbortedError):
    """Root of the host has destroyed the socket (`ss -K`, SOCK_DESTROY of sock_diag(7)).

    It is not connected any more. Where it is still bound, it receives what any peer sends there.
    """


def read_errors(sock: socket.socket) -> list[tuple[ExtendedError, bytes]]:
    """Empty the error queue of `sock`: each error and the quoted payload of the datagram that caused it.

    A bounded number per call. The socket's pending error is cleared, so that EPOLLERR is off unless entries are left.
    Raises Destroyed.
    """
    found: list[tuple[ExtendedError, bytes]] = []
    for _ in range(ERRORS_PER_DRAIN):
        try:
            quoted, control, _, _ = sock.recvmsg(QUOTE_MAX, _CONTROL_SIZE, socket.MSG_ERRQUEUE | socket.MSG_DONTWAIT)
        except BlockingIOError:
            break
        for level, kind, data in control:
            if (level, kind) in _RECVERR:
                found.append((ExtendedError.parse(data), quoted))
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNABORTED:
        raise Destroyed(errno.ECONNABORTED, "another program has destroyed the socket")
    return found


_RECVERR = frozenset(RECVERR)


def default_hops() -> dict[int, int]:
    """TTL and hop limit of unicast packets unless a socket says otherwise, by length of the address; 0 if not known."""
    hops = {4: 0, 16: 0}
    for family, dst in ((socket.AF_INET, addr.LOOPBACK4), (socket.AF_INET6, addr.LOOPBACK6)):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as s:
                hops[len(dst)] = s.getsockopt(*hops_option(dst))
        except OSError:
            pass  # the host lacks the family, so no packet of it will be sent
    return hops


def _accepts(kind: int, level: int, option: int, value: int) -> bool:
    with socket.socket(socket.AF_INET, kind) as s:
        try:
            s.setsockopt(level, option, value)
        except OSError:
            return False  # ENOPROTOOPT: this kernel does not know it
        return True


def probe_udp_gro() -> bool:
    """Whether UDP sockets coalesce received datagrams."""
    return _accepts(socket.SOCK_DGRAM, SOL_UDP, UDP_GRO, 1)


def probe_udp_segment() -> bool:
    """Whether UDP sockets segment a sent buffer into datagrams."""
    return _accepts(socket.SOCK_DGRAM, SOL_UDP, UDP_SEGMENT, 1000)
