"""Nothing that the interpreter does by itself ends the process in the sandbox (`absent_minded.py`)."""

from __future__ import annotations

import subprocess

import pytest

from passt import PASST, PASTA

from ..system.support import REPOSITORY, User


@pytest.mark.parametrize("options", [[], ["-X", "dev"], ["-W", "error"], ["-X", "tracemalloc", "-W", "always"]])
@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_what_is_forgotten_is_no_end(anyone: User, mode: str, options: list[str]) -> None:
    command = anyone.command([anyone.python, *options, "-m", "tests.security.absent_minded", mode])
    done = subprocess.run(
        command, env=anyone.env, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert "<socket " in done.stderr
    assert "could not be handled: ValueError('in a finalizer')" in done.stderr
    assert "could not be handled: OSError('in a thread')" in done.stderr
