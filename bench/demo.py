"""`make demo`: a namespace by pasta on one screen: its configuration, a ping, a download, iperf3, the figures.

It runs in the laboratory of the benchmark, so it needs no network and no privilege, and leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from . import lab as laboratory
from .contenders import CONTENDERS, Contender, seated
from .lab import GATEWAY, PEER, Lab, LabError, Namespace, cpu_seconds, resident_kib, wait_for

DOWNLOAD = 1 << 30
OURS = CONTENDERS[0]
HTTP_PORT, IPERF_PORT = 8080, 5201

Figures = list[tuple[str, str]]


def show(console: Console, title: str, text: str) -> None:
    """One step: the command as title, what it printed below."""
    console.print(Panel(text.strip(), title=f"[bold]{title}[/bold]", title_align="left", border_style="green"))


def configuration(guest: Namespace, console: Console) -> None:
    """Addresses and routes as the namespace has them."""
    parts = (guest.run(["ip", *words]) for words in (["-br", "address"], ["route"], ["-6", "route", "show", "default"]))
    show(console, "ip address; ip route", "".join(parts))


def measured(console: Console, figures: Figures) -> None:
    """The figures, as a table."""
    table = Table(title="measured", show_header=False)
    for name, value in figures:
        table.add_row(name, value)
    console.print(table)


def cost(program: str, pid: int, figures: Figures) -> None:
    """Resources that the daemon has used so far."""
    figures.append((f"processor time of {program} for all this", f"{cpu_seconds(pid):.2f} s"))
    figures.append((f"resident memory of {program}", f"{resident_kib(pid) / 1024:.0f} MiB"))


def present(
    name: str,
    argv: list[str],
    steps: Callable[[Lab, Console], None],
    expected: tuple[type[Exception], ...] = (LabError,),
) -> int:
    """steps(lab, console) in the laboratory. Exit status: 0, or 1 with what did not work, if that is `expected`."""
    console = Console(width=None if sys.stdout.isatty() else 100)
    try:
        laboratory.enter(f"bench.{name}", argv)
        with Lab() as lab:
            steps(lab, console)
    except expected as e:
        print(f"{name}: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def ping_allowed(console: Console) -> bool:
    """Whether this host lets its users ping; if not, that is what is shown."""
    allowed = Path("/proc/sys/net/ipv4/ping_group_range").read_text().split()
    if int(allowed[0]) <= int(allowed[1]):
        return True
    show(console, "ping", "not allowed on this host: sysctl -w net.ipv4.ping_group_range='0 2147483647'")
    return False


def ping(guest: Namespace, console: Console, figures: Figures) -> None:
    """Three pings to the peer."""
    if not ping_allowed(console):
        return
    said = guest.run(["ping", "-n", "-c", "3", "-i", "0.2", PEER])
    show(console, f"ping -c 3 {PEER}", said)
    if found := re.search(r"= [\d.]+/([\d.]+)/", said):
        figures.append(("ping, there and back", f"{found[1]} ms"))


def download(lab: Lab, guest: Namespace, console: Console, figures: Figures) -> None:
    """A file of 1 GiB from a web server on the host's loopback."""
    with tempfile.TemporaryDirectory() as directory:
        with open(f"{directory}/file", "wb") as f:
            f.truncate(DOWNLOAD)
        listen = ["--bind", "127.0.0.1", "--directory", directory, str(HTTP_PORT)]
        server = lab.spawn([sys.executable, "-u", "-m", "http.server", *listen])
        wait_for(server, "Serving")
        url = f"http://{GATEWAY}:{HTTP_PORT}/file"
        form = "%{size_download} bytes in %{time_total} s"
        said = guest.run(["curl", "-sS", "-o", "/dev/null", "-w", form, url], timeout=60)
        lab.stop(server)
    size, seconds = (float(said.split()[i]) for i in (0, 3))
    show(console, f"curl {url}", said)
    figures.append(("download by curl", f"{size * 8 / seconds / 1e9:.1f} Gbit/s"))


def iperf3(lab: Lab, guest: Namespace, console: Console, figures: Figures) -> None:
    """One stream each way."""
    server = lab.spawn(["iperf3", "-s", "-p", str(IPERF_PORT), "--forceflush"])
    wait_for(server, "listening")
    lines = []
    for options, way in (([], "namespace to host"), (["-R"], "host to namespace")):
        said = guest.run(["iperf3", "-J", "-c", GATEWAY, "-p", str(IPERF_PORT), "-t", "2", *options], timeout=20)
        rate = json.loads(said)["end"]["sum_received"]["bits_per_second"] / 1e9
        lines.append(f"{way}: {rate:.1f} Gbit/s")
        figures.append((f"iperf3, {way}", f"{rate:.1f} Gbit/s"))
    lab.stop(server)
    show(console, f"iperf3 -c {GATEWAY}; iperf3 -R -c {GATEWAY}", "\n".join(lines))


def start(lab: Lab, console: Console, figures: Figures) -> None:
    """A command in a new namespace, from nothing to its end."""
    before = time.monotonic()
    assert OURS.start is not None
    lab.host.run(OURS.start("none"))
    took = (time.monotonic() - before) * 1e3
    show(console, "pasta --config-net -- true", f"a namespace, set up, used and gone again in {took:.0f} ms")
    figures.append(("start to ready", f"{took:.0f} ms"))


def demo(lab: Lab, contender: Contender, console: Console) -> None:
    """All steps, then the figures."""
    figures: Figures = []
    start(lab, console, figures)
    with seated(lab, contender, 65520) as seat:
        assert seat.daemon is not None
        configuration(seat.guest, console)
        ping(seat.guest, console, figures)
        download(lab, seat.guest, console, figures)
        iperf3(lab, seat.guest, console, figures)
        cost("pasta", seat.daemon.pid, figures)
    measured(console, figures)


def main(argv: list[str]) -> int:
    """Exit status: 0, or 1 with what did not work."""
    return present("demo", argv, lambda lab, console: demo(lab, OURS, console))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
