"""Messages of neighbour discovery, and their options.

Invariants: parsing gives a message or `Malformed`; what is emitted is parsed as the same message; options hold no more
than a few times the bytes of the message.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import ndp
from passt.wire.cursor import Malformed

ADDRESS = b"\x20\1\x0d\xb8" + bytes(12)
KINDS = (ndp.RouterSolicitation, ndp.RouterAdvertisement, ndp.NeighbourSolicitation, ndp.NeighbourAdvertisement)


def seeds() -> Iterable[bytes]:
    mac = ndp.LinkAddress(ndp.LinkAddress.SOURCE, b"RT\0\x12\x34\x56")
    more = (ndp.Prefix(ADDRESS, 64), ndp.Mtu(1500), ndp.Rdnss((ADDRESS,)), ndp.Dnssl(("example.org", "a.example")))
    yield ndp.RouterSolicitation((mac,)).emit()
    yield ndp.RouterAdvertisement(255, 0, 9000, (mac, *more)).emit()
    yield ndp.NeighbourSolicitation(ADDRESS, (mac,)).emit()
    yield ndp.NeighbourAdvertisement(ndp.NeighbourAdvertisement.ROUTER, ADDRESS, (mac,)).emit()


def one(data: bytes) -> None:
    if not data or not 133 <= data[0] <= 136:
        return
    kind = KINDS[data[0] - 133]
    try:
        message = kind.parse(data)
    except Malformed:
        return
    names = sum(len(n) for o in message.options if isinstance(o, ndp.Dnssl) for n in o.names)
    assert names <= len(data)
    assert kind.parse(message.emit()) == message
