"""The stream socket of a virtual machine, QEMU's `-netdev stream`: frames in both directions, each after its length.

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

Bulk in segments that need no cut is received at the place that its frame has in the buffer (`lay_out`). Other payload
is copied: it lies in memory that the next peek overwrites, and a copy of 64 KiB costs less than a system call for each
super-frame. Memory that was never reached is never touched.

The other way, frames are parsed where they lie, in the packet pool, and are handed on with the place of a virtio-net
header before each (bytes of no meaning: there are no offloads here):

    +--------+-------+--------+-------+--------+---
    | length | frame | length | frame | length | fra      one recv_into, as much as there is
    +--------+-------+--------+-------+--------+---
      4 bytes, big-endian; a frame is an Ethernet frame of 14 to 65535 bytes

An incomplete frame at the end is moved to the front of the pool, and the next read continues there. Nothing is copied
otherwise.

    length            consequence
    ----------------  -------------------------------------------------------------------------------------------------
    0 to 13           the frame is skipped, and counted ("truncated"): a frame without an Ethernet header
    14 to 65535       the frame is handed on
    65536 to 69632    skipped, and counted ("oversized frame"): QEMU's buffer is that large, and a packet is never
    more              no machine sends it: where the next frame begins is unknown. The connection is closed, with one
                        message, and another client may connect

`full` and `on_room` are for senders that can wait instead of being dropped. Without a client, all frames are drops ("no
guest").
"""

from __future__ import annotations

import mmap
import socket
from collections import Counter
from collections.abc import Sequence
from typing import Final

from .. import PASST
from ..calls import calls
from ..drops import Drop, Reason
from ..linux.sockopt import setting
from ..loop.reactor import EPOLLIN, EPOLLOUT, TYPE_GUEST, Reactor
from ..wire.ether import HEADER_LEN
from ..wire.virtio import NO_OFFLOAD, VNET, VNET_LEN
from .backend import TRANSIENT, Buffer, Link, Receiver
from .gso import FRAME_MIN, LENGTH, Gso
from .gso import FRONT as VNET_FRONT
from .packet import FRAME_ROOM, PacketPool
from .vector_sums import VectorVerifier
from .verify import Verifier

LIMIT: Final = 1 << 22  # bytes that may wait for the socket
FLUSH_AT: Final = 5 << 16  # bytes after which a turn's end is not waited for: more than one peek of TCP brings
NET_BUFSIZE: Final = 4096 + 65536  # bytes of a frame that QEMU has room for
SENT_MIN, SENT_MAX = HEADER_LEN, 65535  # bytes of a frame that is handed on
SEND_BUFFER: Final = 1 << 20  # bytes requested; net.core.wmem_max is the limit. More leaves the cache before it is read
SEND_BUFFER_LITTLE: Final = 1 << 18  # the same beside messages that must not wait: the kernel doubles both
LENGTH_LEN: Final = LENGTH.size
SEND_FLAGS: Final = socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
FRONT: Final = 16  # where the first length stands: a virtio-net header ends where its frame begins
_BEFORE: Final = LENGTH_LEN - VNET_LEN  # from a length to the start of the virtio-net header

CALLS = (
    *calls("recvfrom", "sendto", "sendmsg", "write", mode=PASST),
    *setting((socket.SOL_SOCKET, socket.SO_SNDBUF), mode=PASST),
)


