"""`python -m bench.soak [--seconds N] [--mode pasta|passt|both]`: real programs, all at once, for a long time.

A guest of pasta, and then a guest of passt behind a relay that stands for its machine, run the jobs of `soak_jobs.py`
with servers on another host (`soak_servers.py`). Each job ends by itself, and is checked. Memory and descriptors of the
daemon are sampled. The exit status is 1 if a job went wrong or if either grows:

    what         compared                                                               may grow by
    -----------  ---------------------------------------------------------------------  ----------------------------
    memory       medians of the second and of the last quarter of the samples from 45   a tenth, and 2 MiB
                 s on
    descriptors  the same                                                               a fifth, and 32
    descriptors  when all is over, and idle flows had their time, with those before     the idle timers, and 16

It runs as root, in namespaces of its own.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from passt.loop.timers import IDLE_MAX
from tests.system.support import wait_for
from tests.system.traffic.support import Lan, Namespace, new_lan, root_user
from tests.system.vm.support import passt

from .lab import GATEWAY, HOST, ROOT, LabError, cpu_seconds, resident_kib
from .soak_jobs import FORWARDED, Job, jobs, run_all
from .soak_servers import PROGRAMS, servers
from .vm import RELAY, TAP, relay

NEEDED = ("curl", "dig", "git", "nginx", "pgbench", "psql", "scp", "ss", "ssh", "wrk", "/usr/sbin/sshd", "dnsmasq")
MODES = ("pasta", "passt")
SAMPLES = 40  # in a run
SETTLE = 45.0  # s at the begin and at the end that do not count: DNS flows stay for 30
LEAST = 2 * SETTLE  # s for a mode
ROWS = 10  # of the table of samples


@dataclass(frozen=True)
class Sample:
    seconds: float
    resident: int  # KiB
    descriptors: int
    cpu: float  # s


class Watch:
    """Samples of a daemon, taken by a thread."""

    def __init__(self, pid: int, interval: float) -> None:
        self.pid = pid
        self.samples: list[Sample] = []
        self._interval = interval
        self._begin = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._take_all)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._thread.join()

    def _take_all(self) -> None:
        while not self._over.wait(self._interval):
            self.samples.append(self.take())

    def take(self) -> Sample:
        seconds = time.monotonic() - self._begin
        return Sample(seconds, resident_kib(self.pid), descriptors(self.pid), cpu_seconds(self.pid))


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def growth(samples: list[Sample]) -> list[str]:
    """A line for each figure that has grown from the second quarter to the last one, and by how much."""
    quarter = len(samples) // 4
    found = []
    for name, least, share in (("resident", 2048, 0.1), ("descriptors", 32, 0.2)):
        early = statistics.median(getattr(s, name) for s in samples[quarter : 2 * quarter])
        late = statistics.median(getattr(s, name) for s in samples[-quarter:])
        if late > early + max(least, share * early):
            found.append(f"{name} grew from {early:.0f} to {late:.0f}")
    return found


@contextmanager
def pasta_guest(lan: Lan) -> Iterator[tuple[Namespace, int]]:
    """A guest of pasta, and the PID of the daemon."""
    options = ["-q", "--config-net", "-t", str(FORWARDED), "-u", "none", "-T", "none", "-U", "none"]
    with lan.pasta(root_user(), *options) as guest:
        yield guest, guest.daemon


@contextmanager
def passt_guest(lan: Lan) -> Iterator[tuple[Namespace, int]]:
    """A namespace behind the relay, with the configuration that passt would give a machine."""
    root = root_user()
    with passt(lan, root, "-t", str(FORWARDED)) as served:
        guest = Namespace(["unshare", "--user", "--map-root-user", "--net"], root)
        try:
            with guest.popen(str(relay(RELAY)), TAP, str(served.path)):
                wait_for(lambda: TAP in guest.run("ip", "link").stdout, "the relay's tap")
                guest.run("ip", "link", "set", "lo", "up")
                guest.run("ip", "link", "set", TAP, "up")
                guest.run("ip", "address", "add", f"{HOST}/24", "dev", TAP)
                guest.run("ip", "route", "add", "default", "via", GATEWAY)
                yield guest, served.daemon
        finally:
            guest.close()


def soak(mode: str, seconds: float) -> bool:
    """One mode; prints its tables, and returns whether all was right."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        lan = stack.enter_context(new_lan(root_user()))
        there = stack.enter_context(servers(lan.peer, directory))
        guest, daemon = stack.enter_context({"pasta": pasta_guest, "passt": passt_guest}[mode](lan))
        own = directory / "guest"
        own.mkdir()
        shutil.copy(directory / "user_key", own / "key")
        user = os.stat(f"/proc/{guest.pid}")
        for path in (own, own / "key"):
            os.chown(path, user.st_uid, user.st_gid)
        serve = (*PROGRAMS, "http-serve", "0.0.0.0", str(FORWARDED))
        stack.enter_context(guest.popen(*serve, env={**guest.user.env, "PYTHONPATH": str(ROOT)}))
        wait_for(lambda: f":{FORWARDED} " in guest.run("ss", "-Hltn").stdout, "the guest's server")
        made = jobs(guest, lan.peer, there, own)
        before = descriptors(daemon)
        with Watch(daemon, seconds / SAMPLES) as watch:
            run_all(made, seconds)
        time.sleep(SETTLE)
        last = watch.take()
        print(f"\n{mode}, {seconds:.0f} s:\n")
        report(made, [*watch.samples, last])
        wrong = growth([s for s in watch.samples if s.seconds >= SETTLE])
        if last.descriptors > before + IDLE_MAX + 16:
            wrong.append(f"{last.descriptors} descriptors are left, {before} were there before")
        for line in wrong:
            print(f"{mode}: {line}")
        return not wrong and not any(job.bad for job in made) and all(job.runs for job in made)


def report(made: list[Job], samples: list[Sample]) -> None:
    """The tables, in Markdown. The last sample is that of the daemon at rest."""
    print("| job | runs | bad | longest run |\n|---|--:|--:|--:|")
    for job in made:
        print(f"| {job.name} | {job.runs} | {job.bad} | {job.longest:.1f} s |")
    for job in made:
        for said in job.said[:3]:
            print(f"\n{job.name}: {said}")
    print("\n| after | resident | descriptors | processor time |\n|--:|--:|--:|--:|")
    shown = [*samples[: -1 : max(len(samples) // ROWS, 1)], samples[-1]]
    for s in shown:
        print(f"| {s.seconds:.0f} s | {s.resident / 1024:.1f} MiB | {s.descriptors} | {s.cpu:.0f} s |")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=1200.0, help="for all modes together")
    parser.add_argument("--mode", choices=(*MODES, "both"), default="both")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        raise LabError("the servers need root")
    missing = [program for program in NEEDED if not shutil.which(program)]
    if missing:
        raise LabError(f"programs missing: {' '.join(missing)}: scripts/setup soak")
    modes = MODES if arguments.mode == "both" else (arguments.mode,)
    if arguments.seconds < LEAST * len(modes):
        raise LabError(f"{LEAST:.0f} s are the least for a mode")
    right = [soak(mode, arguments.seconds / len(modes)) for mode in modes]
    print("\nAll was right." if all(right) else "\nNot all was right.")
    return 0 if all(right) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LabError as e:
        raise SystemExit(f"soak: {e}") from None
