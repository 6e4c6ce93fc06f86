"""The client: its command line, what it asks, what it prints, what it says when it cannot."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import __version__
from passt.log import Fatal
from passt.pesto import command as pesto
from passt.pesto import text as pesto_text
from passt.pesto import top as pesto_top
from passt.pesto.command import Asked, parse
from passt.pesto.top import View, draw, flow_rates

Json = dict[str, Any]

RULE: Json = {
    "number": 1,
    "rule": "-t 8080:80",
    "first": 8080,
    "last": 8080,
    "auto": False,
    "listening": [[8080, 8080]],
}


class Server:
    """A control socket with answers made up beforehand."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self.asked: list[Json] = []
        self.answers: list[bytes] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.bind(self.path)
        self._sock.listen()
        self._thread = threading.Thread(target=self._serve)

    def will(self, *answers: Json | bytes) -> None:
        self.answers = [a if isinstance(a, bytes) else json.dumps(a).encode() + b"\n" for a in answers]
        self._thread.start()

    def _serve(self) -> None:
        sock, _ = self._sock.accept()
        with sock, sock.makefile("rb") as file:
            for answer in self.answers:
                self.asked.append(json.loads(file.readline()))
                sock.sendall(answer)

    def close(self) -> None:
        if self._thread.ident is not None:
            self._thread.join()
        self._sock.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    made = Server(tmp_path / "socket")
    yield made
    made.close()


def call(*words: str) -> int:
    return pesto.main(["pesto", *words])


# The command line ----------------------------------------------------------------------------------------------------


def asked(*argv: str) -> tuple[list[Json], list[str], list[str]]:
    what, operands = parse(argv)
    return what.changes, what.queries, operands


@pytest.mark.parametrize(
    ("argv", "changes"),
    [
        (["-A", "--tcp-ports=0.0.0.0/8080:80"], [{"add": "-t 0.0.0.0/8080:80"}]),
        (["-D", "--tcp-ports=0.0.0.0/8080:80"], [{"delete": "-t 0.0.0.0/8080:80"}]),
        (["-A", "--udp-ports=::/8080:80"], [{"add": "-u ::/8080:80"}]),
        (
            ["--add", "-t", "0.0.0.0/8080", "-t", "[::]/8080", "-u", "0.0.0.0/53"],
            [{"add": "-t 0.0.0.0/8080"}, {"add": "-t [::]/8080"}, {"add": "-u 0.0.0.0/53"}],
        ),
        (["-D", "-t1", "-A", "-T2", "-U", "3"], [{"delete": "-t 1"}, {"add": "-T 2"}, {"add": "-U 3"}]),
        (["-t", "80", "-u", "none"], [{"replace": "-t 80"}, {"replace": "-u none"}]),
        (["--clear"], [{"clear": "all"}]),
        (["-C", "HOST"], [{"clear": "host"}]),
        (["-Csplice"], [{"clear": "splice"}]),
        (["--cl", "SPLICE", "-A", "-t", "1"], [{"clear": "splice"}, {"add": "-t 1"}]),
        (["--clear=HOST", "--del", "--tcp-p", "1"], [{"clear": "host"}, {"delete": "-t 1"}]),
        (["-AC", "all"], [{"clear": "all"}]),
    ],
)
def test_changes(argv: list[str], changes: list[Json]) -> None:
    assert asked(*argv, "SOCK") == (changes, [], ["SOCK"])


