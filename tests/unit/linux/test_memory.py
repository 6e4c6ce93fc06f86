"""Buffers whose pages come when they are used."""

from __future__ import annotations

import errno
import mmap
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from passt.linux import memory
from passt.linux.memory import zeros

RESIDENT = """
from passt.linux.memory import zeros
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * PAGE
before = resident()
made = zeros(1 << 24)
after = resident()
made[:] = bytes(1 << 24)
print(after - before, resident() - before)
"""
PAGE = mmap.PAGESIZE
SIZES = (0, 1, PAGE, 2 * PAGE - 1, 2 * PAGE, 2 * PAGE + 1, 65536, 70000, 1 << 18, (1 << 20) + 65000)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("refused", [False, True])
def test_it_is_a_bytearray_of_zeros(monkeypatch: pytest.MonkeyPatch, size: int, refused: bool) -> None:
    if refused:
        monkeypatch.setattr(memory, "_madvise", lambda *_: -1)
    for _ in range(4):
        used = [bytearray(b"x" * (size + 40)) for _ in range(8)]  # memory that the next one may get
        del used
        made = zeros(size)
        assert type(made) is bytearray
        assert made == bytes(size)
        made[:] = b"y" * size
        made += b"z"  # no view is left
        assert made == b"y" * size + b"z"


def test_pages_come_with_what_is_written() -> None:
    script = RESIDENT.replace("PAGE", str(resource.getpagesize()))
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True)
    unused, used = map(int, done.stdout.split())
    assert unused < 1 << 20
    assert used >= 1 << 24


HUGE = """
from passt.linux.memory import no_huge_pages
def enabled(status):
    return [line.split()[1] for line in status.splitlines() if line.startswith("THP_enabled")]
before = enabled(open("/proc/self/status").read())
no_huge_pages()
print(before, enabled(open("/proc/self/status").read()))
"""


def test_no_huge_pages() -> None:
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", HUGE], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "['1'] ['0']\n"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EPERM])
def test_a_refusal_is_said_to_those_who_debug(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    said: list[str] = []

    def prctl(option: int, value: int) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(memory, "prctl", prctl)
    monkeypatch.setattr(memory.log, "debug", said.append)
    memory.no_huge_pages()
    assert said == [f"Couldn't do without transparent huge pages: {os.strerror(code)}"]
