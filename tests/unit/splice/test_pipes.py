"""The pool of pipes."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator

import pytest

from passt.splice import pipes
from passt.splice.pipes import IDLE_MAX, PIPE_SIZE, PipePool


@pytest.fixture
def pool() -> Iterator[PipePool]:
    before = len(os.listdir("/proc/self/fd"))
    pool = PipePool()
    yield pool
    pool.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_pipe_is_large_and_never_blocks(pool: PipePool) -> None:
    reader, writer = pipe = pool.take()
    assert fcntl.fcntl(writer, fcntl.F_GETPIPE_SZ) == PIPE_SIZE
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    assert not os.get_inheritable(reader)
    assert not os.get_inheritable(writer)
    pool.give_back(pipe, 0)


def test_an_empty_pipe_is_used_again(pool: PipePool) -> None:
    pipe = pool.take()
    pool.give_back(pipe, 0)
    assert pool.take() == pipe
    pool.give_back(pipe, 0)


def test_a_pipe_with_bytes_in_it_is_not(pool: PipePool) -> None:
    pipe = pool.take()
    os.write(pipe[1], b"of another one")
    pool.give_back(pipe, 16)
    for fd in pipe:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_few_are_kept(pool: PipePool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    taken = [pool.take() for _ in range(IDLE_MAX + 5)]
    for pipe in taken:
        pool.give_back(pipe, 0)
    assert len(os.listdir("/proc/self/fd")) == before + 2 * IDLE_MAX


def test_a_user_without_leave_for_large_pipes_gets_small_ones(pool: PipePool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> int:
        raise PermissionError("the user's pages are used up")

    monkeypatch.setattr(pipes.fcntl, "fcntl", refuse)
    reader, writer = pool.take()
    os.write(writer, b"works")
    assert os.read(reader, 5) == b"works"
    pool.give_back((reader, writer), 0)
