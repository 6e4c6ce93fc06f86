"""The command lines of those who have a network namespace and keep pasta in the foreground, as a child of theirs.

They end it by a signal, or are gone themselves. How each learns that the network is there differs: a PID file or pipe,
the interface that appears, or a moment's wait.
"""

from __future__ import annotations

import ctypes
import os
import pwd
import signal
import subprocess
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support import alive, handles, wait_for
from ..traffic.support import GATEWAY, Lan, Namespace
from .checks import (
    Check,
    closed,
    copied,
    forwards,
    forwards_out,
    forwards_when_bound,
    gateway_is_itself,
    has,
    link_has,
    listeners,
    loopback_at,
    outward,
    resolves_at,
    to_loopback_of_guest,
)
from .support import Client, Daemon, Site, Within, sandbox

pytestmark = pytest.mark.usefixtures("resolver")

PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


def die_with_parent() -> None:
    """In a child, before it executes pasta: PDEATHSIG, as nsjail and snug set it."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def configured(site: Site, daemon: Daemon) -> None:
    """Wait as a sandbox does: there is an interface that has its address."""
    wait_for(lambda: not daemon.alive() or site.addresses(), "the interface has an address")
    assert daemon.alive(), daemon.said()


def set_up(site: Site, daemon: Daemon) -> None:
    """Wait until pasta has everything: where a client sleeps for seconds, or does not look at all."""
    wait_for(lambda: not daemon.alive() or handles(daemon.pid, signal.SIGTERM), "pasta is ready")
    assert daemon.alive(), daemon.said()


@dataclass(frozen=True)
class Row:
    """One command line, in the foreground."""

    client: str
    line: str
    relies: tuple[Check, ...]
    end: signal.Signals = signal.SIGKILL


_ROOTLESSKIT_2_0 = (
    "pasta --foreground --stderr --ns-ifname=tap0 --mtu=65520 --no-dhcp --no-ra --address=10.0.2.100 --netmask=24 "
    "--gateway=10.0.2.2 --dns-forward=10.0.2.3"
)
_NSJAIL = "pasta -f -q --no-dhcp --no-dhcpv6 --no-ra --config-net"

ROWS = (
    Row("nsjail", f"{_NSJAIL} -t none -u none -T none -U none {{pid}}",
        (copied, outward, loopback_at(GATEWAY), closed)),
    Row("nsjail with ports, one family, an address", f"{_NSJAIL} --no-icmp --no-map-gw -a 10.0.2.15 -n 24 -g 10.0.2.2 "
        "-4 -I pasta0 -t 8080:80 -u none -T none -U none {pid}",
        (has("10.0.2.15/24"), link_has(ifname="pasta0"), forwards(8080, 80))),
    Row("nsjail with a name server", "pasta -f -q --config-net --dhcp-dns --dns-forward 10.1.1.1 -t none -u none "
        "-T none -U none {pid}", (copied, resolves_at("10.1.1.1"))),
    Row("matchlock", "pasta -f --quiet --netns {netns} --userns {userns} --config-net --mtu 1400",
        (copied, link_has(mtu=1400), outward), signal.SIGTERM),
    Row("snug", "pasta --config-net -t none -u none -T none -U none --ns-ifname snug0 --no-netns-quit --quiet "
        "--foreground --userns {userns} --netns {netns}", (copied, link_has(ifname="snug0"), closed)),
    Row("fcvm", "nsenter --preserve-credentials --user={userns} pasta --foreground --config-net -I eth0 --ns-mac-addr "
        "02:00:5e:00:53:01 --netns {netns}",
        (copied, link_has(ifname="eth0", address="02:00:5e:00:53:01"))),
    Row("mejis", "nsenter --preserve-credentials --user={userns} pasta --netns {netns} -f --config-net "
        "--host-lo-to-ns-lo -T none -U none -t 8080:80 -u none",
        (copied, to_loopback_of_guest(8080, 80)), signal.SIGTERM),
    Row("agent with one port out", "pasta -q -f --splice-only -T 5432 -t none -u none -U none --userns {userns} "
        "--netns {netns}", ()),
)  # fmt: skip


@pytest.fixture
def site(client: Client) -> Iterator[Site]:
    """A sandbox of an ordinary user."""
    made = sandbox(client)
    yield made
    made.close()


@pytest.mark.parametrize("row", ROWS, ids=[row.client for row in ROWS])
def test_line(row: Row, site: Site, lan: Lan) -> None:
    daemon = site.stay(row.line, preexec_fn=die_with_parent)
    (configured if row.relies else set_up)(site, daemon)
    set_up(site, daemon)
    if not row.relies:  # no interface at all
        forwards_out(5432, 5432)(site, daemon, lan)
        assert len(site.guest.show("link")) == 1
    for check in row.relies:
        check(site, daemon, lan)
    status = daemon.end(row.end)
    assert status == (0 if row.end == signal.SIGTERM else -row.end)
    assert listeners(lan.host) == set()


# Clients with more to them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detached", [False, True])
def test_rootlesskit_2_0_configures_the_tap_itself(site: Site, lan: Lan, detached: bool) -> None:
    """It waits for the interface, gives it address, MTU and route, and kills pasta in the end."""
    where = "--userns={userns} --netns={netns}" if detached else "{pid}"
    daemon = site.stay(f"{_ROOTLESSKIT_2_0} --no-map-gw --ipv4-only --tcp-ports=auto --udp-ports=auto {where}")
    wait_for(lambda: not daemon.alive() or len(site.guest.show("link")) == 2, "the interface appears")
    for command in (
        "ip link set tap0 mtu 65520 up",
        "ip address add 10.0.2.100/24 dev tap0",
        "ip route add default via 10.0.2.2",
    ):
        site.guest.run(*command.split())
    for check in (has("10.0.2.100/24"), link_has(mtu=65520), resolves_at("10.0.2.3"), outward, forwards_when_bound):
        check(site, daemon, lan)
    daemon.end(signal.SIGKILL)


def test_bubblejail_reads_the_pid_from_a_pipe(site: Site, client: Client, lan: Lan) -> None:
    """The pipe's name is /proc/BUBBLEJAIL/fd/N, which the namespace's descriptor is named by, too."""
    reader, writer = os.pipe()
    os.fchown(writer, client.user.uid, client.user.gid)  # bubblejail is this user; a pipe is opened anew by its name
    with open(reader, "rb") as pid, open(site.names["userns"]) as userns:
        helper = subprocess.Popen(
            client.argv(["sleep", "1000"]), cwd="/", stdin=writer, stdout=userns, pass_fds=()
        )  # whose descriptors may be opened by this user
        try:
            wait_for(lambda: Path(f"/proc/{helper.pid}/comm").read_text() == "sleep\n", "sleep")
            daemon = site.stay(
                f"pasta --config-net --foreground --userns /proc/{helper.pid}/fd/1 --pid /proc/{helper.pid}/fd/0 "
                "-t none -u none -T none -U none {pid}"
            )
            assert pid.readline() == b"%d\n" % daemon.pid
        finally:
            helper.kill()
            helper.wait()
            os.close(writer)
        assert pid.read() == b""  # it has let go of the pipe
    for check in (copied, outward, closed):
        check(site, daemon, lan)
    assert daemon.end(signal.SIGTERM) == 0


def test_kakoi_nests_two(client: Client, lan: Lan) -> None:
    """`PID newline` on standard output, nothing else; then a second pasta whose host is the first one's namespace."""

    def start(site: Site, options: str) -> Daemon:
        reader, writer = os.pipe()
        os.fchown(writer, client.user.uid, client.user.gid)
        with open(reader, "rb") as stdout:
            daemon = site.stay(
                "pasta --foreground --pid /proc/self/fd/1 --config-net --quiet --host-lo-to-ns-lo -T none -U none "
                f"--userns {{userns}} --netns {{netns}} --no-map-gw {options} -u none", stdout=writer,
            )  # fmt: skip
            os.close(writer)
            assert stdout.readline() == b"%d\n" % daemon.pid
        return daemon

    outer = sandbox(client)
    first = start(outer, "-I kakoi0 --map-host-loopback 10.7.7.1 --map-host-loopback fd00:7::1 -t 127.0.0.1/8080:80")
    for check in (copied, gateway_is_itself, loopback_at("10.7.7.1"), loopback_at("fd00:7::1")):
        check(outer, first, lan)
    middle = Client(InsideOf(outer.guest), client.user, client.bin, client.dir)
    inner = sandbox(middle, "--mount")
    inner.names.update(userns=outer.names["userns"])
    try:
        inner.client = middle
        second = start(inner, "-i kakoi0 -I app0 -t 127.0.0.1/80:8000")
        for check in (copied, link_has(ifname="app0"), outward, to_loopback_of_guest(8080, 8000)):
            check(inner, second, lan)
        second.end(signal.SIGKILL)
        first.end(signal.SIGKILL)
    finally:
        middle.close()
        inner.close()
        outer.close()


