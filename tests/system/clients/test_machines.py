"""The command lines of those who have a virtual machine, and passt for it.

A machine is played by `vm.client`, or by `vm.vhost` where the line has --vhost-user: it connects, is configured by
DHCP, and reaches the peer.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.l2 import ARP

from ..support import DEADLINE, wait_for
from ..traffic.support import GATEWAY, HOST, PEER, Lan
from ..vm import client as vm
from ..vm.support import listens, seen_from_here
from ..vm.vhost import VhostClient
from .checks import listen, listeners
from .support import Client, Daemon, read_pid

LIBVIRT = "/var/run/libvirt/qemu/passt"
OF_LIBVIRT = "/run/libvirt/qemu/passt"  # the same without the symbolic link, which leads out of /proc/PID/root
LIBVIRT_ADDRESSES = ("1.2.3.4/32", "2001:db8:ac10:fd01::1:10/128")  # of the host, in libvirt's test data


@pytest.fixture(scope="module")
def libvirt(lan: Lan) -> Iterator[None]:
    """The host of libvirt's lines: its directory, the interface eth42, addresses to listen on."""
    lan.host.run("ip", "link", "add", "eth42", "type", "veth", "peer", "name", "eth42-far")
    for name in ("eth42", "eth42-far"):
        lan.host.run("ip", "link", "set", name, "up")
    lan.host.run("ip", "address", "add", "172.17.2.77/24", "dev", "eth42")
    lan.host.run("ip", "route", "add", "default", "via", "172.17.2.1", "dev", "eth42", "metric", "500")
    lan.host.run("ip", "address", "add", "2001:db8:ac10:fd01::77/64", "dev", "eth42", "nodad")
    for address in LIBVIRT_ADDRESSES:
        lan.host.run("ip", "address", "add", address, "dev", "lo")
    lan.host.run("install", "-d", "-m", "0755", "/run/libvirt/qemu")
    yield
    for address in LIBVIRT_ADDRESSES:
        lan.host.run("ip", "address", "del", address, "dev", "lo")
    lan.host.run("ip", "link", "del", "eth42")


@pytest.fixture
def libvirt_dir(libvirt: None, client: Client) -> str:
    """The directory of sockets and PID files, the QEMU user's."""
    own = ["-o", str(client.user.uid), "-g", str(client.user.gid)]
    client.place.run("rm", "-rf", OF_LIBVIRT)
    client.place.run("install", "-d", "-m", "0700", *own, OF_LIBVIRT)
    return LIBVIRT


# Properties that machines rely on -----------------------------------------------------------------------------------

Machine = Callable[[vm.Client, Lan], None]


def offered(address: str, **options: Any) -> Machine:
    """DHCP gives this address, and these options, names as of scapy."""

    def check(guest: vm.Client, lan: Lan) -> None:
        guest.send(guest.dhcp("discover", ("param_req_list", [1, 3, 6, 12, 15, 81])))
        told = guest.expect(lambda p: vm.dict_of(p) | {"address": p[BOOTP].yiaddr} if DHCP in p else None)
        found = {name: bytes(told[name]) if name == "client_FQDN" else told.get(name) for name in options}
        assert (told["address"], found) == (address, options)

    return check


def silent_dhcp(guest: vm.Client, lan: Lan) -> None:
    """No answer by DHCP; ARP, which is asked after it, has one."""
    guest.send(guest.dhcp("discover"), guest.who_has(GATEWAY))
    assert guest.expect(lambda p: "DHCP" if DHCP in p else "ARP" if ARP in p else None) == "ARP"


def reaches_peer(guest: vm.Client, lan: Lan) -> None:
    guest.configure()
    with lan.peer.listen(PEER) as server:
        connection = guest.connect(PEER, server.getsockname()[1])
        far, _ = server.accept()
        with far:
            connection.send(b"from the machine")
            assert far.recv(64) == b"from the machine"
            far.sendall(b"from the peer")
            assert connection.receive(13) == b"from the peer"


