"""Declarations of options: the class that results, and that each fact about an option is there once."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from passt.conf import argv as conf_argv
from passt.conf.actions import Pair
from passt.conf.options import Options
from passt.conf.row import GROUPS, RARE, Only, Record, field, file, flag, option, value
from passt.conf.table import TABLE
from passt.policy.config import PASST, PASTA, Config


class Example(Record):
    plain: int = 7
    loud: bool = flag("--loud", RARE, "Be loud")
    colour: bool = flag("-C, --no-colour", RARE, "No colour", to=False)
    size: int = value("-s, --size SIZE", RARE, "How big", int, default=3, only=Only(PASTA, "nothing"))
    path: str | None = file("--path PATH", RARE, "Where", default=None)
    tone: str = field("", option("--low", RARE, "Low"), option("--high", RARE, "High"), passt="low")


def test_rows() -> None:
    assert [(row.name, row.short, row.arg, row.field) for row in Example.ROWS] == [
        ("loud", "", "", "loud"),
        ("no-colour", "C", "", "colour"),
        ("size", "s", "SIZE", "size"),
        ("path", "", "PATH", "path"),
        ("low", "", "", "tone"),
        ("high", "", "", "tone"),
    ]
    assert Example.PASST_DEFAULTS == {"tone": "low"}
    assert {"plain", "loud", "colour", "size", "path", "tone"} == Example.FIELDS


def test_defaults_and_values() -> None:
    example = Example(size=4)
    assert (example.plain, example.loud, example.colour, example.size, example.path) == (7, False, True, 4, None)
    assert example == Example(size=4, plain=7) != Example()
    assert hash(example) == hash(Example(size=4, plain=7))
    assert example != 4
    assert repr(Example(size=4, plain=7)) == "Example(size=4)"


def test_actions_set_the_field_of_their_row() -> None:
    fields: dict[str, Any] = {}
    rows = {row.name: row for row in Example.ROWS}
    for name, text in (("loud", ""), ("no-colour", ""), ("size", "9"), ("path", "/x")):
        rows[name].action(fields, text, rows[name])
    assert Example(**fields) == Example(loud=True, colour=False, size=9, path="/x")


def test_frozen() -> None:
    with pytest.raises(AttributeError, match="size is frozen"):
        Example().size = 5  # type: ignore[misc]
    with pytest.raises(AttributeError, match="size is frozen"):
        del Example().size
    with pytest.raises(TypeError, match="no such fields: sise"):
        Example(sise=5)  # type: ignore[call-arg]


def test_mode_of_a_row() -> None:
    rows = {row.name: row for row in Example.ROWS}
    assert rows["loud"].is_in(PASTA) and rows["loud"].is_in(PASST)
    assert rows["size"].is_in(PASTA) and not rows["size"].is_in(PASST)


# The options of pasta and passt ------------------------------------------------------------------------------------

HINTS = get_type_hints(Options)


def fits(value: object, hint: Any) -> bool:
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(isinstance(item, get_args(hint)[0]) for item in value)
    return isinstance(value, hint)


@pytest.mark.parametrize("name", sorted(Options.FIELDS))
def test_default_has_the_type_of_the_field(name: str) -> None:
    assert fits(getattr(Options(), name), HINTS[name])


@pytest.mark.parametrize("row", [row for row in TABLE if row.field and not row.arg], ids=lambda row: row.name)
def test_option_without_argument_sets_its_field(row: Any) -> None:
    """Nothing but the row is needed."""
    mode = row.only.mode or PASTA
    fields = {**(Options.PASST_DEFAULTS if mode == PASST else {})}
    row.action(fields, "", row)
    assert fields[row.field] != getattr(conf_argv.parse([], mode), row.field)
    assert fits(fields[row.field], HINTS[row.field])


def test_every_row_is_in_a_group() -> None:
    assert {row.group for row in TABLE} == set(GROUPS)


def test_config_takes_over_fields_of_the_same_name_and_type() -> None:
    """`conf_net` copies them without naming them."""
    theirs = get_type_hints(Config)
    same = theirs.keys() & Options.FIELDS
    assert {"no_tcp", "freebind", "splice_only", "host_lo_to_ns_lo", "hostname", "our_mac", "forwards"} <= same
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    for name in same:
        assert HINTS[name] == theirs[name]
        assert getattr(Options(), name) == defaults[name]


def test_pair() -> None:
    assert (Pair(1, 2).get(False), Pair(1, 2).get(True)) == (1, 2)
