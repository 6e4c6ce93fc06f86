"""A log file that does not grow beyond a size: it rotates inside itself, by descriptors that were opened at start.

    0        header              cut                                      size
    | header | oldest lines      | newest lines                           |
    '--------+-------------------+----------------------------------------'
             '<------------------'    moved to the front, the rest cut off

When a line would make the file longer than `limit`, the newest KEEP of that stay, from the beginning of a line on, and
the line is written behind them. The header, the file's first line, stays where it is. So at least half of the limit is
history at any time, and a byte is moved about twice in its life.

There are two descriptors. Lines are appended (O_APPEND): somebody who empties the file (logrotate's copytruncate) does
not get one with a hole. pwrite(2) ignores its offset on such a descriptor, so what is moved is moved by another one,
without the flag; it also tells whether the file is shorter than it was. To `tail -f` a rotation is a file that was
truncated, which it says, and goes on.

Not a regular file (a pipe, a terminal, /dev/null): lines are written, and none is waited for; what a reader leaves in a
full pipe costs us no traffic, but the lines that do not fit.

Left out: FALLOC_FL_COLLAPSE_RANGE, which would spare the moving. Few file systems have it, it cuts whole blocks only,
and moving costs 0.2 ms for each MiB of the limit, once for each third of it written.
"""

from __future__ import annotations

import os
import stat

from .calls import calls

KEEP = 5, 8  # as a fraction of the limit
_CHUNK = 1 << 18  # bytes moved at once
_MODE = 0o600
_FLAGS = os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC

CALLS = calls("write", "pread64", "pwrite64", "ftruncate")


class LogFile:
    """The file at `path`, emptied, with `header` as its first line. `limit` is in bytes. Raises OSError."""

    def __init__(self, path: str, header: str, limit: int) -> None:
        self._limit = limit
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | _FLAGS, _MODE)
        self._mover = -1
        try:
            info = os.fstat(self._fd)
            if stat.S_ISREG(info.st_mode):
                self._mover = os.open(path, os.O_RDWR | os.O_CLOEXEC)
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
        self._size = len(line)  # when a line was last written

    def write(self, data: bytes) -> None:
        """Append a line, or several. Raises OSError."""
        if self._mover >= 0:
            size = self._size
            if size and not os.pread(self._mover, 1, size - 1):
                size = self._header = 0  # somebody has emptied the file, and taken the header, too
            if size + len(data) > self._limit:
                data, size = self._make_room(data, size)
            self._size = size + len(data)
        os.write(self._fd, data)

    def close(self) -> None:
        """For tests, and for an end at start."""
        for fd in (self._fd, self._mover):
            if fd >= 0:
                os.close(fd)
        self._fd = self._mover = -1

    # Rotation --------------------------------------------------------------------------------------------------------

    def _make_room(self, data: bytes, size: int) -> tuple[bytes, int]:
        """Cut what is oldest, so that `data` fits; returns what does of that, and the size of the file."""
        room = self._limit - self._header
        if len(data) > room:
            data = data[: room - 1] + b"\n"
        if not size:
            return data, 0  # somebody has just emptied it: there is nothing to keep
        keep = min(self._limit * KEEP[0] // KEEP[1], room - len(data))
        return data, self._move(self._line_after(size - keep))

    def _line_after(self, offset: int) -> int:
        """Where the first line begins that begins at `offset` or behind it: the end of the file, if none does.

        `offset` is behind the header: less is kept than there is, and nothing of a file that is just the header.
        """
        while chunk := os.pread(self._mover, _CHUNK, offset - 1):
            newline = chunk.find(b"\n")
            if newline >= 0:
                return offset + newline
            offset += len(chunk)
        return offset

    def _move(self, start: int) -> int:
        """Let everything from `start` on follow the header, and nothing follow that; returns where it ends."""
        to = self._header
        while chunk := os.pread(self._mover, _CHUNK, start):
            os.pwrite(self._mover, chunk, to)
            start += len(chunk)
            to += len(chunk)
        os.ftruncate(self._mover, to)
        return to
