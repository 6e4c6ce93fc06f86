"""The link of a conversation whose guest is a virtual machine.

Sent frames are recorded as by `FakeLink`, so that conversations read the same, and goes through the real link of a
machine as well: the frames that arrive there must say what was recorded, segment by segment, with whole checksums.
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from passt.link.backend import Buffer
from passt.link.packet import PacketPool
from passt.link.stream_socket import LENGTH_LEN, StreamLink
from passt.wire.checksum import PROTO_TCP, fold, ones_sum, pseudo_sum
from passt.wire.virtio import VNET

from .support import FakeLink, FakeReactor, FakeReceiver

ETH = 14


class MachineLink(FakeLink):
    """A `FakeLink` with a machine at its end."""

    def __init__(self) -> None:
        super().__init__()
        near, self._far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._drops: Counter[str] = Counter()
        self._link = StreamLink(self._drops)
        pool = PacketPool(1)
        self._link.start(cast(Any, FakeReactor()), pool, FakeReceiver(pool.mv))
        self._link.attach(near)
        self._near = near

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        super().send_payload(parts)
        self._link.send_payload(parts)
        self._link.at_turn_end(0)
        assert not self._link.full
        assert not self._drops
        recorded = self.frames[-1]
        arrived = self._arrived()
        if recorded[12:14] in (b"\x08\x00", b"\x86\xdd") and self.vnet[-1][1] != 0:
            check_segments(recorded, arrived, VNET.unpack(self.vnet[-1])[3])
        else:
            assert len(arrived) == 1
            assert len(arrived[0]) == max(len(recorded), 60)
        for frame in arrived:
            check_sums(frame)

    def send_frame(self, frame: bytes) -> None:
        super().send_frame(frame)
        self._link.send_frame(frame)
        self._link.at_turn_end(0)
        assert self._arrived() == [frame.ljust(60, b"\0")]

    def _arrived(self) -> list[bytes]:
        """The frames that are there."""
        stream = self._far.recv(1 << 20, socket.MSG_DONTWAIT)
        frames = []
        while stream:
            end = LENGTH_LEN + int.from_bytes(stream[:LENGTH_LEN], "big")
            assert end <= len(stream), "half a frame"
            frames.append(stream[LENGTH_LEN:end])
            stream = stream[end:]
        return frames

    def __del__(self) -> None:
        self._near.close()
        self._far.close()


class LayingLink(FakeLink):
    """A `FakeLink` that has places for payload: buffers of odd sizes, as those of a machine that shares its memory."""

    def __init__(self) -> None:
        super().__init__()
        self.laid_out: list[tuple[int, list[memoryview]]] = []
        self.direct = 0  # frames whose payload was received there
        self._sizes = itertools.cycle((1526, 4096, 77, 1, 9000))

    def lay_out(self, header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        assert header in (64, 84)
        self.laid_out.clear()
        for start in range(0, want, chunk):
            left = payload = min(chunk, want - start)
            views = []
            while left:
                views.append(memoryview(bytearray(min(left, next(self._sizes)))))
                left -= len(views[-1])
            self.laid_out.append((payload, views))
        return [view for _, views in self.laid_out for view in views], want

    def send_laid_out(self, hdr: bytearray, length: int) -> None:
        payload, views = self.laid_out.pop(0)
        assert 0 < length <= payload
        self.direct += 1
        self.send_payload((hdr, b"".join(views)[:length]))


def transport(frame: bytes) -> int:
    """Where the TCP header begins."""
    return ETH + (20 if frame[12:14] == b"\x08\x00" else 40)


def check_sums(frame: bytes) -> None:
    """The checksums of a TCP segment; of other frames, nothing."""
    l4 = transport(frame)
    v4 = frame[12:14] == b"\x08\x00"
    if frame[ETH + 9 if v4 else ETH + 6] != PROTO_TCP or frame[12:14] == b"\x08\x06":
        return
    if v4:
        assert ones_sum(frame[ETH:l4]) == 0xFFFF
    length = 14 + int.from_bytes(frame[16:18], "big") if v4 else 54 + int.from_bytes(frame[18:20], "big")
    assert not any(frame[length:]), "padding"
    frame = frame[:length]
    addresses = frame[l4 - (8 if v4 else 32) : l4]
    half = len(addresses) // 2
    pseudo = pseudo_sum(addresses[:half], addresses[half:], PROTO_TCP, len(frame) - l4)
    assert fold(pseudo + ones_sum(frame[l4:])) == 0xFFFF


def check_segments(whole: bytes, segments: list[bytes], size: int) -> None:
    """Segments of `size` bytes, the last one perhaps shorter, that make up the super-frame `whole`."""
    data = transport(whole) + 20
    segments = [*segments[:-1], segments[-1][: len(whole) - (len(segments) - 1) * size]]  # without padding
    seq = int.from_bytes(whole[data - 16 : data - 12], "big")
    assert b"".join(s[data:] for s in segments) == whole[data:]
    assert all(len(s) - data == size for s in segments[:-1])
    for i, segment in enumerate(segments):
        assert int.from_bytes(segment[data - 16 : data - 12], "big") == (seq + i * size) & 0xFFFFFFFF
        assert segment[data - 12 : data - 8] == whole[data - 12 : data - 8], "the acknowledgement"
        assert segment[data - 6 : data - 4] == whole[data - 6 : data - 4], "the window"
    assert [s[data - 7] for s in segments[:-1]] == [whole[data - 7] & ~0x09] * (len(segments) - 1), "FIN and PSH"
    assert segments[-1][data - 7] == whole[data - 7]
