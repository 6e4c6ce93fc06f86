"""Data classes of our own behave as those of the standard library do, as far as they are used."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from passt.lean import records

DECORATORS = [(dataclasses.dataclass, dataclasses.field), (records.dataclass, records.field)]
IDS = ["standard", "lean"]


def frozen(make: Any, field: Any) -> Any:
    @make(frozen=True, slots=True)
    class Point:
        """A place."""

        x: int
        y: int = 2
        tags: tuple[str, ...] = ()
        seen: list[int] = field(default_factory=list, compare=False)

        @property
        def sum(self) -> int:
            return self.x + self.y

        def moved(self) -> Any:
            return records.replace(self, x=self.x + 1)

    return Point


def mutable(make: Any, field: Any) -> Any:
    @make(slots=True)
    class Box:
        size: int
        parts: dict[str, int] = field(default_factory=dict)
        total: int = field(init=False)

        def __post_init__(self) -> None:
            self.total = self.size * 2

    return Box


def same(of: Callable[[Any, Any], Any], use: Callable[[Any], object]) -> object:
    """The result of `use` with the class of both kinds, which is the same. An exception counts by its type."""
    results = []
    for decorators in DECORATORS:
        try:
            results.append(use(of(*decorators)))
        except Exception as e:
            results.append(next(kind for kind in (TypeError, AttributeError) if isinstance(e, kind)))
    assert results[0] == results[1]
    return results[1]


@pytest.mark.parametrize(
    "make",
    [
        lambda c: c(1),
        lambda c: c(1, 3, ("a",), [1]),
        lambda c: c(y=5, x=4),
        lambda c: c(1, tags=("b",)),
        lambda c: c(),
        lambda c: c(1, 2, (), [], 5),
        lambda c: c(1, x=2),
        lambda c: c(1, z=2),
        lambda c: c(y=1),
    ],
)
def test_arguments_defaults_and_text(make: Callable[[Any], Any]) -> None:
    same(frozen, lambda c: repr(make(c)).split(".")[-1])


def test_equality_and_hash() -> None:
    def use(c: Any) -> list[Any]:
        return [
            c(1) == c(1), c(1) == c(2), c(1) == (1, 2, ()), c(1, 2, (), [1]) == c(1), c(1) != c(1, 3),
            hash(c(1)) == hash(c(1)), hash(c(1, seen=[4])) == hash(c(1)), len({c(1), c(1), c(2)}),
        ]  # fmt: skip

    assert same(frozen, use) == [True, False, False, True, True, True, True, 2]
    assert same(mutable, lambda c: c(1) == c(1))
    assert same(mutable, lambda c: hash(c(1))) is TypeError


def test_a_frozen_one_stays_as_it_is() -> None:
    for change in (lambda p: setattr(p, "x", 2), lambda p: delattr(p, "x")):
        assert same(frozen, lambda c, change=change: change(c(1))) is AttributeError  # type: ignore[misc]


def test_another_one_may_change_and_has_no_other_fields() -> None:
    def use(c: Any) -> list[Any]:
        box = c(3)
        box.size = 7
        box.parts["a"] = 1
        return [box.size, box.parts, box.total, c(3).parts, hasattr(box, "__dict__")]

    assert same(mutable, use) == [7, {"a": 1}, 6, {}, False]
    assert same(mutable, lambda c: setattr(c(1), "other", 2)) is AttributeError
    assert same(mutable, lambda c: c(1, {}, 5)) is TypeError
    assert same(mutable, lambda c: c(1, total=5)) is TypeError


def test_replace() -> None:
    point = frozen(*DECORATORS[1])(1, 2, ("a",))
    assert repr(records.replace(point, y=7)) == repr(dataclasses.replace(point, y=7))
    assert point.moved() == type(point)(2, 2, ("a",)) and point.sum == 3
    assert records.replace(mutable(*DECORATORS[1])(3), size=4).total == 8
    with pytest.raises(TypeError):
        records.replace(point, z=1)
    assert records.replace(frozen(*DECORATORS[0])(1), x=2).x == 2, "also of a standard one"


def test_what_is_known_of_the_class() -> None:
    assert same(frozen, lambda c: (c.__name__, c.__doc__, c.__slots__, c.__match_args__))
    assert same(mutable, lambda c: c.__match_args__) == ("size", "parts")
    for of in (frozen, mutable):
        assert same(of, lambda c: [(f.name, f.type, f.init, f.compare) for f in dataclasses.fields(c)])
    assert same(frozen, lambda c: dataclasses.asdict(c(1)))
    assert dataclasses.is_dataclass(mutable(*DECORATORS[1]))


def test_an_own_method_stays() -> None:
    @records.dataclass(frozen=True, slots=True)
    class Own:
        x: int

        def __repr__(self) -> str:
            return "own"

        def __eq__(self, other: object) -> bool:
            return True

        def __hash__(self) -> int:
            return 5

    assert (repr(Own(1)), Own(1) == Own(2), hash(Own(1))) == ("own", True, 5)


def test_a_start_loads_neither_dataclasses_nor_inspect() -> None:
    code = (
        "import sys, passt.cli, passt.daemon.pasta, passt.daemon.passt, passt.daemon.wiring, passt.daemon.following\n"
        "print({'dataclasses', 'inspect', 'ast'} & set(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