class StreamLink(Link):
    """A connected stream socket, while there is one."""

    reads_vnet = False
    cuts = True
    rto_min = 0.050  # a process beyond the socket moves the frames, and it may be busy

    _reactor: Reactor
    _pool: PacketPool
    _receiver: Receiver

    def __init__(self, drops: Counter[Reason]) -> None:
        super().__init__(drops, tso=True, uso=True)
        self._out = memoryview(mmap.mmap(-1, 2 * LIMIT))
        self._gso = Gso(self._out)
        self._octets = 0  # of frames that were written to the buffer
        self._skipped = 0  # bytes of this read that were no frame to hand on
        self._sock: socket.socket | None = None
        self._little = False  # whether the queue is short
        self._reset()

    def start(self, reactor: Reactor, pool: PacketPool, receiver: Receiver) -> None:
        """Serve guests from now on."""
        self._reactor, self._pool, self._receiver = reactor, pool, receiver
        self._limit = pool.size - FRAME_ROOM  # room that the tap keeps for reassembled packets
        reactor.handle(TYPE_GUEST, self._handle)
        reactor.at_turn_end.append(self.at_turn_end)

    def attach(self, sock: socket.socket | None) -> None:
        """Serve the guest at `sock` from now on, or none. Buffered data of the former one is discarded."""
        former, self._sock = self._sock, sock
        self._reset()
        if former is not None:
            self._reactor.retire(former.fileno(), former)
        if sock is not None:
            self.queue_little(self._little)
            self._reactor.watch(sock.fileno(), TYPE_GUEST, 0, EPOLLIN)

    def queue_little(self, little: bool) -> None:
        """By the size of the socket's buffer. With the usual one, 2 MiB may wait: 5 ms at an MTU of 1500."""
        self._little = little
        if self._sock is not None:
            size = SEND_BUFFER_LITTLE if little else SEND_BUFFER
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def _reset(self) -> None:
        self.full = False
        self._head = self._tail = 0
        self._mark = FLUSH_AT if self._sock is not None else 0
        self._fill = FRONT  # end of what was read and not handled

    def _handle(self, ref: int, events: int, now: float) -> None:
        """The guest's socket has something for us, takes more, or is no more."""
        if events & EPOLLOUT:
            self.writable(now)
        if events & ~EPOLLOUT:
            self.read(now)

    def _end(self, why: str) -> None:
        """The guest is gone."""
        self.attach(None)
        self.gone(why)

    # From the guest --------------------------------------------------------------------------------------------------

    def verifier(self, pool: PacketPool) -> Verifier:
        """The bytes in the pool are as they came from the guest."""
        return VectorVerifier(pool, self.drops)

    def read(self, now: float) -> None:
        """Read what there is, hand on the frames that are complete."""
        sock = self._sock
        if sock is None:
            return
        try:
            n = sock.recv_into(self._pool.mv[self._fill : self._limit])
        except BlockingIOError:
            return
        except OSError as e:
            self._end(failure(e))
            return
        if not n:
            where = "" if self._fill == FRONT else " in the middle of a frame"
            self._end(f"The guest closed the connection{where}")
            return
        self._skipped = 0
        frames, left, lie = self._frames(self._fill + n)
        if frames:
            octets = left - FRONT - self._skipped - (len(frames) >> 1) * LENGTH_LEN
            self._receiver.received(frames, octets, now)
        if self._sock is not sock:
            return
        if lie >= 0:
            self._end(f"The guest sent a frame length of {lie} (up to {NET_BUFSIZE} are possible)")
        else:
            self._keep(left, self._fill + n)

    def catch_up(self, now: float) -> None:
        """Read once more."""
        self.read(now)

    def _frames(self, fill: int) -> tuple[list[int], int, int]:
        """Complete frames as (start of the virtio-net header, end)*, where the rest begins, a lying length or -1."""
        unpack, buf = LENGTH.unpack_from, self._pool.buf
        frames: list[int] = []
        at, last = FRONT, fill - LENGTH_LEN
        while at <= last:
            (length,) = unpack(buf, at)
            if length > NET_BUFSIZE:
                return frames, at, length
            end = at + LENGTH_LEN + length
            if end > fill:
                break
            if SENT_MIN <= length <= SENT_MAX:
                frames.append(at + _BEFORE)
                frames.append(end)
            else:
                self.drops[Drop.TRUNCATED if length < SENT_MIN else Drop.OVERSIZED_FRAME] += 1
                self._skipped += end - at
            at = end
        return frames, at, -1

    def _keep(self, start: int, end: int) -> None:
        """Move the rest to the front."""
        rest = end - start
        if rest and start != FRONT:
            buf = self._pool.buf
            buf[FRONT : FRONT + rest] = buf[start:end]
        self._fill = FRONT + rest

    # To the guest ----------------------------------------------------------------------------------------------------

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, vnet header first."""
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header."""
        hdr = parts[0]
        if hdr[1]:  # gso_type
            self._send_segments(hdr, parts[1] if len(parts) == 2 else b"".join(parts[1:]))
            return
        length = sum(map(len, parts)) - VNET_LEN
        at = self._tail
        need = LENGTH_LEN + (length if length > FRAME_MIN else FRAME_MIN)
        if at + need > self._mark or length > NET_BUFSIZE:
            at = self._room(need, 1, length)
            if at < 0:
                return
        self._tail = self._gso.frame(at, length, parts)
        self.sent_frames += 1
        self._octets += need - LENGTH_LEN
        if self.capture is not None:
            self._show(at)

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no vnet header, no offload."""
        self.send_payload((NO_OFFLOAD, frame))

    def lay_out(self, header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        """In the buffer, behind what waits there; nowhere while the socket does not take all of that, and nowhere for
        segments that are padded.
        """
        head = header - VNET_FRONT
        need = want + -(-want // chunk) * head
        if not FRAME_MIN + LENGTH_LEN <= chunk + head <= NET_BUFSIZE:
            return [], 0
        if self._tail + need > self._mark and self._tail and not self.full:
            self._flush()
        if self._sock is None or self._tail + need > self._mark or self.full:
            return [], 0
        at, end = self._tail + head, self._tail + need
        return [self._out[i : min(i + chunk, end)] for i in range(at, end, chunk + head)], want

    def send_laid_out(self, hdr: bytearray, length: int) -> None:
        """Send the next frame that was laid out."""
        at = self._tail
        self._tail = self._gso.laid_out(at, hdr, len(hdr) - VNET_LEN + length)
        self.sent_frames += 1
        self._octets += self._tail - at - LENGTH_LEN
        if self.capture is not None:
            self._show(at)

    def send_segments(self, hdr: bytearray, payload: memoryview, size: int) -> None:
        """Send a TCP segment for each `size` bytes of `payload`; `hdr` is complete for the first."""
        rows = len(payload) // size
        length = max(len(hdr) - VNET_LEN + size, FRAME_MIN)
        at = self._room(rows * (LENGTH_LEN + length), rows, length)
        if at >= 0:
            self._tail = self._gso.rows(at, hdr[:], rows, size, payload)
            self.sent_frames += rows
            self._octets += rows * length
            if self.capture is not None:
                self._show(at)

    @property
    def sent_bytes(self) -> int:
        """Bytes of frames that were written to the buffer."""
        return self._octets

    def _send_segments(self, hdr: Buffer, payload: Buffer) -> None:
        """Send a super-frame."""
        size = VNET.unpack_from(hdr)[3]
        count = -(-len(payload) // size)
        head = len(hdr) - VNET_LEN
        last = len(payload) - (count - 1) * size
        octets = (count - 1) * max(head + size, FRAME_MIN) + max(head + last, FRAME_MIN)
        at = self._room(count * LENGTH_LEN + octets, count, head + size)
        if at >= 0:
            self._tail = self._gso.cut(at, hdr, payload)
            self.sent_frames += count
            self._octets += octets
            if self.capture is not None:
                self._show(at)

    def _room(self, need: int, count: int, longest: int) -> int:
        """Where `need` bytes may be written, for `count` frames of at most `longest` bytes; -1: dropped and counted."""
        if self._tail + need > self._mark and self._tail and not self.full:
            self._flush()
        pending = self._tail - self._head
        why = Drop.NO_GUEST if self._sock is None else Drop.STREAM_FULL if pending + need > LIMIT else None
        if longest > NET_BUFSIZE:
            why = Drop.STREAM_FRAME_TOO_LONG
        if why is not None:
            self.drops[why] += count
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
            self._transmit(sock)
        except OSError as e:
            if e.errno not in TRANSIENT:
                self._end(failure(e))
                return
        full = self._head != self._tail
        if full:
            self._mark = min(self._head + LIMIT, len(self._out))
        else:
            self._head = self._tail = 0
            self._mark = FLUSH_AT
        if full != self.full:
            self.full = full
            self._reactor.change(sock.fileno(), EPOLLIN | (EPOLLOUT if full else 0))

    def _transmit(self, sock: socket.socket) -> None:
        """Send from the buffer, as much as the socket takes. Raises OSError."""
        self._head += sock.send(self._out[self._head : self._tail], SEND_FLAGS)

    def _show(self, at: int) -> None:
        """Hand what was written from `at` on to `capture`, frame by frame."""
        assert self.capture is not None
        while at < self._tail:
            frame = at + LENGTH_LEN
            at = frame + int.from_bytes(self._out[at:frame], "big")
            self.capture(True, NO_OFFLOAD + self._out[frame:at])


def failure(e: OSError) -> str:
    """The message for a connection that failed."""
    return f"The guest's connection failed: {e.strerror}"
