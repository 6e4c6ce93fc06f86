"""Attempts to leave the sandbox, by a process in it (`prisoner.py`): each ends the process, or has the result here.

The kernel kills the process (SIGSYS) for a call that the filter does not allow. A call that is allowed for some
arguments can return an error, since the filter cannot read memory behind a pointer. One attempt succeeds, as it should.
"""

from __future__ import annotations

import json
import signal
import subprocess

import pytest

from passt import PASST, PASTA

from ..system.support import REPOSITORY, TREE, User
from .prisoner import ATTEMPTS

ALLOWED = {
    "openat to read in a directory that is kept": "done",
    "openat absolute beside a directory that is kept": "error ENOENT",  # the root is empty
    "openat up from a directory that is kept, and down again": "error ENOENT",  # `..` of the directory is itself
    "openat up from a directory that is kept": "error ENOENT",
    "openat through a link into /proc": "error ENOENT",
}

Outcome = tuple[int, str]  # exit status or minus the signal; what the prisoner said


def outcomes(user: User, *mode: str) -> dict[str, Outcome]:
    """The result of each attempt."""
    command = user.command([user.python, "-m", "tests.security.prisoner", *mode])
    done = subprocess.run(
        command, cwd=REPOSITORY, env=user.env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return {name: (status, said) for name, status, said in map(json.loads, done.stdout.splitlines())}


USERS = ("user",) if TREE else ("user", "root")  # root is tried with one build
PRISONERS = [(who, mode) for who in USERS for mode in (PASTA, PASST)] + [("user", PASST, "--vhost-user")]


@pytest.fixture(scope="module", params=PRISONERS, ids=" ".join)
def outcome(request: pytest.FixtureRequest) -> dict[str, Outcome]:
    who, *mode = request.param
    return outcomes(request.getfixturevalue("ordinary_user" if who == "user" else "root"), *mode)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_no_way_out(outcome: dict[str, Outcome], attempt: str) -> None:
    expected = (0, f"ready {ALLOWED[attempt]}") if attempt in ALLOWED else (-signal.SIGSYS, "ready ")
    assert outcome[attempt] == expected
