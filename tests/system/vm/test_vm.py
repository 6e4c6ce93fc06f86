"""A virtual machine under QEMU: it configures itself, reaches others and is reached, and comes back.

The processor is emulated, so that this runs anywhere: what is transferred is as much as that allows in a few seconds.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.content import digest

from ..support import User, wait_for
from ..traffic.servers import bytes_server, running
from ..traffic.support import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Lan, in_thread, read_all
from .image import Image
from .machine import Guest, VirtualMachine
from .support import ACCEPTED, Passt, name_server, passt

DHCP = "udhcpc -i eth0 -n -q -s /dhcp -O search -O mtu -O staticroutes"
DHCP6 = "echo 'request dhcp6.name-servers, dhcp6.domain-search;' >/tmp/dhclient.conf; "
DHCP6 += "dhclient -6 -1 -d -cf /tmp/dhclient.conf -sf /dhcp6 -lf /tmp/leases6 -pf /tmp/dhclient6 eth0 & "
DHCP6 += "while ! grep -qs new_ip6_address /tmp/lease6; do usleep 50000; done; kill $!"
FORWARDED = 18022
MIB = 1 << 20
TRANSFER = 200 * MIB
TRANSFER_DEADLINE = 90.0


def configure(machine: Guest) -> dict[str, str]:
    """Bring the interface up and have it configured by DHCP; the lease."""
    machine.run(f"ip link set eth0 up && {DHCP}")
    return dict(line.split("=", 1) for line in machine.run("cat /tmp/lease").splitlines() if "=" in line)


def wait_for_slaac(machine: Guest) -> str:
    """The address and routes from a router advertisement; the addresses of the interface."""

    def addresses() -> str:
        shown = machine.run("ip -6 address show dev eth0 scope global")
        return shown if "inet6" in shown and "tentative" not in shown else ""

    found = wait_for(addresses, "a router advertisement")
    assert isinstance(found, str)
    return found


@pytest.fixture(scope="module")
def server(lan: Lan, ordinary_user: User) -> Iterator[Passt]:
    """passt for the machine of this module."""
    with passt(lan, ordinary_user, "-t", f"{FORWARDED}:22") as made, name_server(lan):
        yield made


@pytest.fixture(scope="module")
def booted(server: Passt, machine_image: Image) -> Iterator[VirtualMachine]:
    """A machine with room for a transfer, that has a lease and an address by router advertisement."""
    machine = VirtualMachine(machine_image, memory=512)
    assert server.path
    try:
        machine.start_on(server.path)
        configure(machine)
        wait_for_slaac(machine)
        yield machine
    finally:
        machine.close()


@pytest.fixture
def vm(server: Passt, booted: VirtualMachine) -> Iterator[VirtualMachine]:
    """The same, when passt has outlived the test."""
    yield booted
    assert server.alive(), server.said()


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def test_lease(vm: VirtualMachine) -> None:
    lease = configure(vm)
    assert (lease["ip"], lease["mask"], lease["router"]) == (HOST, "24", GATEWAY)
    assert (lease["dns"], lease["search"], lease["mtu"]) == (PEER, "lan.test corp.test", "65520")
    assert f"inet {HOST}/24" in vm.run("ip address show dev eth0")
    assert "mtu 65520" in vm.run("ip link show dev eth0")
    assert f"default via {GATEWAY} dev eth0" in vm.run("ip route")


def test_router_advertisement(vm: VirtualMachine) -> None:
    """The prefix is the host's, and the router has the address and the MAC address that it says."""
    assert HOST6.removesuffix("::2") in wait_for_slaac(vm)
    (router,) = set(re.findall(r"default via (\S+)", vm.run("ip -6 route")))
    assert router.startswith("fe80::")
    vm.run(f"ping -6 -c 1 -W 5 -I eth0 {router}")


def test_dhcpv6(vm: VirtualMachine) -> None:
    vm.run(DHCP6)
    lease = vm.run("cat /tmp/lease6")
    assert f"new_ip6_address={HOST6}\n" in lease
    assert f"new_dhcp6_name_servers={PEER6}\n" in lease
    assert "new_dhcp6_domain_search=lan.test. corp.test." in lease


@pytest.mark.parametrize("address", [GATEWAY, PEER, GATEWAY6, PEER6])
def test_ping(vm: VirtualMachine, address: str) -> None:
    assert "3 packets received, 0% packet loss" in vm.run(f"ping -c 3 -i 0.2 -W 5 {address}")


def test_large_ping(vm: VirtualMachine) -> None:
    """One frame at the MTU of 65520."""
    assert "0% packet loss" in vm.run(f"ping -c 2 -i 0.2 -W 5 -s 65000 {PEER}")


@pytest.mark.parametrize("resolver", ["", PEER, PEER6])
def test_names(vm: VirtualMachine, resolver: str) -> None:
    """By the resolver from the lease, and by one that is named."""
    assert "192.0.2.77" in vm.run(f"nslookup -type=a name.test {resolver}")


