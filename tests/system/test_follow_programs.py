"""Programs in the guest while the host's network changes: a WebSocket, a download and a ping that run through all of
it; DHCP clients that follow (`docs/follow.md`).
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.content import digest

from .support import User, wait_for
from .test_follow import HOME, HOME6, QUIET, SERVER, TRAIN, TRAIN6, Site, addresses, made_site, network_of, seen_as
from .traffic.servers import bytes_server
from .traffic.support import Namespace, root_user
from .traffic.test_configuration import PRIVATE
from .websocket import WebSocket, serve

QUICK = 5.0  # s; two are promised, and a loaded machine takes longer
WEB_PORT = 7011
FLAPS = 100


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    for site in made_site():
        listener = site.lan.peer.make_socket()
        listener.bind((SERVER, WEB_PORT))
        listener.listen(8)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield site


@pytest.fixture(autouse=True)
def at_home(site: Site) -> None:
    site.leave()
    site.join(HOME)
    site.join6(HOME6)


def web_socket(guest: Namespace) -> WebSocket:
    made = WebSocket(guest.connect(SERVER, WEB_PORT))
    made.sock.settimeout(QUICK)
    return made


def cpu_time(pid: int) -> float:
    """Seconds of processor time that a process has taken."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_server(guest: Namespace, address: str, when: str) -> None:
    """Until a new connection has this address, but not for long."""
    wait_for(lambda: seen_as(guest) == address, f"a new connection {when}", QUICK)


class Ping:
    """ping(8) without an end, five times a second."""

    def __init__(self, guest: Namespace, path: Path) -> None:
        self._path = path
        self._out = path.open("w")
        self._running = guest.popen("stdbuf", "-oL", "ping", "-i", "0.2", SERVER, stdout=self._out)

    def __enter__(self) -> Ping:
        self._running.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.__exit__(None, None, None)
        self._out.close()

    @property
    def replies(self) -> int:
        return len(re.findall(r"icmp_seq=\d+ ttl", self._path.read_text()))

    def goes_on(self, what: str) -> None:
        before = self.replies
        wait_for(lambda: self.replies > before, f"a reply, {what}", QUICK)


@contextlib.contextmanager
def tunnel(site: Site) -> Iterator[None]:
    """tun0 leads to the peer, and is not up yet."""
    lan = site.lan
    lan.host.run("ip", "link", "add", "tun0", "type", "veth", "peer", "name", "tun0", "netns", str(lan.peer.pid))
    lan.peer.run("ip", "link", "set", "tun0", "up")
    lan.peer.run("ip", "route", "add", "10.8.0.2/32", "dev", "tun0")
    try:
        yield
    finally:
        lan.host.run("ip", "link", "delete", "tun0", check=False)


def changes(site: Site) -> Iterator[tuple[str, str]]:
    """One after the other: the change, and the guest's address for new connections then. The first address stays."""
    site.join(TRAIN)
    site.host(f"address change {HOME}.20/24 dev eth0 preferred_lft 0")
    yield "another subnet", f"{TRAIN}.20"
    site.join6(TRAIN6)
    site.host(f"address change {HOME6}::20/64 dev eth0 preferred_lft 0")
    yield "another prefix", f"{TRAIN}.20"
    with tunnel(site):
        site.host(f"route add default via {TRAIN}.1 dev eth0 metric 100", "route del default metric 0")
        site.host("address add 10.8.0.2/32 dev tun0", "link set tun0 up", "route add default dev tun0")
        yield "a tunnel", "10.8.0.2"
    yield "no tunnel", f"{TRAIN}.20"
    site.host("link set eth0 down", "link set eth0 name wan0", "link set wan0 up")
    site.join(TRAIN, dev="wan0")
    yield "another name", f"{TRAIN}.20"
    site.host("link set wan0 down", "link set wan0 name eth0", "link set eth0 up")
    site.join(TRAIN)
    yield "offline for a moment", f"{TRAIN}.20"


def test_programs_run_through_all_changes(site: Site, ordinary_user: User, tmp_path: Path) -> None:
    """Soon after each change all of them go on, and a new connection has the new address."""
    size = 24 << 20
    with (
        bytes_server(site.lan.peer, SERVER) as port,
        site.lan.pasta(ordinary_user, *QUIET, "--config-net") as guest,
        Ping(guest, tmp_path / "ping") as ping,
        (tmp_path / "download").open("w+") as summed,
        guest.popen(
            "sh", "-c", f"curl -sS --limit-rate 4M http://{SERVER}:{port}/{size} | sha256sum", stdout=summed
        ) as download,
    ):
        web = web_socket(guest)
        assert web.echo()
        ping.goes_on("before all changes")
        for change, address in changes(site):
            began = time.monotonic()
            wait_for_server(guest, address, f"after: {change}")
            assert web.echo(), change
            ping.goes_on(f"after: {change}")
            assert time.monotonic() - began < QUICK, change
        assert download.wait(30) == 0
        assert (tmp_path / "download").read_text().split() == [digest(size), "-"]
        site.leave()
        site.join(TRAIN, 33)
        with pytest.raises((ConnectionResetError, EOFError)):
            web.echo()
        wait_for_server(guest, f"{TRAIN}.33", "with another address")
        assert web_socket(guest).echo()
        ping.goes_on("with another address")


