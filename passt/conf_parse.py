"""The grammar of the command line: that of getopt_long(3), on which clients rely, down to its messages.

Options are parsed in order, so the last of several wins, and end at `--` or at the first operand: what follows belongs
to the command that is started. A long option takes its argument as `--name=value` or `--name value` and may be
abbreviated as long as no other begins so; a short one as `-nvalue` or `-n value`, and short ones without argument may
be put together (`-fq4`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from .log import Fatal


class Option(Protocol):
    """What the grammar must know of an option. `short` and `arg` are empty when there is none.

    Options of the same action are two names of one.
    """

    @property
    def name(self) -> str: ...

    @property
    def short(self) -> str: ...

    @property
    def arg(self) -> str: ...

    @property
    def action(self) -> object: ...


OptionT = TypeVar("OptionT", bound=Option)


class Getopt(Generic[OptionT]):
    """Iterating gives (option, argument) as they stand; `operands` is what is left afterwards. Raises Fatal."""

    def __init__(self, program: str, table: Sequence[OptionT], argv: Sequence[str]) -> None:
        self._program = program
        self._long = {option.name: option for option in table}
        self._short = {option.short: option for option in table if option.short}
        self._left = list(argv)
        self.operands: list[str] = []

    def __iter__(self) -> Iterator[tuple[OptionT, str]]:
        left = self._left
        while left:
            word = left[0]
            if word == "--":
                del left[0]
                break
            if not word.startswith("-") or word == "-":
                break
            del left[0]
            if word.startswith("--"):
                yield self._parse_long(word[2:])
            else:
                yield from self._parse_short(word[1:])
        self.operands = left

    def _parse_long(self, word: str) -> tuple[OptionT, str]:
        name, equals, value = word.partition("=")
        option = self._find(name)
        if not option.arg:
            if equals:
                raise Fatal(f"{self._program}: option '--{option.name}' doesn't allow an argument")
        elif not equals:
            if not self._left:
                raise Fatal(f"{self._program}: option '--{option.name}' requires an argument")
            value = self._left.pop(0)
        return option, value

    def _find(self, name: str) -> OptionT:
        if name in self._long:
            return self._long[name]
        matches = [long for long in self._long if long.startswith(name)]
        if len({(self._long[m].action, self._long[m].arg) for m in matches}) > 1:
            which = " ".join(f"'--{m}'" for m in matches)
            raise Fatal(f"{self._program}: option '--{name}' is ambiguous; possibilities: {which}")
        if not matches:
            raise Fatal(f"{self._program}: unrecognized option '--{name}'")
        return self._long[matches[0]]

    def _parse_short(self, letters: str) -> Iterator[tuple[OptionT, str]]:
        while letters:
            letter, letters = letters[0], letters[1:]
            option = self._short.get(letter)
            if option is None:
                raise Fatal(f"{self._program}: invalid option -- '{letter}'")
            if not option.arg:
                yield option, ""
                continue
            if not letters and not self._left:
                raise Fatal(f"{self._program}: option requires an argument -- '{letter}'")
            yield option, letters or self._left.pop(0)
            return
