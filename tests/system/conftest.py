"""Fixtures of the system tests. They run as root, with an ordinary user beside, or as an ordinary user alone."""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from .support import Host, Runner, User, current_user, made_user, new_host

TEST_USER = "pastatest"
TUN = "/dev/net/tun"


@contextlib.contextmanager
def tun_for_all(notes: Path | None = None) -> Iterator[None]:
    """/dev/net/tun with the mode that udev gives it. In `notes`, the processes of one run count themselves: the first
    changes the mode, and the last restores it.
    """
    if os.geteuid() != 0:
        yield
        return
    with open(notes, "a+") if notes else tempfile.TemporaryFile("w+") as file:
        _count(file, 1)
        try:
            yield
        finally:
            _count(file, -1)


def _count(file: IO[str], change: int) -> None:
    """Add to the processes that need the device; `file` has their number, and the mode that there was."""
    fcntl.flock(file, fcntl.LOCK_EX)
    file.seek(0)
    users, mode = map(int, file.read().split() or (0, stat.S_IMODE(os.stat(TUN).st_mode)))
    users += change
    os.chmod(TUN, 0o666 if users else mode)
    file.truncate(0)
    if users:
        file.write(f"{users} {mode}")
        file.flush()
    fcntl.flock(file, fcntl.LOCK_UN)


@pytest.fixture(scope="session", autouse=True)
def tun_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The same, for as long as the tests run."""
    beside = "PYTEST_XDIST_WORKER" in os.environ  # the directory above is that of all workers then
    with tun_for_all(tmp_path_factory.getbasetemp().parent / "tun" if beside else None):
        yield


@pytest.fixture(scope="session")
def ordinary_user() -> Iterator[User]:
    """A user without privileges: the one who runs the tests, or an account created by root for them."""
    if os.geteuid() != 0:
        yield current_user()
        return
    with made_user(TEST_USER) as user:
        yield user


@pytest.fixture(scope="session")
def root() -> User:
    """Root; a test that needs it cannot run otherwise."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    return current_user()


@pytest.fixture(params=["user", "root"])
def anyone(request: pytest.FixtureRequest) -> User:
    """Each test that uses this runs for the ordinary user and for root."""
    user: User = request.getfixturevalue("ordinary_user" if request.param == "user" else "root")
    return user


def _runner(user: User, host: Host | None = None) -> Iterator[Runner]:
    runner = Runner(user, host)
    yield runner
    runner.close()


@pytest.fixture
def pasta(anyone: User) -> Iterator[Runner]:
    """pasta for the ordinary user, and for root."""
    yield from _runner(anyone)


@pytest.fixture
def user_pasta(ordinary_user: User) -> Iterator[Runner]:
    """pasta for the ordinary user."""
    yield from _runner(ordinary_user)


@pytest.fixture
def root_pasta(root: User) -> Iterator[Runner]:
    """pasta for root."""
    yield from _runner(root)


@pytest.fixture
def host(root: User) -> Iterator[Host]:
    """A host with an interface eth0 that has addresses and default routes of both families, on a network of its own."""
    with new_host(
        "veth eth0",
        "address add 198.51.100.7/24 dev eth0",
        "address add 198.51.100.8/24 dev eth0",
        "address add 2001:db8:1::7/64 dev eth0 nodad",
        "link set eth0 up",
        "route add default via 198.51.100.1 dev eth0 metric 100",
        "route add 203.0.113.0/24 via 198.51.100.2 dev eth0",
        "route add default via 2001:db8:1::1 dev eth0 metric 100",
    ) as made:
        yield made


@pytest.fixture
def hosted(anyone: User, host: Host) -> Iterator[Runner]:
    """pasta on `host`, for the ordinary user and for root."""
    yield from _runner(anyone, host)
