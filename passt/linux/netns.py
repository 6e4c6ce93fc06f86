"""Network namespaces: opening them, and running a function inside one.

setns(CLONE_NEWNET) moves one thread. The main thread therefore never leaves the host's namespace: what must be done
in the other one (create the tap, configure it, open a socket) is done by a thread that enters, does it, and ends.
What it opened belongs to the process and stays usable. Returning to the host's namespace would need rights there
that an ordinary user does not have; ending does not.
"""

from __future__ import annotations

import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from .syscall import CLONE_NEWNET, ioctl_number, setns

T = TypeVar("T")

NS_GET_NSTYPE = ioctl_number("\xb7", 3)
NETNS_RUN_DIR = "/run/netns"
_GONE_TIMEOUT = 5.0  # seconds; an ended thread needs microseconds to leave the process


def run_in(netns: int, function: Callable[[], T], *, settle: bool = True) -> T:
    """function() in the network namespace of descriptor `netns`, by a thread that has ended when this returns.

    Its result is returned, its exception raised. Raises NoEntry when the namespace may not be entered. `settle` waits
    until the kernel has let go of the thread, too, which only matters to who changes the process afterwards.
    """
    outcome: list[Any] = []

    def body() -> None:
        try:
            _enter(netns)
            outcome.extend((True, function()))
        except BaseException as e:  # handed to the caller's thread, which raises it
            outcome.extend((False, e))

    before = _thread_count() if settle else 0
    start_thread(body).join()
    if settle:
        _wait_for_threads(before)
    ok, value = outcome
    if ok:
        return value  # type: ignore[no-any-return]
    raise value


def start_thread(body: Callable[[], None]) -> threading.Thread:
    """A running thread for body(). Raises OSError if there can be no more of them."""
    thread = threading.Thread(target=body, name="netns", daemon=True)
    try:
        thread.start()
    except RuntimeError as e:  # what CPython makes of EAGAIN
        raise OSError(errno.EAGAIN, str(e)) from None
    return thread


class NoEntry(OSError):
    """The namespace may not be entered, or is none."""


def _enter(netns: int) -> None:
    try:
        setns(netns, CLONE_NEWNET)
    except OSError as e:
        raise NoEntry(e.errno, os.strerror(e.errno or 0)) from None


def _thread_count() -> int:
    with open("/proc/self/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[17])  # field 20, num_threads (proc(5))


def settle() -> None:
    """Wait until there is one thread only, as fork() wants it. All others must have been joined."""
    _wait_for_threads(1)


def _wait_for_threads(count: int) -> None:
    """Wait until the kernel has let go of ended threads.

    join() returns a moment before; setns(CLONE_NEWUSER) refuses, and fork() warns, as long as there are several.
    """
    deadline = time.monotonic() + _GONE_TIMEOUT
    while _thread_count() > count and time.monotonic() < deadline:
        time.sleep(0)


def path_of(name: str) -> str:
    """The file of --netns NAME|PATH: a bare name lies where ip-netns(8) keeps it."""
    return name if "/" in name else f"{NETNS_RUN_DIR}/{name}"


def open_ns(path: str, kind: int) -> int:
    """A descriptor of the file `path`, a namespace of a kind (CLONE_NEWNET ...). Raises OSError, EINVAL if not one."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) == kind:
            return fd
    except OSError:
        pass  # ENOTTY: no namespace at all
    os.close(fd)
    raise OSError(errno.EINVAL, "not a namespace of that kind")


def same_ns(fd: int, path: str) -> bool:
    """Whether `fd` is the namespace that `path` (for instance /proc/self/ns/user) refers to."""
    a, b = os.fstat(fd), os.stat(path)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
