"""TCP_INFO and SO_MEMINFO of the running kernel, and of kernels that have less of them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from struct import Struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.linux import tcpinfo
from passt.linux.sockopt import SO_MEMINFO, SO_PEEK_OFF
from passt.linux.tcpinfo import BYTES_ACKED, MIN_RTT, SND_WND, Features, probe, send_buffer

ALL = Features()


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A connection over loopback."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        accepted, _ = server.accept()
        with accepted:
            yield client, accepted


def test_fields_of_the_running_kernel(pair: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = pair
    client.sendall(bytes(1000))
    assert accepted.recv(1000, socket.MSG_WAITALL) == bytes(1000)
    accepted.sendall(b"x")
    assert client.recv(1) == b"x"  # its segment acknowledged everything
    features, info = probe(), tcpinfo.tcp_info(client)
    if features.bytes_acked:
        assert tcpinfo.u64(info, BYTES_ACKED) == 1001  # the SYN counts
    if features.min_rtt:
        assert 0 < tcpinfo.u32(info, MIN_RTT) < 1_000_000
    if features.snd_wnd:
        assert 1000 < tcpinfo.u32(info, SND_WND) <= 1 << 30
    assert len(info) <= tcpinfo.TCP_INFO_LEN


def test_send_buffer_of_the_running_kernel(pair: tuple[socket.socket, socket.socket]) -> None:
    client, _ = pair
    client.setblocking(False)
    features = probe()
    size, used = send_buffer(client, features)
    assert size == client.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    if features.meminfo:
        assert used == 0
        with suppress(BlockingIOError):
            while True:
                client.send(bytes(1 << 16))
        size, used = send_buffer(client, features)
        assert 0 < used <= 2 * size
    assert send_buffer(client, replace(features, meminfo=False)) == (size, size // 2)


class Kernel:
    """A socket of a kernel whose tcp_info is `length` bytes long."""

    def __init__(self, length: int, refused: tuple[int, ...] = ()) -> None:
        self.length, self.refused = length, refused

    def __call__(self, *_: Any) -> Kernel:
        return self

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        if option in self.refused:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        return bytes(min(self.length, length))

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.getsockopt(level, option, 0)


@pytest.mark.parametrize(
    ("length", "missing"),
    [
        (104, {"bytes_acked", "min_rtt", "snd_wnd"}),  # 3.x
        (BYTES_ACKED + 7, {"bytes_acked", "min_rtt", "snd_wnd"}),
        (BYTES_ACKED + 8, {"min_rtt", "snd_wnd"}),
        (MIN_RTT + 3, {"min_rtt", "snd_wnd"}),
        (MIN_RTT + 4, {"snd_wnd"}),
        (SND_WND + 3, {"snd_wnd"}),
        (SND_WND + 4, set()),
        (500, set()),
    ],
)
def test_short_tcp_info(monkeypatch: pytest.MonkeyPatch, length: int, missing: set[str]) -> None:
    monkeypatch.setattr(socket, "socket", Kernel(length))
    assert {f.name for f in fields(Features) if not getattr(probe(), f.name)} == missing


def test_options_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", Kernel(500, (SO_PEEK_OFF,)))
    assert probe() == replace(ALL, peek_off=False)
    monkeypatch.setattr(socket, "socket", Kernel(500, (SO_MEMINFO, SO_PEEK_OFF)))
    assert probe() == replace(ALL, peek_off=False, meminfo=False)


def test_layout() -> None:
    info = bytearray(tcpinfo.TCP_INFO_LEN)
    Struct("=Q").pack_into(info, 120, 1 << 40)
    Struct("=I").pack_into(info, 148, 77)
    Struct("=I").pack_into(info, 228, 65535)
    raw = bytes(info)
    found = tcpinfo.u64(raw, BYTES_ACKED), tcpinfo.u32(raw, MIN_RTT), tcpinfo.u32(raw, SND_WND)
    assert found == (1 << 40, 77, 65535)


def test_details_of_the_running_kernel(pair: tuple[socket.socket, socket.socket]) -> None:
    client, accepted = pair
    client.sendall(bytes(1000))
    assert accepted.recv(1000, socket.MSG_WAITALL) == bytes(1000)
    accepted.sendall(b"x")
    assert client.recv(1) == b"x"  # its segment acknowledged everything
    ours, theirs = tcpinfo.details(client), tcpinfo.details(accepted)
    assert ours is not None and theirs is not None
    assert ours.rtt is not None and 0 < ours.rtt < 1
    assert (ours.acked, ours.received, ours.retransmits) == (1001, 1, 0)  # the SYN counts
    assert theirs.received == 1000
    assert 0 <= ours.idle < 60
    client.close()
    assert tcpinfo.details(client) is None


def test_details_layout() -> None:
    info = bytearray(tcpinfo.TCP_INFO_LEN)
    for offset, value in ((44, 5000), (52, 2500), (68, 1500), (100, 3)):
        Struct("=I").pack_into(info, offset, value)
    Struct("=QQ").pack_into(info, 120, 1 << 40, 1 << 41)
    full = tcpinfo.Details(rtt=0.0015, retransmits=3, idle=2.5, acked=1 << 40, received=1 << 41)
    assert tcpinfo.Details.parse(bytes(info)) == full
    assert tcpinfo.Details.parse(bytes(info[:104])) == replace(full, acked=None, received=None)


@given(st.binary(min_size=104, max_size=300))
def test_details_of_any_kernel(info: bytes) -> None:
    """However long the structure is, from that of Linux 2.6 on: what is not there is None, the rest not negative."""
    found = tcpinfo.Details.parse(info)
    assert (found.acked is None) == (len(info) < BYTES_ACKED + 8)
    assert (found.received is None) == (len(info) < tcpinfo.BYTES_RECEIVED + 8)
    assert all(value is None or value >= 0 for value in (found.rtt, found.retransmits, found.idle, found.acked))
