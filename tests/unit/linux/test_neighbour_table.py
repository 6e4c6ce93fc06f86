"""The neighbour table: messages against bytes, a scripted kernel, and the kernel's own table."""

from __future__ import annotations

import errno
import os
import socket
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.linux.host_tables import GROUP_NEIGHBOUR, NEIGHBOURS_READ_MAX, NeighbourTable
from passt.linux.rtnl_messages import Neighbour, neighbour_request, parse_neighbour

from .test_netlink import DONE, attribute, error, ip, message, u32

A4, A6, MAC = ip("192.0.2.77"), ip("fe80::77"), bytes.fromhex("525400000077")
REACHABLE, STALE, DELAY, PROBE, PERMANENT = 0x02, 0x04, 0x08, 0x10, 0x80
NONE, INCOMPLETE, FAILED = 0x00, 0x01, 0x20
V4, V6 = (socket.AF_INET, 3), (socket.AF_INET6, 3)
KERNEL, OTHER = 0, 4711
OVERFLOW = OSError(errno.ENOBUFS, "too many")


def neighbour(a: bytes = A4, mac: bytes = MAC, state: int = REACHABLE, index: int = 3, kind: int = 28) -> bytes:
    head = struct.pack("=BxxxiHBB", 2 if len(a) == 4 else 10, index, state, 0, 1)
    return message(kind, head + attribute(1, a) + attribute(2, mac) + attribute(3, bytes(16)))


class Kernel:
    """A socket: each request is noted, and what arrives is scripted."""

    def __init__(self, *arriving: bytes | OSError, port: int = KERNEL) -> None:
        self.arriving = list(arriving)
        self.port = port
        self.sent: list[tuple[int, int]] = []
        self.bound: tuple[int, int] | None = None
        self.connected: tuple[int, int] | None = None

    def bind(self, address: tuple[int, int]) -> None:
        self.bound = address

    def connect(self, address: tuple[int, int]) -> None:
        self.connected = address

    def fileno(self) -> int:
        return 7

    def send(self, data: bytes) -> None:
        self.sent.append((data[16], struct.unpack_from("=I", data, len(data) - 4)[0]))

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self.arriving:
            raise BlockingIOError
        found = self.arriving.pop(0)
        if isinstance(found, OSError):
            raise found
        return found[:size], (self.port, 0)


# Messages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [REACHABLE, STALE, DELAY, PROBE, PERMANENT])
@pytest.mark.parametrize("a", [A4, A6])
def test_parse(a: bytes, state: int) -> None:
    assert parse_neighbour(neighbour(a, state=state)) == Neighbour(3, a, MAC)


@pytest.mark.parametrize(
    "invalid",
    [
        *(neighbour(state=state) for state in (NONE, INCOMPLETE, FAILED)),
        neighbour(mac=b""),
        neighbour(mac=bytes(6)),
        neighbour(mac=bytes.fromhex("01005e000001")),  # a group, which the kernel maps without ARP
        neighbour(mac=bytes(4)),  # a tunnel's far end
        neighbour(mac=bytes(20)),  # InfiniBand
        neighbour(ip("fe80::1"))[:16] + b"\2" + neighbour(ip("fe80::1"))[17:],
        message(28, b"\7" + neighbour()[17:]),  # AF_BRIDGE
        message(28, b""),
        message(28, neighbour()[16:26]),
        message(28, neighbour()[16:28] + struct.pack("=HH", 3, 1)),
        message(28, neighbour()[16:28] + struct.pack("=HH", 99, 1)),
    ],
)
def test_no_neighbour(invalid: bytes) -> None:
    assert parse_neighbour(invalid) is None


@given(st.binary(max_size=80))
def test_any_bytes(data: bytes) -> None:
    found = parse_neighbour(data)
    assert found is None or (len(found.addr) in (4, 16) and len(found.mac) == 6)


def test_request() -> None:
    data = neighbour_request(V6)
    assert struct.unpack_from("=IHHII", data) == (len(data), 30, 0x301, 0, 0)
    assert data[16:28] == struct.pack("=BxxxiHBB", 10, 0, 0, 0, 0)
    assert data[28:] == attribute(8, u32(3))


