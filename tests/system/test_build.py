"""The program that the tests run is the build that they are about, and each of its commands says which that is."""

from __future__ import annotations

import subprocess

import pytest

from passt import __version__

from .support import DEADLINE, TREE, Runner


@pytest.mark.parametrize("module", ["passt", "passt.vm", "passt.pesto"])
def test_version_says_which_build_it_is(pasta: Runner, module: str) -> None:
    command = pasta.user.command([pasta.user.python, "-m", module, "--version"])
    done = subprocess.run(
        command, cwd="/", env=pasta.user.env, capture_output=True, text=True, timeout=DEADLINE, check=True
    )
    first, second = done.stdout.splitlines()
    assert first.endswith(f" {__version__}")
    assert second.startswith("Compiled from Python." if TREE else "In pure Python.")
