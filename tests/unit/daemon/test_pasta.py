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

from ..support import FakeReceiver, reactor
from .test_common import attached
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


def started(ctx: Context, fd: int) -> TapLink:
    """The back end of a tap device, as the one of `ctx`."""
    ctx.link = link = TapLink(fd, Counter(), uso=True)
    link.start(ctx.reactor, ctx.pool, FakeReceiver(ctx.pool.mv))
    return link


def test_tap_comes_back_under_its_number(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    fd, other = os.pipe()
    said: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "say", lambda level, text: said.append(text))
    link = started(ctx, fd)
    refs = dict(reactor(ctx).refs)
    monkeypatch.setattr(FakeInterface, "recreate", lambda _: reactor(ctx).refs == {} or pytest.fail("it is watched"))
    daemon_pasta.reopen(ctx, cast(Any, FakeInterface()), attached(ctx), "The tap device failed")
    assert (reactor(ctx).refs, link.fd) == (refs, fd)
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
    started(ctx, fd)
    gone = FakeInterface(PermissionError(errno.EPERM, "not allowed"))
    daemon_pasta.reopen(ctx, cast(Any, gone), end, "The tap device failed")
    assert (end.status, reactor(ctx).stopped, reactor(ctx).refs) == (1, True, {})
    assert said == ["Interface tap5 was deleted and can't be created again, exiting: not allowed"]
    os.close(fd)
    os.close(other)


def test_tap_that_was_given_to_us_ends_with_us(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    end = attached(ctx)
    daemon_pasta.tap_gone(ctx, cast(Any, FakeInterface()), end, "The tap device failed")
    assert (end.status, reactor(ctx).stopped, said) == (0, True, ["Interface tap5 was deleted, exiting"])


def test_tap_that_we_may_not_create_again_ends_us(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "err", said.append)
    end = attached(ctx)
    fd, other = os.pipe()
    started(ctx, fd)
    daemon_pasta.tap_lost(ctx, cast(Any, FakeInterface()), end, "The tap device failed")
    assert (end.status, reactor(ctx).stopped, reactor(ctx).refs) == (1, True, {})
    assert said == [
        "Interface tap5 was deleted and can't be created again, exiting: "
        "pasta that root starts for a namespace keeps no right to do so"
    ]
    os.close(fd)
    os.close(other)
