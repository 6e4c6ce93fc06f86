"""The host's network changes while pasta and passt run: the guest's view follows (`docs/follow.md`).

The host is a network namespace with a cable to a peer, which has every network that the host may be in, and an address
beyond all of them: SERVER. `Site` moves the host from one network to another. Nothing is waited for but conditions.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from .support import DEADLINE, User, wait_for
from .traffic.support import Guest, Lan, Namespace, in_thread, new_lan, root_user

SERVER, SERVER6 = "203.0.113.9", "2001:db8:99::9"  # beyond every network
PORT = 7009
HOME, TRAIN = "192.168.7", "10.9.0"  # networks, of which .1 is the gateway
HOME6, TRAIN6 = "2001:db8:7", "2001:db8:9"
RECVERR = (socket.IPPROTO_IP, 11), (socket.IPPROTO_IPV6, 25)  # IP_RECVERR, IPV6_RECVERR
QUIET = "-q", "-t", "none", "-u", "none", "-T", "none", "-U", "none"


class Server:
    """At SERVER and SERVER6: tells each client its address, and then sends on and on what it is sent."""

    def __init__(self, where: Namespace) -> None:
        self._listener = where.make_socket(socket.AF_INET6)
        self._listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self._listener.bind(("::", PORT))
        self._listener.listen(64)
        self._listener.settimeout(None)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, (address, *_) = self._listener.accept()
                threading.Thread(target=self._talk, args=(client, address), daemon=True).start()

    def _talk(self, client: socket.socket, address: str) -> None:
        with client, contextlib.suppress(OSError):
            client.sendall(f"{address.removeprefix('::ffff:')}\n".encode())
            while data := client.recv(1 << 16):
                client.sendall(data)


@dataclass
class Site:
    """The host and its networks."""

    lan: Lan

    def host(self, *commands: str) -> None:
        """ip(8) on the host."""
        for command in commands:
            self.lan.host.run("ip", *command.split())

    def join(self, network: str, number: int = 20, dev: str = "eth0") -> None:
        """An address and a default route, as a DHCP client sets them."""
        self.host(f"address replace {network}.{number}/24 dev {dev}")
        self.host(f"route replace default via {network}.1 dev {dev}")

    def join6(self, prefix: str, number: int = 20) -> None:
        self.host(f"address replace {prefix}::{number}/64 dev eth0 nodad")
        self.host(f"-6 route replace default via {prefix}::1 dev eth0")

    @contextlib.contextmanager
    def pasta(self, user: User, *options: str) -> Iterator[tuple[Guest, Callable[[], Any]]]:
        """A guest, and what its pasta tells of the host's network."""
        with tempfile.TemporaryDirectory() as name:
            os.chown(name, user.uid, user.gid)
            os.chmod(name, 0o711)
            path = f"{name}/control"
            with self.lan.pasta(user, *QUIET, "-c", path, *options) as guest:
                yield guest, partial(network_of, user, path)

    def leave(self) -> None:
        """Offline: the interface loses everything but its name."""
        self.host("address flush dev eth0", "route flush dev eth0", "-6 route flush dev eth0")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    yield from made_site()


def made_site() -> Iterator[Site]:
    """A host without a network, and the networks that it may join."""
    with new_lan(root_user(), v4=False, v6=False) as lan:
        for network in (HOME, TRAIN):
            lan.peer.run("ip", "address", "add", f"{network}.1/24", "dev", "eth0")
        for prefix in (HOME6, TRAIN6):
            lan.peer.run("ip", "address", "add", f"{prefix}::1/64", "dev", "eth0", "nodad")
        for address in (f"{SERVER}/32", f"{SERVER6}/128"):
            lan.peer.run("ip", "address", "add", address, "dev", "lo")
        lan.peer.write("/proc/sys/net/ipv6/conf/all/forwarding", "1")
        server = Server(lan.peer)
        yield Site(lan)
        del server


@pytest.fixture(autouse=True)
def offline(site: Site) -> None:
    """Each test begins without a network."""
    site.leave()


def network_of(user: User, path: str) -> Any:
    """The part of `pesto --show --json` about the host's network."""
    command = user.command([user.python, "-m", "passt.pesto", "--show", "--json", path])
    done = subprocess.run(command, cwd="/", env=user.env, capture_output=True, text=True, check=True, timeout=DEADLINE)
    return json.loads(done.stdout).get("network", {})


def seen_as(guest: Namespace, address: str = SERVER) -> str:
    """The address by which the server sees a new connection of the guest; empty if there is none."""
    made = guest.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
    made.settimeout(1)
    with made, contextlib.suppress(OSError):
        made.connect((address, PORT))
        return made.makefile().readline().strip()
    return ""


