"""Each system call of a start fails once (`stage.py`): the message says which step that was, and which file."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .support import REPOSITORY, environment

TIMEOUT = 600  # seconds for some 200 starts
EIO = "Input/output error"


@pytest.mark.parametrize(
    "line",
    [
        "pasta -q --config-net -P {}/pid -l {}/log -p {}/pcap -c {}/control -t auto -T auto -- true",
        "passt -f -s {}/socket -P {}/pid -c {}/control",
        "passt -s {}/socket -P {}/pid",
    ],
)
def test_every_error_has_its_step(line: str) -> None:
    command = [sys.executable, "-m", "tests.system.stage", *line.split()]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=TIMEOUT, check=True
    )
    starts = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(starts) > 50
    assert starts[-1][:3] == [[], "", 0], "the last start has no error"
    errors = 0
    for functions, path, status, text in starts:
        what = f"{functions} {path}: {text}"
        assert "Traceback" not in text and "escaped" not in text, what
        assert status in (0, 1), what
        if status == 0:
            continue  # the start can do without it
        errors += 1
        message = next((row for row in text.splitlines() if EIO in row), text.splitlines()[-1])
        assert message.startswith(("Couldn't ", "Failed to ", "Invalid ", "PID file ")), what
        assert not message.startswith("Couldn't start:"), what
        assert path in text, what
    assert errors > 25
