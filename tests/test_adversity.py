"""The injector of faults, the choice of transfers, and the tables and pictures that come of them."""

from __future__ import annotations

import json
import socket
from contextlib import nullcontext
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

import pytest
from matplotlib import pyplot as plt

from bench import adverse_stopped
from bench.adverse_ends import OBSERVATIONS, Way
from bench.adverse_latency import counted, merged
from bench.adverse_progress import Progress
from bench.adverse_seats import Programs
from bench.adversity import FAULTS, LOSSES, MODES, MTUS, curves, matrix, measure, sampled, told
from bench.faulty_link import BURST, ETHER_LEN, Faults, kind_of
from bench.reliability import LOSS, MARKERS, draw, fill, series

V4 = bytes(12) + b"\x08\x00" + b"\x45" + bytes(8) + b"\x06" + bytes(10)
ARP = bytes(12) + b"\x08\x06" + bytes(28)
NEIGHBOUR = bytes(12) + b"\x86\xdd" + bytes(6) + bytes([58]) + bytes(60)


def frame(n: int) -> bytes:
    """One that is told from others by its end."""
    return V4 + bytes(60) + n.to_bytes(4, "big")


FRAMES = [frame(n) for n in range(10_000)]


def run(rule: dict[str, Any], frames: list[bytes] = FRAMES) -> list[bytes]:
    faults = Faults()
    faults.set(rule)
    return [passed for one in frames for passed in faults.passed(one)]


def segment(flags: int, payload: bytes = b"") -> bytes:
    """A TCP segment over IPv4."""
    tcp = bytes(12) + bytes([0x50, flags]) + bytes(6)
    length = (20 + len(tcp) + len(payload)).to_bytes(2, "big")
    ip = b"\x45\x00" + length + bytes(5) + b"\x06" + bytes(10)
    return bytes(12) + b"\x08\x00" + ip + tcp + payload


# Rules ---------------------------------------------------------------------------------------------------------------


def test_no_rule_changes_nothing() -> None:
    assert run({}) == FRAMES
    assert run({"seed": 3}) == FRAMES


@pytest.mark.parametrize("rule", [{"drop": 0.1}, {"burst": 0.1 / BURST}])
def test_lost(rule: dict[str, float]) -> None:
    left = run(rule)
    assert 700 < len(FRAMES) - len(left) < 1300
    assert left == sorted(set(left))


def test_a_burst_takes_neighbours() -> None:
    left = [int.from_bytes(f[-4:], "big") for f in run({"burst": 0.001})]
    gaps = [b - a - 1 for a, b in pairwise(left) if b - a > 1]
    assert gaps
    assert not [gap for gap in gaps if gap < BURST]


