from __future__ import annotations

import errno
import resource
import socket
from collections.abc import Callable, Iterator

import pytest

from passt import NEVER
from passt.drops import Drop
from passt.flow import idle as module
from passt.flow.context import Context
from passt.flow.idle import SWEEP_MAX, SWEEP_MIN, IdleFlow, IdleFlows, flow_limit
from passt.flow.room import DESCRIPTORS, HALF_OPEN, TABLE
from passt.flow.table import ACTIVE, FREE, RECENT, TableFull
from passt.loop.reactor import EPOLLERR, EPOLLIN, TYPE_UDP, make_ref

from ..support import T0, make_context, reactor, timers

LIMIT = 32
TIMEOUT = 60.0


@pytest.fixture
def ctx() -> Iterator[Context]:
    ctx = make_context()
    yield ctx
    for flow in ctx.flows.by_index:
        if flow is not None:
            flow.sock.close()
    reactor(ctx).end_turn(T0)


class Idle(IdleFlow):
    """One of UDP, say."""

    evicted = Drop.UDP_EVICTED


@pytest.fixture
def flows(ctx: Context) -> IdleFlows[IdleFlow]:
    return IdleFlows(ctx, TYPE_UDP, LIMIT)


def add(
    flows: IdleFlows[IdleFlow],
    number: int,
    now: float = T0,
    timeout: float = TIMEOUT,
    kind: type[IdleFlow] = Idle,
) -> IdleFlow:
    flow = kind(b"key %d" % number, timeout, now)
    flows.add(flow, socket.socket(socket.AF_INET, socket.SOCK_DGRAM), now)
    return flow


def deadline(ctx: Context) -> float | None:
    return timers(ctx).services.deadlines[0]