def gets(port: int, inner: int, at: str = HOST) -> Machine:
    """A TCP port of the host is one of the machine."""

    def check(guest: vm.Client, lan: Lan) -> None:
        guest.configure()
        source = lan.peer.make_socket()
        source.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            source.connect((at, port))
        connection = guest.accept(inner)
        source.settimeout(DEADLINE)
        connection.expect(lambda tcp: True if tcp.flags & vm.ACK else None)
        connection.send(b"from the machine")
        assert source.recv(64) == b"from the machine"

    return check


def frames_fit(guest: vm.Client, lan: Lan) -> None:
    """None is longer than 65535 bytes: `vm.client` takes no other. With a megabyte to send, they would be."""
    guest.configure()
    with lan.peer.listen(PEER) as server:
        connection = guest.connect(PEER, server.getsockname()[1], window_scale=8)
        far, _ = server.accept()
        with far:
            far.sendall(bytes(400_000))
            assert len(connection.receive(400_000)) == 400_000


# The lines ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One command line with a socket: who, the line, what the machine relies on, how passt ends."""

    client: str
    line: str
    relies: tuple[Machine, ...]
    end: str = "disconnect"


BACKGROUND = (
    Row("libvirt 11", "passt --one-off --socket {libvirt}/-1-QEMUGuest1-net0.socket --pid {libvirt}/-1-QEMUGuest1-net0-"
        "passt.pid --interface eth42 --log-file {dir}/loglaw.blog --hostname hostname1 --fqdn hostname1.test.local "
        "--address 172.17.2.0 --netmask 24 --address 2001:db8:ac10:fd01::feed --tcp-ports '2001:db8:ac10:fd01::1:10/22:"
        "2022,1000-1050,~1020,~1030-1040' --udp-ports '1.2.3.4%eth0/5000-5020:6000-6020,~5010-5015' --tcp-ports 80 "
        "--tcp-ports 443:344",
        (offered("172.17.2.0", hostname=b"hostname1", subnet_mask="255.255.255.0"), gets(80, 80), gets(443, 344))),
    Row("libvirt, minimal", "passt --one-off --socket {libvirt}/1-vm-net0.socket --pid {libvirt}/1-vm-net0-passt.pid "
        "--mtu 1400 --address 10.30.0.5 --netmask 24", (offered("10.30.0.5", **{"interface-mtu": 1400}),)),
    Row("libvirt 9.0", "passt --one-off --socket {libvirt}/1-vm-net0.socket --mac-addr 52:54:00:11:22:33 --mtu 1500 "
        "--interface eth0 --log-file {dir}/log --address 10.30.0.5 --netmask 24 --tcp-ports 2222:22",
        (offered("10.30.0.5"), gets(2222, 22), reaches_peer)),
    Row("libvirt, stopped", "passt --one-off --socket {libvirt}/1-vm-net0.socket --pid {libvirt}/1-vm-net0-passt.pid",
        (reaches_peer,), "SIGTERM"),
    Row("KubeVirt's sidecar, no ports named", "passt --one-off --socket {libvirt}/1-vm-net0.socket --pid {libvirt}/1-"
        "vm-net0-passt.pid --interface eth0 --log-file {dir}/passt.log --tcp-ports all --udp-ports all",
        (offered(HOST), gets(8080, 8080))),
    Row("KubeVirt's sidecar with Istio", "passt --one-off --socket {libvirt}/1-vm-net0.socket --pid {libvirt}/1-"
        "vm-net0-passt.pid --interface eth0 --log-file {dir}/passt.log --tcp-ports '~15001,~15006' --udp-ports none",
        (gets(8080, 8080),)),
    Row("libguestfs", "passt --one-off --socket {dir}/passt.sock --pid {dir}/passt1.pid --address 169.254.2.15 "
        "--netmask 16 --mac-addr 52:56:00:00:00:02 --gateway 169.254.2.2",
        (offered("169.254.2.15", subnet_mask="255.255.0.0", router="169.254.2.2"), reaches_peer)),
    Row("kata, proof of concept", "passt -P {dir}/kata-passt-1.pid -s {dir}/kata-passt-1.socket",
        (reaches_peer,), "SIGTERM"),
    Row("qemus/qemu", "passt -4 -a 172.30.0.2 -g 172.30.0.1 -n 255.255.255.0 -m 1500 -t 22,8080 -u 22,8080 -H qemu -M "
        "52:54:00:aa:bb:cc -P {dir}/passt.pid -s {dir}/passt.socket -l {dir}/passt.log -q",
        (offered("172.30.0.2", hostname=b"qemu"), gets(8080, 8080), reaches_peer), "SIGTERM"),
    Row("scripts", "passt -1 -t none -u none -s {dir}/socket", (reaches_peer,)),
    Row("QEMU's documentation", "passt --socket {dir}/passt.socket", (reaches_peer,), "SIGTERM"),
)  # fmt: skip