def test_a_burst_ends_on_a_quiet_link(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("bench.faulty_link.time.monotonic", lambda: float(next(clock)))
    left = [int.from_bytes(f[-4:], "big") for f in run({"burst": 0.1}, FRAMES[:300])]
    assert 200 < len(left) < 300


def test_duplicated() -> None:
    came = run({"duplicate": 0.1})
    assert 10_700 < len(came) < 11_300
    assert sorted(set(came)) == FRAMES


def test_reordered() -> None:
    came = run({"reorder": 0.1})
    assert came != FRAMES
    assert sorted(came) in (FRAMES, FRAMES[:-1])  # the last one may wait for another


def test_corrupted_in_one_bit() -> None:
    changed = [(a, b) for a, b in zip(run({"corrupt": 0.1}), FRAMES, strict=True) if a != b]
    assert 700 < len(changed) < 1300
    for a, b in changed:
        assert a[:ETHER_LEN] == b[:ETHER_LEN]
        assert (int.from_bytes(a, "big") ^ int.from_bytes(b, "big")).bit_count() == 1


def test_truncated() -> None:
    cut = [(a, b) for a, b in zip(run({"truncate": 0.1}), FRAMES, strict=True) if a != b]
    assert 700 < len(cut) < 1300
    assert all(ETHER_LEN <= len(a) < len(b) and b.startswith(a) for a, b in cut)


def test_the_first_of_a_kind_are_lost() -> None:
    syn, data, fin, ack = segment(2), segment(16, b"x"), segment(17), segment(16)
    assert [kind_of(f) for f in (syn, data, fin, ack)] == ["syn", "data", "fin", ""]
    came = run({"lose": {"syn": 1, "data": 2, "fin": 1}}, [syn, syn, ack, data, data, data, fin, fin])
    assert came == [syn, ack, data, fin]


def test_neighbours_stay_known() -> None:
    short = V4[:20]
    assert run({"drop": 1.0}, [ARP, NEIGHBOUR, short, FRAMES[0]]) == [ARP, NEIGHBOUR, short]


def test_a_seed_repeats_all_chances() -> None:
    rule = {"drop": 0.02, "reorder": 0.02, "corrupt": 0.02, "truncate": 0.02, "duplicate": 0.02}
    assert run({**rule, "seed": 5}) == run({**rule, "seed": 5}) != run({**rule, "seed": 6})


def test_times() -> None:
    faults = Faults()
    faults.set({"delay": 0.5})
    assert faults.timed
    assert faults.due(7.0) == 7.5
    faults.set({"jitter": 0.5})
    assert len({faults.due(7.0) for _ in range(9)}) > 1
    assert all(7.0 <= faults.due(7.0) <= 7.5 for _ in range(99))
    faults.set({"drop": 0.1})
    assert not faults.timed


def test_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.faulty_link.time.monotonic", lambda: 100.0)
    faults = Faults()
    faults.set({"pause": [0.2, 1.0]})
    assert [round(faults.due(at), 6) for at in (100.0, 100.1, 100.2, 100.9, 101.1)] == [
        100.2,
        100.2,
        100.2,
        100.9,
        101.2,
    ]


# Transfers -----------------------------------------------------------------------------------------------------------


def test_every_transfer_has_a_name_of_its_own() -> None:
    names = [str(case) for case in matrix() + curves()]
    assert len(names) == len(set(names))
    assert len(matrix()) == len(MODES) * len(MTUS) * 2 * 4 * len(FAULTS)


def test_a_sample_has_every_fault_in_each_mode() -> None:
    for mode in MODES:
        cases = [case for case in matrix() if case.mode == mode]
        chosen = sampled(cases, 8, 1)
        assert {case.fault for case in chosen} == set(FAULTS)
        assert {case.mtu for case in chosen} == set(MTUS)
        assert len(chosen) == 24


def test_a_sample_is_that_of_its_seed() -> None:
    assert sampled(matrix(), 8, 1) == sampled(matrix(), 8, 1) != sampled(matrix(), 8, 2)


def test_every_line_has_its_name_and_its_seed() -> None:
    case = matrix()[5]
    line = {"contender": "ours", "outcome": "stalled", "time": 30.0, "gap": None, "cpu": 0.1}
    line |= {key: getattr(case, key) for key in ("mode", "mtu", "family", "way", "fault")}
    assert str(case) in told(line, 77)
    assert "--seed 77" in told(line, 77)


# While the daemon is stopped -----------------------------------------------------------------------------------------


def way() -> Way:
    """Both ends are in this process, and nothing between them."""
    return Way(
        make=lambda near, family, kind: socket.socket(family, kind),
        outbound=True,
        server="127.0.0.1",
        port=0,
        client="127.0.0.1",
        refused="127.0.0.1",
        dropped="127.0.0.1",
        mtu=1500,
        spread=0.001,
        timeout=10.0,
    )


SEEN: dict[str, list[Any]] = {
    "small": [30],
    "bulk": [["all", "end"], ["all", "end"]],
    "half closes": [1000, "end", "all", "end"] * 2,
    "many": [20],
    "end and reset": [[1000, "end", "EPIPE"]] * 2,
    "reset while reading": [[True, "ECONNRESET"]] * 2,
    "reset while writing": [["ECONNRESET"]] * 2,
    "close with unread data": [[1000, "ECONNRESET"]] * 2,
    "close with much to send": [["all", "end"]] * 2,
    "write after a reset": [["ECONNRESET", "EPIPE"]] * 2,
    "datagrams": [True] * 6,
}


@pytest.mark.parametrize("name", SEEN)
def test_what_the_bare_kernel_shows(name: str) -> None:
    seen, times = OBSERVATIONS[name](way())
    assert seen == SEEN[name]
    assert not times.get("stopped"), "there is no daemon"


def test_a_connection_that_is_refused_has_its_errno() -> None:
    here = way()
    seen, times = OBSERVATIONS["connect errors"](here)
    assert seen == ["ECONNREFUSED"] * 3
    assert set(times) == {"closed", "refused", "dropped"}
    here.outbound = False
    assert OBSERVATIONS["connect errors"](here) == ([], {})


def test_cells_and_their_sample() -> None:
    cells = adverse_stopped.cells([""])
    assert len({str(cell) for cell in cells}) == len(cells) == 3 * 3 * 2 * 2 * 2
    chosen = adverse_stopped.sampled(cells, 2, 1)
    assert chosen == adverse_stopped.sampled(cells, 2, 1) != adverse_stopped.sampled(cells, 2, 2)
    assert {cell.seat for cell in chosen} == set(adverse_stopped.SEATS)
    assert len(chosen) == 6
    assert all(set(cell.observations) < set(OBSERVATIONS) for cell in chosen)
    (one,) = adverse_stopped.cells(["passt 1280 IPv6 in delayed bulk"])
    assert one.observations == ("bulk",)


def test_a_line_says_what_differs() -> None:
    line = {"contender": "ours", "seat": "passt", "mtu": 1500, "family": "IPv4", "way": "in", "path": "near"}
    line |= {"observation": "bulk", "seen": ["all"], "direct": ["all"], "same": True, "ms": {"time": 3.0}}
    assert "as direct  --seed 4" in adverse_stopped.told(line, 4)
    assert "seen" not in adverse_stopped.kept(line)
    line |= {"seen": ["lost"], "same": False}
    assert "['lost'], direct: ['all']" in adverse_stopped.told(line, 4)
    assert adverse_stopped.kept(line)["seen"] == ["lost"]


# Tables --------------------------------------------------------------------------------------------------------------


def results() -> dict[str, Any]:
    """One transfer of each contender and case, and one latency of each."""
    transfers = []
    for name, case in product(("direct", "ours", "pasta"), matrix() + curves()):
        fields = {key: getattr(case, key) for key in ("mode", "mtu", "family", "way", "fault", "size")}
        bad = name == "pasta" and case.fault == "corrupted"
        found = {"outcome": "damaged" if bad else "whole", "time": 0.5, "gap": 0.1, "cpu": 0.02, "seed": 1}
        transfers.append({"contender": name, **fields, **found})
    row = {"family": "IPv4", "kind": "1 byte", "bulk": "up", "delays": {"0.1": 2, "1.5": 1}}
    latencies = [
        {"contender": name, "mode": mode, "mtu": mtu, "rate": rate, **row}
        for name, mode, mtu in (("loopback", "direct", 0), ("ours", "pasta", 1500), ("ours", "vhost-user", 1500))
        for rate in (0.5e9, 1e9, 1.5e9)
    ]
    stopped = [
        {"contender": name, "seat": seat, "mtu": 1500, "family": "IPv4", "way": "in", "path": path}
        | {"observation": "bulk", "same": name == "ours", "ms": {"time": ms}}
        for name, seat in (("ours", "passt"), ("pasta", "passt"))
        for path, ms in (("near", 3.0), ("delayed", 70.0))
    ]
    return {"seeds": [1], "transfers": transfers, "latencies": latencies, "stopped": stopped}


def test_the_page_has_every_fault_and_each_failure(tmp_path: Path) -> None:
    made = results()
    made["transfers"][len(matrix() + curves()) + 7]["outcome"] = "stalled"
    path = tmp_path / "page.md"
    path.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n")
    fill(path, made)
    text = path.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert all(text.count(f"| {fault} |") == 2 for fault in FAULTS)
    assert f"not whole: {matrix()[7]}: stalled" in text
    assert "0 of 4; 4 damaged" in text
    figures = "0.10, 1.50 (8.0)"
    assert f"| 1 byte | up | {figures} | {figures} | - | - | - | {figures} |" in text
    assert text.count(figures) == 3
    assert "| bulk | - | - | 2 of 2; 3.0, 70.0 ms | - | - | 0 of 2; 3.0, 70.0 ms |" in text
    fill(path, made)
    assert path.read_text() == text


def test_results_are_added_to_those_that_are_there(tmp_path: Path) -> None:
    path, one = tmp_path / "results.json", results()
    parts = {part: lines for part, lines in one.items() if part != "seeds"}
    progress = Progress(path)
    progress.found |= parts
    progress.save(1)
    assert json.loads(path.read_text()) == one
    progress = Progress(path, resumes=True)
    assert all(progress.done(part) == lines for part, lines in parts.items())
    progress.found["stopped"] = one["stopped"]
    progress.save(2)
    assert json.loads(path.read_text()) == {**one, "seeds": [1, 2], "stopped": 2 * one["stopped"]}
    assert not Progress(path).done("stopped"), "only a run that goes on leaves anything out"


def test_a_part_of_a_run_leaves_the_rest_to_the_next(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Failures are known as well."""
    cases, begun = matrix()[:9], []
    ours = Programs("ours", "ours", [], [])
    monkeypatch.setattr("bench.adversity.placed", lambda *args: nullcontext())
    outcomes = iter(["whole", "stalled", "whole", "whole"])

    def transfer(place: object, case: Any, run: int, limit: float) -> dict[str, Any]:
        begun.append(case)
        if len(begun) == 4:
            progress._until = 0.0
        outcome = next(outcomes, "whole")
        return {"outcome": outcome, "time": 0.1, "gap": 0.0, "cpu": 0.0, "seed": case.seed(run)}

    monkeypatch.setattr("bench.adversity.transfer", transfer)
    path = tmp_path / "results.json"
    for stopped in (True, False):
        progress = Progress(path, resumes=True)
        progress.found["transfers"] += measure(cast(Any, None), ours, cases, 1, 1.0, progress)
        assert progress.stopped == stopped
        progress.save(1)
    assert begun == cases
    assert len(json.loads(path.read_text())["transfers"]) == len(cases)


def test_quantiles_are_those_of_all_rounds() -> None:
    row = {"contender": "ours", "mode": "pasta", "mtu": 1500, "family": "IPv4", "kind": "1 byte", "bulk": "up"}
    rounds = [row | {"delays": counted(n * 1e-5 for n in part), "rate": 1.0} for part in (range(51), range(51, 101))]
    (line,) = merged(rounds)
    assert (line["samples"], line["p50"], line["p99"]) == (101, 0.5, 0.99)


def test_a_page_without_a_place_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="no place"):
        fill(path, results())


def test_a_transfer_that_failed_has_no_rate() -> None:
    of_ours = [r for r in results()["transfers"] if r["contender"] == "ours"]
    points = dict(series(of_ours, "ours", "passt", "up", LOSS))
    assert set(points) == set(LOSSES)
    assert points[1.0] == pytest.approx(16.78, abs=0.01)
    for r in of_ours:
        r["outcome"] = "stalled"
    assert set(dict(series(of_ours, "ours", "passt", "up", LOSS)).values()) == {0.0}


def test_every_panel_has_all_contenders() -> None:
    figure = draw(results())
    try:
        assert [len(axes.lines) for axes in figure.axes] == [3] * 8
    finally:
        plt.close(figure)
