"""The end of namespaces of others, as the kernel shows it, and where it does not."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt import log
from passt.linux import inotify
from passt.loop.directories import Changes
from passt.namespace.watch import POLL_INTERVAL, Watch

DEADLINE = 30.0


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


def readable(*fds: int) -> bool:
    return bool(select.select(fds, [], [], DEADLINE)[0])


@pytest.fixture
def changes() -> Iterator[Changes]:
    made = Changes()
    yield made
    made.close()


def test_file_is_deleted(tmp_path: Path, changes: Changes) -> None:
    path = tmp_path / "blue"
    path.touch()
    (tmp_path / "green").touch()
    watch = Watch(str(path), changes)
    assert (watch.name, watch.pidfds, watch.in_directory, watch.poll, watch.ended()) == ("blue", [], True, False, False)
    (tmp_path / "green").unlink()
    assert not watch.deleted(inotify.read(changes.fd))
    path.unlink()
    assert watch.deleted(inotify.read(changes.fd))
    assert watch.ended()


def test_file_is_renamed(tmp_path: Path, changes: Changes) -> None:
    (tmp_path / "blue").touch()
    watch = Watch(str(tmp_path / "blue"), changes)
    (tmp_path / "blue").rename(tmp_path / "green")
    assert watch.deleted(inotify.read(changes.fd))


def test_others_watch_the_same_directory(tmp_path: Path, changes: Changes) -> None:
    path = tmp_path / "blue"
    path.touch()
    (tmp_path / "other").mkdir()
    changes.watch(str(tmp_path), inotify.CREATE | inotify.CLOSE_WRITE)
    watch = Watch(str(path), changes)
    changes.watch(str(tmp_path), inotify.MOVED_TO)
    changes.watch(str(tmp_path / "other"), inotify.DELETE)
    path.write_text("x")
    (tmp_path / "other" / "blue").touch()
    (tmp_path / "other" / "blue").unlink()
    assert not watch.deleted(inotify.read(changes.fd)), "nothing was deleted here"
    path.unlink()
    assert watch.deleted(inotify.read(changes.fd))


def test_file_is_replaced(tmp_path: Path, changes: Changes) -> None:
    """Another namespace has its name now, and the namespace that is served has no name any more."""
    path = tmp_path / "blue"
    path.touch()
    watch = Watch(str(path), changes)
    path.unlink()
    path.touch()
    assert watch.deleted(inotify.read(changes.fd))


def test_directory_that_cannot_be_watched_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(inotify, "new", refuse)
    path = tmp_path / "blue"
    path.touch()
    watch = Watch(str(path), Changes())
    assert (watch.in_directory, watch.poll, watch.gone()) == (False, True, False)
    assert POLL_INTERVAL < 0.2, "seconds until the end is noticed, at most"
    (directory,) = watch.directories
    path.unlink()
    assert watch.gone()
    os.close(directory)


def test_process_ends(sleeper: subprocess.Popen[bytes]) -> None:
    watch = Watch(f"/proc/{sleeper.pid}/ns/net", Changes())
    assert (watch.in_directory, watch.poll, watch.ended()) == (False, False, False)
    assert watch.name == f"/proc/{sleeper.pid}/ns/net"
    sleeper.kill()
    assert readable(*watch.pidfds)
    assert watch.ended(), "a process that was not waited for has no namespace either"
    os.close(*watch.pidfds)


def test_process_has_ended_before(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    sleeper.kill()
    sleeper.wait()
    watch = Watch(f"/proc/{sleeper.pid}/ns/net", Changes())
    assert (watch.pidfds, watch.in_directory, watch.poll, watch.ended(), said) == ([], False, False, True, [])


def test_link_to_a_process(sleeper: subprocess.Popen[bytes], tmp_path: Path, changes: Changes) -> None:
    """As `ln -s /proc/PID/ns/net /run/netns/NAME` makes the namespace of a container known to ip(8)."""
    link = tmp_path / "blue"
    link.symlink_to(f"/proc/{sleeper.pid}/ns/net")
    watch = Watch(str(link), changes)
    assert (watch.in_directory, watch.poll, watch.ended()) == (True, False, False)
    link.unlink()
    assert watch.deleted(inotify.read(changes.fd))
    sleeper.kill()
    assert readable(*watch.pidfds)
    os.close(*watch.pidfds)


def test_link_to_a_file(tmp_path: Path, changes: Changes) -> None:
    """Relative to a directory that is reached by a link itself."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / "blue").touch()
    (tmp_path / "real" / "inner" / "link").symlink_to("../blue")
    (tmp_path / "short").symlink_to("real/inner")
    watch = Watch(str(tmp_path / "short" / "link"), changes)
    assert not watch.ended()
    (tmp_path / "real" / "blue").unlink()
    assert watch.deleted(inotify.read(changes.fd))
    assert watch.ended()


def test_link_in_a_circle(tmp_path: Path, changes: Changes) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert Watch(str(tmp_path / "a"), changes).in_directory


def test_thread_ends() -> None:
    """Its process goes on."""
    stop, ids = threading.Event(), []

    def body() -> None:
        ids.append(threading.get_native_id())
        started.set()
        stop.wait(DEADLINE)

    started = threading.Event()
    thread = threading.Thread(target=body)
    thread.start()
    started.wait(DEADLINE)
    try:
        watch = Watch(f"/proc/{os.getpid()}/task/{ids[0]}/ns/net", Changes())
        assert not watch.ended() and not select.select(watch.pidfds, [], [], 0)[0]
    finally:
        stop.set()
        thread.join()
    if watch.poll:  # before Linux 6.9
        assert watch.gone()
        os.close(*watch.directories)
    else:
        assert readable(*watch.pidfds)
    for fd in watch.pidfds:
        os.close(fd)


def test_first_thread_of_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    watch = Watch(f"/proc/{sleeper.pid}/task/{sleeper.pid}/ns/net", Changes())
    sleeper.kill()
    assert readable(*watch.pidfds)
    os.close(*watch.pidfds)


def test_file_below_the_root_of_a_process(sleeper: subprocess.Popen[bytes], tmp_path: Path, changes: Changes) -> None:
    path = tmp_path / "blue"
    path.touch()
    watch = Watch(f"/proc/{sleeper.pid}/root{path}", changes)
    assert watch.in_directory
    path.unlink()
    assert watch.deleted(inotify.read(changes.fd))
    os.close(*watch.pidfds)


def test_kernel_without_pidfd(sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(pid: int) -> int:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", missing)
    watch = Watch(f"/proc/{sleeper.pid}/ns/net", Changes())
    assert (watch.pidfds, watch.poll, watch.gone()) == ([], True, False)
    sleeper.kill()
    sleeper.wait()
    assert watch.gone()


def test_descriptor_cannot_be_watched() -> None:
    with open("/proc/self/ns/net") as f:
        watch = Watch(f"/proc/self/fd/{f.fileno()}", Changes())
        assert (watch.pidfds, watch.in_directory, watch.poll, watch.ended()) == ([], False, False, False)
