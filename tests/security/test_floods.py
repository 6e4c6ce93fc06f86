"""Floods of a second or two; `make security` has those of thirty, and writes docs/floods.md."""

from __future__ import annotations

import resource
from collections.abc import Iterator

import pytest

from ..system.support import User, wait_for
from ..system.traffic.support import GATEWAY, Lan, new_lan, refused, root_user
from .floods import DESCRIPTORS_LEFT, KINDS, MEMORY_LEFT, MEMORY_MAX, SECONDS, SYN_RETRIES, Result, run
from .machine_flood import MACHINE_KINDS, run_machine

pytestmark = pytest.mark.alone

FEW = 128  # descriptors
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


@pytest.mark.parametrize("kind", ["syn", "udp", "ping"])
def test_a_namespace_floods_a_daemon_that_has_few_descriptors(lan: Lan, ordinary_user: User, kind: str) -> None:
    check(run(lan, ordinary_user, kind, SECONDS, haste=True, descriptors=FEW))


def test_connections_beyond_the_descriptors_are_refused_and_none_is_harmed(lan: Lan, ordinary_user: User) -> None:
    with (
        lan.pasta(ordinary_user, "-q", "--config-net", descriptors=FEW) as guest,
        lan.host.listen("127.0.0.1") as server,
    ):
        port = server.getsockname()[1]
        pairs = []
        for _ in range(FEW):
            try:
                near = guest.connect(GATEWAY, port)
            except ConnectionRefusedError:
                break
            pairs.append((near, server.accept()[0]))
        else:
            pytest.fail("it has more connections than descriptors")
        assert len(pairs) >= FEW // 4
        for i, (near, far) in enumerate(pairs):
            near.sendall(b"%d" % i)
            assert far.recv(100) == b"%d" % i
            far.sendall(b"%d" % -i)
            assert near.recv(100) == b"%d" % -i
        for end in pairs.pop():
            end.close()
        wait_for(lambda: not refused(lambda: guest.connect(GATEWAY, port)), "a connection makes room")
        for _, far in pairs:
            far.close()
