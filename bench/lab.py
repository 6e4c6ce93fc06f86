"""The laboratory: a host and a peer made of network namespaces, and guests for the daemons to serve.

    guest (user + network namespace) --tap-- daemon --sockets-- host ==veth== peer
                                                                 |
                                                                lo

The benchmark never touches the machine's own network. `enter` re-executes it in a user, network, mount and PID
namespace of its own (`unshare`), which *is* the host from then on: an ordinary user needs no privilege for that, root
takes the same way, because some daemons refuse to work for root. Sysctls set there are this namespace's own. The PID
namespace makes the cleaning up certain: when its first process goes, by whatever way, the kernel ends everything in it.

The peer is a network namespace behind a veth with jumbo frames off, as a machine on the same wire would be. The
gateway's address belongs to the peer too, but daemons map it to the host's loopback, so the peer is reached by another.
"""

from __future__ import annotations

import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

GATEWAY = "198.51.100.1"
HOST = "198.51.100.2"
PEER = "198.51.100.3"
GATEWAY6 = "2001:db8:1::1"
HOST6 = "2001:db8:1::2"
PEER6 = "2001:db8:1::3"

PROGRAMS = {"ip": "iproute2", "iperf3": "iperf3", **dict.fromkeys(("unshare", "nsenter", "taskset"), "util-linux")}
DEFAULT_WMEM = "4096 16384 4194304"
RAISED_WMEM = "4096 262144 33554432"

ROOT = Path(__file__).resolve().parent.parent
_ENTERED = "PASST_BENCH_HOST"
_TICK = os.sysconf("SC_CLK_TCK")


class LabError(Exception):
    """The laboratory, or something in it, does not work; the text says what and why."""


def enter(module: str, argv: Sequence[str]) -> None:
    """Return inside the host namespace; the first call runs `python -m MODULE ARGV` there and exits as it does."""
    missing = {package for program, package in PROGRAMS.items() if not shutil.which(program)}
    if missing:
        raise LabError(f"programs missing: install the packages {' '.join(sorted(missing))}")
    if os.environ.get(_ENTERED) == "1":
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs have it ignored
        return
    # The package in this tree is what is measured.
    environment = {**os.environ, _ENTERED: "1", "PYTHONPATH": str(ROOT)}
    flags = ["--user", "--map-root-user", "--net", "--mount", "--mount-proc", "--pid", "--fork", "--kill-child"]
    command = ["unshare", *flags, sys.executable, "-m", module, *argv]
    inside = subprocess.Popen(command, env=environment, start_new_session=True)
    signals = 0

    def interrupt(number: int, frame: object) -> None:
        """The first signal asks for an end with a report; the second ends everything. unshare itself ignores both."""
        nonlocal signals
        signals += 1
        if signals > 1:
            inside.kill()
        for pid in Path(f"/proc/{inside.pid}/task/{inside.pid}/children").read_text().split():
            os.kill(int(pid), signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    signal.signal(signal.SIGTERM, interrupt)
    sys.exit(inside.wait() & 0xFF)


def set_sysctl(name: str, value: str) -> None:
    """Set `name`, with slashes, below /proc/sys/net of the host namespace."""
    Path("/proc/sys/net", name).write_text(value)


class Used(NamedTuple):
    """Processor seconds: all, and those in the program itself (user mode)."""

    total: float
    program: float

    def since(self, before: Used) -> Used:
        """The difference."""
        return Used(self.total - before.total, self.program - before.program)


def used_by(pid: int) -> Used:
    """Processor time of `pid` and of the children it has waited for."""
    user, system, child_user, child_system = map(
        int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]
    )
    return Used((user + system + child_user + child_system) / _TICK, (user + child_user) / _TICK)


def cpu_seconds(pid: int) -> float:
    """All of it."""
    return used_by(pid).total


def resident_kib(pid: int) -> int:
    """Resident memory of `pid` in KiB."""
    return _kib(pid, "status", "VmRSS:")


def share_kib(pid: int) -> int:
    """The same, with a share only of what it has together with other processes (PSS)."""
    return _kib(pid, "smaps_rollup", "Pss:")


def _kib(pid: int, file: str, name: str) -> int:
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise LabError(f"process {pid} has no resident memory")


@dataclass(frozen=True, slots=True)
class Placement:
    """Processors of the load's client, its server and the daemon; None leaves it to the scheduler.

    Where the scheduler puts three busy processes on two processors decides more than the daemon does: figures of one
    and the same program then differ by ten times from run to run. So each row says where its processes run, in the
    way in which daemons do best in it: *spread* for streams, where both ends do as much as the daemon; *apart* for
    messages, where the daemon does more than both ends together.
    """

    client: int | None = None
    server: int | None = None
    daemon: int | None = None

    @staticmethod
    def argv(cpu: int | None) -> list[str]:
        """The prefix of a command that makes it run on `cpu`."""
        return [] if cpu is None else ["taskset", "-c", str(cpu)]


def placements() -> dict[str, Placement]:
    """Placements by name; with a single processor they are all the same."""
    cpus = sorted(os.sched_getaffinity(0))
    first, second = cpus[0], cpus[-1]
    return {
        "free": Placement(),
        "spread": Placement(client=first, server=second),
        "apart": Placement(client=first, server=first, daemon=second),
    }


