"""`pesto --top`: rates, flows sorted by rate, and drops, redrawn every second.

On a terminal it uses the alternate screen; `q`, Ctrl-C or SIGTERM ends it, and the terminal is as before. Without a
terminal it prints the figures of one second, once. It needs only ANSI escape sequences.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Sequence
from typing import Any, NamedTuple

from .connection import Connection, Json
from .text import ends, proto, rtt, size, span

INTERVAL = 1.0  # s
USUAL = (80, 24)  # columns and rows of a terminal that does not report its size
NARROW, LOW = 60, 10  # columns and rows of the smallest screen

_ENTER = "\x1b[?1049h\x1b[?25l"  # alternate screen, without the cursor
_LEAVE = "\x1b[?25h\x1b[?1049l"
_HOME, _REST_OF_LINE, _REST_OF_SCREEN = "\x1b[H", "\x1b[K", "\x1b[J"
_REVERSE, _PLAIN = "\x1b[7m", "\x1b[0m"
_NUMBERS = 33  # columns of the numbers of a flow

Key = tuple[Any, ...]


class View(NamedTuple):
    """The server's answers at one time."""

    stats: Json
    flows: list[Json]


def run(connection: Connection) -> None:
    """Redraw until the user quits. Raises Fatal if the server goes away."""
    if not sys.stdout.isatty():
        earlier = ask(connection)
        time.sleep(INTERVAL)
        print("\n".join(draw(ask(connection), earlier, 80, 1 << 20)))
        return
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    keyboard = _Keyboard()
    print(_ENTER, end="")
    try:
        _watch(connection, keyboard)
    except KeyboardInterrupt:
        pass  # one of these signals quits, like `q`
    finally:
        print(_LEAVE, end="", flush=True)
        keyboard.restore()


def _watch(connection: Connection, keyboard: _Keyboard) -> None:
    earlier = ask(connection)
    now = earlier
    while True:
        columns, rows = (size or usual for size, usual in zip(os.get_terminal_size(), USUAL, strict=True))
        lines = draw(now, earlier, max(columns, NARROW), max(rows, LOW))
        lines[2:3] = [f"{_REVERSE}{lines[2]:<{columns}}{_PLAIN}"]
        screen = f"{_REST_OF_LINE}\r\n".join(lines[:rows])
        print(_HOME + screen + _REST_OF_LINE + _REST_OF_SCREEN, end="", flush=True)
        if keyboard.quits(INTERVAL):
            return
        earlier, now = now, ask(connection)


def ask(connection: Connection) -> View:
    """Raises Fatal."""
    stats = connection.ask({"command": "stats"})["stats"]
    return View(stats, connection.ask({"command": "flows"})["flows"])