FOREGROUND = (
    Row("Rust VM tool", "passt --socket {dir}/socket --foreground -t 2222:22 -t 8080:80 -u 5353:53", (gets(2222, 22),)),
    Row("Firestone", "passt --foreground --one-off --socket {dir}/socket --log-file {dir}/log -t 8080:80 -t "
        "'[2001:db8:1::2]/8000-8010:9000-9010' -u 127.0.0.1/5353:53 --repair-path none", (gets(8080, 80),),
        "disconnect"),
    Row("thundersnap", "passt --socket {dir}/socket --foreground --quiet -a 10.0.2.15 -g 10.0.2.2 -D none",
        (offered("10.0.2.15", name_server=None), reaches_peer), "SIGKILL"),
    Row("sandbox", "passt --socket {dir}/socket --foreground --no-map-gw --map-host-loopback none --map-guest-addr "
        "none -t none -u none --address 10.200.0.2/24 --gateway 10.200.0.1 --dns 10.200.0.1",
        (offered("10.200.0.2", subnet_mask="255.255.255.0", name_server="10.200.0.1"), reaches_peer)),
    Row("russel", "passt --socket {dir}/socket --foreground --address 10.10.0.2 --netmask 30 --gateway 198.51.100.1 "
        "--no-dhcp --no-dhcpv6 --no-ndp --no-ra --no-map-gw --udp-ports none --ipv4-only --tcp-ports "
        "198.51.100.2/2222:22", (silent_dhcp,)),
    Row("Cuttlefish", "passt --foreground -s {dir}/socket -4 -a 192.168.98.2 -n 30 -g 192.168.98.1 "
        "--map-host-loopback 192.168.98.1 -D 192.0.2.53",
        (offered("192.168.98.2", name_server="192.0.2.53"),), "SIGINT"),
)  # fmt: skip

VHOST_USER_BACKGROUND = (
    Row(
        "libvirt",
        "passt --vhost-user --one-off --socket {dir}/socket --pid {dir}/pid --address 10.30.0.5 --netmask 24",
        (offered("10.30.0.5", subnet_mask="255.255.255.0"),),
        "disconnect",
    ),
    Row(
        "KubeVirt",
        "passt --vhost-user --one-off --socket {dir}/socket --pid {dir}/pid --interface eth0 --log-file "
        "{dir}/log --tcp-ports 2222:22 --udp-ports none",
        (reaches_peer, gets(2222, 22)),
        "disconnect",
    ),
    Row("others", "passt --vhost-user -1 -t none -u none -s {dir}/socket", (reaches_peer,), "disconnect"),
)
VHOST_USER_FOREGROUND = (
    Row(
        "Cuttlefish",
        "passt --vhost-user --foreground -s {dir}/socket --repair-path none -4 -a 10.0.2.15 -n 24 -g 10.0.2.2",
        (offered("10.0.2.15"),),
        "SIGINT",
    ),
    Row(
        "Firestone",
        "passt --foreground --one-off --vhost-user --socket {dir}/socket --log-file {dir}/log --repair-path none",
        (reaches_peer,),
        "disconnect",
    ),
    Row(
        "thundersnap",
        "passt --socket {dir}/socket --vhost-user --foreground --quiet -a 10.0.2.15 -g 10.0.2.2 -D none",
        (offered("10.0.2.15"), frames_fit),
        "SIGKILL",
    ),
)


