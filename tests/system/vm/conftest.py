"""Fixtures of the tests of virtual machines: a host whose resolver is known, an image, a machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..traffic.conftest import open_dir
from ..traffic.support import PEER, PEER6, Lan, new_lan, root_user
from .image import Image, image
from .machine import VirtualMachine
from .support import Passt, Standing

__all__ = ["open_dir"]

RESOLV_CONF = f"nameserver {PEER}\nnameserver {PEER6}\nsearch lan.test corp.test\n"


@pytest.fixture(scope="session")
def lan() -> Iterator[Lan]:
    """A host with both families and a peer, which is its name server."""
    with new_lan(root_user()) as made, tempfile.NamedTemporaryFile("w") as resolv:
        resolv.write(RESOLV_CONF)
        resolv.flush()
        Path(resolv.name).chmod(0o644)
        made.host.run("mount", "--bind", resolv.name, "/etc/resolv.conf")
        yield made


@pytest.fixture
def server(standing: Standing) -> Iterator[Passt]:
    """The passt of a module's `standing`, which must have outlived the test."""
    made = standing.passt()
    yield made
    assert made.alive(), made.said()


@pytest.fixture(scope="session")
def machine_image() -> Image:
    """The image of the test guest."""
    return image()


@pytest.fixture
def machine(machine_image: Image) -> Iterator[VirtualMachine]:
    """A machine that is off."""
    made = VirtualMachine(machine_image)
    yield made
    made.close()
