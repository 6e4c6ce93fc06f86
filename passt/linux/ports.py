"""Ports that are bound in a network namespace, read repeatedly through descriptors that were opened in it once.

sock_diag(7), which ss(8) uses too, lists listening TCP sockets and unconnected UDP sockets. Its socket stays in the
namespace of the thread that opened it, for any user, so that neither a path nor a thread inside is needed later. The
relevant parts of a request and its dump:

    struct nlmsghdr            length u32 | type u16 | flags u16 | sequence u32 | port u32
    struct inet_diag_req_v2    family u8 | protocol u8 | ext u8 | pad u8 | states u32 | sockid (48)
    struct inet_diag_msg       family u8 | state u8 | timer u8 | retrans u8 | source port u16, big-endian |
                               destination port u16 | source address (16, of which IPv4 uses 4) | ...

A kernel without inet_diag has the files /proc/net/{tcp,tcp6,udp,udp6}, which stay in a namespace likewise:

      sl  local_address rem_address   st tx_queue rx_queue ...          addresses in host order, ports as they are read
       0: 00000000:1F90 00000000:0000 0A 00000000:00000000 ...

    state                               number  cost: sock_diag            files
    ----------------------------------  ------  -------------------------  ---------------------------------------------
    TCP_LISTEN                          0A      10 us, 0.5 us for each     milliseconds (the kernel walks through its
                                                                           whole table of connections), 2 us for each
    TCP_CLOSE: UDP, bound and not       07      10 us, 0.5 us for each     10 us, 2 us for each
    connected to one peer

Root of the namespace may send datagrams to that socket: only those of the kernel count (`from_kernel.py`).

Listening sockets come first in the files, so reading ends at the first other one.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import time
from struct import Struct
from typing import Protocol

from .. import PASTA, addr
from ..calls import calls
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from . import from_kernel
from .from_kernel import DUMP, ERROR, NLMSG_DONE, NLMSG_ERROR

THREAD_NET = "/proc/thread-self/net"  # /proc/net is that of the process's first thread

CALLS = calls("sendto", "recvfrom", mode=PASTA)


Pinned = set[tuple[bytes, int]]


class PortTables(Protocol):
    """The bound ports of one namespace."""

    def bound(self, proto: int) -> set[int]:
        """Ports that are bound now (TCP: listening), except those that are only in `pinned`. Raises OSError."""

    def pinned(self, proto: int) -> Pinned:
        """Addresses in 127/8, other than 127.0.0.1, and ports that were bound there at the last call of `bound`.

        systemd-resolved, for instance, serves 127.0.0.53; a connection to another address does not reach it.
        """

    def close(self) -> None:
        """Close the descriptors."""


def open_tables() -> PortTables:
    """The tables of the namespace that the calling thread is in. Raises OSError."""
    try:
        return DiagTables()
    except OSError:
        return ProcTables()


# sock_diag -----------------------------------------------------------------------------------------------------------

NETLINK_SOCK_DIAG = 4
SOCK_DIAG_BY_FAMILY = 20
_REQUEST = Struct("=IHHIIBBBxI48x")
_MESSAGE = Struct("=IHHI")  # and port (4), family to retrans (4), source port (2)
_FAMILY_AT, _PORT_AT, _ADDRESS_AT = 16, 20, 24
_ERROR_AT = 16
RECEIVE = 65536  # a dump comes in parts of 32 KiB at most
ANSWER_TIME = 0.5  # s
_STATES = {PROTO_TCP: 1 << 0x0A, PROTO_UDP: 1 << 0x07}


def parse_diag(data: bytes, sequence: int, ports: set[int], pinned: Pinned) -> bool:
    """Add the ports of one part of the dump `sequence`; True if it is the last one. Raises OSError if the kernel says.

    Other data is ignored.
    """
    at = 0
    while at + _MESSAGE.size <= len(data):
        length, kind, _, number = _MESSAGE.unpack_from(data, at)
        end = at + length
        if length < _MESSAGE.size or end > len(data):
            break
        if number == sequence:
            if kind == SOCK_DIAG_BY_FAMILY and length >= _ADDRESS_AT + 4:
                port = data[at + _PORT_AT] << 8 | data[at + _PORT_AT + 1]
                if data[at + _ADDRESS_AT] == 127 and data[at + _FAMILY_AT] == socket.AF_INET:
                    _add(data[at + _ADDRESS_AT : at + _ADDRESS_AT + 4], port, ports, pinned)
                else:
                    ports.add(port)
            elif kind == NLMSG_DONE:
                return True
            elif kind == NLMSG_ERROR and length >= _ERROR_AT + ERROR.size:
                code = -ERROR.unpack_from(data, at + _ERROR_AT)[0] & 0x7FFFFFFF
                raise OSError(code, f"sock_diag: {os.strerror(code)}")
        at = end + 3 & ~3
    return False


def _add(address: bytes, port: int, ports: set[int], pinned: Pinned) -> None:
    """A port that is bound to an address of 127/8."""
    if address == addr.LOOPBACK4:
        ports.add(port)
    else:
        pinned.add((address, port))


class DiagTables:
    """By sock_diag. Raises OSError where that is not possible."""

    def __init__(self) -> None:
        self._sequence = 0
        self._pinned: dict[int, Pinned] = {}
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG
        )
        try:
            from_kernel.connect(self._sock)
            for proto in _STATES:  # loads the kernel's modules while that is possible
                self.bound(proto)
        except OSError:
            self.close()
            raise

    def bound(self, proto: int) -> set[int]:
        """As in `PortTables`."""
        ports: set[int] = set()
        pinned = self._pinned[proto] = set()
        self._dump(socket.AF_INET, proto, ports, pinned)
        try:
            self._dump(socket.AF_INET6, proto, ports, pinned)
        except OSError as e:
            if e.errno != errno.ENOENT:  # a kernel without IPv6
                raise
        return ports - {0}

    def pinned(self, proto: int) -> Pinned:
        """As in `PortTables`."""
        return self._pinned[proto]

    def _dump(self, family: int, proto: int, ports: set[int], pinned: Pinned) -> None:
        # The kernel prepares the answer while it takes the request, and each further part while it gives the last one
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        request = _REQUEST.size, SOCK_DIAG_BY_FAMILY, DUMP, self._sequence, 0, family, proto, 0, _STATES[proto]
        self._sock.send(_REQUEST.pack(*request))
        deadline = time.monotonic() + ANSWER_TIME
        while not parse_diag(from_kernel.receive(self._sock, RECEIVE, deadline), self._sequence, ports, pinned):
            pass

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


# /proc/net -----------------------------------------------------------------------------------------------------------

_FILES = {PROTO_TCP: ("tcp", "tcp6"), PROTO_UDP: ("udp", "udp6")}
_LINE = rb"^ *\d+: ([0-9A-F]+):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} "
_WORD = Struct("=I")
_BOUND = {
    PROTO_TCP: re.compile(_LINE + rb"0A ", re.MULTILINE),
    PROTO_UDP: re.compile(_LINE + rb"07 ", re.MULTILINE),
}
_NOT_LISTENING = re.compile(_LINE + rb"(?!0A)[0-9A-F]{2} ")
_READ_SIZE = 65536
_PAGE = 4096 - 256  # a part that is shorter than a page less a line is the last one


def parse(proto: int, text: bytes, pinned: Pinned) -> set[int]:
    """Ports that are bound, in the text of a file of protocol `proto`. Lines of any other format are ignored."""
    ports: set[int] = set()
    for address, port in _BOUND[proto].findall(text):
        packed = _WORD.pack(int(address, 16)) if len(address) == 8 else b"\0"
        if packed[0] == 127:
            _add(packed, int(port, 16), ports, pinned)
        else:
            ports.add(int(port, 16))
    return ports - {0}


class ProcTables:
    """By the files under /proc. Raises OSError if there are none."""

    def __init__(self, directory: str = THREAD_NET) -> None:
        self._fds: dict[int, list[int]] = {}
        self._pinned: dict[int, Pinned] = {}
        for proto, names in _FILES.items():
            fds = self._fds[proto] = []
            for name in names:
                try:
                    fds.append(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                except FileNotFoundError:
                    if not name.endswith("6"):  # a kernel without IPv6 lacks those
                        self.close()
                        raise

    def bound(self, proto: int) -> set[int]:
        """As in `PortTables`."""
        pinned = self._pinned[proto] = set()
        return {port for fd in self._fds[proto] for port in parse(proto, _read(fd, proto), pinned)}

    def pinned(self, proto: int) -> Pinned:
        """As in `PortTables`."""
        return self._pinned[proto]

    def close(self) -> None:
        """Close the files."""
        for fds in self._fds.values():
            while fds:
                os.close(fds.pop())


def _read(fd: int, proto: int) -> bytes:
    """The relevant part of a file."""
    parts = []
    offset = 0
    while part := os.pread(fd, _READ_SIZE, offset):
        parts.append(part)
        offset += len(part)
        if len(part) < _PAGE or (proto == PROTO_TCP and _NOT_LISTENING.match(part[part.rfind(b"\n", 0, -1) + 1 :])):
            break
    return b"".join(parts)
