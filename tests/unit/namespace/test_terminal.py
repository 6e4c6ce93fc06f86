"""Foreground of a terminal, on a pseudo-terminal of the test."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

from passt.namespace.terminal import Terminal


def on_terminal(body: Callable[[], int]) -> int:
    """body() as the leader of a session on a new terminal; its exit code."""
    pid, fd = os.forkpty()
    if pid == 0:
        status = 99
        try:
            status = body()
        finally:
            os._exit(status)
    _, status = os.waitpid(pid, 0)
    os.close(fd)
    return os.waitstatus_to_exitcode(status)


def other_group(*, take: bool) -> int:
    """A child in a process group of its own, which takes the terminal or leaves it; it has ended when we return."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        signal.signal(signal.SIGTTOU, signal.SIG_IGN)
        if take:
            os.tcsetpgrp(0, os.getpgrp())
        os._exit(0)
    os.waitpid(pid, 0)
    return pid


def test_without_a_terminal() -> None:
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setsid()
            terminal = Terminal()
            terminal.restore()
            status = int(terminal.is_ours())
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_terminal_is_taken_back_from_a_group_that_is_gone() -> None:
    def body() -> int:
        terminal = Terminal()
        if not terminal.is_ours():
            return 1
        other_group(take=True)
        if terminal.is_ours():
            return 2
        terminal.restore()
        return 0 if terminal.is_ours() else 3

    assert on_terminal(body) == 0


def test_terminal_is_left_to_a_group_that_lives() -> None:
    def body() -> int:
        terminal = Terminal()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(writer)
            os.setpgid(0, 0)
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            os.tcsetpgrp(0, os.getpgrp())
            os.kill(os.getppid(), signal.SIGCONT)
            os.read(reader, 1)
            os._exit(0)
        while terminal.is_ours():
            os.sched_yield()
        terminal.restore()
        kept = os.tcgetpgrp(0) == pid
        os.close(writer)
        os.waitpid(pid, 0)
        return 0 if kept else 1

    assert on_terminal(body) == 0


def test_terminal_that_was_not_ours_is_not_taken() -> None:
    def body() -> int:
        gone = other_group(take=True)
        terminal = Terminal()
        terminal.restore()
        return 0 if os.tcgetpgrp(0) == gone else 1

    assert on_terminal(body) == 0
