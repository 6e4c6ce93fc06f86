"""One inotify instance for all who watch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt.linux import inotify
from passt.linux.inotify import Event
from passt.loop.directories import Changes
from passt.loop.reactor import EPOLLIN, TYPE_INOTIFY

from ..support import T0, make_context, reactor


@pytest.fixture
def changes() -> Iterator[Changes]:
    made = Changes()
    yield made
    made.close()


def test_all_who_watch_are_told(tmp_path: Path, changes: Changes) -> None:
    ctx = make_context()
    loop = reactor(ctx)
    told: list[tuple[str, list[Event], float]] = []
    first = changes.watch(str(tmp_path), inotify.CREATE)
    changes.tell(ctx.reactor, lambda found, now: told.append(("one", found, now)))
    (tmp_path / "sub").mkdir()
    second = changes.watch(str(tmp_path / "sub"), inotify.CREATE)
    changes.tell(ctx.reactor, lambda found, now: told.append(("two", found, now)))
    assert [ref >> 56 for ref in loop.refs.values()] == [TYPE_INOTIFY]
    (tmp_path / "sub" / "file").touch()
    loop.fire(changes.fd, EPOLLIN, T0)
    names = [Event(first, inotify.CREATE | 0x40000000, "sub"), Event(second, inotify.CREATE, "file")]  # IN_ISDIR
    assert told == [("one", names, T0), ("two", names, T0)]


def test_there_is_an_instance_when_something_is_watched(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    changes = Changes()
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            changes.watch("/no/such/directory", inotify.DELETE)
        assert (changes.fd, os.listdir("/proc/self/fd")) == (-1, before)
    changes.watch(str(tmp_path), inotify.DELETE)
    with pytest.raises(FileNotFoundError):
        changes.watch("/no/such/directory", inotify.DELETE)
    assert changes.fd >= 0, "somebody needs it"
    changes.close()
    assert os.listdir("/proc/self/fd") == before
