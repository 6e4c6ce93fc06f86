"""Fixtures of the traffic tests: one host and one guest for as many tests as possible, since starting takes longest."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support import User
from .support import Guest, Lan, new_lan, root_user


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory for all users: pytest's own are for its user only."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


@pytest.fixture(scope="session")
def lan() -> Iterator[Lan]:
    """A host with both families, and a peer."""
    with new_lan(root_user()) as made:
        yield made


@pytest.fixture(scope="module", params=["user", "root"])
def someone(request: pytest.FixtureRequest) -> User:
    """As `anyone`, for a whole module."""
    user: User = request.getfixturevalue("ordinary_user" if request.param == "user" else "root")
    return user


@pytest.fixture(scope="module")
def standing_guest(lan: Lan, someone: User) -> Iterator[Guest]:
    """One guest of `pasta --config-net` for a whole module."""
    with lan.pasta(someone, "-q", "--config-net") as made:
        yield made


@pytest.fixture
def guest(standing_guest: Guest, lan: Lan) -> Iterator[Guest]:
    """The module's guest, which must have outlived the test; sockets of the test end with it."""
    yield from lan.lend(standing_guest)
