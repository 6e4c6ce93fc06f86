"""The tables of the host, read for real and from a scripted socket; and the monitor, of a scripted kernel."""

from __future__ import annotations

import errno
import socket
import struct
from typing import Any

import pytest

from passt.linux import host_tables
from passt.linux.host_tables import DRAIN_MAX, GROUPS, HostTables, Monitor
from passt.linux.routes import Host

from .test_netlink import (
    DONE,
    RTA_DST,
    RTA_GATEWAY,
    RTA_OIF,
    RTA_TABLE,
    attribute,
    default_via,
    error,
    ip,
    message,
    rtmsg,
    scripted,
    u32,
)

KERNEL, OTHER = 0, 4711


class Groups:
    """A socket of the monitor: what arrives is a port, an error, or nothing."""

    def __init__(self, *arriving: int | OSError) -> None:
        self.arriving = list(arriving)
        self.bound: tuple[int, int] | None = None
        self.connected: tuple[int, int] | None = None
        self.received = 0

    def bind(self, address: tuple[int, int]) -> None:
        self.bound = address

    def connect(self, address: tuple[int, int]) -> None:
        self.connected = address

    def fileno(self) -> int:
        return 7

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        assert size == 1, "its contents are not read"
        self.received += 1
        if not self.arriving:
            raise BlockingIOError
        found = self.arriving.pop(0)
        if isinstance(found, OSError):
            raise found
        return b"x", (found, GROUPS)


def test_monitor_is_a_member_of_the_groups_and_hears_the_kernel_alone() -> None:
    sock = Groups()
    monitor = Monitor(sock)
    assert (sock.bound, sock.connected, monitor.fd) == ((0, GROUPS), (0, 0), 7)


@pytest.mark.parametrize(
    ("arriving", "changed"),
    [
        ([], False),
        ([KERNEL], True),
        ([OTHER], False),  # before the socket was connected
        ([OTHER, KERNEL, OTHER], True),
        ([OSError(errno.ENOBUFS, "too many")], True),
    ],
)
def test_drain(arriving: list[int | OSError], changed: bool) -> None:
    sock = Groups(*arriving)
    assert Monitor(sock).drain() is changed
    assert not sock.arriving


def test_drain_is_bounded() -> None:
    sock = Groups(*[KERNEL] * (DRAIN_MAX + 5))
    assert Monitor(sock).drain()
    assert (len(sock.arriving), sock.received) == (5, DRAIN_MAX)


def test_an_error_of_the_monitor_is_raised() -> None:
    with pytest.raises(PermissionError):
        Monitor(Groups(PermissionError(errno.EPERM, "no"))).drain()


def test_tables_that_are_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading is given up, and the former tables are the last ones."""
    tables = HostTables()
    try:
        with pytest.raises(OSError, match="takes too long"):
            tables.read(0.0)
        assert tables.last == Host()
        assert tables.read().named("lo") and tables.last.named("lo")
    finally:
        tables.close()


def test_the_monitor_is_closed_if_there_is_no_other_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[socket.socket] = []
    real = socket.socket

    def make(*args: Any, **kw: Any) -> Any:
        if made:
            raise OSError(errno.EMFILE, "full")
        made.append(real(*args, **kw))
        return made[0]

    monkeypatch.setattr(socket, "socket", make)
    with pytest.raises(OSError, match="full"):
        HostTables()
    assert made[0].fileno() == -1


def test_the_real_tables() -> None:
    host = host_tables.read_host()
    lo = host.named("lo")
    assert lo
    assert (lo.loopback, lo.mac) == (True, bytes(6))
    assert host.link(lo.index) is lo
    assert all(h.index for r in (*host.routes4, *host.routes6) for h in r.hops)


def test_default_routes_of_other_tables_stand_in_for_those_of_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def via(gateway: str, table: int) -> bytes:
        body = rtmsg(2, 0, table=0 if table > 255 else table) + attribute(RTA_TABLE, u32(table))
        return message(24, body + attribute(RTA_GATEWAY, ip(gateway)) + attribute(RTA_OIF, u32(2)))

    def rule(priority: int, table: int) -> bytes:
        head = struct.pack("=BBBBBxxBI", 2, 0, 0, 0, 0, 1, 0)
        return message(32, head + attribute(6, u32(priority)) + attribute(15, u32(table)))

    net = message(24, rtmsg(2, 24) + attribute(RTA_DST, ip("192.0.2.0")) + attribute(RTA_OIF, u32(2)))
    everything = [via("192.0.2.9", 9) + via("192.0.2.5", 1000) + via("192.0.2.7", 7) + net, DONE]
    rules = [rule(20, 9) + rule(10, 1000) + rule(0, 255) + rule(32766, 254), DONE]
    nl, _ = scripted(monkeypatch, [net, DONE], rules, everything)
    main, first, second = host_tables.host_routes(nl, v6=False)
    assert (main.prefix_len, first.hops[0].gateway, second.hops[0].gateway) == (24, ip("192.0.2.5"), ip("192.0.2.9"))
    nl, script = scripted(monkeypatch, [default_via("192.0.2.1"), DONE])
    assert len(host_tables.host_routes(nl, v6=False)) == len(script.sent) == 1


def test_a_kernel_without_routing_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, _ = scripted(monkeypatch, [DONE], [error(errno.EOPNOTSUPP)])
    assert host_tables.host_routes(nl, v6=False) == ()