@dataclass(frozen=True, slots=True)
class Namespace:
    """A network namespace, entered through the process `pid`; None is the host, where the benchmark itself runs."""

    pid: int | None = None
    user: bool = False

    def argv(self, command: Sequence[str]) -> list[str]:
        """`command` as to be executed by the host."""
        if self.pid is None:
            return list(command)
        flags = ["-U", "--preserve-credentials"] if self.user else []
        return ["nsenter", "-t", str(self.pid), *flags, "-n", *command]

    def run(self, command: Sequence[str], timeout: float = 10.0) -> str:
        """Standard output of `command`, which must succeed within `timeout` seconds."""
        try:
            done = subprocess.run(
                self.argv(command),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout,
                check=False,
            )
        except subprocess.TimeoutExpired as e:
            raise LabError(f"{command[0]}: no end after {timeout:.0f} s") from e
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines()
            raise LabError(f"{command[0]}: status {done.returncode}: {said[-1] if said else 'no message'}")
        return done.stdout

    def spawn(self, command: Sequence[str], *, talks: bool = False, errors_too: bool = False) -> subprocess.Popen[str]:
        """`command`, running, with its standard output in a pipe, with `errors_too` that for errors in the same one,
        and its standard input, too, if it `talks`.
        """
        pipe = subprocess.PIPE
        stdin = pipe if talks else subprocess.DEVNULL
        stderr = subprocess.STDOUT if errors_too else pipe
        return subprocess.Popen(self.argv(command), stdin=stdin, stdout=pipe, stderr=stderr, text=True)


def stop(process: subprocess.Popen[str]) -> None:
    """End `process` and wait for it."""
    process.terminate()
    try:
        process.communicate(timeout=2)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


def wait_for(process: subprocess.Popen[str], word: str, timeout: float = 5.0) -> None:
    """Return when `process` has printed `word`; what it printed until then is consumed."""
    assert process.stdout is not None
    fd, printed = process.stdout.fileno(), b""  # not the buffered file: select(2) does not see its buffer
    deadline = time.monotonic() + timeout
    while (left := deadline - time.monotonic()) > 0 and select.select([fd], [], [], left)[0]:
        if not (data := os.read(fd, 4096)):
            break
        printed += data
        if word.encode() in printed:
            return
    raise LabError(f"{process.args!r} did not get ready")


@dataclass(slots=True)
class Lab:
    """Host and peer while the context lasts, and every process started through it.

    `congestion` is the congestion control of senders in host, peer and guests (tcp_congestion_control); empty: as the
    machine has it. One that paces ("bbr") sends from timers, which interrupt whatever runs.
    """

    congestion: str = ""
    host: Namespace = field(default_factory=Namespace)
    peer: Namespace = field(default_factory=Namespace)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    folders: dict[str, tempfile.TemporaryDirectory[str]] = field(default_factory=dict)

    def __enter__(self) -> Lab:
        self.host.run(["ip", "link", "set", "lo", "up"])
        if self.congestion:
            try:
                self.host.run(["sh", "-c", self._choose()])
            except LabError as e:
                known = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().strip()
                raise LabError(f"--congestion {self.congestion}: the kernel refuses it here, of {known}") from e
        self.peer = Namespace(self._hold(["--net"]).pid)
        ends = ["eth0", "type", "veth", "peer", "name", "eth0", "netns", str(self.peer.pid)]
        self.host.run(["ip", "link", "add", *ends])
        self._address(self.host, HOST, HOST6)
        self._address(self.peer, GATEWAY, GATEWAY6)
        self._address(self.peer, PEER, PEER6)
        self.host.run(["ip", "route", "add", "default", "via", GATEWAY])
        self.host.run(["ip", "-6", "route", "add", "default", "via", GATEWAY6])
        set_sysctl("ipv4/ip_local_port_range", "10240 65535")
        set_sysctl("ipv4/ping_group_range", "0 0")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for process in reversed(self.processes):
            stop(process)
        for folder in self.folders.values():
            folder.cleanup()

    def folder(self, name: str) -> Path:
        """A folder for files of a server, which lasts as long as the context."""
        if name not in self.folders:
            self.folders[name] = tempfile.TemporaryDirectory(prefix=f"passt-bench-{name}-")
        return Path(self.folders[name].name)

    @staticmethod
    def _address(namespace: Namespace, v4: str, v6: str) -> None:
        namespace.run(["ip", "addr", "add", f"{v4}/24", "dev", "eth0"])
        namespace.run(["ip", "-6", "addr", "add", f"{v6}/64", "dev", "eth0", "nodad"])
        namespace.run(["ip", "link", "set", "lo", "up"])
        namespace.run(["ip", "link", "set", "eth0", "up"])

    def spawn(
        self,
        command: Sequence[str],
        namespace: Namespace | None = None,
        *,
        talks: bool = False,
        errors_too: bool = False,
    ) -> subprocess.Popen[str]:
        """`command`, running until `stop` or the end of the context."""
        process = (namespace or self.host).spawn(command, talks=talks, errors_too=errors_too)
        self.processes.append(process)
        return process

    def stop(self, process: subprocess.Popen[str]) -> None:
        """End a process that `spawn` started."""
        stop(process)
        self.processes.remove(process)

    def _hold(self, flags: Sequence[str]) -> subprocess.Popen[str]:
        """A process that keeps new namespaces open; `flags` are those of unshare(1)."""
        choose = f"{self._choose()} && " if self.congestion else ""
        holder = self.spawn(["unshare", *flags, "sh", "-c", f"{choose}echo ready; exec sleep infinity"])
        wait_for(holder, "ready")
        return holder

    def _choose(self) -> str:
        """A line of the shell for a namespace. Without rights over the machine only some are allowed."""
        return f"echo {shlex.quote(self.congestion)} >/proc/sys/net/ipv4/tcp_congestion_control"

    @contextmanager
    def guest(self) -> Iterator[Namespace]:
        """A user and network namespace with nothing but its loopback."""
        holder = self._hold(["--user", "--map-root-user", "--net"])
        guest = Namespace(holder.pid, user=True)
        guest.run(["ip", "link", "set", "lo", "up"])
        try:
            yield guest
        finally:
            self.stop(holder)
