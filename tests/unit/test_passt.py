"""The socket of a virtual machine: its place in the file system, who is the guest, and what is left of one."""

from __future__ import annotations

import errno
import os
import re
import select
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

from passt import addr, log, passt
from passt.daemon import wiring
from passt.flow import spare
from passt.link import choose, stream_socket
from passt.log import Fatal
from passt.passt import Clients
from passt.ports.sockets import NO_SOCKETS
from tests.unit.support import CONFIG, GATEWAY4, GUEST4, GUEST_MAC, OUR_MAC, no_descriptors

# The socket in the file system -------------------------------------------------------------------------------------


def test_a_socket_for_its_owner_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    sock, where = passt.listen(path)
    assert where == path
    mode = os.stat(path).st_mode
    assert stat.S_ISSOCK(mode) and stat.S_IMODE(mode) == 0o700
    sock.close()


def test_the_mask_is_as_before(tmp_path: Path) -> None:
    before = os.umask(0o022)
    passt.listen(str(tmp_path / "socket"))[0].close()
    assert os.umask(before) == 0o022


def test_a_stale_socket_is_taken_over(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    passt.listen(path)[0].close()
    assert os.path.exists(path)
    sock, _ = passt.listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
    sock.close()


def test_a_live_socket_is_not(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    sock, _ = passt.listen(path)
    with pytest.raises(Fatal, match=f"^Socket path {path} already in use$"):
        passt.listen(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)  # it is as it was
    sock.close()


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, lambda p: p.symlink_to("/dev/null")])
def test_what_is_no_socket_stays(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "there"
    make(path)
    before = os.lstat(path)
    with pytest.raises(Fatal, match="which is not a socket"):
        passt.listen(str(path))
    assert os.lstat(path) == before


def test_impossible_paths(tmp_path: Path) -> None:
    with pytest.raises(Fatal, match="No such file or directory"):
        passt.listen(str(tmp_path / "no" / "socket"))
    with pytest.raises(Fatal, match=r"Invalid socket path: .*107"):
        passt.listen("/tmp/" + "x" * 103)


def test_the_first_default_path_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passt, "DEFAULT_PATH", str(tmp_path / "passt_{}.socket"))
    monkeypatch.setattr(passt, "DEFAULT_MAX", 3)
    (tmp_path / "passt_2.socket").touch()
    first, path1 = passt.listen(None)
    second, path3 = passt.listen(None)
    assert [os.path.basename(p) for p in (path1, path3)] == ["passt_1.socket", "passt_3.socket"]
    with pytest.raises(Fatal, match="give one with --socket"):
        passt.listen(None)
    first.close()
    second.close()


def test_folder_of_the_default_paths_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "none" / "passt_1.socket"
    monkeypatch.setattr(passt, "DEFAULT_PATH", str(tmp_path / "none" / "passt_{}.socket"))
    text = f"Couldn't bind UNIX socket {path}: No such file or directory (give another path with --socket)"
    with pytest.raises(Fatal, match=f"^{re.escape(text)}$"):
        passt.listen(None)


def test_inherited_descriptors() -> None:
    near, far = socket.socketpair()
    sock = passt.inherited(near.detach())
    far.send(b"hello")
    assert sock.recv(10) == b"hello"
    with pytest.raises(BlockingIOError):
        sock.recv(10)
    sock.close()
    far.close()


