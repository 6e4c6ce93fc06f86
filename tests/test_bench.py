"""The programs that the benchmark compares with: other checkouts and builds."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.__main__ import arguments, chosen
from bench.contenders import peer
from bench.lab import LabError

ROOT = Path(__file__).parent.parent


def test_a_checkout_is_a_peer() -> None:
    contender = peer(f"before={ROOT}")
    assert contender.start is not None and contender.serve is not None and contender.command is not None
    for argv in (contender.command(1, 1500, "none"), contender.serve("/nowhere", 1500)):
        program = argv[: argv.index("-q")]
        said = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True, cwd="/").stdout
        assert said.startswith(argv[2].partition("sys.argv[0] = '")[2].partition("'")[0]), said


def test_a_build_of_the_original_is_a_peer(tmp_path: Path) -> None:
    for name in ("pasta", "passt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    contender = peer(f"new={tmp_path}")
    assert contender.command is not None
    assert contender.command(7, 1500, "none")[0] == f"{tmp_path}/pasta"


@pytest.mark.parametrize("argument", ["before", "=/", "before=", "ours=/", "before=/proc"])
def test_a_peer_that_is_none(argument: str) -> None:
    with pytest.raises(LabError, match="--peer"):
        peer(argument)


def test_peers_take_part_beside_ours() -> None:
    _, contenders = chosen(arguments(["--peer", f"before={ROOT}", "--contenders", "ours,pasta"]))
    assert [c.name for c in contenders] == ["ours", "before", "pasta"]
