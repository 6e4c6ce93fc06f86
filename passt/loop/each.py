"""One walk over many: flows, listeners, clients, callbacks. A fault of one of them is that one's.

    for flow in flows:                     each(flows, handle, fault_at, now)
        handle(flow, now)

On the left an exception for one flow ends the walk: those behind it are not served, this time, or ever if it happens
each time. On the right the walk goes on, and `fault_at(flow, exception)` has the fitting consequence for the one:

    walk over              consequence of a fault
    ---------------------  -----------------------------------------------------------------------------------
    flows                  the flow ends: RST for TCP; closed as "fault"
    listeners, rules       they stay, and have their next turn
    clients                the client is cut off
    callbacks              none: they are called again with the next turn, event or configuration
    takers of a capture    the capture ends

In all cases it is counted as the drop "fault", and logged at a limited rate (`record`).

tests/unit/test_walks.py finds all walks over such things. A loop is one of them unless it has its reason there, and
each walk has a test that stages a fault in it.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TypeVar, TypeVarTuple

from .. import log
from ..drops import Drop, Reason

FAULT_INTERVAL = 1.0  # s between messages about faults of one kind

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


def each(
    items: Iterable[T],
    fn: Callable[[T, *Ts], object],
    fault: Callable[[T, Exception], object],
    *args: *Ts,
) -> None:
    """Call fn(item, *args) for all `items`, as they are now: `fn` may change what they come from.

    An exception for one goes to fault(item, exception). If that fails, too, it is raised when all had their turn.
    """
    failed: list[Exception] = []
    for item in tuple(items):
        try:
            fn(item, *args)
        except Exception as e:
            try:
                fault(item, e)
            except Exception as again:
                failed.append(again)
    if failed:
        raise failed[0] if len(failed) == 1 else ExceptionGroup("consequences of faults", failed)


def record(drops: Counter[Reason], what: str, e: Exception) -> None:
    """Count a fault, and log it. `what` it was about is out of few: each has a message of its own in the log."""
    drops[Drop.FAULT] += 1
    log.warn_ratelimited(f"fault {what}", f"Handling {what} failed: {e!r}", time.monotonic(), FAULT_INTERVAL)
