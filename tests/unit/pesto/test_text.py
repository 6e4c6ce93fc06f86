"""Text output of flows, sizes and times."""

from __future__ import annotations

import pytest
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


V6 = "[2001:db8:1234:5678:9abc:def0:1234:5678]:40000"


@pytest.mark.parametrize("width", [60, 80, 100, 120, 200])
@pytest.mark.parametrize("ends", [("192.0.2.2:40000", "127.0.0.1:80"), ("192.0.2.2:40000", V6), (V6, V6)])
def test_a_terminal_has_it_in_its_width(width: int, ends: tuple[str, str]) -> None:
    flow = {**FLOW, "guest": ends[0], "host": ends[1]}
    head, line = pesto_text.flow_lines([flow], width)
    assert max(len(head), len(line)) <= max(width, 66)
    assert "12.3ms" in line and ("WINDOW" in head) == ("66k/-" in line)
    first, second = line.split()[1:3]
    for shown, end in ((first, ends[0]), (second, ends[1])):
        before, _, behind = shown.partition("~")
        assert end == shown or (end.startswith(before) and end.endswith(behind))
    assert ends != ("192.0.2.2:40000", "127.0.0.1:80") or (first, second) == ends or width == 60


def test_no_terminal_has_all_of_it() -> None:
    _, line = pesto_text.flow_lines([{**FLOW, "guest": V6, "host": V6}])
    assert line.split()[1:3] == [V6, V6] and line.endswith("66k/-")


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        ("TAP_SYN_RCVD", "opening"),
        ("CONNECTING", "opening"),
        ("TAP_SYN_RCVD|TAP_SYN_ACK_SENT|ESTABLISHED", "established"),
        ("TAP_SYN_RCVD|TAP_SYN_ACK_SENT|ESTABLISHED|TAP_FIN_RCVD|SOCK_FIN_SENT", "FIN of guest"),
        ("SOCK_ACCEPTED|TAP_SYN_SENT|SOCK_FIN_RCVD", "FIN of host"),
        ("ESTABLISHED|SOCK_FIN_RCVD|TAP_FIN_SENT|TAP_FIN_RCVD", "FIN of both"),
        ("ESTABLISHED|CLIENT_FIN", "FIN of client"),
        ("ESTABLISHED|CLIENT_FIN|SERVER_FIN", "FIN of both"),
        ("TAP_SYN_RCVD|ESTABLISHED|TAP_FIN_RCVD|SOCK_FAILED", "failed"),
        ("active", "active"),
    ],
)
def test_states(state: str, shown: str) -> None:
    _, line = pesto_text.flow_lines([{**FLOW, "state": state}])
    assert f"  {shown}  " in line


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
    assert pesto_text.rtt({"rtt": 0.00004}) == "40us", "of a peer on the host"
