"""The live view: what is drawn, and that it needs no terminal."""

from __future__ import annotations

import os
import signal
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from passt.pesto import top as pesto_top
from passt.pesto.top import View, draw, flow_rates

from ...system.support import Pty
from .support import FLOW, Json, Server, call


def stats(uptime: float, **more: Any) -> Json:
    return {
        "mode": "pasta",
        "version": "1",
        "uptime": uptime,
        "memory": 50_000_000,
        "cpu": {"user": uptime / 10, "system": uptime / 10},
        "loop": {"wakeups": int(uptime * 100), "events": 0},
        "link": {way: {"bytes": int(uptime * 1000)} for way in ("from_guest", "to_guest")},
        "spliced": {"tcp": {"to_guest": int(uptime * 1000), "to_host": 0}},
        "flows": {"tcp": {"open": 2}, "udp_splice": {"open": 1}, "ping": {"open": 0}},
        "drops": {},
        **more,
    }


def test_a_screen() -> None:
    slow = {**FLOW, "index": 1, "guest": "[2001:db8::1234:5678:9abc:def0]:40000"}
    now = View(stats(12.0, drops={"old": 5, "new": 3}), [slow, {**FLOW, "bytes_to_guest": 3234}])
    earlier = View(stats(10.0, drops={"old": 5, "new": 1}), [slow, FLOW])
    lines = draw(now, earlier, 80, 24)
    assert max(map(len, lines)) <= 80
    assert lines[:2] == [
        "pasta 1, up 12.0s; CPU 20%, memory 50M, 100 wake-ups/s",
        "2.0kB/s to guest, 1.0kB/s to host; flows: 2 tcp, 1 udp+",
    ]
    assert lines[3].split()[-4:] == ["1.0k", "0", "5.0M", "12.3ms"], "the one with the highest rate first"
    assert lines[4].startswith("tcp   [2001:db8") and "~" in lines[4]
    assert lines[-1] == "Drops in the last second: 2 new"


def test_what_does_not_fit() -> None:
    view = View(stats(1.0, drops={"x" * 100: 1}), [{**FLOW, "index": i} for i in range(100)])
    lines = draw(view, view, 60, 10)
    assert len(lines) == 10 and max(map(len, lines)) <= 60
    assert lines[-1].startswith("Drops since the start: 1 xxx")


def test_rates_of_what_came_and_went() -> None:
    other = {**FLOW, "guest": "192.0.2.2:40001", "bytes_to_guest": 10, "bytes_to_host": 0}
    assert flow_rates([other], [FLOW], 2.0) == [(5.0, 0.0)], "its index was that of another"
    assert flow_rates([FLOW], [{**FLOW, "bytes_to_guest": 9999}], 1.0) == [(0, 0)]


def test_without_a_terminal(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pesto_top, "INTERVAL", 0)
    seen: list[Json] = [{"ok": True, "stats": stats(1.0)}, {"ok": True, "flows": [FLOW]}]
    server.will(*seen, *seen)
    assert call("--top", server.path) == 0
    out = capfd.readouterr().out
    assert "127.0.0.1:80" in out and "\x1b" not in out


@pytest.mark.parametrize("end", ["q", "\x03", signal.SIGINT, signal.SIGTERM])
def test_terminal_is_as_before(server: Server, end: str | signal.Signals) -> None:
    """By whatever way it ends: a key, an interrupt that the terminal makes, a signal."""
    server.will(*[{"ok": True, "stats": stats(1.0)}, {"ok": True, "flows": [FLOW]}] * 50)
    pty = Pty([str(Path(sysconfig.get_path("scripts")) / "pesto"), "--top", server.path], dict(os.environ))
    try:
        before = pty.attributes()
        pty.expect("127.0.0.1:80")
        assert pty.attributes() != before
        if isinstance(end, str):
            pty.type(end)
        else:
            os.kill(pty.pid, end)
        pty.expect("\x1b\\[\\?25h\x1b\\[\\?1049l")
        assert pty.wait() == 0 and "Traceback" not in pty.output
        assert pty.attributes() == before
    finally:
        pty.close()
