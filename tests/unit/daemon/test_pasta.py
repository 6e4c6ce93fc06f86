"""The tap is deleted: it comes back under its number, or the program ends."""

from __future__ import annotations

import errno
import os
from collections import Counter
from typing import Any, cast

import pytest

from passt import log
from passt.daemon import pasta as daemon_pasta
from passt.flow.context import Context
from passt.link.tap_device import TapLink
from passt.linux.routes import NsPlan
from passt.loop.reactor import EPOLLIN

from ..support import reactor
from .test_common import FakeTap, attached
from .test_common import default_signals as default_signals


class FakeInterface:
    """The interface in the namespace, which comes back or does not."""

    def __init__(self, error: OSError | None = None) -> None:
        self.plan = NsPlan("tap5")
        self.problems = ["not all"]
        self._error = error

    def recreate(self) -> None:
        if self._error is not None:
            raise self._error


def test_tap_comes_back_under_its_number(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, other = os.pipe()
    reactor(ctx).watch(fd, 1, 0, EPOLLIN)
    said: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "say", lambda level, text: said.append(text))
    link, tap = TapLink(fd, Counter(), uso=True), FakeTap()
    daemon_pasta.reopen(ctx, link, cast(Any, tap), cast(Any, FakeInterface()), attached(ctx))
    assert (tap.watched, reactor(ctx).refs, link.fd) == ([fd], {}, fd)
    assert said == ["Interface tap5 was deleted: creating it again", "not all"]
    os.close(fd)
    os.close(other)


def test_tap_that_cannot_come_back_ends_us(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "say", lambda level, text: None)
    monkeypatch.setattr(log, "err", said.append)
    end = attached(ctx)
    fd, other = os.pipe()
    reactor(ctx).watch(fd, 1, 0, EPOLLIN)
    tap, gone = FakeTap(), FakeInterface(PermissionError(errno.EPERM, "not allowed"))
    daemon_pasta.reopen(ctx, TapLink(fd, Counter(), uso=True), cast(Any, tap), cast(Any, gone), end)
    assert (end.status, reactor(ctx).stopped, tap.watched) == (1, True, [])
    assert said == ["Interface tap5 was deleted and can't be created again, exiting: not allowed"]
    os.close(fd)
    os.close(other)


def test_tap_that_was_given_to_us_ends_with_us(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    end = attached(ctx)
    daemon_pasta.tap_gone(cast(Any, FakeInterface()), end)
    assert (end.status, reactor(ctx).stopped, said) == (0, True, ["Interface tap5 was deleted, exiting"])
