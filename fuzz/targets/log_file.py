"""The log file, which rotates inside itself. A step writes lines, or another program empties the file.

Invariants: the file is never longer than its limit; it is the header and the last of the lines, whole, in order (but
one that is too long by itself, which is cut), as long as no other program writes to it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from fuzz.steps import Steps
from passt.log_file import LogFile

LIMIT = 400
HEADER = "header"
FD = os.memfd_create("log")
FILE = LogFile(f"/proc/self/fd/{FD}", HEADER, LIMIT)
START = f"{HEADER}\n".encode()


def seeds() -> Iterable[bytes]:
    yield bytes((0, 40)) * 30
    yield bytes((0, 255, 0, 255, 0, 255, 0, 3)) * 3
    yield bytes((0, 100, 0, 100, 7, 0, 0, 30, 2, 9))


def reset() -> None:
    os.ftruncate(FD, 0)
    os.pwrite(FD, START, 0)
    FILE._header = FILE._size = len(START)


def one(data: bytes) -> None:
    reset()
    steps, written, emptied, number = Steps(data), b"", False, 0
    while steps.left > 0:
        kind = steps.byte()
        if kind & 7 == 7:
            os.ftruncate(FD, 0)
            written, emptied = b"", True
            continue
        lines = b""
        for _ in range(1 + (kind & 3 == 2)):
            size = steps.byte() * (2 if kind & 4 else 1)
            lines += b"%d" % number + b"x" * size + b"\n"
            number += 1
        FILE.write(lines)
        found = os.pread(FD, LIMIT + 1, 0)
        assert len(found) <= LIMIT
        if not emptied:
            assert found.startswith(START)
            found = found[len(START) :]
        room = LIMIT - FILE._header
        if len(lines) > room:
            lines = lines[: room - 1] + b"\n"
        written += lines
        assert written.endswith(found) and found.endswith(lines)
        if len(found) < len(written):
            assert written[len(written) - len(found) - 1] == 10, "not from the beginning of a line on"
