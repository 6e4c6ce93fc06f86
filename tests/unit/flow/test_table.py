"""The flow table: indices, states, limits."""

from __future__ import annotations

import errno
import socket
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from passt import log
from passt.flow import table as flow_table
from passt.flow.table import (
    ACTIVE,
    FREE,
    GUEST,
    HOST,
    NEW,
    STATE_NAMES,
    Endpoints,
    Flow,
    FlowInfo,
    FlowTable,
    TableFull,
    TcpInfo,
    check_hash,
    name_of,
    reason_of,
)
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
    table.free(f, "idle")
    assert (f.state, table.count) == (FREE, 0)
    assert table.by_index[0] is None


def test_index_is_used_again() -> None:
    table = FlowTable()
    flows = [Flow(bytes((i,))) for i in range(4)]
    for f in flows[:3]:
        table.insert(f)
    table.free(flows[1], "idle")
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
    table.free(flows[0], "idle")
    table.insert(flows[2])
    assert flows[2].index == 0


def test_index_is_given_back_once() -> None:
    table = FlowTable()
    flows = [Flow(bytes((i,))) for i in range(3)]
    table.insert(flows[0])
    table.free(flows[0], "idle")
    with pytest.raises(RuntimeError, match="not in the table"):
        table.free(flows[0], "idle")
    with pytest.raises(RuntimeError, match="not in the table"):
        table.free(flows[2], "idle")  # was never in it
    table.insert(flows[1])
    table.insert(flows[2])
    assert (flows[1].index, flows[2].index, table.count) == (0, 1, 2)
    assert table.by_index == flows[1:]


def test_names() -> None:
    assert [STATE_NAMES[s] for s in (FREE, NEW, ACTIVE)] == ["FREE", "NEW", "ACTIVE"]
    assert len(STATE_NAMES) == 3


class Ping(Flow):
    __slots__ = ()
    kind = label = "ping"

    def endpoints(self) -> Endpoints:
        return Endpoints(GUEST, "192.0.2.2:7", "192.0.2.1", "127.0.0.1")

    def traffic(self) -> tuple[int, int]:
        return 567, 1234


def live(monkeypatch: pytest.MonkeyPatch, level: str) -> list[str]:
    """A flow's life of 1.25 s; the lines that it made."""
    lines: list[str] = []
    monkeypatch.setattr(log, f"{level}_on", True)
    monkeypatch.setattr(log, level, lines.append)
    clock = iter((10.0, 11.25))
    table, f = FlowTable(clock=lambda: next(clock)), Ping(b"")
    table.insert(f)
    assert f.opened == 10.0
    table.activate(f)
    table.free(f, "idle")
    return lines


def test_the_log_has_a_line_for_each_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert live(monkeypatch, "debug") == [
        "Flow 0 (ping): 192.0.2.2:7 -> 192.0.2.1 (host 127.0.0.1) opened",
        "Flow 0 (ping): closed: idle; 1234 bytes out, 567 in, 1.2 s",
    ]


def test_transitions_are_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = live(monkeypatch, "trace")
    assert lines == ["Flow 0 (ping): FREE -> NEW", "Flow 0 (ping): NEW -> ACTIVE", "Flow 0 (ping): ACTIVE -> FREE"]


def test_counts() -> None:
    table = FlowTable()
    flows = [Ping(b""), Ping(b""), Ping(b"")]
    for f in flows:
        table.insert(f)
    table.free(flows[0], "idle")
    table.free(flows[1], "evicted")
    assert table.opened == {"ping": 3}
    assert table.closed == {("ping", "idle"): 1, ("ping", "evicted"): 1}


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        (Endpoints(GUEST, "a:1", "b:2", "b:2"), "a:1 -> b:2"),
        (Endpoints(GUEST, "a:1", "b:2", "c:2"), "a:1 -> b:2 (host c:2)"),
        (Endpoints(GUEST, "a:1", "b:2", ""), "a:1 -> b:2"),
        (Endpoints(HOST, "a:1", "b:2", "b:2"), "b:2 -> a:1"),
        (Endpoints(HOST, "a:1", "b:2", "c:3"), "c:3 (seen as b:2) -> a:1"),
        (Endpoints(HOST, "a:1", "", "c:3"), "c:3 -> a:1"),
    ],
)
def test_endpoints(ends: Endpoints, text: str) -> None:
    assert str(ends) == text


def test_reasons() -> None:
    assert reason_of(errno.ECONNREFUSED) == "refused"
    assert reason_of(errno.EHOSTUNREACH) == reason_of(errno.ENETUNREACH) == "no route"
    assert reason_of(errno.EACCES) == "permission denied"


def test_names_of_sockets() -> None:
    with socket.socket(socket.AF_INET6) as s:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        s.bind(("::ffff:127.0.0.1", 0))
        assert name_of(s.getsockname) == f"127.0.0.1:{s.getsockname()[1]}"
        assert name_of(s.getpeername) == ""
    assert name_of(lambda: ("fe80::1%lo", 80, 0, 1)) == "[fe80::1]:80"


def test_a_row_has_no_place_for_what_only_tcp_has() -> None:
    plain = FlowInfo(3, "udp", "tap", Endpoints(GUEST, "a:1", "b:2", "c:3"), "idle", 5, 6, 1.23456, 0.1)
    assert plain.row() == {
        "index": 3, "protocol": "udp", "path": "tap", "direction": "guest", "guest": "a:1", "peer": "b:2",
        "host": "c:3", "state": "idle", "bytes_to_guest": 5, "bytes_to_host": 6, "age": 1.235, "idle": 0.1,
    }  # fmt: skip
    tcp = TcpInfo(0.00123456, 1, 2, 3, 4, 5, None)
    row = replace(plain, tcp=tcp, idle=None).row()
    assert (row["rtt"], row["snd_wnd"], row["queue_to_host"], row["idle"]) == (0.001235, 1, None, None)


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
            self.table.free(f, "idle")

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
    monkeypatch.setattr(flow_table, "sys", fake)
    if fine:
        check_hash()
    else:
        with pytest.raises(Fatal, match="random key"):
            check_hash()


def test_this_interpreter_hashes_so() -> None:
    assert sys.hash_info.algorithm.startswith("siphash")
