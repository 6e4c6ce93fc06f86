"""The compared programs: each contender starts for a guest namespace and knows the host's addresses from there.

| name        | what it is                                                                                      |
|-------------|-------------------------------------------------------------------------------------------------|
| ours        | this project, `python -m passt`                                                                 |
| compiled    | its compiled build, which `make compiled` puts into build/compiled                              |
| ours-wmem   | the same with the host's net.ipv4.tcp_wmem raised                                               |
| pasta       | the C original of Debian's package passt                                                        |
| pasta-wmem  | the same with tcp_wmem raised: there it is at its best                                          |
| slirp4netns | TCP/IP in user space, the older way                                                             |
| loopback    | no daemon: the load runs in the host namespace, to 127.0.0.1 or straight over the veth          |

The two with `-wmem` take part where they are named. slirp4netns and loopback stand beside the rows of the pictures, and
take part in all rows where they are named.

`peer` makes another one of a folder: a checkout of this project (an earlier one, say), or a build of the original.

A virtual machine, or what stands for one, is served by the passt of the same project.

All daemons run with the same limits, as the user of the benchmark, in the foreground. Where they forward ports, they
forward those of the load and no others, so that scanning for ports does not count.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.system.vm.machine import VirtualMachine

from .lab import DEFAULT_WMEM, GATEWAY, GATEWAY6, PEER, RAISED_WMEM, Lab, LabError, Namespace, Placement, set_sysctl

READY_TIMEOUT = 10.0

Command = Callable[[int, int, str], list[str]]
SocketCommand = Callable[[str, int], list[str]]
LOAD_PORTS = "5201,5401"  # of iperf3, of load.py


@dataclass(frozen=True, slots=True)
class Contender:
    """One column of the table.

    `command` gives argv for a guest's PID, an MTU and the TCP ports that are forwarded to it; None is bare loopback.
    `start` gives what brings up a namespace, with such ports, runs true(1) in it and ends. `serve` gives argv of the
    daemon that serves a virtual machine on a UNIX socket, for its path and an MTU.
    """

    name: str
    label: str
    command: Command | None
    gateway: str = GATEWAY
    gateway6: str = GATEWAY6  # empty: IPv4 only
    wmem: str = DEFAULT_WMEM
    start: Callable[[str], list[str]] | None = None
    forwards: bool = True
    serve: SocketCommand | None = None
    rows: tuple[str, ...] | None = None  # where contenders are not named, it takes part in these; None: in all
    built: Path | None = None  # what has to be there
    folder: Path | None = None  # where it is, unless it is of this tree

    def missing(self) -> str | None:
        """Why it cannot take part, or None."""
        if self.command is None:
            return None
        if self.built is not None and not self.built.exists():
            return f"{self.name} is not built: run `make {self.name}`"
        program = self.command(0, 0, "")[0]
        return None if shutil.which(program) else f"{program} is not installed"

    def shares_memory(self) -> bool:
        """Whether its passt serves machines by vhost-user; that of Debian 12 does not."""
        if self.serve is None:
            return False
        command = self.serve("", 0)
        return "--vhost-user" in _output(*command[: command.index("-q")], "--help")


@dataclass(slots=True)
class Seat:
    """A contender at work: the namespace the load runs in, the daemon, and the addresses of the two servers.

    `to_host6` is the first of them by IPv6. `machine` is the machine of a seat that has one: the load runs in there.
    """

    guest: Namespace
    daemon: subprocess.Popen[str] | None
    to_host: str
    to_peer: str
    machine: VirtualMachine | None = None
    to_host6: str = ""

    def alive(self) -> bool:
        """Whether its daemon still runs."""
        return self.daemon is None or self.daemon.poll() is None


@cache
def _output(*command: str) -> str:
    """The output of a program, whatever its status."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=READY_TIMEOUT).stdout


COMPILED = Path(__file__).resolve().parent.parent / "build" / "compiled"
_OURS = [sys.executable, "-m", "passt"]
_C = "/usr/bin/pasta"
OUR_PASST = [sys.executable, "-m", "passt.vm"]
_C_PASST = ["/usr/bin/passt"]
_C_FOLDER = Path(_C).parent


def _ports(tcp: str) -> list[str]:
    return ["-t", tcp, "-u", "none" if tcp == "none" else "5401", "-T", "none", "-U", "none"]


def _attaches(program: list[str]) -> Command:
    def command(pid: int, mtu: int, ports: str) -> list[str]:
        return [*program, "-q", "-f", *_ports(ports), "--config-net", "-m", str(mtu), str(pid)]

    return command


def _slirp(pid: int, mtu: int, ports: str) -> list[str]:
    return ["slirp4netns", "--configure", f"--mtu={mtu}", str(pid), "tap0"]


def _serves(program: list[str]) -> SocketCommand:
    return lambda path, mtu: [*program, "-q", "-f", "-t", "none", "-u", "none", "-m", str(mtu), "-s", path]


