"""Fixtures of the tests of links."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .vhost_desk import Desk


@pytest.fixture
def desk() -> Iterator[Desk]:
    """A vhost-user link whose rings run, and the front end."""
    made = Desk()
    made.machine.set_up()
    made.run()
    yield made
    made.close()
