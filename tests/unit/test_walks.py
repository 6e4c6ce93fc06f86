"""A fault stays with its flow, listener, client or callback, wherever one of ours walks over several (`loop/each.py`).

`walks.py` finds all such walks in the package, so that a new one is here without being listed. A walk that you have
written, and that fails here, needs one of these:

    it can be `each`                  use it, with the consequence for the one that fails; then add a function to this
                                      file, marked `@case("passt.module.Class.function")`, that sets up two things or
                                      more, walks over them inside `with stage:`, and asserts what became of
                                      `stage.victim`
    it has a good reason to be a      add it to `PLAIN`, under its reason
    plain loop

Inside `with stage:`, `each` fails for the first thing of the walk, as a defect of ours would; that the others had their
turn is asserted for all cases.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from io import FileIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from passt import addr, log
from passt.conf.options import Options
from passt.daemon import common
from passt.daemon.lan import LanNeighbours
from passt.drops import Drop
from passt.flow.context import Context
from passt.flow.idle import IdleFlow, IdleFlows
from passt.flow.room import TABLE
from passt.flow.source import Sources
from passt.flow.spare import Spare
from passt.flow.table import FREE, RECENT, Flow
from passt.igmp import MEMBERSHIP_INTERVAL
from passt.link import trace
from passt.linux import inotify
from passt.linux.tcpinfo import LAST_ACK_RECV, LAST_DATA_RECV
from passt.loop.directories import Changes
from passt.loop.each import each
from passt.loop.reactor import EPOLLIN, TYPE_UDP, Reactor
from passt.loop.timers import RETRY
from passt.policy.rules import Listener, Rule
from passt.policy.settings import Settings
from passt.ports.forwards import Forwards, Refused
from passt.ports.listen import Listeners
from passt.splice.lingering import POLL, Lingering, _Rest
from passt.splice.refusal import REFUSE, Refusals
from passt.splice.udp import UdpSplice
from passt.tap import Tap
from passt.tcp_engine.conn import TcpConn
from passt.udp import Udp
from passt.udp_engine.dns import QUERY_TIMEOUT
from passt.udp_engine.flow import UdpFlow
from passt.udp_engine.group_sender import GroupFlow
from passt.udp_engine.io import PAUSE, Pauses
from passt.udp_engine.sock import Client
from passt.wire.checksum import PROTO_TCP, PROTO_UDP
from passt.wire.igmp import TO_EXCLUDE, Record, Report
from passt.wire.tcp import ACK, RST, SYN
from passt.wire.virtio import VNET

from . import walks
from .control.test_server import Rig as ControlRig
from .control.test_server import gone
from .ports.test_scan import STUB, TO, UO, World
from .ports.test_scan import T as AUTO_TCP
from .ports.test_scan import U as AUTO_UDP
from .support import (
    CONFIG,
    GATEWAY4,
    GUEST4,
    GUEST_MAC,
    T0,
    elapse,
    free_ports,
    make_context,
    reactor,
    reconfigure,
    stage_faults,
    timers,
)
from .tcp_support import FakeSocket, Talk, fake_sockets, open_connection
from .test_igmp import Lab as IgmpLab
from .test_tap import FakeTap, ip4, tcp
from .udp_engine.test_dns import A, query, resolver_sockets
from .udp_engine.test_dns import Talk as DnsTalk
from .udp_engine.test_group_sender import send_to_group
from .udp_engine.test_groups import GROUP, GroupLab, group_lab
from .udp_engine.test_groups import OTHER as OTHER_GROUP
from .udp_support import Lab

__all__ = ["fake_sockets", "resolver_sockets"]  # fixtures of all tests here

WALKS = walks.find(walks.sources())
EACH = {f"{walk}": walk for walk in WALKS if walk.is_each}

MUTANT = re.compile(r"\bx(?:ǁ[^ǁ]+ǁ|_)(\w+?)__mutmut_(?:orig|\d+)\b")  # the name that mutmut gives one, of a function

# Loops that stay loops, by reason
PLAIN = {
    "`_attempt` takes each step of one connection, and records its fault": (
        "passt.migration.steps.Migration._save over self._moving.established()",
        "passt.migration.steps.Migration._room over ended",
        "passt.migration.steps.Migration._room over lost",
    ),
    "whoever asked for room is refused then, and that is counted: a fault ends the search": (
        "passt.flow.room.Room.make over zip(self._ways, _ENDED, strict=True)",
    ),
    "it is the start of the program: a fault ends that": (
        "passt.control.server.Control.__init__ over enumerate(sockets)",
        "passt.ports.listen.Listeners.__init__ over opened",
        "passt.ports.fit.by_priority over enumerate(rules)",
        "passt.ports.fit.by_priority over wanted",
        "passt.ports.fit.by_priority over zip(rules, chosen, strict=True)",
        "passt.ports.fit._count over rules",
        "passt.ports.sockets.open_side over listeners",
        "passt.ports.sockets._set_owner over [listener for listener in listeners if listener.rule.proto != PROTO_TCP]",
    ),
    "it is one request of a control client, met as a whole or not at all: the fault is told to that client": (
        "passt.control.json_api.Api._changed over sorted(outcome.added.items(), key=_number)",
        "passt.control.json_api.Api._changed over sorted(outcome.removed.items(), key=_number)",
        "passt.control.json_api.Api._changed over outcome.present",
        "passt.ports.forwards.Forwards._plan over removed",
        "passt.ports.forwards.Forwards._plan over added",
        "passt.ports.forwards.Forwards._conflicting over plan.open",
        "passt.ports.forwards.Forwards._conflicting over rules",
        "passt.ports.forwards.Forwards._conflicting over wanted.get((rule.proto, rule.outbound, port), ())",
        "passt.ports.forwards._Successors.__init__ over sorted(rules, key=lambda r: r.first)",
    ),
    "all or none, as its docstring promises: what was done is undone, and the caller is told": (
        "passt.ports.listen.Listeners.open over wanted",
        "passt.ports.listen.Listeners.watch over listeners",
        "passt.ports.sockets.open_ports over left",
    ),
    "it puts the values of one record, whose maker a fault ends": (
        "passt.lean.records._init.__init__ over zip(setters, given, strict=True)",
    ),
    "it computes numbers, sets or log lines, and does nothing to any of them": (
        "passt.flow.neighbours.Neighbours._with_flows over keys",
        "passt.flow.source.Sources.in_use over self._ctx.flows.by_index",
        "passt.ports.listen.Listeners.hand_over over handed",
        "passt.ports.listen.Listeners._reopen over lost",
        "passt.ports.forwards.Forwards._check_work over wanted",
        "passt.ports.forwards.Forwards._check_descriptors over rules",
        "passt.ports.scan.Scanner._changed over self._own",
        "passt.ports.scan.Scanner._within_limit over new",
        "passt.ports.scan.Scanner._sockets over rules",
        "passt.ports.scan.Scanner._add over new",
        "passt.ports.scan._overlaps over fixed",
    ),
    "it takes things out of a queue, which cannot fail; `each` handles them": (
        "passt.ports.udp_in.UdpIn._deliver_misdelivered over misdelivered and left",
        "passt.tcp_engine.deadlines.Deadlines._look over self._then.pop(at)",
        "passt.tcp_engine.wheel.Wheel._turn over order and (order[0] <= now or not slots[order[0]].conns)",
        "passt.tcp_engine.wheel.Wheel._turn over conns and len(due) < BATCH",
        "passt.tcp_engine.window.TcpAck.timer_handler over waiting and waiting[0][0] <= now + COALESCE",
        "passt.tcp_engine.keepalive.KeepAlive.timer_handler over waiting and waiting[0][0] <= now + COALESCE",
    ),
    "it looks for the first that will do, for one flow, whose end a fault is": (
        "passt.udp_engine.outbound.Outbound.open over self.leading.get(sport, ()) if interface is None else ()",
    ),
    "they are the fields of one object, which is not made then": (
        "passt.lean.records._init.__init__ over zip(setters, given, strict=True)",
    ),
    "all of them are of one flow, whose end a fault is": (
        "passt.udp_engine.dns.Dns._report over list(flow.queries.values())",
    ),
    "all of them share one bind(2), whose caller a fault ends; what was shared is not shared any more": (
        "passt.udp_engine.groups.bind_beside over sharing",
    ),
    "it is a generator, which has its own `try` for each (tests/unit/control/test_metrics.py)": (
        "passt.control.metrics.flows over index < len(by_index)",
    ),
}


class Staged(Exception):
    """A defect of ours, staged."""


class Stage:
    """Where a walk fails for its first item while this is entered. `stack` closes what a case opens."""

    def __init__(self, walk: walks.Walk, stack: ExitStack, tmp_path: Path) -> None:
        self._walk, self.walk = walk, str(walk)
        self.stack, self.tmp_path = stack, tmp_path
        self.monkeypatch = pytest.MonkeyPatch()  # undone on leaving
        self.victim: Any = None
        self.others: tuple[Any, ...] = ()
        self.served: list[Any] = []

    def __enter__(self) -> None:
        for name, module in list(sys.modules.items()):
            if name.startswith("passt.") and vars(module).get("each") is each:
                self.monkeypatch.setattr(module, "each", self._each)

    def __exit__(self, *_: object) -> None:
        self.monkeypatch.undo()

    def _each(self, items: Iterable[Any], fn: Callable[..., Any], fault: Callable[..., Any], *args: Any) -> None:
        frame = sys._getframe(1)
        function = frame.f_code.co_qualname.replace("<locals>.", "")
        written = MUTANT.sub(r"\1", function)
        line = frame.f_lineno if written == function else self._walk.line  # mutants stand on other lines
        here = f"{frame.f_globals['__name__']}.{written}", line
        things = tuple(items)
        if here != (self._walk.where, self._walk.line) or len(things) < 2 or self.others:
            each(things, fn, fault, *args)
            return
        self.victim, self.others = things[0], things[1:]

        def handle(thing: Any, *more: Any) -> None:
            if thing is self.victim:
                raise Staged
            fn(thing, *more)
            self.served.append(thing)

        each(things, handle, fault, *args)


Case = Callable[[Stage], None]
CASES: dict[str, Case] = {}


def case(*where: str) -> Callable[[Case], Case]:
    """The function sets up, and walks, one of these."""

    def mark(function: Case) -> Case:
        for name in where:
            assert name not in CASES
            CASES[name] = function
        return function

    return mark


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text, **_: None)


@pytest.mark.parametrize("name", EACH)
def test_a_fault_stays_with_one(name: str, tmp_path: Path) -> None:
    walk = EACH[name]
    assert walk.where in CASES, f"{walk.where} walks with `each`, and has no case in this file"
    with ExitStack() as stack:
        stage = Stage(walk, stack, tmp_path)
        CASES[walk.where](stage)
    assert stage.others, "the case did not come here with two things or more"
    assert stage.served == list(stage.others), "the others were kept from being served"


def test_plain_loops_have_their_reasons() -> None:
    found = {str(walk) for walk in WALKS if not walk.is_each}
    known = {walk for listed in PLAIN.values() for walk in listed}
    assert found - known == set(), "a fault of one would keep the others from being served: see above what to do"
    assert known - found == set(), "these are gone"


def test_cases_are_of_walks() -> None:
    assert CASES.keys() == {walk.where for walk in EACH.values()}


# Connections ---------------------------------------------------------------------------------------------------------


def connections() -> tuple[Talk, list[TcpConn]]:
    """Two, established."""
    talk = open_connection()
    talk.key = talk.key[:-4] + b"\x9c\x41" + talk.key[-2:]
    talk.seq = talk.ack = 0
    talk.syn()
    talk.expect(SYN | ACK, seq=0, ack=1)
    talk.guest(ACK)
    stage_faults(talk.ctx)
    return talk, list(talk.tcp._conns.values())


def assert_reset(talk: Talk, conn: Any) -> None:
    """It ended as a fault, and the guest and the host were told; it is counted."""
    assert conn.state == FREE and conn.key not in talk.tcp._conns
    assert talk.ctx.flows.closed["tcp", "fault"] == talk.ctx.drops["fault"] == 1
    assert any(frame[14 + 20 + 13] & RST for frame in talk.ctx.link.frames)  # type: ignore[attr-defined]
    talk.end_turn()
    assert reactor(talk.ctx).retired == []


@case("passt.tcp.Tcp.resume")
def stalled_connections(stage: Stage) -> None:
    talk, conns = connections()
    talk.tcp._out.turns.waiting = {conn.index: conn for conn in conns}
    with stage:
        talk.tcp.resume(talk.now)
    assert_reset(talk, stage.victim)


@case("passt.tcp_engine.table.TcpTable.forget")
def the_guest_leaves(stage: Stage) -> None:
    talk, _ = connections()
    with stage:
        talk.tcp._table.forget()
    assert_reset(talk, stage.victim)
    assert talk.ctx.flows.count == 0


@case("passt.tcp_engine.eviction.Eviction._give")
def half_open_connections_make_room(stage: Stage) -> None:
    talk = Talk()
    stage_faults(talk.ctx)
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk.syn()
    talk.accept("198.51.100.9")
    with stage:
        assert talk.ctx.room.make(TABLE, talk.now)
    assert talk.ctx.flows.closed["tcp", "fault"] == talk.ctx.flows.closed["tcp", "evicted"] == 1
    assert talk.ctx.flows.count == 0


@case("passt.tcp_engine.keepalive.KeepAlive.timer_handler")
def keep_alive_probes(stage: Stage) -> None:
    talk, conns = connections()
    keepalive = talk.tcp._keepalive
    for conn in conns:
        conn.sock.info[LAST_ACK_RECV] = conn.sock.info[LAST_DATA_RECV] = 60_000
        keepalive.probed(conn, talk.now + 60)
    with stage:
        talk.timers.services.fire(keepalive._timer)
    assert_reset(talk, stage.victim[-1])
    assert talk.timers.services.deadlines[keepalive._timer] is not None, "the other waits for its peer"


@case("passt.tcp_engine.pace.Pace._over")
def acknowledgements_that_were_held(stage: Stage) -> None:
    talk, conns = connections()
    pace = talk.tcp._in._pace
    for conn in conns:
        pace.hold(conn, talk.now)
    with stage:
        talk.timers.services.fire(pace._timer)
    assert_reset(talk, stage.victim)
    assert not pace._held


@case("passt.tcp_engine.reminders.Reminders.timer_handler")
def reminders_of_a_lossy_link(stage: Stage) -> None:
    talk, conns = connections()
    reminders = talk.tcp._reminders
    for conn in conns:
        reminders.lost(conn, talk.now)
    with stage:
        talk.timers.services.fire(reminders._timer)
    assert_reset(talk, stage.victim.conn)
    assert [entry.conn for entry in reminders.lossy.values()] == [c for c in conns if c is not stage.victim.conn]


@case("passt.tcp_engine.wheel.Wheel._turn")
def far_deadlines(stage: Stage) -> None:
    talk, conns = connections()
    deadlines = talk.tcp._table.deadlines
    talk.timers.most = 0
    for conn in conns:
        deadlines.forget(conn)
        conn.look_at = 0.0
    talk.timers.free.clear()
    for conn in conns:
        conn.look_at = 0.0  # its last look is over
        deadlines.set(conn, talk.now + 10.0, talk.now)
    services = talk.timers.services
    with stage:
        services.fire(deadlines._wheel._timer)
    assert_reset(talk, stage.victim)
    (other,) = stage.others
    assert other.slot is not None, "it has its next look"


@case("passt.tcp_engine.deadlines.Deadlines._look")
def near_deadlines(stage: Stage) -> None:
    talk, conns = connections()
    deadlines = talk.tcp._table.deadlines
    for conn in conns:
        deadlines.set(conn, talk.now + 0.01, talk.now)
    services = talk.timers.services
    with stage:
        services.fire(deadlines._timer)
    assert_reset(talk, stage.victim)
    talk.wait(0.1)
    deadlines.set(conns[1], talk.now + 0.01, talk.now)
    assert services.deadlines[deadlines._timer] is not None, "there is a next time"


@case("passt.tcp_engine.window.TcpAck.timer_handler")
def delayed_acknowledgements(stage: Stage) -> None:
    talk, conns = connections()
    acks = talk.tcp._acks
    for conn in conns:
        acks.queue_delayed(conn, talk.now)
    services = talk.timers.services
    with stage:
        services.fire(acks._timer)
    assert_reset(talk, stage.victim)
    assert not conns[1].delack_at
    acks.queue_delayed(conns[1], talk.now)
    assert services.deadlines[acks._timer] is not None, "there is a next time"


def test_the_end_of_a_connection_fails_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even RST cannot be sent: nothing is left of it all the same."""
    talk, conns = connections()
    monkeypatch.setattr(talk.tcp._out, "reset", lambda conn: 1 // 0)
    talk.tcp.fault_key(conns[0].key)
    assert conns[0].state == FREE and conns[1].state != FREE
    assert talk.ctx.flows.closed["tcp", "fault"] == 1 and talk.ctx.flows.count == 1


# UDP, ping, queries --------------------------------------------------------------------------------------------------


class Origin(IdleFlow):
    """A flow that knows its client."""

    client: Any = None
    evicted = Drop.UDP_EVICTED


def idle_flows(stage: Stage, ctx: Context, flows: IdleFlows[Any], made: Iterable[IdleFlow]) -> list[Any]:
    """Those of `made`, in the table, with sockets."""
    stage_faults(ctx)
    kept = list(made)
    for flow in kept:
        flows.add(flow, stage.stack.enter_context(socket.socket(type=socket.SOCK_DGRAM)), T0)
    return kept


def plain_flows(stage: Stage) -> tuple[Context, IdleFlows[Origin], list[Any]]:
    ctx = make_context()
    flows: IdleFlows[Origin] = IdleFlows(ctx, TYPE_UDP, 100)
    return ctx, flows, idle_flows(stage, ctx, flows, (Origin(b"%d" % i, 60.0, T0) for i in range(20)))


def udp_flows(stage: Stage) -> tuple[Udp, list[Any]]:
    udp = Udp(make_context())
    ports = ((40000 + i).to_bytes(2, "big") + b"\0\7" for i in range(2))
    flows = idle_flows(stage, udp._ctx, udp._flows, (UdpFlow(GUEST4 + GATEWAY4 + p, GATEWAY4, T0) for p in ports))
    for flow in flows:
        flow.build_header(bytes(6), bytes(6), 1500)
    return udp, flows


def assert_closed(ctx: Context, flow: Flow) -> None:
    assert flow.state == FREE and flow not in ctx.flows.by_index
    assert ctx.flows.closed[flow.label, "fault"] == ctx.drops["fault"] == 1


@case("passt.flow.idle.IdleFlows.close_all")
def all_flows_end(stage: Stage) -> None:
    ctx, flows, _ = plain_flows(stage)
    with stage:
        flows.close_all("guest gone")
    assert_closed(ctx, stage.victim)
    assert ctx.flows.count == 0


@case("passt.flow.idle.IdleFlows.sweep")
def idle_flows_end(stage: Stage) -> None:
    ctx, _, made = plain_flows(stage)
    made[-1].last = T0 + 30
    with stage:
        timers(ctx).services.fire(0)
    assert_closed(ctx, stage.victim)
    assert ctx.flows.count == 1 and timers(ctx).services.deadlines == [T0 + 90], "the sweep of the last one"


@case("passt.flow.idle.IdleFlows._close_oldest")
def flows_make_room(stage: Stage) -> None:
    ctx, flows, _ = plain_flows(stage)
    with stage:
        flows._close_oldest(flows.close, False)
    assert_closed(ctx, stage.victim)
    assert ctx.flows.closed["", "evicted"] == 1 and ctx.flows.count == 18


@case("passt.flow.idle.IdleFlows._give")
def idle_flows_make_room(stage: Stage) -> None:
    ctx, _, _ = plain_flows(stage)
    with stage:
        assert ctx.room.make(TABLE, T0 + RECENT)
    assert_closed(ctx, stage.victim)
    assert ctx.flows.closed["", "evicted"] == 1 and ctx.flows.count == 18


def test_closing_a_flow_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its place in the tables is free all the same, and the others are closed."""
    with ExitStack() as stack:
        ctx, flows, made = plain_flows(cast(Any, SimpleNamespace(stack=stack)))
        monkeypatch.setattr(Origin, "sockets", lambda flow: [1 // 0] if flow is made[0] else ())
        flows.close_all("guest gone")
        assert ctx.flows.count == 0 and not flows.by_key and ctx.drops["fault"] == 1


@case("passt.flow.headers.Headers._step")
def another_mac_for_flows(stage: Stage) -> None:
    udp, flows = udp_flows(stage)
    ctx = udp._ctx
    ctx.neighbours.sender(b"\2abcde")
    with stage:
        ctx.neighbours.learn(GUEST4, b"\2abcde")
    assert stage.victim is flows[0] and ctx.drops["fault"] == 1
    assert flows[1].hdr[10:16] == b"\2abcde"


@case("passt.flow.neighbours.Neighbours._deliver", "passt.flow.neighbours.Neighbours._solicit_again")
def what_waits_for_the_guest(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    ctx.guest.mac = addr.BROADCAST_MAC
    done: list[str] = []
    for name in ("first", "second"):
        deliver, give_up = (lambda now, name=name, what=what: done.append(f"{what} {name}") for what in ("got", "lost"))
        assert ctx.neighbours.hold(GUEST4, deliver, give_up, T0)
    with stage:
        if "_deliver" in stage.walk:
            ctx.neighbours.sender(GUEST_MAC)
            reactor(ctx).end_turn(T0)
        else:
            elapse(ctx, T0, 35)
    assert [what.split()[1] for what in done] == ["second"] and ctx.drops["fault"] == 1


@case("passt.flow.neighbours.Neighbours._announce")
def our_addresses_are_announced(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    told: list[str] = []
    ctx.services.on_link_up += [lambda: told.append("first"), lambda: told.append("second")]
    with stage:
        ctx.neighbours.link_up(T0)
        elapse(ctx, T0, 1)
    assert told == ["second"] and ctx.drops["fault"] == 1


@case("passt.daemon.lan.LanNeighbours._announce")
def macs_of_neighbours_are_announced(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    table = SimpleNamespace(fd=77, ask=lambda tables: None, asking=False, more=False)
    service = LanNeighbours(ctx, cast(Any, table))
    neighbours = [addr.packed(f"192.0.2.{n}") for n in (77, 78)]
    told: list[bytes] = []
    ctx.services.announce4 = told.append
    for a in neighbours:
        ctx.lan.tell(a)
        ctx.lan.note(a, b"\2abcde")
    with stage:
        service._show(T0)
    assert told == [neighbours[1]] and ctx.drops["fault"] == 1


@case("passt.flow.source.Sources._step")
def a_look_at_flows(stage: Stage) -> None:
    talk, conns = connections()
    sources = Sources(talk.ctx)
    for conn in conns:
        conn.sock.getsockname = lambda: ("192.0.2.77", 4000)
    sources.check([addr.packed("198.51.100.2")], [4, 16], T0)
    with stage:
        sources._step(T0)
    assert_reset(talk, stage.victim)
    assert len(conns) == 2


@case("passt.udp.Udp.end")
def listeners_close(stage: Stage) -> None:
    udp, _ = udp_flows(stage)
    with stage:
        udp.end([cast(Any, SimpleNamespace(to=port)) for port in (40000, 40001)])
    assert_closed(udp._ctx, stage.victim)
    assert udp._ctx.flows.closed["udp", "listener gone"] == 1


@case("passt.udp.Udp.free_ports")
def listeners_are_about_to_open(stage: Stage) -> None:
    udp, _ = udp_flows(stage)
    with stage:
        udp.free_ports((40000, 40001))
    assert_closed(udp._ctx, stage.victim)
    assert udp._ctx.flows.closed["udp", "made way for a listener"] == 1


@case("passt.splice.lingering.Lingering._look")
def spliced_connections_that_were_reset(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    aborted: list[Any] = []
    fault_at = partial(_noted, ctx, aborted)
    made = Lingering(ctx, lambda half: None, lambda conn, why: aborted.append(conn), fault_at)
    conns = [SimpleNamespace(index=i) for i in range(2)]
    half: Any = SimpleNamespace(dst=None)
    made.rests.update({conn.index: _Rest(cast(Any, conn), half, "reset by peer", False) for conn in conns})
    made._timers.arm(made._timer, T0)
    made._is_over = lambda rest, now: True  # type: ignore[method-assign]
    with stage:
        timers(ctx).services.fire(made._timer)
    assert aborted == [stage.victim, conns[1]] and ctx.drops["fault"] == 1
    assert timers(ctx).services.deadlines[made._timer] == T0 + POLL, "the table has both, since nothing released them"


def _noted(ctx: Context, ended: list[Any], conn: Any, e: Exception) -> None:
    ctx.drops[Drop.FAULT] += 1
    ended.append(conn)


@case("passt.splice.udp.UdpSplice.end")
def listeners_of_spliced_flows_close(stage: Stage) -> None:
    ctx = make_context()
    splice = UdpSplice(ctx)
    made = idle_flows(stage, ctx, splice._flows, (Origin(b"%d" % i, 60.0, T0) for i in range(2)))
    for flow in made:
        flow.client = SimpleNamespace(listener="it")
    with stage:
        splice.end(cast(Any, {"it"}))
    assert_closed(ctx, stage.victim)
    assert ctx.flows.count == 0


@case("passt.udp_engine.io.Pauses._resume")
def paused_sockets(stage: Stage) -> None:
    ctx, flows, made = plain_flows(stage)
    taken: list[Any] = []
    pauses = Pauses(ctx, lambda flow, end, now: taken.append(flow), flows.fault_at)
    for flow in made[:2]:
        pauses.after(8, flow, cast(Any, flow), T0)
    with stage:
        timers(ctx).services.fire(pauses._timer, T0 + PAUSE)
    assert_closed(ctx, stage.victim[0])
    assert taken == [made[1]] and reactor(ctx).events[made[1].fd] & EPOLLIN


def queries() -> DnsTalk:
    """Two flows that have asked a resolver each."""
    talk = DnsTalk(A)
    stage_faults(talk.ctx)
    for ident in (1, 2):
        talk.asks(query(ident), port=40000 + ident)
    return talk


@case("passt.udp_engine.dns.Dns.timer_handler")
def queries_without_an_answer(stage: Stage) -> None:
    talk = queries()
    dns = talk.udp.dns
    with stage:
        timers(talk.ctx).services.fire(dns._timer, T0 + QUERY_TIMEOUT)
    assert_closed(talk.ctx, stage.victim.flow)
    assert list(dns._waiting) == list(stage.others)
    assert timers(talk.ctx).services.deadlines[dns._timer] == T0 + 2 * QUERY_TIMEOUT


# Listeners and ports -------------------------------------------------------------------------------------------------


@case("passt.flow.spare.Spare._resume")
def listeners_at_rest(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    spare = Spare(ctx)
    stage.stack.callback(spare.close)
    for fd in (100, 101):
        ctx.reactor.watch(fd, 1, 0, EPOLLIN)
        spare.rest(fd, T0)
    services, events = timers(ctx).services, reactor(ctx).events
    with stage:
        services.fire(spare._timer, T0 + 1)
    assert events[stage.victim] == 0 and spare._resting == {stage.victim}
    assert services.deadlines[spare._timer] == T0 + 1 + RETRY
    services.fire(spare._timer)
    assert events == {100: EPOLLIN, 101: EPOLLIN} and not spare._resting, "not at rest for ever"


def listeners(stage: Stage, *, proto: int = PROTO_UDP, udp_in: Any = None) -> tuple[Context, Listeners, Rule]:
    """Two ports of a rule, with two listeners each."""
    ctx = make_context()
    stage_faults(ctx)
    rule = Rule("-u x", proto, outbound=False, first=7000, last=7001, to=7000)
    opened = [Listener(rule, port, stage.stack.enter_context(socket.socket())) for port in (7000, 7000, 7001, 7001)]
    taker: Any = udp_in or SimpleNamespace(begin=lambda _: None, end=lambda _: None)
    made = Listeners(ctx, tcp=None, tcp_splice=cast(Any, None), udp_in=taker, namespace=None, opened=opened)
    stage.stack.callback(made.close)
    return ctx, made, rule


@case("passt.ports.listen.Listeners.remove_all", "passt.ports.listen.Listeners._remove")
def ports_close(stage: Stage) -> None:
    ctx, made, rule = listeners(stage)
    with stage:
        made.remove_all([(rule, 7000), (rule, 7001)])
    assert ctx.drops["fault"] == 1 and 7001 not in made.ports(rule)


@case("passt.ports.listen.Listeners.hand_over")
def ports_are_handed_over(stage: Stage) -> None:
    ctx, made, rule = listeners(stage)
    successor = replace(rule, target=addr.packed("192.0.2.77"))
    with stage:
        made.hand_over([(rule, 7000, successor), (rule, 7001, successor)])
    assert ctx.drops["fault"] == 1 and 7001 in made.ports(successor)


@case("passt.ports.listen.Listeners.close")
def all_listeners_close(stage: Stage) -> None:
    ctx, made, _ = listeners(stage)
    with stage:
        made.close()
    assert ctx.drops["fault"] == 1 and len(reactor(ctx).retired) == 3


@case("passt.ports.listen.Listeners.watch")
def new_listeners_are_not_watched(stage: Stage) -> None:
    ctx, made, rule = listeners(stage)
    new = [Listener(replace(rule, first=p, last=p), p, stage.stack.enter_context(socket.socket())) for p in (1, 2)]
    stage.monkeypatch.setattr(ctx.reactor, "watch", lambda *_: 1 // 0)
    with stage, pytest.raises(ZeroDivisionError):
        made.watch(new)
    assert ctx.drops["fault"] == 1 and new[1].sock.fileno() < 0 and not made.ports(new[0].rule)


@case("passt.ports.forwards.Forwards._open")
def rules_are_refused(stage: Stage) -> None:
    ctx, _, rule = listeners(stage)
    new = [Listener(rule, port, stage.stack.enter_context(socket.socket())) for port in (7000, 7001)]

    def watch(opened: list[Listener]) -> None:
        raise OSError(28, "no space")

    fake = SimpleNamespace(
        remove_all=list, open=lambda wanted: (new if wanted else [], []), watch=watch, add_all=lambda wanted: []
    )
    forwards = Forwards(ctx, cast(Any, fake), cast(Any, None))
    with stage, pytest.raises(Refused, match="watch"):
        forwards._open([(rule, 7000), (rule, 7001)], [])
    assert ctx.drops["fault"] == 1 and new[1].sock.fileno() < 0


@case("passt.ports.scan.Scanner._changed")
def automatic_rules_go(stage: Stage) -> None:
    w = World(TO)
    stage_faults(w.ctx)
    w.pinned["host", PROTO_TCP] = {(STUB, 53), (addr.packed("127.0.0.54"), 54)}
    w.scanner.start(T0)
    assert len(w.scanner._own) == 2
    with stage:
        reconfigure(w.ctx, forwards=())
    (left,) = (own for own, ports in w.ours.items() if ports)
    assert left == stage.victim and w.ctx.drops["fault"] == 1


@case(
    "passt.ports.scan.Scanner._follow_all",
    "passt.ports.scan.Scanner._follow",
    "passt.ports.scan.Scanner._follow_pinned",
)
def automatic_rules_follow(stage: Stage) -> None:
    w = World(AUTO_TCP, AUTO_UDP, TO, UO)
    stage_faults(w.ctx)
    w.pinned["host", PROTO_TCP] = {(STUB, 53), (addr.packed("127.0.0.54"), 54)}
    w.binds("ns", PROTO_TCP, 80)
    w.binds("ns", PROTO_UDP, 81)
    w.binds("host", PROTO_TCP, 22)
    with stage:
        w.scanner.start(T0)
    assert w.ctx.drops["fault"] == 1
    before = sum(map(len, w.ours.values()))
    w.look()
    assert before < sum(map(len, w.ours.values())), "the next look finds what the one has missed"


def sent_to_listener(stage: Stage) -> tuple[Lab, Listener, list[bytes]]:
    """A listener with a datagram of two clients each, and what is handed on."""
    lab = Lab(stage.stack)
    stage_faults(lab.ctx)
    made = lab.listen()
    for text in (b"one", b"two"):
        lab.client(made).send(text)
    given: list[bytes] = []
    lab.udp_in._dispatch = (  # type: ignore[method-assign]
        lambda client, mv, frames, *_: given.append(bytes(mv[frames[0] : frames[1]]))
    )
    return lab, made, given


@case("passt.splice.refusal.Refusals._resume")
def listeners_that_have_refused(stage: Stage) -> None:
    refusing_listeners(stage, lambda refusals, made: refusals._resume(T0 + REFUSE))


@case("passt.splice.refusal.Refusals.end")
def listeners_that_lead_elsewhere(stage: Stage) -> None:
    refusing_listeners(stage, lambda refusals, made: refusals.end(made))


def refusing_listeners(stage: Stage, end: Callable[[Refusals, list[Listener]], None]) -> None:
    lab = Lab(stage.stack)
    stage_faults(lab.ctx)
    refusals = Refusals(lab.ctx)
    made = [lab.listen(outbound=True) for _ in range(2)]
    for listener in made:
        assert refusals.refuse(listener, T0)
    with stage:
        end(refusals, made)
    assert lab.ctx.drops["fault"] == 1 and not refusals._until
    with pytest.raises(OSError, match="not connected"):
        made[1].sock.getpeername()


@case("passt.ports.udp_in.UdpIn._receive")
def datagrams_of_two_clients(stage: Stage) -> None:
    lab, made, given = sent_to_listener(stage)
    with stage:
        lab.udp_in.sock_handler(made, T0)
    assert given == [b"two"] and lab.ctx.drops["fault"] == 1


@case("passt.ports.udp_in.UdpIn._deliver_misdelivered")
def datagrams_that_came_early(stage: Stage) -> None:
    lab, made, given = sent_to_listener(stage)
    client = Client(made, GATEWAY4, 7, GUEST4, 0)
    lab.udp_in._outbound.misdelivered += [(client, b"three"), (client, b"four")]
    with stage:
        lab.udp_in._deliver_misdelivered(T0)
    assert given == [b"four"] and lab.ctx.drops["fault"] == 1 and not lab.udp_in._outbound.misdelivered


@case("passt.ports.udp_in.UdpIn.end")
def udp_listeners_end(stage: Stage) -> None:
    lab = Lab(stage.stack)
    stage_faults(lab.ctx)
    with stage:
        lab.udp_in.end([lab.listen(to=7), lab.listen(to=7)])
    assert lab.udp_in._outbound.leading == {7: [stage.victim]} and lab.ctx.drops["fault"] == 1


# Control clients -----------------------------------------------------------------------------------------------------


def clients(stage: Stage) -> tuple[ControlRig, list[socket.socket]]:
    rig = ControlRig(stage.tmp_path)
    stage.stack.callback(rig.close)
    stage_faults(rig.ctx)
    return rig, [rig.connect(), rig.connect()]


@case("passt.control.server.Control._serve")
def clients_ask_at_once(stage: Stage) -> None:
    rig, (one, two) = clients(stage)
    for client in (one, two):
        client.send(b"abc\n")
    with stage:
        rig.turn()
    fault, served = (one, two) if stage.victim[0] == 0 else (two, one)
    assert served.recv(100) == b"cba\n" and fault.recv(100).startswith(b"refused: internal error")
    assert gone(fault) and rig.ctx.drops["fault"] == 1


@case("passt.control.server.Control._expire")
def clients_are_too_slow(stage: Stage) -> None:
    rig, _ = clients(stage)
    with stage:
        rig.expire(time.monotonic() + 1000)
    assert rig.ctx.drops["fault"] == rig.ctx.drops["control: too slow"] == 1
    assert not any(rig.control._clients)


@case("passt.control.server.Control.close")
def the_control_sockets_close(stage: Stage) -> None:
    rig, _ = clients(stage)
    with stage:
        rig.control.close()
    assert rig.ctx.drops["fault"] == 1
    rig.control.close = lambda: None  # type: ignore[method-assign]
    for listening, _ in rig.control._sockets:
        stage.stack.callback(listening.sock.close)


# Callbacks -----------------------------------------------------------------------------------------------------------


def loop(stage: Stage) -> tuple[Reactor, list[tuple[int, Exception]]]:
    made, faults = Reactor(), list[tuple[int, Exception]]()
    stage.stack.callback(made.close)
    made.on_fault = lambda ref, e, now: faults.append((ref, e))
    return made, faults


@case("passt.loop.reactor.Reactor.turn")
def the_end_of_a_turn(stage: Stage) -> None:
    made, faults = loop(stage)
    called: list[str] = []
    made.at_turn_end += [lambda now: called.append("a"), lambda now: called.append("b")]
    for name in ("c", "d"):
        made.between_turns(lambda now, name=name: called.append(name))  # type: ignore[misc]
    for name in ("1", "2"):
        made.next_turn(lambda now, name=name: called.append(name))  # type: ignore[misc]
    with stage:
        made.turn(0)
    assert len(called) == 5 and called == sorted(called)
    assert [(ref, type(e)) for ref, e in faults] == [(0, Staged)]
    made.turn(0)
    assert called[5:] == ["a", "b"], "called again with the next turn"


@case("passt.loop.reactor.Reactor.close_retired")
def descriptors_close(stage: Stage) -> None:
    made, faults = loop(stage)
    pair = socket.socketpair()
    for sock in pair:
        stage.stack.enter_context(sock)
        made.retire(sock.fileno(), sock)
    with stage:
        made.turn(0)
    assert [sock.fileno() < 0 for sock in pair] == [False, True] and len(faults) == 1
    made.turn(0)
    assert len(faults) == 1, "it is closed once: its number may be somebody else's by now"


@case("passt.loop.reactor.Reactor._signal_handler")
def signals(stage: Stage) -> None:
    made, faults = loop(stage)
    came: list[int] = []
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        stage.stack.callback(signal.signal, number, signal.getsignal(number))
        made.on_signal(number, lambda now: came.append(1))
        os.kill(os.getpid(), number)
    with stage:
        made.turn(5)
    assert came == [1] and len(faults) == 1


def fail(*_: object) -> None:
    raise Staged


def test_what_cannot_be_ended_does_not_make_the_loop_spin() -> None:
    reactor, (a, b) = Reactor(), socket.socketpair()
    with a, b:
        reactor.on_fault = fail
        reactor.handle(2, fail)
        reactor.watch(a.fileno(), 2, 0, EPOLLIN)
        b.send(b"x")
        reactor.turn(5)
        before = reactor.events
        reactor.turn(0)
        assert reactor.events == before == 1
    reactor.close()


@case("passt.loop.directories.Changes._event")
def directory_watches(stage: Stage) -> None:
    made, faults = loop(stage)
    changes, told = Changes(), list[str]()
    stage.stack.callback(changes.close)
    changes.watch(str(stage.tmp_path), inotify.CREATE)
    for name in ("one", "two"):
        changes.tell(made, lambda found, now, name=name: told.append(name))  # type: ignore[misc]
    (stage.tmp_path / "new").touch()
    with stage:
        made.turn(5)
    assert told == ["two"] and len(faults) == 1


@case("passt.policy.settings.Settings.replace")
def subscribers(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    settings, told = Settings(CONFIG, ctx.drops), list[str]()
    for name in ("a", "b"):
        settings.subscribe(lambda config, name=name: told.append(name))  # type: ignore[misc]
        settings.react(lambda former, now, name=name: told.append(name.upper()))  # type: ignore[misc]
    told.clear()
    with stage:
        settings.replace(replace(CONFIG, mtu=1280), T0)
    assert len(told) == 3 and ctx.drops["fault"] == 1
    assert settings.current.mtu == 1280


@case("passt.daemon.common.attach_capture.capture")
def takers_of_frames(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    stage.monkeypatch.setattr(log, "trace_on", True)
    with FileIO(stage.tmp_path / "pcap", "w") as file:
        options = Options(pcap="pcap")
        common.attach_capture(ctx, options, file)
        with stage:
            assert ctx.link.capture is not None
            ctx.link.capture(True, bytes(VNET.size) + b"a frame")
        assert stage.victim == trace.capture
        reactor(ctx).end_turn(T0)
    assert (stage.tmp_path / "pcap").read_bytes().endswith(b"a frame") and ctx.drops["fault"] == 1


@case("passt.tap.Tap.forget")
def services_that_follow_the_guest(stage: Stage) -> None:
    ctx = make_context()
    stage_faults(ctx)
    told: list[str] = []
    ctx.services.on_forget += [lambda: told.append("first"), lambda: told.append("second")]
    tap = Tap(ctx, udp=cast(Any, None), tcp=cast(Any, None))
    with stage:
        tap.forget()
    assert told == ["second"] and ctx.drops["fault"] == 1


@case("passt.tap.Tap._hand_over_tcp")
def traffic_classes_of_connections(stage: Stage) -> None:
    tap = FakeTap()
    stage.stack.callback(tap.close)
    stage_faults(tap.ctx)
    with stage:
        calls = tap.batch(*(ip4(tcp(sport=port), tos=0xB8) for port in (1000, 1001)))
    assert [key for name, (key, *_) in calls if name == "tcp fault"] == [stage.victim]
    assert tap.ctx.drops["fault"] == 1


# The finder itself ---------------------------------------------------------------------------------------------------


def found(body: str, *, header: str = "") -> list[str]:
    source = f"""
Handler = Callable[[int], None]
class Flow: ...
class Mine(Flow): ...
class Table:
    def __init__(self):
        self._mine: dict[bytes, Mine] = {{}}
        self._numbers: list[int] = []
        self._handlers: list[Handler] = []
        self._same: Any = self._mine
    def all(self) -> list[Mine]: ...
{header}
def f(self, given: Iterable[Flow], other: list[int]):
{re.sub("^", "    ", body, flags=re.M)}
"""
    return [walk.over for walk in walks.find({"passt.x": source})]


@pytest.mark.parametrize(
    "body",
    [
        "for flow in self._mine.values(): flow.go()",
        "for key, flow in list(self._mine.items()): ...",
        "for flow in self._same: ...",
        "for flow in given: ...",
        "for flow in self.all(): ...",
        "for i, handler in enumerate(self._handlers): handler(i)",
        "some = sorted(given)\nfor flow in some[1:]: ...",
        "old, self._mine = self._mine, {}\nfor flow in old.values(): ...",
        "waiting = self._mine\nwhile waiting and other: waiting.popitem()",
        "while self._handlers: ...",
        "for flow in [flow for flow in given if flow.idle]: ...",
        "return [flow.go() for flow in given]",
        "return any(flow.go() for flow in self._mine.values())",
        "each(other, fn, fault)",
    ],
)
def test_finder_finds(body: str) -> None:
    assert len(found(body)) == 1


@pytest.mark.parametrize(
    "body",
    [
        "for number in self._numbers: number.go()",
        "for i in range(len(self._mine)): ...",
        "for number in other: ...",
        "return [flow.index for flow in given]",
        "return max(len(flow.key) for flow in given)",
        "while other: ...",
    ],
)
def test_finder_leaves_alone(body: str) -> None:
    assert found(body) == []


# Multicast groups ----------------------------------------------------------------------------------------------------


def two_receivers(stage: Stage, *groups: bytes) -> GroupLab:
    """The guest has joined two groups, and is expected at one port of each."""
    lab = stage.stack.enter_context(group_lab())
    stage_faults(lab.ctx)
    port = free_ports()
    for group in groups or (GROUP, OTHER_GROUP):
        lab.follow(group, port)
    return lab


@case("passt.udp_engine.groups.Groups.leave")
def a_group_is_left(stage: Stage) -> None:
    lab = two_receivers(stage, GROUP)
    port = free_ports()
    lab.follow(GROUP, port + 7)
    with stage:
        lab.groups.leave(GROUP)
    assert lab.ports == {(GROUP, stage.victim.port)} and lab.ctx.drops["fault"] == 1


@case("passt.udp_engine.groups.Groups.leave_all")
def a_guest_with_groups_leaves(stage: Stage) -> None:
    lab = two_receivers(stage)
    with stage:
        lab.groups.leave_all()
    assert lab.ports == {(stage.victim.group, stage.victim.port)} and lab.ctx.drops["fault"] == 1


@case("passt.udp_engine.groups.Groups.ports_in_use")
def receivers_show_their_ports(stage: Stage) -> None:
    lab = two_receivers(stage)
    ((_, port), _) = lab.ports
    with stage:
        assert lab.groups.ports_in_use({port}) == {port}
    assert stage.victim.sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
    assert stage.others[0].sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 1


@case("passt.udp_engine.groups.Groups.free_ports")
def receivers_make_way(stage: Stage) -> None:
    lab = two_receivers(stage)
    ((_, port), _) = lab.ports
    with stage:
        lab.groups.free_ports({port})
    assert lab.ports == {(stage.victim.group, port)}
    lab.refresh()
    assert len(lab.ports) == 2, "they open again"


@case("passt.udp_engine.groups.Groups._refresh_all")
def receivers_open_again(stage: Stage) -> None:
    lab = two_receivers(stage)
    ((_, port), _) = lab.ports
    lab.groups.free_ports({port})
    with stage:
        lab.refresh()
    assert lab.ports == {(stage.others[0], port)} and lab.ctx.drops["fault"] == 1


def two_senders(stage: Stage) -> tuple[GroupLab, list[GroupFlow]]:
    """Two flows of the guest to a group."""
    lab = stage.stack.enter_context(group_lab())
    stage_faults(lab.ctx)
    for _ in range(2):
        send_to_group(lab, 0, 7)
    return lab, list(lab.senders._flows.by_key.values())


@case("passt.udp_engine.group_sender.GroupSenders.ports_in_use")
def senders_show_their_ports(stage: Stage) -> None:
    lab, flows = two_senders(stage)
    ports = {flow.port for flow in flows}
    for flow in flows:
        flow.sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
    with stage:
        assert lab.senders.ports_in_use(ports) == ports
    assert stage.victim.state == FREE
    assert stage.others[0].sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 1


@case("passt.udp_engine.group_sender.GroupSenders.free_ports")
def senders_make_way(stage: Stage) -> None:
    lab, flows = two_senders(stage)
    with stage:
        lab.senders.free_ports({flow.port for flow in flows})
    assert_closed(lab.ctx, stage.victim)
    assert lab.senders._flows.by_key == {}


@case("passt.igmp.Igmp.tap_handler")
def records_of_a_report(stage: Stage) -> None:
    lab = IgmpLab()
    stage_faults(lab.ctx)
    records = tuple(Record(TO_EXCLUDE, group) for group in (GROUP, OTHER_GROUP))
    with stage:
        lab.says(Report(4, records))
    assert list(lab.joined) == [OTHER_GROUP] and lab.ctx.drops["fault"] == 1


@case("passt.igmp.Igmp._fired")
def memberships_that_end(stage: Stage) -> None:
    lab = IgmpLab()
    stage_faults(lab.ctx)
    lab.says(Report(4, tuple(Record(TO_EXCLUDE, group) for group in (GROUP, OTHER_GROUP))))
    with stage:
        timers(lab.ctx).services.fire(lab.igmp._timer, lab.now + MEMBERSHIP_INTERVAL)
    assert list(lab.joined) == [stage.victim] and lab.ctx.drops["fault"] == 1
    assert timers(lab.ctx).services.deadlines[lab.igmp._timer] is not None, "it has another turn"
