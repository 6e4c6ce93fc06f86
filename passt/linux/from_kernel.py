"""Netlink datagrams of the kernel, and of no other sender.

Root of a network namespace may send datagrams to any netlink socket in it (netlink(7)), with any contents, and as many
as it likes. A socket that is connected to the kernel refuses them (`connect`). The kernel's own datagrams have the port
0 as their source, and all others, which came before, are left out here (`receive`). There is an end to it: the kernel
answers a request at once, so a wait is short, and so many foreign datagrams in a row are an attack, which costs the
request.
"""

from __future__ import annotations

import errno
import socket
import time
from struct import Struct

KERNEL = 0  # nl_pid
FOREIGN_MAX = 1024  # datagrams of others that are left out for each of the kernel's
WAIT = Struct("@ll")  # struct timeval

HEADER = Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
NLMSG_ERROR, NLMSG_DONE = 2, 3  # types
ERROR = Struct("=i")  # behind the header: the errno, negative
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300  # flags
DUMP = NLM_F_REQUEST | NLM_F_DUMP  # of a request for all there are


def connect(sock: socket.socket) -> None:
    """Let the kernel refuse the datagrams of others from now on. Gives the socket a port."""
    sock.connect((KERNEL, 0))


def limit_wait(sock: socket.socket, seconds: float) -> None:
    """Let receiving calls of a blocking socket end after so long without a datagram."""
    whole = int(seconds)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, WAIT.pack(whole, int((seconds - whole) * 1e6)))


def receive(sock: socket.socket, size: int, deadline: float) -> bytes:
    """The kernel's next datagram, of up to `size` bytes. OSError ETIMEDOUT: none until `deadline`."""
    for _ in range(FOREIGN_MAX):
        try:
            data, (port, _) = sock.recvfrom(size)
        except BlockingIOError:
            break
        if port == KERNEL:
            return data
        if time.monotonic() >= deadline:
            break
    raise OSError(errno.ETIMEDOUT, "netlink: no answer of the kernel arrives")


def split(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """(type, flags, sequence number, whole message) of each message. Raises OSError for invalid lengths."""
    found, at = [], 0
    while at + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
        if not HEADER.size <= length <= len(data) - at:
            raise OSError(errno.EBADMSG, "netlink: a message of invalid length")
        found.append((kind, flags, sequence, data[at : at + length]))
        at += length + 3 & ~3
    return found
