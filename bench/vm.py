"""Seats for what is served over a UNIX socket: a relay that stands in for a fast virtual machine, and a machine.

    guest (user + network namespace) --tap-- relay --UNIX socket-- passt --sockets-- host
    QEMU (emulated processor)                      --UNIX socket-- passt --sockets-- host

The relays (relay.c, and vhost_relay.c for shared memory) are compiled here on first use. Nothing relies on KVM: with a
relay the daemon is the limit, with the emulated machine the guest is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.system.vm.image import Image, cache, image
from tests.system.vm.machine import QEMU, VirtualMachine

from .contenders import READY_TIMEOUT, Contender, Seat
from .lab import (
    GATEWAY,
    GATEWAY6,
    HOST,
    HOST6,
    PEER,
    Lab,
    LabError,
    Namespace,
    Placement,
    set_sysctl,
    wait_for,
)

RELAY, VHOST, MACHINE = "relay", "vhost", "qemu"  # kinds of seat
TAP = "tap0"
LISTENS = "00010000"  # flags of a UNIX socket in /proc/net/unix: __SO_ACCEPTCON
SOURCES = {kind: Path(__file__).with_name(name) for kind, name in ((RELAY, "relay.c"), (VHOST, "vhost_relay.c"))}


def relay(kind: str) -> Path:
    """The program of a kind of relay, compiled if this version of it was not."""
    source = SOURCES[kind]
    digest = hashlib.sha256(source.read_bytes()).hexdigest()[:16]
    program = cache() / f"{source.stem}-{digest}"
    if not program.exists():
        made = program.with_suffix(f".{os.getpid()}")
        command = ["cc", "-O2", "-pthread", "-o", str(made), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise LabError(f"{source.name}: {done.stderr.strip()[-500:]}")
        os.rename(made, program)
    return program


def prepare(kinds: set[str]) -> None:
    """Make what seats of these kinds need, outside the laboratory: it has no network to download from."""
    for kind in kinds & SOURCES.keys():
        if not shutil.which("cc"):
            raise LabError("cc is missing: install the package gcc")
        relay(kind)
    if MACHINE in kinds:
        if not shutil.which(QEMU):
            raise LabError(f"{QEMU} is missing: install the package qemu-system-x86")
        try:
            image()
        except (OSError, RuntimeError) as e:
            raise LabError(f"no image to boot: {e}") from e


@contextmanager
def seated(lab: Lab, contender: Contender, kind: str, mtu: int, cpu: int | None = None) -> Iterator[Seat]:
    """As `contenders.seated`, for a relay or a machine, which run where the scheduler wants: both are busy."""
    assert contender.serve is not None
    set_sysctl("ipv4/tcp_wmem", contender.wmem)
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        options = ["--vhost-user"] if kind == VHOST else []
        daemon = lab.spawn([*Placement.argv(cpu), *contender.serve(path, mtu), *options])
        try:
            _wait_for_socket(path, contender.name, daemon)
            with _machine(lab, path, daemon) if kind == MACHINE else _relayed(lab, kind, path, mtu, daemon) as seat:
                yield seat
        finally:
            lab.stop(daemon)


def _wait_for_socket(path: str, name: str, daemon: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT
    while not re.search(rf"(?m) {LISTENS} 0001 .* {path}$", Path("/proc/net/unix").read_text()):
        if daemon.poll() is not None:
            _, said = daemon.communicate()
            raise LabError(f"{name} ended with status {daemon.returncode}: {said.strip()[-200:]}")
        if time.monotonic() > deadline:
            raise LabError(f"{name} has no socket")
        time.sleep(0.02)


@contextmanager
def _relayed(lab: Lab, kind: str, path: str, mtu: int, daemon: subprocess.Popen[str]) -> Iterator[Seat]:
    """A guest behind the relay, configured as passt would have it."""
    with lab.guest() as guest:
        process = lab.spawn([str(relay(kind)), TAP, path], guest)
        try:
            wait_for(process, "ready")
            configure(guest, mtu)
            yield Seat(guest, daemon, GATEWAY, PEER, to_host6=GATEWAY6)
        finally:
            lab.stop(process)


def configure(guest: Namespace, mtu: int) -> None:
    """Addresses behind a relay, as pasta --config-net would have them."""
    for setting in ("accept_dad", "accept_ra"):
        guest.run(["sh", "-c", f"echo 0 >/proc/sys/net/ipv6/conf/{TAP}/{setting}"])
    guest.run(["ip", "link", "set", TAP, "mtu", str(mtu), "up"])
    guest.run(["ip", "address", "add", f"{HOST}/24", "dev", TAP])
    guest.run(["ip", "address", "add", f"{HOST6}/64", "dev", TAP, "nodad"])
    for flag, gateway in (("-4", GATEWAY), ("-6", GATEWAY6)):
        guest.run(["ip", flag, "route", "add", "default", "via", gateway, "dev", TAP])


def boot(made: Image, path: str) -> VirtualMachine:
    """A machine on the socket at `path`, configured by DHCP; LabError if it does not come up."""
    machine = VirtualMachine(made)
    try:
        machine.start_on(path)
        machine.run("ip link set eth0 up && udhcpc -i eth0 -n -q -s /dhcp -O mtu")
    except (AssertionError, OSError) as e:
        machine.close()
        raise LabError(f"the machine does not come up: {e}") from e
    return machine


@contextmanager
def _machine(lab: Lab, path: str, daemon: subprocess.Popen[str]) -> Iterator[Seat]:
    machine = boot(image(), path)
    try:
        yield Seat(lab.host, daemon, GATEWAY, PEER, machine)
    finally:
        machine.close()
