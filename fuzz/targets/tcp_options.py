"""Options of a SYN, and SACK.

Invariants: parsing gives options or `Malformed`; the window scale is at most 14, an MSS is never zero; what is emitted
is parsed as the same. There are no more SACK blocks than fit.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire.cursor import Malformed
from passt.wire.tcp import MSS_DEFAULT, WS_MAX, SynOptions, emit_sack, parse_sack


def seeds() -> Iterable[bytes]:
    yield SynOptions(1460, 7).emit()
    yield bytes.fromhex("020405b40402080a0001020300000000 01030307")
    yield bytes.fromhex("0101030f00")
    yield SynOptions(1460, 7, sack=True).emit()
    yield emit_sack([(1, 2), (1 << 31, 5)])


def one(data: bytes) -> None:
    try:
        options = SynOptions.parse(data)
    except Malformed:
        return
    assert options.mss is None or 0 < options.mss <= 0xFFFF
    assert options.ws is None or 0 <= options.ws <= WS_MAX
    blocks = parse_sack(data)
    assert len(blocks) * 8 + 2 <= max(len(data), 2)
    if blocks:
        assert parse_sack(emit_sack(blocks[:4])) == blocks[:4]
    ours = SynOptions(options.mss or MSS_DEFAULT, options.ws, options.sack)
    raw = ours.emit()
    assert not len(raw) % 4 and SynOptions.parse(raw) == ours
