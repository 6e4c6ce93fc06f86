"""Rows of real programs: HTTP with kept connections by wrk from nginx, queries by pgbench of PostgreSQL.

Servers are on the host, and start anew for each sample, on the processor of its placement. The tables of PostgreSQL are
made once in a run. It refuses to be root, as all programs of the laboratory are, so it runs in a user namespace of its
own.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from .contenders import Seat
from .lab import Lab, LabError, wait_for

HTTP_PORT, POSTGRES_PORT = 8080, 5432
SIZE = 1024  # bytes of the file that wrk gets
ROWS_OF_TABLES = 1  # the scale of pgbench
READY = 10.0  # s for a server to start
NGINX = """
daemon off; worker_processes 1; pid {folder}/pid; error_log stderr notice; user root;
events {{ worker_connections 1024; }}
http {{
    access_log off; keepalive_requests 1000000000; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    server {{ listen 127.0.0.1:{port} backlog=1024; root {folder}; }}
}}
"""
_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6}
_QUANTILE = r"^\s*{}%\s+([\d.]+)(us|ms|s)\s*$"

Counted = tuple[float, float | None, float | None]  # a second, p50 and p99 in us
Server = Callable[[Lab, Sequence[str]], AbstractContextManager[None]]
Client = Callable[[Seat, float, int], list[str]]


@contextmanager
def nginx(lab: Lab, place: Sequence[str]) -> Iterator[None]:
    """nginx on the host, by the command prefix `place`."""
    folder = lab.folder("nginx")
    (folder / "file").write_bytes(bytes(SIZE))
    (folder / "conf").write_text(NGINX.format(folder=folder, port=HTTP_PORT))
    server = lab.spawn([*place, _program("nginx"), "-e", "stderr", "-c", f"{folder}/conf"], errors_too=True)
    try:
        wait_for(server, "start worker process ", READY)
        yield
    finally:
        lab.stop(server)


def wrk(seat: Seat, seconds: float, flows: int) -> list[str]:
    """argv of the client of nginx."""
    url = f"http://{seat.to_host}:{HTTP_PORT}/file"
    return [_program("wrk"), "-t1", f"-c{flows}", f"-d{seconds:.0f}s", "--latency", url]


@contextmanager
def postgres(lab: Lab, place: Sequence[str]) -> Iterator[None]:
    """PostgreSQL on the host, likewise, with the tables of pgbench."""
    folder = lab.folder("postgres")
    become = ["unshare", "--user", "--map-user=1000", "--map-group=1000"]
    fresh = not (folder / "PG_VERSION").exists()
    if fresh:
        folder.chmod(0o700)
        options = ["-A", "trust", "--no-sync", "-E", "UTF8", "-U", "postgres"]
        lab.host.run([*become, _of_postgres("initdb"), "-D", str(folder), *options], timeout=60)
    options = ["-c", "max_connections=120", "-c", "fsync=off", "-c", f"unix_socket_directories={folder}"]
    command = [*place, *become, _of_postgres("postgres"), "-D", str(folder), "-h", "127.0.0.1", *options]
    server = lab.spawn([*command, "-p", str(POSTGRES_PORT)], errors_too=True)
    try:
        wait_for(server, "ready to accept connections", READY)
        if fresh:
            scale = str(ROWS_OF_TABLES)
            tables = ["-h", "127.0.0.1", "-U", "postgres", "-q", "-i", "-s", scale, "postgres"]
            lab.host.run([_program("pgbench"), *tables], timeout=60)
        yield
    finally:
        lab.stop(server)


def pgbench(seat: Seat, seconds: float, flows: int) -> list[str]:
    """argv of the client of PostgreSQL: queries of one row."""
    return [
        _program("pgbench"), "-h", seat.to_host, "-p", str(POSTGRES_PORT), "-U", "postgres",
        "-n", "-S", "-c", str(flows), "-j", "1", "-T", f"{seconds:.0f}", "postgres",
    ]  # fmt: skip


def requests(printed: str) -> Counted:
    """The figures that wrk printed. Raises LabError where requests failed."""
    if failed := re.search(r"^\s*(Socket errors: .*|Non-2xx .*)$", printed, re.M):
        raise LabError(f"wrk: {failed[1]}")
    return _number(printed, r"^Requests/sec:\s+([\d.]+)$", "wrk"), _quantile(printed, 50), _quantile(printed, 99)


def queries(printed: str) -> Counted:
    """The figures that pgbench printed, without quantiles. Raises LabError where queries failed."""
    if _number(printed, r"^number of failed transactions: (\d+)", "pgbench"):
        raise LabError("pgbench: transactions failed")
    return _number(printed, r"^tps = ([\d.]+) ", "pgbench"), None, None


def _number(printed: str, pattern: str, program: str) -> float:
    found = re.search(pattern, printed, re.M)
    if found is None:
        raise LabError(f"{program} printed no figure: {printed[-200:]!r}")
    return float(found[1])


def _quantile(printed: str, n: int) -> float:
    found = re.search(_QUANTILE.format(n), printed, re.M)
    if found is None:
        raise LabError(f"wrk printed no quantile: {printed[-200:]!r}")
    return float(found[1]) * _UNITS[found[2]]


def _program(name: str) -> str:
    path = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")
    if path is None:
        raise LabError(f"{name} is not installed")
    return path


def _of_postgres(name: str) -> str:
    found = glob.glob(f"/usr/lib/postgresql/*/bin/{name}")
    if not found:
        raise LabError("postgresql is not installed")
    return str(Path(max(found)))
