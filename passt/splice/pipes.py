"""Pipes to splice through, kept for the next user.

A pipe is borrowed only while bytes may lie in it, so a few serve thousands of connections. It holds up to PIPE_SIZE
bytes, or a number of buffers (one per 4096 of them) if these are less. An ordinary user may have larger pipes than the
default only up to fs.pipe-user-pages-soft in all (64 MiB); the ones beyond are small, which costs speed and nothing
else. What came back with bytes in it is closed, never used again.
"""

from __future__ import annotations

import fcntl
import os

from .. import PASTA
from ..calls import calls, one_of

PIPE_SIZE = 1 << 20  # bytes: fs.pipe-max-size, which no ordinary user may exceed, is that by default
IDLE_MAX = 32  # pipes kept open while nobody uses them

Pipe = tuple[int, int]  # descriptors: to read from, to write to
_F_SETPIPE_SZ = getattr(fcntl, "F_SETPIPE_SZ", 1031)

CALLS = (*calls("pipe2", "close", mode=PASTA), *one_of("fcntl", 1, _F_SETPIPE_SZ, mode=PASTA))


class PipePool:
    """Pipes, all non-blocking."""

    def __init__(self) -> None:
        self._idle: list[Pipe] = []

    def take(self) -> Pipe:
        """An empty pipe. Raises OSError when no descriptors are left."""
        if self._idle:
            return self._idle.pop()
        pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            fcntl.fcntl(pipe[1], _F_SETPIPE_SZ, PIPE_SIZE)
        except OSError:
            pass  # EPERM, EBUSY: the limits above; it works as it is
        return pipe

    def give_back(self, pipe: Pipe, held: int) -> None:
        """Return a pipe in which `held` bytes are left."""
        if held or len(self._idle) >= IDLE_MAX:
            os.close(pipe[0])
            os.close(pipe[1])
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            for fd in self._idle.pop():
                os.close(fd)
