"""Multicast options of UDP sockets (ip(7), ipv6(7), RFC 3678): membership, source filters, the interface.

    option                     since    purpose
    -------------------------  -------  ------------------------------------------------------------------------
    MCAST_JOIN_GROUP           2.6      all datagrams to a group that arrive by an interface
    MCAST_JOIN_SOURCE_GROUP    2.6      those of one source (RFC 4607); again for another source
    MCAST_MSFILTER             2.6      another list of sources for a group that was joined, or all sources
    IP_MULTICAST_IF            1.2      the interface that datagrams to groups leave by; IPV6_MULTICAST_IF
    IP_MULTICAST_ALL           2.6.31   0: a socket gets nothing that only other sockets have joined;
    IPV6_MULTICAST_ALL         4.20       it is 1 by default

The kernel leaves a group when the last socket that has joined it closes. It limits the groups of a socket
(net.ipv4.igmp_max_memberships, 20), and the sources of a list (net.ipv4.igmp_max_msf, 10; net.ipv6.mld_max_msf, 64).

    struct group_req           interface u32 | group: struct sockaddr_storage
    struct group_source_req    interface u32 | group | source
    struct group_filter        interface u32 | group | mode u32 | number u32 | source *

with the alignment of a pointer for each address.
"""

from __future__ import annotations

import socket
from collections.abc import Collection
from struct import Struct
from typing import Any

from .. import addr
from .sockopt import setting

MCAST_JOIN_GROUP = 42
MCAST_JOIN_SOURCE_GROUP = 46
MCAST_MSFILTER = 48
MCAST_EXCLUDE, MCAST_INCLUDE = 0, 1  # modes of a filter

# By family, IPv4 and IPv6: (level, option)
_LEVEL = socket.IPPROTO_IP, socket.IPPROTO_IPV6
MULTICAST_IF = (socket.IPPROTO_IP, socket.IP_MULTICAST_IF), (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_IF)
MULTICAST_ALL = (socket.IPPROTO_IP, 49), (socket.IPPROTO_IPV6, 29)  # IP_MULTICAST_ALL, IPV6_MULTICAST_ALL

_GROUP_REQ = Struct("@I0P128s")
_GROUP_SOURCE_REQ = Struct("@I0P128s128s")
_GROUP_FILTER = Struct("@I0P128sII0P")
_STORAGE = 128
_SOCKADDR4 = Struct("=HH4s")  # family, port, address
_SOCKADDR6 = Struct("=HHI16sI")  # family, port, flow information, address, scope
_MREQN = Struct("=4s4si")  # struct ip_mreqn: group, address, interface
_INT = Struct("=i")

CALLS = setting(
    *MULTICAST_IF,
    *MULTICAST_ALL,
    *((level, option) for level in _LEVEL for option in (MCAST_JOIN_GROUP, MCAST_JOIN_SOURCE_GROUP, MCAST_MSFILTER)),
)

Sources = frozenset[bytes] | None  # addresses; None: any


def _storage(a: bytes) -> bytes:
    if len(a) == 4:
        return _SOCKADDR4.pack(socket.AF_INET, 0, a).ljust(_STORAGE, b"\0")
    return _SOCKADDR6.pack(socket.AF_INET6, 0, 0, a, 0).ljust(_STORAGE, b"\0")


def join(sock: Any, group: bytes, index: int, sources: Sources = None) -> None:
    """Receive datagrams of `sources` to `group` that arrive by interface `index`. Raises OSError."""
    level = _LEVEL[len(group) == 16]
    if sources is None:
        sock.setsockopt(level, MCAST_JOIN_GROUP, _GROUP_REQ.pack(index, _storage(group)))
        return
    for source in sorted(sources):
        request = _GROUP_SOURCE_REQ.pack(index, _storage(group), _storage(source))
        sock.setsockopt(level, MCAST_JOIN_SOURCE_GROUP, request)


def set_sources(sock: Any, group: bytes, index: int, sources: Sources) -> None:
    """Receive those of `sources` instead, from a group that `sock` has joined. Raises OSError."""
    listed: Collection[bytes] = sources or ()
    mode = MCAST_EXCLUDE if sources is None else MCAST_INCLUDE
    head = _GROUP_FILTER.pack(index, _storage(group), mode, len(listed))
    sock.setsockopt(_LEVEL[len(group) == 16], MCAST_MSFILTER, head + b"".join(map(_storage, sorted(listed))))


def set_interface(sock: Any, v6: bool, index: int, source: bytes | None = None) -> None:
    """Send datagrams to groups by interface `index`; 0: the kernel's choice. Raises OSError.

    `source`, of IPv4, is their source address if `sock` is bound to none.
    """
    value = _INT.pack(index) if v6 else _MREQN.pack(addr.ANY4, source or addr.ANY4, index)
    sock.setsockopt(*MULTICAST_IF[v6], value)


def only_joined(sock: Any, v6: bool) -> None:
    """Receive nothing of groups that `sock` itself has not joined. Raises OSError."""
    sock.setsockopt(*MULTICAST_ALL[v6], 0)
