"""Text output of flows, sizes and times."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from passt.pesto import text as pesto_text

from .support import FLOW


def test_flow_lines() -> None:
    udp = {**FLOW, "protocol": "udp", "path": "splice", "direction": "host", "host": "", "rtt": None, "snd_wnd": None}
    assert [line.split() for line in pesto_text.flow_lines([FLOW, udp])][1:] == [
        ["tcp", "192.0.2.2:40000", "127.0.0.1:80", "established", "1.2k", "5.0M", "1m01s", "12.3ms", "66k/-"],
        ["udp+", "192.0.2.1:80", "192.0.2.2:40000", "established", "1.2k", "5.0M", "1m01s"],
    ]


@given(st.floats(0, 1e17))
def test_sizes_are_short(number: float) -> None:
    assert len(pesto_text.size(number)) <= 5


@given(st.floats(0, 8e7))
def test_spans_are_short(seconds: float) -> None:
    assert len(pesto_text.span(seconds)) <= 8


def test_spans() -> None:
    spans = [pesto_text.span(s) for s in (0, 59.94, 60, 3599, 3600, 86399, 86400 * 3 + 7200)]
    assert spans == ["0.0s", "59.9s", "1m00s", "59m59s", "1h00m", "23h59m", "3d02h"]


def test_slow_round_trips() -> None:
    assert pesto_text.rtt({"rtt": 1.25}) == "1.2s" and pesto_text.rtt({}) == ""
