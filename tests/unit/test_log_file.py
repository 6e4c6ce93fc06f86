"""The log file: it never grows beyond its limit, and what is newest is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt import log_file
from passt.log_file import LogFile

HEADER = "pasta 1.0: /usr/bin/python3 (42)"
LIMIT = 1000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def file(path: Path) -> Iterator[LogFile]:
    made = LogFile(str(path), HEADER, LIMIT)
    yield made
    made.close()


def lines_of(path: Path) -> list[str]:
    text = path.read_text()
    assert text.endswith("\n")
    return text.splitlines()


def number(i: int) -> bytes:
    return b"line %d\n" % i


def test_the_newest_stay(file: LogFile, path: Path) -> None:
    least = LIMIT
    for i in range(1000):
        file.write(number(i))
        size = path.stat().st_size
        assert size <= LIMIT
        first, *lines = lines_of(path)
        assert first == HEADER
        assert lines == [f"line {n}" for n in range(i + 1 - len(lines), i + 1)], "whole lines, without a hole"
        if i > 500:
            least = min(least, size)
    assert least >= LIMIT // 2


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300).map(lambda b: b.replace(b"\n", b"") + b"\n"), max_size=60))
def test_any_lines(tmp_path_factory: pytest.TempPathFactory, lines: list[bytes]) -> None:
    """After any writes, the file is the header and the last of the lines."""
    path = tmp_path_factory.mktemp("log") / "log"
    file = LogFile(str(path), HEADER, LIMIT)
    for line in lines:
        file.write(line)
        assert path.stat().st_size <= LIMIT
    file.close()
    data = path.read_bytes()
    header = f"{HEADER}\n".encode()
    assert data.startswith(header)
    assert b"".join(lines).endswith(data[len(header) :])
    assert not lines or len(data) > len(header)


def test_a_line_that_is_too_long_is_cut(file: LogFile, path: Path) -> None:
    file.write(b"before\n")
    file.write(b"x" * 5000 + b"\n")
    assert lines_of(path) == [HEADER, "x" * (LIMIT - len(HEADER) - 2)]
    file.write(b"after\n")
    assert lines_of(path) == [HEADER, "after"]


def test_lines_longer_than_what_is_read_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_file, "_CHUNK", 7)
    file = LogFile(str(path), HEADER, LIMIT)
    for i in range(100):
        file.write(b"%d" % i * 30 + b"\n")
    file.close()
    _, *lines = lines_of(path)
    assert lines == [str(i) * 30 for i in range(100 - len(lines), 100)]
    assert path.stat().st_size <= LIMIT


def test_another_program_truncates_the_file(file: LogFile, path: Path) -> None:
    """As logrotate(8) does with copytruncate: no hole, and all of the limit is there again."""
    for i in range(50):
        file.write(number(i))
    os.truncate(path, 0)
    for i in range(50, 1000):
        file.write(number(i))
        assert path.stat().st_size <= LIMIT
    lines = lines_of(path)
    assert lines == [f"line {n}" for n in range(1000 - len(lines), 1000)]
    assert len(lines) > 40


def test_a_long_line_into_a_file_that_was_emptied(file: LogFile, path: Path) -> None:
    os.truncate(path, 0)
    file.write(b"x" * 2 * LIMIT + b"\n")
    assert path.read_bytes() == b"x" * (LIMIT - 1) + b"\n"


def test_two_write_to_one_file(path: Path, file: LogFile) -> None:
    """Lines are appended, also behind those of others, which count."""
    with path.open("ab", buffering=0) as other:
        for i in range(300):
            file.write(number(i))
            other.write(b"other\n")
        assert path.stat().st_size <= LIMIT + 6
    assert lines_of(path)[-2:] == ["line 299", "other"]


def test_what_was_there_is_gone(path: Path) -> None:
    path.write_text("of the run before\n" * 1000)
    LogFile(str(path), HEADER, LIMIT).close()
    assert lines_of(path) == [HEADER]
    assert path.stat().st_mode & 0o777 == 0o644, "a file keeps the mode that it has"


def test_a_pipe_is_written_to_and_not_waited_for(path: Path) -> None:
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        file = LogFile(str(path), HEADER, LIMIT)
        assert os.read(reader, 4096) == f"{HEADER}\n".encode()
        for i in range(200):
            file.write(number(i))
        assert os.read(reader, 4096).startswith(b"line 0\nline 1\n"), "more than the limit, and nothing is cut"

        def fill() -> None:
            for _ in range(10_000):
                file.write(b"x" * 99 + b"\n")

        with pytest.raises(BlockingIOError):
            fill()
        file.close()
    finally:
        os.close(reader)


def test_no_file(tmp_path: Path) -> None:
    LogFile("/dev/null", HEADER, LIMIT).close()
    with pytest.raises(FileNotFoundError):
        LogFile(str(tmp_path / "no" / "log"), HEADER, LIMIT)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="No space left"):
        LogFile("/dev/full", HEADER, LIMIT)
    assert len(os.listdir("/proc/self/fd")) == before
