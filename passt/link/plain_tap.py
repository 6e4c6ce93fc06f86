"""The way out to a tap device that somebody else made, without a vnet header: frames as they are on a wire.

The kernel cuts and sums nothing here, so `gso` does, in a buffer, from which each frame is one write. That costs a
system call for each packet instead of one for 64 KiB: good enough for a tap that was made for another program.
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence

from .gso import LENGTH, Gso
from .tap_device import NO_OFFLOAD, TRANSIENT, VNET, Buffer, Capture

FRAME_MAX = 65535  # bytes that a tap device takes


class PlainLink:
    """A tap device opened without IFF_VNET_HDR."""

    tso = True
    uso = True
    full = False  # its queue is the guest's; what does not fit is a drop

    def __init__(self, fd: int, drops: Counter[str]) -> None:
        self.fd = fd
        self._drops = drops
        self.sent_frames = self.sent_bytes = 0
        self._out = memoryview(bytearray(1 << 18))
        self._gso = Gso(self._out)
        self.capture: Capture | None = None  # capture(to_guest, vnet header + frame)
        self.on_error: Callable[[OSError], None] | None = None  # the device is gone

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, vnet header first."""
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header, or the segments of one."""
        hdr = parts[0]
        length = sum(map(len, parts)) - VNET.size
        if hdr[1]:  # gso_type
            end = self._segments(hdr, parts[1] if len(parts) == 2 else b"".join(parts[1:]))
        elif length <= FRAME_MAX:
            self._gso.frame(0, length, parts)
            end = LENGTH.size + length
        else:
            self._drops["tap write: frame too long"] += 1
            return
        at, out = 0, self._out
        while at < end:
            start = at + LENGTH.size
            at = start + LENGTH.unpack_from(out, at)[0]
            if not self._write(out[start:at]):
                return

    def _segments(self, hdr: Buffer, payload: Buffer) -> int:
        """Cut a super-frame; returns where its last segment ends. The buffer grows if they are many."""
        need = len(payload) + -(-len(payload) // VNET.unpack_from(hdr)[3]) * (LENGTH.size + len(hdr))
        if need > len(self._out):
            self._out = memoryview(bytearray(need))
            self._gso = Gso(self._out)
        return self._gso.cut(0, hdr, payload)

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no vnet header, no offload."""
        self.send_payload((NO_OFFLOAD, frame))

    def _write(self, frame: memoryview) -> bool:
        """Whether the device still takes frames."""
        try:
            self.sent_bytes += os.write(self.fd, frame)
        except OSError as e:
            if e.errno in TRANSIENT:
                self._drops[f"tap write: {errno.errorcode[e.errno or 0]}"] += 1
                return True
            if self.on_error is None:
                raise
            self.on_error(e)
            return False
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, NO_OFFLOAD + frame)
        return True
