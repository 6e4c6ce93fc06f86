"""Packet capture to a file, in the classic pcap format (draft-ietf-opsawg-pcap), Ethernet link type.

Frames come as they pass the tap: with a vnet header, possibly with a checksum that is left to the kernel. The header
is not saved, and the checksum is completed in the saved copy only, so that what reads the file finds it correct. A
super-frame is saved as what it is, one long packet.

Records are written when a turn of the loop ends: one system call for a batch, and nothing is lost to a signal.

    file                                              consequence
    ------------------------------------------------  --------------------------------------------------------------
    fails: disk full, quota, a reader that went away  the capture ends, with one line in the log
    a pipe whose reader is slow                       what it does not take waits, up to BACKLOG bytes; frames beyond
                                                      are left out, and counted

The network goes on in any case: it never waits for a reader of the capture.
"""

from __future__ import annotations

import os
import stat
import time
from collections import Counter
from collections.abc import Callable
from io import FileIO
from struct import Struct

from .. import log
from ..calls import calls
from ..drops import Drop, Reason
from ..wire.checksum import ones_sum
from ..wire.virtio import F_NEEDS_CSUM, VNET

FILE_HEADER = Struct("=IHHiIII")  # magic, version 2.4, time zone, accuracy, snap length, link type
RECORD = Struct("=IIII")  # seconds, microseconds, saved length, original length
MAGIC = 0xA1B2C3D4
SNAPLEN = 262144
LINKTYPE_ETHERNET = 1
BACKLOG = 4 << 20  # bytes that wait for a slow reader

CALLS = calls("write", "close")


class Pcap:
    """Writes to an open, empty file at `path`. `on_end()` is called when the capture ends."""

    def __init__(self, file: FileIO, path: str, drops: Counter[Reason]) -> None:
        self._file = file
        self._path = path
        self._drops = drops
        self.on_end: Callable[[], None] = lambda: None
        self._records: list[bytes] = []
        self._size = 0  # bytes in them
        self._left = memoryview(FILE_HEADER.pack(MAGIC, 2, 4, 0, 0, SNAPLEN, LINKTYPE_ETHERNET))  # written first
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            os.set_blocking(file.fileno(), False)

    def capture(self, to_guest: bool, data: bytes) -> None:
        """Take a frame with its vnet header, in either direction."""
        if self._file.closed:
            return
        if len(self._left) + self._size > BACKLOG:
            self._drops[Drop.CAPTURE_TOO_SLOW] += 1
            return
        frame = complete(data)
        micros = time.time_ns() // 1000
        self._records.append(RECORD.pack(micros // 1_000_000, micros % 1_000_000, len(frame), len(frame)))
        self._records.append(frame)
        self._size += RECORD.size + len(frame)

    def flush(self) -> None:
        """Write what was taken, as far as the file takes it. The capture ends if it fails."""
        try:
            while self._left or self._records:
                if not self._left:
                    self._left = memoryview(b"".join(self._records))
                    self._records.clear()
                    self._size = 0
                taken = self._file.write(self._left)
                if taken is None:
                    return  # a pipe is full
                self._left = self._left[taken:]
        except OSError as e:
            self._end(e)

    def _end(self, e: OSError) -> None:
        log.warn(f"Packet capture to {self._path} ends: {e.strerror}")
        self._records.clear()
        self._left = memoryview(b"")
        self._file.close()
        self.on_end()

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
