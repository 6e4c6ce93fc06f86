"""Statistics as programs and users get them. A small parser of the Prometheus format, made from its description, reads
the exposed text.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from passt.control import metrics
from passt.control.metrics import table
from passt.flow.context import Context
from passt.flow.table import LABELS, Flow, FlowInfo
from passt.log import WIDTH

from ..support import link, make_context, reactor, stage_faults
from ..tcp_support import fake_sockets, open_connection

__all__ = ["fake_sockets"]


@pytest.fixture
def ctx() -> Context:
    """A context after some work."""
    ctx = make_context()
    work(ctx)
    return ctx


def work(ctx: Context, times: int = 1) -> None:
    """Set the counters to values after some work."""
    r: Any = reactor(ctx)
    r.wakeups = getattr(r, "wakeups", 0) + 10 * times
    r.events = (r.events if isinstance(r.events, int) else 0) + 20 * times
    ctx.stats.frames_from_guest += 100 * times
    ctx.stats.bytes_from_guest += 150_000 * times
    ctx.link.sent_frames += 200 * times
    link(ctx).octets += 9_000_000 * times
    ctx.stats.spliced["tcp"][0].bytes += 5000 * times
    ctx.flows.opened["tcp"] += 8 * times
    ctx.flows.closed["tcp", "both ended"] += 5 * times
    ctx.flows.closed["tcp", "reset by guest"] += 2 * times
    ctx.drops["tcp inbound: too many half open"] += 3 * times


def snapshot(ctx: Context, after: float) -> metrics.Snapshot:
    """At so many seconds after the start."""
    return metrics.snapshot(ctx, ctx.stats.started + after)


# Snapshots -----------------------------------------------------------------------------------------------------------


def test_snapshot(ctx: Context) -> None:
    ctx.stats.gauges |= {"listeners": lambda: 4, "forwards": lambda: 2}
    snap = snapshot(ctx, 12.5)
    assert json.loads(json.dumps(snap)) == snap
    assert snap["uptime"] == 12.5
    assert snap["link"] == {
        "from_guest": {"frames": 100, "bytes": 150_000},
        "to_guest": {"frames": 200, "bytes": 9_000_000},
    }
    assert snap["flows"]["tcp"] == {"open": 1, "opened": 8, "closed": {"both ended": 5, "reset by guest": 2}}
    assert tuple(snap["flows"]) == LABELS
    assert snap["spliced"]["tcp"] == {"to_guest": 5000, "to_host": 0}
    assert snap["loop"] == {"wakeups": 10, "events": 20}
    assert snap["drops"] == {"tcp inbound: too many half open": 3}
    assert (snap["guests"], snap["listeners"], snap["forwards"]) == (1, 4, 2)
    assert snap["memory"] == 0  # of a process that could not open what tells it
    assert snap["cpu"]["user"] > 0


def test_a_snapshot_does_not_look_at_flows(ctx: Context) -> None:
    """It costs the same with ten thousand of them."""

    class Untouchable(Flow):
        def info(self, now: float) -> FlowInfo:
            raise AssertionError

    for _ in range(10_000):
        ctx.flows.insert(Untouchable(b""))
    ctx.flows.by_index = None  # type: ignore[assignment]
    assert snapshot(ctx, 1)["flows"]["tcp"]["open"] == 1


def test_flows_one_by_one() -> None:
    talk = open_connection()
    rows = metrics.flows(talk.ctx, talk.now)
    for _ in range(3):
        talk.ctx.flows.insert(Flow(b""))
    for flow in list(talk.ctx.flows.by_index)[1:]:
        assert flow is not None
        talk.ctx.flows.free(flow, "gone meanwhile")
    (row,) = json.loads(json.dumps(list(rows)))
    assert (row["index"], row["protocol"], row["guest"]) == (0, "tcp", "192.0.2.2:40000")
    assert list(metrics.flows(talk.ctx, talk.now, 1)) == []


def test_a_flow_that_cannot_be_told_of_is_left_out() -> None:
    talk = open_connection()
    stage_faults(talk.ctx)
    talk.ctx.flows.insert(Flow(b""))  # has no `info`
    (row,) = metrics.flows(talk.ctx, talk.now)
    assert row["index"] == 0 and talk.ctx.drops["fault"] == 1


# Prometheus ----------------------------------------------------------------------------------------------------------

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(?:,|$)')
VALUE = r"[-+]?(?:\d+(?:\.\d*)?(?:e[-+]?\d+)?|Inf|NaN)"
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? ({VALUE})\Z")

Samples = dict[frozenset[tuple[str, str]], float]


def parsed(text: str) -> dict[str, tuple[str, Samples]]:
    """Families of the text exposition format: name -> (type, labels -> value). Fails where the format is violated."""
    families: dict[str, tuple[str, Samples]] = {}
    helped: set[str] = set()
    assert text.endswith("\n")
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ", 3)[2]
            assert name not in helped and len(line.split(" ", 3)) == 4
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name in helped and name not in families and kind in ("counter", "gauge")
            assert (kind == "counter") == name.endswith("_total")
            families[name] = kind, {}
        else:
            match = SAMPLE.match(line)
            assert match, line
            name, labels, value = match.groups()
            assert name == list(families)[-1], "samples follow their family's TYPE"
            samples = families[name][1]
            key = labels_of(labels or "")
            assert key not in samples, "each sample once"
            samples[key] = float(value)
    return families


def labels_of(text: str) -> frozenset[tuple[str, str]]:
    found, at = {}, 0
    while at < len(text):
        match = LABEL.match(text, at)
        assert match, text
        name, value = match.groups()
        assert name not in found
        found[name] = re.sub(r"\\(.)", lambda m: {"n": "\n"}.get(m[1], m[1]), value)
        at = match.end()
    return frozenset(found.items())


def exposed(ctx: Context, after: float = 5.0) -> dict[str, tuple[str, Samples]]:
    return parsed(metrics.prometheus(ctx, ctx.stats.started + after))


def value(families: dict[str, tuple[str, Samples]], name: str, **labels: str) -> float:
    return families[name][1][frozenset(labels.items())]


def test_prometheus(ctx: Context) -> None:
    families = exposed(ctx)
    assert value(families, "passt_guest_receive_bytes_total") == 9_000_000
    assert value(families, "passt_guest_transmit_frames_total") == 100
    assert value(families, "passt_spliced_bytes_total", protocol="tcp", direction="to_guest") == 5000
    assert value(families, "passt_flows", kind="tcp") == 1
    assert value(families, "passt_flows", kind="ping") == 0
    assert value(families, "passt_flows_closed_total", kind="tcp", reason="reset by guest") == 2
    assert value(families, "passt_drops_total", reason="tcp inbound: too many half open") == 3
    assert value(families, "passt_loop_wakeups_total") == 10
    assert value(families, "passt_info", version=snapshot(ctx, 1)["version"], mode="pasta") == 1
    assert value(families, "process_cpu_seconds_total") > 0
    assert value(families, "process_start_time_seconds") > 1.7e9
    assert families["passt_flows"][0] == "gauge" and families["passt_drops_total"][0] == "counter"
    assert all(math.isfinite(v) for _, samples in families.values() for v in samples.values())


def test_the_parser_of_prometheus_reads_the_same(ctx: Context) -> None:
    """Its own client library, which is strict about what belongs together."""
    ctx.drops['a "reason"\\ of\ntwo lines'] += 1
    text = metrics.prometheus(ctx, ctx.stats.started + 5)
    read: dict[str, tuple[str, Samples]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert {sample.name for sample in family.samples} <= {name}
        read[name] = family.type, {frozenset(sample.labels.items()): sample.value for sample in family.samples}
    assert read == parsed(text)


def test_nothing_happened_yet() -> None:
    ctx = make_context()
    r: Any = reactor(ctx)
    r.wakeups = r.events = 0
    families = exposed(ctx)
    assert families["passt_drops_total"] == ("counter", {})
    assert value(families, "passt_loop_wakeups_total") == 0


@given(st.lists(st.text().filter(lambda reason: reason != "fault"), unique=True, max_size=5))
def test_any_reason_is_escaped(reasons: list[str]) -> None:
    ctx = make_context()
    r: Any = reactor(ctx)
    r.wakeups = r.events = 0
    for i, reason in enumerate(reasons):
        ctx.drops[reason] = i + 1
    families = exposed(ctx)
    assert {dict(labels)["reason"]: v for labels, v in families["passt_drops_total"][1].items()} == dict(ctx.drops)


# Table ---------------------------------------------------------------------------------------------------------------


def cells(lines: list[str], text: str) -> list[str]:
    """The numbers of the line that begins with `text`."""
    (line,) = (line for line in lines if line.strip().startswith(text))
    return re.split(r"\s{2,}", line.strip())[1:]


def test_table(ctx: Context) -> None:
    first = snapshot(ctx, 60.0)
    work(ctx, 2)
    lines = table(snapshot(ctx, 65.0), first)
    assert lines[0] == "Statistics of the last 5.0 s, 65.0 s after the start"
    assert all(len(line) <= WIDTH and line == line.rstrip() for line in lines)
    assert cells(lines, "guest -> host") == ["40.0", "300", "60000", "450.0 k"]
    assert cells(lines, "host -> guest") == ["80.0", "600", "3.6 M", "27.0 M"]
    assert cells(lines, "TCP spliced -> guest") == ["2000", "15000"]
    assert cells(lines, "tcp") == ["3", "3.2", "24", "21"]
    assert cells(lines, "wake-ups") == ["4.0", "30"]
    assert cells(lines, "drop: tcp inbound: too many half open") == ["1.2", "9"]
    assert not any("UDP" in line or "udp" in line or "ping" in line for line in lines), "nothing to say about them"


def test_table_since_the_start(ctx: Context) -> None:
    lines = table(snapshot(ctx, 4.0))
    assert lines[0] == "Statistics of the last 4.0 s, 4.0 s after the start"
    assert cells(lines, "guest -> host") == ["25.0", "100", "37500", "150.0 k"]


def test_columns_are_aligned(ctx: Context) -> None:
    lines = table(snapshot(ctx, 4.0))
    numbers = [line for line in lines[2:] if re.search(r"\d$", line)]
    assert len({len(line) for line in numbers if not line.endswith(" s")}) == 1


def test_a_table_at_once(ctx: Context) -> None:
    """Two in the same moment: nothing is divided by zero."""
    snap = snapshot(ctx, 4.0)
    assert cells(table(snap, snap), "guest -> host") == ["0.0", "100", "0.0", "150.0 k"]


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (0.0, "0.0"),
        (99.94, "99.9"),
        (99.95, "100"),
        (99_999, "99999"),
        (100_000, "100.0 k"),
        (999_949, "999.9 k"),
        (999_950, "1.0 M"),
        (12_345_678_901, "12.3 G"),
        (10**19, "10000 P"),
    ],
)
def test_short(number: float, text: str) -> None:
    assert metrics._short(number) == text