def _named(client: Client, line: str, *options: str) -> Path | None:
    """The file that an option of a line names, as the test finds it; None without that option."""
    words = line.split()
    at = next((i for i, word in enumerate(words) if word in options), None)
    if at is None:
        return None
    libvirt = seen_from_here(client.place, OF_LIBVIRT)
    return Path(words[at + 1].format(dir=client.dir, libvirt=libvirt))


def _path(client: Client, line: str) -> str:
    """The socket that a line names."""
    return str(_named(client, line, "--socket", "-s"))


def _use(daemon: Daemon, path: str, row: Row, lan: Lan) -> None:
    """The properties of the row, each with a machine; then the end of passt."""
    with contextlib.ExitStack() as machines:
        for relied in row.relies:
            machines.close()  # one at a time; the next one waits for its turn
            kind = VhostClient if "--vhost-user" in row.line else vm.Client
            guest = machines.enter_context(kind.at(path))
            relied(guest, lan)
        if row.end == "disconnect":
            machines.close()
            daemon.expect_end("the machine is gone")
        else:
            status = daemon.end(signal.Signals[row.end])
            assert status in (None, -signal.SIGKILL if row.end == "SIGKILL" else 0)
    assert listeners(lan.host) == set()


def _name(row: Row) -> str:
    return f"{row.client}{', vhost-user' if '--vhost-user' in row.line else ''}"


@pytest.mark.parametrize("row", BACKGROUND + VHOST_USER_BACKGROUND, ids=_name)
def test_background(row: Row, client: Client, libvirt_dir: str, lan: Lan) -> None:
    for relied in row.relies if "--one-off" in row.line or "-1" in row.line else (None,):
        relies = row.relies if relied is None else (relied,)
        daemon = client.start(row.line, libvirt=libvirt_dir)
        if pid_file := _named(client, row.line, "--pid", "-P"):
            assert read_pid(pid_file) == daemon.pid
        if log := _named(client, row.line, "--log-file", "-l"):
            assert stat.S_IMODE(log.stat().st_mode) == 0o600 and log.stat().st_uid == client.user.uid
        if "-q" in row.line.split():
            assert daemon.output == ""
        _use(daemon, _path(client, row.line), Row(row.client, row.line, relies, row.end), lan)


