"""The programs that the benchmark compares with: other checkouts and builds."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import ROUNDS_AT_LEAST, arguments, chosen, rounds, takes_part
from bench.contenders import CONTENDERS, PICTURES, Contender, peer
from bench.lab import Lab, LabError
from bench.programs import queries, requests
from bench.report import Cell, Line
from bench.rows import ROWS

ROOT = Path(__file__).parent.parent


WITHOUT_TESTS = """
import importlib, sys
for name in ("pytest", "hypothesis", "xdist"):
    sys.modules[name] = None
for name in sys.argv[1:]:
    importlib.import_module(f"bench.{name}")
"""


def test_what_it_needs_is_installed_for_it() -> None:
    """scripts/setup bench, demo and demo-vm install none of the packages for tests (the soak has them)."""
    names = [path.stem for path in (ROOT / "bench").glob("*.py") if not path.stem.startswith(("__", "soak"))]
    assert {"demo", "demo_vm", "contenders", "vm"} < set(names)
    command = [sys.executable, "-c", WITHOUT_TESTS, *names, "__main__"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_checkout_is_a_peer() -> None:
    contender = peer(f"before={ROOT}")
    assert contender.start is not None and contender.serve is not None and contender.command is not None
    for argv in (contender.command(1, 1500, "none"), contender.serve("/nowhere", 1500)):
        program = argv[: argv.index("-q")]
        said = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True, cwd="/").stdout
        assert said.startswith(argv[2].partition("sys.argv[0] = '")[2].partition("'")[0]), said


def test_a_build_of_the_original_is_a_peer(tmp_path: Path) -> None:
    for name in ("pasta", "passt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    contender = peer(f"new={tmp_path}")
    assert contender.command is not None
    assert contender.command(7, 1500, "none")[0] == f"{tmp_path}/pasta"


@pytest.mark.parametrize("argument", ["before", "=/", "before=", "ours=/", "before=/proc"])
def test_a_peer_that_is_none(argument: str) -> None:
    with pytest.raises(LabError, match="--peer"):
        peer(argument)


def test_peers_take_part_beside_ours() -> None:
    _, contenders = chosen(arguments(["--peer", f"before={ROOT}", "--contenders", "ours,pasta"]))
    assert [c.name for c in contenders] == ["ours", "before", "pasta"]


def test_who_is_not_named_stands_beside_the_rows_of_the_pictures() -> None:
    rows = {row.name: row for row in ROWS}
    names = {c.name: c for c in CONTENDERS}
    assert set(PICTURES) <= rows.keys()
    for name, contender in names.items():
        everywhere = name in {"ours", "compiled", "pasta"}
        with_pictures = everywhere or name in {"slirp4netns", "loopback"}
        assert takes_part(rows["tcp-rr-64"], contender, named=False) == everywhere
        assert takes_part(rows["tcp-rr-16"], contender, named=False) == with_pictures
        assert takes_part(rows["tcp-rr-64"], contender)


def test_a_program_without_vhost_user_has_no_such_row() -> None:
    rows = {row.name: row for row in ROWS}
    ours = CONTENDERS[0]
    assert ours.name == "ours" and takes_part(rows["vhost-udp-in"], ours) and takes_part(rows["vm-udp-in"], ours)
    old = Contender("old", "old", ours.command, serve=lambda path, mtu: ["/bin/echo", "-q", path])
    assert not takes_part(rows["vhost-udp-in"], old) and takes_part(rows["vm-udp-in"], old)


def test_what_is_not_built_is_left_out(tmp_path: Path) -> None:
    contender = Contender("compiled", "compiled", lambda pid, mtu, ports: ["/bin/true"], built=tmp_path / "passt")
    assert contender.missing() == "compiled is not built: run `make compiled`"
    (tmp_path / "passt").touch()
    assert contender.missing() is None


WRK = """Running 2s test @ http://198.51.100.1:8080/file
  1 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency   650.20us    1.02ms  18.40ms   98.50%
    Req/Sec    26.10k     3.02k   31.00k    70.00%
  Latency Distribution
     50%  412.00us
     75%  601.00us
     90%    1.10ms
     99%    5.50ms
  52018 requests in 2.00s, 63.80MB read
