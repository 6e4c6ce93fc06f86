"""The flow table: indices, states, limits."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from passt import log
from passt.core import flow
from passt.core.flow import ACTIVE, FREE, NEW, STATE_NAMES, Flow, FlowTable, TableFull, check_hash
from passt.log import Fatal


def test_life() -> None:
    table = FlowTable()
    f = Flow(b"key")
    assert (f.state, f.index, f.fd, f.sock) == (FREE, -1, -1, None)
    table.insert(f)
    assert (f.state, f.index, table.count) == (NEW, 0, 1)
    assert table.by_index[0] is f
    table.activate(f)
    assert f.state == ACTIVE
    table.free(f)
    assert (f.state, table.count) == (FREE, 0)
    assert table.by_index[0] is None


def test_index_is_used_again() -> None:
    table = FlowTable()
    flows = [Flow(bytes((i,))) for i in range(4)]
    for f in flows[:3]:
        table.insert(f)
    table.free(flows[1])
    table.insert(flows[3])
    assert flows[3].index == 1
    assert len(table.by_index) == 3


def test_full() -> None:
    table = FlowTable(limit=2)
    flows = [Flow(bytes((i,))) for i in range(3)]
    table.insert(flows[0])
    table.insert(flows[1])
    with pytest.raises(TableFull):
        table.insert(flows[2])
    assert (flows[2].state, flows[2].index, table.count) == (FREE, -1, 2)
    table.free(flows[0])
    table.insert(flows[2])
    assert flows[2].index == 0


def test_index_is_given_back_once() -> None:
    table = FlowTable()
    flows = [Flow(bytes((i,))) for i in range(3)]
    table.insert(flows[0])
    table.free(flows[0])
    with pytest.raises(RuntimeError, match="not in the table"):
        table.free(flows[0])
    with pytest.raises(RuntimeError, match="not in the table"):
        table.free(flows[2])  # was never in it
    table.insert(flows[1])
    table.insert(flows[2])
    assert (flows[1].index, flows[2].index, table.count) == (0, 1, 2)
    assert table.by_index == flows[1:]


def test_names() -> None:
    assert [STATE_NAMES[s] for s in (FREE, NEW, ACTIVE)] == ["FREE", "NEW", "ACTIVE"]
    assert len(STATE_NAMES) == 3


def test_transitions_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ping(Flow):
        __slots__ = ()
        kind = "ping"

    lines: list[str] = []
    monkeypatch.setattr(log, "debug_on", True)
    monkeypatch.setattr(log, "debug", lines.append)
    table, f = FlowTable(), Ping(b"")
    table.insert(f)
    table.activate(f)
    table.free(f)
    assert lines == ["Flow 0 (ping): FREE -> NEW", "Flow 0 (ping): NEW -> ACTIVE", "Flow 0 (ping): ACTIVE -> FREE"]


class Table(RuleBasedStateMachine):
    """Any order of insertions and removals keeps indices unique and the count right."""

    def __init__(self) -> None:
        super().__init__()
        self.table = FlowTable(limit=5)
        self.live: list[Flow] = []

    @rule()
    def insert(self) -> None:
        f = Flow(b"")
        if len(self.live) == 5:
            with pytest.raises(TableFull):
                self.table.insert(f)
        else:
            self.table.insert(f)
            self.live.append(f)

    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        if self.live:
            f = data.draw(st.sampled_from(self.live))
            self.live.remove(f)
            self.table.free(f)

    @invariant()
    def consistent(self) -> None:
        assert self.table.count == len(self.live)
        assert len({f.index for f in self.live}) == len(self.live)
        assert all(self.table.by_index[f.index] is f for f in self.live)
        assert sum(f is not None for f in self.table.by_index) == len(self.live)


TestTable = Table.TestCase
TestTable.settings = settings(max_examples=30, stateful_step_count=30)


# Hashing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("algorithm", "randomised", "fine"),
    [("siphash24", 1, True), ("siphash13", 1, True), ("fnv", 1, False), ("siphash13", 0, False)],
)
def test_check_hash(monkeypatch: pytest.MonkeyPatch, algorithm: str, randomised: int, fine: bool) -> None:
    fake = SimpleNamespace(
        hash_info=SimpleNamespace(algorithm=algorithm), flags=SimpleNamespace(hash_randomization=randomised)
    )
    monkeypatch.setattr(flow, "sys", fake)
    if fine:
        check_hash()
    else:
        with pytest.raises(Fatal, match="random key"):
            check_hash()


def test_this_interpreter_hashes_so() -> None:
    assert sys.hash_info.algorithm.startswith("siphash")
