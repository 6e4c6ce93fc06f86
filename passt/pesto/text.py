"""The output of `pesto` for users: flows and counters, as lines of text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]

SPLICED = "+"  # appended to the protocol of a flow that bypasses the tap
_HEADS = ("PROTO", "FROM", "TO", "STATE", "->GUEST", "->HOST", "AGE", "RTT", "WINDOW")
_LEFT = 4  # columns that are not numbers


def flow_lines(flows: Sequence[Json]) -> Iterator[str]:
    """A table of flows."""
    rows = [_HEADS, *map(_row, flows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    for row in rows:
        cells = [f"{c:<{w}}" if i < _LEFT else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield "  ".join(cells).rstrip()


def _row(flow: Json) -> tuple[str, ...]:
    windows = [flow.get(name) for name in ("snd_wnd", "rcv_wnd")]
    return (
        proto(flow),
        *ends(flow),
        flow["state"],
        size(flow["bytes_to_guest"]),
        size(flow["bytes_to_host"]),
        span(flow["age"]),
        rtt(flow),
        "/".join(size(w) if w is not None else "-" for w in windows) if any(w is not None for w in windows) else "",
    )


def proto(flow: Json) -> str:
    """ "tcp", or "tcp+" for a flow from socket to socket."""
    return str(flow["protocol"]) + (SPLICED if flow["path"] == "splice" else "")


def ends(flow: Json) -> tuple[str, str]:
    """The end that began the flow, and the other end; the host's end has its address on the host, if known."""
    outside = flow["host"] or flow["peer"] or "-"
    inside = flow["guest"] or "-"
    return (inside, outside) if flow["direction"] == "guest" else (outside, inside)


def rtt(flow: Json) -> str:
    seconds = flow.get("rtt")
    if seconds is None:
        return ""
    return f"{seconds * 1000:.1f}ms" if seconds < 1 else f"{seconds:.1f}s"


def size(number: float) -> str:
    """At most five characters: 999, 1.2k, 345k, 1.2G."""
    if number < 1000:
        return f"{number:.0f}"
    for unit in "kMGTP":
        number /= 1000
        if number < 9.95:
            return f"{number:.1f}{unit}"
        if number < 999.5:
            return f"{number:.0f}{unit}"
    return f"{number:.0f}P"


def span(seconds: float) -> str:
    """A duration: 12.3s, 4m05s, 3h07m, 2d04h."""
    if seconds < 59.95:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02}s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours < 24 else f"{hours // 24}d{hours % 24:02}h"


def stat_lines(answer: Json) -> list[str]:
    """The table of --stats."""
    from ..control import metrics  # a slow import

    return metrics.table(answer["stats"])
