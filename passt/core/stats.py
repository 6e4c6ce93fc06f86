"""What is counted, as far as nobody counts it anyway, and what the kernel knows about this process.

    figure                             counted by                             when
    ---------------------------------  -------------------------------------  -------------------------
    frames, bytes from the guest       tap (here)                             for each batch
    frames, bytes to the guest         the link, in itself                    for each frame: one write
    bytes between loopbacks            tcp_splice, udp_splice (here)          for each wake-up
    flows opened, closed, and why      core.flow, in the table                for each flow
    drops, by reason                   whoever drops, in `ctx.drops`          for each drop
    wake-ups, events                   the reactor, in itself                 for each turn
    listening sockets, forwards, ...   their owners, who can count them       when they are asked
    processor time, memory             the kernel                             when it is asked

A super-frame counts as one frame, with all its bytes; bytes of frames are those from the Ethernet header on.

System calls when asked: getrusage, pread64.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable

_STATM = "/proc/self/statm"  # in pages: size, resident, ... (proc(5))
_KIB = 1024


class Tally:
    """Bytes that went one way."""

    __slots__ = ("bytes",)

    def __init__(self) -> None:
        self.bytes = 0


class Stats:
    """One per process. `spliced` is (to the guest, to the host) by protocol.

    `gauges` are numbers that their owners can tell at any time: "listeners", "forwards", "guests".
    """

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.frames_from_guest = 0  # written by tap
        self.bytes_from_guest = 0  # likewise
        self.spliced = {"tcp": (Tally(), Tally()), "udp": (Tally(), Tally())}
        self.gauges: dict[str, Callable[[], int]] = {}
        self._statm = -1
        self._page = resource.getpagesize()

    def gauge(self, name: str) -> int:
        """What the owner of `name` says; 0 if it has none."""
        ask = self.gauges.get(name)
        return ask() if ask is not None else 0

    def open_memory(self, proc: int | None = None) -> None:
        """Be able to tell memory even without a file system. To be called in the process that it is about.

        `proc` is a descriptor of /proc, where that is not there by name any more.
        """
        path = _STATM if proc is None else _STATM.removeprefix("/proc/")
        try:
            self._statm = os.open(path, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
        except OSError:
            self._statm = -1  # no /proc: `resident` has another source

    def resident(self) -> int:
        """Memory that the process has now, in bytes; where only that is known, the most it ever had."""
        if self._statm >= 0:
            return int(os.pread(self._statm, 128, 0).split()[1]) * self._page
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB

    @staticmethod
    def cpu() -> tuple[float, float]:
        """Processor time so far in seconds: ours, and the kernel's for us."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return usage.ru_utime, usage.ru_stime

    def close(self) -> None:
        """For tests."""
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1
