"""Frames of a machine, read from its transmit ring.

A chain is one frame with a virtio-net header before it. Headers are copied into the pool and read there. Payload of a
plain TCP segment stays where it is, if it is long: the pool finds it (`scattered.py`), and sendmsg(2) takes it from the
machine's memory. Chains are given back when the receiver has returned.

    chain   | vnet 12 | Ethernet | IP | TCP | payload        | payload  | payload
            '- copied: vnet and 114 bytes --'- piece --------'- piece --'- piece ...

The length of a frame is the sum of its descriptors' lengths, each copied once. Nothing of a header is read twice from
memory that the machine can write.

Kicks. The machine shall not kick while a batch is handled. When the ring is empty kicks are wanted, and only after that
a last look shows that nothing came in between. A ring with more than a batch is read again in the next turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from struct import Struct
from typing import Final

from ..drops import Drop, Reason
from ..wire import ether, ip, tcp
from ..wire.checksum import PROTO_TCP
from ..wire.virtio import VNET_LEN
from .backend import Receiver
from .guest_memory import BadRing
from .packet import FRAME_ROOM
from .scattered import ScatteredPool
from .vring import Vring

BATCH_MAX: Final = 256  # frames in one batch, so that sockets get their turn
ROUNDS_MAX: Final = 8  # batches for one event
COPY_MAX: Final = 2048  # bytes of a frame that is copied whole: cheaper than views of it
_HEADERS: Final = ether.HEADER_LEN + ip.HEADER6.size + 60  # the longest that are plain: IPv6, TCP with all options
_FRONT: Final = 16  # where the first frame stands in the pool: the longer header of virtio 1 has room before it
# From the EtherType: type, version and length, TOS, total, id, fragment, TTL, protocol
_ETH_IP4: Final = Struct("!HBBHHHBB")


class FrameReader:
    """Reads frames of one ring into `pool`, and hands them to `receiver`."""

    def __init__(
        self, ring: Vring, header: int, pool: ScatteredPool, receiver: Receiver, drops: Counter[Reason]
    ) -> None:
        self.ring = ring
        self.header = header  # bytes of the virtio-net header: 10 or 12
        self._pool, self._receiver, self._drops = pool, receiver, drops
        self._limit = pool.size - 2 * FRAME_ROOM  # the last frame's room is kept for reassembled packets

    def run(self, now: float) -> bool:
        """Hand on what is in the ring, batch by batch; whether the rest has to wait. Raises BadRing or OSError."""
        ring = self.ring
        ring.want_kick(False)
        for _ in range(ROUNDS_MAX):
            more = self._batch(now)
            if not ring.runs:
                return False
            if more:
                break
            ring.want_kick(True)
            if not ring.available():
                return False
            ring.want_kick(False)
        return True

    def _batch(self, now: float) -> bool:
        """Hand on a batch of frames; whether the ring has more. Raises BadRing or OSError."""
        ring, pool = self.ring, self._pool
        available = ring.available()
        frames: list[int] = []
        heads: list[int] = []
        wrong: BadRing | None = None
        at, octets = _FRONT, 0
        shortest = self.header + ether.HEADER_LEN
        while len(heads) < available and len(heads) < BATCH_MAX and at <= self._limit:
            buffers: list[memoryview] = []
            try:
                head, total = ring.take(buffers, 0)
            except BadRing as e:
                wrong = e
                break
            heads.append(head)
            if not shortest <= total < FRAME_ROOM:
                self._drops[Drop.TRUNCATED if total < shortest else Drop.OVERSIZED_FRAME] += 1
                continue
            end = self._frame(buffers, total, at)
            frames += (at, end)
            octets += end - at - VNET_LEN
            at = end + self.header - VNET_LEN
        try:
            if frames:
                self._receiver.received(frames, octets, now)
        finally:
            pool.clear()
            if ring.bound:  # else the front end took the ring away meanwhile
                for head in heads:
                    ring.push(head, 0)
                ring.publish()
        if wrong is not None:
            raise wrong
        return len(heads) < available

    def _frame(self, buffers: Sequence[memoryview], total: int, at: int) -> int:
        """Put the frame of a chain at offset `at` of the pool; returns its end."""
        buf = self._pool.buf
        begin = at + VNET_LEN - self.header  # so that Ethernet begins where it does behind the short header
        payload = 0
        if total > COPY_MAX:
            _copy(buf, begin, buffers, self.header + _HEADERS)
            payload = _payload_of_tcp(buf, at + VNET_LEN)
        if payload:
            self._refer(buffers, payload, payload - begin)
        else:
            _copy(buf, begin, buffers, total)
        if begin != at:
            buf[at : at + VNET_LEN] = buf[begin : begin + VNET_LEN]
        return begin + total

    def _refer(self, buffers: Sequence[memoryview], offset: int, skip: int) -> None:
        """Let the pool find all but the first `skip` bytes of `buffers`, at `offset` and behind it."""
        add = self._pool.add
        for buffer in buffers:
            n = len(buffer)
            if skip >= n:
                skip -= n
                continue
            add(offset, buffer[skip:])
            offset += n - skip
            skip = 0


def _copy(buf: bytearray, at: int, buffers: Sequence[memoryview], limit: int) -> None:
    """Copy the first `limit` bytes of `buffers` to offset `at`."""
    for buffer in buffers:
        n = len(buffer)
        if n >= limit:
            buf[at : at + limit] = buffer[:limit]
            return
        buf[at : at + n] = buffer
        at += n
        limit -= n


def _payload_of_tcp(buf: bytearray, at: int) -> int:
    """Where the payload of the frame at `at` begins, if it is a plain TCP segment; 0 for all others."""
    l4 = at + ether.HEADER_LEN
    ethertype, vihl, _, _, _, fragment, _, proto = _ETH_IP4.unpack_from(buf, l4 - 2)
    if ethertype == ether.TYPE_IPV4 and vihl == 0x45 and proto == PROTO_TCP and not fragment & ip.FRAGMENT_MASK:
        l4 += ip.HEADER4.size
    elif ethertype == ether.TYPE_IPV6 and vihl >> 4 == 6 and buf[l4 + 6] == PROTO_TCP:
        l4 += ip.HEADER6.size
    else:
        return 0
    length = buf[l4 + 12] >> 4 << 2
    return l4 + length if length >= tcp.HEADER_LEN else 0
