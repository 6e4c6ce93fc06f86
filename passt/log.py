"""Messages to the operator: levels, targets, rate limits.

Everything goes to standard error until the daemon is in the background, and to syslog (or the log file) from the
moment options are parsed. `debug` lines carry seconds since start. Messages cost nothing when their level is off:
test `log.debug_on` before building an expensive one.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from typing import TextIO

ERR, WARNING, INFO, DEBUG, TRACE = 3, 4, 6, 7, 8

_START = time.monotonic()
debug_on = False
trace_on = False

_level = INFO
_ident = "pasta"
_stderr: TextIO | None = sys.stderr
_timestamps = False
_syslog: socket.socket | None = None
_last: dict[str, tuple[float, int]] = {}


class Fatal(Exception):
    """The program cannot go on: one line saying what failed, why, and what to do. Exit status 1."""


def setup(ident: str, level: int, *, syslog: bool) -> None:
    """Set the name, the level (ERR..TRACE) and whether messages go to /dev/log as well. Called once, after parsing."""
    global _ident, _level, debug_on, trace_on, _timestamps, _syslog
    _ident, _level = ident, level
    debug_on, trace_on = level >= DEBUG, level >= TRACE
    _timestamps = debug_on
    if syslog and not debug_on:
        _syslog = _open_syslog()


def _open_syslog() -> socket.socket | None:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        s.connect("/dev/log")
    except OSError:
        s.close()  # no syslog daemon on this machine: standard error is what there is
        return None
    return s


def stop_stderr() -> None:
    """From here on nothing is written to standard error: the daemon has left its terminal, or a command owns it."""
    global _stderr
    _stderr = None


def fileno() -> int:
    """Descriptor of the syslog socket, or -1: whoever closes descriptors spares it."""
    return _syslog.fileno() if _syslog else -1


def _write(level: int, text: str) -> None:
    if _stderr is not None:
        prefix = f"{time.monotonic() - _START:.4f}: " if _timestamps else ""
        try:
            os.write(_stderr.fileno(), f"{prefix}{text}\n".encode(errors="backslashreplace"))
        except OSError:
            pass  # standard error is gone (closed terminal, full pipe): there is nowhere to say so
    if _syslog is not None:
        try:
            _syslog.send(f"<{min(level, DEBUG)}> {_ident}: {text}".encode(errors="backslashreplace"))
        except OSError:
            pass  # the syslog daemon went away or is too slow: a log line is not worth stalling traffic


def err(text: str) -> None:
    _write(ERR, text)


def warn(text: str) -> None:
    if _level >= WARNING:
        _write(WARNING, text)


def info(text: str) -> None:
    if _level >= INFO:
        _write(INFO, text)


def debug(text: str) -> None:
    if debug_on:
        _write(DEBUG, text)


def trace(text: str) -> None:
    if trace_on:
        _write(TRACE, text)


def warn_ratelimited(key: str, text: str, now: float, interval: float = 10.0) -> None:
    """Warn at most once per `interval` seconds for each `key`; the next line tells how many were held back."""
    last, held = _last.get(key, (-interval, 0))
    if now - last < interval:
        _last[key] = (last, held + 1)
        return
    _last[key] = (now, 0)
    warn(f"{text} ({held} similar messages held back)" if held else text)
