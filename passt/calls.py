"""System calls that a module makes at run time: its `CALLS`, declared beside the code that makes them.

`seccomp.py` collects them from all loaded modules and allows no others. A call may be allowed for certain arguments
only; of several declarations of the same call one suffices. Names are those of x86-64; `seccomp.py` knows the names on
other architectures.

A function of Python's library does not always make the system call of its name: use strace(1).
"""

from __future__ import annotations

from typing import NamedTuple

ALL_BITS = 0xFFFFFFFF  # tested arguments are ints: the upper half of the register is undefined


class Condition(NamedTuple):
    """Argument `arg`, counted from 0, must be `value` in the bits of `mask`."""

    arg: int
    value: int
    mask: int = ALL_BITS


class Call(NamedTuple):
    """A system call, allowed if all tests hold; in one mode only (PASTA, PASST) if `mode` is set."""

    name: str
    tests: tuple[Condition, ...] = ()
    mode: str | None = None


Calls = tuple[Call, ...]


def calls(*names: str, mode: str | None = None) -> Calls:
    """Calls with any arguments."""
    return tuple(Call(name, (), mode) for name in names)


def one_of(name: str, arg: int, *values: int, mode: str | None = None) -> Calls:
    """A call whose argument `arg` is one of `values`."""
    return tuple(Call(name, (Condition(arg, value),), mode) for value in values)
