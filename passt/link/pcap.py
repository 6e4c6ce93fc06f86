"""Packet capture to a file, in the classic pcap format (draft-ietf-opsawg-pcap), Ethernet link type.

Frames come as they pass the tap: with a vnet header, possibly with a checksum that is left to the kernel. The header
is not saved, and the checksum is completed in the saved copy only, so that what reads the file finds it correct. A
super-frame is saved as what it is, one long packet.

Records are written when a turn of the loop ends: one system call for a batch, and nothing is lost to a signal.
"""

from __future__ import annotations

import time
from io import FileIO
from struct import Struct

from ..calls import calls
from ..wire.checksum import ones_sum
from .tap_device import F_NEEDS_CSUM, VNET

FILE_HEADER = Struct("=IHHiIII")  # magic, version 2.4, time zone, accuracy, snap length, link type
RECORD = Struct("=IIII")  # seconds, microseconds, saved length, original length
MAGIC = 0xA1B2C3D4
SNAPLEN = 262144
LINKTYPE_ETHERNET = 1

CALLS = calls("write")


class Pcap:
    """Writes to an open, empty file."""

    def __init__(self, file: FileIO) -> None:
        self._file = file
        self._records: list[bytes] = [FILE_HEADER.pack(MAGIC, 2, 4, 0, 0, SNAPLEN, LINKTYPE_ETHERNET)]
        self.flush()

    def capture(self, to_guest: bool, data: bytes) -> None:
        """Take a frame with its vnet header, in either direction."""
        frame = complete(data)
        micros = time.time_ns() // 1000
        self._records.append(RECORD.pack(micros // 1_000_000, micros % 1_000_000, len(frame), len(frame)))
        self._records.append(frame)

    def flush(self) -> None:
        """Write what was taken. Raises OSError."""
        if self._records:
            data = memoryview(b"".join(self._records))
            self._records.clear()
            while data:
                data = data[self._file.write(data) :]

    def at_turn_end(self, now: float) -> None:
        """For the loop."""
        self.flush()


def complete(data: bytes) -> bytes:
    """The frame of `data`, a vnet header and a frame, with its checksum completed.

    The checksum field holds the sum of the pseudo-header; the checksum is that of everything from csum_start on. UDP
    over IPv4 sends 0xffff for a sum of zero, which no other protocol minds, both being zero in one's complement.
    """
    flags, _, _, _, start, offset = VNET.unpack_from(data)
    frame = data[VNET.size :]
    field = start + offset
    if not flags & F_NEEDS_CSUM or field + 2 > len(frame):
        return frame
    value = 0xFFFF - ones_sum(memoryview(frame)[start:]) or 0xFFFF
    return frame[:field] + value.to_bytes(2, "big") + frame[field + 2 :]
