"""The guest's kernel, which processes a frame with a vnet header: checksums completed, UDP super-frames cut.

Software segmentation as in the kernel: the partial checksum of the super-frame is adjusted by the difference of the
lengths, never computed from the addresses again, so a wrong one shows in every datagram.
"""

from __future__ import annotations

from passt.wire.checksum import checksum, ones_sum
from passt.wire.virtio import F_NEEDS_CSUM, GSO_NONE, GSO_UDP_L4, VNET

from .support import FakeLink

ETH = 14
UDP = 8
IP4_LENGTH = 2
IP6_LENGTH = 4


def received(link: FakeLink) -> list[bytes]:
    """The frames of `link` as they leave the guest's driver."""
    vnets = list(link.vnet)
    return [out for vnet, frame in zip(vnets, link.take(), strict=True) for out in arrive(vnet, frame)]


def arrive(vnet: bytes, frame: bytes) -> list[bytes]:
    """One frame, as sent with the vnet header `vnet` (none for a finished frame)."""
    if not any(vnet):
        return [frame]
    flags, gso, hdr_len, size, start, offset = VNET.unpack(vnet)
    assert flags == F_NEEDS_CSUM
    assert gso in (GSO_NONE, GSO_UDP_L4)
    assert start >= ETH + 20
    if gso == GSO_NONE:
        assert size == 0
        return [_complete(frame, start, offset)]
    assert (offset, hdr_len) == (6, start + UDP)
    payload = frame[hdr_len:]
    assert size < len(payload) <= 65535, "a super-frame holds several datagrams"
    return [
        _complete(_cut(frame, start, payload[at : at + size]), start, offset) for at in range(0, len(payload), size)
    ]


def _cut(frame: bytes, start: int, payload: bytes) -> bytes:
    """The super-frame's headers, adjusted to one datagram."""
    out = bytearray(frame[: start + UDP] + payload)
    less = len(frame) - len(out)
    v4 = out[ETH] >> 4 == 4
    at = ETH + (IP4_LENGTH if v4 else IP6_LENGTH)
    out[at : at + 2] = (int.from_bytes(out[at : at + 2], "big") - less).to_bytes(2, "big")
    if v4:
        out[ETH + 10 : ETH + 12] = bytes(2)
        out[ETH + 10 : ETH + 12] = checksum(out[ETH : ETH + 20]).to_bytes(2, "big")
    length = int.from_bytes(out[start + 4 : start + 6], "big") - less
    out[start + 4 : start + 6] = length.to_bytes(2, "big")
    partial = (int.from_bytes(out[start + 6 : start + 8], "big") - less) % 0xFFFF
    out[start + 6 : start + 8] = partial.to_bytes(2, "big")
    return bytes(out)


def _complete(frame: bytes, start: int, offset: int) -> bytes:
    """Sum from `start` on, where the field holds what the pseudo-header contributes (CHECKSUM_PARTIAL)."""
    c = 0xFFFF - ones_sum(frame[start:])
    return frame[: start + offset] + (c or 0xFFFF).to_bytes(2, "big") + frame[start + offset + 2 :]
