"""Sockets of the guest's network namespace, opened in advance.

A socket belongs to the namespace of the thread that opens it. The main thread stays in the host's; another thread is
inside (`linux/netns.py`) and opens batches on request. `take` is then a pop from a list. When half of a batch is used
up, the next one is requested, and the loop goes on meanwhile.

    time                             cost
    -------------------------------  --------------------------------------------
    take, pool not empty             a list access
    take, pool empty                 waiting for the thread: about 0.3 ms
    no `take` yet                    none: the first `take` fills the pool
"""

from __future__ import annotations

import socket
from functools import partial
from typing import Any

from .netns import Namespace
from .sockopt import setting

POOL_SIZE = 128  # sockets of each kind; C10K-like rates use up some fifty batches a second
Kind = tuple[int, int]  # address family, socket type

CALLS = setting((socket.IPPROTO_TCP, socket.TCP_NODELAY), (socket.SOL_SOCKET, socket.SO_OOBINLINE))

new_socket = socket.SocketType  # the C type: an instance of its subclass `socket.socket` costs twice as much


def open_socket(family: int, kind: int) -> Any:
    """A non-blocking socket of `family` and `kind` (SOCK_STREAM, SOCK_DGRAM). Raises OSError.

    A stream socket forwards segments at once (TCP_NODELAY), with urgent data in line.
    """
    sock = new_socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    if kind == socket.SOCK_STREAM:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    return sock


class NsSockets:
    """The pools of one namespace, by kind of socket."""

    def __init__(self, namespace: Namespace, size: int = POOL_SIZE) -> None:
        self.namespace = namespace
        self._size = size
        self._pools: dict[Kind, list[Any]] = {}
        self._asked: set[Kind] = set()  # a batch is on its way
        self._errors: dict[Kind, OSError] = {}

    def take(self, family: int, kind: int) -> Any:
        """A fresh socket as `open_socket` makes it, in the namespace. Raises OSError."""
        key = family, kind
        pool = self._pools.setdefault(key, [])
        if len(pool) <= self._size // 2:
            self._ask(key)
            while not pool:
                self._wait(key)
        return pool.pop()

    def _ask(self, key: Kind) -> None:
        if key not in self._asked:
            self._errors.pop(key, None)
            self._asked.add(key)
            try:
                self.namespace.post(partial(self._fill, key))
            except OSError as e:
                self._asked.discard(key)
                self._errors[key] = e

    def _wait(self, key: Kind) -> None:
        """Wait for the batch. Raises its error if the pool is still empty."""
        if key in self._asked:
            self.namespace.run(_nothing)  # a job after the batch
        if not self._pools[key]:
            error = self._errors.pop(key, None)
            if error is not None:
                raise error
            self._ask(key)  # all of its sockets were taken before its end

    def _fill(self, key: Kind) -> None:
        """In the thread inside: open sockets until the pool is full or a call fails."""
        pool = self._pools[key]
        try:
            for _ in range(self._size - len(pool)):
                pool.append(open_socket(*key))
        except OSError as e:
            self._errors[key] = e
        finally:
            self._asked.discard(key)

    def close(self) -> None:
        """Close unused sockets."""
        self.namespace.run(_nothing)
        for pool in self._pools.values():
            while pool:
                pool.pop().close()


def _nothing() -> None:
    """A job that ends after all earlier jobs."""
