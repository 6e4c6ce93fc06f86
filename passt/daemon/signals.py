"""Signals that end the process (SIGTERM, SIGINT, SIGQUIT): it ends within a second in every state, with its paths
removed. A signal that was ignored at start (nohup, a background job) stays ignored.

    state                                          a signal
    ---------------------------------------------  -------------------------------------------------------------------
    before the program has made anything           ends it as the kernel does: options, files, pipes without a reader
    pasta, until the loop's handlers are in place  likewise. The kernel closes everything; the first process of a
                                                   spawned namespace ends with the pipe to pasta
    passt, as soon as its socket exists            is raised in whatever step is going on (`Ended`), also one that
                                                   waits; paths are removed; status 0 in the foreground
    the process that waits for its daemon          the same, and the daemon is ended. It dies by the signal, since
                                                   status 0 would mean that the daemon runs
    the loop                                       is handled by it (`common.End`). A write to standard error that
                                                   blocks is given up, also one of the last lines (`log.give_up`), and
                                                   so is a call that another process holds up (`Reactor.write`)
    the loop, with a command                       likewise, once the command has ended (`namespace/supervisor.py`): one
                                                   that handles SIGTERM has up to GRACE for it

Steps that a signal cannot end are those in the kernel that wait for a file system, once the loop runs: a hanging FUSE
or NFS mount below the directory of resolv.conf, of a file that an option names, or that a machine shares as its memory.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)
ENDING = (signal.SIGTERM, *FROM_TERMINAL)


class Ended(BaseException):
    """A signal came; its number. Not an Exception: no step may take it for a failure of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def raising() -> Iterator[None]:
    """Let a signal raise Ended, once, where the main thread is. Handlers that the block installs stay."""
    before = {number: signal.getsignal(number) for number in ENDING}
    taken = [number for number, handler in before.items() if handler != signal.SIG_IGN]

    def end(number: int, _: FrameType | None) -> NoReturn:
        for one in taken:
            signal.signal(one, signal.SIG_IGN)  # another one must not interrupt the undoing
        raise Ended(number)

    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            if signal.getsignal(number) is end:
                signal.signal(number, before[number])


@contextmanager
def held() -> Iterator[None]:
    """Hold signals back for a short step that must not be left half done."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def die(number: int) -> NoReturn:
    """End by the signal, as if it had not been handled."""
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # it is blocked
