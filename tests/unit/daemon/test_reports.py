"""Periodic log output: its times, and the intervals that it covers."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from passt import NEVER, log
from passt.conf.options import Options
from passt.daemon.reports import Reports
from passt.flow.context import Context

from ..support import make_context, reactor, timers

STATS = 0  # the first timer that is made


@pytest.fixture
def ctx() -> Iterator[Context]:
    ctx = make_context()
    r: Any = reactor(ctx)
    r.wakeups = r.events = 0
    yield ctx
    ctx.stats.close()
    log.on_held = None


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "report", lines.extend)
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_flush_at", NEVER)
    return lines


def heads(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("Statistics")]


def test_every_so_often(ctx: Context, said: list[str]) -> None:
    reports = Reports(ctx, Options(stats=5.0))
    start = ctx.stats.started
    services = timers(ctx).services
    assert services.deadlines == [None, None], "the process that stays begins"
    reports.begin(start)
    assert services.deadlines[STATS] == start + 5
    services.fire(STATS)
    services.fire(STATS)
    assert services.deadlines[STATS] == start + 15
    services.fire(STATS, start + 27.0)
    assert services.deadlines[STATS] == start + 32, "what was missed is not made up for"
    assert heads(said) == [
        "Statistics of the last 5.0 s, 5.0 s after the start",
        "Statistics of the last 5.0 s, 10.0 s after the start",
        "Statistics of the last 17.0 s, 27.0 s after the start",
    ]


def test_on_a_signal(ctx: Context, said: list[str]) -> None:
    """Without --stats there is no timer."""
    reports = Reports(ctx, Options())
    start = ctx.stats.started
    reports.begin(start)
    assert timers(ctx).services.deadlines == [None]
    for after in (3.0, 7.0):
        reactor(ctx).signals[signal.SIGUSR1](start + after)
    assert heads(said) == [
        "Statistics of the last 3.0 s, 3.0 s after the start",
        "Statistics of the last 4.0 s, 7.0 s after the start",
    ]
    reports.end()
    assert len(heads(said)) == 2


def test_a_signal_that_is_ignored_stays_so(ctx: Context) -> None:
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        Reports(ctx, Options())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.SIGUSR1 not in reactor(ctx).signals


def test_json(ctx: Context, said: list[str]) -> None:
    reports = Reports(ctx, Options(stats=1.0, stats_json=True))
    reports.begin(ctx.stats.started)
    timers(ctx).services.fire(STATS)
    reactor(ctx).signals[signal.SIGUSR1](ctx.stats.started + 1.5)
    assert [json.loads(line)["uptime"] for line in said] == [1.0, 1.5]


def test_the_end(ctx: Context, said: list[str]) -> None:
    """The end logs statistics since the last table, and counts of messages held back."""
    reports = Reports(ctx, Options(stats=60.0))
    reports.begin(ctx.stats.started)
    for _ in range(2):
        log.warn_ratelimited("port", "port is busy", 1.0)
    reports.end()
    assert len(heads(said)) == 1
    assert said[0] == "port is busy" and said[-1] == "port is busy (1 similar message held back)"
    assert log.on_held is None


def test_messages_held_back(ctx: Context, said: list[str]) -> None:
    Reports(ctx, Options()).begin(0.0)
    services = timers(ctx).services
    for now in (1.0, 2.0, 3.0):
        log.warn_ratelimited("port", "port is busy", now)
    assert services.deadlines == [11.0]
    services.fire(0)
    assert said == ["port is busy", "port is busy (2 similar messages held back)"]
    assert services.deadlines == [None], "nothing to wait for"