class _Keyboard:
    """Keys pressed, if standard input is a terminal."""

    def __init__(self) -> None:
        self._fd = sys.stdin.fileno() if sys.stdin is not None and sys.stdin.isatty() else -1
        self._before: list[Any] = []
        if self._fd >= 0:
            self._before = termios.tcgetattr(self._fd)
            tty.setcbreak(self._fd)
        signal.signal(signal.SIGWINCH, lambda *_: None)  # interrupts the wait: a new size takes effect at once

    def quits(self, seconds: float) -> bool:
        """Wait up to `seconds` for a key that quits."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            ready, _, _ = select.select([self._fd] if self._fd >= 0 else [], [], [], left)
            if ready:
                pressed = os.read(self._fd, 64)
                if not pressed or b"q" in pressed.lower():
                    return True
        return False

    def restore(self) -> None:
        if self._fd >= 0:
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)


# Drawing -----------------------------------------------------------------------------------------------------------


def draw(now: View, earlier: View, width: int, height: int) -> list[str]:
    """The lines of a screen: a summary of two, a head, flows, and drops at the end if there are any."""
    seconds = max(now.stats["uptime"] - earlier.stats["uptime"], 1e-3)
    drops = _drop_line(now.stats, earlier.stats, seconds, width)
    lines = [*_summary(now.stats, earlier.stats, seconds, width), _flow_line(("PROTO", "FROM -> TO"), _HEADS, width)]
    rates = flow_rates(now.flows, earlier.flows, seconds)
    order = sorted(range(len(now.flows)), key=lambda i: (-sum(rates[i]), now.flows[i]["index"]))
    room = height - len(lines) - len(drops)
    for i in order[:room]:
        flow = now.flows[i]
        total = size(flow["bytes_to_guest"] + flow["bytes_to_host"])
        numbers = (*map(size, rates[i]), total, rtt(flow))
        lines.append(_flow_line((proto(flow), " -> ".join(ends(flow))), numbers, width))
    return lines + drops


_HEADS = ("->GUEST/s", "->HOST/s", "TOTAL", "RTT")
_WIDTHS = (9, 8, 6, 7)


def _flow_line(texts: tuple[str, str], numbers: Sequence[str], width: int) -> str:
    room = width - _NUMBERS - 6
    name = texts[1] if len(texts[1]) <= room else f"{texts[1][: room - 1]}~"
    cells = " ".join(f"{n:>{w}}" for n, w in zip(numbers, _WIDTHS, strict=True))
    return f"{texts[0]:<5} {name:<{room}}{cells}"


def flow_rates(now: Sequence[Json], earlier: Sequence[Json], seconds: float) -> list[tuple[float, float]]:
    """Bytes a second to the guest and to the host, of each flow."""
    before = {_key(flow): flow for flow in earlier}
    found = []
    for flow in now:
        old = before.get(_key(flow))
        counts = [(flow[name], old[name] if old else 0) for name in ("bytes_to_guest", "bytes_to_host")]
        to_guest, to_host = (max(new - was, 0) / seconds for new, was in counts)
        found.append((to_guest, to_host))
    return found


def _key(flow: Json) -> Key:
    """The identity of a flow; its index alone is reused later."""
    return flow["index"], flow["protocol"], flow["guest"], flow["peer"], flow["host"]


def _summary(now: Json, earlier: Json, seconds: float, width: int) -> list[str]:
    cpu = (sum(now["cpu"].values()) - sum(earlier["cpu"].values())) / seconds
    wakeups = (now["loop"]["wakeups"] - earlier["loop"]["wakeups"]) / seconds
    first = (
        f"{now['mode']} {now['version']}, up {span(now['uptime'])}; CPU {cpu:.0%}, "
        f"memory {size(now['memory'])}, {size(wakeups)} wake-ups/s"
    )
    rates = []
    for text, direction, spliced in (("to guest", "to_guest", "to_guest"), ("to host", "from_guest", "to_host")):
        total, before = (
            s["link"][direction]["bytes"] + sum(counts[spliced] for counts in s["spliced"].values())
            for s in (now, earlier)
        )
        rates.append(f"{size((total - before) / seconds)}B/s {text}")
    counts = [f"{flow['open']} {label.replace('_splice', '+')}" for label, flow in now["flows"].items() if flow["open"]]
    second = f"{', '.join(rates)}; flows: {', '.join(counts) or 'none'}"
    return [first[:width], second[:width]]


def _drop_line(now: Json, earlier: Json, seconds: float, width: int) -> list[str]:
    """Recent drops, or all drops if there are no recent ones, most frequent first."""
    drops = {reason: count - earlier["drops"].get(reason, 0) for reason, count in now["drops"].items()}
    recent = {reason: count for reason, count in drops.items() if count}
    shown, unit = (recent, "in the last second") if recent else (now["drops"], "since the start")
    if not shown:
        return []
    items = sorted(shown.items(), key=lambda item: -item[1])
    return [f"Drops {unit}: {', '.join(f'{size(count)} {reason}' for reason, count in items)}"[:width]]
