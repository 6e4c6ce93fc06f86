"""From a process that is ready to serve to a daemon: what is told to those that wait, and what if it fails."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from io import FileIO
from pathlib import Path

import pytest

from passt import log
from passt.daemon import common, detach
from passt.log import Fatal


def in_child(body: Callable[[], None]) -> tuple[int, bytes]:
    """body() in a forked process: exit code, and all that it and its children write before they close it."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.close(reader)
            os.dup2(writer, 1)
            os.dup2(writer, 2)
            os.close(writer)
            body()
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as f:
        text = f.read()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), text


def test_background(tmp_path: Path) -> None:
    report = tmp_path / "report"

    def body() -> None:
        outer = os.getpid()
        pid_file = FileIO(tmp_path / "pid", "w")
        parent = detach.go_background(pid_file, lambda: os.write(1, b"undone"))
        facts = [os.getpid() != outer, os.getsid(0) == os.getpid(), pid_file.closed]
        parent.release(os.open(os.devnull, os.O_RDWR))
        facts += [os.readlink(f"/proc/self/fd/{fd}") == "/dev/null" for fd in range(3)]
        os.write(1, b"nobody reads this")
        facts.append((tmp_path / "pid").read_text() == "")
        (tmp_path / "new").write_text(f"{os.getpid()} {all(facts)}")
        (tmp_path / "new").rename(report)
        parent.ready()

    status, text = in_child(body)  # at the end of file no process has our standard output any more
    assert (status, text) == (0, b"")
    pid, ok = report.read_text().split()
    assert ok == "True"
    assert (tmp_path / "pid").read_text() == f"{pid}\n"


@pytest.fixture
def plain_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors go to descriptor 2, whatever the test runner made of sys.stderr."""
    monkeypatch.setattr(log, "err", lambda text: os.write(2, text.encode()))


@pytest.mark.usefixtures("plain_errors")
def test_pid_file_of_the_daemon_that_cannot_be_written() -> None:
    def body() -> None:
        parent = detach.go_background(FileIO("/dev/full", "w"), lambda: os.write(2, b"; undone"))
        parent.release(os.open(os.devnull, os.O_RDWR))
        parent.ready()
        signal.pause()  # until it is killed

    assert in_child(body) == (1, b"PID file write: No space left on device (/dev/full); undone")


def test_who_started_it_is_gone() -> None:
    """Killed while it waited: it would never stop what it does not know of."""

    def body() -> None:
        parent = detach.go_background(None, lambda: None)
        os.kill(os.getppid(), signal.SIGKILL)
        pipe = select.poll()
        pipe.register(parent._pipe, 0)  # POLLERR needs no request: there is no reader
        pipe.poll()
        with pytest.raises(Fatal, match="has not waited"):
            parent.ready()
        os.write(2, b"ends")

    assert in_child(body) == (-signal.SIGKILL, b"ends")


def test_daemon_that_fails_says_so_itself() -> None:
    def body() -> None:
        detach.go_background(None, lambda: os.write(2, b"undone"))
        os.write(2, b"why\n")
        os._exit(1)

    assert in_child(body) == (1, b"why\nundone")


@pytest.mark.usefixtures("plain_errors")
@pytest.mark.parametrize(("number", "said"), [(0, b"status 2"), (signal.SIGKILL, b"signal 9")])
def test_daemon_that_could_not_say_why(number: int, said: bytes) -> None:
    """Killed, as by its own filter, or without its pipe."""

    def body() -> None:
        detach.go_background(None, lambda: None)
        os.kill(os.getpid(), number)
        os._exit(detach.UNREPORTED)

    text = b"Couldn't start the daemon: it ended before it was ready (" + said + b")"
    assert in_child(body) == (1, text)


@pytest.mark.usefixtures("plain_errors")
def test_failed_daemon_after_release_is_reported_by_its_parent() -> None:
    def body() -> None:
        parent = detach.go_background(None, lambda: None)
        parent.release(os.open(os.devnull, os.O_RDWR))
        parent.failed("why")
        os._exit(3)

    assert in_child(body) == (1, b"why")


def test_foreground(tmp_path: Path) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    starter = detach.Starter(FileIO(tmp_path / "pid", "w"))
    starter.release(null)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(null)
    assert (tmp_path / "pid").read_text() == ""
    starter.ready()
    assert (tmp_path / "pid").read_text() == f"{os.getpid()}\n"


# The PID file ---------------------------------------------------------------------------------------------------------


def test_pid_file_that_cannot_be_written() -> None:
    with pytest.raises(Fatal, match="PID file write: No space left on device"):
        detach.write_pid(FileIO("/dev/full", "w"), 1234)


def test_a_pid_that_no_program_reads() -> None:
    """The pipe is full: the start fails, and does not wait for a reader."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    for size in (65536, 1):
        try:
            while True:
                os.write(writer, bytes(size))
        except BlockingIOError:
            pass
    file = common.create("PID", f"/proc/self/fd/{writer}")
    with pytest.raises(Fatal, match="PID file write: nothing reads it"):
        detach.write_pid(file, 1234)
    os.close(reader)
    os.close(writer)
