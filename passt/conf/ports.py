"""One specification of ports (-t, -u, -T, -U): text -> rules. Pure: no file is read, no interface looked up.
`forwards.py` combines those of a command line.

    spec     = "none" | [ bind "/" ] item { "," item }
    bind     = ( address | "*" ) [ "%" interface ] | "%" interface         (-t and -u only)
    item     = range [ ":" target ] | "~" range | "all" [ ":" address ] | "auto"
    target   = range | address [ "/" range ]
    range    = port [ "-" port ]
    address  = IPv4 | IPv6 | "[" ( IPv4 | IPv6 ) "]"

An IPv6 target needs its brackets: 80:2001:db8::1/80 is port 80 of a bind address. The items of a specification combine:

    items                          ports                                                      failures to bind
    -----------------------------  ---------------------------------------------------------  ----------------
    ranges, exclusions             those of the ranges that are not excluded                  are errors
    "all", or only exclusions      1 to 65535, but for ephemeral ones and excluded ones       leave a port out
    "all", ranges, exclusions      both: a port of a range leads where the range says         are errors, leave a port
                                                                                              out
    "auto", exclusions             1 to 65535 without excluded ones, while a program has      leave a port out
                                   them bound at the target
    "auto", and what is above      the ports of that row, likewise                            leave a port out

The original takes the ranges only where "all" stands beside them, though its manual has it as here. A word may be given
twice. An error message shows the invalid part of the text and its position.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise

from .. import addr
from ..lean.tuples import NamedTuple
from ..log import Fatal
from ..policy.config import PASST, PASTA
from ..policy.rules import PORT_MAX, Rule
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from . import values
from .getopt import suggestion
from .values import NONE

ALL, AUTO = "all", "auto"
EPHEMERAL = values.EPHEMERAL
INBOUND, OUTBOUND = "tu", "TU"

_NO_PORT = f"not a port (a decimal number, 1 to {PORT_MAX})"
_SHOWN_MAX = 200  # characters of a specification in a message
# Text before the first "/" is not a bind address if it is a list, a range, or has a target address.
_ITEMS = re.compile(r"[^%\[]*,|~|[0-9]+-|[^:\[]*:(\[|[0-9.]+\Z)")


# Text with its position ----------------------------------------------------------------------------------------------


class _Piece(NamedTuple):
    """A part of a specification that begins at character `at`, counted from 0."""

    text: str
    at: int = 0

    def cut(self, separator: str) -> tuple[_Piece, _Piece | None]:
        """The parts before and after the first `separator`; None for the latter if it does not occur."""
        before, found, after = self.text.partition(separator)
        return _Piece(before, self.at), _Piece(after, self.at + len(before) + 1) if found else None

    def split(self, separator: str) -> Iterator[_Piece]:
        at = self.at
        for text in self.text.split(separator):
            yield _Piece(text, at)
            at += len(text) + 1


class _SpecError(Exception):
    """An invalid piece. `head` is the beginning of the message, which clients parse."""

    def __init__(self, piece: _Piece, reason: str, head: str = "Invalid port specifier") -> None:
        super().__init__(piece, reason, head)
        self.piece = piece
        self.reason = reason
        self.head = head


def shown(text: str) -> str:
    """`text` in a form for a one-line message."""
    if len(text) > _SHOWN_MAX:
        text = f"{text[:_SHOWN_MAX]}..."
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def given(letter: str, text: str) -> str:
    return f"-{letter} {text}"


# One specification -------------------------------------------------------------------------------------------------


def parse_spec(letter: str, text: str, mode: str = PASTA, ephemeral: range = EPHEMERAL) -> tuple[Rule, ...]:
    """The rules of one option: `letter` t, u, T or U, and its argument. None for "none". Raises Fatal."""
    try:
        return tuple(_rules(letter, text, mode, ephemeral))
    except _SpecError as e:
        where = f"'{shown(e.piece.text)}' at character {e.piece.at + 1}"
        raise Fatal(f"{e.head} {shown(given(letter, text))}: {where}: {e.reason}") from None


def _rules(letter: str, text: str, mode: str, ephemeral: range) -> Iterator[Rule]:
    if text == NONE:
        return
    option, inbound = given(letter, text), letter in INBOUND
    proto = PROTO_TCP if letter in "tT" else PROTO_UDP
    bind, listed = _split_bind(_Piece(text))
    if bind is not None and not inbound:
        raise _SpecError(bind, "-T and -U listen on the loopback of the namespace: leave out address and interface")
    address, ifname = _bind(bind) if bind is not None else (None, None)
    items = _Items(listed, mode)
    for r in items.ranges(ephemeral):
        yield Rule(
            option,
            proto,
            not inbound,
            r.first,
            r.last,
            r.to,
            address,
            ifname,
            r.target,
            auto=items.auto,
            weak=items.auto or r.weak,
        )


def _split_bind(spec: _Piece) -> tuple[_Piece | None, _Piece]:
    bind, rest = spec.cut("/")
    if rest is None or _ITEMS.match(bind.text):
        return None, spec
    return bind, rest


def _bind(piece: _Piece) -> tuple[bytes | None, str | None]:
    """Address and interface to listen on; None for any."""
    host, interface = piece.cut("%")
    if interface is not None and not values.is_interface(interface.text):
        raise _SpecError(interface, f"not an interface name ({values.ALTNAME_RULE})")
    ifname = interface.text if interface else None
    if host.text == "*" or (not host.text and ifname):
        return None, ifname
    if not host.text:
        raise _SpecError(piece, "an address to listen on is missing before '/' ('*' is any)")
    address = _address(host)
    if addr.is_multicast(address) or address == addr.BROADCAST4:
        raise _SpecError(host, "a group of hosts can't be listened on: give an address of this host, or '*' for any")
    if len(address) == 16 and addr.is_link_local(address) and ifname is None:
        raise _SpecError(host, f"a link-local address needs its interface: {host.text}%eth0/...")
    return address, ifname


def _address(piece: _Piece) -> bytes:
    """Address of either family, in brackets or not."""
    text = piece.text
    if text.startswith("["):
        if not text.endswith("]"):
            raise _SpecError(piece, "']' is missing at the end of the address")
        text = text[1:-1]
    try:
        address = addr.packed(text)
    except ValueError:
        raise _SpecError(piece, "not an IPv4 or IPv6 address") from None
    plain = addr.unmapped(address)
    if plain != address:
        raise _SpecError(piece, f"an IPv4 address in IPv6 notation: give {addr.text(plain)}")
    return address


# Its items ---------------------------------------------------------------------------------------------------------


class _Range(NamedTuple):
    """Ports that lead to `to` and those that follow it, at `target` if that is given."""

    first: int
    last: int
    to: int
    target: bytes | None
    piece: _Piece
    weak: bool = False  # a port that cannot be bound is left out

    def part(self, first: int, last: int) -> _Range:
        return self._replace(first=first, last=last, to=self.to + first - self.first)


class _Items:
    """The list of a specification, read."""

    def __init__(self, listed: _Piece, mode: str) -> None:
        self._listed = listed
        self._included: list[_Range] = []
        self._excluded: list[_Range] = []
        self._words: dict[str, _Range] = {}
        for item in listed.split(","):
            self._read(item, mode)
        self.auto = AUTO in self._words

    def _read(self, item: _Piece, mode: str) -> None:
        head, target = item.cut(":")
        word = head.text
        if word in (NONE, ALL, AUTO):
            self._read_word(item, target, mode)
        elif word.startswith("~"):
            if target is not None:
                raise _SpecError(item, "ports that are excluded lead nowhere: leave out what follows ':'")
            self._excluded.append(_Range(*_range(_Piece(word[1:], item.at + 1)), 0, None, item))
        elif not item.text:
            raise _SpecError(item, "a port is missing (give ports, ranges or exclusions like ~22, separated by commas)")
        elif word.isalpha():
            keywords = (NONE, ALL) if mode == PASST else (NONE, ALL, AUTO)
            raise _SpecError(head, f"{_NO_PORT}{suggestion(word, keywords)}")
        else:
            first, last = _range(head)
            to, address = _target(target, first, last) if target is not None else (first, None)
            self._included.append(_Range(first, last, to, address, item))

    def _read_word(self, item: _Piece, target: _Piece | None, mode: str) -> None:
        word = item.cut(":")[0].text
        if word == NONE:
            raise _SpecError(item, "'none' stands alone")
        if word == AUTO and mode == PASST:
            raise _SpecError(item, "give ports, or 'all'", "'auto' port forwarding is only allowed for pasta:")
        if word == AUTO and target is not None:
            raise _SpecError(target, "'auto' has no target: give the ports that have one (auto,8080:80)")
        read = _Range(1, PORT_MAX, 1, _target_address(target) if target is not None else None, item, weak=True)
        former = self._words.setdefault(word, read)
        if former.target != read.target:
            head = f"Port forwarding mode '{word}' conflicts with previous mode:"
            raise _SpecError(item, f"'{former.piece.text}' was given before: leave one out", head)

    def ranges(self, ephemeral: range) -> Iterator[_Range]:
        """The ranges without the excluded ports, in their order."""
        _check_disjoint(self._excluded, "Overlapping excluded ranges")
        _check_disjoint(self._included, "Invalid port specifier")
        included = [*self._included, *self._others(ephemeral)]
        left = list(_without(included, sorted((r.first, r.last) for r in self._excluded)))
        if not left:
            raise _SpecError(self._listed, "every port is excluded ('none' forwards nothing)")
        yield from left

    def _others(self, ephemeral: range) -> Iterator[_Range]:
        """The ranges that no item names."""
        every = self._words.get(ALL, _Range(1, PORT_MAX, 1, None, self._listed, weak=True))
        if self.auto and not self._included and ALL not in self._words:
            yield every
        elif ALL in self._words or not self._included:
            named = sorted((r.first, r.last) for r in self._included)
            holes = [(ephemeral[0], ephemeral[-1])] if ephemeral else []
            yield from _without(_without([every], holes), named)


def _check_disjoint(ranges: Iterable[_Range], head: str) -> None:
    for a, b in pairwise(sorted(ranges, key=lambda r: r.first)):
        if b.first <= a.last:
            former, latter = sorted((a.piece, b.piece), key=lambda p: p.at)
            reason = f"{_ports(b.first, min(a.last, b.last))} in '{shown(former.text)}', too: leave out one of them"
            raise _SpecError(latter, reason, head)


def _without(ranges: Iterable[_Range], holes: Sequence[tuple[int, int]]) -> Iterator[_Range]:
    """The ranges cut around `holes` (first, last), which are in ascending order and disjoint."""
    ends = [last for _, last in holes]
    for r in ranges:
        first, i = r.first, bisect_left(ends, r.first)
        while first <= r.last and i < len(holes) and holes[i][0] <= r.last:
            if holes[i][0] > first:
                yield r.part(first, holes[i][0] - 1)
            first = holes[i][1] + 1
            i += 1
        if first <= r.last:
            yield r.part(first, r.last)


def _ports(first: int, last: int) -> str:
    return f"port {first} is" if first == last else f"ports {first}-{last} are"


def _range(piece: _Piece) -> tuple[int, int]:
    head, tail = piece.cut("-")
    first = _port(head)
    if tail is None:
        return first, first
    last = _port(tail)
    if last < first:
        raise _SpecError(tail, "the range ends before it begins")
    return first, last


def _port(piece: _Piece) -> int:
    text = piece.text
    if not text:
        raise _SpecError(piece, "a port is missing")
    if not (text.isascii() and text.isdecimal()):
        raise _SpecError(piece, _NO_PORT)
    digits = text.lstrip("0")
    if not digits:
        raise _SpecError(piece, f"port 0 can't be forwarded (give 1 to {PORT_MAX})")
    if len(digits) > len(str(PORT_MAX)) or int(digits) > PORT_MAX:
        raise _SpecError(piece, f"the last port is {PORT_MAX}")
    return int(digits)


def _target(piece: _Piece, first: int, last: int) -> tuple[int, bytes | None]:
    """The target of the ports `first` to `last`: (its first port, its address if one is given)."""
    address, ports = None, piece
    if re.search(r"[./:\[]", piece.text):
        host, tail = piece.cut("/")
        address = _target_address(host)
        if tail is None:
            return first, address
        ports = tail
    to, to_last = _range(ports)
    if to_last - to == last - first:
        return to, address
    end = to + last - first
    if end > PORT_MAX:
        raise _SpecError(ports, f"{last - first + 1} ports from {to} on go beyond {PORT_MAX}")
    advice = f"{to}-{end}" if end > to else str(to)
    counts = f"{last - first + 1} and {to_last - to + 1} ports"
    raise _SpecError(ports, f"the ranges have different lengths, {counts} (did you mean {advice}?)")


def _target_address(piece: _Piece) -> bytes:
    address = _address(piece)
    if len(address) == 16 and not piece.text.startswith("["):
        raise _SpecError(piece, f"an IPv6 address needs brackets here: [{piece.text}]")
    if not addr.is_unicast(address):
        raise _SpecError(piece, "nothing can be connected to there: give the address of one host")
    return address