_LIX = (
    "pasta --quiet --foreground --config-net --gateway 169.254.1.1 --address 169.254.1.2 --netmask 16 --dns-forward "
    "169.254.1.1 --gateway 64:ff9b:1:4b8e:472e:a5c8:a9fe:0101 --address 64:ff9b:1:4b8e:472e:a5c8:a9fe:0102 "
    "--dns-forward 64:ff9b:1:4b8e:472e:a5c8:a9fe:0101 --ns-ifname eth0 --no-netns-quit --netns /proc/self/fd/0"
)
_LIX_HAS = (
    has("169.254.1.2/16", "64:ff9b:1:4b8e:472e:a5c8:a9fe:102/64"),
    link_has(ifname="eth0"),
    resolves_at("169.254.1.1"),
    resolves_at("64:ff9b:1:4b8e:472e:a5c8:a9fe:101"),
    outward,
)


def lix(site: Site, lan: Lan, line: str) -> None:
    """The namespaces are descriptors 0 and 1; pasta must outlive the build, up to the SIGKILL that it gets."""
    with open(site.names["netns"]) as netns, open(site.names["userns"]) as userns:
        daemon = site.stay(line, stdin=netns, stdout=userns)
        configured(site, daemon)
    for check in _LIX_HAS:
        check(site, daemon, lan)
    site.guest.close()
    daemon.stays()
    assert daemon.end(signal.SIGKILL) == -signal.SIGKILL
    assert daemon.said() == ""


