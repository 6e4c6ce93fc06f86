"""Control sockets from when they are opened until they are served, or until the start has failed."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any, cast

import pytest

from passt.conf.options import Options
from passt.control import sockets as control_sockets
from passt.log import Fatal
from passt.loop.reactor import EPOLLIN, TYPE_CONTROL, TYPE_CONTROL_LISTEN

from ..ports.test_forwards import Make
from ..ports.test_forwards import rig as rig
from ..support import T0, make_context, reactor


def options(directory: Path, *names: str) -> Options:
    return Options(**dict(zip(("conf_path", "api_socket"), (str(directory / name) for name in names), strict=False)))


def test_none() -> None:
    ctx = make_context()
    sockets = control_sockets.Sockets(Options())
    sockets.serve(ctx, cast(Any, None))
    sockets.remove()
    assert not control_sockets.wanted(Options()) and not reactor(ctx).refs


def test_paths_go_when_the_start_fails(tmp_path: Path) -> None:
    given = options(tmp_path, "conf", "api")
    assert control_sockets.wanted(given)
    sockets = control_sockets.Sockets(given)
    assert sorted(os.listdir(tmp_path)) == ["api", "conf"]
    sockets.remove()
    assert os.listdir(tmp_path) == []


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="No such file or directory"):
        control_sockets.Sockets(options(tmp_path, "conf", "no/api"))
    assert os.listdir(tmp_path) == []
    with pytest.raises(Fatal, match="already in use"):
        control_sockets.Sockets(options(tmp_path, "same", "same"))


def test_a_path_that_cannot_be_removed(tmp_path: Path) -> None:
    sockets = control_sockets.Sockets(options(tmp_path, "conf"))
    os.unlink(tmp_path / "conf")
    sockets.remove()


def test_serving(rig: Make, tmp_path: Path) -> None:
    r = rig()
    sockets = control_sockets.Sockets(options(tmp_path, "conf", "api"))
    sockets.serve(r.ctx, r.forwards)
    loop = reactor(r.ctx)
    listening = [fd for fd, ref in loop.refs.items() if ref >> 56 == TYPE_CONTROL_LISTEN]
    answers = []
    for fd, name, request in zip(
        listening, ("conf", "api"), (b'{"command":"show"}\n', b'{"execute":"list_hostfwd"}\n'), strict=True
    ):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / name))
            client.send(request)
            loop.fire(fd, EPOLLIN, T0)
            (accepted,) = (f for f, ref in loop.refs.items() if ref >> 56 == TYPE_CONTROL)
            loop.fire(accepted, EPOLLIN, T0)
            loop.end_turn(T0)
            answers.append(client.recv(1000))
            client.shutdown(socket.SHUT_WR)
            if accepted in loop.refs:
                loop.fire(accepted, EPOLLIN, T0)
                loop.end_turn(T0)
    assert answers == [b'{"ok":true,"rules":[]}\n', b'{"return": {"entries": []}, "entries": []}']
    sockets.remove()