# The socket --------------------------------------------------------------------------------------------------------


def test_a_member_of_one_group_that_hears_the_kernel_alone() -> None:
    sock = Kernel()
    table = NeighbourTable(sock)
    assert (sock.bound, sock.connected, table.fd) == ((0, GROUP_NEIGHBOUR), (0, 0), 7)
    assert (table.read(), table.more) == ([], False)


def test_tables_are_asked_for_one_after_the_other() -> None:
    sock = Kernel()
    table = NeighbourTable(sock)
    table.ask([V4, V6])
    assert (sock.sent, table.asking) == ([(2, 3)], True), "the kernel answers one request at a time"
    sock.arriving = [neighbour() + neighbour(ip("192.0.2.78")), neighbour(ip("192.0.2.79"))]
    assert [n.addr for n in table.read()] == [A4, ip("192.0.2.78"), ip("192.0.2.79")]
    assert len(sock.sent) == 1
    sock.arriving = [DONE, neighbour(A6), DONE]
    assert [n.addr for n in table.read()] == [A6]
    assert (sock.sent, table.asking) == ([(2, 3), (10, 3)], False)


def test_another_table_waits_for_the_end_of_the_first() -> None:
    sock = Kernel()
    table = NeighbourTable(sock)
    table.ask([V4, V6])
    table.ask([(socket.AF_INET, 9)])
    assert len(sock.sent) == 1
    sock.arriving = [DONE, DONE]
    table.read()
    assert (sock.sent, table.asking) == ([(2, 3), (2, 9)], False)
    table.ask([])
    assert (len(sock.sent), table.asking) == (2, False)


def test_what_is_no_news_of_a_neighbour() -> None:
    """A neighbour that is gone, one without an answer, another program's datagram."""
    sock = Kernel(neighbour(kind=29), neighbour(state=FAILED), message(16, bytes(16)))
    assert NeighbourTable(sock).read() == []
    assert NeighbourTable(Kernel(neighbour(), port=OTHER)).read() == []


def test_messages_that_were_too_many_are_made_up_for() -> None:
    sock = Kernel()
    table = NeighbourTable(sock)
    table.ask([V4, V6])
    sock.arriving = [DONE, DONE]
    table.read()
    sock.arriving = [OVERFLOW, neighbour(), DONE]
    assert [n.addr for n in table.read()] == [A4]
    assert sock.sent[2:] == [(2, 3), (10, 3)]


def test_one_reading_is_bounded() -> None:
    big = neighbour() * 400
    sock = Kernel(*[big] * 5)
    table = NeighbourTable(sock)
    first = table.read()
    assert table.more and NEIGHBOURS_READ_MAX <= len(first) * len(neighbour()) < NEIGHBOURS_READ_MAX + 2 * len(big)
    sock.arriving = [OVERFLOW] * 5000
    table.read()
    assert table.more and sock.arriving, "an overflow is not for nothing"


def test_errors_are_raised() -> None:
    sock = Kernel(error(errno.EBUSY))
    table = NeighbourTable(sock)
    table.ask([V4])
    with pytest.raises(OSError, match=os.strerror(errno.EBUSY)):
        table.read()
    assert not table.asking
    table.ask([V4])
    assert len(sock.sent) == 2, "it can be asked for again"
    sock.arriving = [PermissionError(errno.EPERM, "no")]
    with pytest.raises(PermissionError):
        table.read()
    sock.arriving = [struct.pack("=IHHII", 99, 28, 0, 0, 0)]
    with pytest.raises(OSError, match="invalid length"):
        table.read()


def test_the_real_table() -> None:
    """Of the loopback interface, which has no neighbours; the answers end."""
    table = NeighbourTable()
    try:
        index = socket.if_nametoindex("lo")
        table.ask([(socket.AF_INET, index), (socket.AF_INET6, index)])
        found: list[Any] = []
        for _ in range(10):
            found += table.read()
            if not table.asking:
                break
        assert not table.asking
        assert {n.link for n in found} <= {index}
    finally:
        table.close()
