"""The stream of frames from QEMU, in pieces of any length. A step is a frame, a length that lies, raw bytes, a read.

Invariants: whatever the pieces are, the frames are those that were sent, in order, each once, but for lengths that no
packet has; a length that no frame has ends the connection, once, behind the frames before it; an end in the middle of a
frame is told as such; no byte of another client's stream is seen.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from typing import Any, cast

from fuzz.steps import Steps
from passt.link.backend import Receiver
from passt.link.stream_socket import NET_BUFSIZE, SENT_MAX, SENT_MIN, StreamLink
from passt.wire.virtio import VNET_LEN
from tests.unit.support import T0, make_context

DATA = bytes(i * 57 + (i >> 8) & 0xFF for i in range(1 << 17))
CTX = make_context(pool_size=1 << 17)
LENGTHS = (14, 15, 60, 64, 200, 1514, 3000, 65535)


class Sock:
    """The guest's stream, read in pieces."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.piece = 0
        self.error = 0
        self.ended = False

    def fileno(self) -> int:
        return 1000

    def setsockopt(self, *option: int) -> None:
        """Its buffer has any size."""

    def recv_into(self, buf: memoryview) -> int:
        if self.error:
            raise OSError(self.error, "failed")
        n = min(self.piece, len(self.waiting), len(buf))
        assert len(buf), "the buffer is full"
        if not n and not self.ended:
            raise BlockingIOError(errno.EAGAIN, "empty")
        buf[:n] = self.waiting[:n]
        del self.waiting[:n]
        return n


class Way(Receiver):
    """Stands for the tap: notes frames."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []

    def received(self, frames: list[int], octets: int, now: float) -> None:
        for start, end in zip(frames[::2], frames[1::2], strict=True):
            assert start >= 0
            self.frames.append(CTX.pool.copy(start + VNET_LEN, end))
            octets -= end - start - VNET_LEN
        assert not octets


WAY = Way()
ENDS: list[str] = []


STREAM = StreamLink(CTX.drops)
STREAM.on_gone = ENDS.append
STREAM.start(CTX.reactor, CTX.pool, WAY)


def seeds() -> Iterable[bytes]:
    yield bytes((0, 0, 0, 0, 4, 1, 3, 0, 255, 0, 2, 3, 1, 0))
    yield bytes((0, 7, 9, 0, 5, 9, 3, 255, 255)) * 4
    yield bytes((1, 0, 0, 0, 13, 3, 1, 0))
    yield bytes((0, 1, 1, 3, 0, 9, 4, 3, 0, 2))
    yield bytes((2, 6, 0, 0, 0, 14, 1, 2, 3, 0, 9, 5, 0, 1, 0, 3, 0, 200))


def expected(sent: bytes) -> tuple[list[bytes], int, bool]:
    """The frames in a stream, the length that lies in it or -1, and whether it ends within a frame."""
    frames: list[bytes] = []
    at = 0
    while at + 4 <= len(sent):
        length = int.from_bytes(sent[at : at + 4], "big")
        if length > NET_BUFSIZE:
            return frames, length, False
        if at + 4 + length > len(sent):
            break
        if SENT_MIN <= length <= SENT_MAX:  # others are skipped
            frames.append(sent[at + 4 : at + 4 + length])
        at += 4 + length
    return frames, -1, at < len(sent)


def one(data: bytes) -> None:
    steps = Steps(data)
    sock, sent = Sock(), bytearray()
    WAY.frames.clear()
    ENDS.clear()
    STREAM.attach(cast(Any, sock))
    while steps.left > 0 and not ENDS and len(sent) < 1 << 18:
        kind = steps.byte() % 6
        more = b""
        if kind == 0:
            n = LENGTHS[steps.byte() % len(LENGTHS)] if steps.byte() & 1 else 14 + steps.byte()
            where = steps.byte()
            more = n.to_bytes(4, "big") + DATA[where : where + n]
        elif kind == 1:
            more = steps.take(4)
        elif kind == 2:
            more = steps.take(steps.byte())
        elif kind == 3:
            sock.piece = steps.word() or 1 << 20
            STREAM.read(T0)
        elif kind == 4:
            sock.piece, sock.ended = 0, not sock.waiting
            STREAM.read(T0)
        else:
            for _ in range(steps.byte() & 31):
                sock.piece = 1 + steps.pos % 3
                STREAM.read(T0)
        sock.waiting += more
        sent += more
    finish(sock, bytes(sent))


def finish(sock: Sock, sent: bytes) -> None:
    for _ in range(100):
        if ENDS or not sock.waiting:
            break
        sock.piece = 1 << 20
        STREAM.read(T0)
    ended = sock.ended or bool(ENDS)
    frames, lie, within = expected(sent)
    assert WAY.frames == frames
    if lie >= 0:
        assert len(ENDS) == 1 and f" {lie} " in ENDS[0]
    elif ended:
        assert len(ENDS) == 1 and ENDS[0].endswith("in the middle of a frame") == within
    else:
        assert not ENDS
    STREAM.attach(None)
