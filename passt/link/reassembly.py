"""IP reassembly (RFC 791, 3.2; RFC 8200, 4.5), bounded in time and memory.

    queue = Reassembly(ctx.drops)
    datagram = queue.add(key, offset, more, payload, now)

for each fragment, whole or malicious, of either family:

    key      whatever the family calls "the same packet", packed. IPv4: source, destination, protocol, identification
             (RFC 791). IPv6: source, destination, next header of the fragment header, identification (32 bits).
    offset   of this fragment in the fragmentable part, in bytes: 8 * the field's value
    more     the More Fragments flag
    payload  what follows the IPv4 header (or the IPv6 fragment header): copied, the caller may reuse its buffer

The answer is the fragmentable part of the complete packet (its transport header and data), or None: not yet, or never.
A packet that is no fragment (offset 0, nothing more) comes back at once and disturbs nothing (RFC 6946).

Rules, each counted in `drops` under its reason:

    overlap          a fragment that overlaps another spoils the packet: what came is thrown away, and what still comes
                     is ignored until the packet would have timed out (RFC 5722; for IPv4 as well, since no sender
                     makes overlaps but to deceive). An exact copy of a fragment is ignored alone: links duplicate.
    bad fragment     not the last and no multiple of 8 bytes, empty, beyond the known end, or beyond 65535 bytes (IPv4:
                     with the header)
    timeout          30 s after the first fragment came (as Linux; RFC 791 has 15 s, RFC 8200 60 s)
    queue full       more than PACKETS packets, or MEMORY bytes with what Python needs per fragment: oldest goes first

There is no timer: what is late is discarded when the next fragment comes, and what lies here is bounded.
No ICMP Time Exceeded is made: the guest's own kernel is at the other end of the wire, and it lost nothing.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter

from ..drops import Drop, Reason

TIMEOUT = 30.0  # s
PACKETS = 64
MEMORY = 4 << 20
LENGTH_MAX = 65535
OVERHEAD = 128  # bytes that a fragment costs beside its payload: a bytes object, an int, two list entries


class _Packet:
    """The fragments of one packet that came so far, sorted by offset and disjoint."""

    __slots__ = ("born", "have", "length", "parts", "spoiled", "starts")

    def __init__(self, now: float) -> None:
        self.born = now
        self.starts: list[int] = []
        self.parts: list[bytes] = []
        self.have = 0  # bytes in `parts`
        self.length = -1  # of the whole, once the last fragment has told
        self.spoiled = False

    def cost(self) -> int:
        return self.have + OVERHEAD * len(self.parts)


class Reassembly:
    """One queue for both families: the lengths of their keys differ."""

    def __init__(self, drops: Counter[Reason]) -> None:
        self._drops = drops
        self._packets: dict[bytes, _Packet] = {}  # in the order in which their first fragments came
        self.memory = 0

    def __len__(self) -> int:
        return len(self._packets)

    def add(
        self, key: bytes, offset: int, more: bool, payload: bytes | memoryview, now: float, most: int = LENGTH_MAX
    ) -> bytes | None:
        """Take one fragment; returns the packet that it completes, which has at most `most` bytes."""
        if offset == 0 and not more:
            return bytes(payload)
        self._expire(now)
        end = offset + len(payload)
        if not payload or (more and len(payload) % 8) or end > most:
            self._drops[Drop.FRAGMENT_BAD] += 1
            return None
        packet = self._packets.get(key)
        if packet is None:
            packet = self._packets[key] = _Packet(now)
        elif packet.spoiled:
            self._drops[Drop.FRAGMENT_OVERLAP] += 1
            return None
        self._insert(packet, offset, end, more, payload)
        if packet.have == packet.length:
            self._forget(key)
            return b"".join(packet.parts)
        self._bound()
        return None

    def _insert(self, packet: _Packet, offset: int, end: int, more: bool, payload: bytes | memoryview) -> None:
        """Put a fragment where it belongs, unless the rules forbid it."""
        starts, parts = packet.starts, packet.parts
        i = bisect_left(starts, offset)
        if i < len(starts) and starts[i] == offset and parts[i] == payload and (more or packet.length == end):
            self._drops[Drop.FRAGMENT_DUPLICATE] += 1
            return
        before = i > 0 and starts[i - 1] + len(parts[i - 1]) > offset
        after = i < len(starts) and starts[i] < end
        if before or after:
            self._spoil(packet)
            return
        known = starts[-1] + len(parts[-1]) if starts else 0
        if (more and 0 <= packet.length < end) or (not more and (packet.length not in (-1, end) or known > end)):
            self._drops[Drop.FRAGMENT_BAD] += 1
            return
        if not more:
            packet.length = end
        starts.insert(i, offset)
        parts.insert(i, bytes(payload))
        packet.have += len(payload)
        self.memory += len(payload) + OVERHEAD

    def _spoil(self, packet: _Packet) -> None:
        """Throw away what came; the empty entry stays, so that the rest is known for what it is."""
        self._drops[Drop.FRAGMENT_OVERLAP] += 1
        self.memory -= packet.cost()
        packet.starts, packet.parts, packet.have, packet.length = [], [], 0, -1
        packet.spoiled = True

    def _forget(self, key: bytes) -> None:
        self.memory -= self._packets.pop(key).cost()

    def _expire(self, now: float) -> None:
        """Discard what is too old; the oldest is first."""
        while self._packets:
            key, packet = next(iter(self._packets.items()))
            if now - packet.born < TIMEOUT:
                return
            if not packet.spoiled:
                self._drops[Drop.FRAGMENT_TIMEOUT] += 1
            self._forget(key)

    def _bound(self) -> None:
        """Discard the oldest packets until the limits hold."""
        while len(self._packets) > PACKETS or self.memory > MEMORY:
            self._drops[Drop.FRAGMENT_QUEUE_FULL] += 1
            self._forget(next(iter(self._packets)))