Requests/sec:  26003.50
Transfer/sec:     31.90MB
"""
PGBENCH = """transaction type: <builtin: select only>
number of clients: 8
number of transactions actually processed: 11000
number of failed transactions: 0 (0.000%)
latency average = 1.450 ms
initial connection time = 20.101 ms
tps = 5517.241379 (without initial connection time)
"""


def test_figures_of_programs() -> None:
    assert requests(WRK) == (26003.5, 412.0, 5500.0)
    assert queries(PGBENCH) == (5517.241379, None, None)


def test_programs_that_failed_have_no_figures() -> None:
    errors = "  Socket errors: connect 0, read 3, write 0, timeout 0\n"
    with pytest.raises(LabError, match="wrk: Socket errors: connect 0, read 3"):
        requests(WRK.replace("Requests/sec", f"{errors}Requests/sec"))
    with pytest.raises(LabError, match="wrk: Non-2xx"):
        requests(WRK.replace("Requests/sec", "  Non-2xx or 3xx responses: 5\nRequests/sec"))
    with pytest.raises(LabError, match="transactions failed"):
        queries(PGBENCH.replace("transactions: 0", "transactions: 2"))
    for text in ("", WRK.replace("99%", "98%")):
        with pytest.raises(LabError, match="wrk printed no"):
            requests(text)
    with pytest.raises(LabError, match="pgbench printed no figure"):
        queries("")


def test_folders_of_servers_go_with_the_laboratory() -> None:
    lab = Lab()
    folder = lab.folder("x")
    (folder / "file").touch()
    assert lab.folder("x") == folder != lab.folder("y")
    lab.__exit__(None, None, None)
    assert not folder.exists()


CONGESTION = """
from bench.lab import Lab
with Lab("reno") as lab, lab.guest() as guest:
    for namespace in (lab.host, lab.peer, guest):
        print(namespace.run(["cat", "/proc/sys/net/ipv4/tcp_congestion_control"]), end="")
"""


def test_congestion_control_of_all_namespaces() -> None:
    unshare = ["unshare", "-Urnmp", "--mount-proc", "--fork", "--kill-child"]
    command = [*unshare, sys.executable, "-c", CONGESTION]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("reno\n" * 3, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--only", "tcp-rr-1", "--contenders", "loopback"],
        ["bench.long_path", "--contenders", "ours"],
        ["bench.adversity", "--parts", "latency"],
    ],
)
def test_a_congestion_control_that_is_none_is_one_line(arguments: list[str]) -> None:
    command = [sys.executable, "-m", *arguments, "--congestion", "tahoe"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("bench: --congestion tahoe: the kernel refuses it here, of reno ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("server", "client", "flows"),
    [("tcp-echo", "tcp-rr", 1), ("tcp-echo", "tcp-rr", 3), ("udp-echo", "udp-rr", 3), ("tcp-answer", "tcp-crr", 2)],
)
def test_operations_have_their_times(server: str, client: str, flows: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    argv = [sys.executable, "bench/load.py"]
    serving = [*argv, server, "127.0.0.1", "--port", port]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            asking = [*argv, client, "127.0.0.1", "--port", port, "--seconds", "0.2", "--flows", str(flows)]
            found = json.loads(subprocess.run(asking, capture_output=True, check=True, cwd=ROOT).stdout)
        finally:
            process.terminate()
    assert found["count"] > 0 and 0 < found["p50"] <= found["p99"] <= found["seconds"]


def made_of(names: list[str], pairs: dict[str, list[float]]) -> dict[str, Line]:
    """Lines whose pairs with the original are `pairs`."""
    cells = {name: {"ours": Cell(pairs.get(name, [1.0])), "pasta": Cell([1.0] * 9)} for name in names}
    return {name: Line(name, name, "", "", "", False, cells[name]) for name in names}


def test_all_rows_have_all_rounds_without_a_limit() -> None:
    args = arguments(["--rounds", "3", "--only", "tcp-rr-*"])
    rows, _ = chosen(args)
    found = [(turn, row.name) for turn, row in rounds(args, rows, made_of([], {}), 0.0)]
    assert found == [(turn, row.name) for turn in range(3) for row in rows]


def test_the_rest_of_the_time_goes_to_the_rows_whose_pairs_differ_most() -> None:
    args = arguments(["--rounds", "4", "--minutes", "1", "--only", "tcp-rr-*,start-30"])
    rows, _ = chosen(args)
    assert any(row.slow for row in rows)
    apart = {"tcp-rr-1": [1.0, 1.2], "tcp-rr-16": [1.0, 1.05], "tcp-rr-64": [1.0, 2.0], "start-30": [1.0, 9.0]}
    lines = made_of([row.name for row in rows], apart)
    found = []
    for turn, row in rounds(args, rows, lines, float("inf")):
        found.append((turn, row.name))
        if (turn, row.name) == (2, "tcp-rr-64"):
            lines["tcp-rr-64"].cells["ours"].values[:] = [1.0, 1.15]  # they agree better now
    assert found[: ROUNDS_AT_LEAST * len(rows)] == [(i, row.name) for i in range(ROUNDS_AT_LEAST) for row in rows]
    assert found[ROUNDS_AT_LEAST * len(rows) :] == [
        (2, "tcp-rr-64"), (2, "tcp-rr-1"), (3, "tcp-rr-1"), (3, "tcp-rr-64"),
    ]  # fmt: skip


def test_no_row_has_a_further_round_when_the_time_is_over() -> None:
    args = arguments(["--rounds", "4", "--minutes", "1", "--only", "tcp-rr-*"])
    rows, _ = chosen(args)
    lines = made_of([row.name for row in rows], {row.name: [1.0, 9.0] for row in rows})
    assert len(list(rounds(args, rows, lines, 0.0))) == ROUNDS_AT_LEAST * len(rows)