def addresses(guest: Guest) -> list[str]:
    """Those of the guest's interface that new connections may have."""
    (link,) = [link for link in guest.show("address") if link["ifname"] != "lo"]
    own = [a for a in link["addr_info"] if a["scope"] == "global" and not a.get("deprecated")]
    return [f"{a['local']}/{a['prefixlen']}" for a in own]


def gateways(guest: Guest, version: str = "-4") -> list[str]:
    return [r.get("gateway", "") for r in guest.show(version, "route", "show", "default")]


def talk(connection: socket.socket, text: bytes = b"still here") -> bool:
    """Whether both ends of a connection hear each other."""
    connection.sendall(text)
    found = b""
    while len(found) < len(text):
        if not (part := connection.recv(len(text) - len(found))):
            return False
        found += part
    return found == text


def connect(guest: Guest, address: str = SERVER) -> socket.socket:
    made = guest.connect(address, PORT)
    made.makefile().readline()  # no more than the line comes until something is sent
    return made


# pasta -------------------------------------------------------------------------------------------------------------


def test_offline_at_the_start_and_online_later(site: Site, anyone: User) -> None:
    with site.pasta(anyone, "--config-net") as (guest, network):
        assert seen_as(guest) == ""
        site.join(HOME)
        wait_for(lambda: addresses(guest) == [f"{HOME}.20/24"], "the namespace has the host's address")
        wait_for(lambda: seen_as(guest) == f"{HOME}.20", "the server")
        site.join6(HOME6)
        wait_for(lambda: f"{HOME6}::20/64" in addresses(guest), "IPv6, too")
        wait_for(lambda: seen_as(guest, SERVER6) == f"{HOME6}::20", "the server by IPv6")
        assert f"{HOME6}::1" in gateways(guest, "-6")
        view = network()["view"]
        assert view.startswith(f"IPv4 {HOME}.20/24 via {HOME}.1 (eth0: the default route); IPv6 {HOME6}::20/64 via ")
        assert network()["changes"] >= 2


def test_another_subnet_while_a_connection_lasts(site: Site, ordinary_user: User) -> None:
    """A connection goes on for as long as the host has its address; then both ends are told at once."""
    site.join(HOME)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net") as guest:
        connection = connect(guest)
        site.join(TRAIN)
        site.host(f"address change {HOME}.20/24 dev eth0 preferred_lft 0")
        wait_for(lambda: addresses(guest) == [f"{TRAIN}.20/24"], "the new address")
        assert gateways(guest) == [f"{TRAIN}.1"]
        assert talk(connection)
        assert connection.getsockname()[0] == f"{HOME}.20"
        wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "a new connection has the new address")
        assert talk(connection)
        site.host(f"address del {HOME}.20/24 dev eth0")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)
        assert seen_as(guest) == f"{TRAIN}.20"


def test_what_the_user_has_added_stays(site: Site, ordinary_user: User) -> None:
    site.join(HOME)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net") as guest:
        guest.run("ip", "address", "add", f"{HOME}.77/24", "dev", "eth0")
        guest.run("ip", "route", "add", "198.51.100.0/24", "via", f"{HOME}.9")
        site.leave()
        site.join(TRAIN)
        wait_for(lambda: f"{TRAIN}.20/24" in addresses(guest), "the new address")
        assert f"{HOME}.77/24" in addresses(guest)
        (route,) = guest.show("route", "show", "198.51.100.0/24")
        assert route["gateway"] == f"{HOME}.9"
        assert gateways(guest) == [f"{TRAIN}.1"]


def test_another_ipv6_prefix(site: Site, ordinary_user: User) -> None:
    """The former address is deprecated on the host, and so it is in the namespace: its connection goes on."""
    site.join6(HOME6)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net", "-6") as guest:
        connection = connect(guest, SERVER6)
        site.join6(TRAIN6)
        site.host(f"address change {HOME6}::20/64 dev eth0 preferred_lft 0")
        wait_for(lambda: addresses(guest) == [f"{TRAIN6}::20/64"], "the new address")
        assert gateways(guest, "-6") == [f"{TRAIN6}::1"]
        wait_for(lambda: seen_as(guest, SERVER6) == f"{TRAIN6}::20", "a new connection has the new address")
        assert talk(connection)
        site.host(f"address del {HOME6}::20/64 dev eth0")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_a_network_without_ipv6(site: Site, ordinary_user: User) -> None:
    """Programs in the namespace need not try in vain what the host has not."""
    site.join(HOME)
    site.join6(HOME6)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net") as guest:
        assert gateways(guest, "-6") == [f"{HOME6}::1"]
        site.leave()
        site.join(TRAIN)
        wait_for(lambda: gateways(guest, "-6") == [], "the namespace has no IPv6 router")
        wait_for(lambda: addresses(guest) == [f"{TRAIN}.20/24"], "nor an IPv6 address")
        site.join6(TRAIN6)
        wait_for(lambda: seen_as(guest, SERVER6) == f"{TRAIN6}::20", "it is back")


