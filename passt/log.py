"""Log messages: levels, targets, rate limits.

    target                             messages
    ---------------------------------  ----------------------------------------------------------------------------
    standard error                     all, until the daemon goes to the background; only warnings and errors once a
                                       command shares it (`quiet_stderr`), unless debugging
    the log file (`log_file.py`)       all, after options are parsed
    syslog, if there is no log file    likewise, unless debugging

"All" means all messages at the current level. Reports (--stats, signal USR1) go to all targets at any level. Lines of
the file, and all lines when debugging, have seconds since the start. With --log-format json, lines of the file and of
standard error are objects of JSON with the time of day instead; syslog has a time and a level of its own. A message
whose level is off costs little; test `log.debug_on` before building an expensive one.

Messages that the guest or a peer can cause are limited in rate (`warn_ratelimited`), by a small set of keys. The number
of messages held back is logged with the next one, at the end of the interval, or at the end of the program.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Iterable
from typing import Protocol, TextIO

from . import NEVER
from .calls import calls
from .lean.records import dataclass

ERR, WARNING, INFO, DEBUG, TRACE = 3, 4, 6, 7, 8
KEYS_MAX = 64  # keys of rate limits; the program uses fewer
WIDTH = 80  # columns of help texts, findings and tables
NO_PROC = " (mount it first: mount -t proc proc /proc)"
LIMITS = {  # of the caller's, which end a start
    errno.EMFILE: " (raise the limit of open files: ulimit -n, or LimitNOFILE= of the unit)",
    errno.ENOMEM: " (raise the limit of memory: ulimit -v, or MemoryMax= of the unit)",
}

_START = time.monotonic()
debug_on = False
trace_on = False

_step = "start"
_level = INFO
_ident = "pasta"
_stderr: TextIO | None = sys.stderr
_stderr_level = TRACE
_writing = False  # to standard error
_ending = False  # a signal that ends the process has come
_writable: select.epoll | None = None  # for standard error, from `setup` on
_timestamps = False
_as_json: Callable[[int, str], str] | None = None  # the format of lines, None: text
_syslog: socket.socket | None = None
_in_journal = False  # standard error is the journal, where syslog would repeat its messages
_file: LineFile | None = None
_NAMES = {ERR: "error", WARNING: "warning", INFO: "info", DEBUG: "debug", TRACE: "trace"}
_PREFIX = {ERR: "ERROR:", WARNING: "WARNING:", INFO: "info:", DEBUG: "", TRACE: ""}

# Called as on_held(when) when a message is held back: `flush_held` must be called at `when`
on_held: Callable[[float], None] | None = None

CALLS = calls("write", "sendto", "epoll_ctl", "epoll_wait", "epoll_pwait")


class LineFile(Protocol):
    """The log file, as far as it is written here: `log_file.LogFile`."""

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


class Fatal(Exception):
    """The program cannot go on: one or more lines with the failure, its reason and advice. Exit status 1.

    A line may quote any text, such as newlines or terminal sequences: these are escaped.
    """

    def __init__(self, *lines: object) -> None:
        super().__init__(*(text if text.isprintable() else _escaped(text) for text in map(str, lines)))

    def __str__(self) -> str:
        return "\n".join(self.args)


class StepError(OSError):
    """A system error whose text is a whole message: the step that failed, and the reason."""


def step(what: str) -> None:
    """The start goes on with this; a message about a system error says that it failed: "Couldn't `what`: ..."."""
    global _step
    _step = what


def failure(e: OSError) -> str:
    """The message about a system error at start: the step, the file if there is one, the reason, a limit's cure."""
    if isinstance(e, StepError):
        return str(e.strerror)
    return f"Couldn't {_step}: {where(e)}{LIMITS.get(e.errno or 0, '')}"


def where(e: OSError) -> str:
    """The file of a system error, if there is one, the reason, and a hint if all of /proc is missing."""
    reason = e.strerror or str(e)
    if e.filename is None:
        return reason
    path = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else str(e.filename)
    hint = NO_PROC if path.startswith("/proc/") and not os.path.exists("/proc/self") else ""
    return f"{path}: {reason}{hint}"


def why(e: OSError) -> str:
    """The same without the name of a C function that may be in the text."""
    return os.strerror(e.errno or 0) if e.filename is None else where(e)


def _escaped(text: str) -> str:
    spaced = " ".join(text.split())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in spaced)


"".encode("unicode_escape")  # loads the codec while files can be read


def setup(ident: str, level: int, *, syslog: bool, file: LineFile | None = None, as_json: bool = False) -> None:
    """Set the name, the level (ERR..TRACE), the format, and the target beside standard error. Called once, after
    parsing. The target is `file`, which belongs to the log from now on, or else /dev/log if `syslog`.
    """
    global _ident, _level, debug_on, trace_on, _timestamps, _syslog, _in_journal, _file, _as_json, _writable
    _ident, _level = ident, level
    debug_on, trace_on = level >= DEBUG, level >= TRACE
    _timestamps = debug_on
    _writable = select.epoll()
    _as_json = _json_format() if as_json else None
    if file is not None:
        _file = file
    elif syslog and not debug_on:
        _syslog = _open_syslog()
        _in_journal = _stderr is not None and _is_journal(_stderr.fileno())


def _is_journal(fd: int) -> bool:
    """Whether systemd has connected a descriptor to its journal (systemd.exec(5))."""
    status = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{status.st_dev}:{status.st_ino}"


def _open_syslog() -> socket.socket | None:
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        s.connect("/dev/log")
    except OSError:
        s.close()  # no syslog daemon on this machine: only standard error is left
        return None
    return s


def stop_stderr() -> None:
    """Stop writing to standard error: the daemon has left its terminal."""
    global _stderr
    _stderr = None


