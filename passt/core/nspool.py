"""Sockets of the guest's network namespace, made in advance.

A socket belongs to the namespace that the thread which opened it was in. The main thread stays in the host's, so a
thread that lives for a moment enters the namespace and opens a batch; `take` is then a pop from a list. When half of
a batch is used up the next thread starts, and the loop goes on meanwhile.

    time                             cost
    -------------------------------  --------------------------------------------
    take, pool not empty             a list access
    take, pool empty                 waiting for the thread: about 0.3 ms
    nothing is forwarded             nothing: the first `take` fills the pool

Only in a namespace that we may not enter (any more) does it fail, with the error of setns(2).
"""

from __future__ import annotations

import socket
import threading
from functools import partial
from typing import Any

from ..linux.netns import start_thread
from ..linux.syscall import CLONE_NEWNET, setns

POOL_SIZE = 128  # sockets of each kind; C10K-like rates use up some fifty batches a second
Kind = tuple[int, int]  # address family, socket type

new_socket = socket.SocketType  # the C type: making its subclass `socket.socket` costs as much again


def open_socket(family: int, kind: int) -> Any:
    """A non-blocking socket of `family` and `kind` (SOCK_STREAM, SOCK_DGRAM). Raises OSError.

    A stream forwards what others have cut already: TCP_NODELAY, and the urgent byte is one of the stream.
    """
    sock = new_socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return sock


class NsSockets:
    """The pools of one namespace, by kind of socket."""

    def __init__(self, netns: int, size: int = POOL_SIZE) -> None:
        self._netns = netns
        self._size = size
        self._pools: dict[Kind, list[Any]] = {}
        self._threads: dict[Kind, threading.Thread] = {}
        self._errors: dict[Kind, OSError] = {}

    def take(self, family: int, kind: int) -> Any:
        """A fresh socket as `open_socket` makes it, in the namespace. Raises OSError."""
        key = family, kind
        pool = self._pools.setdefault(key, [])
        if len(pool) <= self._size // 2:
            self._refill(key)
            while not pool:
                self._wait(key)
        return pool.pop()

    def _refill(self, key: Kind) -> None:
        thread = self._threads.get(key)
        if thread is None or not thread.is_alive():
            self._errors.pop(key, None)
            try:
                self._threads[key] = start_thread(partial(self._fill, key))
            except OSError as e:
                self._errors[key] = e

    def _wait(self, key: Kind) -> None:
        """Until the thread has ended. Raises what it ended with if there is nothing even then."""
        thread = self._threads.pop(key, None)
        if thread is not None:
            thread.join()
        if not self._pools[key]:
            error = self._errors.pop(key, None)
            if error is not None:
                raise error
            self._refill(key)  # its last socket was taken while it was about to end

    def _fill(self, key: Kind) -> None:
        """In the thread: enter, open until the pool is full or something fails."""
        family, kind = key
        pool = self._pools[key]
        try:
            setns(self._netns, CLONE_NEWNET)
            for _ in range(self._size - len(pool)):
                pool.append(open_socket(family, kind))
        except OSError as e:
            self._errors[key] = e

    def close(self) -> None:
        """Close what was not taken."""
        for thread in self._threads.values():
            thread.join()
        for pool in self._pools.values():
            while pool:
                pool.pop().close()
