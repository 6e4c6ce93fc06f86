"""Named tuples that cost a start little: `NamedTuple` as far as it is used here.

That of the standard library compiles the constructor of each class, and the text of each annotation, a quarter of a
millisecond for a class. Here the constructor is one of those below, which came compiled with this module, with other
names for its arguments. It is as fast as the standard one, and the fields are the same. To a type checker the classes
are the standard ones. Modules that are compiled inherit from the standard one, as mypyc does in any case.
"""

from __future__ import annotations

from collections import _tuplegetter  # type: ignore[attr-defined]
from typing import TYPE_CHECKING, Any

_new = tuple.__new__

# By the number of fields
_CONSTRUCTORS: tuple[Any, ...] = (
    lambda _cls: _new(_cls, ()),
    lambda _cls, a: _new(_cls, (a,)),
    lambda _cls, a, b: _new(_cls, (a, b)),
    lambda _cls, a, b, c: _new(_cls, (a, b, c)),
    lambda _cls, a, b, c, d: _new(_cls, (a, b, c, d)),
    lambda _cls, a, b, c, d, e: _new(_cls, (a, b, c, d, e)),
    lambda _cls, a, b, c, d, e, f: _new(_cls, (a, b, c, d, e, f)),
    lambda _cls, a, b, c, d, e, f, g: _new(_cls, (a, b, c, d, e, f, g)),
    lambda _cls, a, b, c, d, e, f, g, h: _new(_cls, (a, b, c, d, e, f, g, h)),
    lambda _cls, a, b, c, d, e, f, g, h, i: _new(_cls, (a, b, c, d, e, f, g, h, i)),
)


class _Maker(type):
    """The class of `NamedTuple`: a class that inherits from that is made a tuple with fields."""

    def __new__(cls, name: str, bases: tuple[type, ...], space: dict[str, Any]) -> Any:
        if not bases:
            return super().__new__(cls, name, bases, space)
        names = tuple(space.get("__annotations__", ()))
        defaults = {name: space.pop(name) for name in names if name in space}
        if names[len(names) - len(defaults) :] != tuple(defaults):
            raise TypeError(f"{name}: a field without a default follows one with a default")
        fields = {name: _tuplegetter(index, "") for index, name in enumerate(names)}
        new = _constructor(name, names, tuple(defaults.values()))
        methods = {"__new__": new, "__repr__": _repr, "_replace": _replace}
        described = {"__slots__": (), "__match_args__": names, "_fields": names, "_field_defaults": defaults}
        return type(name, (tuple,), {**methods, **described, **space, **fields})


def _constructor(what: str, names: tuple[str, ...], defaults: tuple[Any, ...]) -> Any:
    made = _CONSTRUCTORS[len(names)]
    code = made.__code__.replace(co_varnames=("_cls", *names), co_name="__new__", co_qualname=f"{what}.__new__")
    return type(made)(code, globals(), "__new__", defaults)


def _repr(self: Any) -> str:
    values = ", ".join(f"{name}={value!r}" for name, value in zip(self._fields, self, strict=True))
    return f"{type(self).__name__}({values})"


def _replace(self: Any, /, **changes: Any) -> Any:
    """Another one, with other values of some fields."""
    return type(self)(**dict(zip(self._fields, self, strict=True)) | changes)


if TYPE_CHECKING:
    from typing import NamedTuple as NamedTuple
else:

    class NamedTuple(metaclass=_Maker):
        """The base of such a class."""
