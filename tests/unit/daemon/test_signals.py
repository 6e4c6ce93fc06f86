"""Signals that end the process: raised in a step that waits, held back for a short step."""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from passt import log
from passt.daemon import detach, signals
from passt.daemon.signals import ENDING, Ended, held, raising


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.signal(number, signal.SIG_DFL) for number in ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def in_a_moment(number: int) -> None:
    main = threading.main_thread().ident
    assert main is not None
    threading.Timer(0.05, signal.pthread_kill, (main, number)).start()


def wait_for_ever() -> None:
    reader, writer = os.pipe()
    try:
        os.read(reader, 1)
    finally:
        os.close(reader)
        os.close(writer)


def read_a_socket() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.recv(1)


WAITS = [wait_for_ever, read_a_socket, lambda: time.sleep(60), lambda: threading.Event().wait(60)]


@pytest.mark.parametrize("number", ENDING)
@pytest.mark.parametrize("wait", WAITS)
def test_a_step_that_waits_is_left(wait: Callable[[], object], number: signal.Signals) -> None:
    began = time.monotonic()
    in_a_moment(number)
    with pytest.raises(Ended) as e, raising():
        wait()
    assert e.value.number == number
    assert time.monotonic() - began < 1
    assert signal.getsignal(number) == signal.SIG_IGN, "the undoing must not be interrupted"


def test_ignored_signals_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with raising():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_handlers_of_the_block_stay() -> None:
    def handler(*_: object) -> None:
        pass

    with raising():
        signal.signal(signal.SIGTERM, handler)
    assert signal.getsignal(signal.SIGTERM) is handler
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_a_short_step_is_not_left_half_done() -> None:
    done = []

    def steps() -> None:
        with held():
            signal.raise_signal(signal.SIGTERM)  # in this thread, as a start has no other
            done.append("step")
        done.append("next step")

    with pytest.raises(Ended), raising():
        steps()
    assert done == ["step"]


def full_pipe() -> tuple[int, int]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return reader, writer


@pytest.fixture(autouse=True)
def no_end(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests know of no signal, and of no descriptor."""
    monkeypatch.setattr(log, "_ending", False)
    with select.epoll() as writable:
        monkeypatch.setattr(log, "_writable", writable)
        yield


def test_a_write_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = full_pipe()
    signal.signal(signal.SIGTERM, lambda *_: log.give_up())
    in_a_moment(signal.SIGTERM)
    with open(writer, "w") as stderr:
        monkeypatch.setattr(log, "_stderr", stderr)
        began = time.monotonic()
        log.err("nobody reads this")
        log.err("nor this")
        assert time.monotonic() - began < 1
        assert log._stderr is None
    os.close(reader)
    os.kill(os.getpid(), signal.SIGTERM)  # nothing is written: nothing happens


@pytest.mark.parametrize("full", [True, False])
def test_the_last_lines_wait_for_nobody(monkeypatch: pytest.MonkeyPatch, full: bool) -> None:
    """The signal came before them. A pipe with room takes them."""
    reader, writer = full_pipe() if full else os.pipe()
    log.give_up()
    with open(writer, "w") as stderr:
        monkeypatch.setattr(log, "_stderr", stderr)
        log.err("one of them")
        log.err("another one")
        assert log._stderr is (None if full else stderr)
    with open(reader, "rb") as read:
        assert read.read().endswith(bytes(4096) if full else b"one of them\nanother one\n")


def test_the_last_lines_go_to_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    log.give_up()
    with open(tmp_path / "log", "w") as stderr:
        monkeypatch.setattr(log, "_stderr", stderr)
        log.err("one of them")
    assert (tmp_path / "log").read_text() == "one of them\n"


def test_the_process_that_waits_for_its_daemon_ends_with_it() -> None:
    """And everything is undone; the status is that of the signal."""
    reader, writer = os.pipe()
    starter = os.fork()
    if starter == 0:
        try:
            detach.go_background(None, lambda: os.write(writer, b"undone"))
            os.write(writer, b"%d " % os.getpid())
            os.close(writer)
            time.sleep(60)  # it does not get ready
        finally:
            os._exit(0)
    os.close(writer)
    daemon = int(os.read(reader, 100))
    began = time.monotonic()
    time.sleep(0.1)
    os.kill(starter, signal.SIGTERM)
    _, status = os.waitpid(starter, 0)
    assert time.monotonic() - began < 1
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM
    with open(reader, "rb") as said:
        assert said.read() == b"undone"
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            if "\nState:\tZ" in Path(f"/proc/{daemon}/status").read_text():
                break
        except OSError:
            break
        time.sleep(0.01)
    else:
        pytest.fail("the daemon goes on")


def test_to_die_by_a_signal_that_is_blocked() -> None:
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        signals.die(signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
