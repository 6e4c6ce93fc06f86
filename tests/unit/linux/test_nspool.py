"""Sockets made in advance by the thread in the namespace, with the entering itself faked."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from passt.linux import netns, nspool
from passt.linux.netns import Namespace
from passt.linux.nspool import NsSockets
from passt.linux.syscall import CLONE_NEWNET

INET, INET6, TCP, UDP = socket.AF_INET, socket.AF_INET6, socket.SOCK_STREAM, socket.SOCK_DGRAM


class Inside:
    """Entering the namespace, and opening sockets there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered: list[tuple[int, int, int]] = []
        self.opened = 0
        self.limit = 1_000_000
        self.may_enter = True
        self._open = nspool.open_socket
        monkeypatch.setattr(netns, "setns", self._setns)
        monkeypatch.setattr(nspool, "open_socket", self._open_socket)

    def _setns(self, fd: int, kind: int) -> None:
        if not self.may_enter:
            raise PermissionError(errno.EPERM, "Operation not permitted")
        self.entered.append((fd, kind, threading.get_ident()))

    def _open_socket(self, family: int, kind: int) -> Any:
        assert self.entered[-1][2] == threading.get_ident(), "not by the thread that entered last"
        if self.opened == self.limit:
            raise OSError(errno.EMFILE, "Too many open files")
        self.opened += 1
        return self._open(family, kind)


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Inside:
    return Inside(monkeypatch)


@pytest.fixture
def pool(inside: Inside) -> Iterator[NsSockets]:
    namespace = Namespace(7)
    namespace.move_in()
    p = NsSockets(namespace, size=8)
    yield p
    p.close()
    namespace.leave()


def take(pool: NsSockets, count: int = 1, family: int = INET, kind: int = TCP) -> None:
    """Take sockets, one after the other, each time with the thread asleep, and close them."""
    for _ in range(count):
        pool.take(family, kind).close()
        pool.namespace.run(lambda: None)


@pytest.mark.parametrize("family", [INET, INET6])
@pytest.mark.parametrize("kind", [TCP, UDP])
@pytest.mark.usefixtures("inside")
def test_sockets_are_ready_to_use(pool: NsSockets, family: int, kind: int) -> None:
    s = pool.take(family, kind)
    assert (s.family, s.type) == (family, kind)
    assert type(s) is socket.SocketType
    assert not os.get_blocking(s.fileno()) and not os.get_inheritable(s.fileno())
    if kind == TCP:
        assert s.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
    s.close()


def test_nothing_is_opened_before_the_first_is_wanted(pool: NsSockets, inside: Inside) -> None:
    assert inside.opened == 0
    take(pool)
    assert inside.opened == 8
    assert [entry[:2] for entry in inside.entered] == [(7, CLONE_NEWNET)]
    assert inside.entered[0][2] != threading.get_ident()


def test_refilled_when_half_is_used(pool: NsSockets, inside: Inside) -> None:
    take(pool, 4)
    assert inside.opened == 8
    take(pool)
    assert inside.opened in (12, 13)  # before or after the fifth was popped


def test_kinds_have_pools_of_their_own(pool: NsSockets, inside: Inside) -> None:
    take(pool, family=INET)
    take(pool, family=INET6)
    take(pool, family=INET6, kind=UDP)
    assert inside.opened == 24


def test_descriptors_run_out_in_the_middle(pool: NsSockets, inside: Inside) -> None:
    inside.limit = 3
    take(pool, 3)
    with pytest.raises(OSError, match="Too many open files"):
        pool.take(INET, TCP)
    inside.limit = 5
    take(pool, 2)
    with pytest.raises(OSError, match="Too many open files"):
        pool.take(INET, TCP)


def test_before_the_thread_has_moved_in_each_batch_has_one_of_its_own(inside: Inside) -> None:
    pool = NsSockets(Namespace(7), size=8)
    take(pool, 4)
    assert (len(inside.entered), inside.opened) == (5, 8)  # one for the batch, one each for `take` above
    inside.may_enter = False
    for _ in range(4):
        pool.take(INET, TCP).close()  # what is there does
    for _ in range(2):
        with pytest.raises(netns.NoEntry):
            pool.take(INET, TCP)
    inside.may_enter = True
    take(pool)
    pool.close()


def test_last_socket_is_taken_while_the_batch_is_about_to_end(pool: NsSockets) -> None:
    """It has filled the pool and does not look again, yet it counts as asked for."""
    take(pool, 8)
    for sock in pool._pools[INET, TCP]:
        sock.close()
    pool._pools[INET, TCP].clear()
    pool._asked.add((INET, TCP))
    pool.namespace.post(lambda: pool._asked.discard((INET, TCP)))
    pool.take(INET, TCP).close()


def test_close_leaves_nothing_open(inside: Inside) -> None:
    before = os.listdir("/proc/self/fd")
    pool = NsSockets(Namespace(7))
    take(pool)
    take(pool, kind=UDP)
    pool.close()
    assert os.listdir("/proc/self/fd") == before
