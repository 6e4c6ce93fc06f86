"""A pool of pipes for splice(2).

A half of a connection borrows a pipe only while bytes may be in it, so a few pipes serve thousands of connections. A
pipe holds up to PIPE_SIZE bytes, in at most one buffer per 4096 of them; one splice(2) moves no more (`splice/tcp.py`).
The bytes on their way are limited rather by the buffers of the sockets (`BUFFER_SIZE`, there). The enlarged pipes of an
ordinary user take at most fs.pipe-user-pages-soft in all (64 MiB); further pipes have the default size, which only
costs speed. A pipe that is given back with bytes in it is closed.
"""

from __future__ import annotations

import fcntl
import os
from typing import Final

from .. import PASTA
from ..calls import calls, one_of

PIPE_SIZE: Final = 1 << 20  # bytes: the default of fs.pipe-max-size, which is the limit of ordinary users
IDLE_MAX: Final = 32  # idle pipes kept open

Pipe = tuple[int, int]  # descriptors: to read from, to write to
_F_SETPIPE_SZ: Final = getattr(fcntl, "F_SETPIPE_SZ", 1031)

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
            pass  # EPERM, EBUSY: the limits above; the default size works
        return pipe

    def give_back(self, pipe: Pipe, held: int) -> None:
        """Give back a pipe in which `held` bytes are left."""
        if held or len(self._idle) >= IDLE_MAX:
            os.close(pipe[0])
            os.close(pipe[1])
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close idle pipes."""
        while self._idle:
            for fd in self._idle.pop():
                os.close(fd)
