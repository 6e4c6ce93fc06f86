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
from passt.loop.timers import NO_TIMER
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import KEEPALIVE_IDLE
from passt.wire.tcp import ACK, RST, SYN
from tests.sources import parse
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


def test_connections_that_wait_for_the_host_are_limited_and_the_oldest_makes_way() -> None:
    """The guest is told nothing: there was no refusal. Its next SYN begins another one."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = Talk()
    talk.tcp._table.outbound.limit = 6
    for port in PORTS[:4]:
        connect(talk, port)
    talk.end_turn()
    talk.expect_nothing()
    first, *others = FakeSocket.made
    assert first.closed and not any(sock.closed for sock in others), "its destination had half of the limit"
    assert talk.ctx.drops == {"tcp: half open: closed to make room": 1} and talk.ctx.flows.count == 3
    FakeSocket.connect_results = [0]
    connect(talk, PORTS[4])
    talk.expect(SYN | ACK)


@pytest.mark.parametrize("end", ["established", "refused", "reset by guest", "unanswered"])
def test_established_and_closed_connections_make_room(end: str) -> None:
    talk = Talk()
    table = talk.tcp._table
    table.outbound.limit = 1
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
    assert table.opening == 0
    FakeSocket.connect_results = [0]
    connect(talk, PORTS[0])
    talk.expect(SYN | ACK)
    assert table.opening == 1 and not talk.ctx.drops


def test_established_connections_take_no_room() -> None:
    talk = Talk()
    talk.tcp._table.outbound.limit = 1
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


def test_without_a_descriptor_for_its_timer_a_connection_waits_in_the_wheel() -> None:
    talk = Talk()
    timers(talk.ctx).most = 0
    talk.syn()
    talk.expect(SYN | ACK)
    talk.guest(ACK)
    (conn,) = talk.tcp._conns.values()
    talk.wait(1.0)
    assert conn.timer == NO_TIMER and conn.slot is not None
    talk.wait(KEEPALIVE_IDLE)
    talk.expect(ACK)  # its keep-alive, in time
    assert talk.ctx.drops == {}


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

ROOT = Path(os.environ.get("MUTANTS_OF", Path(__file__).resolve().parents[2]))  # the sources as they are written
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


def nodes_of(tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """All nodes of a module, with the function that they are in."""
    left = [("", tree)]
    while left:
        where, parent = left.pop()
        for node in ast.iter_child_nodes(parent):
            name = node.name if isinstance(node, ast.FunctionDef) else where
            left.append((name, node))
            yield name, node


def is_log(function: ast.Attribute) -> bool:
    """Whether it is `log.err`, `log.warn` or `log.info`."""
    where, name = function.value, function.attr
    return isinstance(where, ast.Name) and where.id == "log" and name in ("err", "warn", "info")


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
    "daemon/common.py": {"report", "attach_capture", "run", "failed", "_exit_event", "_namespace_gone"},
    "daemon/detach.py": {"go_background", "detach"},
    "daemon/passt.py": {"build"},
    "daemon/pasta.py": {"tap_gone"},  # ends the process
    "daemon/supervisor.py": {"begin", "_connected"},
    "daemon/following.py": {"_follow", "_move_ports", "_change_namespace"},  # bounded by the rest between two readings
    "link/device_state.py": {"_handle"},  # the front end, once in a migration
    "migration/helper.py": {"_accept", "_failed", "_late"},  # likewise, and the helper
    "migration/helper_socket.py": {"listen"},
    "migration/steps.py": {"_connect", "_describe", "_load", "_off"},
    "dhcp.py": {"tap_handler"},  # behind a line that is limited
    "ports/fit.py": {"fit"},  # at start
    "ports/forwards.py": {"_restore"},
    "icmp.py": {"probe", "_not_allowed"},  # once
    "sandbox/isolation.py": {"map_ids"},
    "link/pcap.py": {"_end"},  # once
    "linux/netns.py": {"_guarded"},  # an internal error, in opening sockets
    "passt.py": {"_say"},  # counts its lines
    "namespace/watch.py": {"_poll"},  # once for each path, at start
    "namespace/init.py": {"_init", "_attempt"},
    "conf/resolv_conf.py": {"_watch"},
}


def test_messages_without_a_rate_limit_cannot_be_caused_by_a_guest() -> None:
    spoken: dict[str, set[str]] = {}
    for path in (ROOT / "passt").rglob("*.py"):
        name = path.relative_to(ROOT / "passt").as_posix()
        if name == "log.py" or (name.startswith(("conf/", "pesto/", "qrap")) and name != "conf/resolv_conf.py"):
            continue
        for where, node in nodes_of(parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and is_log(node.func):
                spoken.setdefault(name, set()).add(where)
    assert spoken == SPOKEN