def test_operands_may_come_first() -> None:
    assert asked("SOCK", "-A", "-t", "80", "--show") == ([{"add": "-t 80"}], ["show"], ["SOCK"])
    assert asked("--clear", "SOCK")[0] == [{"clear": "all"}]
    assert asked("--show", "--", "-SOCK", "--flows") == ([], ["show"], ["-SOCK", "--flows"])


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        (["--nonsense", "S"], "pesto: unrecognized option '--nonsense': see pesto --help"),
        (["--flow-s", "S"], "pesto: unrecognized option '--flow-s': did you mean --flows? See pesto --help"),
        (["-x", "S"], "pesto: invalid option -- 'x': see pesto --help"),
        (["-t"], "pesto: option requires an argument -- 't'"),
        (["--tcp", "80", "S"], "pesto: option '--tcp' is ambiguous; possibilities: '--tcp-ports' '--tcp-ns'"),
        (["--show=1", "S"], "pesto: option '--show' doesn't allow an argument"),
        (["--clear=TAP", "S"], "pesto: there are no rules of TAP (give HOST, SPLICE, ALL, or nothing)"),
        (
            ["--clear=splise", "S"],
            "pesto: there are no rules of splise (give HOST, SPLICE, ALL, or nothing): did you mean 'SPLICE'?",
        ),
        ([], "pesto: which control socket? Give the path that pasta or passt was started with: pesto ... SOCKET"),
        (["-A", "-t", "80"], "pesto: which control socket? Give"),
        (["S", "T"], "pesto: too many operands"),
    ],
)
def test_mistakes(argv: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*argv) == 1
    out, err = capsys.readouterr()
    assert (out, err.startswith(error), err.count("\n")) == ("", True, 1)


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith(f"pesto {__version__}\n")
    assert call("--help") == call("-h") == 0
    text, err = capsys.readouterr()
    assert not err and all(f"--{option.name}" in text for option in pesto.TABLE)
    assert max(map(len, text.splitlines())) <= 80


@given(st.lists(st.sampled_from(["-A", "-D", "-C", "HOST", "-t", "80", "--", "-", "--cl", "--show", "x", "-tx"])))
def test_any_words(words: list[str]) -> None:
    try:
        what, operands = parse(words)
    except Fatal:
        return
    assert isinstance(what, Asked) and all(isinstance(operand, str) for operand in operands)


# Conversations -------------------------------------------------------------------------------------------------------


def test_success_is_silent(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "added": [RULE], "removed": [], "present": []})
    assert call("-A", "-t", "8080:80", server.path) == 0
    assert server.asked == [{"command": "change", "changes": [{"add": "-t 8080:80"}]}]
    assert capsys.readouterr() == ("", "")


def test_there_already(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "added": [], "removed": [], "present": [RULE]})
    assert call("-A", "-t", "8080:80", server.path) == 0
    assert capsys.readouterr().err == "'-t 8080:80' is there already\n"


