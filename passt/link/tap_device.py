"""The way out: frames to the guest. The only writer of the tap.

A pre-cooked frame is a `bytearray` that starts with the 10-byte vnet header (native byte order, as the kernel wants
it), then Ethernet, IP and transport headers; the caller has written the fields that change. The payload is a view of
wherever the data lies. One frame is one `writev`; with offloads it may be up to 64 KiB at any MTU.

    struct virtio_net_hdr (include/uapi/linux/virtio_net.h, VIRTIO_NET_HDR_F_* and _GSO_*)
    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
"""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Callable, Sequence
from struct import Struct
from typing import Protocol

from .. import PASTA
from ..calls import calls

VNET = Struct("=BBHHHH")
F_NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
NO_OFFLOAD = bytes(VNET.size)

# The guest's side could not take a frame now: a drop, which the transport above repairs, as on any link.
TRANSIENT = frozenset((errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOSPC, errno.EIO, errno.ENOMEM))

Buffer = bytes | bytearray | memoryview
Capture = Callable[[bool, bytes], None]

CALLS = calls("write", "writev", mode=PASTA)


class Link(Protocol):
    """What protocols may ask of the way out."""

    tso: bool  # whether TCP super-frames may be sent
    uso: bool  # whether UDP super-frames may be sent
    full: bool  # whether frames would be dropped now, so that who can wait should

    @property
    def sent_frames(self) -> int:
        """How many were sent; a super-frame of a device that takes such is one."""

    @property
    def sent_bytes(self) -> int:
        """Bytes in them, from the Ethernet header on."""

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, vnet header first."""

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header."""

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no vnet header, no offload."""


class TapLink:
    """A tap device opened with IFF_VNET_HDR."""

    full = False  # its queue is the guest's; what does not fit is a drop

    def __init__(self, fd: int, drops: Counter[str], *, tso: bool = True, uso: bool) -> None:
        self.fd = fd
        self.tso = tso
        self.uso = uso
        self._drops = drops
        self.sent_frames = 0
        self._written = 0  # bytes, with vnet headers: what writes return
        self.capture: Capture | None = None  # capture(to_guest, vnet header + frame)
        self.on_error: Callable[[OSError], None] | None = None  # the device is gone

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, vnet header first."""
        try:
            self._written += os.write(self.fd, hdr)
        except OSError as e:
            self._failed(e)
            return
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, bytes(hdr))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the vnet header."""
        try:
            self._written += os.writev(self.fd, parts)
        except OSError as e:
            self._failed(e)
            return
        self.sent_frames += 1
        if self.capture is not None:
            self.capture(True, b"".join(parts))

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no vnet header, no offload."""
        self.send_payload((NO_OFFLOAD, frame))

    @property
    def sent_bytes(self) -> int:
        """Bytes of frames that were sent."""
        return self._written - self.sent_frames * VNET.size

    def _failed(self, e: OSError) -> None:
        if e.errno in TRANSIENT:
            self._drops[f"tap write: {errno.errorcode[e.errno or 0]}"] += 1
        elif self.on_error is not None:
            self.on_error(e)
        else:
            raise e


class NoLink:
    """No tap at all (--splice-only): there is nobody to send a frame to."""

    tso = False
    uso = False
    full = False
    sent_frames = sent_bytes = 0

    def __init__(self, drops: Counter[str]) -> None:
        self._drops = drops

    def send(self, hdr: bytearray) -> None:
        """Count a drop."""
        self._drops["no tap"] += 1

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Count a drop."""
        self._drops["no tap"] += 1

    def send_frame(self, frame: bytes) -> None:
        """Count a drop."""
        self._drops["no tap"] += 1
