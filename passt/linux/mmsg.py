"""recvmmsg(2) by ctypes: many datagrams of one socket for one system call, into memory laid out once.

    slot 0 (64 KiB)          slot 1                   ...     COUNT slots, one anonymous mapping
    +------------------------+------------------------+--
    | datagram, or a batch   |                        |       only pages that were written to are resident
    | coalesced by GRO       |                        |
    +------------------------+------------------------+--

Each message has one iovec (its slot), and an envelope for its address and control messages:

    socket         class             envelope                              access
    -------------  ----------------  ------------------------------------  ---------------------------------------
    connected      Receiver          control message UDP_GRO: an int, the  strided views of the array of headers,
                                     size of the datagrams joined; and     and of the array of envelopes: no loop
                                     IP_TOS (a byte) or IPV6_TCLASS (an    unless a traffic class is not zero
                                     int), the traffic class
    listening      AddressReceiver   struct sockaddr_in or sockaddr_in6    one slice per message; equal envelopes
                                     of the sender, control messages       are equal bytes, so that a caller
                                     IPV6_PKTINFO, IP_PKTINFO, and the     parses each once (`Envelope`)
                                     traffic class

The kernel writes into headers (control length, flags) and envelopes, so they are restored from a template before each
call; that is one copy of COUNT * sizeof(struct mmsghdr), and cheaper than touching single fields.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket
from struct import Struct
from typing import Final

from .. import addr
from ..calls import calls
from ..lean.tuples import NamedTuple
from .sockopt import IP_PKTINFO, UDP_GRO

COUNT: Final = 64
SLOT: Final = 65536  # more than the size of any datagram and any batch

_recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)

_INT_SPACE: Final = socket.CMSG_SPACE(4)
CLASS_SPACE: Final = _INT_SPACE  # for what `class_in` looks for
_INFO4_SPACE: Final = socket.CMSG_SPACE(12)
_INFO6_SPACE: Final = socket.CMSG_SPACE(20)
_CONTROL_DATA: Final = socket.CMSG_LEN(0)
_KIND_AT: Final = _CONTROL_DATA - 4
_NAME_SPACE: Final = 32  # struct sockaddr_in6 has 28 bytes; control messages are aligned like pointers

_CMSG: Final = Struct("@Nii")  # struct cmsghdr: length with this header, level, type
INFO4: Final = Struct("=i4s4s")  # struct in_pktinfo: interface, our address to answer from, destination
INFO6: Final = Struct("=16sI")  # struct in6_pktinfo: destination, interface
_FAMILY: Final = Struct("=H")
_NAME4: Final = Struct("!H4s")  # after the family: port, address
_NAME6: Final = Struct("!H4x16s")  # port, flow information, address
_SCOPE: Final = Struct("=I")
_INT: Final = Struct("=i")
_SCOPE_AT: Final = _FAMILY.size + _NAME6.size

CALLS = calls("recvmmsg")


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Msghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint32),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Mmsghdr(ctypes.Structure):
    _fields_ = (("hdr", _Msghdr), ("len", ctypes.c_uint))


class Receiver:
    """The memory, and the call. Datagram `i` of a batch lies at `i * SLOT` of `mv` until the next call.

    An envelope is `name` bytes for the sender's address and `control` for control messages.
    """

    def __init__(self, count: int = COUNT, name: int = 0, control: int = 2 * _INT_SPACE) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, count * SLOT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.mv = memoryview(self._memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._iov = (_Iovec * count)(*(_Iovec(base + i * SLOT, SLOT) for i in range(count)))
        stride = name + control
        self._envelopes = (ctypes.c_char * (count * stride))()
        self._headers = (_Mmsghdr * count)()
        for i, h in enumerate(self._headers):
            envelope = ctypes.addressof(self._envelopes) + i * stride
            h.hdr.name = envelope if name else None
            h.hdr.namelen = name
            h.hdr.iov = ctypes.addressof(self._iov) + i * ctypes.sizeof(_Iovec)
            h.hdr.iovlen = 1
            h.hdr.control = envelope + name
            h.hdr.controllen = control
        self._address = ctypes.addressof(self._headers)
        self._headers_mv = memoryview(self._headers).cast("B")
        self._headers_new = bytes(self._headers_mv)
        self._envelopes_mv = memoryview(self._envelopes).cast("B")
        self._envelopes_new = bytes(self._envelopes_mv)
        self._lengths = self._headers_mv.cast("I")[_Mmsghdr.len.offset // 4 :: ctypes.sizeof(_Mmsghdr) // 4]
        ints = self._envelopes_mv.cast("i")
        self._kinds = ints[(name + _KIND_AT) // 4 :: stride // 4]  # of the first control message
        self._values = ints[(name + _CONTROL_DATA) // 4 :: stride // 4]  # its data
        self._second = ints[(name + _INT_SPACE + _CONTROL_DATA) // 4 :: stride // 4]  # data of the second
        self.classes: list[int] = []

    def receive(self, fd: int) -> tuple[list[int], list[int]]:
        """Up to `count` messages of `fd`: their lengths, and the size of the datagrams in each, 0: single.

        `classes` has their traffic classes afterwards; it is empty if all are zero. Raises OSError; BlockingIOError if
        there is no message.
        """
        n = self._receive(fd)
        values, second = self._values[:n].tolist(), self._second[:n].tolist()
        if not any(second) and not any(values):
            self.classes = []
            return self._lengths[:n].tolist(), values
        kinds = self._kinds[:n].tolist()
        joined = [kind == UDP_GRO for kind in kinds]
        found = [b if gro else a for gro, a, b in zip(joined, values, second, strict=True)]
        self.classes = list(map(_class_of, found)) if any(found) else []
        return self._lengths[:n].tolist(), [a if gro else 0 for gro, a in zip(joined, values, strict=True)]

    def _receive(self, fd: int) -> int:
        self._headers_mv[:] = self._headers_new
        self._envelopes_mv[:] = self._envelopes_new
        n: int = _recvmmsg(fd, self._address, self.count, socket.MSG_DONTWAIT, None)
        if n < 0:
            e = ctypes.get_errno()
            raise OSError(e, f"recvmmsg: {os.strerror(e)}")
        return n


def _class_of(value: int) -> int:
    """The traffic class in the data of a control message: a byte, with zero bytes behind it, or an int."""
    return _INT.pack(value)[0] or value


def class_in(control: list[tuple[int, int, bytes]]) -> int:
    """The traffic class in control messages of recvmsg(2); 0 if there is none."""
    for _, kind, data in control:
        if kind == socket.IP_TOS:
            return data[0]
        if kind == socket.IPV6_TCLASS:
            return int(_INT.unpack(data)[0])
    return 0


class AddressReceiver(Receiver):
    """For unconnected sockets with IP_PKTINFO or IPV6_RECVPKTINFO; dual-stack sockets have both. They may be asked for
    traffic classes, too.
    """

    def __init__(self, count: int = COUNT) -> None:
        super().__init__(count, _NAME_SPACE, _INFO6_SPACE + _INFO4_SPACE + _INT_SPACE)
        self._stride = len(self._envelopes_mv) // count

    def receive_from(self, fd: int) -> tuple[list[int], list[bytes]]:
        """Up to `count` datagrams of `fd`: their lengths, and their envelopes for `Envelope.parse`. Raises OSError."""
        lengths = self._lengths[: self._receive(fd)].tolist()
        end = len(lengths) * self._stride
        received = bytes(self._envelopes_mv[:end])
        return lengths, [received[at : at + self._stride] for at in range(0, end, self._stride)]


class Envelope(NamedTuple):
    """Source and local address of a datagram: packed, 4 bytes also for IPv4 on a dual-stack socket."""

    peer: bytes
    port: int
    local: bytes  # to answer from; unspecified where the datagram went to a group
    scope: int  # interface that link-local addresses among them belong to, else 0
    tos: int = 0  # TOS or traffic class

    @classmethod
    def parse(cls, envelope: bytes) -> Envelope:
        """Parse an envelope of `receive_from`."""
        (family,) = _FAMILY.unpack_from(envelope)
        if family == socket.AF_INET:
            port, peer = _NAME4.unpack_from(envelope, _FAMILY.size)
        else:
            port, peer = _NAME6.unpack_from(envelope, _FAMILY.size)
        peer = addr.unmapped(peer)
        local, interface, tos = cls._control(envelope, len(peer))
        if len(peer) == 16 and (addr.is_link_local(peer) or addr.is_link_local(local)):
            return cls(peer, port, local, _SCOPE.unpack_from(envelope, _SCOPE_AT)[0] or interface, tos)
        return cls(peer, port, local, 0, tos)

    @staticmethod
    def _control(envelope: bytes, length: int) -> tuple[bytes, int, int]:
        """Our address, of `length` bytes, the interface, and the traffic class.

        For IPv4 the kernel gives the address to answer from, even for a broadcast; for IPv6 only the destination.
        IP_PKTINFO is more specific than IPV6_PKTINFO, and comes later.
        """
        local, interface, tos, at = bytes(length), 0, 0, _NAME_SPACE
        while at + _CMSG.size <= len(envelope):
            size, level, kind = _CMSG.unpack_from(envelope, at)
            if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
                interface, local, _ = INFO4.unpack_from(envelope, at + _CONTROL_DATA)
            elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
                to, interface = INFO6.unpack_from(envelope, at + _CONTROL_DATA)
                to = addr.unmapped(to)
                local = bytes(length) if addr.is_multicast(to) else to
            elif (level, kind) == (socket.IPPROTO_IP, socket.IP_TOS):
                tos = envelope[at + _CONTROL_DATA]
            elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_TCLASS):
                (tos,) = _INT.unpack_from(envelope, at + _CONTROL_DATA)
            elif not size:
                break  # no more control messages
            at += socket.CMSG_SPACE(size - _CONTROL_DATA)
        return local, interface, tos
