"""The host is protected from the guest, and the guest from all hosts without a forwarded port.

The guest writes frames by a packet socket, so it can send frames that no kernel would send. A later frame that arrives
proves that an earlier one did not: one thread handles all frames, in their order.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from tests.unit.tcp_support import Talk, fake_sockets

from ..system.support import DEADLINE, User
from ..system.traffic.conftest import lan, open_dir
from ..system.traffic.support import GATEWAY, GATEWAY6, HOST, HOST6, PEER, Guest, Lan, refused

__all__ = ["fake_sockets", "lan", "open_dir"]

OUR_MAC = "9a:55:9a:55:9a:55"
FORWARDED = 18080
STRANGER = "198.51.100.77"  # an unused address of the link's own network
FENCE, FORBIDDEN = b"fence", b"forbidden"
CLOSED = "-t", "none", "-u", "none", "-T", "none", "-U", "none"


@dataclass
class Writer:
    """A guest that writes frames as it likes."""

    guest: Guest
    sock: socket.socket
    mac: str

    def send(self, packet: Packet) -> None:
        self.sock.send(bytes(Ether(src=self.mac, dst=OUR_MAC) / packet))

    def to(self, dst: str, rest: Packet, src: str = "") -> None:
        """A packet of the guest, from any source address."""
        v6 = ":" in dst
        self.send((IPv6 if v6 else IP)(src=src or (HOST6 if v6 else HOST), dst=dst) / rest)

    def program(self) -> socket.socket:
        """The address that clients of the forwarded port reach."""
        sock = self.guest.make_socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("0.0.0.0", 80))
        sock.listen()
        return sock

    def here(self) -> None:
        """Let it be known at which address the guest is."""
        self.to(GATEWAY, UDP(sport=4999, dport=9))

    def nothing_more(self) -> None:
        """Forget what came so far."""
        self.sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while self.sock.recv(65536):
                pass
        self.sock.settimeout(DEADLINE)

    def answer(self, dport: int) -> Packet:
        """The first TCP segment to `dport` of the guest."""
        while True:
            frame = Ether(self.sock.recv(65536))
            if TCP in frame and frame[TCP].dport == dport and frame.dst == self.mac:
                return frame


@pytest.fixture(scope="module")
def standing(lan: Lan, ordinary_user: User) -> Iterator[Writer]:
    ports = "-t", f"{FORWARDED}:80", "-u", f"{FORWARDED}:80", "-T", "none", "-U", "none"
    with lan.pasta(ordinary_user, "-q", "--config-net", *ports) as guest:
        (link,) = (link for link in guest.show("link") if link["ifname"] != "lo")
        everything = 3  # ETH_P_ALL
        sock = guest.make_socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(everything))
        sock.bind((link["ifname"], everything))
        yield Writer(guest, sock, link["address"])


@pytest.fixture
def writer(standing: Writer) -> Iterator[Writer]:
    yield standing
    assert standing.guest.alive(), standing.guest.said()


@contextlib.contextmanager
def everywhere(lan: Lan, kind: socket.SocketKind) -> Iterator[socket.socket]:
    """A socket of the host that is at all of its addresses, of both families."""
    sock = lan.host.make_socket(socket.AF_INET6, kind)
    with sock:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("::", 0))
        if kind == socket.SOCK_STREAM:
            sock.listen()
        yield sock


# The host ------------------------------------------------------------------------------------------------------------

LOOPBACKS = ["127.0.0.1", "127.9.8.7", "0.0.0.0", "::1", "::", "::ffff:127.0.0.1", "::ffff:0.0.0.0"]


@pytest.mark.parametrize("dst", LOOPBACKS)
def test_the_hosts_loopback_is_reached_by_no_address_of_its_own(lan: Lan, writer: Writer, dst: str) -> None:
    with everywhere(lan, socket.SOCK_DGRAM) as server, everywhere(lan, socket.SOCK_STREAM) as listener:
        port, stream = server.getsockname()[1], listener.getsockname()[1]
        writer.to(dst, UDP(sport=4000, dport=port) / FORBIDDEN)
        writer.to(dst, TCP(sport=4000, dport=stream, flags="S", seq=1))
        writer.to(GATEWAY, UDP(sport=4000, dport=port) / FENCE)
        assert server.recv(100) == FENCE
        with writer.guest.connect(GATEWAY, stream):
            accepted, _ = listener.accept()
            accepted.close()
            listener.setblocking(False)
            with pytest.raises(BlockingIOError):
                listener.accept()


@pytest.mark.parametrize("src", ["127.0.0.1", "::1", "::ffff:127.0.0.1", "0.0.0.0", "224.0.0.1", "255.255.255.255"])
def test_no_packet_is_sent_from_an_invalid_source(lan: Lan, writer: Writer, src: str) -> None:
    with everywhere(lan, socket.SOCK_DGRAM) as server:
        port = server.getsockname()[1]
        writer.to(GATEWAY6 if ":" in src else GATEWAY, UDP(sport=4001, dport=port) / FORBIDDEN, src)
        writer.to(GATEWAY, UDP(sport=4001, dport=port) / FENCE)
        assert server.recv(100) == FENCE


def test_without_its_map_the_gateway_is_not_the_host(lan: Lan, ordinary_user: User) -> None:
    """--no-map-gw: what is sent to the gateway goes to the gateway."""
    with (
        lan.pasta(ordinary_user, "-q", "--config-net", "--no-map-gw", *CLOSED) as guest,
        lan.host.listen("127.0.0.1") as listener,
        lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as server,
    ):
        port = server.getsockname()[1]
        with lan.peer.listen(GATEWAY, socket.SOCK_DGRAM) as gateway:
            where = gateway.getsockname()
            with guest.make_socket(kind=socket.SOCK_DGRAM) as client:
                client.sendto(FORBIDDEN, (GATEWAY, port))
                client.sendto(FENCE, where)
                assert gateway.recv(100) == FENCE
        for sock in listener, server:
            sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.recv(100)
        assert refused(lambda: guest.connect(GATEWAY, listener.getsockname()[1]))
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize("src", [STRANGER, PEER, "203.0.113.9"])
def test_the_host_and_its_network_see_the_hosts_address_for_any_source_of_the_guest(
    lan: Lan, writer: Writer, src: str
) -> None:
    with lan.peer.listen(PEER, socket.SOCK_DGRAM) as server, lan.peer.listen(PEER) as listener:
        writer.to(PEER, UDP(sport=4002, dport=server.getsockname()[1]) / FENCE, src)
        assert server.recvfrom(100)[1][0] == HOST
        writer.to(PEER, TCP(sport=4002, dport=listener.getsockname()[1], flags="S", seq=1), src)
        accepted, peer = listener.accept()
        accepted.close()
        assert peer[0] == HOST
    with lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as server:
        writer.to(GATEWAY, UDP(sport=4003, dport=server.getsockname()[1]) / FENCE, src)
        assert server.recvfrom(100)[1][0] == "127.0.0.1"


def test_no_packet_reaches_what_controls_us(lan: Lan, ordinary_user: User, open_dir: str) -> None:
    """Control sockets are UNIX sockets with a path: with no ports forwarded, there is nothing to send a packet to."""
    path = f"{open_dir}/control"
    with lan.pasta(ordinary_user, "-q", "--config-net", *CLOSED, "-c", path) as guest:
        assert os.path.exists(path)
        inodes = {os.readlink(f"/proc/{guest.daemon}/fd/{fd}") for fd in os.listdir(f"/proc/{guest.daemon}/fd")}
        for namespace in lan.host, guest:
            for line in namespace.run("ss", "-Htuwna", "-e").stdout.splitlines():
                inode = next(word[4:] for word in line.split() if word.startswith("ino:"))
                assert f"socket:[{inode}]" not in inodes, line


# The guest -----------------------------------------------------------------------------------------------------------


def test_only_forwarded_ports_are_open(lan: Lan, writer: Writer) -> None:
    with writer.guest.listen("0.0.0.0") as other:
        assert refused(lambda: lan.peer.connect(HOST, other.getsockname()[1]))
        assert refused(lambda: lan.peer.connect(HOST, 80))
        assert refused(lambda: lan.host.connect("127.0.0.1", other.getsockname()[1]))
    writer.here()
    with writer.program() as server, lan.peer.connect(HOST, FORWARDED):
        accepted, _ = server.accept()
        accepted.close()


def test_clients_are_led_to_the_address_that_the_guest_used_last(lan: Lan, writer: Writer) -> None:
    """A guest that lies about its address loses its clients, and gains nothing: it leads them to itself in any case."""
    program = writer.program()
    for said, src in ((STRANGER, STRANGER), (HOST, "")):
        with lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as server:
            writer.to(GATEWAY, UDP(sport=4004, dport=server.getsockname()[1]) / FENCE, src)
            assert server.recv(100) == FENCE
        writer.nothing_more()
        with lan.peer.connect(HOST, FORWARDED) as client:
            port = client.getsockname()[1]
            while (segment := writer.answer(80))[TCP].sport != port:
                pass  # SYN of the client before is repeated: it got no answer
            assert segment[IP].dst == said
    program.close()


def test_udp_answers_come_only_from_the_peer_of_the_flow(lan: Lan, writer: Writer) -> None:
    with (
        lan.peer.listen(PEER, socket.SOCK_DGRAM) as server,
        lan.peer.listen(PEER, socket.SOCK_DGRAM) as other_port,
        lan.peer.make_socket(kind=socket.SOCK_DGRAM) as other_address,
        writer.guest.make_socket(kind=socket.SOCK_DGRAM) as client,
    ):
        other_address.bind((GATEWAY, server.getsockname()[1]))
        client.sendto(b"question", server.getsockname())
        _, where = server.recvfrom(100)
        for stranger in other_port, other_address:
            stranger.sendto(FORBIDDEN, where)
        server.sendto(FENCE, where)
        assert client.recvfrom(100) == (FENCE, server.getsockname())


def test_icmp_errors_act_on_the_flow_that_they_are_about(lan: Lan, writer: Writer) -> None:
    raw = lan.peer.make_socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
    with raw, lan.peer.listen(PEER, socket.SOCK_DGRAM) as server:
        port = server.getsockname()[1]
        with writer.guest.connect(PEER, port, socket.SOCK_DGRAM) as client:
            client.send(b"question")
            _, (_, sport) = server.recvfrom(100)

            def unreachable(src: str, sport: int, dport: int) -> None:
                quoted = IP(src=src, dst=PEER) / UDP(sport=sport, dport=dport) / b"question"
                raw.sendto(bytes(ICMP(type=3, code=3) / quoted), (HOST, 0))

            wrong = [(HOST, sport ^ 1, port), (HOST, sport, port ^ 1), (STRANGER, sport, port)]
            for claim in wrong:
                unreachable(*claim)
            server.sendto(FENCE, (HOST, sport))
            assert client.recv(100) == FENCE
            unreachable(HOST, sport, port)
            with pytest.raises(ConnectionRefusedError):
                client.recv(100)


def test_icmp_errors_of_the_guest_act_on_nothing(lan: Lan, writer: Writer) -> None:
    with lan.host.listen("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        with writer.guest.connect(GATEWAY, port) as near:
            far, _ = listener.accept()
            sport = near.getsockname()[1]
            quoted = IP(src=GATEWAY, dst=HOST) / TCP(sport=port, dport=sport)
            for code in 1, 2, 3, 4, 13:
                writer.to(GATEWAY, ICMP(type=3, code=code) / Raw(bytes(quoted)))
            near.sendall(FENCE)
            far.settimeout(30)
            assert far.recv(100) == FENCE
            far.sendall(FENCE)
            assert near.recv(100) == FENCE
            far.close()


def test_sequence_numbers_do_not_follow_from_each_other(lan: Lan, writer: Writer) -> None:
    """As the guest sees them: from one to the next of 64 connections, no step is like another."""
    numbers = []
    with lan.host.listen("127.0.0.1") as listener:
        for sport in range(5000, 5064):
            writer.to(GATEWAY, TCP(sport=sport, dport=listener.getsockname()[1], flags="S", seq=1))
            numbers.append(writer.answer(sport)[TCP].seq)
            writer.to(GATEWAY, TCP(sport=sport, dport=listener.getsockname()[1], flags="R", seq=2))
    steps = {(b - a) % 2**32 >> 20 for a, b in pairwise(numbers)}
    assert len(set(numbers)) == 64 and len(steps) > 55


def test_sequence_numbers_are_those_of_rfc_6528(monkeypatch: pytest.MonkeyPatch) -> None:
    """M + F(endpoints, secret): a clock of 4 us, and a keyed hash with a secret of 128 bits, new at each start."""
    secret = bytes(range(16))
    monkeypatch.setattr(os, "urandom", lambda n: secret[:n])
    opening = Talk().tcp.opening
    key = Talk().key
    h = hashlib.blake2s(key, key=secret, digest_size=4)
    assert opening.isn(key, 0.0) == int(h.hexdigest(), 16)
    assert opening.isn(key, 100.0) == (opening.isn(key, 0.0) + 25_000_000) & 0xFFFFFFFF
    flipped = {opening.isn(key[:i] + bytes((key[i] ^ 1,)) + key[i + 1 :], 0.0) for i in range(len(key))}
    assert len(flipped | {opening.isn(key, 0.0)}) == len(key) + 1, "all of both endpoints counts"
    assert len(opening._secret) == 16
