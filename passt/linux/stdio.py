"""Standard input, output and error of the start.

    found                                  consequence
    -------------------------------------  -------------------------------------------------------------------------
    one of them is closed                  it is /dev/null, so that no other file gets its number
    text for a standard output that is     an error, as for a full device
      closed
    the reader has closed the pipe         status 1 without a message: `head` has what it needs
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from ..log import Fatal

NULL_HINT = "create it as root: mknod -m 666 /dev/null c 1 3; or give the container this device"

_closed: set[int] = set()  # those that the caller had closed


class ReaderGone(Exception):
    """The reader of standard output has closed its end."""


def null(flags: int = 0) -> int:
    """/dev/null for reading and writing. Raises Fatal."""
    try:
        return os.open(os.devnull, os.O_RDWR | flags)
    except OSError as e:
        raise Fatal(f"Couldn't open {os.devnull}: {e.strerror} ({NULL_HINT})") from None


def fill() -> None:
    """Open /dev/null for closed standard streams. Raises Fatal."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            _closed.add(fd)
            os.set_inheritable(null(), True)  # the lowest free number, which is `fd`


def write_out(text: str) -> None:
    """Write to standard output. Raises Fatal, ReaderGone."""
    data = memoryview(text.encode(errors="surrogateescape"))
    try:
        if 1 in _closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        while data:
            data = data[os.write(1, data) :]
    except OSError as e:
        raise _failed(e) from None


def write_error(line: str) -> None:
    """Write a line to standard error. There is no place for an error about that."""
    try:
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


@contextmanager
def text_out() -> Iterator[None]:
    """For a body that prints to sys.stdout: flush it at the end. Raises Fatal, ReaderGone."""
    if sys.stdout is None:
        raise Fatal(f"Couldn't write to standard output: {os.strerror(errno.EBADF)}")
    try:
        yield
        sys.stdout.flush()
    except OSError as e:
        os.dup2(null(), 1)  # the interpreter flushes once more, when it ends
        raise _failed(e) from None


def _failed(e: OSError) -> Fatal | ReaderGone:
    if isinstance(e, BrokenPipeError):
        return ReaderGone()
    return Fatal(f"Couldn't write to standard output: {e.strerror}")
