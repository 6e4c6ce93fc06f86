"""The command lines of those who have a network namespace and let pasta go to the background.

Each row: who, where its namespace is, the command line, what it relies on, how it ends pasta. The lines are those that
the programs build, with paths filled in.
"""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from ..traffic.support import Lan
from .checks import (
    Check,
    closed,
    copied,
    copied4,
    forwards,
    forwards_out,
    forwards_udp,
    forwards_when_bound,
    gateway_is_itself,
    has,
    host_at,
    link_has,
    listeners,
    listens_at,
    loopback_at,
    outward,
    resolves_at,
    silent,
)
from .support import Bound, Client, Daemon, Site, Within, read_pid, sandbox

pytestmark = pytest.mark.usefixtures("resolver")

# How pasta ends -----------------------------------------------------------------------------------------------------


def unbound(site: Site, daemon: Daemon) -> None:
    """The file is unmounted and removed, without a signal to pasta."""
    assert isinstance(site, Bound)
    site.leave()
    assert daemon.alive()
    site.unbind()
    daemon.expect_end("its namespace is gone")


def left(site: Site, daemon: Daemon) -> None:
    """The process in the namespace ends, without a signal to pasta."""
    site.guest.close()
    daemon.expect_end("the process is gone")


def terminated(site: Site, daemon: Daemon) -> None:
    daemon.end(signal.SIGTERM)


def killed(site: Site, daemon: Daemon) -> None:
    daemon.end(signal.SIGKILL)


@dataclass(frozen=True)
class Row:
    """One command line."""

    client: str
    site: str
    line: str
    relies: tuple[Check, ...]
    end: Callable[[Site, Daemon], None] = left


# The lines ----------------------------------------------------------------------------------------------------------

_PODMAN = (copied, silent, gateway_is_itself, host_at("169.254.1.2"), resolves_at("169.254.1.1"))
_ROOTLESSKIT = (
    "pasta --stderr --ns-ifname=tap0 --mtu=65520 --config-net --address=10.0.2.100 --netmask=24 --gateway=10.0.2.2"
)
_TAP0 = (has("10.0.2.100/24"), link_has(ifname="tap0", mtu=65520), resolves_at("10.0.2.3"))

