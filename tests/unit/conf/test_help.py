"""--help: columns, paragraphs, groups."""

from __future__ import annotations

from string import ascii_lowercase

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.conf import help as conf_help
from passt.conf.row import Option, option
from passt.log import WIDTH
from passt.pesto import command as pesto

FLAG = option("-q, --quiet", "One", "Print little\nnot a word about " + "what is going on " * 4)
LONG = option("--map-host-loopback ADDR", "Two", "Map ADDR")


def test_layout() -> None:
    assert conf_help.text("Usage: x", [LONG, FLAG], ("One", "Two", "Three")) == (
        "Usage: x\n"
        "\n"
        "One:\n"
        "  -q, --quiet             Print little\n"
        "                            not a word about what is going on what is going on\n"
        "                            what is going on what is going on\n"
        "\n"
        "Two:\n"
        "      --map-host-loopback ADDR\n"
        "                          Map ADDR\n"
    )


WORDS = st.lists(st.text(ascii_lowercase + ":/'.-", min_size=1, max_size=40), min_size=1, max_size=30).map(" ".join)


@given(
    st.lists(WORDS, min_size=1, max_size=3), st.from_regex(r"(-[a-z], )?--[a-z]{2,20}( [A-Z]{2,20})?", fullmatch=True)
)
def test_every_word_is_there_and_no_line_is_too_long(paragraphs: list[str], head: str) -> None:
    row: Option = option(head, "One", "\n".join(paragraphs))
    text = conf_help.text("", [row], ["One"])
    assert max(map(len, text.splitlines())) <= WIDTH
    assert text.split() == ["One:", *head.split(), *" ".join(paragraphs).split()]


def test_help_of_pesto() -> None:
    lines = pesto.usage().splitlines()
    assert max(map(len, lines)) <= 80
    assert [line[:-1] for line in lines if line.endswith(":") and line[0] != " "] == list(pesto.GROUPS)


@pytest.mark.parametrize("row", pesto.TABLE, ids=lambda row: row.name)
def test_pesto_lists_each_option(row: pesto.Option) -> None:
    assert f"--{row.name}" in pesto.usage().split()
