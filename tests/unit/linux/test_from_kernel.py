"""Netlink sockets that others than the kernel write to: what they say is not read, and does not hold us up."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
import time
from typing import Any

import pytest

from passt.linux import from_kernel
from passt.linux.from_kernel import NLMSG_DONE, NLMSG_ERROR
from passt.linux.netlink import RTM_NEWLINK, Rtnetlink
from passt.linux.ports import DiagTables
from passt.wire.checksum import PROTO_TCP

FORGED = 4711


def message(kind: int, sequence: int, body: bytes = bytes(4), length: int | None = None) -> bytes:
    return struct.pack("=IHHII", 16 + len(body) if length is None else length, kind, 2, sequence, 0) + body


class Source:
    """A socket with these (datagram, port of the sender) in its queue, or an endless one."""

    def __init__(self, *waiting: tuple[bytes, int], endless: bool = False) -> None:
        self._waiting, self._endless = list(waiting), endless
        self.read = 0

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        self.read += 1
        if self._endless:
            return b"forged", (FORGED, 0)
        if not self._waiting:
            raise BlockingIOError(errno.EAGAIN, "empty")
        data, port = self._waiting.pop(0)
        return data, (port, 0)


def receive(source: Source, within: float = 60) -> bytes:
    sock: Any = source
    return from_kernel.receive(sock, 65536, time.monotonic() + within)


def test_the_kernels_datagram_is_found_among_others() -> None:
    assert receive(Source((b"forged", FORGED), (b"forged", 1), (b"true", 0))) == b"true"


def test_no_answer() -> None:
    with pytest.raises(TimeoutError, match="no answer of the kernel"):
        receive(Source((b"forged", FORGED)))


def test_a_flood_has_an_end() -> None:
    source = Source(endless=True)
    with pytest.raises(TimeoutError):
        receive(source)
    assert source.read == from_kernel.FOREIGN_MAX
    source = Source(endless=True)
    with pytest.raises(TimeoutError):
        receive(source, within=0)
    assert source.read == 1


def test_messages_are_split() -> None:
    first, second = message(1, 5, b"abcde"), message(2, 6)
    padded = first + bytes(3)
    assert from_kernel.split(padded + second) == [(1, 2, 5, first), (2, 2, 6, second)]
    assert from_kernel.split(b"short") == []


@pytest.mark.parametrize("length", [0, 1, 15, 21, 1 << 31, 0xFFFFFFFF])
def test_a_length_that_cannot_be(length: int) -> None:
    with pytest.raises(OSError, match="invalid length") as e:
        from_kernel.split(message(1, 5, length=length))
    assert e.value.errno == errno.EBADMSG


# Real sockets --------------------------------------------------------------------------------------------------------


def forger(protocol: int) -> socket.socket:
    """Root of the namespace may send to any netlink socket in it."""
    if os.geteuid() != 0:
        pytest.skip("to send to the sockets of others takes root")
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)


def disconnect(sock: socket.socket) -> int:
    """Undo `connect`, as if datagrams had come before it; returns the port."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), struct.pack("=HHII", socket.AF_UNSPEC, 0, 0, 0), 12) == 0
    port: int = sock.getsockname()[0]
    return port


def test_the_kernel_refuses_the_datagrams_of_others() -> None:
    tables = DiagTables()
    with Rtnetlink() as nl, forger(0) as to_route, forger(4) as to_diag:
        for sock, other in ((nl._sock, to_route), (tables._sock, to_diag)):
            with pytest.raises(ConnectionRefusedError):
                other.sendto(b"forged", (sock.getsockname()[0], 0))
    tables.close()


@pytest.mark.parametrize("length", [0, 20])
@pytest.mark.parametrize("kind", [RTM_NEWLINK, NLMSG_ERROR, NLMSG_DONE])
def test_forged_answers_are_not_believed(kind: int, length: int) -> None:
    with Rtnetlink() as nl, forger(0) as other:
        port = disconnect(nl._sock)
        for sequence in range(1, 4):
            other.sendto(message(kind, sequence, struct.pack("=i", -errno.EIO), length=length), (port, 0))
        began = time.monotonic()
        links = nl.links()
        assert sorted((link.index, link.name) for link in links) == sorted(socket.if_nameindex())
        assert time.monotonic() - began < 2


def test_a_flood_of_forged_answers_costs_the_request_and_not_the_process() -> None:
    done = threading.Event()
    with Rtnetlink() as nl, forger(0) as other:
        port = disconnect(nl._sock)
        other.setblocking(False)

        def forge() -> None:
            while not done.is_set():
                try:
                    other.sendto(message(RTM_NEWLINK, 1, length=0) * 200, (port, 0))
                except OSError:
                    time.sleep(0.0001)  # the queue is full

        thread = threading.Thread(target=forge)
        thread.start()
        try:
            nl.limit(0.3)
            began = time.monotonic()
            with pytest.raises(OSError, match=r"netlink: |buffer space"):  # noqa: PT012  # after any number of answers
                while True:
                    nl.links()
            assert time.monotonic() - began < 3
        finally:
            done.set()
            thread.join()


def test_forged_lists_of_sockets_are_not_believed() -> None:
    tables = DiagTables()
    with forger(4) as other, socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = disconnect(tables._sock)
        for sequence in range(1, 50):
            other.sendto(message(NLMSG_DONE, sequence), (port, 0))
        assert server.getsockname()[1] in tables.bound(PROTO_TCP)
    tables.close()


def test_an_empty_queue_does_not_block_for_long() -> None:
    with Rtnetlink() as nl:
        nl._seq = 1
        began = time.monotonic()
        with pytest.raises(TimeoutError):
            list(nl._answers())
        assert time.monotonic() - began < 2
