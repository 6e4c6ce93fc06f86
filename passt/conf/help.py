"""--help: options by group, in lines of at most 80 columns.

An option stands at the left, what it does at the right of it, from column 26 on. Each line of its help text is a
paragraph; those after the first are indented.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import Protocol

from . import getopt

WIDTH = 80
_COLUMN = 26


class Option(getopt.Option, Protocol):
    """An option, as far as --help knows it."""

    @property
    def group(self) -> str: ...


def text(head: str, options: Sequence[Option], groups: Iterable[str]) -> str:
    """The help text: `head`, and for each group with options its name and these."""
    lines = [head]
    for group in groups:
        members = [option for option in options if option.group == group]
        if members:
            lines += ["", f"{group}:", *(line for option in members for line in _entry(option))]
    return "\n".join(lines) + "\n"


def _entry(option: Option) -> Iterator[str]:
    short = f"-{option.short}, " if option.short else "    "
    head = f"  {short}--{option.name} {option.arg}".rstrip()
    if len(head) > _COLUMN - 2:
        yield head
        head = ""
    for i, paragraph in enumerate(option.help.split("\n")):
        indent = "  " if i else ""
        for line in wrap(paragraph, WIDTH - _COLUMN - len(indent), break_on_hyphens=False):
            yield f"{head:{_COLUMN}}{indent}{line}"
            head = ""
