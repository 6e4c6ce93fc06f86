"""Declaration of an option: a row, beside the field that it sets.

    class Options(Record):
        no_tcp: bool = flag("--no-tcp", SERVICES, "Turn off TCP")
        mtu: int = value("-m, --mtu MTU", ADDRESSES, "Set the MTU", parse=values.mtu, default=MTU_DEFAULT)
        use: Pair = field(Pair(True, True), option("-4, --ipv4-only", ADDRESSES, "Use IPv4 only", ...), option(...))

The row is the only place that names an option. The parser, --help and the completions use the rows, and tests compare
the manual page with them.

The type checker sees a class with frozen fields and their defaults: `flag` returns a bool, `value` and `field` return
the type of the default and of the parser. At run time they return a `_Declared`, the default with its rows. The class
keeps the rows and sets the field to the default, so that an instance stores only values that differ from the defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

from ..lean.tuples import NamedTuple
from . import actions
from .actions import Action

T = TypeVar("T")
D = TypeVar("D")

# Groups, as headings of --help and sections of the manual page: in the order of use
BASIC = "Basic options"
PORTS = "Ports"
ADDRESSES = "Addresses and routes"
NAMES = "DNS and names"
RUNNING = "How it runs"
NAMESPACE = "Namespace"
MACHINE = "Virtual machine"
SERVICES = "Protocols and services"
MESSAGES = "Messages and debugging"
RARE = "Less used options"
GROUPS = (BASIC, PORTS, ADDRESSES, NAMES, RUNNING, NAMESPACE, MACHINE, SERVICES, MESSAGES, RARE)


class Only(NamedTuple):
    """The mode that has an option, if only one has it; the alternative in the other mode."""

    mode: str = ""  # empty: both have it
    instead: str = ""
    inert: bool = False  # the other mode accepts the long name, and warns that it has no effect


BOTH = Only()


class Option(NamedTuple):
    """A row. `name`, `short` and `arg` are empty if there is none; lines of `help` are separated by newlines.

    Completions show the first line of `help` alone. {guest} and {link} are replaced by their names in a mode.
    """

    name: str
    short: str
    arg: str
    group: str
    help: str
    action: Action
    only: Only = BOTH
    deprecated: bool = False
    field: str = ""  # the field that it sets; empty: none, or several

    @property
    def meaning(self) -> object:
        """Equal for two names of one option."""
        return self.field, self.action, self.arg

    def is_in(self, mode: str) -> bool:
        """Whether a mode has it."""
        return self.only.mode in ("", mode)


def option(
    head: str,
    group: str,
    help: str,
    action: Action = actions.nothing,
    *,
    only: Only = BOTH,
    deprecated: bool = False,
) -> Option:
    """A row; `head` is the option as --help shows it: "--trace", "-q, --quiet", "-m, --mtu MTU"."""
    short, _, long = head.rpartition(", ")
    name, _, arg = long.partition(" ")
    return Option(name[2:], short[1:], arg, group, help, action, only, deprecated)


class _Declared(NamedTuple):
    """A field in the body of its class: its default, the default of passt if it differs, and the rows."""

    default: object
    rows: Sequence[Option]
    passt: object = None


def flag(head: str, group: str, help: str, *, to: bool = True, only: Only = BOTH, deprecated: bool = False) -> bool:
    """A boolean that an option sets to `to`; its default is the opposite."""
    row = option(head, group, help, actions.setting(to), only=only, deprecated=deprecated)
    return cast(bool, _Declared(not to, (row,)))


def value(head: str, group: str, help: str, parse: Callable[[str], T], *, default: D, only: Only = BOTH) -> T | D:
    """The argument of an option, converted by `parse`."""
    return cast(T, _Declared(default, (option(head, group, help, actions.parsed(parse), only=only),)))


def file(head: str, group: str, help: str, *, default: D, only: Only = BOTH) -> str | D:
    """The name of a file."""
    return cast(str, _Declared(default, (option(head, group, help, actions.file, only=only),)))


def field(default: T, *rows: Option, passt: T | None = None) -> T:
    """A field of several options, or of an option with a special action; `passt` is the default in that mode."""
    return cast(T, _Declared(default, rows, passt))


@dataclass_transform(frozen_default=True, kw_only_default=True)
class Record:
    """Base of the class of options: keyword arguments, frozen, compared by value."""

    ROWS: ClassVar[tuple[Option, ...]]
    FIELDS: ClassVar[frozenset[str]]
    PASST_DEFAULTS: ClassVar[dict[str, Any]]  # where they differ

    def __init_subclass__(cls) -> None:
        rows: list[Option] = []
        cls.PASST_DEFAULTS = {}
        for name, declared in list(vars(cls).items()):
            if isinstance(declared, _Declared):
                setattr(cls, name, declared.default)
                rows += (row._replace(field=name) for row in declared.rows)
                if declared.passt is not None:
                    cls.PASST_DEFAULTS[name] = declared.passt
        cls.ROWS = tuple(rows)
        cls.FIELDS = frozenset(cls.__annotations__)

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - self.FIELDS
        if unknown:
            raise TypeError(f"no such fields: {', '.join(sorted(unknown))}")
        self.__dict__.update(given)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} is frozen")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{name} is frozen")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(getattr(self, name) == getattr(other, name) for name in self.FIELDS)

    def __hash__(self) -> int:
        return hash(tuple(getattr(self, name) for name in sorted(self.FIELDS)))

    def __repr__(self) -> str:
        given = (f"{name}={value!r}" for name, value in self.__dict__.items() if value != getattr(type(self), name))
        return f"{type(self).__name__}({', '.join(given)})"
