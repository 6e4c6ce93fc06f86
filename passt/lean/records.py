"""Data classes that cost a start nothing: `dataclass`, `field` and `replace` as far as they are used here.

Those of the standard library write the methods of each class as text, compile it, 0.4 ms for each of some 70 classes,
and load `inspect`, 6 ms. Here the methods are closures over the names of the fields. To a type checker they are the
standard ones. To `dataclasses.fields` and its like, which tests use, the classes are data classes as well.

    dataclass(slots=True), dataclass(frozen=True, slots=True)    no base class has fields
    field(default_factory=..., init=..., compare=...)            or a constant as the default
    __post_init__
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from dataclasses import field as field
    from dataclasses import replace as replace
else:

    def dataclass(*, slots, frozen=False):
        """The decorator."""
        return lambda cls: _made(cls, frozen)

    def field(*, default_factory=None, init=True, compare=True):
        """A field with another default than a constant, or with none."""
        return Field(default_factory, init, compare)

    def replace(record, /, **changes):
        """Another record, with other values of some fields."""
        for name in record.__match_args__:
            if name not in changes:
                changes[name] = getattr(record, name)
        return type(record)(**changes)


class FrozenError(AttributeError):
    """A field of a frozen record was assigned or deleted."""


class Field:
    """The arguments of `field`."""

    __slots__ = ("compare", "factory", "init")

    def __init__(self, factory: Callable[[], Any] | None, init: bool, compare: bool) -> None:
        self.factory = factory
        self.init = init
        self.compare = compare


class StandardFields:
    """`__dataclass_fields__`, made when something asks for it."""

    __slots__ = ("_defaults", "_types")

    def __init__(self, types: dict[str, Any], defaults: dict[str, Any]) -> None:
        self._types = types
        self._defaults = defaults

    def __get__(self, record: object, cls: type) -> dict[str, Any]:
        import dataclasses

        found: dict[str, Any] = {}
        for name, kind in self._types.items():
            default = self._defaults.get(name, dataclasses.MISSING)
            options: dict[str, Any] = {"default": default}
            if isinstance(default, Field):
                options = {"init": default.init, "compare": default.compare}
                if default.factory is not None:
                    options["default_factory"] = default.factory
            made = found[name] = dataclasses.field(**options)
            made.name, made.type, made._field_type = name, kind, dataclasses._FIELD  # type: ignore[attr-defined]
        return found


def _made(cls: type, frozen: bool) -> type:
    """The class with slots, and with the methods of a data class where it has none of its own.

    The methods are put into the class itself first: where it is compiled, that is the class that is used.
    """
    types: dict[str, Any] = vars(cls).get("__annotations__", {})
    names = tuple(types)
    defaults = {name: vars(cls)[name] for name in names if name in vars(cls)}
    wanted = tuple(name for name in names if not _is_late(defaults.get(name)))
    compared = [n for n in names if not isinstance(default := defaults.get(n), Field) or default.compare]
    methods: dict[str, Any] = {"__match_args__": wanted, "__dataclass_fields__": StandardFields(types, defaults)}
    methods["__init__"] = _init(cls.__qualname__, wanted, defaults, post=hasattr(cls, "__post_init__"))
    if "__repr__" not in vars(cls):
        methods["__repr__"] = _repr(names)
    if "__eq__" not in vars(cls):
        values = attrgetter(*compared)
        methods["__eq__"] = _eq(values)
        methods["__hash__"] = (lambda record: hash(values(record))) if frozen else None
    if frozen:
        methods["__setattr__"] = methods["__delattr__"] = _refuse
    for name, method in methods.items():
        setattr(cls, name, method)
    left_out = {*names, "__dict__", "__weakref__"}
    members = {name: member for name, member in vars(cls).items() if name not in left_out}
    return type(cls)(cls.__name__, cls.__bases__, members | {"__slots__": names})


def _is_late(default: object) -> bool:
    """Whether a field is none of `__init__`."""
    return isinstance(default, Field) and not default.init


def _init(what: str, wanted: tuple[str, ...], defaults: dict[str, Any], *, post: bool) -> Callable[..., None]:
    count = len(wanted)
    setters: list[Callable[[Any, Any], None]] = []  # those of the first object's class, which there is only then

    def complete(values: tuple[Any, ...], named: dict[str, Any]) -> list[Any]:
        """The values of all fields, in their order."""
        found = list(values)
        for name in wanted[len(values) :]:
            if name in named:
                found.append(named.pop(name))
            elif name in defaults:
                default = defaults[name]
                found.append(default.factory() if isinstance(default, Field) and default.factory else default)
            else:
                raise TypeError(f"{what} needs {name}")
        if named or len(found) > count:
            raise TypeError(f"{what} has no {', '.join(named) or 'more fields'}, or has it already")
        return found

    def __init__(self: Any, *values: Any, **named: Any) -> None:
        if not setters:
            setters.extend(getattr(type(self), name).__set__ for name in wanted)
        given = values if len(values) == count and not named else complete(values, named)
        for put, value in zip(setters, given, strict=True):
            put(self, value)
        if post:
            self.__post_init__()

    return __init__


def _repr(names: Iterable[str]) -> Callable[[Any], str]:
    def __repr__(self: Any) -> str:
        return f"{type(self).__qualname__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    return __repr__


def _eq(values: attrgetter[Any]) -> Callable[[Any, Any], Any]:
    def __eq__(self: Any, other: object) -> Any:
        return values(self) == values(other) if type(other) is type(self) else NotImplemented

    return __eq__


def _refuse(record: object, name: str, *value: object) -> None:
    raise FrozenError(f"{type(record).__name__}.{name} is frozen")
