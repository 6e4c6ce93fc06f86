"""The jobs of the soak: what clients do, over and over, and how it is seen that all of it was right.

A job is a shell script that runs in the guest, or on the peer for those that come in, and ends with status 0 if every
byte and every answer was right. Data is compared by SHA-256.
"""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.system.traffic.support import Namespace

from .content import digest
from .lab import HOST, PEER, ROOT
from .soak_servers import HTTP, HTTP2, PARTS, POSTGRES, PROGRAMS, QUIC, SSH, WEBSOCKET, Servers

FORWARDED = 8000  # port of the guest's HTTP server, and of the host
INBOUND = 4 << 20  # bytes
TIMEOUT = 180.0  # s, for one run of a job
PAUSE = 0.2  # s between runs
QUIC_PORTS = range(7000, 7008)  # local ports in turn, so that idle flows do not add up
ROWS = 20_000  # of COPY

_PRELUDE = "set -o pipefail; sum() { sha256sum | cut -d' ' -f1; }; "
_PSQL = f"psql -h {PEER} -p {POSTGRES} -U postgres -qAt -v ON_ERROR_STOP=1"
_ROWS = f"seq 1 {ROWS} | sed 's/$/\\tline of text/'"

# {name} are the variables of `scripts`
SCRIPTS = {
    "pgbench, 50 clients": (
        f"pgbench -h {PEER} -p {POSTGRES} -U postgres -c 50 -j 2 -T 8 postgres >{{tmp}}/pgbench 2>&1"
        " || {{ cat {tmp}/pgbench >&2; exit 1; }}; grep -q 'number of failed transactions: 0 ' {tmp}/pgbench"
    ),
    "COPY in and out": (
        f"{_PSQL} -c 'TRUNCATE lines' && {_ROWS} | {_PSQL} -c 'COPY lines FROM STDIN'"
        f" && test $({_PSQL} -c 'COPY (SELECT * FROM lines ORDER BY n) TO STDOUT' | sum) = $({_ROWS} | sum)"
    ),
    "HTTP by wrk, 40 connections": (
        f"wrk -t 2 -c 40 -d 5 --timeout 30 http://{PEER}:{HTTP}/small0 >{{tmp}}/wrk"
        " && grep -q 'requests in' {tmp}/wrk && ! grep -E 'Socket errors|Non-2xx' {tmp}/wrk >&2"
    ),
    "HTTP, a file of 32 MiB": f"test $(curl -sf http://{PEER}:{HTTP}/big | sum) = {{big}}",
    "HTTP/2, 8 files at once": (
        f"curl -sfk --http2 --parallel -o '{{tmp}}/h#1' 'https://{PEER}:{HTTP2}/small[0-{PARTS - 1}]'"
        " 2>{tmp}/progress"
        f" && for i in $(seq 0 {PARTS - 1}); do test $(sum <{{tmp}}/h$i) = {{small}} || exit 1; done"
    ),
    "git clone over HTTP": (
        f"rm -rf {{tmp}}/clone; git clone -q http://{PEER}:{HTTP}/repository.git {{tmp}}/clone"
        " && git -C {tmp}/clone fsck --no-progress && test $(git -C {tmp}/clone rev-parse HEAD) = {head}"
    ),
    "ssh": f"test $({{ssh}} -p {SSH} root@{PEER} cat {{files}}/big | sum) = {{big}}",
    "scp, there and back": (
        f"{{scp}} -P {SSH} root@{PEER}:{{files}}/small0 {{tmp}}/there && {{scp}} -P {SSH} {{tmp}}/there"
        f" root@{PEER}:{{tmp}}/back && test $(sum <{{tmp}}/back) = {{small}}"
    ),
    "dig, UDP and TCP": (
        # a datagram may be lost where all are busy: dig tries again, and says so behind semicolons
        f"for i in 1 2 3 4 5; do"
        f" test \"$(dig +short +tries=5 @{PEER} -p {{dns}} name.test | grep -v '^;')\" = 192.0.2.77 || exit 1; done;"
        f" test $(dig +short +tcp @{PEER} -p {{dns}} long.test TXT | grep -vc '^;') = 8"
    ),
    "WebSocket": f"{{python}} websocket {PEER} {WEBSOCKET}",
    "QUIC": f"{{python}} quic {PEER} {QUIC} {{port}}",
}
INBOUND_SCRIPTS = {
    "HTTP from outside, 4 MiB": f"test $(curl -sf http://{HOST}:{FORWARDED}/{INBOUND} | sum) = {{inbound}}",
}


@dataclass
class Job:
    """A job, and what became of it."""

    name: str
    where: Namespace
    script: str
    runs: int = 0
    bad: int = 0
    longest: float = 0.0  # s
    said: list[str] = field(default_factory=list)  # by runs that went wrong

    def repeat(self, until: float) -> None:
        """Run it again and again until a time of time.monotonic()."""
        while time.monotonic() < until:
            port = QUIC_PORTS[self.runs % len(QUIC_PORTS)]
            begun = time.monotonic()
            try:
                script = _PRELUDE + self.script.replace("{port}", str(port))
                environment = {**self.where.user.env, "PYTHONPATH": str(ROOT), "HOME": "/tmp"}
                done = self.where.run("bash", "-c", script, check=False, timeout=TIMEOUT, env=environment)
                said = (done.stderr + done.stdout)[-300:]
                wrong = "" if done.returncode == 0 else f"status {done.returncode}: {said}"
            except subprocess.TimeoutExpired:
                wrong = f"no end after {TIMEOUT:.0f} s"
            self.runs += 1
            self.longest = max(self.longest, time.monotonic() - begun)
            if wrong:
                self.bad += 1
                self.said.append(wrong)
            time.sleep(PAUSE)


def jobs(guest: Namespace, peer: Namespace, there: Servers, directory: Path) -> list[Job]:
    """All jobs. `directory` may be written by the guest's user, who owns the key for ssh there."""
    key = f"-q -i {directory}/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o BatchMode=yes"
    values: Mapping[str, object] = {
        "files": there.directory / "files",
        "big": there.big,
        "small": there.small,
        "head": there.head,
        "dns": there.dns,
        "inbound": digest(INBOUND),
        "ssh": f"ssh {key}",
        "scp": f"scp {key}",
        "python": " ".join(PROGRAMS),
        "port": "{port}",
    }
    made = []
    for where, scripts in ((guest, SCRIPTS), (peer, INBOUND_SCRIPTS)):
        for name, script in scripts.items():
            tmp = tempfile.mkdtemp(dir=directory)
            Path(tmp).chmod(0o777)
            made.append(Job(name, where, script.format(tmp=tmp, **values)))
    return made


def run_all(made: list[Job], seconds: float) -> None:
    """All jobs at the same time, each in turns of its own."""
    until = time.monotonic() + seconds
    threads = [threading.Thread(target=job.repeat, args=(until,)) for job in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
