"""/proc/net/{tcp,tcp6,udp,udp6}: which lines mean a bound port, how much is read, and any bytes at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.linux import ports
from passt.linux.ports import PortTables, parse
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

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


def files(directory: Path, **texts: bytes) -> PortTables:
    for name in ("tcp", "tcp6", "udp", "udp6"):
        (directory / name).write_bytes(texts.get(name, HEADER))
    return PortTables(str(directory))


def test_listening_and_bound() -> None:
    assert parse(PROTO_TCP, TCP) == {8080, 22}
    assert parse(PROTO_TCP, TCP6) == {80}
    assert parse(PROTO_UDP, UDP) == {68}


def test_states_are_those_of_the_protocol() -> None:
    assert parse(PROTO_UDP, TCP) == parse(PROTO_TCP, UDP) == set()


def test_port_0_is_none() -> None:
    assert parse(PROTO_TCP, TCP.replace(b":0016", b":0000")) == {8080}


@given(st.binary() | st.lists(st.sampled_from(TCP.split(b" "))).map(b" ".join), st.sampled_from((PROTO_TCP, PROTO_UDP)))
def test_any_bytes_give_ports(text: bytes, proto: int) -> None:
    assert all(0 < port < 65536 for port in parse(proto, text))


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
    tables = PortTables(str(tmp_path))
    assert tables.bound(PROTO_TCP) == {8080, 22}
    tables.close()


def test_without_proc_nothing_stays_open(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_bytes(TCP)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(FileNotFoundError):
        PortTables(str(tmp_path))
    assert os.listdir("/proc/self/fd") == before


def test_connections_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read gives one line here, as if it were a page: the first that is not listening is the last one read."""
    line = len(TCP.splitlines(keepends=True)[1])
    lines = [x.rstrip(b"\n").ljust(line - 1) + b"\n" for x in TCP.splitlines()]
    tables = files(tmp_path, tcp=b"".join(lines), udp=b"".join(lines))
    reads: list[int] = []

    def pread(fd: int, size: int, offset: int) -> bytes:
        reads.append(offset // line)
        return real(fd, line, offset)

    real = os.pread
    monkeypatch.setattr(ports.os, "pread", pread)
    (tmp_path / "tcp6").write_bytes(b"")
    assert tables.bound(PROTO_TCP) == {8080, 22}
    assert reads == [0, 1, 2, 3, 0]
    reads.clear()
    tables.bound(PROTO_UDP)
    assert reads[:6] == [0, 1, 2, 3, 4, 5]
    tables.close()


def test_against_the_kernel() -> None:
    tables = PortTables()
    with socket.socket() as t, socket.socket(type=socket.SOCK_DGRAM) as u, socket.socket(type=socket.SOCK_DGRAM) as c:
        for s in (t, u, c):
            s.bind(("127.0.0.1", 0))
        tcp, udp, connected = (s.getsockname()[1] for s in (t, u, c))
        assert tcp not in tables.bound(PROTO_TCP)
        t.listen()
        c.connect(u.getsockname())
        assert tcp in tables.bound(PROTO_TCP)
        assert udp in tables.bound(PROTO_UDP)
        assert connected not in tables.bound(PROTO_UDP)
    tables.close()
