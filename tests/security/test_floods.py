"""Floods of a second or two; `make security` has those of thirty, and writes docs/floods.md."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from ..system.support import User
from ..system.traffic.support import Lan, new_lan, root_user
from .floods import DESCRIPTORS_LEFT, KINDS, MEMORY_LEFT, MEMORY_MAX, SECONDS, SYN_RETRIES, Result, run
from .machine_flood import MACHINE_KINDS, run_machine

FRAMES_MIN = 1000  # that make a flood, however slow the machine


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """A laboratory whose host gives up connecting soon, and room for the sockets that the tests hold themselves."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with new_lan(root_user()) as made:
        made.host.write("/proc/sys/net/ipv4/tcp_syn_retries", str(SYN_RETRIES))
        yield made
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def check(result: Result) -> None:
    print(result.row())
    assert result.finished, "the transfer beside the flood"
    assert result.taken >= FRAMES_MIN
    assert result.peak.memory <= MEMORY_MAX
    assert result.after.memory <= result.before.memory + MEMORY_LEFT
    assert result.after.descriptors <= result.before.descriptors + DESCRIPTORS_LEFT
    assert "Traceback" not in result.said and "failed" not in result.said
    assert len(result.said.splitlines()) < 40, "more of the log than a guest should be able to write"


@pytest.mark.parametrize("kind", KINDS)
def test_a_namespace_floods(lan: Lan, ordinary_user: User, kind: str) -> None:
    check(run(lan, ordinary_user, kind, SECONDS, haste=True))


@pytest.mark.parametrize("kind", MACHINE_KINDS)
def test_a_machine_floods(lan: Lan, ordinary_user: User, kind: str) -> None:
    check(run_machine(lan, ordinary_user, kind, SECONDS, haste=True))
