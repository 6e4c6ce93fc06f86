"""`make demo-vm`: a virtual machine by passt on one screen: its configuration, a ping, a download, a visitor.

The machine is the one of the tests, under QEMU with an emulated processor, so KVM is not needed; its figures are those
of the emulation. It runs in the laboratory of the benchmark, and leaves nothing behind but the image to boot, in the
cache.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from tests.system.vm.image import image
from tests.system.vm.machine import VirtualMachine

from . import vm
from .contenders import OUR_PASST
from .demo import Figures, cost, measured, ping_allowed, present, show
from .lab import GATEWAY, HOST, PEER, Lab, LabError, wait_for

DOWNLOAD = 64 << 20
HTTP_PORT = 8080
FORWARD = "8000:80"
DHCP = "ip link set eth0 up && udhcpc -i eth0 -n -q -s /dhcp -O mtu"
SLAAC = "until ip -6 address show dev eth0 scope global | grep -v tentative | grep inet6; do usleep 50000; done"
CONFIGURATION = "ip address show dev eth0 | grep -o 'mtu [0-9]*\\|inet.*'; ip route; ip -6 route | grep default"
PAGE = "echo Hello from $(hostname), $(uname -sr), up for $(cut -d ' ' -f 1 /proc/uptime) s"


@contextmanager
def served(lab: Lab, directory: str, console: Console) -> Iterator[int]:
    """passt, started as a user does: it returns when its socket listens, and what it says is shown. Yields its PID."""
    pid_file = Path(directory, "pid")
    command = [*OUR_PASST, "-s", f"{directory}/socket", "-P", str(pid_file), "-t", FORWARD]
    said = lab.host.run(["sh", "-c", f"exec {shlex.join(command)} 2>&1"])
    show(console, f"passt -t {FORWARD}", said)
    pid = int(pid_file.read_text())
    try:
        yield pid
    finally:
        os.kill(pid, 15)


def boot(machine: VirtualMachine, path: str, console: Console, figures: Figures) -> None:
    """Power on, and configuration by DHCP and router advertisement."""
    before = time.monotonic()
    machine.start_on(path)
    booted = time.monotonic()
    said = machine.run(DHCP)
    figures.append(("boot", f"{booted - before:.1f} s"))
    figures.append(("DHCP", f"{time.monotonic() - booted:.1f} s"))
    machine.run(SLAAC)
    lease = "".join(f"{line}\n" for line in said.splitlines() if "lease of" in line)
    show(console, "guest: udhcpc; ip address; ip route", lease + machine.run(CONFIGURATION))


def ping(machine: VirtualMachine, console: Console, figures: Figures) -> None:
    """Three pings to the peer."""
    if not ping_allowed(console):
        return
    said = machine.run(f"ping -c 3 -i 0.2 {PEER}")
    show(console, f"guest: ping -c 3 {PEER}", said)
    if found := re.search(r"= [\d.]+/([\d.]+)/", said):
        figures.append(("ping, there and back", f"{found[1]} ms"))


def download(lab: Lab, machine: VirtualMachine, directory: str, console: Console, figures: Figures) -> None:
    """A file from a web server on the host's loopback."""
    files = Path(directory, "files")
    files.mkdir()
    with open(files / "file", "wb") as f:
        f.truncate(DOWNLOAD)
    listen = ["--bind", "127.0.0.1", "--directory", str(files), str(HTTP_PORT)]
    server = lab.spawn([sys.executable, "-u", "-m", "http.server", *listen])
    wait_for(server, "Serving")
    url = f"http://{GATEWAY}:{HTTP_PORT}/file"
    before = time.monotonic()
    machine.run(f"wget -q -O /tmp/file {url}")
    seconds = time.monotonic() - before
    size = int(machine.run("stat -c %s /tmp/file"))
    lab.stop(server)
    show(console, f"guest: wget {url}", f"{size} bytes in {seconds:.2f} s")
    figures.append(("download by wget", f"{size * 8 / seconds / 1e9:.2f} Gbit/s"))


def visit(lab: Lab, machine: VirtualMachine, console: Console) -> None:
    """Another machine of the network asks the guest's web server, by the host's address and the forwarded port."""
    machine.run(f"mkdir -p /www; {PAGE} >/www/index.html; httpd -p 80 -h /www")
    url = f"http://{HOST}:{FORWARD.partition(':')[0]}/"
    said = lab.peer.run(["curl", "-sS", "--max-time", "8", url])
    show(console, f"another machine: curl {url}", said)


def demo(lab: Lab, console: Console) -> None:
    """All steps, then the figures."""
    figures: Figures = []
    with tempfile.TemporaryDirectory() as directory, served(lab, directory, console) as pid:
        machine = VirtualMachine(image())
        try:
            boot(machine, f"{directory}/socket", console, figures)
            ping(machine, console, figures)
            download(lab, machine, directory, console, figures)
            visit(lab, machine, console)
        finally:
            machine.close()
        cost("passt", pid, figures)
    measured(console, figures)


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with what did not work."""
    try:
        vm.prepare({vm.MACHINE})
    except (LabError, OSError) as e:
        print(f"demo_vm: {e}", file=sys.stderr)
        return 1
    # An assertion is what a machine has that does not obey
    return present("demo_vm", argv, demo, (LabError, AssertionError, OSError))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
