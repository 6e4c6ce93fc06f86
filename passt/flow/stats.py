"""What is counted, as far as nobody counts it anyway, and what the kernel knows about this process.

    figure                             counted by                             when
    ---------------------------------  -------------------------------------  -------------------------
    frames, bytes from the guest       tap (here)                             for each batch
    frames, bytes to the guest         the link, in itself                    for each frame: one write
    bytes between loopbacks            tcp_splice, udp_splice (here)          for each wake-up
    flows opened, closed, and why      flow.table, in the table                for each flow
    drops, by reason                   whoever drops, in `ctx.drops`          for each drop
    wake-ups, events                   the reactor, in itself                 for each turn
    listening sockets, forwards, ...   their owners, who can count them       when they are asked
    processor time, memory             the kernel                             when it is asked

A super-frame counts as one frame, with all its bytes, where the guest's kernel takes and gives such; bytes of frames
are those from the Ethernet header on. Flows count payload. What a link was given is counted as sent, even if a virtual
machine leaves before it has read all of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

from ..calls import calls

CALLS = calls("pread64", "clock_gettime")

_STAT = "/proc/self/stat"  # proc(5)


class Tally:
    """Bytes that went one way."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Stats:
    """One per process. `spliced` is (to the guest, to the host) by protocol.

    `gauges` are numbers that their owners can tell at any time: "listeners", "forwards", and "guests" where these come
    and go.
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames_from_guest = 0  # written by tap
        self.bytes_from_guest = 0  # likewise
        self.spliced = {"tcp": (Tally(), Tally()), "udp": (Tally(), Tally())}
        self.gauges: dict[str, Callable[[], int]] = {}
        self._stat = -1
        self._page, self._tick = os.sysconf("SC_PAGESIZE"), os.sysconf("SC_CLK_TCK")

    def gauge(self, name: str, default: int = 0) -> int:
        """What the owner of `name` says, if it has one."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else default

    def open_process(self) -> None:
        """Be able to tell memory and time when there are no files any more. In the process that it is about."""
        try:
            self._stat = os.open(_STAT, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._stat = -1  # no /proc

    def _field(self, number: int) -> int:
        """A field of the file, as proc(5) counts them. The name in field 2 may hold anything."""
        return int(os.pread(self._stat, 1024, 0).rpartition(b")")[2].split()[number - 3])

    def resident(self) -> int:
        """Memory that the process has now, in bytes; 0 if that is not known."""
        return self._field(24) * self._page if self._stat >= 0 else 0

    def cpu(self) -> tuple[float, float]:
        """Processor time so far in seconds: ours, and the kernel's for us. Without /proc all is ours."""
        if self._stat < 0:
            return time.process_time(), 0.0
        return self._field(14) / self._tick, self._field(15) / self._tick

    def close(self) -> None:
        """For tests."""
        if self._stat >= 0:
            os.close(self._stat)
            self._stat = -1
