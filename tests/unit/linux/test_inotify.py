"""inotify: real directories, and events as the kernel writes them."""

from __future__ import annotations

import os
from pathlib import Path
from struct import Struct

from hypothesis import given
from hypothesis import strategies as st

from passt.linux import inotify
from passt.linux.inotify import Event


def test_what_happens_in_directories(tmp_path: Path) -> None:
    names = ("a", "a-longer-name-than-sixteen", "\u00fc")
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "other").mkdir()
    fd = inotify.new()
    try:
        one = inotify.add(fd, str(tmp_path), inotify.DELETE)
        two = inotify.add(fd, str(tmp_path / "other"), inotify.CLOSE_WRITE)
        assert one != two
        assert inotify.add(fd, str(tmp_path), inotify.DELETE) == one
        assert inotify.read(fd) == []
        (tmp_path / "new").touch()  # not asked for
        for name in names:
            (tmp_path / name).unlink()
        (tmp_path / "other" / "file").write_text("x")
        expected = [Event(one, inotify.DELETE, name) for name in names]
        assert inotify.read(fd) == [*expected, Event(two, inotify.CLOSE_WRITE, "file")]
        assert inotify.read(fd) == []
    finally:
        os.close(fd)


def test_a_file_itself(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    fd = inotify.new()
    try:
        inotify.add(fd, str(path), inotify.MODIFY)
        path.write_text("x")
        assert [(e.mask, e.name) for e in inotify.read(fd)][-1] == (inotify.MODIFY, "")
    finally:
        os.close(fd)


def test_masks_add_up(tmp_path: Path) -> None:
    fd = inotify.new()
    try:
        one = inotify.add(fd, str(tmp_path), inotify.CREATE)
        assert inotify.add(fd, str(tmp_path), inotify.DELETE) == one
        (tmp_path / "file").touch()
        (tmp_path / "file").unlink()
        assert [e.mask for e in inotify.read(fd)] == [inotify.CREATE, inotify.DELETE]
    finally:
        os.close(fd)


def test_layout() -> None:
    head = Struct("=iIII").pack
    data = head(1, 0x200, 0, 16) + b"resolv.conf\0\0\0\0\0" + head(-1, 0x4000, 0, 0)
    assert inotify.parse(data) == [Event(1, inotify.DELETE, "resolv.conf"), Event(-1, inotify.Q_OVERFLOW, "")]
    assert inotify.parse(data[:15]) == []


@given(st.binary(max_size=80))
def test_any_bytes_are_read(data: bytes) -> None:
    assert len(inotify.parse(data)) <= len(data) // 16
