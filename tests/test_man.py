"""The manual pages: they are well formed, and have exactly the options that exist, as these are."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from passt.addr import mac_text
from passt.conf import slirp4netns
from passt.conf.actions import DNS_MAX, SEARCH_MAX
from passt.conf.options import LOG_SIZE, NETNS_RUN_DIR
from passt.conf.row import GROUPS, Option
from passt.conf.table import TABLE
from passt.conf.values import LOG_SIZE_MIN, SOCKET_PATH_MAX
from passt.passt import DEFAULT_MAX, DEFAULT_PATH
from passt.pesto import command as pesto
from passt.policy.config import FRAME_MTU_MAX, MTU_DEFAULT, MTU_MIN, OUR_MAC
from passt.wire.ip import MTU_MAX

REPOSITORY = Path(__file__).parent.parent


def entries(name: str) -> dict[str, str]:
    """The options that a page has entries for: long name -> short one."""
    found: dict[str, str] = {}
    for line in (REPOSITORY / name).read_text().splitlines():
        if line.startswith(".It Fl"):
            short = re.match(r"\.It Fl (\w) , ", line)
            for option in re.findall(r"-([a-z][a-z0-9-]+)", line):
                found[option] = short[1] if short else ""
    return found


def test_every_option_has_its_entry_and_no_other() -> None:
    assert entries("passt.1") == {option.name: option.short for option in TABLE if option.help}
    assert entries("pesto.1") == {option.name: option.short for option in pesto.TABLE}
    assert entries("slirp4netns.1") == {option.name: option.short for option in slirp4netns.ROWS}


def sections(name: str) -> dict[str, list[str]]:
    """The options of each section that has any, in their order."""
    found: dict[str, list[str]] = {}
    for title, text in re.findall(r"^\.Ss (.*)\n((?:(?!\.S[sh] ).*\n)*)", (REPOSITORY / name).read_text(), re.M):
        heads = re.findall(r"^\.It Fl (?:\w , )?(-.*)$", text, re.M)
        if heads:
            found[title] = [option for head in heads for option in re.findall(r"-([a-z][a-z0-9-]+)", head)]
    return found


def test_sections_are_the_groups_of_help() -> None:
    """With the same options, in the order of use."""
    wanted = {g: [option.name for option in TABLE if option.help and option.group == g] for g in GROUPS}
    assert list(sections("passt.1").items()) == list(wanted.items())
    wanted = {g: [option.name for option in pesto.TABLE if option.group == g] for g in pesto.GROUPS}
    assert list(sections("pesto.1").items()) == list(wanted.items())


def argument(line: str) -> str:
    """The argument in an entry's head, `Ar ADDR Ns Op / Ns Ar PREFIX`, as --help has it, ADDR[/PREFIX]."""
    _, _, mdoc = re.sub(r"^\.It Fl (\w , )?-", "", line).partition(" ")
    text, end = "", ""
    for word in mdoc.split():
        if word in ("Oo", "Op"):
            text, end = f"{text}[", "]" if word == "Op" else end
        elif word == "Oc":
            text += "]"
        elif word not in ("Ar", "Ns", "No"):
            text += word
    return text + end


def entry(name: str, option: str) -> str:
    """The text of an option's entry, its head first."""
    page = (REPOSITORY / name).read_text()
    match = re.search(rf"^\.It Fl (\w , )?-{option}\b(?!-)(.|\n)*?(?=^\.(It|El)\b)", page, re.M)
    assert match is not None
    return match[0]


@pytest.mark.parametrize("option", [o for o in TABLE if o.help and o.arg], ids=lambda o: o.name)
def test_argument_is_that_of_the_option(option: Option) -> None:
    assert argument(entry("passt.1", option.name).split("\n")[0]) == option.arg


COUNTS = {3: "three", 6: "six"}


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("log-size", [LOG_SIZE, LOG_SIZE_MIN]),
        ("mtu", [MTU_DEFAULT, MTU_MIN, MTU_MAX, FRAME_MTU_MAX]),
        ("mac-addr", [mac_text(OUR_MAC)]),
        ("dns", [COUNTS[DNS_MAX]]),
        ("search", [COUNTS[SEARCH_MAX]]),
        ("socket", [SOCKET_PATH_MAX, DEFAULT_PATH.format(1), DEFAULT_MAX]),
        ("nsrun-dir", [NETNS_RUN_DIR]),
    ],
)
def test_defaults_and_limits_are_those_of_the_program(option: str, values: list[object]) -> None:
    words = re.split(r"[\s,;]+", entry("passt.1", option))
    for value in values:
        assert str(value) in words or f"{value}." in words


def test_sections_come_in_the_order_of_the_original() -> None:
    """Which had NAME, SYNOPSIS, DESCRIPTION, OPTIONS, EXAMPLES, NOTES, LIMITATIONS, COPYRIGHT, SEE ALSO."""
    sections = re.findall(r"^\.Sh (.*)$", (REPOSITORY / "passt.1").read_text(), re.M)
    ours = ["ENVIRONMENT", "FILES", "EXIT STATUS"]
    others = ["EXAMPLES", "NOTES", "LIMITATIONS", "COPYRIGHT", "SEE ALSO"]
    assert sections == ["NAME", "SYNOPSIS", "DESCRIPTION", "OPTIONS", *ours, *others]


@pytest.mark.parametrize("name", ["pasta", "passt4netns"])
def test_other_names_lead_to_the_page(name: str) -> None:
    """As man(1) has it, once they are installed beside each other."""
    assert (REPOSITORY / f"{name}.1").read_text() == ".so man1/passt.1\n"
    assert f'"{name}.1"' in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize("page", sorted(REPOSITORY.glob("*.1")), ids=lambda page: page.name)
def test_widths_of_columns_have_no_apostrophe(page: Path) -> None:
    """groff 1.23 takes it for the end of the text, warns, and makes a column of another width."""
    assert [line for line in page.read_text().splitlines() if line.startswith(".Bl") and "'" in line] == []


@pytest.mark.parametrize("name", ["passt.1", "passt-repair.1", "pesto.1", "qrap.1", "slirp4netns.1"])
def test_page_is_well_formed(name: str) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(REPOSITORY / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
