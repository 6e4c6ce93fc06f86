"""The command lines of those who let pasta run a command: `pasta ... -- CMD`.

Each line is tried with the test's agent as the command, for what goes over its network, and with a script, for what
every command relies on: it is root with all rights there, has its own PID namespace, the loopback interface, its
standard streams and its environment, and its exit status is pasta's.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support import DEADLINE, descendants
from ..traffic.support import AGENT, AGENT_PYTHON, GATEWAY, Lan, Namespace
from .checks import (
    Check,
    closed,
    copied,
    copied4,
    forwards_out,
    forwards_when_bound,
    gateway_is_itself,
    has,
    loopback_at,
    outward,
    resolves_at,
    to_loopback_of_guest,
)
from .support import Client, Daemon, Site

pytestmark = pytest.mark.usefixtures("resolver")


@dataclass(frozen=True)
class Row:
    """One command line; the command is at its end, or where {command} stands."""

    client: str
    line: str
    relies: tuple[Check, ...] = ()


BWRAP = "bwrap --dev-bind / / --unshare-user --unshare-pid --proc /proc --"

ROWS = (
    Row("capability probe", "pasta --config-net --", (copied, outward, loopback_at(GATEWAY))),
    Row("karotte's firecracker", "pasta --config-net --quiet --", (copied, outward)),
    Row("probe without ports", "pasta --config-net --tcp-ports none --udp-ports none --", (copied,)),
    Row("probe of one family", "pasta --config-net --ipv4-only --", (copied4, outward)),
    Row("agentbox", "pasta --config-net -f -q --no-map-gw --dns-forward 10.0.2.2 -T 8080 -T 9090 --",
        (copied, gateway_is_itself, resolves_at("10.0.2.2"), forwards_out(8080, 8080), forwards_out(9090, 9090))),
    Row("boid", "pasta --config-net -a 10.0.2.0 -n 24 -g 10.0.2.2 --dns-forward 10.0.2.3 -t none -u none -- "
        "unshare --mount -- bash -c 'mount -t tmpfs tmpfs /mnt && exec \"$@\"' bash",
        (resolves_at("10.0.2.3"), loopback_at("10.0.2.2"))),
    Row("address and gateway the same", "pasta -4 --config-net -a 10.5.0.2 -g 10.5.0.2 -n 255.255.255.0 -t none "
        "-u none -T none -U none --", (has("10.5.0.2/24"), closed)),
    Row("agent with two ports out", "pasta --config-net --quiet -t none -u none -T 7071,7072 -U none --no-map-gw --",
        (copied, forwards_out(7071, 7071), forwards_out(7072, 7072))),
    Row("agent with a port in", "pasta --config-net --quiet --host-lo-to-ns-lo -t 127.0.0.1/8080 -u none -T 7071,7072 "
        "-U none --no-map-gw --", (copied, to_loopback_of_guest(8080, 8080))),
    Row("agent in bubblewrap", "pasta --config-net -f -q -t auto --host-lo-to-ns-lo -T 7071 -u none -U none "
        f"--map-host-loopback none --dns-forward 10.9.9.9 -- {BWRAP}",
        (resolves_at("10.9.9.9"), forwards_when_bound, forwards_out(7071, 7071))),
    Row("hauler", "pasta --foreground --quiet --log-file {dir}/log --pid {dir}/pid --ipv4-only --host-lo-to-ns-lo "
        "--tcp-ports 127.0.0.1/5000:5100 --udp-ports none --tcp-ns none --udp-ns none --",
        (has(), to_loopback_of_guest(5000, 5100))),
    Row("firecracker behind a script", "pasta --pcap {dir}/pcap --log-file {dir}/log --config-net -- bash -c "
        "'ip link show lo >/dev/null; exec \"$@\"' --", (copied, outward)),
    Row("crun", "pasta --config-net --dns 192.0.2.53 --", (copied,)),
    Row("splice only, in bubblewrap", f"pasta -q -f --splice-only -T 7071 -- {BWRAP}", (forwards_out(7071, 7071),)),
)  # fmt: skip


class Commanded(Namespace):
    """The agent as the command of a line."""

    def __init__(self, client: Client, line: str) -> None:
        super().__init__(client.argv([*shlex.split(line), AGENT_PYTHON, "-SE", str(AGENT)]), client.user)
        self._first = descendants(self.process.pid)[0]

    @property
    def pid(self) -> int:
        """That of the first process in the namespaces that pasta made."""
        return self._first


@pytest.mark.parametrize("row", ROWS, ids=[row.client for row in ROWS])
def test_network(row: Row, client: Client, lan: Lan) -> None:
    guest = Commanded(client, row.line)
    try:
        for check in row.relies:
            check(Site(client, guest, {}), Daemon(guest.process.pid), lan)
    finally:
        guest.close()
    assert guest.process.returncode == 0


ABOUT = """
import json, os, sys, subprocess
status = dict(l.split(":", 1) for l in open("/proc/self/status"))
links = json.loads(subprocess.run(["ip", "-j", "link"], capture_output=True).stdout)
print(json.dumps({
    "uid": os.getuid(), "capabilities": status["CapEff"].strip(),
    "pids": len([p for p in os.listdir("/proc") if p.isdecimal()]),
    "loopback": [l["flags"] for l in links if l["ifname"] == "lo"][0], "input": sys.stdin.read(),
    "variable": os.environ.get("A_VARIABLE"), "cwd": os.getcwd(), "fds": sorted(os.listdir("/proc/self/fd")),
}))
print("to standard error", file=sys.stderr)
sys.exit(7)
"""


@pytest.mark.parametrize("row", ROWS, ids=[row.client for row in ROWS])
def test_what_a_command_has(row: Row, client: Client) -> None:
    words = ["env", "-C", "/usr", *shlex.split(row.line), "/usr/bin/python3", "-c", "{about}"]
    argv = client.argv(words, about=ABOUT)
    env = {**client.environment(), "A_VARIABLE": "a value"}
    done = subprocess.run(
        argv, env=env, input="to standard input", capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 7, done.stderr
    seen = json.loads(done.stdout)
    if "bwrap" not in row.line:
        assert seen["uid"] == 0
        assert int(seen["capabilities"], 16) & 1 << 12 and int(seen["capabilities"], 16) & 1 << 21
    assert seen["pids"] <= 6
    assert "UP" in seen["loopback"]
    assert (seen["input"], seen["variable"], seen["cwd"]) == ("to standard input", "a value", "/usr")
    assert len(seen["fds"]) == 4  # and the directory itself
    assert done.stderr.endswith("to standard error\n")
    if "-q" in shlex.split(row.line) or "--quiet" in row.line:
        assert done.stderr == "to standard error\n"


def test_root_stays_root(root_client: Client) -> None:
    done = root_client.run("pasta --config-net --runas 0 -P {dir}/pid -- sh -c 'id -u; exit 3'")
    assert (done.returncode, done.stdout) == (3, "0\n")
    assert (root_client.dir / "pid").read_text().strip().isdecimal()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_signals_are_the_commands(client: Client, number: signal.Signals) -> None:
    """A supervisor that ends pasta means the command, and gets its status."""
    script = f"trap 'exit 9' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.1; done"
    daemon = client.stay(["pasta", "-q", "--config-net", "--", "sh", "-c", script], stdout=subprocess.PIPE)
    assert daemon.process is not None and daemon.process.stdout is not None
    with daemon.process.stdout as stdout:
        assert stdout.readline() == b"ready\n"
        assert daemon.end(number) == 9


# bubblewrap with a namespace that it inherits, or makes ------------------------------------------------------------


def test_bubblewrap_waits_for_its_network(client: Client, lan: Lan) -> None:
    """waypak, bubblejail: bwrap makes the namespace, tells the PID, and blocks until pasta has been there."""
    assert shutil.which("bwrap"), "the Debian package bubblewrap is missing"
    info_reader, info = os.pipe()
    block, block_writer = os.pipe()
    script = "ip -j address show scope global; ip -j route show default"
    bwrap = f"bwrap --dev-bind / / --unshare-user --unshare-net --uid 0 --info-fd {info} --block-fd {block} -- sh -c"
    with open(info_reader) as infos, open(block_writer, "wb") as unblock:
        process = subprocess.Popen(
            client.argv([*bwrap.split(), script]), cwd="/", env=client.environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, pass_fds=(info, block),
        )  # fmt: skip
        os.close(info)
        os.close(block)
        pid = json.loads(infos.read())["child-pid"]
        daemon = client.start("pasta --config-net --no-map-gw --dns-forward 169.254.1.1 --quiet {pid}", pid=pid)
        assert daemon.output == ""
        unblock.write(b"\n")
        unblock.close()
        output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0
    assert b"198.51.100.2" in output and b'"gateway":"198.51.100.1"' in output
    daemon.expect_end("bubblewrap's namespace is gone")


def test_bubblewrap_inherits_the_network(client: Client, lan: Lan) -> None:
    """nixpak's way around: the network is pasta's, everything else bubblewrap's."""
    line = f"pasta --config-net -q -- {BWRAP} sh -c 'ip -j address show scope global; exit 4'"
    done = client.run(line)
    assert done.returncode == 4 and "198.51.100.2" in done.stdout and done.stderr == ""


def test_captures_and_logs_of_the_lines(client: Client) -> None:
    done = client.run("pasta --pcap {dir}/pcap --log-file {dir}/log --config-net -- ping -c 1 -W 5 198.51.100.3")
    assert done.returncode == 0
    assert Path(client.dir, "pcap").stat().st_size > 24 and Path(client.dir, "log").stat().st_size > 0
