"""Fixtures of the unit tests. The fakes themselves are in `support.py`."""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings

from passt.flow.context import Context

from . import support
from .machine_link import LayingLink, MachineLink
from .support import FakeLink, make_context

# Others have the processors, too: that an example took long says nothing
settings.register_profile("beside others", deadline=None, suppress_health_check=[HealthCheck.too_slow])
# A mutant is killed by any example; to shorten that one takes minutes, and says nothing that is read
settings.register_profile("mutants", settings.get_profile("beside others"), phases=[Phase.explicit, Phase.generate])
settings.load_profile("mutants" if "MUTANTS_OF" in os.environ else "beside others")

# Modules whose conversations a namespace has, and a virtual machine
CONVERSATIONS = ("test_tcp", *(f"tcp_engine.test_{part}" for part in ("opening", "table", "window")))
KINDS = (FakeLink, MachineLink, LayingLink)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hold each conversation with all kinds of guest."""
    if metafunc.module.__name__.removeprefix("tests.unit.") in CONVERSATIONS:
        metafunc.fixturenames.append("guest_kind")
        metafunc.parametrize("guest_kind", KINDS, ids=["tap", "machine", "memory"], indirect=True)


@pytest.fixture
def guest_kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The links of contexts made by the test lead to such a guest."""
    monkeypatch.setattr(support, "new_link", request.param)


@pytest.fixture
def ctx() -> Context:
    """A context of fakes with both families on."""
    return make_context()
