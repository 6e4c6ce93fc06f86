"""The end of all tests: in good order by any signal, so that nothing stays behind."""

from __future__ import annotations

import os
import signal
import threading


def pytest_configure() -> None:
    """SIGTERM and SIGHUP end the tests as SIGINT does, with the ends of all fixtures. A forked child dies of them."""
    if threading.current_thread() is not threading.main_thread():
        return
    tests = os.getpid()

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN if os.getpid() == tests else signal.SIG_DFL)
        if os.getpid() != tests:
            os.kill(os.getpid(), number)
            return
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
        if signal.getsignal(number) == signal.SIG_IGN:  # by nohup(1); programs that the tests start do not inherit that
            signal.signal(number, lambda *_: None)