def only_stderr() -> None:
    """Write to standard error alone from now on: this process must not keep file and syslog open."""
    global _file, _syslog
    _file = _syslog = None


def quiet_stderr() -> None:
    """Write only warnings and errors to standard error from now on: a command shares it."""
    global _stderr_level
    _stderr_level = WARNING


def start_stderr() -> None:
    """Write to standard error again: the program ends, and the user must see the reason."""
    global _stderr
    _stderr = sys.stderr


def _write(level: int, text: str, *, asked: bool = False) -> None:
    if _stderr is not None and (level <= _stderr_level or asked):
        if _as_json is not None:
            line = _as_json(level, text)
        else:
            line = f"{time.monotonic() - _START:.4f}: {text}\n" if _timestamps else f"{text}\n"
        try:
            _write_stderr(_stderr.fileno(), line.encode(errors="backslashreplace"))
        except InterruptedError:
            stop_stderr()
        except OSError:
            pass  # standard error is gone (closed terminal, full pipe), and with it the place for an error
    if _file is not None:
        if _as_json is not None:
            line = _as_json(level, text)
        else:
            line = f"{time.monotonic() - _START:.4f}: {_PREFIX[level]:<9}{text}\n"
        try:
            _file.write(line.encode(errors="backslashreplace"))
        except OSError:
            pass  # the disk is full, which must not end the process
    if _syslog is not None and not (_in_journal and _stderr is not None):
        try:
            _syslog.send(f"<{min(level, DEBUG)}> {_ident}: {text}".encode(errors="backslashreplace"))
        except OSError:
            pass  # the syslog daemon is gone or too slow, which must not delay traffic


def _json_format() -> Callable[[int, str], str]:
    """The function that formats a line of JSON; json is imported only when needed."""
    import json

    def line(level: int, text: str) -> str:
        now = time.time()
        t = time.gmtime(now)  # the first call reads /etc/localtime
        day, clock = f"{t.tm_year}-{t.tm_mon:02}-{t.tm_mday:02}", f"{t.tm_hour:02}:{t.tm_min:02}:{t.tm_sec:02}"
        stamp = f"{day}T{clock}.{int(now % 1 * 1e6):06}Z"  # RFC 3339
        fields = {"time": stamp, "level": _NAMES[level], "program": _ident, "message": text}
        return json.dumps(fields, ensure_ascii=False) + "\n"

    line(INFO, "")  # while files can be read
    return line


def _write_stderr(fd: int, line: bytes) -> None:
    """Write a line. Raises OSError: InterruptedError if the process is to end, and the write would wait."""
    global _writing
    _writing = True
    try:
        if _ending and not _takes(fd):
            raise InterruptedError
        os.write(fd, line)
    finally:
        _writing = False


def _takes(fd: int) -> bool:
    """Whether a write to `fd` does not wait."""
    if _writable is None:
        return True
    try:
        _writable.register(fd, select.EPOLLOUT)
    except FileExistsError:
        pass  # at the last line
    except OSError:
        return True  # a file (EPERM), or it is closed
    return bool(_writable.poll(0))


def give_up() -> None:
    """In the handler of a signal that ends the process: no write must wait for a reader from now on.

    If one does, standard error is not written to any more, even if the reader was only slow.
    """
    global _ending
    _ending = True
    if _writing:
        raise InterruptedError


def say(level: int, text: str) -> None:
    """A message of the level `level`."""
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


def report(lines: Iterable[str]) -> None:
    """Log output that the user has requested: at any level, on standard error, too, if that is still open."""
    for line in lines:
        _write(INFO, line, asked=True)


# Rate limits -------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Held:
    """A logged message: further ones with its key are held back `until` a time."""

    until: float
    interval: float
    level: int
    text: str = ""
    count: int = 0

    def log_count(self) -> None:
        if self.count:
            say(self.level, f"{self.text}{_similar(self.count)}")


_held: dict[str, _Held] = {}
_flush_at = NEVER


def warn_ratelimited(key: str, text: str, now: float, interval: float = 10.0) -> None:
    """Warn at most once per `interval` seconds for each `key`, then with the number of messages held back."""
    _ratelimited(WARNING, key, text, now, interval)


def info_ratelimited(key: str, text: str, now: float, interval: float = 10.0) -> bool:
    """The same for information that a guest can cause at any rate. Returns whether it was logged."""
    return _ratelimited(INFO, key, text, now, interval)


def flush_held(now: float) -> None:
    """Log counts of messages that were held back until `now`; NEVER: all counts, since the program ends."""
    global _flush_at
    _flush_at = NEVER
    for key, held in list(_held.items()):
        if held.until > now:
            continue
        held.log_count()
        if held.count and now != NEVER:
            held.count, held.until = 0, now + held.interval  # the count is a message, too
        else:
            del _held[key]
    waiting = [held.until for held in _held.values() if held.count]
    if waiting:
        _flush_later(min(waiting))


def _ratelimited(level: int, key: str, text: str, now: float, interval: float) -> bool:
    held = _held.get(key)
    if held is not None and now < held.until:
        held.text = text
        held.count += 1
        _flush_later(held.until)
        return False
    say(level, f"{text}{_similar(held.count)}" if held is not None and held.count else text)
    if held is None and len(_held) >= KEYS_MAX:
        _held.pop(min(_held, key=lambda k: _held[k].until)).log_count()
    _held[key] = _Held(now + interval, interval, level)
    return True


def _flush_later(when: float) -> None:
    global _flush_at
    if when < _flush_at:
        _flush_at = when
        if on_held is not None:
            on_held(when)


def _similar(count: int) -> str:
    return f" ({count} similar message{'s' if count > 1 else ''} held back)"
