"""scripts/steps, by which scripts/test ends: at once, and without a trace."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from .conftest import module_of

ROOT = Path(__file__).parent.parent
SCRIPT = """
. scripts/steps
leave_nothing
mktemp -d
begin beside sleep 1000
echo $BASHPID
in_front python3 -c '
import signal, sys, time
try:
    print(signal.getsignal(signal.SIGINT) == signal.default_int_handler, flush=True)
    time.sleep(1000)
except KeyboardInterrupt:
    print("interrupted", flush=True)
'
"""


def start() -> tuple[subprocess.Popen[str], Path]:
    """A script with a step in front and one beside, and its temporary directory."""
    command = ["bash", "-c", SCRIPT]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    directory = Path(process.stdout.readline().strip())
    process.stdout.readline()
    assert process.stdout.readline() == "True\n", "a step does not ignore what a terminal sends"
    assert directory.is_dir()
    return process, directory


def running(group: int) -> list[str]:
    """The processes of a process group, but for those that have ended and were not waited for."""
    argv = ["ps", "-e", "-o", "pgid=,stat=,args="]
    lines = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if line.split()[0] == str(group) and not line.split()[1].startswith("Z")]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_interrupted_script_ends_with_all_steps(number: signal.Signals) -> None:
    """SIGINT comes from a terminal, to all of them; the others to the script alone."""
    process, directory = start()
    begin = time.monotonic()
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 1
    assert said == ("interrupted\n" if number == signal.SIGINT else "")
    assert time.monotonic() - begin < 30
    assert not directory.parent.exists()
    while running(process.pid):  # signals have been sent to all of them
        assert time.monotonic() - begin < 60
        time.sleep(0.05)


def test_step_ends_with_a_script_that_is_killed() -> None:
    process, directory = start()
    process.kill()
    said, _ = process.communicate(timeout=30)  # reads until the step has ended, too
    assert said == ""
    os.killpg(process.pid, signal.SIGTERM)  # the step beside, which writes to a file
    directory.rmdir()
    directory.parent.rmdir()


def test_programs_keep_their_files_in_what_goes() -> None:
    """scapy makes a folder in the user's cache when it is imported, matplotlib another. Images stay where they were."""
    with tempfile.TemporaryDirectory() as home:
        code = "import matplotlib, scapy.data; from tests.system.vm.image import cache; print(cache())"
        script = f'. scripts/steps; leave_nothing; "$1" -c "{code}"; find "$made" -name scapy -o -name matplotlib'
        done = subprocess.run(
            ["bash", "-c", script, "bash", sys.executable], cwd=ROOT, env={"HOME": home, "PATH": os.environ["PATH"]},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        images, *made = done.stdout.splitlines()
        assert images == f"{home}/.cache/passt-tests" and len(made) > 1, done.stdout
        assert [str(path.relative_to(home)) for path in Path(home).rglob("*")] == [".cache", ".cache/passt-tests"]


def test_files_of_tests_that_were_killed_go() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone, kept = Path(f"/tmp/pasta-test-{ended.pid}.log"), Path(f"/tmp/passt-test-{os.getpid()}-1.pid")
    other = Path(f"/tmp/passt-test-{ended.pid}x")
    for path in (gone, kept, other):
        path.touch()
    try:
        subprocess.run(["bash", "-c", ". scripts/steps; leave_nothing"], cwd=ROOT, check=True)
        assert [path.exists() for path in (gone, kept, other)] == [False, True, True]
    finally:
        for path in (gone, kept, other):
            path.unlink(missing_ok=True)


def test_what_a_step_leaves_in_the_checkout_is_told(tmp_path: Path) -> None:
    """Also an empty folder, of which git status says nothing; not what was there before, nor what is ignored."""
    script = f". {ROOT}/scripts/steps; mkdir -p a/b cache; no_new_files; touch before; rmdir -p a/b; no_new_files"
    for line in ("git init --quiet", "echo cache >.gitignore", "touch before"):
        subprocess.run(line, shell=True, cwd=tmp_path, check=True)
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "left in the checkout by a step:\nWould remove a/\n")


@pytest.mark.parametrize("node", ["test_one", "test_one[a]", "test_one[2001:db8::1]", "test_one[::-a::1[]"])
def test_tests_of_a_module_stay_together(node: str) -> None:
    assert module_of(f"tests/a/test_b.py::{node}") == "tests/a/test_b.py"
    assert module_of(f"tests/a/test_b.py::TestC::{node}") == "tests/a/test_b.py::TestC"
