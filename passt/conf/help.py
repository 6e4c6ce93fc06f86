"""--help: options by group, in lines of at most 80 columns.

The option is on the left, its help text on the right, from column 26 on. Each line of the help text is a paragraph;
paragraphs after the first are indented.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from textwrap import wrap
from typing import Protocol

from ..log import WIDTH
from . import getopt

_COLUMN = 26


class Option(getopt.Option, Protocol):
    """The part of an option that --help uses."""

    @property
    def group(self) -> str: ...


def text(head: str, options: Sequence[Option], groups: Iterable[str]) -> str:
    """The help text: `head`, and for each non-empty group its name and options."""
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
