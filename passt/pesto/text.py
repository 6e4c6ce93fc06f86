"""The output of `pesto` for users: flows and counters, as lines of text.

On a terminal, the table of flows fits its width: the windows are left out if there is no room for them, and so is the
middle of an address. A program that reads the table gets all of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Json = dict[str, Any]

SPLICED = "+"  # appended to the protocol of a flow that bypasses the tap
_HEADS = ("PROTO", "FROM", "TO", "STATE", "->GUEST", "->HOST", "AGE", "RTT", "WINDOW")
_LEFT = 4  # columns that are not numbers
_END_MIN = 9  # columns that are left of an address
_FINS = {"TAP_FIN_RCVD": "guest", "SOCK_FIN_RCVD": "host", "CLIENT_FIN": "client", "SERVER_FIN": "server"}


def flow_lines(flows: Sequence[Json], width: int | None = None) -> Iterator[str]:
    """A table of flows, for a terminal of `width` columns (None: there is no limit)."""
    rows = [_HEADS, *map(_row, flows)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADS))]
    gap = 2
    if width is not None and _total(widths, gap) > width:
        gap, rows, widths = 1, [row[:-1] for row in rows], widths[:-1]  # without the windows
        widths[1:3] = _shares(widths[1], widths[2], width - _total(widths, gap) + widths[1] + widths[2])
        rows = [(row[0], *map(_elided, row[1:3], widths[1:3]), *row[3:]) for row in rows]
    for row in rows:
        cells = [f"{c:<{w}}" if i < _LEFT else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        yield (" " * gap).join(cells).rstrip()


def _total(widths: Sequence[int], gap: int) -> int:
    """Columns of a line."""
    return sum(widths) + gap * (len(widths) - 1)


def _shares(first: int, second: int, room: int) -> tuple[int, int]:
    """Columns for two texts of these lengths: the shorter one is whole if it has at most a half."""
    room = max(room, 2 * _END_MIN)
    return max(min(first, room - second), min(first, room // 2)), max(min(second, room - first), min(second, room // 2))


def _elided(text: str, width: int) -> str:
    """`text` without its middle: an address is told from others by its beginning, and by its port."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}~{text[len(text) - end :]}"


def _state(flow: Json) -> str:
    """The state of a flow in a word or two; --json has all events of a connection."""
    state = str(flow["state"])
    if not state.isupper():
        return state
    events = state.split("|")
    fins = [end for fin, end in _FINS.items() if fin in events]
    if "SOCK_FAILED" in events:
        return "failed"
    if fins:
        return f"FIN of {'both' if len(fins) > 1 else fins[0]}"
    return "established" if "ESTABLISHED" in events else "opening"


def _row(flow: Json) -> tuple[str, ...]:
    windows = [flow.get(name) for name in ("snd_wnd", "rcv_wnd")]
    return (
        proto(flow),
        *ends(flow),
        _state(flow),
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
    if seconds < 0.0001:
        return f"{seconds * 1e6:.0f}us"
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
