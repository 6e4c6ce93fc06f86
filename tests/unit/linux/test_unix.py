"""UNIX sockets: credentials of the peer. `test_passt.py` has existing files at a path."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from passt.linux import unix
from passt.log import Fatal


def test_many_may_wait(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = unix.listen_at(path, 4)
    assert stat.S_IMODE(os.stat(path).st_mode) == unix.MODE
    clients = [socket.socket(socket.AF_UNIX) for _ in range(4)]
    for client in clients:
        client.connect(path)
    for sock in (*clients, listener):
        sock.close()


def test_who_listens_does_not_notice_that_the_path_is_wanted(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = unix.listen_at(path)
    with pytest.raises(Fatal, match="already in use"):
        unix.listen_at(path)
    with pytest.raises(BlockingIOError):
        listener.accept()
    listener.close()


def test_the_other_end_is_known(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    listener = unix.listen_at(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        accepted, _ = listener.accept()
    assert unix.credentials(accepted) == (os.getpid(), os.geteuid(), os.getegid())
    accepted.close()
    listener.close()


def test_origin_is_who_made_it() -> None:
    origin = unix.Origin()
    assert origin.uid() == os.geteuid()
    origin.close()
