"""The manual page: it is well formed, and names exactly the options that exist."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from passt import pesto
from passt.conf_table import TABLE

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


@pytest.mark.parametrize("name", ["passt.1", "pesto.1", "qrap.1"])
def test_page_is_well_formed(name: str) -> None:
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", str(REPOSITORY / name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
