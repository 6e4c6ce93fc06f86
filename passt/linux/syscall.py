"""System calls that the standard library of CPython 3.11 lacks, by ctypes; functions of the library where they exist.

`os.setns` and `os.unshare` came with 3.12, `os.timerfd_*` with 3.13. All of them raise OSError with the errno.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from struct import Struct

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """`result` of a C function that returns -1 on error; raises OSError naming the call."""
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, f"{what}: {os.strerror(e)}")
    return result


# timerfd_create(2) -------------------------------------------------------------------------------------------------

TFD_TIMER_ABSTIME = 1
TFD_NONBLOCK = os.O_NONBLOCK
TFD_CLOEXEC = os.O_CLOEXEC


class _Itimerspec(ctypes.Structure):
    """struct itimerspec: interval and initial expiration, each as seconds and nanoseconds."""

    _fields_ = (
        ("interval_sec", ctypes.c_long),
        ("interval_nsec", ctypes.c_long),
        ("value_sec", ctypes.c_long),
        ("value_nsec", ctypes.c_long),
    )


if sys.version_info >= (3, 13):

    def timerfd_create() -> int:
        """A non-blocking timer descriptor on CLOCK_MONOTONIC."""
        return os.timerfd_create(time.CLOCK_MONOTONIC, flags=os.TFD_NONBLOCK | os.TFD_CLOEXEC)

    def timerfd_settime(fd: int, deadline: float) -> None:
        """Make `fd` readable at `deadline` (seconds of time.monotonic()); 0 disarms."""
        os.timerfd_settime(fd, flags=os.TFD_TIMER_ABSTIME, initial=deadline)

else:
    _spec = _Itimerspec()
    _spec_p = ctypes.byref(_spec)
    _settime = _libc.timerfd_settime
    _settime.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)

    def timerfd_create() -> int:
        """A non-blocking timer descriptor on CLOCK_MONOTONIC."""
        return check(_libc.timerfd_create(time.CLOCK_MONOTONIC, TFD_NONBLOCK | TFD_CLOEXEC), "timerfd_create")

    def timerfd_settime(fd: int, deadline: float) -> None:
        """Make `fd` readable at `deadline` (seconds of time.monotonic()); 0 disarms."""
        sec = int(deadline)
        _spec.value_sec = sec
        _spec.value_nsec = int((deadline - sec) * 1e9)
        if _settime(fd, TFD_TIMER_ABSTIME, _spec_p, None) < 0:
            check(-1, "timerfd_settime")


# ioctl(2) ----------------------------------------------------------------------------------------------------------


def ioctl_number(kind: str, number: int, write_size: int = 0, read_size: int = 0) -> int:
    """_IO(kind, number), or _IOW or _IOR with an argument of that many bytes. The direction bits vary by machine."""
    odd = os.uname().machine.startswith(("alpha", "mips", "ppc", "sparc"))
    if odd:
        direction = (4 if write_size else 2 if read_size else 1) << 29
    else:
        direction = (1 if write_size else 2 if read_size else 0) << 30
    return direction | (write_size or read_size) << 16 | ord(kind) << 8 | number


# setns(2), unshare(2) ----------------------------------------------------------------------------------------------

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

if sys.version_info >= (3, 12):
    setns = os.setns
    unshare = os.unshare
else:

    def setns(fd: int, nstype: int = 0) -> None:
        """Move the calling thread (CLONE_NEWUSER: the whole, single-threaded process) into the namespace of `fd`."""
        check(_libc.setns(fd, nstype), "setns")

    def unshare(flags: int) -> None:
        """Give the calling thread new namespaces of the kinds in `flags`."""
        check(_libc.unshare(flags), "unshare")


# mount(2), pivot_root(2), prctl(2) ------------------------------------------------------------------------------------

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 0x1, 0x2, 0x4, 0x8
MS_MOVE, MS_REC = 0x2000, 0x4000
MS_PRIVATE, MS_SLAVE = 0x40000, 0x80000
MNT_DETACH = 2
_OPEN_TREE_CLONE, _AT_RECURSIVE, _AT_FDCWD = 0x1, 0x8000, -100

PR_SET_PDEATHSIG = 1
PR_GET_PDEATHSIG = 2
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_SET_THP_DISABLE = 41
PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL = 47, 4


def mount(source: str, target: str, fstype: str, flags: int, data: str = "") -> None:
    """Mount; `fstype` is empty if only the mount point or the propagation changes."""
    args = source.encode(), os.fsencode(target), fstype.encode() or None, ctypes.c_ulong(flags), data.encode() or None
    check(_libc.mount(*args), "mount")


def umount(target: str, flags: int) -> None:
    """umount2(2)."""
    check(_libc.umount2(os.fsencode(target), flags), "umount2")


def pivot_root(number: int, new: str, old: str) -> None:
    """Make `new` the root, and move the old one to `old`. The C library has no function for it: pass its number."""
    check(_libc.syscall(ctypes.c_long(number), os.fsencode(new), os.fsencode(old)), "pivot_root")


def open_tree(number: int, path: str, *, recursive: bool) -> int:
    """A descriptor of a new detached mount of the directory `path`."""
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC | (_AT_RECURSIVE if recursive else 0)
    return check(_libc.syscall(ctypes.c_long(number), _AT_FDCWD, os.fsencode(path), ctypes.c_uint(flags)), "open_tree")


def prctl(option: int, value: int) -> int:
    """prctl(2) for options with one number; returns its result."""
    zero = ctypes.c_ulong(0)
    return check(_libc.prctl(option, ctypes.c_ulong(value), zero, zero, zero), "prctl")


def parent_death_signal() -> int:
    """The parent-death signal (PR_GET_PDEATHSIG); 0: none."""
    number = ctypes.c_int()
    zero = ctypes.c_ulong(0)
    check(_libc.prctl(PR_GET_PDEATHSIG, ctypes.byref(number), zero, zero, zero), "prctl")
    return number.value


# capset(2) ---------------------------------------------------------------------------------------------------------

CAP_SETPCAP, CAP_NET_BIND_SERVICE, CAP_NET_ADMIN, CAP_SYS_ADMIN = 8, 10, 12, 21
_CAP_HEADER = Struct("=Ii")  # version, thread (0: the calling one)
_CAP_VERSION_3 = 0x20080522
_CAP_DATA = Struct("=6I")  # effective, permitted, inheritable: the low 32 bits of each, then the high ones


def _capabilities() -> tuple[bytes, int, int]:
    """The header for both calls, and the effective and permitted sets of the calling thread, as bits."""
    header = _CAP_HEADER.pack(_CAP_VERSION_3, 0)
    data = ctypes.create_string_buffer(_CAP_DATA.size)
    check(_libc.capget(header, data), "capget")
    effective, permitted, _, effective_high, permitted_high, _ = _CAP_DATA.unpack(data.raw)
    return header, effective_high << 32 | effective, permitted_high << 32 | permitted


def has_capability(cap: int) -> bool:
    """Whether `cap` is in the effective set of the calling thread, in its user namespace."""
    return bool(_capabilities()[1] >> cap & 1)


def set_capabilities(*kept: int) -> None:
    """Set the effective and permitted sets of the calling thread to those of its permitted capabilities in `kept`."""
    header, _, permitted = _capabilities()
    bits = permitted & sum(1 << cap for cap in kept)
    low, high = bits & 0xFFFFFFFF, bits >> 32
    check(_libc.capset(header, _CAP_DATA.pack(low, low, 0, high, high, 0)), "capset")


# inotify(7): `inotify.py` --------------------------------------------------------------------------------------------


def inotify_init() -> int:
    """A non-blocking descriptor without watches."""
    return check(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify_init1")


def inotify_add_watch(fd: int, path: str, mask: int) -> int:
    """Watch the file at `path`; returns the watch."""
    return check(_libc.inotify_add_watch(fd, os.fsencode(path), ctypes.c_uint32(mask)), "inotify_add_watch")
