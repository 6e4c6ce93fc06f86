"""The conversation: answers that are strange, late or missing, and what the user is told of them."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from passt.pesto import connection

from .support import Server, call


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", "the connection was closed without an answer"),
        (b"nonsense\n", "this is not a control socket (-c)"),
        (b"[]\n", "this is not a control socket (-c)"),
        (b'{"ok"', "this is not a control socket (-c)"),
        (b'{"ok": false, "error": "go away"}\n', "go away"),
    ],
)
def test_strange_answers(server: Server, answer: bytes, error: str, capfd: pytest.CaptureFixture[str]) -> None:
    server.will(answer)
    assert call("--info", server.path) == 1
    assert capfd.readouterr().err.endswith(f"{error}\n")


def test_a_program_in_c(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    """Its greeting has no end of line, and the connection stays open: version 2, lengths of names, the first table."""
    server.will(connection.IN_C + bytes.fromhex("00000002 00000080 00000010 01") + b"HOST".ljust(128, b"\0"))
    assert call("--show", server.path) == 1
    said = capfd.readouterr().err
    assert said == f"{server.path}: this is the socket of a program in C: use the pesto that is beside it\n"


def test_nobody_there(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "stale"))
    stale.close()
    for name, why in (
        ("nothing", "No such file or directory: pasta and passt create it when they are started with -c"),
        ("file", "Connection refused: no program listens there any more, or it is not a socket"),
        ("stale", "Connection refused: no program listens there any more, or it is not a socket"),
        ("x" * 120, "AF_UNIX path too long"),
    ):
        path = str(tmp_path / name)
        assert call("--show", path) == 1
        assert capfd.readouterr().err == f"Couldn't connect to {path}: {why}\n"


def test_no_answer(server: Server, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(connection, "TIMEOUT", 0.05)
    assert call("--show", server.path) == 1
    assert "no answer within" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("e", "advice"),
    [(PermissionError(13, "x"), "who started"), (BlockingIOError(11, "x"), "too many clients"), (OSError(5, "x"), "")],
)
def test_advice(e: OSError, advice: str) -> None:
    assert advice in connection._advice(e)


def test_root_speaks_for_the_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    became: list[int] = []
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(os, "seteuid", became.append)
    connection._become_owner(str(tmp_path))
    connection._become_owner(str(tmp_path / "nothing"))
    assert became == [os.stat(tmp_path).st_uid]
