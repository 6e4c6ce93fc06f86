"""Our fragments, handed to reassembly in any order.

Invariants: the pieces of a message are no longer than the MTU, and every order of them gives the message once, whole,
when the last piece came, with nothing left in the queue.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from passt.link.reassembly import Reassembly
from passt.wire import ip
from passt.wire.fragment import HEADER6, fragments

ENDS = {True: (b"\xc0\0\2\1", b"\xc0\0\2\2"), False: (b"\x20\1\x0d\xb8" + bytes(12), b"\xfe\x80" + bytes(14))}


def seeds() -> Iterable[bytes]:
    yield bytes((0, 0)) + bytes(range(8)) + bytes(100)
    yield bytes((1, 9)) + bytes(range(8, 0, -1)) + bytes(range(200))
    yield bytes((3, 200)) + bytes(8) + bytes(300)


def pieces(v4: bool, message: bytes, mtu: int) -> Iterable[tuple[bytes, int, bool, bytes]]:
    """The arguments of `Reassembly.add` for each fragment."""
    for packet in fragments(*ENDS[v4], 17, message, mtu, 7):
        assert len(packet) <= mtu
        if v4:
            where, payload = int.from_bytes(packet[6:8], "big"), packet[20:]
            assert int.from_bytes(packet[2:4], "big") == len(packet)
            yield packet[4:6] + packet[12:20], (where & 0x1FFF) * 8, bool(where & ip.MF), payload
        else:
            shim = packet[40 : 40 + HEADER6.size]
            where = int.from_bytes(shim[2:4], "big")
            yield packet[8:40] + shim[4:], where & 0xFFF8, bool(where & 1), packet[48:]


def one(data: bytes) -> None:
    if len(data) < 11:
        return
    v4, message = bool(data[0] & 1), data[10:]
    left = list(pieces(v4, message, (28 if v4 else 56) + data[1]))
    queue = Reassembly(Counter())
    whole = None
    for i in range(len(left)):
        assert whole is None
        whole = queue.add(*left.pop(data[2 + i % 8] % len(left)), 0.0)
    assert whole == message and not len(queue) and not queue.memory
