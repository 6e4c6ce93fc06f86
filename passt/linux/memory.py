"""Memory for buffers that are longer than most of what comes, and no more pages than are used.

bytearray(size) writes zeros, and with them takes all of its pages: 1.2 MiB for the pool of packets, in 0.8 ms. Here the
kernel is told to take the pages back that the C library may have used, and gives one with zeros when it is wanted.

A kernel whose /sys/kernel/mm/transparent_hugepage/enabled is "always" gives 2 MiB where 4 KiB are asked for. Many
daemons of some MiB each stand on one host, and none of them has data that would be found faster for it.
"""

from __future__ import annotations

import ctypes
import mmap

from .. import log
from .syscall import PR_SET_THP_DISABLE, prctl

_new = ctypes.pythonapi.PyByteArray_FromStringAndSize
_new.argtypes = (ctypes.c_void_p, ctypes.c_ssize_t)
_new.restype = ctypes.py_object
_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def zeros(size: int) -> bytearray:
    """bytearray(size) whose whole pages come at first use. Not in the sandbox, which forbids madvise(2) to passt."""
    if size < 2 * mmap.PAGESIZE:
        return bytearray(size)
    made: bytearray = _new(None, size)
    start = ctypes.addressof(ctypes.c_char.from_buffer(made))
    first = -start % mmap.PAGESIZE
    end = first + (size - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if _madvise(start + first, end - first, mmap.MADV_DONTNEED):  # as with pages that are locked
        first = end = size
    made[:first] = bytes(first)
    made[end:] = bytes(size - end)
    return made


def no_huge_pages() -> None:
    """Let this process, and those that it starts from now on, have transparent huge pages no more (PR_SET_THP_DISABLE).

    A kernel or a sandbox around this program that refuses costs memory, and no more.
    """
    try:
        prctl(PR_SET_THP_DISABLE, 1)
    except OSError as e:
        log.debug(f"Couldn't do without transparent huge pages: {e.strerror}")
