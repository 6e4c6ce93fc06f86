"""The end of all tests, in good order by any signal, so that nothing stays behind; and what runs side by side."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest


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


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Ten thousand tests and what they import live until the end: the cycle collector need not visit them while they
    are made, nor each time that it runs later.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """The tests of a module run one after the other, and share its fixtures, also those with an IPv6 address as a
    parameter: the `::` of one is no end of the module's name.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Modules(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return module_of(nodeid)

    return Modules(config, log) if config.getoption("dist") == "loadscope" else None


def module_of(nodeid: str) -> str:
    """The module of a test, or the class in it."""
    return nodeid.partition("[")[0].rpartition("::")[0]
