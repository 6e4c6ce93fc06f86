"""accept4(2) by ctypes: a client with its packed address, and a descriptor that is non-blocking from the beginning.

`socket.accept` has the address as text, and takes two system calls more for the same. This runs for each connection
from the host, so it is compiled; `syscall.py`, whose structures inherit types of ctypes, cannot be.
"""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any, Final

from .. import addr
from .syscall import check

ACCEPTED: Final = int(socket.SOCK_STREAM | socket.SOCK_NONBLOCK)  # type of a socket of `accept`
_SOCKADDR_LEN: Final = 28  # struct sockaddr_in6, the longer one
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC
_peer: Final[Any] = ctypes.create_string_buffer(_SOCKADDR_LEN)
_peer_len: Final[Any] = ctypes.c_uint32()
_PEER_AT: Final = ctypes.addressof(_peer)
_LEN_AT: Final = ctypes.addressof(_peer_len)
_accept4: Final[Any] = ctypes.CDLL(None, use_errno=True).accept4
_accept4.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)


def accept(fd: int) -> tuple[int, bytes, int]:
    """The next connection of listening IP socket `fd`: descriptor, non-blocking; packed address of the peer; its port.

    A client of a dual-stack socket that came by IPv4 has an IPv4 address here. Not for several threads at a time.
    """
    _peer_len.value = _SOCKADDR_LEN
    new: int = _accept4(fd, _PEER_AT, _LEN_AT, _FLAGS)
    if new < 0:
        check(new, "accept4")
    peer: bytes = _peer.raw  # family (2), port (2), IPv4 address (4) or: flow label (4), IPv6 address (16), scope (4)
    if _peer_len.value < _SOCKADDR_LEN:
        packed = peer[4:8]
    elif peer[8:20] == addr.V4_MAPPED_PREFIX:
        packed = peer[20:24]
    else:
        packed = peer[8:24]
    return new, packed, peer[2] << 8 | peer[3]