def test_descriptors_that_are_no_guest(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file, pytest.raises(Fatal, match=r"Invalid --fd: \d+"):
        passt.inherited(file.fileno())
    listener, _ = passt.listen(str(tmp_path / "socket"))
    with pytest.raises(Fatal, match="not a connected stream socket"):
        passt.inherited(os.dup(listener.fileno()))
    listener.close()
    datagrams, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with pytest.raises(Fatal, match="not a connected stream socket"):
        passt.inherited(os.dup(datagrams.fileno()))
    datagrams.close()
    other.close()


# The guest ---------------------------------------------------------------------------------------------------------


class Decision:
    """The part of the decision that `wire` reads: its configuration."""

    config = CONFIG


class Machine:
    """Everything around a socket in the file system, and clients that come to it."""

    def __init__(self, path: Path, one_off: bool = False) -> None:
        self.path = str(path)
        decision = cast(Any, Decision)
        self.ctx, _, tap = wiring.wire(decision, choose.for_machine(), addr.BROADCAST_MAC, None, NO_SOCKETS, NO_SOCKETS)
        assert tap is not None
        self.listener, _ = passt.listen(self.path)
        self.ended = 0
        self.clients = Clients(self.ctx, tap, self.listener, self._end if one_off else None)
        self.open: list[socket.socket] = []

    def _end(self) -> None:
        self.ended += 1

    def turn(self, turns: int = 1) -> None:
        for _ in range(turns):
            self.ctx.reactor.turn(0.2)

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(5)
        client.connect(self.path)
        self.open.append(client)
        self.turn()
        return client

    def close(self) -> None:
        for sock in (*self.open, self.listener):
            sock.close()
        self.clients.gone("The test is over")
        self.turn()
        for flow in self.ctx.flows.by_index:
            assert flow is None
        self.ctx.reactor.close()


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lines.append)
    return lines


@pytest.fixture
def machine(tmp_path: Path, said: list[str]) -> Iterator[Machine]:
    made = Machine(tmp_path / "socket")
    yield made
    made.close()


def send(client: socket.socket, packet: Packet) -> None:
    frame = bytes(Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC)) / packet)
    client.sendall(len(frame).to_bytes(4, "big") + frame)


def receive(client: socket.socket, what: type[Packet]) -> Packet:
    """The next frame that has `what` in it: router advertisements come unasked."""
    while True:
        length = int.from_bytes(client.recv(4, socket.MSG_WAITALL), "big")
        frame = Ether(client.recv(length, socket.MSG_WAITALL))
        if what in frame:
            return frame


def waiting(client: socket.socket) -> bytes:
    """Frames that were sent already."""
    return client.recv(1 << 20) if select.select([client], [], [], 0)[0] else b""


ARP_REQUEST = ARP(psrc=addr.text(GUEST4), pdst=addr.text(GATEWAY4), hwsrc=addr.mac_text(GUEST_MAC))
STRAY = IP(src=addr.text(GUEST4), dst="192.0.2.77", proto=99)  # it has no answer, which would fail at such a guest
TO_HOST = IP(src=addr.text(GUEST4), dst=addr.text(GATEWAY4))


def test_a_guest_is_answered(machine: Machine, said: list[str]) -> None:
    client = machine.connect()
    send(client, ARP_REQUEST)
    machine.turn()
    assert receive(client, ARP)[ARP].hwsrc == addr.mac_text(OUR_MAC)
    assert machine.ctx.guest.mac == GUEST_MAC
    assert said == [f"Accepted connection from PID {os.getpid()}"]


def test_frames_have_whole_checksums(machine: Machine) -> None:
    client = machine.connect()
    with socket.create_server(("127.0.0.1", 0)) as server:
        send(client, TO_HOST / TCP(sport=40000, dport=server.getsockname()[1], flags="S"))
        machine.turn()
        answer = receive(client, TCP)
    assert answer[TCP].flags == "SA"
    sums = answer[IP].chksum, answer[TCP].chksum
    del answer[IP].chksum, answer[TCP].chksum
    again = Ether(bytes(answer))
    assert sums == (again[IP].chksum, again[TCP].chksum)


def test_a_second_client_is_closed_and_harms_nobody(machine: Machine) -> None:
    first, second = machine.connect(), machine.connect()
    assert second.recv(1) == b""
    send(first, ARP_REQUEST)
    machine.turn()
    assert receive(first, ARP)


def test_a_client_that_comes_right_after_the_guest_has_gone_is_served(machine: Machine, said: list[str]) -> None:
    """Although passt has not yet read what the guest left behind."""
    first = machine.connect()
    send(first, ARP_REQUEST)
    first.close()
    other = machine.connect()
    send(other, ARP_REQUEST)
    machine.turn()
    assert receive(other, ARP)
    assert [line.split()[0] for line in said] == ["Accepted", "The", "Accepted"]


