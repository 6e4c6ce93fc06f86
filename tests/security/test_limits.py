"""Limits of the state that a guest or a peer can create, and the behaviour at each limit: those without a test beside
their code. docs/security.md lists all of them.
"""

from __future__ import annotations

import ast
import errno
import importlib
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from passt.flow.table import ACTIVE, FREE
from passt.tcp_engine import sock as tcp_sock
from passt.wire.tcp import ACK, RST, SYN
from tests.unit.hostile import Stack, harmless, random_frames
from tests.unit.support import timers
from tests.unit.tcp_support import FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]

PORTS = range(41000, 41100)


def connect(talk: Talk, port: int) -> None:
    """The guest sends SYN from another port."""
    talk.key = talk.key[:-4] + port.to_bytes(2, "big") + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn()


# TCP -----------------------------------------------------------------------------------------------------------------


def test_connections_that_wait_for_the_host_are_limited_and_the_next_ones_refused() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS] * 3
    talk = Talk()
    opening = talk.tcp.opening
    opening.opening_max = 3
    for port in PORTS[:3]:
        connect(talk, port)
    talk.expect_nothing()
    connect(talk, PORTS[3])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"tcp: too many half open": 1} and talk.ctx.flows.count == 3


@pytest.mark.parametrize("end", ["established", "refused", "reset by guest", "unanswered"])
def test_established_and_closed_connections_make_room(end: str) -> None:
    talk = Talk()
    opening = talk.tcp.opening
    opening.opening_max = 1
    if end == "refused":
        FakeSocket.connect_results = [errno.EINPROGRESS]
    talk.syn()
    if end == "established":
        talk.expect(SYN | ACK)
        talk.guest(ACK)
    elif end == "refused":
        talk.host(error=errno.ECONNREFUSED)
    elif end == "reset by guest":
        talk.guest(RST | ACK)
    else:
        talk.wait(11)
    talk.taken()
    assert opening._table.opening == 0
    FakeSocket.connect_results = [0]
    connect(talk, PORTS[0])
    talk.expect(SYN | ACK)
    assert opening._table.opening == 1 and not talk.ctx.drops


def test_established_connections_take_no_room() -> None:
    talk = Talk()
    talk.tcp.opening.opening_max = 1
    for port in PORTS:
        FakeSocket.connect_results = [0]
        connect(talk, port)
        talk.expect(SYN | ACK)
        talk.guest(ACK)
    assert talk.ctx.flows.count == len(PORTS) and not talk.ctx.drops
    assert all(flow is not None and flow.state == ACTIVE for flow in talk.ctx.flows.by_index)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS])
def test_without_a_descriptor_a_connection_is_refused_and_others_stay(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    talk = Talk()
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    established, key = talk.sock, talk.key

    def fail(*_: int) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(tcp_sock, "new_socket", fail)
    connect(talk, PORTS[0])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"tcp socket": 1} and talk.ctx.flows.count == 1
    talk.key, talk.seq, talk.ack = key, 1, 1
    talk.guest(ACK, b"goes on")
    assert bytes(established.sent) == b"goes on"


def test_without_a_descriptor_for_its_timer_a_connection_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk()

    def fail(index: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(timers(talk.ctx), "take", fail)
    talk.syn()
    talk.expect(RST | ACK, ack=1)
    assert talk.sock.resets_on_close, "the host peer must not take it for a connection"
    assert talk.gone and talk.ctx.drops == {"tcp socket": 1}
    assert talk.tcp.opening._table.opening == 0


def test_a_full_table_refuses_connections_and_harms_none() -> None:
    talk = Talk()
    talk.ctx.flows.limit = 1
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    (flow,) = talk.ctx.flows.by_index
    assert flow is not None
    connect(talk, PORTS[0])
    talk.expect(RST | ACK, ack=1)
    assert talk.ctx.drops == {"flow table full": 1} and flow.state != FREE


# Documented limits ---------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "security.md").read_text()
TABLE = DOCUMENT[DOCUMENT.index("## What a guest can use up") : DOCUMENT.index("## Hostile input")]
LIMITS = re.findall(r"`([a-z_.]+)\.([A-Z_]+)` (\d+)", TABLE)


@pytest.mark.parametrize(("module", "name", "value"), LIMITS)
def test_limits_are_those_that_are_written_down(module: str, name: str, value: str) -> None:
    assert getattr(importlib.import_module(f"passt.{module}"), name) == int(value)


def test_all_flow_limits_and_shares_are_written_down() -> None:
    written = {(module, name) for module, name, _ in LIMITS}
    assert len(written) > 30
    for path in (ROOT / "passt").rglob("*.py"):
        module = path.relative_to(ROOT / "passt").with_suffix("").as_posix().replace("/", ".")
        for name in re.findall(
            r"^(\w*(?:FLOWS_MAX|_SHARE|OPEN_MAX|OPENING_MAX|CLIENTS_MAX))\b", path.read_text(), re.M
        ):
            assert (module, name) in written or name == "EVICT_SHARE", f"{module}.{name}"


@pytest.mark.parametrize(("path", "name"), re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DOCUMENT))
def test_tests_that_are_named_exist(path: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / path).read_text()


# Counters and the log ------------------------------------------------------------------------------------------------


def calls_of(tree: ast.AST, where: str = "") -> Iterator[tuple[str, ast.AST]]:
    """All nodes of a module, with the function that they are in."""
    for node in ast.iter_child_nodes(tree):
        name = node.name if isinstance(node, ast.FunctionDef) else where
        yield name, node
        yield from calls_of(node, name)


def test_reasons_of_drops_are_few_whatever_the_guest_sends() -> None:
    """Twice as much of it has hardly more reasons."""
    drops: list[Counter[str]] = []
    for count in 300, 600:
        rng = random.Random(5)
        with harmless():
            stack = Stack(bytes(1 << 20))
            for _ in range(count):
                stack.batch(random_frames(rng))
            drops.append(Counter(stack.ctx.drops))
    few, more = map(set, drops)
    assert few <= more and len(more) <= len(few) + 10 and len(more) < 100, sorted(more)


# Functions that log without a rate limit, since they are bounded otherwise: they run once, at start or at the end; the
# user causes them, by an option or the control socket; or the function limits its own rate.
SPOKEN = {
    "cli.py": {"_fail"},
    "daemon/common.py": {"report", "attach_capture", "go_background", "run", "failed", "_namespace_gone", "detach"},
    "daemon/passt.py": {"build"},
    "daemon/pasta.py": {"tap_gone"},  # ends the process
    "dhcp.py": {"tap_handler"},  # behind a line that is limited
    "ports/forwards.py": {"_restore"},
    "icmp.py": {"probe", "_not_allowed"},  # once
    "sandbox/isolation.py": {"map_ids"},
    "link/pcap.py": {"_end"},  # once
    "linux/netns.py": {"_guarded"},  # an internal error, in opening sockets
    "passt.py": {"_say"},  # counts its lines
    "pasta.py": {"_open_directory"},
    "namespace/init.py": {"_init", "_attempt"},
    "conf/resolv_conf.py": {"_watch"},
}


def test_messages_without_a_rate_limit_cannot_be_caused_by_a_guest() -> None:
    spoken: dict[str, set[str]] = {}
    for path in (ROOT / "passt").rglob("*.py"):
        name = path.relative_to(ROOT / "passt").as_posix()
        if name == "log.py" or (name.startswith(("conf/", "pesto/", "qrap")) and name != "conf/resolv_conf.py"):
            continue
        for where, node in calls_of(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("log.err", "log.warn", "log.info"):
                spoken.setdefault(name, set()).add(where)
    assert spoken == SPOKEN