def test_programs_run_through_flapping(site: Site, ordinary_user: User, tmp_path: Path) -> None:
    """A hundred changes in ten seconds: few of them are followed, the last one is, and it costs little."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, ordinary_user.uid, ordinary_user.gid)
        os.chmod(name, 0o711)
        control = f"{name}/control"
        options = *QUIET, "--config-net", "-c", control
        with site.lan.pasta(ordinary_user, *options) as guest, Ping(guest, tmp_path / "ping") as ping:
            web = web_socket(guest)
            before, began = cpu_time(guest.daemon), time.monotonic()
            for i in range(FLAPS):
                site.host(f"address {'del' if i % 2 else 'add'} {TRAIN}.20/24 dev eth0")
                site.host(f"route replace default via {HOME}.1 dev eth0 metric {i}")
                assert web.echo()
                time.sleep(max(0.0, began + (i + 1) / 10 - time.monotonic()))
            took = time.monotonic() - began
            assert ping.replies > 4 * took, "one in five is lost at most"
            site.join(TRAIN, 33)
            site.host(f"address change {HOME}.20/24 dev eth0 preferred_lft 0")
            wait_for(lambda: f"{TRAIN}.33/24" in addresses(guest), "the last address", QUICK)
            found = network_of(ordinary_user, control)
            assert found["reads"] <= 12 * took + 10, "there is a pause before each reading"
            assert cpu_time(guest.daemon) - before < took / 4
            assert web.echo()
            ping.goes_on("at the end")


# DHCP clients ------------------------------------------------------------------------------------------------------


DHCPCD = "dhcpcd", "-B", "-f", "/dev/null", "-c", "/bin/true", "--noipv4ll", "--noarp"
NETWORK = "[Match]\nType=ether\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n"
NETWORKD = """
mount -t tmpfs tmpfs /run && mount -t sysfs -o ro sysfs /sys && mkdir -p /run/systemd/network /run/systemd/netif || exit
printf "$1" >/run/systemd/network/a.network
chown -R systemd-network:systemd-network /run/systemd/netif
exec /lib/systemd/systemd-networkd
"""


def moves_with(site: Site, guest: Namespace) -> float:
    """How long the guest takes to have the addresses of another network, of both families."""
    wait_for(lambda: at(guest, HOME, HOME6), "addresses by DHCP and router advertisements")
    site.leave()
    site.join(TRAIN)
    site.join6(TRAIN6)
    began = time.monotonic()
    wait_for(lambda: at(guest, TRAIN, TRAIN6), "the guest follows")
    took = time.monotonic() - began
    wait_for_server(guest, f"{TRAIN}.20", "with another lease")
    return took


def at(guest: Namespace, network: str, prefix: str) -> bool:
    """Whether the guest has the address of a network, and one of a prefix that is not deprecated; and no other one."""
    found = [a for link in guest.show("address") for a in link["addr_info"] if link["ifname"] != "lo"]
    usable = [a["local"] for a in found if a["scope"] == "global" and not a.get("deprecated")]
    four, six = [a for a in usable if "." in a], [a for a in usable if ":" in a]
    return four == [f"{network}.20"] and bool(six) and all(a.startswith(f"{prefix}:") for a in six)


def test_dhcpcd_follows(site: Site, ordinary_user: User) -> None:
    """It asks again when the link comes up. Without --follow-link it would at half of its lease, 30 s later."""
    with site.lan.pasta(ordinary_user, *QUIET, "--follow-link") as guest:
        guest.run("ip", "link", "set", "eth0", "up")
        with guest.popen("unshare", "--mount", "sh", "-c", PRIVATE, "sh", *DHCPCD, "eth0"):
            assert moves_with(site, guest) < 10.0


def test_networkd_follows(site: Site, root: User) -> None:
    """In a namespace that has the users of the system: networkd becomes one of them."""
    guest = Namespace(site.lan.host.argv(["unshare", "--net"]), root_user())
    command = [root.python, "-m", "passt", "-f", *QUIET, "--follow-link", str(guest.pid)]
    try:
        with site.lan.host.popen(*command, env=root.env):
            wait_for(lambda: len(guest.show("link")) == 2, "the interface")
            with guest.popen("unshare", "--mount", "sh", "-c", NETWORKD, "sh", NETWORK):
                assert moves_with(site, guest) < 10.0
    finally:
        guest.close()
