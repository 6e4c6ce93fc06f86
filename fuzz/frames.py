"""Frames from a program of bytes: valid ones of every kind (tests/unit/hostile.py), changed in a few places, or any."""

from __future__ import annotations

from fuzz.steps import Steps
from passt.wire.virtio import VNET_LEN
from tests.unit.hostile import CHANGES, VOUCHED, answers, connections, seeds
from tests.unit.support import GUEST_MAC, OUR_MAC

VALID: tuple[bytes, ...] = (*(f for pair in connections() for f in pair), *answers(), *seeds())
RAW = 0xFF
UNVERIFIED = 0x80  # in the number of changes: they are found by the checksum
TYPES = b"\x08\0", b"\x86\xdd", b"\x08\x06"


def frame(steps: Steps) -> bytes:
    """The next frame, vnet header first: which one, how many changes, the changes; or 255, a length, and the bytes."""
    which = steps.byte()
    if which == RAW:
        n = steps.byte()
        return VOUCHED + OUR_MAC + GUEST_MAC + TYPES[n % 3] + steps.take(n)
    whole = VALID[which % len(VALID)]
    changes = steps.byte()
    if not changes & 3:
        return whole
    changed = bytearray(whole[VNET_LEN:])
    for _ in range(changes & 3):
        what, where, value = steps.byte(), steps.byte(), steps.word()
        if changed:
            CHANGES[what % len(CHANGES)](changed, (where | (what & 0x80) << 1) % len(changed), value)
    vnet = VOUCHED if not changes & UNVERIFIED and not whole[0] else whole[:VNET_LEN]
    return vnet + bytes(changed[:4000])


def program(*which: int) -> bytes:
    """The bytes that mean these frames, unchanged."""
    return bytes(b for w in which for b in (w, 0))