@pytest.mark.parametrize("v6", [False, True])
def test_a_host_that_loses_one_family(site: Site, anyone: User, v6: bool) -> None:
    """Its connections of that family have no address to go on with, and programs are told at once. Others go on."""
    site.join(HOME)
    site.join6(HOME6)
    of, to = ("-6", SERVER6) if v6 else ("-4", SERVER)
    with site.pasta(anyone, "--config-net") as (guest, network):
        lost, other = connect(guest, to), connect(guest, SERVER if v6 else SERVER6)
        datagrams = guest.make_socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM)
        datagrams.setsockopt(*RECVERR[v6], 1)
        datagrams.settimeout(DEADLINE)
        datagrams.connect((to, PORT))
        datagrams.send(b"a question")
        with contextlib.suppress(ConnectionRefusedError):
            datagrams.recv(1)  # no program has this port
        site.host(f"{of} route flush dev eth0", f"{of} address flush dev eth0 scope global")
        with pytest.raises(ConnectionResetError):
            lost.recv(1)
        with pytest.raises(OSError, match="Network is unreachable"):
            datagrams.recv(1)
        assert network()["ended"] == 2
        with pytest.raises(OSError, match=r"unreachable|refused"):
            guest.connect(to, PORT)
        assert talk(other)


def test_an_address_that_comes_back_a_moment_later(site: Site, ordinary_user: User) -> None:
    """The host has been offline. It has IPv6 again, and then IPv4, as after a suspend."""
    site.join(HOME)
    site.join6(HOME6)
    with site.pasta(ordinary_user, "--config-net") as (guest, network):
        connection = connect(guest)
        site.leave()
        wait_for(lambda: "IPv6 2001:db8:7::20/64 via 2001:db8:7::1 stays" in network()["view"], "it is offline")
        site.join6(HOME6)
        wait_for(lambda: seen_as(guest, SERVER6) == f"{HOME6}::20", "it has IPv6")
        site.join(HOME)
        assert talk(connection)


def test_a_tunnel_comes_and_goes(site: Site, ordinary_user: User) -> None:
    """A default route without a gateway, and with another address. Connections from before go on."""
    site.join(HOME)
    lan = site.lan
    lan.host.run("ip", "link", "add", "tun0", "type", "veth", "peer", "name", "tun0", "netns", str(lan.peer.pid))
    try:
        lan.peer.run("ip", "link", "set", "tun0", "up")
        lan.peer.run("ip", "route", "add", "10.8.0.2/32", "dev", "tun0")
        with site.pasta(ordinary_user, "--config-net") as (guest, network):
            connection = connect(guest)
            site.host(f"route add default via {HOME}.1 dev eth0 metric 100", "route del default metric 0")
            site.host("address add 10.8.0.2/32 dev tun0", "link set tun0 up", "route add default dev tun0")
            wait_for(lambda: seen_as(guest) == "10.8.0.2", "a new connection goes through the tunnel")
            wait_for(lambda: addresses(guest) == ["10.8.0.2/32"], "the tunnel's address")
            assert "(tun0: the default route with the lowest metric" in network()["view"]
            assert talk(connection)
            site.host("link delete tun0")
            wait_for(lambda: addresses(guest) == [f"{HOME}.20/24"], "the former address")
            assert seen_as(guest) == f"{HOME}.20"
            assert talk(connection)
    finally:
        lan.host.run("ip", "link", "delete", "tun0", check=False)


def test_the_interface_is_renamed(site: Site, ordinary_user: User) -> None:
    """Also where it is named by an option: it is known by its index."""
    site.join(HOME)
    try:
        with site.pasta(ordinary_user, "--config-net", "-i", "eth0") as (guest, network):
            site.host("link set eth0 down", "link set eth0 name wan0", "link set wan0 up")
            site.join(TRAIN, dev="wan0")
            site.host(f"address del {HOME}.20/24 dev wan0")
            wait_for(lambda: addresses(guest) == [f"{TRAIN}.20/24"], "the new address")
            assert "(wan0: given by --interface)" in network()["view"]
            wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server")
    finally:
        site.host("link set wan0 down", "link set wan0 name eth0", "link set eth0 up")


