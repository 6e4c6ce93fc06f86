"""A virtual machine that shares its memory, under QEMU: by rings, with offloads and without."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

import pytest

from bench.content import digest

from ..support import User, wait_for
from ..traffic.servers import bytes_server
from ..traffic.support import GATEWAY, HOST, HOST6, PEER, PEER6, Lan, in_thread
from .image import Image
from .machine import VirtualMachine
from .newer import netdev, through
from .support import ACCEPTED, GONE, Passt, name_server, passt
from .test_vm import FORWARDED, MIB, TRANSFER_DEADLINE, accept_all, configure, url, wait_for_slaac

pytestmark = pytest.mark.timeout(800)  # the first test downloads QEMU
MEMORY = 512
OFFLOADS = (
    "csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "host_tso4", "host_tso6", "mrg_rxbuf", "event_idx",
    "indirect_desc",
)  # fmt: skip


@pytest.fixture(scope="module")
def qemu() -> list[str]:
    """The command that becomes a QEMU with vhost-user."""
    return through()


@pytest.fixture(scope="module")
def server(lan: Lan, ordinary_user: User, qemu: list[str]) -> Iterator[Passt]:
    with passt(lan, ordinary_user, "--vhost-user", "-t", f"{FORWARDED}:22") as made, name_server(lan):
        yield made


def start(machine: VirtualMachine, server: Passt, qemu: list[str], device: str = "") -> None:
    machine.start(*netdev(server.path, MEMORY), through=qemu, device=device)
    configure(machine)
    wait_for_slaac(machine)


@pytest.fixture(scope="module")
def booted(server: Passt, machine_image: Image, qemu: list[str]) -> Iterator[VirtualMachine]:
    machine = VirtualMachine(machine_image, memory=MEMORY)
    try:
        start(machine, server, qemu)
        yield machine
    finally:
        machine.close()


@pytest.fixture
def vm(server: Passt, booted: VirtualMachine) -> Iterator[VirtualMachine]:
    """A machine with a lease and an address, when passt has outlived the test."""
    yield booted
    assert server.alive(), server.said()


def test_lease(vm: VirtualMachine) -> None:
    assert configure(vm)["ip"] == HOST
    features = vm.run("cat /sys/class/net/eth0/device/features").strip()
    assert [bit for bit in (0, 1, 7, 8, 11, 12, 15, 28, 29, 32) if features[bit] != "1"] == [], "not acknowledged"


@pytest.mark.parametrize("address", [GATEWAY, PEER, PEER6])
def test_ping(vm: VirtualMachine, address: str) -> None:
    assert "3 packets received, 0% packet loss" in vm.run(f"ping -c 3 -i 0.2 -W 5 {address}")


def test_names(vm: VirtualMachine) -> None:
    assert "192.0.2.77" in vm.run("nslookup -type=a name.test")


def transfers(vm: VirtualMachine, lan: Lan, size: int) -> None:
    """Down and up, by both families, the same bytes at both ends."""
    for namespace, bind, address in ((lan.host, "127.0.0.1", GATEWAY), (lan.peer, PEER6, PEER6)):
        with bytes_server(namespace, bind) as port:
            vm.run(f"wget -q -O /tmp/data {url(address, port)}/{size}", deadline=TRANSFER_DEADLINE)
        assert vm.run("sha256sum /tmp/data", deadline=TRANSFER_DEADLINE).split()[0] == digest(size)
        with namespace.listen(bind) as listener, in_thread(accept_all, listener) as received:
            port = listener.getsockname()[1]
            vm.run(f"nc {address} {port} </tmp/data; rm /tmp/data", deadline=TRANSFER_DEADLINE)
            assert hashlib.sha256(received()).hexdigest() == digest(size)


@pytest.mark.parametrize("mtu", [1500, 1280, 65520])
def test_transfer(vm: VirtualMachine, lan: Lan, mtu: int) -> None:
    vm.run(f"ip link set eth0 mtu {mtu}")
    transfers(vm, lan, 16 * MIB)


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_inbound_connection(vm: VirtualMachine, lan: Lan, address: str) -> None:
    def answered() -> bool:
        """The server of the test before may still have the port."""
        vm.run("(echo hello; cat) | nc -l -p 22 >/tmp/received 2>/dev/null & usleep 200000")
        with contextlib.suppress(ConnectionResetError), lan.peer.connect(address, FORWARDED) as sock:
            return sock.recv(6) == b"hello\n"
        return False

    wait_for(answered, "an answer")


def test_reboot(vm: VirtualMachine, server: Passt, lan: Lan) -> None:
    """The rings stop and start; the connection of QEMU stays."""
    before = server.count(ACCEPTED)
    vm.reboot()
    assert configure(vm)["ip"] == HOST
    wait_for_slaac(vm)
    transfers(vm, lan, MIB)
    assert server.count(ACCEPTED) == before


def test_power_cycle(vm: VirtualMachine, server: Passt, lan: Lan, qemu: list[str]) -> None:
    """Another QEMU on the same socket; its driver takes and offers nothing that it may leave out."""
    gone = server.count(GONE)
    vm.stop()
    server.expect(GONE, gone + 1)
    start(vm, server, qemu, "".join(f",{name}=off" for name in OFFLOADS))
    features = vm.run("cat /sys/class/net/eth0/device/features").strip()
    assert [bit for bit in (0, 1, 7, 8, 11, 12, 15, 28, 29) if features[bit] == "1"] == []
    transfers(vm, lan, 8 * MIB)
