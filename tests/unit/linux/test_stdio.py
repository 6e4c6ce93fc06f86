"""Standard streams that are closed, full, or have no reader, for each program that writes there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest

from passt.linux import stdio
from passt.log import Fatal

from ...system.support import environment

PROGRAMS = {
    "pasta": "passt.__main__",
    "passt": "passt.vm",
    "pesto": "passt.pesto.__main__",
    "qrap": "passt.qrap",
}
OUTPUTS = [
    ("pasta", "--help"), ("pasta", "--version"), ("pasta", "--completion=bash"), ("pasta", "--print-seccomp"),
    ("passt", "--help"), ("passt", "--version"), ("passt", "--print-seccomp"), ("passt", "--print-capabilities"),
    ("pesto", "--help"), ("pesto", "--version"),
    ("qrap", "--help"),
]  # fmt: skip


def start(program: str, *words: str, prepare: Callable[[], object]) -> tuple[int, str]:
    """Exit status and standard error."""
    code = f"import sys; from passt.launch import main; sys.argv[0] = {program!r}; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=environment(), preexec_fn=prepare, stderr=subprocess.PIPE, text=True, check=False, timeout=60,
    )  # fmt: skip
    return done.returncode, done.stderr


def full() -> None:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)


def closed() -> None:
    os.close(1)


def without_reader() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@pytest.mark.parametrize(("program", "option"), OUTPUTS)
def test_output_that_is_lost_is_an_error(program: str, option: str) -> None:
    prefix = "qrap: " if program == "qrap" else ""
    said = f"{prefix}Couldn't write to standard output: "
    assert start(program, option, prepare=full) == (1, f"{said}No space left on device\n")
    assert start(program, option, prepare=closed) == (1, f"{said}Bad file descriptor\n")
    assert start(program, option, prepare=without_reader) == (1, "")


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("fds", [(0,), (0, 1), (0, 1, 2), (2,)])
def test_errors_with_closed_streams(program: str, fds: tuple[int, ...]) -> None:
    def close() -> None:
        for fd in fds:
            os.close(fd)

    # qrap would hand an option that it does not know to QEMU, if a passt of another user or test runs on this machine
    words = ("1", "qemu") if program == "qrap" else ("--no-such-option",)
    status, text = start(program, *words, prepare=close)
    assert status == 1
    assert text.count("\n") == (0 if 2 in fds else 1), text
    assert "Traceback" not in text


def test_closed_streams_are_filled() -> None:
    code = (
        "import os; from passt.linux import stdio\n"
        "os.close(0); os.close(2); stdio.fill()\n"
        "print([os.readlink(f'/proc/self/fd/{fd}') for fd in (0, 2)], [os.get_inheritable(fd) for fd in (0, 2)])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "['/dev/null', '/dev/null'] [True, True]\n"


def test_missing_null_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "devnull", "/no/such/null")
    stdio.fill()  # not needed: all are open
    with pytest.raises(Fatal, match=r"Couldn't open /no/such/null: No such file or directory \(create it as root: mkn"):
        stdio.null()


def test_text_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="ours"), stdio.text_out():
        raise ValueError("ours")
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(Fatal, match="Couldn't write to standard output: Bad file descriptor"), stdio.text_out():
        pass


PRINTS = "from passt.linux import stdio\nwith stdio.text_out():\n    print('x' * 100000)"


@pytest.mark.parametrize(("prepare", "why"), [(full, "Fatal: .*No space left"), (without_reader, "ReaderGone")])
def test_printed_text_that_is_lost(prepare: Callable[[], object], why: str) -> None:
    """Once: the interpreter does not report it again when it ends."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], env=environment(), preexec_fn=prepare, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert re.search(why, done.stderr.splitlines()[-1])
    assert "Exception ignored" not in done.stderr


def test_errors_have_no_other_place() -> None:
    code = "import os; from passt.linux import stdio; os.close(2); stdio.write_error('lost')"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
