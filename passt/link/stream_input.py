"""The way in for virtual machines: frames from the stream socket of QEMU's `-netdev stream`.

    +--------+-------+--------+-------+--------+---
    | length | frame | length | frame | length | fra      one recv_into, as much as there is
    +--------+-------+--------+-------+--------+---
      4 bytes, big-endian; a frame is an Ethernet frame of 14 to 65535 bytes

Frames are parsed where they lie, in the packet pool, and go to the tap as those of a tap device do, with the place
of a vnet header before each (bytes of no meaning: there are no offloads here). What is left of a frame at the end is
moved to the front of the pool, and the next read continues there. Nothing is copied otherwise.

A length that no frame can have means that the two sides do not understand each other: there is no way to find the next
frame, so the client is closed, with one message, and may come again.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from struct import Struct

from .. import PASST
from ..calls import calls
from .packet import FRAME_ROOM, VNET_LEN, PacketPool

LENGTH = Struct("!I")
FRAME_MIN = 14  # an Ethernet header
FRAME_MAX = 65535
_FRONT = 16  # where the first length stands: a vnet header ends where its frame begins
_BEFORE = LENGTH.size - VNET_LEN  # from a length to the start of the vnet header

CALLS = calls("recvfrom", mode=PASST)


def failure(e: OSError) -> str:
    """What to say of a connection that failed."""
    return f"The guest's connection failed: {e.strerror}"


class Stream:
    """Reads the guest's socket while there is one. `on_end(what)` is called when it has closed, failed, or lied.

    `what` is a sentence that says so. `take(frames, octets, now)` is given what was read, in `pool` (`Tap.received`).
    """

    def __init__(
        self, pool: PacketPool, take: Callable[[list[int], int, float], None], on_end: Callable[[str], None]
    ) -> None:
        self._pool = pool
        self._limit = pool.size - FRAME_ROOM  # room that the tap keeps for reassembled packets
        self._take = take
        self._on_end = on_end
        self._sock: socket.socket | None = None
        self._fill = _FRONT  # end of what was read and not handled

    def attach(self, sock: socket.socket | None) -> None:
        """Read from `sock` from now on, or from nobody; what is left of another one's is forgotten."""
        self._sock = sock
        self._fill = _FRONT

    def read(self, now: float) -> None:
        """Read what there is, handle the frames that are complete."""
        sock = self._sock
        if sock is None:
            return
        try:
            n = sock.recv_into(self._pool.mv[self._fill : self._limit])
        except BlockingIOError:
            return
        except OSError as e:
            self._on_end(failure(e))
            return
        if not n:
            where = "" if self._fill == _FRONT else " in the middle of a frame"
            self._on_end(f"The guest closed the connection{where}")
            return
        frames, left, lie = self._frames(self._fill + n)
        if frames:
            self._take(frames, left - _FRONT - (len(frames) >> 1) * LENGTH.size, now)
        if self._sock is not sock:
            return
        if lie >= 0:
            self._on_end(f"The guest sent a frame length of {lie} ({FRAME_MIN} to {FRAME_MAX} are possible)")
        else:
            self._keep(left, self._fill + n)

    def _frames(self, fill: int) -> tuple[list[int], int, int]:
        """Complete frames as (start of the vnet header, end)*, where the rest begins, and a length that lies, or -1."""
        unpack, buf = LENGTH.unpack_from, self._pool.buf
        frames: list[int] = []
        at, last = _FRONT, fill - LENGTH.size
        while at <= last:
            (length,) = unpack(buf, at)
            if not FRAME_MIN <= length <= FRAME_MAX:
                return frames, at, length
            end = at + LENGTH.size + length
            if end > fill:
                break
            frames.append(at + _BEFORE)
            frames.append(end)
            at = end
        return frames, at, -1

    def _keep(self, start: int, end: int) -> None:
        """Move the rest to the front."""
        rest = end - start
        if rest and start != _FRONT:
            buf = self._pool.buf
            buf[_FRONT : _FRONT + rest] = buf[start:end]
        self._fill = _FRONT + rest
