"""Bound ports, by sock_diag and by /proc/net: what means one, how much is read, and any bytes at all."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.linux.ports import DiagTables, Pinned, PortTables, ProcTables, open_tables, parse, parse_diag
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import free_ports

HEADER = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
TCP = HEADER + (
    b"   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  1000        0 638 1 0 100 0 0 10 0\n"
    b"   1: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 639 1 0 100 0 0 10 0\n"
    b"   2: 0100007F:9B6F 0100007F:1F90 01 00000000:00000000 00:00000000 00000000     0        0 640 1 0 20 4 30 10 0\n"
    b"   3: 0100007F:9B70 0100007F:1F90 06 00000000:00000000 03:000008A2 00000000     0        0 0 3 0\n"
)
TCP6 = HEADER + (
    b"   0: 00000000000000000000000000000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 "
    b"00:00000000 00000000     0        0 9 1 0 100 0 0 10 0\n"
)
UDP = HEADER + (
    b"  116: 00000000:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 34 2 0 0\n"
    b" 1165: 0100007F:8235 0100007F:0035 01 00000000:00000000 00:00000000 00000000     0        0 35 2 0 0\n"
)


def files(directory: Path, **texts: bytes) -> ProcTables:
    for name in ("tcp", "tcp6", "udp", "udp6"):
        (directory / name).write_bytes(texts.get(name, HEADER))
    return ProcTables(str(directory))


def test_listening_and_bound() -> None:
    assert parse(PROTO_TCP, TCP, set()) == {8080, 22}
    assert parse(PROTO_TCP, TCP6, set()) == {80}
    assert parse(PROTO_UDP, UDP, set()) == {68}


def test_states_are_those_of_the_protocol() -> None:
    assert parse(PROTO_UDP, TCP, set()) == parse(PROTO_TCP, UDP, set()) == set()


def test_port_0_is_none() -> None:
    assert parse(PROTO_TCP, TCP.replace(b":0016", b":0000"), set()) == {8080}


@given(st.binary() | st.lists(st.sampled_from(TCP.split(b" "))).map(b" ".join), st.sampled_from((PROTO_TCP, PROTO_UDP)))
def test_any_bytes_give_ports(text: bytes, proto: int) -> None:
    assert all(0 < port < 65536 for port in parse(proto, text, set()))


def test_families_are_joined(tmp_path: Path) -> None:
    tables = files(tmp_path, tcp=TCP, tcp6=TCP6, udp=UDP)
    assert (tables.bound(PROTO_TCP), tables.bound(PROTO_UDP)) == ({8080, 22, 80}, {68})
    tables.close()


def test_reading_again_shows_what_is_new(tmp_path: Path) -> None:
    tables = files(tmp_path)
    assert tables.bound(PROTO_TCP) == set()
    (tmp_path / "tcp").write_bytes(TCP)
    assert tables.bound(PROTO_TCP) == {8080, 22}
    tables.close()


def test_kernel_without_ipv6(tmp_path: Path) -> None:
    files(tmp_path).close()
    (tmp_path / "tcp6").unlink()
    (tmp_path / "udp6").unlink()
    (tmp_path / "tcp").write_bytes(TCP)
    tables = ProcTables(str(tmp_path))
    assert tables.bound(PROTO_TCP) == {8080, 22}
    tables.close()


def test_without_proc_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_bytes(TCP)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        ProcTables(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_connections_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read gives one line here, as if it were a page: the first that is not listening is the last one read."""
    line = 4096
    lines = b"".join(x.rstrip(b"\n").ljust(line - 1) + b"\n" for x in TCP.splitlines())
    tables = files(tmp_path, tcp=lines, udp=lines)
    reads: list[int] = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        reads.append(offset // line)
        return real(fd, line, offset)

    real = os.pread
    monkeypatch.setattr(os, "pread", pread)
    (tmp_path / "tcp6").write_bytes(b"")
    assert tables.bound(PROTO_TCP) == {8080, 22}
    assert reads == [0, 1, 2, 3, 0]
    reads.clear()
    (tmp_path / "udp6").write_bytes(UDP)
    tables.bound(PROTO_UDP)
    assert reads == [0, 1, 2, 3, 4, 5, 0]  # up to the end, which a short part tells
    tables.close()


# sock_diag -----------------------------------------------------------------------------------------------------------


def message(kind: int, rest: bytes, sequence: int = 7) -> bytes:
    return struct.pack("=IHHII", 16 + len(rest), kind, 2, sequence, 0) + rest


def socket_message(port: int, sequence: int = 7) -> bytes:
    """struct inet_diag_msg, with an attribute of one byte (INET_DIAG_SHUTDOWN) and its padding."""
    attribute = struct.pack("=HHBxxx", 5, 8, 0)
    return message(20, b"\x02\x0a\x00\x00" + port.to_bytes(2, "big") + bytes(66) + attribute, sequence)


DONE = message(3, bytes(4))
ENOENT = message(2, struct.pack("=i", -2) + bytes(16))


@pytest.mark.parametrize(
    ("data", "ports", "last"),
    [
        (socket_message(80) + socket_message(443), {80, 443}, False),
        (socket_message(80) + DONE, {80}, True),
        (DONE + socket_message(80), set(), True),
        (b"", set(), False),
        (socket_message(80, sequence=6) + message(3, bytes(4), sequence=6), set(), False),  # of another dump
        (message(20, bytes(4)), set(), False),
        (message(99, bytes(60)), set(), False),
        (socket_message(80)[:-4], set(), False),
        (socket_message(80) + bytes(20), {80}, False),
    ],
)
def test_parts_of_a_dump(data: bytes, ports: set[int], last: bool) -> None:
    found: set[int] = set()
    assert parse_diag(data, 7, found, set()) == last
    assert found == ports


def test_refusal() -> None:
    with pytest.raises(FileNotFoundError, match="sock_diag"):
        parse_diag(ENOENT, 7, set(), set())


@given(st.binary() | st.lists(st.sampled_from([socket_message(80), DONE, ENOENT, b"\x10", bytes(3)])).map(b"".join))
def test_any_bytes_give_ports_or_an_error(data: bytes) -> None:
    found: set[int] = set()
    try:
        parse_diag(data, 7, found, set())
    except OSError:
        pass  # the kernel says so
    assert all(0 <= port < 65536 for port in found)


def test_kernel_without_ipv6_by_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    real = DiagTables._dump

    def dump(self: DiagTables, family: int, proto: int, ports: set[int], pinned: Pinned) -> None:
        if family == socket.AF_INET6:
            parse_diag(ENOENT, 7, ports, pinned)
        real(self, family, proto, ports, pinned)

    monkeypatch.setattr(DiagTables, "_dump", dump)
    tables = DiagTables()
    with socket.create_server(("127.0.0.1", 0)) as s:
        assert s.getsockname()[1] in tables.bound(PROTO_TCP)
    tables.close()


def test_files_do_where_there_is_no_sock_diag(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = open_tables()
    assert isinstance(tables, DiagTables)
    tables.close()
    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(DiagTables, "_dump", lambda self, *args: parse_diag(ENOENT, 7, set(), set()))
    with pytest.raises(FileNotFoundError):
        DiagTables()
    assert len(os.listdir("/proc/self/fd")) == before
    tables = open_tables()
    assert isinstance(tables, ProcTables)
    tables.close()


# Both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [DiagTables, ProcTables])
@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")])
def test_against_the_kernel(kind: Callable[[], PortTables], family: int, address: str) -> None:
    tables = kind()
    udp_kind = socket.SOCK_DGRAM
    with socket.socket(family) as t, socket.socket(family, udp_kind) as u, socket.socket(family, udp_kind) as c:
        for port, s in enumerate((t, u, c), free_ports(3)):
            s.bind((address, port))
        tcp, udp, connected = (s.getsockname()[1] for s in (t, u, c))
        assert tcp not in tables.bound(PROTO_TCP)
        t.listen()
        c.connect(u.getsockname())
        assert tcp in tables.bound(PROTO_TCP)
        assert udp in tables.bound(PROTO_UDP)
        assert connected not in tables.bound(PROTO_UDP)
    tables.close()


@pytest.mark.parametrize("kind", [DiagTables, ProcTables])
def test_many_ports(kind: Callable[[], PortTables]) -> None:
    """More than one part of a dump, or of a file, holds."""
    tables = kind()
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(400)]
    try:
        assert {s.getsockname()[1] for s in servers} <= tables.bound(PROTO_TCP)
    finally:
        for s in servers:
            s.close()
        tables.close()


@pytest.mark.parametrize("kind", [DiagTables, ProcTables])
def test_loopback_addresses_of_their_own(kind: Callable[[], PortTables]) -> None:
    """A port counts as bound if it is bound anywhere else, too."""
    tables = kind()
    port = free_ports(2)
    with socket.create_server(("127.0.0.53", port)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.53", port + 1))
        assert port not in tables.bound(PROTO_TCP)
        assert (bytes((127, 0, 0, 53)), port) in tables.pinned(PROTO_TCP)
        assert udp.getsockname()[1] not in tables.bound(PROTO_UDP)
        assert (bytes((127, 0, 0, 53)), udp.getsockname()[1]) in tables.pinned(PROTO_UDP)
        with socket.create_server(("127.0.0.1", port)):
            assert port in tables.bound(PROTO_TCP)
            assert (bytes((127, 0, 0, 53)), port) in tables.pinned(PROTO_TCP)
    tables.bound(PROTO_TCP)
    assert all(p != port for _, p in tables.pinned(PROTO_TCP))
    tables.close()


def test_an_error_of_any_number() -> None:
    data = struct.pack("=IHHIIi", 20, 2, 2, 1, 0, -(1 << 31))
    with pytest.raises(OSError, match="sock_diag"):
        parse_diag(data, 1, set(), set())
