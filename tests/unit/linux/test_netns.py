"""Namespaces: opening them, and running a function inside one, with the entering itself faked."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt import log
from passt.linux import netns
from passt.linux.netns import Namespace, NoEntry, open_ns, path_of, run_in, same_ns
from passt.linux.syscall import CLONE_NEWNET, CLONE_NEWUSER


@pytest.fixture
def entered(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(descriptor, thread) of each namespace entered."""
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(netns, "setns", lambda fd, kind: seen.append((fd, threading.get_ident())))
    return seen


def test_function_runs_inside_and_its_result_comes_back(entered: list[tuple[int, int]]) -> None:
    assert run_in(7, lambda: (threading.get_ident(), "done")) == (entered[0][1], "done")
    assert entered[0][0] == 7
    assert entered[0][1] != threading.get_ident()


@pytest.mark.usefixtures("entered")
def test_exception_comes_back() -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "not there")

    with pytest.raises(FileNotFoundError, match="not there"):
        run_in(7, fail)


@pytest.mark.usefixtures("entered")
def test_thread_is_gone_for_the_kernel_too() -> None:
    before = netns._thread_count()
    for _ in range(20):
        run_in(7, lambda: None)
        assert netns._thread_count() == before


def test_what_is_no_namespace_cannot_be_entered() -> None:
    with open("/etc/passwd") as f, pytest.raises(NoEntry) as e:
        run_in(f.fileno(), lambda: None)
    assert e.value.errno == errno.EINVAL


# A thread that stays ------------------------------------------------------------------------------------------------


@pytest.fixture
def resident(entered: list[tuple[int, int]]) -> Iterator[Namespace]:
    namespace = Namespace(7)
    namespace.move_in()
    yield namespace
    namespace.leave()


def test_one_thread_does_everything_in_order(resident: Namespace, entered: list[tuple[int, int]]) -> None:
    done: list[int] = []
    for number in range(5):
        resident.post(lambda number=number: done.append(number))  # type: ignore[misc]
    assert resident.run(threading.get_ident) == entered[0][1] != threading.get_ident()
    assert done == [0, 1, 2, 3, 4]
    assert len(entered) == 1


def test_exceptions_of_the_resident(resident: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise FileNotFoundError(errno.ENOENT, "not there")

    said: list[str] = []
    monkeypatch.setattr(log, "err", said.append)
    with pytest.raises(FileNotFoundError, match="not there"):
        resident.run(fail)
    resident.post(fail)
    assert resident.run(lambda: "alive") == "alive"
    assert said == ["In the network namespace: FileNotFoundError(2, 'not there')"]


def test_resident_takes_no_signals(resident: Namespace) -> None:
    blocked = resident.run(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, []))
    assert {signal.SIGTERM, signal.SIGINT, signal.SIGUSR1} <= blocked
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])


@pytest.mark.usefixtures("entered")
def test_move_in_that_fails() -> None:
    def refuse() -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    before = threading.active_count()
    namespace = Namespace(7)
    with pytest.raises(PermissionError):
        namespace.move_in(refuse)
    assert namespace.run(lambda: "by a thread of its own") == "by a thread of its own"
    while threading.active_count() > before:
        pass


def test_names_and_paths() -> None:
    assert path_of("blue", "/run/netns") == "/run/netns/blue"
    assert path_of("blue", "/") == "/blue"
    assert path_of("/proc/1/ns/net", "/run/netns") == "/proc/1/ns/net"
    assert path_of("./blue", "/run/netns") == "./blue"


def test_open_ns() -> None:
    fd = open_ns("/proc/self/ns/net", CLONE_NEWNET)
    try:
        assert same_ns(fd, "/proc/self/ns/net")
        assert not same_ns(fd, "/proc/self/ns/user")
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("path", ["/proc/self/ns/uts", "/etc/passwd", "/dev/null", "/tmp"])
def test_open_ns_of_another_kind(path: str) -> None:
    with pytest.raises(OSError, match="not a namespace of that kind"):
        open_ns(path, CLONE_NEWUSER)


def test_open_ns_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a namespace of that kind"):
        open_ns(str(tmp_path / "pipe"), CLONE_NEWNET)


def test_open_ns_that_does_not_exist() -> None:
    with pytest.raises(FileNotFoundError):
        open_ns("/run/netns/there-is-no-such", CLONE_NEWNET)
