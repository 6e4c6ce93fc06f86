"""Network namespaces: opening them, and running a function inside one.

setns(CLONE_NEWNET) moves one thread. The main thread therefore never leaves the host's namespace: what must be done
in the other one (create the tap, configure it, open a socket) is done by another thread. What it opened belongs to the
process and stays usable. Returning to the host's namespace would need rights there that an ordinary user does not have.

    when                     who                                                          needs
    -----------------------  -----------------------------------------------------------  ------------------------------
    at start                 a thread that enters, does it, and ends (`run_in`): what     the right to enter
                             changes the whole process needs it to be single-threaded
    while the loop turns     one thread that has entered for good, and sleeps until it    nothing: neither a right nor
                             is given something to do (`Namespace.move_in`)               the system calls of entering
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeVar

from .. import log
from .syscall import CLONE_NEWNET, ioctl_number, setns

T = TypeVar("T")

NS_GET_NSTYPE = ioctl_number("\xb7", 3)
_GONE_TIMEOUT = 5.0  # seconds; an ended thread needs microseconds to leave the process


def run_in(netns: int, function: Callable[[], T], *, settle: bool = True) -> T:
    """function() in the network namespace of descriptor `netns`, by a thread that has ended when this returns.

    Its result is returned, its exception raised. Raises NoEntry when the namespace may not be entered. `settle` waits
    until the kernel has let go of the thread, too, which only matters to who changes the process afterwards.
    """
    outcome: SimpleQueue[Any] = SimpleQueue()

    def entered() -> T:
        _enter(netns)
        return function()

    before = _thread_count() if settle else 0
    _start_thread(lambda: _do(entered, outcome)).join()
    if settle:
        _wait_for_threads(before)
    return _result(outcome)  # type: ignore[no-any-return]


def _do(function: Callable[[], Any], outcome: SimpleQueue[Any]) -> None:
    """In one thread: hand what function() returns or raises to another one."""
    try:
        outcome.put((True, function()))
    except BaseException as e:  # raised by `_result`
        outcome.put((False, e))


def _result(outcome: SimpleQueue[Any]) -> Any:
    ok, value = outcome.get()
    if ok:
        return value
    raise value


def _start_thread(body: Callable[[], None]) -> threading.Thread:
    """A running thread for body(). Raises OSError if there can be no more of them."""
    thread = threading.Thread(target=body, name="netns", daemon=True)
    try:
        thread.start()
    except RuntimeError as e:  # what CPython makes of EAGAIN
        raise OSError(errno.EAGAIN, str(e)) from None
    return thread


class Namespace:
    """A network namespace that functions can be run in: `fd` is its descriptor, which stays the caller's."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def move_in(self, prepare: Callable[[], None] = lambda: None) -> None:
        """From now on one thread, which stays inside, does everything; it calls prepare() first.

        The process must not fork any more. Raises OSError: NoEntry, what prepare() raises, or for want of a thread.
        """
        outcome: SimpleQueue[Any] = SimpleQueue()

        def start() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the loop
            _enter(self.fd)
            prepare()

        def body() -> None:
            _do(start, outcome)
            while (job := self._jobs.get()) is not None:
                job()

        thread = _start_thread(body)
        try:
            _result(outcome)
        except BaseException:
            self._jobs.put(None)
            raise
        self._thread = thread

    def run(self, function: Callable[[], T]) -> T:
        """function() inside: its result is returned, its exception raised. Raises NoEntry as well."""
        if self._thread is None:
            return run_in(self.fd, function, settle=False)
        outcome: SimpleQueue[Any] = SimpleQueue()
        self._jobs.put(lambda: _do(function, outcome))
        return _result(outcome)  # type: ignore[no-any-return]

    def post(self, function: Callable[[], None]) -> None:
        """Have function() done inside, after what was asked for before it, and do not wait. It should not raise.

        Before `move_in` it is waited for, and NoEntry may be raised.
        """
        if self._thread is None:
            self.run(lambda: _guarded(function))
        else:
            self._jobs.put(lambda: _guarded(function))

    def leave(self) -> None:
        """End the thread, if there is one."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _guarded(function: Callable[[], None]) -> None:
    try:
        function()
    except Exception as e:  # nobody waits for it, and the next job must find the thread alive
        log.err(f"In the network namespace: {e!r}")


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


def path_of(name: str, run_dir: str) -> str:
    """The file of --netns NAME|PATH: a bare name lies in `run_dir`."""
    return name if "/" in name else f"{run_dir.rstrip('/')}/{name}"


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
