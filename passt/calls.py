"""System calls that a module makes while the loop turns: its `CALLS`, declared beside the code that makes them.

`seccomp.py` collects them from all modules that are loaded and allows these and no others. A call may be allowed for
certain arguments only; of several declarations of the same call any one suffices. Names are those of x86-64; what other
architectures call them is a matter of `seccomp.py`.

What a function of Python's library asks of the kernel is not always what it is called: strace(1) tells.
"""

from __future__ import annotations

from dataclasses import dataclass

ALL_BITS = 0xFFFFFFFF  # the arguments tested are ints, whose upper half in a register means nothing


@dataclass(frozen=True, slots=True)
class Condition:
    """Argument `arg`, counted from 0, must be `value` in the bits of `mask`."""

    arg: int
    value: int
    mask: int = ALL_BITS


@dataclass(frozen=True, slots=True)
class Call:
    """A system call, if all tests hold; in one mode only (PASTA, PASST) if `mode` says so."""

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
