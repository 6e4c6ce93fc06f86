"""The way out for virtual machines: frames to the stream socket of QEMU's `-netdev stream`, each after its length.

A UNIX stream socket has no offloads, so what the kernel does for a tap is done by `gso`, while frames are written into
one buffer, from which one system call takes all that a turn has produced:

        0        _head             _tail           _mark        LIMIT                     2 * LIMIT
        | sent   | waits           | room          |                                      |
        +--------+-------+---------+---------------+------------+-------------------------+
                 | length, frame | length, fra...

    the socket takes all of it        both ends go back to 0: a buffer that is still in the cache is filled again.
                                      `_mark` is FLUSH_AT: a longer turn is sent in pieces, while they are in the cache
    the socket takes a part of it     `full`: from then on only `writable` sends, when EPOLLOUT says that there is room.
                                      A frame that was begun goes on where it stopped, in front of everything else
    LIMIT bytes wait                  frames are dropped, whole, and counted ("stream full"), as on any link
    the end is reached                what waits moves to 0. That is at least LIMIT bytes further, so no byte is moved
                                      more often than once for LIMIT bytes sent

Payload is copied: it lies in a buffer that the next peek overwrites, and a copy of 64 KiB (1 us) costs less than a
system call for each super-frame. Memory that was never reached is never touched.

`full` and `on_room` are for those who can wait instead of being dropped. Without a client, all frames are drops ("no
guest").
"""

from __future__ import annotations

import mmap
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import PASST
from ..calls import calls
from .tap_device import NO_OFFLOAD, TRANSIENT, VNET, Buffer, Capture

if TYPE_CHECKING:
    from .gso import Gso

LIMIT = 1 << 22  # bytes that may wait for the socket
FLUSH_AT = 5 << 16  # bytes after which a turn's end is not waited for: more than one peek of TCP brings
FRAME_MAX = 4096 + 65536  # bytes of a frame that QEMU has room for (NET_BUFSIZE)
LENGTH_LEN = 4
_SEND_FLAGS = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL

CALLS = calls("sendto", "sendmsg", "write", mode=PASST)


class StreamLink:
    """A connected stream socket, while there is one. The owner watches it, and calls `writable` and `at_turn_end`.

    `at_turn_end` must be the last of the loop's callbacks, behind all that send. `want_write(wanted)` is called when
    EPOLLOUT begins or ceases to matter, `on_error` once for a socket, which is forgotten then. Super-frames must have
    their headers, and nothing else, in their first part.
    """

    tso = True
    uso = True

    def __init__(self, drops: Counter[str], want_write: Callable[[bool], None]) -> None:
        from .gso import Gso  # imports NumPy, which only this link needs

        self._out = memoryview(mmap.mmap(-1, 2 * LIMIT))
        self._gso: Gso = Gso(self._out)
        self._drops = drops
        self.sent_frames = self.sent_bytes = 0  # written to the buffer
        self.want_write = want_write
        self.on_room: Callable[[float], None] | None = None  # called when `full` ends
        self.on_error: Callable[[OSError], None] | None = None
        self.capture: Capture | None = None  # capture(to_guest, vnet header + frame), frames as the guest gets them
        self.attach(None)

    def attach(self, sock: socket.socket | None) -> None:
        """Send to `sock` from now on, or to nobody. What waited for another one is thrown away."""
        self._sock = sock
        self.full = False
        self._head = self._tail = 0
        self._mark = FLUSH_AT if sock is not None else 0

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, vnet header first."""
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header."""
        hdr = parts[0]
        if hdr[1]:  # gso_type
            self._send_segments(hdr, parts[1] if len(parts) == 2 else b"".join(parts[1:]))
            return
        length = sum(map(len, parts)) - VNET.size
        at = self._tail
        if at + LENGTH_LEN + length > self._mark or length > FRAME_MAX:
            at = self._room(LENGTH_LEN + length, 1, length)
            if at < 0:
                return
        self._gso.frame(at, length, parts)
        self._tail = at + LENGTH_LEN + length
        self.sent_frames += 1
        self.sent_bytes += length
        if self.capture is not None:
            self._show(at)

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no vnet header, no offload."""
        self.send_payload((NO_OFFLOAD, frame))

    def _send_segments(self, hdr: Buffer, payload: Buffer) -> None:
        """Send a super-frame."""
        size = VNET.unpack_from(hdr)[3]
        count = -(-len(payload) // size)
        head = len(hdr) - VNET.size
        at = self._room(count * (LENGTH_LEN + head) + len(payload), count, head + size)
        if at >= 0:
            self._tail = self._gso.cut(at, hdr, payload)
            self.sent_frames += count
            self.sent_bytes += self._tail - at - count * LENGTH_LEN
            if self.capture is not None:
                self._show(at)

    def _room(self, need: int, count: int, longest: int) -> int:
        """Where `need` bytes may be written, for `count` frames of at most `longest` bytes; -1: dropped and counted."""
        if self._tail + need > self._mark and self._tail and not self.full:
            self._flush()
        pending = self._tail - self._head
        why = "no guest" if self._sock is None else "stream full" if pending + need > LIMIT else ""
        if longest > FRAME_MAX:
            why = "stream: frame too long"
        if why:
            self._drops[why] += count
            return -1
        if self._tail + need > len(self._out):
            self._out[:pending] = self._out[self._head : self._tail]
            self._head, self._tail, self._mark = 0, pending, LIMIT
        return self._tail

    # Sending ---------------------------------------------------------------------------------------------------------

    def at_turn_end(self, now: float) -> None:
        """Send what the turn has produced."""
        if self._tail and not self.full:
            self._flush()

    def writable(self, now: float) -> None:
        """The socket takes more (EPOLLOUT)."""
        if self.full:
            self._flush()
            if not self.full and self._sock is not None and self.on_room is not None:
                self.on_room(now)

    def _flush(self) -> None:
        """Send what waits, as much of it as the socket takes."""
        sock = self._sock
        assert sock is not None
        try:
            self._head += sock.send(self._out[self._head : self._tail], _SEND_FLAGS)
        except OSError as e:
            if e.errno not in TRANSIENT:
                self._failed(e)
                return
        full = self._head != self._tail
        if full:
            self._mark = min(self._head + LIMIT, len(self._out))
        else:
            self._head = self._tail = 0
            self._mark = FLUSH_AT
        if full != self.full:
            self.full = full
            self.want_write(full)

    def _failed(self, e: OSError) -> None:
        """The guest is gone."""
        self.attach(None)
        if self.on_error is None:
            raise e
        self.on_error(e)

    def _show(self, at: int) -> None:
        """Hand what was written from `at` on to `capture`, frame by frame."""
        assert self.capture is not None
        while at < self._tail:
            frame = at + LENGTH_LEN
            at = frame + int.from_bytes(self._out[at:frame], "big")
            self.capture(True, NO_OFFLOAD + self._out[frame:at])