def _starts(program: list[str]) -> Callable[[str], list[str]]:
    return lambda ports: [*program, "-q", *_ports(ports), "--config-net", "--", "true"]


def _of_tree(folder: Path, program: str) -> list[str]:
    """argv of a program of another checkout, with the interpreter and the packages of this one."""
    start = f"import sys; sys.path.insert(0, {str(folder)!r}); sys.argv[0] = {program!r}"
    return [sys.executable, "-c", f"{start}; from passt.__main__ import main; sys.exit(main())"]


def _tree(name: str, label: str, folder: Path, built: Path | None = None) -> Contender:
    pasta, passt = (_of_tree(folder, program) for program in ("pasta", "passt"))
    return Contender(
        name, label, _attaches(pasta), start=_starts(pasta), serve=_serves(passt), built=built, folder=folder
    )


def _raised(name: str, label: str, pasta: list[str], passt: list[str]) -> Contender:
    return Contender(name, label, _attaches(pasta), wmem=RAISED_WMEM, serve=_serves(passt), rows=())


PICTURES = (
    *(f"tcp-{way}-host-{mtu}" for mtu in (65520, 1500) for way in ("out", "in")),
    *("udp-out", "udp-in", "tcp-rr-1", "tcp-rr-16", "udp-rr", "tcp-crr-1", "tcp-crr-16"),
)  # rows beside which other ways to have a network stand

CONTENDERS = (
    Contender("ours", "ours", _attaches(_OURS), start=_starts(_OURS), serve=_serves(OUR_PASST)),
    _tree("compiled", "ours, compiled", COMPILED, COMPILED / "passt"),
    _raised("ours-wmem", "ours, tcp_wmem raised", _OURS, OUR_PASST),
    Contender("pasta", "C pasta", _attaches([_C]), start=_starts([_C]), serve=_serves(_C_PASST), folder=_C_FOLDER),
    _raised("pasta-wmem", "C pasta, tcp_wmem raised", [_C], _C_PASST),
    Contender("slirp4netns", "slirp4netns", _slirp, gateway="10.0.2.2", gateway6="", forwards=False, rows=PICTURES),
    Contender("loopback", "no daemon", None, rows=PICTURES),
)


def peer(argument: str) -> Contender:
    """The contender of `NAME=PATH`: PATH has a package `passt`, or the programs `pasta` and `passt`.

    Raises LabError when it has neither, or the name is taken.
    """
    name, _, path = argument.partition("=")
    folder = Path(path).absolute()
    if not name or not path or name in {c.name for c in CONTENDERS}:
        raise LabError(f"--peer {argument}: give NAME=PATH, with a name that no contender has")
    if (folder / "passt" / "__main__.py").is_file():
        return _tree(name, name, folder)
    if all(shutil.which(folder / program) for program in ("pasta", "passt")):
        pasta, passt = [str(folder / "pasta")], [str(folder / "passt")]
    else:
        raise LabError(f"--peer {argument}: {folder} has neither a package passt nor the programs pasta and passt")
    return Contender(name, name, _attaches(pasta), start=_starts(pasta), serve=_serves(passt), folder=folder)


@contextmanager
def seated(lab: Lab, contender: Contender, mtu: int, ports: str = "none", cpu: int | None = None) -> Iterator[Seat]:
    """`contender` at work for a new guest that has a default route, until the context ends; on processor `cpu`.

    Every sample has a daemon of its own: daemons keep sockets in stock, and those have the send buffer of the time when
    they were made, which may have been another contender's turn.
    """
    set_sysctl("ipv4/tcp_wmem", contender.wmem)
    if contender.command is None:
        yield Seat(lab.host, None, "127.0.0.1", PEER, to_host6="::1")
        return
    with lab.guest() as guest:
        assert guest.pid is not None
        daemon = lab.spawn([*Placement.argv(cpu), *contender.command(guest.pid, mtu, ports)])
        try:
            wait_for_route(contender, guest, daemon)
            yield Seat(guest, daemon, contender.gateway, PEER, to_host6=contender.gateway6)
        finally:
            lab.stop(daemon)


def wait_for_route(contender: Contender, guest: Namespace, daemon: subprocess.Popen[str]) -> None:
    """Return when `guest` has a default route by each family that the contender has. Raises LabError."""
    deadline = time.monotonic() + READY_TIMEOUT
    families = ("-4", "-6") if contender.gateway6 else ("-4",)
    while not all("default" in guest.run(["ip", family, "route"]) for family in families):
        if daemon.poll() is not None:
            _, said = daemon.communicate()
            raise LabError(f"{contender.name} ended with status {daemon.returncode}: {said.strip()[-200:]}")
        if time.monotonic() > deadline:
            raise LabError(f"{contender.name} did not configure its namespace")
        time.sleep(0.02)
