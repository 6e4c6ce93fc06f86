"""System calls that the standard library of CPython 3.11 lacks, by ctypes; its own functions where it has them.

`os.setns` and `os.unshare` came with 3.12, `os.timerfd_*` with 3.13. All of them raise OSError with the errno.
"""

from __future__ import annotations

import ctypes
import os
import time

_libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """`result` of a C function that says -1 on error; raises OSError naming the call."""
    if result < 0:
        e = ctypes.get_errno()
        raise OSError(e, f"{what}: {os.strerror(e)}")
    return result


# timerfd_create(2) -----------------------------------------------------------------------------------------------

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


if hasattr(os, "timerfd_create"):

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
