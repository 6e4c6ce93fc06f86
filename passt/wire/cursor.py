"""A bounded cursor over untrusted bytes, and the one exception that wire formats raise.

Each overrun, wrong length or invalid value becomes `Malformed` with a short reason, which is also the
name under which the drop is counted. It is caught in one place (`tap.py`), never inside a protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from typing import Any


class Malformed(Exception):
    """Input that its format does not allow. `reason` is short and stable: it names a drop counter."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Cursor:
    """Reads forward through `data`, never beyond `end`."""

    __slots__ = ("data", "end", "pos", "what")

    def __init__(self, data: bytes, what: str) -> None:
        self.data = data
        self.pos = 0
        self.end = len(data)
        self.what = what

    @property
    def left(self) -> int:
        """Bytes between the position and the end of the current region."""
        return self.end - self.pos

    def take(self, n: int) -> bytes:
        """The next `n` bytes; raises Malformed("<what> truncated") if there are fewer."""
        pos = self.pos
        if n < 0 or pos + n > self.end:
            raise Malformed(f"{self.what} truncated")
        self.pos = pos + n
        return self.data[pos : pos + n]

    def unpack(self, layout: Struct) -> tuple[Any, ...]:
        """The next values in the shape of `layout`."""
        return layout.unpack(self.take(layout.size))

    def u8(self) -> int:
        return self.take(1)[0]

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def rest(self) -> bytes:
        """Everything up to the end of the current region."""
        return self.take(self.end - self.pos)

    @contextmanager
    def exactly(self, n: int) -> Iterator[None]:
        """Restrict to the next `n` bytes, which the body must consume to the last one."""
        if n < 0 or self.pos + n > self.end:
            raise Malformed(f"{self.what} truncated")
        outer, self.end = self.end, self.pos + n
        yield
        if self.pos != self.end:
            raise Malformed(f"{self.what} trailing bytes")
        self.end = outer