def test_a_flow_is_found_watched_and_active(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    flow = add(flows, 1)
    assert flows.by_key == {b"key 1": flow}
    assert ctx.flows.by_index[flow.index] is flow
    assert flow.state == ACTIVE
    assert reactor(ctx).refs == {flow.fd: make_ref(TYPE_UDP, flow.fd, flow.index)}
    assert reactor(ctx).events == {flow.fd: EPOLLIN | EPOLLERR}
    assert flow.sock.fileno() == flow.fd


def test_close_forgets_at_once_and_closes_when_the_turn_ends(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    flow = add(flows, 1)
    flows.close(flow, "asked")
    assert (flows.by_key, ctx.flows.count, flow.state) == ({}, 0, FREE)
    assert flow.sock.fileno() >= 0
    reactor(ctx).end_turn(T0)
    assert flow.sock.fileno() == -1


def test_the_timer_runs_only_while_there_are_flows(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    assert deadline(ctx) is None
    add(flows, 1)
    assert deadline(ctx) == T0 + TIMEOUT
    timers(ctx).services.fire(0)
    assert flows.by_key == {}
    assert deadline(ctx) is None


def test_a_shorter_timeout_moves_the_timer_a_longer_one_does_not(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    add(flows, 1)
    add(flows, 2, timeout=180.0)
    assert deadline(ctx) == T0 + TIMEOUT
    add(flows, 3, timeout=30.0)
    assert deadline(ctx) == T0 + 30


def test_the_sweep_closes_what_is_idle_and_returns_for_the_rest(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    idle, busy = add(flows, 1), add(flows, 2)
    busy.last = T0 + 40
    timers(ctx).services.fire(0)
    assert list(flows.by_key.values()) == [busy]
    assert idle.state == FREE
    assert deadline(ctx) == T0 + 40 + TIMEOUT


def test_sweeps_keep_their_distance(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    add(flows, 1)
    add(flows, 2, T0 + 0.1)
    timers(ctx).services.fire(0)
    assert deadline(ctx) == T0 + TIMEOUT + SWEEP_MIN


def test_sweeps_of_many_are_further_apart(
    ctx: Context, flows: IdleFlows[IdleFlow], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SWEEP_COST", 2.0)
    for i in range(4):
        add(flows, i, T0 + i / 10)
    timers(ctx).services.fire(0)
    assert deadline(ctx) == T0 + TIMEOUT + 3 * 2.0


def test_twenty_thousand_that_are_due_at_once_are_closed_in_many_turns() -> None:
    ctx = make_context()
    flows = IdleFlows[IdleFlow](ctx, TYPE_UDP, 20_000)
    for i in range(20_000):
        flow = Idle(i.to_bytes(12, "big"), TIMEOUT, T0 + i * 1e-6)
        ctx.flows.insert(flow)
        flows.by_key[flow.key] = flow
        ctx.flows.activate(flow)
    stays = next(iter(flows.by_key.values()))
    stays.last = T0 + 40
    now, turns = T0 + TIMEOUT + 1, 0
    flows.sweep(now)
    while len(flows.by_key) > 1:
        before = len(flows.by_key)
        now = timers(ctx).services.deadlines[flows._timer] or NEVER
        assert now <= T0 + TIMEOUT + 1.001
        flows.sweep(now)
        turns += 1
        assert 0 < before - len(flows.by_key) <= SWEEP_MAX
    assert turns == 20_000 // SWEEP_MAX
    assert timers(ctx).services.deadlines[flows._timer] == T0 + 40 + TIMEOUT
    assert ctx.flows.closed == {("", "idle"): 19_999}


def test_at_the_limit_the_longest_idle_sixteenth_goes(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    made = [add(flows, i, T0 + i) for i in range(LIMIT)]
    made[0].last = T0 + 1000
    add(flows, LIMIT, T0 + LIMIT)
    assert [f.state for f in made[:5]] == [ACTIVE, FREE, FREE, FREE, ACTIVE]
    assert len(flows.by_key) == LIMIT - 3 + 1
    assert ctx.drops == {"UDP flow: closed to make room": 3}


class PeersFlow(Idle):
    foreign = True  # type: ignore[assignment]


def test_peers_make_room_for_each_other_as_long_as_there_are_any(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    own = [add(flows, i, T0 + i) for i in range(LIMIT - 1)]
    peers = add(flows, 100, T0 + 100, kind=PeersFlow)
    another = add(flows, 101, T0 + 101, kind=PeersFlow)
    assert peers.state == FREE and all(flow.state == ACTIVE for flow in (*own, another))
    with flows.open(failing(1, errno.EMFILE), T0 + 101, foreign=True):
        assert another.state == FREE and own[0].state == ACTIVE
    add(flows, LIMIT, T0 + LIMIT)
    add(flows, 102, T0 + 102, kind=PeersFlow)
    assert [flow.state for flow in own[:4]] == [FREE, FREE, FREE, ACTIVE], "there was none of theirs"


def test_the_guest_makes_room_at_the_cost_of_any(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    oldest = add(flows, 0, T0)
    peers = [add(flows, i, T0 + i, kind=PeersFlow) for i in range(1, LIMIT)]
    add(flows, LIMIT, T0 + LIMIT)
    assert [flow.state for flow in (oldest, *peers[:3])] == [FREE, FREE, FREE, ACTIVE]


def test_a_full_table_is_relieved_if_it_is_full_of_ours(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    ctx.flows.limit = 2
    first = add(flows, 1, T0)
    add(flows, 2, T0 + 1)
    add(flows, 3, T0 + 2)
    assert first.state == FREE
    assert list(flows.by_key) == [b"key 2", b"key 3"]


def test_a_table_full_of_others_is_not(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    ctx.flows.limit = 0
    with socket.socket() as s, pytest.raises(TableFull):
        flows.add(IdleFlow(b"key", TIMEOUT, T0), s, T0)
    assert flows.by_key == {}


def test_a_socket_that_cannot_be_watched_leaves_no_flow(
    ctx: Context, flows: IdleFlows[IdleFlow], monkeypatch: pytest.MonkeyPatch
) -> None:
    def watch(*_: int) -> int:
        raise OSError(errno.ENOSPC, "max_user_watches")

    monkeypatch.setattr(ctx.reactor, "watch", watch)
    with socket.socket() as s, pytest.raises(OSError, match="max_user_watches"):
        flows.add(IdleFlow(b"key", TIMEOUT, T0), s, T0)
    assert (flows.by_key, ctx.flows.count) == ({}, 0)


def failing(times: int, number: int) -> Callable[[], socket.socket]:
    """Makes a socket after it has failed so many times."""
    left = [times]

    def make() -> socket.socket:
        if left[0]:
            left[0] -= 1
            raise OSError(number, "no")
        return socket.socket()

    return make


def test_out_of_descriptors_the_longest_idle_flow_gives_its_own(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    older, newer = add(flows, 1, T0), add(flows, 2, T0 + 1)
    with flows.open(failing(1, errno.EMFILE), T0 + 1):
        assert (older.state, newer.state) == (FREE, ACTIVE)
        assert older.sock.fileno() == -1
        assert list(reactor(ctx).refs) == [newer.fd]


def test_out_of_descriptors_a_sixteenth_pays_for_the_search(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    """Or each new flow of a flood would look at all that there are."""
    made = [add(flows, i, T0 + i) for i in range(LIMIT)]
    with flows.open(failing(1, errno.ENFILE), T0 + LIMIT + 5):
        assert [f.state for f in made[:4]] == [FREE, FREE, FREE, ACTIVE]
        assert [f.sock.fileno() for f in made[:3]] == [-1] * 3
    assert ctx.drops == {"UDP flow: closed to make room": 3}


@pytest.mark.parametrize(
    ("times", "number", "have"), [(2, errno.EMFILE, 1), (1, errno.EMFILE, 0), (1, errno.EACCES, 1)]
)
def test_when_open_gives_up(flows: IdleFlows[IdleFlow], times: int, number: int, have: int) -> None:
    for i in range(have):
        add(flows, i)
    with pytest.raises(OSError, match="no") as e:
        flows.open(failing(times, number), T0)
    assert e.value.errno == number


@pytest.mark.parametrize(("soft", "limit"), [(1024, 512), (1 << 20, 16384), (1, 1), (resource.RLIM_INFINITY, 16384)])
def test_flow_limit(monkeypatch: pytest.MonkeyPatch, soft: int, limit: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, soft))
    assert flow_limit(16384, 2) == limit


# Room for flows of other kinds (`flow/room.py`) -----------------------------------------------------------------------


def test_only_what_carries_nothing_makes_room_for_others(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    made = [add(flows, i, T0 + i) for i in range(8)]
    assert not ctx.room.make(TABLE, T0 + RECENT - 1)
    assert ctx.room.make(TABLE, T0 + RECENT + 1), "two are idle, and the longest idle one goes"
    assert [f.state for f in made[:2]] == [FREE, ACTIVE] and made[0].sock.fileno() == -1
    assert ctx.drops == {"UDP flow: closed to make room": 1}


def test_peers_make_no_room_at_the_cost_of_the_guests_flows(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    own = add(flows, 0)
    peers = add(flows, 1, T0 + 1, kind=PeersFlow)
    assert ctx.room.make(TABLE, T0 + 100, foreign=True)
    assert (own.state, peers.state) == (ACTIVE, FREE)
    assert not ctx.room.make(TABLE, T0 + 100, foreign=True) and own.state == ACTIVE


@pytest.mark.parametrize("short_of", [TABLE, DESCRIPTORS])
def test_what_is_of_less_use_ends_before_idle_flows(ctx: Context, flows: IdleFlows[IdleFlow], short_of: str) -> None:
    kept = add(flows, 0)
    asked: list[bool] = []

    def give(foreign: bool, now: float) -> int:
        asked.append(foreign)
        ctx.flows.limit += 1
        return 1

    ctx.room.offer(HALF_OPEN, give)
    if short_of == TABLE:
        ctx.flows.limit = 1
        add(flows, 1, T0 + 100)
    else:
        flows.open(failing(1, errno.EMFILE), T0 + 100).close()
    assert asked == [False] and kept.state == ACTIVE


def test_a_table_full_of_others_is_full(ctx: Context, flows: IdleFlows[IdleFlow]) -> None:
    ctx.flows.limit = 0
    with pytest.raises(TableFull), socket.socket(type=socket.SOCK_DGRAM) as sock:
        flows.add(Idle(b"key", TIMEOUT, T0), sock, T0)
    assert not flows.by_key
