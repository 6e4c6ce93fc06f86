"""IPv6 extension headers between bytes that are not of the packet.

Invariants: the walk ends at an upper-layer protocol inside the packet or at its end, or in `Malformed`; bytes before
and behind the packet make no difference.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import ip
from passt.wire.cursor import Malformed

FRONT = 7
FILLS = bytes(40), b"\xff" * 40
HEADERS = {ip.HOP_BY_HOP, ip.ROUTING, ip.DESTINATION_OPTIONS, ip.AUTHENTICATION, ip.NO_NEXT_HEADER}


def seeds() -> Iterable[bytes]:
    hop_by_hop = b"\x3c\0\1\4\0\0\0\0"
    options = b"\x2b\0\1\4\0\0\0\0"
    routing = b"\x2c\2\3\1" + bytes(20)
    whole, first = b"\x33\0\0\0\0\0\0\7", b"\x11\0\0\1\0\0\0\7"
    authentication = b"\x11\4" + bytes(22)
    yield b"\0" + hop_by_hop + options + routing + whole + authentication + bytes(8)
    yield b"\0" + hop_by_hop + options + routing + first + bytes(8)
    yield b"\0" + b"\0\0\0\0\0\0\0\0" * 17
    yield b"\x3b"


def walk(fill: bytes, packet: bytes, proto: int) -> tuple[int, int] | str:
    buf = bytearray(fill[:FRONT] + packet + fill[FRONT:])
    try:
        return ip.skip_extensions(buf, FRONT, FRONT + len(packet), proto)
    except Malformed as e:
        return e.reason


def one(data: bytes) -> None:
    if not data:
        return
    packet = data[1:]
    found, again = (walk(fill, packet, data[0]) for fill in FILLS)
    assert found == again
    if isinstance(found, tuple):
        proto, offset = found
        assert FRONT <= offset <= FRONT + len(packet) and proto not in HEADERS
        assert proto != ip.FRAGMENT or offset + 8 <= FRONT + len(packet)
