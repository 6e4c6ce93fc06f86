"""Handlers need nothing that the sandbox takes away: see `inmates.py`."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

import pytest

from passt import PASST, PASTA

from ..system.support import REPOSITORY, User


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_handlers_error_paths_and_log_lines(anyone: User, mode: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, anyone.uid, anyone.gid)
        log = Path(directory) / "log"
        command = anyone.command([anyone.python, "-m", "tests.security.inmates", mode, str(log)])
        done = subprocess.run(
            command, cwd=REPOSITORY, env=anyone.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert int(done.stdout) > 500
        text = log.read_text()
    assert text.count("\n") > 1000
    for line in ("(TCP connection): ", "(UDP flow): ", "opened", "closed: "):
        assert line in text
