"""The screens in docs/observability.md: those of the program as it is, in 80 columns."""

from __future__ import annotations

import re

import pytest

from bench.screens import COLUMNS, DOCUMENT, written
from passt.pesto import top as pesto_top
from passt.pesto.text import flow_lines

TEXT = DOCUMENT.read_text()
SCREENS = dict(re.findall(r"<!-- screen (\w+)[^>]*-->\n\n((?:    .*\n|\n(?=    ))*)", TEXT))


def lines(name: str) -> list[str]:
    return [line[4:] for line in SCREENS[name].splitlines()]


@pytest.mark.parametrize("name", ["start", "top", "flows", "rules"])
def test_it_fits(name: str) -> None:
    assert len(lines(name)) > 3 and max(map(len, lines(name))) <= COLUMNS


def test_columns_are_those_of_the_program() -> None:
    (head,) = flow_lines([])
    assert lines("flows")[0].split() == head.split()[:-1]
    assert lines("top")[2].split()[-4:] == list(pesto_top._HEADS)
    assert lines("rules")[0].split() == ["#", "RULE", "LISTENING"]
    assert all("established" in line for line in lines("flows")[1:]), "traffic was there"


def test_blocks_are_replaced_as_a_whole() -> None:
    screens = {name: ["new", "", "lines"] for name in SCREENS}
    once = written(TEXT, screens)
    assert once.count("    new\n\n    lines\n\n## ") == len(SCREENS) and written(once, screens) == once
    assert written(once, {name: lines(name) for name in SCREENS}) == TEXT
    with pytest.raises(LookupError):
        written(TEXT, {"other": []})
