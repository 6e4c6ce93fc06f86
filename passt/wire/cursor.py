"""A bounded cursor over untrusted bytes, and the one exception that wire formats raise.

Each overrun, wrong length or invalid value becomes `Malformed` with the reason under which the drop is counted. It
is caught in one place (`tap.py`), never inside a protocol.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from struct import Struct
from typing import Any

from ..drops import Reason


class Malformed(Exception):
    """Input that its format does not allow. `reason` names a drop counter."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason


class Cursor:
    """Reads forward through `data`, never beyond `end`."""

    __slots__ = ("data", "end", "pos", "truncated")

    def __init__(self, data: bytes, truncated: Reason) -> None:
        self.data = data
        self.pos = 0
        self.end = len(data)
        self.truncated = truncated  # why there is no more of it than there is

    @property
    def left(self) -> int:
        """Bytes between the position and the end of the current region."""
        return self.end - self.pos

    def take(self, n: int) -> bytes:
        """The next `n` bytes; raises Malformed if there are fewer."""
        pos = self.pos
        if n < 0 or pos + n > self.end:
            raise Malformed(self.truncated)
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
    def exactly(self, n: int, trailing: Reason) -> Iterator[None]:
        """Restrict to the next `n` bytes. The body must consume all of them, or `trailing` is the reason."""
        if n < 0 or self.pos + n > self.end:
            raise Malformed(self.truncated)
        outer, self.end = self.end, self.pos + n
        yield
        if self.pos != self.end:
            raise Malformed(trailing)
        self.end = outer
