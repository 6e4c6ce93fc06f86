"""A tap device that another program made, without a virtio-net header: frames as they are on a wire.

The kernel cuts and sums nothing here, so `gso` does, in a buffer, from which each frame is one write. That costs a
system call for each packet instead of one for 64 KiB: good enough for a tap that was made for another program. Frames
are read as from any tap device, behind the place of a header.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

from ..drops import Drop, Reason
from ..wire.virtio import NO_OFFLOAD, VNET, VNET_LEN
from .backend import Buffer
from .gso import FRAME_MIN, LENGTH, Gso
from .packet import PacketPool
from .tap_device import TapLink
from .vector_sums import VectorVerifier
from .verify import Verifier

WRITE_MAX = 65535  # bytes of a frame that a tap device takes


class PlainLink(TapLink):
    """A tap device opened without IFF_VNET_HDR."""

    reads_vnet = False

    def __init__(self, fd: int, drops: Counter[Reason]) -> None:
        super().__init__(fd, drops, tso=True, uso=True)
        self._out = memoryview(bytearray(1 << 18))
        self._gso = Gso(self._out)

    def verifier(self, pool: PacketPool) -> Verifier:
        """The bytes in the pool are as they came from the guest."""
        return VectorVerifier(pool, self.drops)

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, virtio-net header first."""
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header, or the segments of one."""
        hdr = parts[0]
        length = sum(map(len, parts)) - VNET_LEN
        if hdr[1]:  # gso_type
            end = self._segments(hdr, parts[1] if len(parts) == 2 else b"".join(parts[1:]))
        elif length <= WRITE_MAX:
            end = self._gso.frame(0, length, parts)
        else:
            self.drops[Drop.TAP_FRAME_TOO_LONG] += 1
            return
        at, out = 0, self._out
        while at < end:
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(out, at)[0]
            if not self._write(out[start:at]):
                return

    def _segments(self, hdr: Buffer, payload: Buffer) -> int:
        """Cut a super-frame; returns where its last segment ends. The buffer grows if they are many."""
        need = len(payload) + -(-len(payload) // VNET.unpack_from(hdr)[3]) * (LENGTH.size + len(hdr) + FRAME_MIN)
        if need > len(self._out):
            self._out = memoryview(bytearray(need))
            self._gso = Gso(self._out)
        return self._gso.cut(0, hdr, payload)

    @property
    def sent_bytes(self) -> int:
        """Bytes of frames that were sent."""
        return self._written

    def _write(self, frame: memoryview) -> bool:
        """Whether the device still takes frames."""
        try:
            self._written += os.write(self.fd, frame)
        except OSError as e:
            return self._failed(e)
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, NO_OFFLOAD + frame)
        return True
