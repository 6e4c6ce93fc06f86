"""Periodic log output: statistics, and counts of suppressed messages.

    event                                     log output
    ----------------------------------------  ----------------------------------------------------------------------
    every --stats seconds, and at the end     the table of `control/metrics.py`, or a line of JSON
    SIGUSR1                                   the same, at once
    end of a suppression interval             the number of suppressed messages, if not logged yet (`log.flush_held`)
    end of the program                        likewise, for all suppressed messages

Rates are averages since the previous table of either kind, or since the start. Without --stats there is no timer for
it; the timer for messages is armed only while messages are suppressed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from .. import NEVER, log
from ..control import metrics

if TYPE_CHECKING:
    from ..conf.options import Options
    from ..flow.context import Context


class Reports:
    """Handles the signal from its creation on; `begin` is called later, in the process that stays."""

    def __init__(self, ctx: Context, options: Options) -> None:
        self._ctx = ctx
        self._interval = options.stats
        self._lines = _as_json() if options.stats_json else metrics.table
        self._earlier: metrics.Snapshot | None = None  # the last one that was logged, or that of `begin`
        self._due = 0.0
        if signal.getsignal(signal.SIGUSR1) != signal.SIG_IGN:
            ctx.reactor.on_signal(signal.SIGUSR1, self.show)
        services = ctx.timers.services
        self._timer = services.new(self._tick) if self._interval else -1
        log.on_held = partial(services.arm, services.new(log.flush_held))

    def begin(self, now: float) -> None:
        """Open the last file and start the timer. Counters of the start are excluded from the first rates."""
        self._ctx.stats.open_process()
        self._earlier = metrics.snapshot(self._ctx, now)
        if self._interval:
            self._due = now + self._interval
            self._ctx.timers.services.arm(self._timer, self._due)

    def show(self, now: float) -> None:
        """Log statistics since the last time."""
        current = metrics.snapshot(self._ctx, now)
        log.report(self._lines(current, self._earlier))
        self._earlier = current

    def _tick(self, now: float) -> None:
        self.show(now)
        self._due += self._interval
        if self._due <= now:
            self._due = now + self._interval  # after a long turn, missed intervals are skipped
        self._ctx.timers.services.arm(self._timer, self._due)

    def end(self) -> None:
        """The program ends."""
        if self._interval:
            self.show(time.monotonic())
        log.on_held = None
        log.flush_held(NEVER)


def _as_json() -> Callable[[metrics.Snapshot, metrics.Snapshot | None], list[str]]:
    """The function that formats a line of JSON; json is imported only when needed."""
    import json

    return lambda current, _: [json.dumps(current, separators=(",", ":"))]