def test_lix_of_a_user(site: Site, lan: Lan) -> None:
    lix(site, lan, f"{_LIX} --userns /proc/self/fd/1")


def test_lix_daemon(root_client: Client, lan: Lan) -> None:
    """The daemon is root, and so is whose the namespaces are. Its pasta is the build user with two capabilities."""
    site = sandbox(root_client)
    user = pwd.getpwnam("nobody")
    capabilities = "+sys_admin,+net_bind_service"
    become = (
        f"setpriv --reuid={user.pw_uid} --regid={user.pw_gid} --clear-groups --inh-caps={capabilities} "
        f"--ambient-caps={capabilities}"
    )
    lix(site, lan, f"{become} {_LIX} --userns /proc/self/fd/1")


def test_end_with_the_parent_although_root_has_become_nobody(root_client: Client) -> None:
    """The kernel forgets PDEATHSIG of a process that changes its ids."""
    site = sandbox(root_client, "--mount")
    pids: list[int] = []

    def parent() -> None:
        """A thread: PDEATHSIG is about the thread that forked."""
        daemon = site.stay("pasta -f -q --config-net {pid}", preexec_fn=die_with_parent)
        pids.append(daemon.pid)
        set_up(site, daemon)

    thread = threading.Thread(target=parent)
    thread.start()
    thread.join()
    wait_for(lambda: not alive(pids[0]), "pasta ends with the thread that started it")
    site.close()


def test_goes_on_in_the_foreground_after_its_namespace(client: Client) -> None:
    site = sandbox(client)
    daemon = site.stay("pasta -f -q --config-net --userns {userns} --netns {netns} --no-netns-quit")
    set_up(site, daemon)
    site.close()
    daemon.stays()
    assert daemon.end() == 0


class InsideOf(Within):
    """The namespaces of a guest, network included, as the place where another client runs."""

    def __init__(self, guest: Namespace) -> None:
        self._guest = guest
        self.user = guest.user

    @property
    def pid(self) -> int:
        return self._guest.pid

    def argv(self, command: Sequence[str]) -> list[str]:
        return self._guest.argv(command)
