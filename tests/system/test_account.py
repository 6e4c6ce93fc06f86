"""The account of the tests themselves goes with them, by whatever way they end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .account import account
from .support import REPOSITORY, wait_for

NAME = f"pastatest{os.getpid()}"
HOLDER = """
import sys
from tests.system.account import account
with account(sys.argv[1]) as entry:
    open(f"{entry.pw_dir}/file", "w").close()
    print(flush=True)
    sys.stdin.read()
"""


def exists() -> bool:
    """Whether anything of the account is there."""
    names = {entry.pw_name for entry in pwd.getpwall()}
    return NAME in names or Path("/home", NAME).exists() or NAME in Path("/etc/subuid").read_text()


@pytest.fixture(autouse=True)
def as_root(root: object) -> Iterator[None]:
    """The account goes with its test, also if the test is killed."""
    delete = f"userdel --remove {NAME}; test $? = 1 -o $? = 10 || break"  # locked: it has waited itself
    guard = ["sh", "-c", f"cat >/dev/null; for _ in 1 2 3 4 5; do {delete}; done"]
    with subprocess.Popen(guard, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True):
        yield
    assert not exists()


def other_run() -> subprocess.Popen[bytes]:
    """Another run of tests, which has the account."""
    command = [sys.executable, "-c", HOLDER, NAME]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"\n"
    return process


def test_account_goes_with_its_user() -> None:
    for _ in range(2):
        with account(NAME) as entry:
            assert exists()
            Path(entry.pw_dir, "file").touch()
        wait_for(lambda: not exists(), "the run or its guard removes it")


def test_account_stays_for_another_run() -> None:
    other = other_run()
    with account(NAME) as entry:
        assert Path(entry.pw_dir, "file").exists()
    assert exists()
    other.communicate()
    wait_for(lambda: not exists(), "the last run removes it")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_account_goes_with_a_run_that_is_ended(number: signal.Signals) -> None:
    other = other_run()
    other.send_signal(number)
    other.communicate()
    wait_for(lambda: not exists(), "the guard removes it")


def test_account_that_was_there_before_stays() -> None:
    subprocess.run(["useradd", "--create-home", "--comment", "a person", NAME], check=True)
    with account(NAME):
        pass
    assert exists()


def test_a_home_left_behind_is_used_and_goes() -> None:
    left = Path("/home", NAME)
    left.mkdir(0o700)
    try:
        with account(NAME) as entry:
            assert left.stat().st_uid == entry.pw_uid != os.getuid()
        wait_for(lambda: not exists(), "the run removes it")
    finally:
        if left.exists():
            shutil.rmtree(left)