def test_before_and_after(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": True, "rules": []}, {"ok": True, "present": []}, {"ok": True, "rules": [RULE]})
    assert call("-s", "-A", "-t", "8080:80", server.path) == 0
    assert [a["command"] for a in server.asked] == ["show", "change", "show"]
    assert capsys.readouterr().out.splitlines() == [
        "   #  RULE                      LISTENING",
        "   #  RULE                      LISTENING",
        "   1  -t 8080:80                yes",
    ]


def test_the_rules_are_what_is_asked_for_by_default(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    auto = {"number": 12, "rule": "-T auto", "first": 1, "last": 65535, "auto": True, "listening": [[22, 23], [80, 80]]}
    none = {**auto, "listening": []}
    many = {**auto, "listening": [[p, p] for p in range(1, 30, 2)]}
    weak = {"number": 13, "rule": "-t 1-10", "first": 1, "last": 10, "auto": False, "listening": [[2, 4]]}
    server.will({"ok": True, "rules": [auto, none, many, weak]})
    assert call(server.path) == 0
    listening = [line[32:] for line in capsys.readouterr().out.splitlines()[1:]]
    assert listening == ["22-23, 80", "nothing now", "1, 3, 5, 7, 9, 11, 13, 15, ...", "3 of 10 ports"]


def test_every_line_of_an_error(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.will({"ok": False, "error": "a", "errors": ["a", "b"]})
    assert call("-A", "-t", "1-2", server.path) == 1
    assert capsys.readouterr() == ("", "a\nb\n")


def test_json_and_debug(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"ok": True, "rules": [RULE]}
    server.will(answer)
    assert call("--json", "-d", server.path) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == answer
    assert err.splitlines() == ['> {"command": "show"}', f"< {json.dumps(answer)}"]


def test_other_questions(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    info = {"version": "1", "assigned": ["192.0.2.1"], "guest": {"mac": None}}
    server.will({"ok": True, "metrics": "# x\ny 1\n"}, {"ok": True, "info": info}, {"ok": True, "flows": []})
    assert call("--metrics", "--info", "--flows", server.path) == 0
    assert capsys.readouterr().out.splitlines() == [
        "# x",
        "y 1",
        "version:     1",
        "assigned:    192.0.2.1",
        "guest:",
        "    mac:         -",
        "PROTO  FROM  TO  STATE  ->GUEST  ->HOST  AGE  RTT  WINDOW",
    ]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the connection was closed without an answer"),
        (b"nonsense\n", "what answers is no control socket (-c)"),
        (b"[]\n", "what answers is no control socket (-c)"),
        (b'{"ok"', "what answers is no control socket (-c)"),
        (b'{"ok": false, "error": "go away"}\n', "go away"),
    ],
)
def test_strange_answers(server: Server, answer: bytes, error: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.will(answer)
    assert call("--info", server.path) == 1
    assert capsys.readouterr().err.endswith(f"{error}\n")


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    for name, why in (
        ("nothing", "No such file or directory: pasta and passt make it when they are started with -c"),
        ("file", "Connection refused: no program listens there any more, or it is no socket"),
        ("stale", "Connection refused: no program listens there any more, or it is no socket"),
        ("x" * 120, "AF_UNIX path too long"),
    ):
        path = str(tmp_path / name)
        assert call("--show", path) == 1
        assert capsys.readouterr().err == f"Couldn't connect to {path}: {why}\n"


def test_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pesto, "TIMEOUT", 0.05)
    assert call("--show", server.path) == 1
    assert "no answer within" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("e", "advice"),
    [(PermissionError(13, "x"), "who started"), (BlockingIOError(11, "x"), "too many clients"), (OSError(5, "x"), "")],
)
def test_advice(e: OSError, advice: str) -> None:
    assert advice in pesto._advice(e)


def test_root_speaks_for_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[int] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "seteuid", became.append)
    pesto._become_owner(str(tmp_path))
    pesto._become_owner(str(tmp_path / "nothing"))
    assert became == [os.stat(tmp_path).st_uid]


# Text ----------------------------------------------------------------------------------------------------------------

FLOW: Json = {
    "index": 7,
    "protocol": "tcp",
    "path": "tap",
    "direction": "guest",
    "guest": "192.0.2.2:40000",
    "peer": "192.0.2.1:80",
    "host": "127.0.0.1:80",
    "state": "established",
    "bytes_to_guest": 1234,
    "bytes_to_host": 5_000_000,
    "age": 61.0,
    "idle": 0.1,
    "rtt": 0.0123,
    "snd_wnd": 65536,
    "rcv_wnd": None,
}


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


# The live view -------------------------------------------------------------------------------------------------------


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


def test_without_a_terminal(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pesto_top, "INTERVAL", 0)
    seen: list[Json] = [{"ok": True, "stats": stats(1.0)}, {"ok": True, "flows": [FLOW]}]
    server.will(*seen, *seen)
    assert call("--top", server.path) == 0
    out = capsys.readouterr().out
    assert "127.0.0.1:80" in out and "\x1b" not in out


def test_the_table_has_each_option_once() -> None:
    shorts: Sequence[str] = [option.short for option in pesto.TABLE if option.short]
    names = [option.name for option in pesto.TABLE]
    assert len(set(shorts)) == len(shorts) and len(set(names)) == len(names)
    actions: list[Callable[..., None]] = [option.action for option in pesto.TABLE]
    assert len(set(map(id, actions))) == len(actions), "the same action would make two names of one option"
