"""Statistics: counters that no other module keeps, and figures of this process from the kernel.

    figure                             counted by                             when
    ---------------------------------  -------------------------------------  -------------------------
    frames, bytes from the guest       tap (here)                             per batch
    frames, bytes to the guest         the link, in itself                    per frame: one write
    bytes between loopbacks            splice.tcp, splice.udp (here)          per wake-up
    flows opened, closed, and reasons  flow.table, in the table               per flow
    drops, by reason                   the module that drops, in `ctx.drops`  per drop
    wake-ups, events                   the reactor, in itself                 per turn
    listening sockets, forwards, ...   their owners, as gauges                on request
    processor time, memory             the kernel                             on request

A super-frame counts as one frame, with all its bytes, where the guest's kernel takes and sends such. Bytes of frames
begin with the Ethernet header. Flows count payload. A frame that the link has taken counts as sent, even if a virtual
machine disconnects before it reads it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from ..calls import calls

CALLS = calls("pread64", "clock_gettime")

_STAT = "/proc/self/stat"  # proc(5)


class Tally:
    """Bytes in one direction."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Stats:
    """One per process. `spliced` is (to the guest, to the host) by protocol.

    `gauges` are numbers that their owners report on request: "listeners", "forwards", and "guests" where these connect
    and disconnect.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames_from_guest = 0  # written by tap
        self.bytes_from_guest = 0  # likewise
        self.spliced = {"tcp": (Tally(), Tally()), "udp": (Tally(), Tally())}
        self.gauges: dict[str, Callable[[], int]] = {}
        self.network: Callable[[], dict[str, Any]] | None = None  # what is followed of the host's network
        self._stat = -1
        self._page, self._tick = os.sysconf("SC_PAGESIZE"), os.sysconf("SC_CLK_TCK")

    def gauge(self, name: str, default: int = 0) -> int:
        """The gauge `name`, or `default` if there is none."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else default

    def open_process(self) -> None:
        """Open /proc/self/stat of this process while there is a /proc."""
        try:
            self._stat = os.open(_STAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._stat = -1  # no /proc

    def _field(self, number: int) -> int:
        """A field of the file, as proc(5) counts them. The name in field 2 may have any character."""
        return int(os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()[number - 3])

    def resident(self) -> int:
        """Resident memory of the process in bytes; 0 without /proc."""
        return self._field(24) * self._page if self._stat >= 0 else 0

    def cpu(self) -> tuple[float, float]:
        """Processor time in seconds, in user mode and in the kernel. Without /proc all of it counts as user mode."""
        if self._stat < 0:
            return time.process_time(), 0.0
        return self._field(14) / self._tick, self._field(15) / self._tick

    def close(self) -> None:
        """Close /proc/self/stat."""
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1