@pytest.mark.parametrize("goes_on", [False, True], ids=["silent", "sending"])
def test_a_guest_that_takes_no_frames_makes_room(
    machine: Machine, said: list[str], monkeypatch: pytest.MonkeyPatch, goes_on: bool
) -> None:
    """It did shutdown(SHUT_RD), and may go on sending for ever: what it sent is read in bounds, and the next served."""
    first = machine.connect()
    first.shutdown(socket.SHUT_RD)
    reads, read = [], machine.ctx.link.read

    def counted(now: float) -> None:
        reads.append(now)
        assert len(reads) < 1000, "it is read for ever"
        read(now)
        if goes_on:
            send(first, STRAY)

    monkeypatch.setattr(machine.ctx.link, "read", counted)
    if goes_on:
        send(first, STRAY)
    other = machine.connect()
    monkeypatch.setattr(machine.ctx.link, "read", read)
    send(other, ARP_REQUEST)
    machine.turn()
    assert receive(other, ARP)
    assert len(reads) <= passt.READS_MAX


def test_nothing_is_left_of_a_guest(machine: Machine, said: list[str]) -> None:
    """Its TCP peers are reset, its flows gone, its MAC address forgotten; the next one is served."""
    client = machine.connect()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(type=socket.SOCK_DGRAM) as udp:
        udp.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        elsewhere = IP(src="192.0.2.77", dst=addr.text(GATEWAY4))
        send(client, elsewhere / TCP(sport=40000, dport=port, flags="S", seq=5))
        machine.turn()
        answer = receive(client, TCP)[TCP]
        send(client, elsewhere / TCP(sport=40000, dport=port, flags="A", seq=6, ack=answer.seq + 1))
        send(client, elsewhere / UDP(sport=40000, dport=udp.getsockname()[1]) / b"x")
        machine.turn()
        accepted, _ = server.accept()
        assert machine.ctx.flows.count == 2
        assert machine.ctx.guest.addr4 == addr.packed("192.0.2.77")
        waiting(client)  # our addresses may have been announced: a socket with unread data resets
        client.close()
        machine.turn()
        accepted.settimeout(5)
        with accepted, pytest.raises(ConnectionResetError):
            accepted.recv(1)
    assert machine.ctx.flows.count == 0
    guest = machine.ctx.guest
    assert (guest.mac, guest.macs) == (addr.BROADCAST_MAC, {})
    assert guest.addr4 == addr.packed("192.0.2.77"), "it may come back"
    assert said[-1] == "The guest closed the connection, waiting for another"
    other = machine.connect()
    send(other, ARP_REQUEST)
    machine.turn()
    assert receive(other, ARP)


def test_a_lie_closes_the_client_and_the_next_may_come(machine: Machine, said: list[str]) -> None:
    client = machine.connect()
    client.sendall((1 << 31).to_bytes(4, "big") + b"garbage")
    machine.turn()
    with suppress(ConnectionResetError):  # what it had not read yet
        assert client.recv(1) == b""
    with pytest.raises(BrokenPipeError):
        client.send(b"x")
    assert [line for line in said if "2147483648" in line] == [
        "The guest sent a frame length of 2147483648 (up to 69632 are possible), waiting for another"
    ]
    other = machine.connect()
    send(other, ARP_REQUEST)
    machine.turn()
    assert receive(other, ARP)


