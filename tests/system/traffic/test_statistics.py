"""Statistics of the traffic: tables and JSON, log lines of flows, and a log file of limited size."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..support import User, alive, wait_for
from .support import GATEWAY, Guest, Lan, in_thread, read_all

SIZE = 8_000_000
SUFFIXES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9}


def transfer(lan: Lan, guest: Guest, size: int) -> None:
    """So many bytes from the guest to a server on the host's loopback, through the tap."""
    with lan.host.listen("127.0.0.1") as listener, guest.connect(GATEWAY, listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        with server, in_thread(read_all, server) as received:
            client.sendall(bytes(size))
            client.shutdown(socket.SHUT_WR)
            assert len(received()) == size
            server.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""


def tables(text: str) -> list[dict[str, list[str]]]:
    """The tables in what was said: the first words of each line -> its numbers."""
    found: list[dict[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("Statistics of the last "):
            found.append({})
        elif found:
            name, *cells = re.split(r"\s{2,}", line.strip())
            found[-1][name] = cells
    return found


def number(cell: str) -> float:
    value, _, suffix = cell.partition(" ")
    return float(value) * SUFFIXES[suffix]


def last_table(guest: Guest, done: Callable[[dict[str, list[str]]], bool]) -> dict[str, list[str]]:
    """The first table for which `done` holds, once it is there as a whole."""
    return wait_for(lambda: next((t for t in tables(guest.said())[:-1] if done(t)), None), "a table")  # type: ignore[no-any-return]


def test_table_while_a_command_runs(lan: Lan, anyone: User) -> None:
    """Its totals are those of the transfer; its rates are what a table has beyond the one before it."""
    with lan.pasta(anyone, "-q", "--config-net", "--stats", "0.3") as guest:
        transfer(lan, guest, SIZE)
        table = last_table(guest, lambda t: "tcp" in t and t["tcp"][0] == "0")
        frames_rate, frames, bytes_rate, total = map(number, table["guest -> host"])
        assert SIZE <= total < SIZE * 1.05
        assert SIZE / 65536 <= frames < SIZE / 500
        assert frames_rate < frames * 4 and bytes_rate < total * 4
        assert table["tcp"][2:] == ["1", "1"]
        assert number(table["host -> guest"][3]) < SIZE / 10, "acknowledgements"
        heads = re.findall(r"^Statistics of the last (\S+) s, (\S+) s after the start$", guest.said(), re.M)
        assert all(0.2 < float(last) < 5 for last, _ in heads)


def test_json_is_exact(lan: Lan, ordinary_user: User) -> None:
    """From socket to socket, every byte of payload is counted, and no other."""
    with lan.host.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        options = "-q", "--config-net", "--stats", "0.2,json", "-T", str(port)
        with lan.pasta(ordinary_user, *options) as guest:
            with guest.connect("127.0.0.1", port) as client:
                server, _ = listener.accept()
                with server, in_thread(read_all, server) as received:
                    server.sendall(b"x" * 1234)
                    assert len(client.recv(1234, socket.MSG_WAITALL)) == 1234
                    client.sendall(bytes(SIZE))
                    client.shutdown(socket.SHUT_WR)
                    assert len(received()) == SIZE

            def snapshots() -> list[dict[str, Any]]:
                lines = guest.said().split("\n")[:-1]
                return [json.loads(line) for line in lines if line.startswith("{")]

            def seen() -> dict[str, Any] | None:
                return next((s for s in snapshots() if s["flows"]["tcp_splice"]["closed"]), None)

            snap = wait_for(seen, "a snapshot after the connection")
            assert snap["spliced"]["tcp"] == {"to_guest": 1234, "to_host": SIZE}
            assert snap["flows"]["tcp_splice"] == {"open": 0, "opened": 1, "closed": {"both ended": 1}}
            assert (snap["guests"], snap["mode"]) == (1, "pasta")
            assert snap["memory"] > 5e6 and snap["cpu"]["user"] > 0
            times = [s["uptime"] for s in snapshots()]
            assert times == sorted(set(times))


def test_signal_to_a_daemon_with_a_log_file(lan: Lan, anyone: User, open_dir: Path) -> None:
    log, pid_file = open_dir / "log", open_dir / "pid"
    with lan.pasta(anyone, "-q", "--config-net") as outer:  # a process with a namespace to serve
        argv = [anyone.python, "-m", "passt", "-q", "-I", "other0", "-l", str(log), "-P", str(pid_file), str(outer.pid)]
        lan.host.run(*anyone.command(argv), env=anyone.env)
        pid = int(pid_file.read_text())
        try:
            before = log.read_text()
            os.kill(pid, signal.SIGUSR1)
            wait_for(lambda: "  processor  " in log.read_text(), "a table in the log file")
            lines = log.read_text().removeprefix(before).splitlines()
            assert re.fullmatch(r"\d+\.\d{4}: info:    Statistics of the last \S+ s, \S+ s after the start", lines[0])
            assert alive(pid)
        finally:
            os.kill(pid, signal.SIGTERM)
            wait_for(lambda: not alive(pid), "the end of the daemon")


def test_lines_of_a_flow(lan: Lan, ordinary_user: User) -> None:
    with lan.pasta(ordinary_user, "-d", "-f", "--config-net") as guest:
        transfer(lan, guest, 100_000)
        end = wait_for(lambda: re.search(r"Flow (\d+) \(TCP connection\): closed: (.*)", guest.said()), "its end")
        index, how = end.groups()
        assert re.fullmatch(r"both ended; 100000 bytes out, 0 in, \d+\.\d s", how)
        begin = (
            rf"Flow {index} \(TCP connection\): \S+:\d+ -> {re.escape(GATEWAY)}:(\d+) \(host 127\.0\.0\.1:\1\) opened"
        )
        assert re.search(begin, guest.said())
        assert "NEW" not in guest.said(), "steps in between are for --trace"


def test_log_file_keeps_its_size_and_what_is_newest(lan: Lan, anyone: User, open_dir: Path) -> None:
    log, limit = open_dir / "log", 40960
    options = "--trace", "-f", "--config-net", "-l", str(log), "--log-size", str(limit)
    with lan.pasta(anyone, *options) as guest, lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as server:
        header = log.read_text().splitlines()[0]
        assert re.fullmatch(r"pasta \S+: \S+ \(\d+\)", header)
        client = guest.connect(GATEWAY, server.getsockname()[1], socket.SOCK_DGRAM)
        for size in range(1, 1001):
            client.send(bytes(size))
            assert len(server.recv(2000)) == size
            assert log.stat().st_size <= limit
        newest = re.compile(rf"guest -> host .* UDP {1000 + 42}: ")
        wait_for(lambda: newest.search(log.read_text()), "the line of the last datagram")
        first, *lines = log.read_text().splitlines()
        assert first == header and log.stat().st_size > limit // 2
        assert all(re.match(r"\d+\.\d{4}: ", line) for line in lines), "whole lines"
        times = [float(line.split(":")[0]) for line in lines]
        assert times == sorted(times) and times[0] > 0
