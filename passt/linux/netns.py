"""Network namespaces: opening them, and running a function inside one.

setns(CLONE_NEWNET) moves one thread. The main thread therefore never leaves the host's namespace: another thread does
the work inside the other one (create the tap, configure it, open a socket). Its descriptors belong to the process and
stay usable. A return to the host's namespace would need rights there that an ordinary user does not have.

    phase                    thread                                                       needs
    -----------------------  -----------------------------------------------------------  ------------------------------
    start                    enters, runs the function, and ends (`run_in`): later steps  the right to enter
                             of the start need a single-threaded process
    run time                 has entered for good, and sleeps until it has a job          no right, and no system call
                             (`Namespace.move_in`)                                        for entering
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
from . import proc
from .syscall import CLONE_NEWNET, ioctl_number, setns

T = TypeVar("T")

NS_GET_USERNS = ioctl_number("\xb7", 1)
NS_GET_NSTYPE = ioctl_number("\xb7", 3)
_GONE_TIMEOUT = 5.0  # seconds; an ended thread needs microseconds to leave the process


def run_in(netns: int, function: Callable[[], T], *, settle: bool = True) -> T:
    """function() in the network namespace of descriptor `netns`, by a thread that has ended when this returns.

    Its result is returned, its exception raised. Raises NoEntry when the namespace may not be entered. `settle` waits
    until the kernel has removed the thread, too, which a later change of the whole process requires.
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
    """Pass the result or exception of function() to another thread."""
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
    """Start a thread for body(). Raises OSError at the limit of threads."""
    thread = threading.Thread(target=body, name="netns", daemon=True)
    try:
        thread.start()
    except RuntimeError as e:  # CPython's exception for EAGAIN
        raise OSError(errno.EAGAIN, str(e)) from None
    return thread


class Namespace:
    """A network namespace that functions can be run in. Its descriptor `fd` belongs to the caller."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def move_in(self, prepare: Callable[[], None] = lambda: None) -> None:
        """Start the thread that stays inside and runs all functions from now on; it calls prepare() first.

        The process must not fork any more. Raises OSError: NoEntry, that of prepare(), or at the limit of threads.
        """
        outcome: SimpleQueue[Any] = SimpleQueue()

        def start() -> None:
            signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # the loop handles them
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
        """Run function() inside; returns its result, raises its exception. Raises NoEntry as well."""
        if self._thread is None:
            return run_in(self.fd, function, settle=False)
        outcome: SimpleQueue[Any] = SimpleQueue()
        self._jobs.put(lambda: _do(function, outcome))
        return _result(outcome)  # type: ignore[no-any-return]

    def post(self, function: Callable[[], None]) -> None:
        """Queue function() as a job inside, after earlier jobs, without waiting. It should not raise.

        Before `move_in` this waits, and may raise NoEntry.
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
    except Exception as e:  # no caller waits for it, and the thread must go on with the next job
        log.err(f"In the network namespace: {e!r}")


class NoEntry(OSError):
    """The namespace may not be entered, or `fd` is not a namespace."""


def _enter(netns: int) -> None:
    try:
        setns(netns, CLONE_NEWNET)
    except OSError as e:
        raise NoEntry(e.errno, os.strerror(e.errno or 0)) from None


def _thread_count() -> int:
    with open("/proc/self/stat", "rb") as f:
        return int(f.read().rpartition(b")")[2].split()[17])  # field 20, num_threads (proc(5))


def settle() -> None:
    """Wait until the process is single-threaded, for fork(). All other threads must have been joined."""
    _wait_for_threads(1)


def _wait_for_threads(count: int) -> None:
    """Wait until the kernel has removed ended threads.

    join() returns a moment before; until then setns(CLONE_NEWUSER) fails and fork() warns.
    """
    deadline = time.monotonic() + _GONE_TIMEOUT
    while _thread_count() > count and time.monotonic() < deadline:
        time.sleep(0)


def path_of(name: str, run_dir: str) -> str:
    """The file of --netns NAME|PATH: a bare name is in `run_dir`."""
    return name if "/" in name else f"{run_dir.rstrip('/')}/{name}"


def open_ns(path: str, kind: int) -> int:
    """A descriptor of the file `path`, a namespace of a kind (CLONE_NEWNET ...). Raises OSError, EINVAL if not one."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if fcntl.ioctl(fd, NS_GET_NSTYPE) == kind:
            return fd
    except OSError:
        pass  # ENOTTY: not a namespace
    os.close(fd)
    raise OSError(errno.EINVAL, "not a namespace of that kind")


def rights_reach(path: str = "/proc/self/ns/net") -> bool:
    """Whether capabilities in our user namespace are rights over the network namespace `path`, by default our own.

    They are if its owner is our user namespace or one below it: then the kernel shows us the owner.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.close(fcntl.ioctl(fd, NS_GET_USERNS))
    except PermissionError:
        return False
    except OSError:  # ENOTTY: before Linux 4.9
        return proc.in_init_userns()
    finally:
        os.close(fd)
    return True


def same_ns(fd: int, path: str) -> bool:
    """Whether `fd` is the namespace that `path` (for instance /proc/self/ns/user) refers to."""
    a, b = os.fstat(fd), os.stat(path)
    return (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino)