def test_who_comes_and_goes_all_the_time_does_not_fill_the_log(
    machine: Machine, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[str] = []
    monkeypatch.setattr(log, "info_ratelimited", lambda key, text, now: held.append(text))
    monkeypatch.setattr(passt, "LINES_PER_SECOND", 0)
    for _ in range(passt.LINES):
        client = machine.connect()
        client.close()
        machine.turn()
    assert len(said) == passt.LINES and len(held) == passt.LINES


def test_one_off(tmp_path: Path, said: list[str]) -> None:
    machine = Machine(tmp_path / "socket", one_off=True)
    machine.connect().close()
    machine.turn()
    assert machine.ended == 1
    assert said[-1] == "The guest closed the connection, exiting"
    machine.close()


def test_a_guest_that_cannot_be_sent_to_is_gone(machine: Machine, said: list[str]) -> None:
    """It was there when the turn began."""
    client = machine.connect()
    send(client, ARP_REQUEST)
    client.shutdown(socket.SHUT_RD)
    machine.turn()
    assert said[-1] == "The guest's connection failed: Broken pipe, waiting for another"
    machine.connect()
    assert said[-1].startswith("Accepted")


def test_a_guest_that_does_not_read_stops_tcp_and_loses_nothing(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data waits in the host's socket for the guest's socket to have room, and comes in order then."""
    monkeypatch.setattr(stream_socket, "SEND_BUFFER", 4096)
    client = machine.connect()
    data = bytes(range(256)) * 400
    syn = TCP(sport=40000, flags="S", seq=5, options=[("MSS", 1460), ("WScale", 8)])
    with socket.create_server(("127.0.0.1", 0)) as server:
        syn.dport = server.getsockname()[1]
        send(client, TO_HOST / syn)
        machine.turn()
        isn = receive(client, TCP)[TCP].seq
        send(client, TO_HOST / TCP(sport=40000, dport=syn.dport, flags="A", seq=6, ack=isn + 1, window=65535))
        machine.turn()
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(data[:50_000])
            machine.turn()
            assert machine.ctx.link.full
            accepted.sendall(data[50_000:])
            machine.turn()
            raw = stream = b""
            while len(stream) < len(data):
                machine.turn()
                raw += waiting(client)  # nothing, if the turn was one of a timer
                while len(raw) >= 4 and len(raw) >= (end := 4 + int.from_bytes(raw[:4], "big")):
                    frame, raw = Ether(raw[4:end]), raw[end:]
                    if TCP in frame:
                        begin = frame[TCP].seq - isn - 1
                        assert begin <= len(stream), "a hole"
                        stream += bytes(frame[TCP].payload)[len(stream) - begin :]  # the guest acknowledges nothing
    assert stream == data
    assert not machine.ctx.drops


def test_accept_that_fails_is_no_end(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: warnings.append(text))

    def refuse(fd: int) -> tuple[int, bytes, int]:
        raise OSError(errno.EMFILE, "Too many open files")

    reactor = machine.ctx.reactor
    with monkeypatch.context() as m:
        m.setattr(passt, "accept", refuse)
        m.setattr(spare, "accept", refuse)
        client = machine.connect()
        assert warnings == ["Couldn't accept a guest: Too many open files"]
        before = reactor.events
        reactor.turn(0)
        assert reactor.events == before, "the listener rests"
        deadline = time.monotonic() + 5
        while len(warnings) < 2 and time.monotonic() < deadline:
            machine.turn()
    assert len(warnings) == 2, "it does not rest for ever"
    send(client, ARP_REQUEST)
    machine.turn(3)
    assert receive(client, ARP)


def test_a_client_without_a_descriptor_is_closed_at_once(machine: Machine, said: list[str]) -> None:
    """Unless the guest has gone: what it had is the next one's."""
    guest = machine.connect()
    with socket.socket(socket.AF_UNIX) as client, socket.socket(socket.AF_UNIX) as other, no_descriptors():
        client.settimeout(5)
        client.connect(machine.path)
        machine.turn()
        assert client.recv(1) == b""
        guest.shutdown(socket.SHUT_RDWR)  # and its descriptor at our end stays
        other.connect(machine.path)
        machine.turn(2)
        send(other, ARP_REQUEST)
        machine.turn()
        assert receive(other, ARP)
    assert machine.ctx.drops == {"guest: no descriptor": 1}


def test_a_client_that_has_gone_again_is_no_failure(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, now: pytest.fail(text))
    machine.clients._accept(0, 1, 0.0)


def test_the_mtu_follows_what_a_driver_can_take(machine: Machine) -> None:
    configured = machine.ctx.config.mtu
    machine.clients._limit_mtu(1500)
    assert machine.ctx.config.mtu == 1500
    machine.clients._limit_mtu(65535)  # another driver
    assert machine.ctx.config.mtu == configured
