"""The wheel: each deadline is looked at in time, leaving is free, and no turn is long."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from passt import NEVER
from passt.tcp_engine.conn import KEEPALIVE_IDLE, TcpConn
from passt.tcp_engine.deadlines import SOON
from passt.tcp_engine.wheel import BATCH, Wheel, slot_of

from ..support import FakeServiceTimers, make_context, timers

NOW = 5000.0


class Rig:
    """A wheel whose `look` puts a connection back until its deadline is near, and then notes the time."""

    def __init__(self, n: int) -> None:
        self.ctx = make_context()
        self.faults: list[TcpConn] = []
        self.wheel = Wheel(self.ctx, self.look, lambda conn, e: self.faults.append(conn))
        self.conns = [TcpConn(i.to_bytes(12, "big")) for i in range(n)]
        self.now = NOW
        self.turns = self.looks = 0
        self.near: dict[TcpConn, float] = {}

    @property
    def services(self) -> FakeServiceTimers:
        return timers(self.ctx).services

    def set(self, conn: TcpConn, deadline: float) -> None:
        conn.deadline = deadline
        self.wheel.at(conn, deadline, self.now)

    def look(self, conn: TcpConn, now: float) -> None:
        self.looks += 1
        if conn.deadline - now > SOON:
            self.wheel.at(conn, conn.deadline, now)
        else:
            self.near[conn] = now

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while (at := self.services.deadlines[self.wheel._timer] or NEVER) <= end:
            self.now = at
            self.turns += 1
            self.services.fire(self.wheel._timer, at)
        self.now = end


@given(st.floats(0, 1e6), st.floats(SOON, 1e5))
def test_a_slot_is_between_now_and_the_deadline(now: float, distance: float) -> None:
    deadline = now + distance
    at = slot_of(deadline, now)
    assert now < at < deadline
    assert distance / 9 < deadline - at <= distance / 2 + 1e-6


@given(st.lists(st.floats(0.2, 7200.0), min_size=1, max_size=20))
def test_every_deadline_is_looked_at_shortly_before(distances: list[float]) -> None:
    rig = Rig(len(distances))
    for conn, distance in zip(rig.conns, distances, strict=True):
        rig.set(conn, NOW + distance)
    rig.wait(7200.0)
    for conn in rig.conns:
        assert 0 < conn.deadline - rig.near[conn] <= SOON
    assert not any(slot.conns for slot in rig.wheel._slots.values()) and not rig.wheel._order


def test_two_hours_are_few_looks() -> None:
    rig = Rig(1)
    rig.set(rig.conns[0], NOW + KEEPALIVE_IDLE)
    rig.wait(KEEPALIVE_IDLE)
    assert len(rig.near) == 1 and rig.looks <= 16 and rig.turns <= 16


def test_a_later_deadline_costs_nothing_and_an_earlier_one_moves() -> None:
    rig = Rig(1)
    (conn,) = rig.conns
    rig.set(conn, NOW + 100.0)
    slot = conn.slot
    rig.set(conn, NOW + 7200.0)
    assert conn.slot is slot
    rig.set(conn, NOW + 1.0)
    assert conn.slot is not slot and slot is not None and not slot.conns
    rig.wait(1.0)
    assert 0 < conn.deadline - rig.near[conn] <= SOON
    assert conn.slot is None


def test_slots_are_few_whatever_comes() -> None:
    rig = Rig(2000)
    for i, conn in enumerate(rig.conns):
        rig.set(conn, NOW + 0.2 * 1.0053**i)  # up to two hours
    assert len(rig.wheel._slots) < 150


def test_one_that_ends_is_not_looked_at_and_leaves_nothing() -> None:
    rig = Rig(3)
    for conn in rig.conns:
        rig.set(conn, NOW + 10.0)
    for conn in rig.conns[:2]:
        rig.wheel.forget(conn)
        rig.wheel.forget(conn)
        assert conn.slot is None
    rig.wait(20.0)
    assert set(rig.near) == {rig.conns[2]}


def test_an_empty_slot_wakes_nobody_twice() -> None:
    rig = Rig(1)
    rig.set(rig.conns[0], NOW + 10.0)
    rig.wheel.forget(rig.conns[0])
    rig.wait(7200.0)
    assert rig.turns == 1 and rig.looks == 0


def test_many_that_are_due_at_once_have_their_look_in_several_turns() -> None:
    rig = Rig(3 * BATCH + 1)
    for conn in rig.conns:
        rig.set(conn, NOW + 3600.0)
    first = rig.services.deadlines[rig.wheel._timer]
    assert first is not None
    rig.wait(first - NOW)
    assert rig.turns == 1 and rig.looks == BATCH
    rig.wait(0.01)
    assert rig.turns == 4 and rig.looks == len(rig.conns)
    rig.wait(3600.0)
    assert set(rig.near) == set(rig.conns)


def test_one_that_leaves_while_its_slot_is_half_done() -> None:
    rig = Rig(BATCH + 2)
    for conn in rig.conns:
        rig.set(conn, NOW + 0.2)
    at = rig.services.deadlines[rig.wheel._timer]
    assert at is not None
    rig.services.fire(rig.wheel._timer, at)
    left = [conn for conn in rig.conns if conn.slot is not None and conn.slot.at == at]
    assert len(left) == 2
    rig.wheel.forget(left[0])
    rig.now = at
    rig.wait(1.0)
    assert left[0] not in rig.near and left[1] in rig.near


def test_a_fault_of_one_leaves_the_others_their_look() -> None:
    rig = Rig(3)
    rig.wheel._look = lambda conn, now: 1 // 0 if conn is rig.conns[1] else rig.look(conn, now)
    for conn in rig.conns:
        rig.set(conn, NOW + 0.15)
    rig.wait(0.2)
    assert rig.faults == [rig.conns[1]] and set(rig.near) == {rig.conns[0], rig.conns[2]}
