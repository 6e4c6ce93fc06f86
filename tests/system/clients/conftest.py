"""Fixtures of the tests of clients: the installed commands, and the programs that execute them on a host."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support import User
from ..traffic.support import Lan, Namespace
from ..vm.conftest import lan
from ..vm.support import name_server
from .support import Client, Within, install

__all__ = ["lan"]


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[User], Path]]:
    """The directory of the commands for a user."""
    with tempfile.TemporaryDirectory(prefix="passt-test-bin-") as name:
        os.chmod(name, 0o755)

        def directory(user: User) -> Path:
            made = Path(name, str(user.uid))
            if not made.exists():
                made.mkdir(mode=0o755)
                install(made, user.python)
            return made

        yield directory


@pytest.fixture(scope="session")
def runtime(lan: Lan) -> Callable[[User], None]:
    """Makes /run/user/UID on the host, as a login does."""

    def make(user: User) -> None:
        path = f"/run/user/{user.uid}"
        lan.host.run("install", "-d", "-m", "0700", "-o", str(user.uid), "-g", str(user.gid), path)

    return make


@pytest.fixture(scope="session", autouse=True)
def low_ports(lan: Lan) -> None:
    """Ports below 1024 for all users, as containers and pods that publish them have it."""
    lan.host.write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
    # `all` is what is not ephemeral; a socket for each would be more than the user of the tests may have
    lan.host.write("/proc/sys/net/ipv4/ip_local_port_range", "9000 65535")


def _client(
    place: Namespace, user: User, commands: Callable[[User], Path], runtime: Callable[[User], None]
) -> Iterator[Client]:
    runtime(user)
    with tempfile.TemporaryDirectory(prefix="passt-test-") as name:
        os.chown(name, user.uid, user.gid)  # and 0700, as clients make theirs
        made = Client(place, user, commands(user), Path(name))
        yield made
        made.close()


@pytest.fixture
def client(
    lan: Lan, ordinary_user: User, commands: Callable[[User], Path], runtime: Callable[[User], None]
) -> Iterator[Client]:
    """A program of an ordinary user."""
    yield from _client(lan.host, ordinary_user, commands, runtime)
    lan.host.close_sockets()
    lan.peer.close_sockets()


@pytest.fixture
def root_client(
    lan: Lan, root: User, commands: Callable[[User], Path], runtime: Callable[[User], None]
) -> Iterator[Client]:
    """A program of root."""
    yield from _client(lan.host, root, commands, runtime)
    lan.host.close_sockets()
    lan.peer.close_sockets()


@pytest.fixture
def engine(
    lan: Lan, ordinary_user: User, commands: Callable[[User], Path], runtime: Callable[[User], None]
) -> Iterator[Client]:
    """A program like podman: of an ordinary user, who is root in a user and a mount namespace of its own."""
    runtime(ordinary_user)
    place = Within(lan.host, ordinary_user)
    yield from _client(place, ordinary_user, commands, runtime)
    place.close()
    lan.host.close_sockets()
    lan.peer.close_sockets()


@pytest.fixture(scope="module")
def resolver(lan: Lan) -> Iterator[None]:
    """The name server that the host's resolv.conf names."""
    with name_server(lan):
        yield
