"""Named tuples of `lean/tuples.py`, against those of the standard library."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from passt.lean import tuples
from passt.lean.tuples import NamedTuple


def _twins(base: Any) -> tuple[Any, Any]:
    class Point(base):
        """A point."""

        x: int
        y: int = 2
        label: str | None = None

        @property
        def sum(self) -> int:
            return self.x + self.y

        def moved(self, by: int) -> Any:
            return self._replace(x=self.x + by)

    class Empty(base):
        pass

    return Point, Empty


OURS, THEIRS = _twins(NamedTuple), _twins(typing.NamedTuple)


@pytest.mark.parametrize("given", [((1,), {}), ((1, 3, "a"), {}), ((), {"x": 1, "label": "b"}), ((1,), {"y": 5})])
def test_values_are_those_of_the_standard_one(given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    ours, theirs = (kind[0](*given[0], **given[1]) for kind in (OURS, THEIRS))
    assert ours == theirs == tuple(ours)
    assert hash(ours) == hash(theirs)
    assert repr(ours) == repr(theirs)
    assert (ours.x, ours.y, ours.label, ours.sum) == (theirs.x, theirs.y, theirs.label, theirs.sum)
    assert ours.moved(4) == theirs.moved(4)
    assert type(ours.moved(4)) is OURS[0]


@pytest.mark.parametrize("given", [((), {}), ((1, 2, 3, 4), {}), ((1,), {"z": 1}), ((1,), {"x": 1})])
def test_wrong_arguments_are_refused_in_the_same_words(given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
    said = []
    for kind in OURS, THEIRS:
        with pytest.raises(TypeError) as e:
            kind[0](*given[0], **given[1])
        said.append(str(e.value).replace("_twins.<locals>.", ""))
    assert said[0] == said[1]


def test_classes_are_described_as_the_standard_ones() -> None:
    for ours, theirs in zip(OURS, THEIRS, strict=True):
        for name in ("__name__", "__qualname__", "__module__", "__doc__", "__bases__", "__slots__", "__match_args__"):
            if name != "__doc__" or theirs is THEIRS[0]:  # the standard one describes a class without a text
                assert getattr(ours, name) == getattr(theirs, name), name
        for name in ("_fields", "_field_defaults"):
            assert getattr(ours, name) == getattr(theirs, name), name
    assert OURS[1]() == ()


def test_values_cannot_be_assigned() -> None:
    point = OURS[0](1)
    for name in ("x", "other"):
        with pytest.raises(AttributeError):
            setattr(point, name, 1)


def test_as_many_fields_as_there_are_constructors() -> None:
    names = [f"f{number}" for number in range(len(tuples._CONSTRUCTORS) - 1)]
    many = tuples._Maker("Many", (NamedTuple,), {"__annotations__": dict.fromkeys(names, "int")})
    assert many(*range(len(names))) == tuple(range(len(names)))
    assert [getattr(many(*range(len(names))), name) for name in names] == list(range(len(names)))


def test_a_default_in_front_of_a_field_without_one_is_refused() -> None:
    with pytest.raises(TypeError, match="without a default"):

        class Wrong(NamedTuple):
            a: int = 1
            b: int  # type: ignore[misc]