ROWS = (
    Row("podman", "bound",
        "pasta --config-net --dns-forward 169.254.1.1 -t none -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (*_PODMAN, outward, closed), unbound),
    Row("podman -p 80:80", "bound",
        "pasta --config-net -t 80-80:80-80 --dns-forward 169.254.1.1 -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (*_PODMAN, forwards(80, 80)), unbound),
    Row("podman -p 80-82:80-82", "bound",
        "pasta --config-net -t 80-82:80-82 --dns-forward 169.254.1.1 -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (silent, forwards(80, 80), forwards(81, 81), forwards(82, 82)), unbound),
    Row("podman -p 80:60 -p 100:100/udp", "bound",
        "pasta --config-net -t 80-80:60-60 -u 100-100:100-100 --dns-forward 169.254.1.1 -T none -U none --no-map-gw "
        "--quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent, forwards(80, 60), forwards_udp(100, 100)), unbound),
    Row("podman -p 80:80 -p 5000:5001", "bound",
        "pasta --config-net -t 80-80:80-80 -t 5000-5000:5001-5001 --dns-forward 169.254.1.1 -u none -T none -U none "
        "--no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent, forwards(80, 80), forwards(5000, 5001)), unbound),
    Row("podman -p 127.0.0.1:80:80", "bound",
        "pasta --config-net -t 127.0.0.1/80-80:80-80 --dns-forward 169.254.1.1 -u none -T none -U none --no-map-gw "
        "--quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent, listens_at("127.0.0.1:80"), forwards(80, 80, at="127.0.0.1", source="host")), unbound),
    Row("podman -p [::1]:80:80", "bound",
        "pasta --config-net -t ::1/80-80:80-80 --dns-forward 169.254.1.1 -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (silent, listens_at("[::1]:80"), forwards(80, 80, at="::1", source="host")), unbound),
    Row("podman --net=pasta:-T,80", "bound",
        "pasta --config-net -T 80 --dns-forward 169.254.1.1 -t none -u none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (silent, forwards_out(80, 80)), unbound),
    Row("podman, options from containers.conf and again by hand", "bound",
        "pasta --config-net --ns-mac-addr 9a:dd:31:ea:92:98 --ns-mac-addr 9a:dd:31:ea:92:99 -m 9000 -m 1500 "
        "--dns-forward 169.254.1.1 -t none -u none -T none -U none --no-map-gw --quiet --netns {netns} "
        "--map-guest-addr 169.254.1.2",
        (silent, link_has(address="9a:dd:31:ea:92:99", mtu=1500)), unbound),
    Row("podman --net=pasta:--map-gw", "bound",
        "pasta --config-net --dns-forward 169.254.1.1 -t none -u none -T none -U none --quiet --netns {netns} "
        "--map-guest-addr 169.254.1.2",
        (silent, loopback_at("198.51.100.1")), unbound),
    Row("podman, addresses for DNS and host of both families", "bound",
        "pasta --config-net --dns-forward 10.9.9.1 --dns-forward fd00:9::1 --map-guest-addr 10.9.9.2 "
        "--map-guest-addr fd00:9::2 -t none -u none -T none -U none --no-map-gw --quiet --netns {netns}",
        (silent, resolves_at("10.9.9.1"), resolves_at("fd00:9::1"), host_at("10.9.9.2"), host_at("fd00:9::2")),
        unbound),
    Row("podman, --dns-forward=ADDR that it does not recognize", "bound",
        "pasta --config-net --dns-forward=10.9.9.1 --dns-forward 169.254.1.1 -t none -u none -T none -U none "
        "--no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2",
        _PODMAN, unbound),
    Row("podman, like slirp4netns", "bound",
        "pasta --config-net --ipv4-only -a 10.0.2.0 -n 24 -g 10.0.2.2 --dns-forward 10.0.2.3 -m 1500 --no-ndp "
        "--no-dhcpv6 --no-dhcp -t none -u none -T none -U none --no-map-gw --quiet --netns {netns} "
        "--map-guest-addr 169.254.1.2",
        (silent, has("10.0.2.0/24"), link_has(mtu=1500), resolves_at("10.0.2.3")), unbound),
    Row("podman --net=pasta:-I,tap0,--ipv4-only,-a,10.0.2.0,-n,24,-g,10.0.2.2", "bound",
        "pasta --config-net -I tap0 --ipv4-only -a 10.0.2.0 -n 24 -g 10.0.2.2 --dns-forward 10.0.2.3 --no-ndp "
        "--no-dhcpv6 --no-dhcp -t none -u none -T none -U none --no-map-gw --quiet --netns {netns} "
        "--map-guest-addr 169.254.1.2",
        (silent, has("10.0.2.0/24"), link_has(ifname="tap0")), unbound),
    Row("podman --net=pasta:-t,auto,-u,auto,-T,auto,-U,auto", "bound",
        "pasta --config-net -t auto -u auto -T auto -U auto --dns-forward 169.254.1.1 --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (silent, forwards_when_bound), unbound),
    Row("podman-compose, network_mode: pasta:--ipv4-only,--mtu,1280", "bound",
        "pasta --config-net --ipv4-only --mtu 1280 --dns-forward 169.254.1.1 -t none -u none -T none -U none "
        "--no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent, copied4, link_has(mtu=1280)), unbound),
    Row("podman 4.4", "bound",
        "pasta --config-net -t 80-80:80-80 --mtu 1500 -u none -T none -U none --no-map-gw --netns {netns}",
        (copied, forwards(80, 80)), unbound),
    Row("podman 5.0", "bound",
        "pasta --config-net -t 80-80:80-80 --dns none -u none -T none -U none --no-map-gw --quiet --netns {netns}",
        (copied, silent, forwards(80, 80)), unbound),
    Row("podman 5.1", "bound",
        "pasta --config-net --dns-forward 169.254.0.1 -t none -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns}",
        (copied, silent, resolves_at("169.254.0.1")), unbound),
    Row("podcvd", "bound",
        "pasta --config-net -a 192.168.97.2 --dns-forward 169.254.1.1 -t none -u none -T none -U none --no-map-gw "
        "--quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent,), unbound),
    Row("buildah", "own network in the engine",
        "pasta --config-net --dns-forward 169.254.1.1 -t none -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (*_PODMAN, outward)),
    Row("buildah --network pasta:--mtu,2000,--ns-mac-addr,9a:dd:31:ea:92:98", "own network in the engine",
        "pasta --config-net --mtu 2000 --ns-mac-addr 9a:dd:31:ea:92:98 --dns-forward 169.254.1.1 -t none -u none "
        "-T none -U none --no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2",
        (silent, link_has(mtu=2000, address="9a:dd:31:ea:92:98"))),
    Row("buildah --network pasta:--dns-forward,192.168.0.1", "own network in the engine",
        "pasta --config-net --dns-forward 192.168.0.1 -t none -u none -T none -U none --no-map-gw --quiet "
        "--netns {netns} --map-guest-addr 169.254.1.2",
        (silent, resolves_at("192.168.0.1"))),
    Row("rootlesskit", "sandbox",
        f"{_ROOTLESSKIT} --dns-forward=10.0.2.3 --ipv4-only --tcp-ports=auto --udp-ports=auto {{pid}}",
        (*_TAP0, forwards_when_bound, loopback_at("10.0.2.2"), outward)),
    Row("rootlesskit for Docker", "sandbox",
        f"{_ROOTLESSKIT} --dns-forward=10.0.2.3 --no-map-gw --ipv4-only --tcp-ports=auto --udp-ports=auto "
        "--host-lo-to-ns-lo {pid}",
        (*_TAP0, forwards_when_bound)),
    Row("rootlesskit --port-driver=none", "sandbox",
        f"{_ROOTLESSKIT} --dns-forward=10.0.2.3 --ipv4-only --tcp-ports=none --udp-ports=none {{pid}}",
        _TAP0),
    Row("rootlesskit --detach-netns for Docker", "detached",
        f"{_ROOTLESSKIT} --dns-forward=10.0.2.3 --no-map-gw --ipv4-only --tcp-ports=auto --udp-ports=auto "
        "--host-lo-to-ns-lo --userns={userns} --netns={netns}",
        (*_TAP0, forwards_when_bound), unbound),
    Row("nixpak", "sandbox",
        "pasta --config-net --no-dhcp --no-dhcpv6 --no-ra --no-map-gw -- {pid}",
        (copied, outward, gateway_is_itself)),
    Row("nixpak, isolated", "sandbox",
        "pasta --config-net --no-dhcp --no-dhcpv6 --no-ra --no-map-gw --tcp-ns none --udp-ns none --tcp-ports none "
        "--udp-ports none --ns-ifname eth0 --address 192.168.1.100 --netmask 255.255.255.0 --gateway 192.168.1.1 "
        "--mac-addr 52:54:00:12:34:56 --dns-forward 192.168.1.1 --search none -- {pid}",
        (link_has(ifname="eth0"), resolves_at("192.168.1.1"), closed)),
    Row("waypak", "sandbox",
        "pasta --config-net --no-map-gw --dns-forward 169.254.1.1 --quiet {pid}",
        (copied, silent, resolves_at("169.254.1.1"))),
    Row("drop", "sandbox",
        "pasta --config-net --dns-forward 169.254.1.1 --pid {dir}/pasta.pid --no-map-gw --log-file {dir}/pasta.log "
        "--tcp-ports 127.0.0.1/8080:80 --tcp-ns 80:8000 --udp-ports none --udp-ns none {pid}",
        (copied, listens_at("127.0.0.1:8080"), forwards(8080, 80, at="127.0.0.1", source="host"),
         forwards_out(80, 8000)), killed),
    Row("drop, all ports", "sandbox",
        "pasta --config-net --dns-forward 169.254.1.1 --pid {dir}/pasta.pid --no-map-gw --log-file {dir}/pasta.log "
        "--tcp-ports auto --tcp-ns auto --udp-ports auto --udp-ns auto {pid}",
        (copied, forwards_when_bound), killed),
    Row("hakoniwa", "sandbox",
        "pasta --config-net --no-map-gw --tcp-ports none --udp-ports none --tcp-ns none --udp-ns none {pid}",
        (copied, closed)),
    Row("pod tools", "sandbox",
        "pasta --config-net -q -P {dir}/pasta.pid -t none -u none -T none -U none --userns {userns} --netns {netns}",
        (copied, silent, closed), terminated),
    Row("systemd-nspawn tool", "root",
        "pasta --config-net --quiet {pid}",
        (copied, outward)),
    Row("box", "sandbox",
        "pasta --config-net -t 127.0.0.1/8022:22 --userns {userns} {pid}",
        (copied, forwards(8022, 22, at="127.0.0.1", source="host"))),
    Row("slirp4netns.sh", "sandbox",
        "pasta -q --ipv4-only -a 10.0.2.0 -n 24 -g 10.0.2.2 --dns-forward 10.0.2.3 -m 1500 --no-ndp --no-dhcpv6 "
        "--no-dhcp -P {dir}/pid --config-net --no-map-gw -I tap0 -t 8080:80 --userns {userns} --netns {netns}",
        (silent, has("10.0.2.0/24"), link_has(ifname="tap0", mtu=1500), forwards(8080, 80)), terminated),
)  # fmt: skip


# Where their namespaces are -----------------------------------------------------------------------------------------


def _detached(client: Client) -> Iterator[Site]:
    """rootlesskit --detach-netns: its child has user and mount namespaces, and keeps the network's in a file there."""
    child = Within(client.place, client.user)
    child.run("mount", "-t", "tmpfs", "tmpfs", f"/run/user/{client.user.uid}")
    path = f"/run/user/{client.user.uid}/dockerd-rootless/netns"
    site = Bound(client, path, child, f"/proc/{child.pid}/root")
    site.names["userns"] = f"/proc/{child.pid}/ns/user"
    yield site
    site.close()
    child.close()


@pytest.fixture
def site(request: pytest.FixtureRequest) -> Iterator[Site]:
    """The namespace of a row; the parameter says which one."""
    kind = request.param
    if kind == "detached":
        yield from _detached(request.getfixturevalue("client"))
        return
    if kind == "bound":
        client = request.getfixturevalue("engine")
        made: Site = Bound(client, f"/run/user/{client.user.uid}/netns/netns-{uuid.uuid4()}")
    elif kind == "own network in the engine":
        made = sandbox(request.getfixturevalue("engine"), "--mount")
    elif kind == "root":
        made = sandbox(request.getfixturevalue("root_client"), "--mount")
    else:
        made = sandbox(request.getfixturevalue("client"))
    yield made
    made.close()


@pytest.mark.parametrize(("row", "site"), [pytest.param(r, r.site, id=r.client) for r in ROWS], indirect=["site"])
def test_line(row: Row, site: Site, lan: Lan) -> None:
    daemon = site.start(row.line)
    if "/pasta.pid" in row.line:
        assert read_pid(site.client.dir / "pasta.pid") == daemon.pid
    for check in row.relies:
        check(site, daemon, lan)
    row.end(site, daemon)
    assert listeners(lan.host) == set()
    assert not os.path.exists(f"/proc/{daemon.pid}") or not daemon.alive()