@pytest.mark.parametrize("row", FOREGROUND + VHOST_USER_FOREGROUND, ids=_name)
def test_foreground(row: Row, client: Client, lan: Lan) -> None:
    """These clients wait only for the socket's node, and connect at once. It has mode 0700, and an owner."""
    daemon = client.stay(row.line)
    path = _path(client, row.line)
    wait_for(lambda: not daemon.alive() or os.path.exists(path), "the socket's node")
    status = os.stat(path)
    assert stat.S_ISSOCK(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
    assert status.st_uid == client.user.uid
    wait_for(lambda: listens(client.place, path), "the socket listens")
    end = row.end
    if "--one-off" not in row.line and end == "disconnect":
        end = "SIGTERM"
    _use(daemon, path, Row(row.client, row.line, row.relies, end), lan)


# A socket that is taken over ----------------------------------------------------------------------------------------


def test_libvirt_starts_passt_again(client: Client, libvirt_dir: str, lan: Lan) -> None:
    """When QEMU has lost passt, libvirt executes the same line: socket and PID file of the dead one are there."""
    line = "passt --one-off --socket {libvirt}/1-vm-net0.socket --pid {libvirt}/1-vm-net0-passt.pid -t 2222:22"
    names: dict[str, Any] = {"libvirt": libvirt_dir}
    pid_file = _named(client, line, "--pid")
    assert pid_file is not None
    client.start(line, **names).end(signal.SIGKILL)
    inode = pid_file.stat().st_ino
    second = client.start(line, **names)
    assert read_pid(pid_file) == second.pid and pid_file.stat().st_ino == inode
    said = client.fails(line.replace("2222", "2223"), **names)
    assert said == f"Socket path {libvirt_dir}/1-vm-net0.socket already in use\n"
    with vm.Client.at(_path(client, line)) as guest:
        reaches_peer(guest, lan)
    second.expect_end("the machine is gone")


def test_libvirt_shows_why_it_failed(client: Client, lan: Lan) -> None:
    """It captures standard error through a pipe, and shows it with the status: 1."""
    taken = lan.host.listen("0.0.0.0")
    port = taken.getsockname()[1]
    said = client.fails(f"passt --one-off --socket {{dir}}/s --pid {{dir}}/p --tcp-ports {port}")
    assert f"Failed to bind port {port} (Address already in use) for option '-t {port}'" in said
    assert not (client.dir / "s").exists()


# A descriptor -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def descriptor_three(client: Client, line: str) -> Iterator[tuple[str, socket.socket, int]]:
    """A line that has one of a pair of sockets as its descriptor 3; the other socket; what the child has to inherit."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        yield f"bash -c 'exec \"$@\" 3<&{theirs.fileno()}' bash {line}", ours, theirs.fileno()


QEMU = (
    "passt --quiet --pid {pid} --fd 3",
    "passt --quiet --mtu 1400 --address 10.0.2.15 --netmask 255.255.255.0 --mac-addr 52:54:00:00:00:01 --gateway "
    "10.0.2.2 --interface eth0 --outbound 198.51.100.2 --outbound-if4 eth0 --outbound-if6 eth0 --dns 192.0.2.53 "
    "--fqdn vm.test --map-host-loopback 10.0.2.3 --map-guest-addr 10.0.2.4 --dns-forward 10.0.2.5 "
    "--dns-host 198.51.100.3 --freebind --search 'd1.test d2.test' --tcp-ports 2222:22,8080 --udp-ports 5353:53 "
    "--pid {pid} --fd 3",
    "passt --quiet --no-dhcp-dns --no-dhcp-search --no-udp --no-icmp --no-dhcpv6 --no-ra --ipv4-only --pid {pid} "
    "--fd 3",
    "passt --quiet --address=10.0.2.15 --netmask=24 --gateway=10.0.2.2 --pid {pid} --fd 3",
    "passt --vhost-user --quiet --pid {pid} --fd 3",
)  # fmt: skip


@pytest.mark.parametrize("line", QEMU, ids=["default", "all of its options", "services off", "param=", "vhost-user"])
def test_qemu_netdev_passt(client: Client, lan: Lan, line: str) -> None:
    """It makes the PID file by mkstemp() and reads it afterwards; on EOF it starts the same line with another pair."""
    pid_file = client.dir / "passt-AbCdEf.pid"
    pid_file.touch(mode=0o600)
    os.chown(pid_file, client.user.uid, client.user.gid)
    inode = pid_file.stat().st_ino
    for _ in range(2):
        with descriptor_three(client, line) as (command, machine, theirs):
            daemon = client.start(command, pass_fds=[theirs], pid=pid_file)
            assert daemon.output == ""
            assert read_pid(pid_file) == daemon.pid and pid_file.stat().st_ino == inode
            kind = VhostClient if "--vhost-user" in line else vm.Client
            reaches_peer(kind(machine), lan)
            daemon.end(signal.SIGTERM)  # as QEMU does on EOF, and in the end


def test_qemu_is_gone(client: Client) -> None:
    """No signal comes then: the end of the stream ends passt."""
    with descriptor_three(client, QEMU[0]) as (command, machine, theirs):
        daemon = client.start(command, pass_fds=[theirs], pid=client.dir / "pid")
        machine.shutdown(socket.SHUT_RDWR)
        daemon.expect_end("the stream is at its end")


DESCRIPTORS = (
    ("crun's krun handler", "passt -t all -u all --no-dhcp-dns --no-map-gw --fd 3", False),
    ("crun on Nitro", "passt -t all --no-map-gw --fd 3", False),
    ("muvm", "passt -q -f --fd 3 -t 127.0.0.1/8080-8081:80-81 -u 5353-5353:53-53", True),
    ("libkrun's examples", "passt -f --fd 3", True),
    ("libkrun on Nitro", "passt -t all -f --fd 3", True),
    ("goblin", "passt --foreground --stderr --fd 3 --conf-path {dir}/conf --address 10.0.2.15 --address "
     "fd00:976a::15 --netmask 255.255.255.0 --gateway 10.0.2.2 --gateway fe80::1 --dns none --no-dhcp --no-dhcpv6 "
     "--no-ra", True),
)  # fmt: skip


@pytest.fixture
def high_ports_only(lan: Lan, low_ports: None) -> Iterator[None]:
    """The kernel's default: ports below 1024 are root's."""
    lan.host.write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "1024")
    yield
    lan.host.write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")


@pytest.mark.usefixtures("high_ports_only")
@pytest.mark.parametrize(("line", "stays"), [row[1:] for row in DESCRIPTORS], ids=[row[0] for row in DESCRIPTORS])
def test_descriptor(client: Client, lan: Lan, line: str, stays: bool) -> None:
    """Of users who may not have ports below 1024: `-t all` leaves them out. The end of the stream is that of passt."""
    with descriptor_three(client, line) as (command, machine, theirs):
        daemon = (client.stay if stays else client.start)(command, pass_fds=[theirs])
        guest = vm.Client(machine)
        if "--no-dhcp " in line:
            guest.address, guest.router_mac = "10.0.2.15", guest.arp("10.0.2.2")
            guest.ping(PEER)
        else:
            frames_fit(guest, lan)
        if "-t all" in line:
            assert ("tcp", "*:1024") in listeners(lan.host) and ("tcp", "*:1023") not in listeners(lan.host)
        machine.shutdown(socket.SHUT_RDWR)
        daemon.expect_end("the stream is at its end")
    assert daemon.process is None or daemon.process.returncode == 0


def test_manager_that_reads_what_is_offered(client: Client) -> None:
    """A manager of machines takes the guest's address and router from standard error, from the foreground on."""
    with descriptor_three(client, "passt --fd 3 --foreground -t 2222:22") as (command, _machine, theirs):
        daemon = client.stay(command, pass_fds=[theirs])
        wait_for(lambda: not daemon.alive() or "router:" in daemon.said(), "the lines about DHCP")
        lines = daemon.said().splitlines()
        at = lines.index("DHCP:")
        assert lines[at + 1 : at + 4] == [
            f"    assign: {HOST}",
            "    mask: 255.255.255.0",
            f"    router: {GATEWAY}",
        ]
        assert daemon.end() == 0


# As root ------------------------------------------------------------------------------------------------------------


def test_libguestfs_of_root(root_client: Client, lan: Lan) -> None:
    """passt becomes nobody, and has its PID file and socket in a directory that is root's alone."""
    os.chmod(root_client.dir, 0o700)
    line = next(row.line for row in BACKGROUND if row.client == "libguestfs")
    daemon = root_client.start(line)
    assert os.stat(f"/proc/{daemon.pid}").st_uid == 65534
    assert read_pid(root_client.dir / "passt1.pid") == daemon.pid
    with vm.Client.at(str(root_client.dir / "passt.sock")) as guest:
        reaches_peer(guest, lan)
    daemon.expect_end("the machine is gone")


@pytest.mark.parametrize("runas", ["0:0", "{uid}:{gid}"])
def test_qemus_in_a_container_of_root(root_client: Client, client: Client, lan: Lan, runas: str) -> None:
    """The first try says nothing; when it fails, the second one without -q says why."""
    line = (
        "passt -4 -a 172.30.0.2 -g 172.30.0.1 -n 255.255.255.0 -m 1500 -t 8080 -H qemu -M 52:54:00:aa:bb:cc --runas "
        f"{runas} -P {{dir}}/passt.pid -s {{dir}}/passt.socket -l {{dir}}/passt.log -q"
    )
    names: dict[str, Any] = {"uid": client.user.uid, "gid": client.user.gid}
    with listen(lan.host, HOST, 8080):
        said = root_client.fails(line.removesuffix(" -q"), **names)
        assert "Failed to bind port 8080 (Address already in use)" in said
        assert (root_client.dir / "passt.log").read_text().count("Failed to bind port 8080") == 1
    daemon = root_client.start(line, **names)
    assert os.stat(f"/proc/{daemon.pid}").st_uid == (0 if runas == "0:0" else client.user.uid)
    with vm.Client.at(str(root_client.dir / "passt.socket")) as guest:
        offered("172.30.0.2", hostname=b"qemu")(guest, lan)
    daemon.end()