@pytest.mark.parametrize(("where", "bind", "address"), [("host", "127.0.0.1", GATEWAY), ("peer", PEER6, PEER6)])
def test_transfer(vm: VirtualMachine, lan: Lan, where: str, bind: str, address: str) -> None:
    """Down and up, the same bytes at both ends."""
    size = TRANSFER if where == "host" else TRANSFER // 8
    namespace = lan.host if where == "host" else lan.peer
    wanted = digest(size)
    with bytes_server(namespace, bind) as port:
        vm.run(f"wget -q -O /tmp/data {url(address, port)}/{size}", deadline=TRANSFER_DEADLINE)
    assert vm.run("sha256sum /tmp/data", deadline=TRANSFER_DEADLINE).split()[0] == wanted

    def receive() -> str:
        sock, _ = listener.accept()
        with sock:
            sha = hashlib.sha256()
            while data := sock.recv(MIB):
                sha.update(data)
            return sha.hexdigest()

    with namespace.listen(bind) as listener, in_thread(receive) as received:
        port = listener.getsockname()[1]
        vm.run(f"nc {address} {port} </tmp/data; rm /tmp/data", deadline=TRANSFER_DEADLINE)
        assert received() == wanted


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_inbound_connection(vm: VirtualMachine, lan: Lan, address: str) -> None:
    """From another host, to the forwarded port, with an answer of many segments."""
    vm.run("(head -c 300000 /dev/zero; cat) | nc -l -p 22 >/tmp/received 2>/dev/null & usleep 200000")
    with lan.peer.connect(address, FORWARDED) as sock:
        sock.sendall(b"from outside")
        wait_for(lambda: vm.run("cat /tmp/received") == "from outside", "the guest receives")
        sock.shutdown(socket.SHUT_WR)
        assert read_all(sock) == bytes(300000)


@pytest.mark.parametrize("direction", ["", "--reverse"])
def test_datagrams(vm: VirtualMachine, lan: Lan, direction: str) -> None:
    """As many as the machine takes easily, and hardly one is lost."""
    with running(lan.host, "127.0.0.1", "iperf3", "-s", "-p", "{port}") as port:
        shown = vm.run(f"iperf3 -J -u -c {GATEWAY} -p {port} -l 1400 -b 10M -t 1 {direction}")
    result = json.loads(shown)["end"]["sum"]
    assert result["packets"] > 100 and result["lost_percent"] < 10


def test_reboot(vm: VirtualMachine, server: Passt) -> None:
    """The same connection to QEMU, a guest that starts from nothing."""
    before = server.count(ACCEPTED)
    vm.reboot()
    assert configure(vm)["ip"] == HOST
    vm.run(f"ping -c 1 -W 5 {PEER}")
    assert server.count(ACCEPTED) == before


def test_power_cycle(vm: VirtualMachine, server: Passt) -> None:
    """Another QEMU on the same socket."""
    vm.stop()
    assert server.path
    vm.start_on(server.path)
    assert configure(vm)["ip"] == HOST
    wait_for_slaac(vm)
    for address in (PEER, PEER6):
        vm.run(f"ping -c 1 -W 5 {address}")


# Machines of their own ----------------------------------------------------------------------------------------------


def path_of(server: Passt) -> Path:
    assert server.path
    return server.path


def test_small_mtu_and_one_off(lan: Lan, ordinary_user: User, machine: VirtualMachine) -> None:
    """At 1280, the least that IPv6 allows: transfers in segments of that size; and passt goes with the machine."""
    size = 8 * MIB
    with passt(lan, ordinary_user, "-m", "1280", "--one-off") as server:
        machine.start_on(path_of(server))
        assert configure(machine)["mtu"] == "1280"
        wait_for_slaac(machine)
        assert "mtu 1280" in machine.run("ip link show dev eth0")
        for where, bind, address in ((lan.host, "127.0.0.1", GATEWAY), (lan.peer, PEER6, PEER6)):
            with bytes_server(where, bind) as port:
                machine.run(f"wget -q -O /tmp/data {url(address, port)}/{size}", deadline=TRANSFER_DEADLINE)
            assert machine.run("sha256sum /tmp/data").split()[0] == digest(size)
            with where.listen(bind) as listener, in_thread(accept_all, listener) as received:
                machine.run(f"nc {address} {listener.getsockname()[1]} </tmp/data", deadline=TRANSFER_DEADLINE)
                assert hashlib.sha256(received()).hexdigest() == digest(size)
        machine.stop()
        server.expect_end()


def accept_all(listener: socket.socket) -> bytes:
    """Everything that the first connection brings."""
    sock, _ = listener.accept()
    with sock:
        return read_all(sock)


def test_ipv6_only(lan: Lan, ordinary_user: User, machine: VirtualMachine) -> None:
    """No DHCP, no ARP; everything by IPv6."""
    with passt(lan, ordinary_user, "-6") as server, name_server(lan):
        machine.start_on(path_of(server))
        machine.run("ip link set eth0 up")
        wait_for_slaac(machine)
        assert machine.call("udhcpc -i eth0 -n -q -t 2 -T 1 -s /dhcp")[0] != 0
        assert machine.call(f"arping -c 1 -w 1 -I eth0 {GATEWAY}")[0] != 0
        machine.run(f"ping -c 1 -W 5 {GATEWAY6} && ping -c 1 -W 5 {PEER6}")
        assert "192.0.2.77" in machine.run(f"nslookup -type=a name.test {PEER6}")
        with bytes_server(lan.host, "::1") as port:
            machine.run(f"wget -q -O /tmp/data {url(GATEWAY6, port)}/{MIB}")
        assert machine.run("sha256sum /tmp/data").split()[0] == digest(MIB)
