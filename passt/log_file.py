"""A log file of limited size: it rotates in place, by descriptors that were opened at start.

    0        header              cut                                      size
    | header | oldest lines      | newest lines                           |
    '--------+-------------------+----------------------------------------'
             '<------------------'    moved to the front, the rest truncated

When a line would exceed the `limit`, the newest part of the file stays (the fraction KEEP of the limit, from the
beginning of a line), and the line is written after it. The header, the file's first line, stays. So at least half of
the limit is history at any time, and a byte is moved about twice.

There are two descriptors. Lines are appended (O_APPEND): a program that truncates the file (logrotate's copytruncate)
does not create a hole. pwrite(2) ignores its offset on such a descriptor, so data is moved by another one without the
flag; it also detects a truncated file. `tail -f` reports a rotation as a truncated file, and goes on.

Any file but a regular one (a pipe, a terminal, /dev/null): writes do not block; a full pipe does not delay traffic, but
loses lines.

Left out: FALLOC_FL_COLLAPSE_RANGE, which would avoid the move. Few file systems have it, it removes whole blocks only,
and a move costs 0.2 ms for each MiB of the limit, once for each third of it written.
"""

from __future__ import annotations

import os
import stat
import sys

from . import __version__
from .calls import calls
from .linux.outputs import open_output
from .log import Fatal

SIZE = 1 << 20  # default limit, in bytes
KEEP = 5, 8  # as a fraction of the limit
_CHUNK = 1 << 18  # bytes moved at once
_MODE = 0o600
_FLAGS = os.O_CREAT | os.O_TRUNC

CALLS = calls("write", "pread64", "pwrite64", "ftruncate")


def opened(ident: str, path: str, limit: int = SIZE, *, as_json: bool = False) -> LogFile:
    """A log file with the program's name, version and process in its header. Raises Fatal."""
    header = f"{ident} {__version__}: {sys.executable} ({os.getpid()})"
    if as_json:
        import json

        fields = {"program": ident, "version": __version__, "python": sys.executable, "pid": os.getpid()}
        header = json.dumps(fields)
    try:
        return LogFile(path, header, limit)
    except OSError as e:
        raise Fatal(f"Couldn't open log file {path}: {e.strerror}") from None


class LogFile:
    """The file at `path`, emptied, with `header` as its first line. `limit` is in bytes. Raises OSError."""

    def __init__(self, path: str, header: str, limit: int) -> None:
        self._limit = limit
        self._fd = open_output(path, os.O_WRONLY | os.O_APPEND | _FLAGS, _MODE)
        self._mover = -1
        try:
            info = os.fstat(self._fd)
            if stat.S_ISREG(info.st_mode):
                self._mover = open_output(path, os.O_RDWR)
                other = os.fstat(self._mover)
                if (other.st_dev, other.st_ino) != (info.st_dev, info.st_ino):
                    raise FileExistsError(0, "it was replaced while it was opened")
            else:
                os.set_blocking(self._fd, False)
            line = f"{header}\n".encode()
            os.write(self._fd, line)
        except OSError:
            self.close()
            raise
        self._header = len(line)
        self._size = len(line)  # after the last write

    def write(self, data: bytes) -> None:
        """Append a line, or several. Raises OSError."""
        if self._mover >= 0:
            size = self._size
            if size and not os.pread(self._mover, 1, size - 1):
                size = self._header = 0  # the file was truncated, without its header
            if size + len(data) > self._limit:
                data, size = self._make_room(data, size)
            self._size = size + len(data)
        os.write(self._fd, data)

    def close(self) -> None:
        """Close the descriptors, in tests and after a failed start."""
        for fd in (self._fd, self._mover):
            if fd >= 0:
                os.close(fd)
        self._fd = self._mover = -1

    # Rotation --------------------------------------------------------------------------------------------------------

    def _make_room(self, data: bytes, size: int) -> tuple[bytes, int]:
        """Remove the oldest lines; returns `data`, truncated if it is longer than the file may be, and the new size."""
        room = self._limit - self._header
        if len(data) > room:
            data = data[: room - 1] + b"\n"
        if not size:
            return data, 0  # the file was just truncated: there is no line to keep
        keep = min(self._limit * KEEP[0] // KEEP[1], room - len(data))
        return data, self._move(self._line_after(size - keep))

    def _line_after(self, offset: int) -> int:
        """The offset of the first line that begins at `offset` or after it; the end of the file, if there is none.

        `offset` is after the header: the kept part is shorter than the file, and empty for the header alone.
        """
        while chunk := os.pread(self._mover, _CHUNK, offset - 1):
            newline = chunk.find(b"\n")
            if newline >= 0:
                return offset + newline
            offset += len(chunk)
        return offset

    def _move(self, start: int) -> int:
        """Move the data from `start` on to the header's end, and truncate the file; returns its size."""
        to = self._header
        while chunk := os.pread(self._mover, _CHUNK, start):
            os.pwrite(self._mover, chunk, to)
            start += len(chunk)
            to += len(chunk)
        os.ftruncate(self._mover, to)
        return to
