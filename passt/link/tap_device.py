"""The tap device of a namespace, with its virtio-net header: frames of up to 64 KiB at any MTU, in both directions.

Sending: one frame is one `writev`, of a pre-cooked header and a view of the payload. A frame that the
device does not take at once is dropped.

Reading. Frames are read one after the other into the packet pool until the tap is empty, the pool is full, or the
budget is used up. Asking an empty tap costs as much as reading a small frame, so the budget follows what was there
last time, and grows when it was used up several times running; what is left over is reported by epoll again. A timer
that is about to act has all of it read (`catch_up`): the acknowledgement that it misses may be there. Where
bulk was sent since the last read, the budget is BUDGET_MAX: its acknowledgements come by dozens, each of them lets a
turn's worth of bulk follow, and a request behind them would wait for all of that.

The device keeps its descriptor when it has to be created again: `unwatch` before, `watch` after.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Final

from .. import PASTA
from ..calls import calls
from ..drops import Failed, Reason
from ..loop.reactor import EPOLLIN, TYPE_TAP, Reactor
from ..wire.virtio import NO_OFFLOAD, VNET_LEN
from .backend import TRANSIENT, Buffer, Link, Receiver
from .packet import FRAME_ROOM, PacketPool

BUDGET_MAX: Final = 512  # frames in one turn, so that sockets get theirs
BULK: Final = 1 << 17  # bytes sent since the last read, beside which asking an empty tap costs nothing
READS_MAX: Final = 32  # of BUDGET_MAX frames each: the queue is no longer (`conf.decide.TXQLEN_MAX`)
PATIENCE: Final = 8  # turns that use up the budget before it doubles

CALLS = calls("readv", "write", "writev", mode=PASTA)


class TapLink(Link):
    """A tap device opened with IFF_VNET_HDR."""

    _reactor: Reactor
    _pool: PacketPool
    _receiver: Receiver
    _first: tuple[memoryview]

    def __init__(self, fd: int, drops: Counter[Reason], *, tso: bool = True, uso: bool) -> None:
        super().__init__(drops, tso=tso, uso=uso)
        self.fd = fd
        self._written = 0  # bytes, with virtio-net headers: what writes return
        self._front = 0 if self.reads_vnet else VNET_LEN  # bytes before a frame that the device does not fill
        self._budget = 1
        self._watched = False
        self._read_at = 0  # `_written` when frames were last read
        self._streak = 0
        self._drained = True  # by the last read

    # From the guest --------------------------------------------------------------------------------------------------

    def start(self, reactor: Reactor, pool: PacketPool, receiver: Receiver) -> None:
        """Read frames from now on."""
        self._reactor, self._pool, self._receiver = reactor, pool, receiver
        self._first = (pool.mv[self._front : FRAME_ROOM],)
        reactor.handle(TYPE_TAP, self.readable)
        self.watch()

    def watch(self) -> None:
        """Look at the device for frames."""
        self._reactor.watch(self.fd, TYPE_TAP, 0, EPOLLIN)
        self._watched = True

    def unwatch(self) -> None:
        """Cease to, until `watch`."""
        self._reactor.forget(self.fd)
        self._watched = False

    def read(self, now: float) -> None:
        """Read what is there, and hand it on."""
        self.readable(0, EPOLLIN, now)

    def catch_up(self, now: float) -> None:
        """Read all that is there, up to as many small frames as the device's queue holds."""
        for _ in range(READS_MAX):
            if not self._watched:
                return
            self._budget = BUDGET_MAX
            self.read(now)
            if self._drained:
                return

    def readable(self, ref: int, events: int, now: float) -> None:
        """Read what the tap has, at most one budget of it, and hand it on."""
        pool, fd, readv, front = self._pool, self.fd, os.readv, self._front
        mv = pool.mv
        room = pool.size - 2 * FRAME_ROOM  # the last frame's room is kept for reassembled packets
        offset, left = 0, self._budget
        behind_bulk = self._written - self._read_at >= BULK
        if behind_bulk:
            left = BUDGET_MAX
        self._read_at = self._written
        frames: list[int] = []
        self._drained = True
        place = self._first
        try:
            while offset <= room:
                n = readv(fd, place)
                left -= 1
                frames.append(offset)
                offset += front + n
                frames.append(offset)
                if not left:
                    break
                place = (mv[offset + front : offset + FRAME_ROOM],)
        except BlockingIOError:
            if not behind_bulk:
                self._budget = max(1, self._budget - left)
                self._streak = 0
        except OSError as e:
            self.gone(_failure(e))
        else:
            self._drained = False
            self._streak += not behind_bulk
            if self._streak >= PATIENCE:
                self._budget = min(self._budget * 2, BUDGET_MAX)
                self._streak = 0
        if frames:
            self._receiver.received(frames, offset - (len(frames) >> 1) * VNET_LEN, now)

    # To the guest ----------------------------------------------------------------------------------------------------

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, virtio-net header first."""
        try:
            self._written += os.write(self.fd, hdr)
        except OSError as e:
            self._failed(e)
            return
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, bytes(hdr))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the virtio-net header."""
        try:
            self._written += os.writev(self.fd, parts)
        except OSError as e:
            self._failed(e)
            return
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, b"".join(parts))

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no virtio-net header, no offload."""
        self.send_payload((NO_OFFLOAD, frame))

    @property
    def sent_bytes(self) -> int:
        """Bytes of frames that were sent."""
        return self._written - self.sent_frames * VNET_LEN

    # Failures --------------------------------------------------------------------------------------------------------

    def _failed(self, e: OSError) -> bool:
        """A write failed. Whether the device still takes frames."""
        if e.errno in TRANSIENT:
            self.drops[Failed.TAP_WRITE.of(e)] += 1
            return True
        self.gone(_failure(e))
        return False


def _failure(e: OSError) -> str:
    """The message for a device that failed."""
    return f"The tap device failed: {e.strerror}"
