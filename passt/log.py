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
from collections.abc import Callable
from typing import TextIO

from . import __version__

ERR, WARNING, INFO, DEBUG, TRACE = 3, 4, 6, 7, 8

_START = time.monotonic()
debug_on = False
trace_on = False

_level = INFO
_ident = "pasta"
_stderr: TextIO | None = sys.stderr
_stderr_level = TRACE
_timestamps = False
_syslog: socket.socket | None = None
_file = -1
_PREFIX = {ERR: "ERROR:", WARNING: "WARNING:", INFO: "info:", DEBUG: "", TRACE: ""}
_last: dict[str, tuple[float, int]] = {}


class Fatal(Exception):
    """The program cannot go on: a line saying what failed, why, and what to do; or several of them. Exit status 1."""

    def __init__(self, *lines: object) -> None:
        super().__init__(*map(str, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def setup(ident: str, level: int, *, syslog: bool, log_file: str | None = None) -> None:
    """Set the name, the level (ERR..TRACE), and where messages go beside standard error. Called once, after parsing.

    That is `log_file`, or else /dev/log if `syslog`. Raises Fatal when the file cannot be opened.
    """
    global _ident, _level, debug_on, trace_on, _timestamps, _syslog
    _ident, _level = ident, level
    debug_on, trace_on = level >= DEBUG, level >= TRACE
    _timestamps = debug_on
    if log_file is not None:
        _open_file(log_file)
    elif syslog and not debug_on:
        _syslog = _open_syslog()


def _open_file(path: str) -> None:
    global _file
    try:
        _file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(_file, f"{_ident} {__version__}: {sys.executable} ({os.getpid()})\n".encode())
    except OSError as e:
        raise Fatal(f"Couldn't open log file {path}: {e.strerror}") from None


def _open_syslog() -> socket.socket | None:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        s.connect("/dev/log")
    except OSError:
        s.close()  # no syslog daemon on this machine: standard error is what there is
        return None
    return s


def stop_stderr() -> None:
    """From here on nothing is written to standard error: the daemon has left its terminal."""
    global _stderr
    _stderr = None


def quiet_stderr() -> None:
    """From here on standard error gets warnings and errors only: a command shares it with us."""
    global _stderr_level
    _stderr_level = WARNING


def start_stderr() -> None:
    """Write to standard error again: the program ends, and whoever started it must see why."""
    global _stderr
    _stderr = sys.stderr


def _write(level: int, text: str) -> None:
    if _stderr is not None and level <= _stderr_level:
        prefix = f"{time.monotonic() - _START:.4f}: " if _timestamps else ""
        try:
            os.write(_stderr.fileno(), f"{prefix}{text}\n".encode(errors="backslashreplace"))
        except OSError:
            pass  # standard error is gone (closed terminal, full pipe): there is nowhere to say so
    if _file >= 0:
        try:
            line = f"{time.monotonic() - _START:.4f}: {_PREFIX[level]:<9}{text}\n"
            os.write(_file, line.encode(errors="backslashreplace"))
        except OSError:
            pass  # the disk is full: a log line is not worth ending for
    if _syslog is not None:
        try:
            _syslog.send(f"<{min(level, DEBUG)}> {_ident}: {text}".encode(errors="backslashreplace"))
        except OSError:
            pass  # the syslog daemon went away or is too slow: a log line is not worth stalling traffic


def say(level: int, text: str) -> None:
    """A message whose level is a value."""
    if _level >= level:
        _write(level, text)


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
    _ratelimited(warn, key, text, now, interval)


def info_ratelimited(key: str, text: str, now: float, interval: float = 10.0) -> bool:
    """The same for what is no warning, but that a guest can cause as often as it likes. Tells whether it was said."""
    return _ratelimited(info, key, text, now, interval)


def _ratelimited(write: Callable[[str], None], key: str, text: str, now: float, interval: float) -> bool:
    last, held = _last.get(key, (-interval, 0))
    if now - last < interval:
        _last[key] = (last, held + 1)
        return False
    _last[key] = (now, 0)
    write(f"{text} ({held} similar messages held back)" if held else text)
    return True
