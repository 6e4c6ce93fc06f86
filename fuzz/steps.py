"""Bytes as a program: targets with state read their steps, and the numbers in them, from here."""

from __future__ import annotations


class Steps:
    """Reads forward. Behind the end everything is zero, so that every byte string is a whole program."""

    __slots__ = ("data", "end", "pos")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.pos = 0
        self.end = len(data)

    @property
    def left(self) -> int:
        return self.end - self.pos

    def byte(self) -> int:
        pos = self.pos
        self.pos = pos + 1
        return self.data[pos] if pos < self.end else 0

    def word(self) -> int:
        return self.byte() << 8 | self.byte()

    def take(self, n: int) -> bytes:
        """Up to `n` bytes."""
        pos = self.pos
        self.pos = pos + n
        return self.data[pos : pos + n]

    def near(self, *values: int) -> int:
        """One of `values`, or a number close to one, or (rarely) any number of 32 bits."""
        b = self.byte()
        value = values[b % len(values)]
        how = b // len(values) % 8
        if how < 5:
            return value
        if how < 7:
            return value + self.byte() - 128
        return value + (self.word() << 16 | self.word())
