"""Guests behind `bench.faulty_link`, of passt and of pasta, with both families and a forwarded port.

    passt   guest ==TAP-- link --UNIX socket-- passt --sockets-- host ==veth== peer
    pasta   guest ==TAP-- link --tap== bridge ==tap-- pasta --sockets-- host ==veth== peer
    direct  guest ==TAP-- link --tap== another peer: two kernels and the faults, as the measure for both

pasta serves a namespace that has nothing but the bridge, so its own tap is the real one, with all of its offloads. The
guest is a second namespace, and the link lies between the two.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .adverse_load import PORT
from .contenders import READY_TIMEOUT, Contender
from .faulty_link import control
from .lab import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Lab, LabError, Namespace, cpu_seconds, wait_for
from .vm import _wait_for_socket

PASST, PASTA, DIRECT = "passt", "pasta", "direct"
TAP, FAR, THEIRS, BRIDGE = "tap0", "far0", "pasta0", "bridge0"
LISTENS = rf"(?m)^ *\d+: 0+:{PORT:04X} \S+ 0A "  # a line of /proc/net/tcp6; one socket may serve both families
SERVER = [sys.executable, "-m", "bench.adverse_load", "serve"]


@dataclass(frozen=True, slots=True)
class Programs:
    """The two commands of a contender, without their options."""

    name: str
    label: str
    passt: list[str]
    pasta: list[str]


@dataclass(frozen=True, slots=True)
class Place:
    """A guest, its peer, its daemon's process (or None), and where the rules of its link are set."""

    guest: Namespace
    peer: Namespace
    daemon: int | None
    rules: str

    def faults(self, up: dict[str, Any], down: dict[str, Any]) -> None:
        """The rules of both directions from now on."""
        control(self.rules, "up", up)
        control(self.rules, "down", down)

    def cpu(self) -> float:
        """Processor time of the daemon."""
        return cpu_seconds(self.daemon) if self.daemon else 0.0


def programs(contender: Contender) -> Programs:
    """The programs of a contender: its commands, up to their first option; the bare kernel has none."""
    if contender.command is None or contender.serve is None:
        return Programs(DIRECT, DIRECT, [], [])
    pasta, passt = contender.command(0, 0, ""), contender.serve("", 0)
    return Programs(contender.name, contender.label, passt[: passt.index("-q")], pasta[: pasta.index("-q")])


@contextmanager
def placed(lab: Lab, chosen: Programs, mode: str, mtu: int) -> Iterator[Place]:
    """A guest in `mode`, with a server of its own for the peer's clients."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        os.chmod(folder, 0o755)
        seat = {PASST: _passt, PASTA: _pasta, DIRECT: _direct}[mode]
        place = stack.enter_context(seat(lab, chosen, mtu, folder))
        _configure(place.guest, TAP, HOST, HOST6)
        for family, gateway in (("-4", GATEWAY), ("-6", GATEWAY6)):
            place.guest.run(["ip", family, "route", "add", "default", "via", gateway, "dev", TAP])
        for namespace in (place.guest, place.peer):
            server = stack.enter_context(_running(lab, SERVER, namespace))
            wait_for(server, "ready")
        if place.daemon:
            _wait_for_port(chosen.name)
        yield place


def _wait_for_port(name: str) -> None:
    """The socket of a machine is there before the ports that are forwarded to it."""
    deadline = time.monotonic() + READY_TIMEOUT
    while not re.search(LISTENS, Path("/proc/net/tcp6").read_text()):
        if time.monotonic() > deadline:
            raise LabError(f"{name} does not listen on port {PORT}")
        time.sleep(0.02)


@contextmanager
def _passt(lab: Lab, chosen: Programs, mtu: int, folder: str) -> Iterator[Place]:
    path = f"{folder}/socket"
    options = ["-q", "-f", "-t", str(PORT), "-u", "none", "-m", str(mtu), "-s", path]
    with _running(lab, [*chosen.passt, *options]) as daemon, lab.guest() as guest:
        _wait_for_socket(path, chosen.name, daemon)
        with _running(lab, _link(path, mtu, folder), guest) as link:
            wait_for(link, "ready")
            yield Place(guest, lab.peer, daemon.pid, f"{folder}/rule")


@contextmanager
def _pasta(lab: Lab, chosen: Programs, mtu: int, folder: str) -> Iterator[Place]:
    options = ["-q", "-f", "-t", str(PORT), "-u", "none", "-T", "none", "-U", "none", "-m", str(mtu), "-I", THEIRS]
    with ExitStack() as stack:
        between = stack.enter_context(lab.guest())
        between.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6"])
        daemon = stack.enter_context(_running(lab, [*chosen.pasta, *options, str(between.pid)]))
        deadline = time.monotonic() + READY_TIMEOUT
        while THEIRS not in between.run(["ip", "link"]):
            if daemon.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"{chosen.name} made no interface: {daemon.stderr.read() if daemon.stderr else ''}")
            time.sleep(0.02)
        link = stack.enter_context(_running(lab, _link(f"tap:{FAR}", mtu, folder), between))
        wait_for(link, "ready")
        between.run(["ip", "link", "add", BRIDGE, "type", "bridge", "mcast_snooping", "0"])
        for name in (FAR, THEIRS):
            between.run(["ip", "link", "set", name, "master", BRIDGE, "mtu", str(mtu), "up"])
        between.run(["ip", "link", "set", BRIDGE, "up"])
        guest = stack.enter_context(_behind(lab, between, TAP))
        yield Place(guest, lab.peer, daemon.pid, f"{folder}/rule")


@contextmanager
def _direct(lab: Lab, chosen: Programs, mtu: int, folder: str) -> Iterator[Place]:
    with lab.guest() as between, _running(lab, _link(f"tap:{FAR}", mtu, folder), between) as link:
        wait_for(link, "ready")
        with _behind(lab, between, TAP) as guest, _behind(lab, between, FAR) as far:
            _configure(far, FAR, PEER, PEER6)
            yield Place(guest, far, None, f"{folder}/rule")


@contextmanager
def _behind(lab: Lab, between: Namespace, interface: str) -> Iterator[Namespace]:
    """A namespace, owned by the user namespace of `between`, that `interface` is moved to."""
    hold = ["unshare", "--net", "sh", "-c", "echo ready; exec sleep infinity"]
    with _running(lab, hold, between) as holder:
        wait_for(holder, "ready")
        between.run(["ip", "link", "set", interface, "netns", str(holder.pid)])
        yield Namespace(holder.pid, user=True)


def _link(daemon: str, mtu: int, folder: str, tap: str = TAP) -> list[str]:
    return [sys.executable, "-m", "bench.faulty_link", daemon, tap, str(mtu), f"{folder}/rule"]


@contextmanager
def _running(lab: Lab, command: list[str], namespace: Namespace | None = None) -> Iterator[Any]:
    process = lab.spawn(command, namespace)
    try:
        yield process
    finally:
        lab.stop(process)


def _configure(namespace: Namespace, interface: str, v4: str, v6: str) -> None:
    """Addresses, as pasta --config-net would have them."""
    for setting in ("accept_dad", "accept_ra"):
        namespace.run(["sh", "-c", f"echo 0 >/proc/sys/net/ipv6/conf/{interface}/{setting}"])
    for name in ("lo", interface):
        namespace.run(["ip", "link", "set", name, "up"])
    namespace.run(["ip", "address", "add", f"{v4}/24", "dev", interface])
    namespace.run(["ip", "address", "add", f"{v6}/64", "dev", interface, "nodad"])
