"""recvmmsg(2) by ctypes: many datagrams of one socket for one system call, into memory laid out once.

    slot 0 (64 KiB)          slot 1                   ...     COUNT slots, one anonymous mapping
    +------------------------+------------------------+--
    | datagram, or a run of  |                        |       only pages that were written to are resident
    | them coalesced by GRO  |                        |
    +------------------------+------------------------+--

Each message has one iovec (its slot) and room for one control message: UDP_GRO's, an int with the size of the
datagrams that the kernel joined. No address is asked for: the sockets are connected. Reading the results is a
strided view of the array of headers, not a loop.

The kernel writes into the headers (control length, flags), so they are restored from a template before each call;
that is one copy of COUNT * sizeof(struct mmsghdr), and cheaper than touching single fields.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import socket

COUNT = 64
SLOT = 65536  # more than any datagram, and any run of them, can have

_recvmmsg = ctypes.CDLL(None, use_errno=True).recvmmsg
_recvmmsg.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_void_p)

_CONTROL = socket.CMSG_SPACE(4)
_CONTROL_DATA = socket.CMSG_LEN(0)


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
    """The memory, and the call. Datagram `i` of a batch lies at `i * SLOT` of `mv` until the next call."""

    def __init__(self, count: int = COUNT) -> None:
        self.count = count
        self._memory = mmap.mmap(-1, count * SLOT, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.mv = memoryview(self._memory)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._iov = (_Iovec * count)(*(_Iovec(base + i * SLOT, SLOT) for i in range(count)))
        self._control = (ctypes.c_char * (count * _CONTROL))()
        self._headers = (_Mmsghdr * count)()
        for i, h in enumerate(self._headers):
            h.hdr.iov = ctypes.addressof(self._iov) + i * ctypes.sizeof(_Iovec)
            h.hdr.iovlen = 1
            h.hdr.control = ctypes.addressof(self._control) + i * _CONTROL
            h.hdr.controllen = _CONTROL
        self._address = ctypes.addressof(self._headers)
        self._headers_mv = memoryview(self._headers).cast("B")
        self._headers_new = bytes(self._headers_mv)
        self._control_mv = memoryview(self._control).cast("B")
        self._control_new = bytes(self._control_mv)
        self._lengths = self._headers_mv.cast("I")[_Mmsghdr.len.offset // 4 :: ctypes.sizeof(_Mmsghdr) // 4]
        self._sizes = self._control_mv.cast("i")[_CONTROL_DATA // 4 :: _CONTROL // 4]

    def receive(self, fd: int) -> tuple[list[int], list[int]]:
        """Up to `count` messages that wait on `fd`: their lengths, and the size of the datagrams in each, 0: single.

        Raises OSError; BlockingIOError when nothing waits.
        """
        self._headers_mv[:] = self._headers_new
        self._control_mv[:] = self._control_new
        n = _recvmmsg(fd, self._address, self.count, socket.MSG_DONTWAIT, None)
        if n < 0:
            e = ctypes.get_errno()
            raise OSError(e, f"recvmmsg: {os.strerror(e)}")
        return self._lengths[:n].tolist(), self._sizes[:n].tolist()
