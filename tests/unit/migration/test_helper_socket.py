"""Where the helper's socket is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from passt import log
from passt.conf.argv import parse
from passt.log import Fatal
from passt.migration import helper_socket


def listen(*options: str, guest: str | None) -> str | None:
    """The path of the socket, which is removed."""
    made = helper_socket.listen(parse(options, "passt"), guest)
    if made is None:
        return None
    made.sock.close()
    assert os.stat(made.path).st_mode & 0o777 == 0o700
    os.unlink(made.path)
    return made.path


def test_behind_the_path_of_the_guest(tmp_path: Path) -> None:
    assert listen("--vhost-user", guest=f"{tmp_path}/s") == f"{tmp_path}/s.repair"


def test_where_it_is_asked_for(tmp_path: Path) -> None:
    path = f"{tmp_path}/r"
    assert listen("--vhost-user", "--repair-path", path, guest=None) == path


@pytest.mark.parametrize(
    ("options", "guest"),
    [
        (["--vhost-user", "--repair-path", "none"], "/nowhere/s"),
        (["--vhost-user"], None),
        ([], "/nowhere/s"),
        (["--repair-path", "/nowhere/r"], "/nowhere/s"),
    ],
)
def test_nowhere(options: list[str], guest: str | None) -> None:
    assert listen(*options, guest=guest) is None


def test_a_path_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    (tmp_path / "s.repair").write_text("")
    with pytest.raises(Fatal, match="there is a file of that name"):
        listen("--vhost-user", "--repair-path", f"{tmp_path}/s.repair", guest=None)
    assert listen("--vhost-user", guest=f"{tmp_path}/s") is None
    assert len(said) == 1
    assert "TCP connections will not move with the guest" in said[0]
