"""Which of the two builds this is: modules that Python interprets, or those that mypyc compiled (`setup.py`)."""

from __future__ import annotations

from .. import addr  # one of the compiled modules, and one that every command loads


def is_compiled() -> bool:
    """Whether the modules of the data plane are shared objects."""
    return not addr.__file__.endswith(".py")


def description() -> str:
    """The second line of --version."""
    language = "Compiled from Python" if is_compiled() else "In pure Python"
    return f"{language}. GPL-2.0-or-later; there is no warranty."
