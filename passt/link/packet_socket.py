"""The socket of packets of a machine: user-mode Linux's transport `bess`, one frame in each packet (SOCK_SEQPACKET).

To the guest it is `link.stream_socket` with its buffer, its limit and its segmentation; only the last step differs:

        _head            _tail
        | length, frame | length, frame |      a packet for each frame, without the length: a system call each
        +---------------+---------------+

A socket of packets takes a frame whole or not at all, so `_head` is always between two frames.

From the guest, packets lie one behind the other in the pool, each with the place of a virtio-net header before it:

    +-----------------------+-----------------------+---
    | vnet header | frame   | vnet header | frame   |      one recv_into for each frame, BATCH in a turn
    +-----------------------+-----------------------+---

    packet            consequence
    ----------------  -------------------------------------------------------------------------------------------------
    no byte           the guest has closed the connection: the kernel does not tell an empty packet from its end
    1 to 13 bytes     skipped, and counted ("truncated"): a frame without an Ethernet header
    14 to 65535       the frame is handed on
    more              skipped, and counted ("oversized frame"); the kernel cuts it to the room there is
"""

from __future__ import annotations

import errno
import socket
from typing import Final

from .. import PASST
from ..calls import calls
from ..drops import Drop
from ..wire.virtio import VNET_LEN
from .gso import LENGTH
from .packet import FRAME_ROOM
from .stream_socket import FRONT, LENGTH_LEN, SEND_FLAGS, SENT_MAX, SENT_MIN, StreamLink, failure

BATCH: Final = 64  # frames that are read before they are handled

CALLS = calls("recvfrom", "sendto", mode=PASST)


class PacketLink(StreamLink):
    """A connected socket of packets, while there is one."""

    def read(self, now: float) -> None:
        """Read what there is, hand on the frames."""
        sock = self._sock
        if sock is None:
            return
        frames: list[int] = []
        why = self._read_batch(sock, frames)
        if frames:
            self._receiver.received(frames, sum(frames[1::2]) - sum(frames[::2]) - len(frames) // 2 * VNET_LEN, now)
        if why and self._sock is sock:
            self._end(why)

    def _read_batch(self, sock: socket.socket, frames: list[int]) -> str:
        """Append (start of the virtio-net header, end) for each frame that is there. Returns why the guest is gone."""
        mv, at, last = self._pool.mv, FRONT, self._pool.size - 2 * FRAME_ROOM  # the tap keeps one of them
        while len(frames) < 2 * BATCH and at <= last:
            start = at + VNET_LEN
            try:
                n = sock.recv_into(mv[start : at + FRAME_ROOM])
            except BlockingIOError:
                break
            except OSError as e:
                return failure(e)
            if not n:
                return "The guest closed the connection"
            if SENT_MIN <= n <= SENT_MAX:
                frames.append(at)
                at = start + n
                frames.append(at)
            else:
                self.drops[Drop.TRUNCATED if n < SENT_MIN else Drop.OVERSIZED_FRAME] += 1
        return ""

    def _transmit(self, sock: socket.socket) -> None:
        """Send the frames that wait, as far as the socket takes them. Raises OSError."""
        out, unpack, head, tail = self._out, LENGTH.unpack_from, self._head, self._tail
        try:
            while head < tail:
                end = head + LENGTH_LEN + unpack(out, head)[0]
                try:
                    sock.send(out[head + LENGTH_LEN : end], SEND_FLAGS)
                except OSError as e:
                    if e.errno != errno.EMSGSIZE:
                        raise
                    self.drops[Drop.STREAM_FRAME_TOO_LONG] += 1  # longer than the socket's buffer
                head = end
        finally:
            self._head = head
