"""The grammar of the command line: that of getopt_long(3), including its messages, on which clients rely.

Options are parsed in order, so the last of several wins. They end at `--` or at the first operand: the rest belongs to
the command that is started. A long option takes its argument as `--name=value` or `--name value` and may be
abbreviated to an unambiguous prefix. A short option takes it as `-nvalue` or `-n value`, and short options without
argument may be combined (`-fq4`).

A message begins with the text of getopt_long and ends with advice: the nearest existing option, or --help.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, Protocol, TypeVar

from ..log import Fatal

NEAR = 0.7  # of difflib's ratio: one character of three may differ
WORD_MAX = 40  # characters; a longer word is not a misspelt option, and comparing takes time


class Option(Protocol):
    """The part of an option that the grammar uses. `name`, `short` and `arg` are empty if there is none.

    Options of the same meaning are two names of one option. Options without help are never suggested.
    """

    @property
    def name(self) -> str: ...

    @property
    def short(self) -> str: ...

    @property
    def arg(self) -> str: ...

    @property
    def meaning(self) -> object: ...

    @property
    def help(self) -> str: ...


OptionT = TypeVar("OptionT", bound=Option)


def nearest(word: str, valid: Iterable[str]) -> str | None:
    """The one of `valid` that is most similar to `word`, None if none is near."""
    from difflib import get_close_matches  # the import takes longer than parsing a command line

    near = get_close_matches(word, valid, 1, NEAR) if len(word) <= WORD_MAX else []
    return near[0] if near else None


def suggestion(word: str, valid: Iterable[str]) -> str:
    """The end of a message about `word`, where one of `valid` is required: the nearest of them, if any."""
    near = nearest(word, valid)
    return f": did you mean '{near}'?" if near else ""


class Getopt(Generic[OptionT]):
    """An iterator of (option, argument) in their order; `operands` is the rest, afterwards. Raises Fatal."""

    def __init__(self, program: str, table: Sequence[OptionT], argv: Sequence[str]) -> None:
        self._program = program
        self._long = {option.name: option for option in table if option.name}
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
        if len({self._long[m].meaning for m in matches}) > 1:
            which = " ".join(f"'--{m}'" for m in matches)
            raise Fatal(f"{self._program}: option '--{name}' is ambiguous; possibilities: {which}")
        if not matches:
            near = nearest(name, [long for long, option in self._long.items() if option.help])
            advice = f"did you mean --{near}? See" if near else "see"
            raise Fatal(f"{self._program}: unrecognized option '--{name}': {advice} {self._program} --help")
        return self._long[matches[0]]

    def _parse_short(self, cluster: str) -> Iterator[tuple[OptionT, str]]:
        while cluster:
            letter, cluster = cluster[0], cluster[1:]
            option = self._short.get(letter)
            if option is None:
                raise Fatal(f"{self._program}: invalid option -- '{letter}': see {self._program} --help")
            if not option.arg:
                yield option, ""
                continue
            if not cluster and not self._left:
                raise Fatal(f"{self._program}: option requires an argument -- '{letter}'")
            yield option, cluster or self._left.pop(0)
            return
