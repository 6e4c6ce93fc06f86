"""Fixtures of the unit tests. The fakes themselves are in `support.py`."""

from __future__ import annotations

import pytest

from passt.core.context import Context

from .support import make_context


@pytest.fixture
def ctx() -> Context:
    """A context of fakes with both families on."""
    return make_context()
