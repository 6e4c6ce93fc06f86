"""What the operator is told while the program runs: statistics, and messages that were held back.

    time, signal                              what is logged
    ----------------------------------------  ----------------------------------------------------------------------
    every --stats seconds, and at the end     the table of `control/metrics.py`, or a line of JSON
    SIGUSR1                                   the same, at once
    a message was held back for long enough   how many there were, if none like it has told (`log.flush_held`)
    the end                                   likewise, for all that are held back

Rates are those since the last table, for whatever reason that was shown, or since the start. Without --stats there is
no timer for it; the one of messages is armed only while one is held back.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .. import log
from ..control import metrics

if TYPE_CHECKING:
    from ..conf.options import Options
    from ..flow.context import Context


class Reports:
    """Takes the signal from the moment it is made on; `begin` is for later, in the process that stays."""

    def __init__(self, ctx: Context, options: Options) -> None:
        self._ctx = ctx
        self._interval = options.stats
        self._lines = _as_json() if options.stats_json else metrics.table
        self._earlier: metrics.Snapshot | None = None  # the last one that was shown, or that of the begin
        self._due = 0.0
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
            ctx.reactor.on_signal(signal.SIGUSR1, self.show)
        services = ctx.timers.services
        self._timer = services.new(self._tick) if self._interval else -1
        log.on_held = partial(services.arm, services.new(log.flush_held))

    def begin(self, now: float) -> None:
        """Open the last file, start the timer. What it took to get here is not of the loop."""
        self._ctx.stats.open_process()
        self._earlier = metrics.snapshot(self._ctx, now)
        if self._interval:
            self._due = now + self._interval
            self._ctx.timers.services.arm(self._timer, self._due)

    def show(self, now: float) -> None:
        """Log what happened since the last time."""
        current = metrics.snapshot(self._ctx, now)
        log.report(self._lines(current, self._earlier))
        self._earlier = current

    def _tick(self, now: float) -> None:
        self.show(now)
        self._due += self._interval
        if self._due <= now:
            self._due = now + self._interval  # a long turn: what was missed is not made up for
        self._ctx.timers.services.arm(self._timer, self._due)

    def end(self) -> None:
        """The program ends."""
        if self._interval:
            self.show(time.monotonic())
        log.on_held = None
        log.flush_held(log.NEVER)


def _as_json() -> Callable[[metrics.Snapshot, metrics.Snapshot | None], list[str]]:
    """What makes a line of JSON, imported only where one is wanted."""
    import json

    return lambda current, _: [json.dumps(current, separators=(",", ":"))]