def test_a_download_goes_on(site: Site, ordinary_user: User) -> None:
    """Bytes in both directions through changes that do not concern the host's own address, and back."""
    site.join(HOME)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net") as guest:
        connection = connect(guest)
        block = os.urandom(1 << 18)
        for number in range(21, 25):
            site.join(TRAIN, number)
            site.host(f"address change {HOME}.20/24 dev eth0 preferred_lft 0")
            with in_thread(connection.sendall, block):
                received = read_exactly(connection, len(block))
            assert received == block
            wait_for(partial(has, guest, f"{TRAIN}.{number}/24"), "the new address")
            site.host(f"address change {TRAIN}.{number}/24 dev eth0 preferred_lft 0")


def has(guest: Guest, address: str) -> bool:
    return address in addresses(guest)


def read_exactly(sock: socket.socket, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        part = sock.recv(size - len(found))
        assert part, "the stream has ended"
        found += part
    return bytes(found)


def test_follow_routes_leaves_addresses_alone(site: Site, ordinary_user: User) -> None:
    site.join(HOME)
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net", "--follow", "routes") as guest:
        site.leave()
        site.join(TRAIN)
        wait_for(lambda: gateways(guest) == [f"{TRAIN}.1"], "the new gateway")
        assert addresses(guest) == [f"{HOME}.20/24"]
        assert seen_as(guest) == f"{TRAIN}.20"


def test_follow_off(site: Site, ordinary_user: User) -> None:
    """Nothing changes in the namespace, and the host's kernel does what it can."""
    site.join(HOME)
    with site.pasta(ordinary_user, "--config-net", "--follow", "off") as (guest, network):
        assert network() == {}
        site.leave()
        site.join(TRAIN)
        wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server")
        assert (addresses(guest), gateways(guest)) == ([f"{HOME}.20/24"], [f"{HOME}.1"])


def test_what_the_user_has_fixed(site: Site, ordinary_user: User) -> None:
    site.join(HOME)
    fixed = ("-a", "172.16.0.5/24", "-g", "172.16.0.1")
    with site.pasta(ordinary_user, "--config-net", *fixed) as (guest, _):
        site.leave()
        site.join(TRAIN)
        wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server")
        assert (addresses(guest), gateways(guest)) == (["172.16.0.5/24"], ["172.16.0.1"])


def test_a_forwarded_port_moves_with_its_address(site: Site, ordinary_user: User) -> None:
    site.join(HOME)
    with site.pasta(ordinary_user, "--config-net", "-t", f"{HOME}.20/7010", "-u", f"{HOME}.20/7010") as (guest, _):
        server = guest.make_socket()
        server.bind(("0.0.0.0", 7010))
        server.listen(8)
        peer = site.lan.peer
        for network in (HOME, TRAIN, HOME):
            site.leave()
            site.join(network)

            def reached(network: str = network) -> bool:
                with peer.make_socket() as client:
                    return client.connect_ex((f"{network}.20", 7010)) == 0

            wait_for(reached, f"the port at {network}.20")
            server.accept()[0].close()


def test_a_mapped_address_is_the_hosts_new_one(site: Site, ordinary_user: User) -> None:
    """As host.containers.internal has it."""
    site.join(HOME)
    server = site.lan.host.listen("0.0.0.0")
    port = server.getsockname()[1]
    with site.lan.pasta(ordinary_user, *QUIET, "--config-net", "--map-guest-addr", "169.254.1.2") as guest:
        for network in (HOME, TRAIN):
            if network == TRAIN:
                site.leave()
                site.join(network)
                wait_for(lambda: addresses(guest) == [f"{TRAIN}.20/24"], "the new address")
            client = guest.connect("169.254.1.2", port)
            accepted, _ = server.accept()
            assert accepted.getsockname()[0] == f"{network}.20"
            accepted.close()
            client.close()


def test_root_attaches_to_a_namespace(site: Site, root: User) -> None:
    """No right over the namespace is kept: it stays as it was, a line says so, and it goes on to work."""
    site.join(HOME)
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        guest = Namespace(site.lan.host.argv(["unshare", "--net"]), root_user())
        log = Path(name) / "log"
        command = [root.python, "-m", "passt", "-f", *QUIET[1:], "-l", str(log), "--config-net", str(guest.pid)]
        try:
            with site.lan.host.popen(*command, env=root.env):
                wait_for(lambda: seen_as(guest) == f"{HOME}.20", "the server")
                site.leave()
                site.join(TRAIN)
                wait_for(lambda: seen_as(guest) == f"{TRAIN}.20", "the server from another network")
                wait_for(lambda: "stay as they are: pasta has no right" in log.read_text(), "a line in the log")
                assert f"{HOME}.20/24" in guest.run("ip", "-o", "address").stdout
        finally:
            guest.close()
