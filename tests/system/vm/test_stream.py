"""The stream protocol without QEMU: in single bytes and large writes, by successive clients, with invalid lengths."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
from collections.abc import Iterator

import pytest
from scapy.layers.dhcp import BOOTP
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether

from bench.lab import resident_kib

from ..support import User
from ..traffic.support import GATEWAY, HOST, PEER, Lan, in_thread
from .client import ACK, GUEST_MAC, GULP, LENGTH, PSH, Client, Connection, dict_of, framed
from .support import ACCEPTED, GONE, Passt, Standing

OTHER_MAC = "02:00:00:00:00:02"
STRANGE_ADDRESS = "198.51.100.99"  # of a guest that has configured itself otherwise than it was told
FORWARDED = 18080
LIES = "(?i)frame (size|length)"  # in the message on a length that lies


@contextlib.contextmanager
def attached(server: Passt, mac: str = GUEST_MAC) -> Iterator[Client]:
    """A client that is served, right after the last one went, whatever that left unread."""
    with Client.at(str(server.path), mac) as client:
        client.arp(GATEWAY)
        yield client


@pytest.fixture(scope="module")
def standing(lan: Lan, ordinary_user: User) -> Iterator[Standing]:
    """passt for all tests of this module: each of them is another client."""
    made = Standing(lan, ordinary_user, "-t", f"{FORWARDED}:80")
    yield made
    made.close()


@pytest.fixture
def server(standing: Standing) -> Iterator[Passt]:
    """The module's passt, which must have outlived the test."""
    made = standing.passt()
    yield made
    assert made.alive(), made.said()


@pytest.fixture
def client(server: Passt) -> Iterator[Client]:
    """A client that has configured itself."""
    with attached(server) as made:
        yield made.configure()


@pytest.fixture
def echo(lan: Lan) -> Iterator[socket.socket]:
    """A listener on the host's loopback."""
    with lan.host.listen("127.0.0.1") as listener:
        yield listener


def exactly(sock: socket.socket, size: int) -> bytes:
    """The next `size` bytes of a stream."""
    data = b""
    while len(data) < size and (piece := sock.recv(size - len(data))):
        data += piece
    return data


def opened(client: Client, listener: socket.socket, **options: int) -> tuple[Connection, socket.socket]:
    """A connection of the client's, and the server's end of it."""
    connection = client.connect(GATEWAY, listener.getsockname()[1], **options)
    far, _ = listener.accept()
    far.settimeout(10)
    return connection, far


# Pieces -------------------------------------------------------------------------------------------------------------


def test_lease(client: Client) -> None:
    assert client.address == HOST
    assert client.options["router"] == GATEWAY
    assert client.options["subnet_mask"] == "255.255.255.0"
    assert client.options["name_server"] == PEER
    assert client.options["interface-mtu"] == 65520


@pytest.mark.parametrize("piece", [1, 3, 47])
def test_frames_in_pieces(server: Passt, piece: int, echo: socket.socket) -> None:
    """Lengths and frames may be cut anywhere, and a piece may have the end of one frame and the begin of the next."""
    with attached(server) as client:
        client.send_bytes(framed([client.dhcp("discover"), client.who_has(GATEWAY)]), piece)
        assert client.expect(lambda p: p[BOOTP].yiaddr if BOOTP in p else None) == HOST
        client.router_mac = client.expect(lambda p: p[ARP].hwsrc if ARP in p else None)
        client.address = HOST
        connection, far = opened(client, echo)
        with far:
            data = random.Random(piece).randbytes(3000)
            segments = [connection.segment(ACK | PSH, data[:1000])]
            connection.sent += 1000
            segments.append(connection.segment(ACK | PSH, data[1000:]))
            connection.sent += 2000
            client.send_bytes(framed(segments), piece)
            assert exactly(far, 3000) == data


def test_gulp(client: Client, echo: socket.socket) -> None:
    """Four megabytes of small frames at once, all of which have an answer, while no answer is read at first."""
    request = framed([client.who_has(GATEWAY)])
    count = GULP // len(request)
    with in_thread(client.send_bytes, request * count, GULP):
        answers = 0
        while answers < count and (frame := client.frame(2.0)):
            assert frame[28:32] == socket.inet_aton(GATEWAY)  # the sender in ARP; scapy would take seconds
            answers += 1
    assert answers
    connection, far = opened(client, echo)
    with far:
        connection.send(b"x" * 5000)
        assert exactly(far, 5000) == b"x" * 5000


def test_largest_frames(client: Client, lan: Lan) -> None:
    """Of 65535 bytes: with as large a datagram as fits, and with trailing bytes that do not belong to it."""
    with lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as sock:
        port = sock.getsockname()[1]
        for size in (65493, 60000):
            data = random.Random(size).randbytes(size)
            frame = bytes(client.udp(GATEWAY, port, data))
            client.send(frame + bytes(65535 - len(frame)))
            assert sock.recv(65535) == data


def test_reader_that_stalls(client: Client, echo: socket.socket) -> None:
    """Frames that the client's socket does not take stay whole and in order until it reads on."""
    connection, far = opened(client, echo, window_scale=8)
    data = random.Random(2).randbytes(2 << 20)
    with far, in_thread(far.sendall, data):
        time.sleep(0.3)  # for passt to fill the socket
        assert connection.receive(len(data)) == data
    client.ping(PEER)


def test_both_ends_close(client: Client, echo: socket.socket) -> None:
    connection, far = opened(client, echo)
    with far:
        far.sendall(b"hello")
        assert connection.receive(5) == b"hello"
        connection.send(b"world")
        assert exactly(far, 5) == b"world"
        far.shutdown(socket.SHUT_WR)
        connection.end()
        assert far.recv(1) == b""


def test_inbound_connection(client: Client, lan: Lan) -> None:
    with lan.peer.make_socket() as sock, in_thread(sock.connect, (HOST, FORWARDED)):
        connection = client.accept(80)
        sock.sendall(b"ping")
        assert connection.receive(4) == b"ping"
        connection.send(b"pong")
        assert exactly(sock, 4) == b"pong"


def test_datagrams(client: Client, lan: Lan) -> None:
    with lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as sock:
        port = sock.getsockname()[1]
        client.send(*(client.udp(GATEWAY, port, b"%d" % i) for i in range(20)))
        received = [sock.recvfrom(100) for _ in range(20)]
        assert [data for data, _ in received] == [b"%d" % i for i in range(20)]
        sock.sendto(b"back", received[0][1])
        answer = client.expect(lambda p: p if UDP in p and p[UDP].dport == 40000 else None)
        assert bytes(answer[UDP].payload) == b"back"
        assert (answer[IP].src, answer[IP].dst) == (GATEWAY, HOST)


def test_checksums_of_what_comes(client: Client, echo: socket.socket) -> None:
    """As a guest without offloads checks them: IPv4 and TCP always, UDP unless it is zero."""
    connection, far = opened(client, echo)
    with far:
        far.sendall(random.Random(3).randbytes(20001))
        seen = 0
        while seen < 20001:
            packet = client.expect(lambda p: p if TCP in p and bytes(p[TCP].payload) else None)
            sums = packet[IP].chksum, packet[TCP].chksum
            seen += len(bytes(packet[TCP].payload))
            del packet[IP].chksum, packet[TCP].chksum
            made = Ether(bytes(packet))
            assert (made[IP].chksum, made[TCP].chksum) == sums
            connection.received = (made[TCP].seq + len(bytes(made[TCP].payload))) % 2**32
            connection.send_segment(ACK)


# DHCP clients that are less patient, or have less room, than others ---------------------------------------------------


def test_rapid_commit(server: Passt) -> None:
    """A client that asks for it has its lease after one message (RFC 4039)."""
    with attached(server) as client:
        client.send(client.dhcp("discover", (80, b"")))
        answer = client.expect(lambda p: p if BOOTP in p else None)
        assert dict_of(answer)["message-type"] == 5
        assert {80, "rapid_commit"} & set(dict_of(answer))


def test_dhcp_reply_fits_small_clients(server: Passt) -> None:
    """One that does not say how much it takes gets 576 bytes at most (RFC 2131, section 2)."""
    with attached(server) as client:
        client.send(client.dhcp("discover"))
        assert client.expect(lambda p: p[IP].len if BOOTP in p else None) <= 576


# One client after another -------------------------------------------------------------------------------------------


def test_second_client_is_turned_away(server: Passt, client: Client) -> None:
    for _ in range(3):
        with Client.at(str(server.path), OTHER_MAC) as second:
            assert second.at_end()
        client.ping(PEER)


def test_old_guest_is_forgotten(server: Passt, lan: Lan) -> None:
    """Neither the MAC address nor the IP address of the last guest are used towards the next one."""
    with attached(server) as old:
        old.configure()
        old.address = STRANGE_ADDRESS
        old.ping(PEER)
        gone = server.count(GONE)
    server.expect(GONE, gone + 1)
    accepted = server.count(ACCEPTED)
    with Client.at(str(server.path), OTHER_MAC) as new, lan.peer.make_socket() as sock:
        server.expect(ACCEPTED, accepted + 1)
        new.configure()
        sock.setblocking(False)
        sock.connect_ex((HOST, FORWARDED))
        syn = new.expect(lambda p: p if TCP in p else None)
        assert (syn.dst, syn[IP].dst) == (OTHER_MAC, HOST)


def test_connections_end_with_the_guest(server: Passt, echo: socket.socket) -> None:
    """A guest that goes takes its connections with it: the next one knows nothing of them."""
    with attached(server) as first:
        _, far = opened(first.configure(), echo)
    with far, pytest.raises(ConnectionResetError):
        far.recv(1)


# Lies ---------------------------------------------------------------------------------------------------------------


def refused(server: Passt, data: bytes) -> None:
    """A client that sends `data` is disconnected, with one message, and the next one is served."""
    before = server.count(LIES)
    with attached(server) as client:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it need not read everything
            client.send_bytes(data, len(data))
        assert client.at_end()
    with attached(server) as client:
        client.configure().ping(PEER)
    assert server.count(LIES) == before + 1, server.said()


@pytest.mark.parametrize("length", [0, 1, 13, 65536, 2**31, 2**32 - 1])
def test_length_that_lies(server: Passt, length: int) -> None:
    refused(server, LENGTH.pack(length))


@pytest.mark.parametrize("length", [0, 13, 65536, 2**32 - 1])
def test_length_that_lies_after_a_frame(server: Passt, length: int) -> None:
    """In the same write, with another frame behind it."""
    with attached(server) as client:
        ask = framed([client.who_has(PEER)])
    refused(server, ask + LENGTH.pack(length) + ask)


def test_garbage(server: Passt) -> None:
    refused(server, b"\xff" + os.urandom(1 << 20))


def test_shortest_frame(client: Client) -> None:
    """A header alone is a frame, which means nothing."""
    for kind in (b"\x08\x00", b"\x08\x06", b"\x86\xdd", b"\x12\x34"):
        client.send(b"\xff" * 6 + b"\x02\0\0\0\0\1" + kind)
    client.ping(PEER)


def test_half_a_header_and_silence(server: Passt) -> None:
    """Nothing comes of it but that the seat is taken, and the rest of the frame may come any time later."""
    with attached(server) as client:
        wire = framed([client.who_has(PEER)])
        client.send_bytes(wire[:2])
        assert client.frame(0.5) is None
        with Client.at(str(server.path), OTHER_MAC) as second:
            assert second.at_end()
        client.send_bytes(wire[2:])
        assert client.expect(lambda p: p[ARP].psrc if ARP in p else None) == PEER


@pytest.mark.parametrize("cut", [1, 4, 5, 30])
def test_death_in_the_middle_of_a_frame(server: Passt, cut: int) -> None:
    """The begin of a frame is not taken for that of the next client's."""
    with attached(server) as client:
        client.send_bytes(framed([client.who_has(PEER)])[:cut])
    with attached(server) as client:
        client.configure().ping(PEER)


def test_client_that_goes_while_it_is_sent_to(server: Passt, echo: socket.socket) -> None:
    with attached(server) as client:
        _, far = opened(client.configure(), echo, window_scale=8)
        far.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                far.send(bytes(1 << 16))
    with far, attached(server) as client:
        client.configure().ping(PEER)


# A guest that does not behave ---------------------------------------------------------------------------------------


def mac(n: int) -> str:
    return f"02:01:00:00:{n >> 8:02x}:{n & 0xFF:02x}"


def unharmed(server: Passt, client: Client, before: int) -> None:
    """Other services go on, and no memory is kept for what was asked."""
    client.configure().ping(PEER)
    assert resident_kib(server.daemon) - before < 16384


def test_discover_from_a_thousand_addresses(server: Passt, client: Client) -> None:
    """All clients are offered the same address, for any number of them."""
    before = resident_kib(server.daemon)
    flood = framed(client.dhcp("discover", xid=n, mac=mac(n)) for n in range(1000))
    offers = set()
    with in_thread(client.send_bytes, flood, GULP):
        while frame := client.frame(0.5):
            if BOOTP in (packet := Ether(frame)):
                offers.add(packet[BOOTP].yiaddr)
    assert offers == {HOST}
    unharmed(server, client, before)


def test_arp_for_everything(server: Passt, client: Client) -> None:
    """Our MAC address answers for every address except the guest's."""
    before = resident_kib(server.daemon)
    client.send(*(client.who_has(f"198.51.100.{n}") for n in range(1, 255)))
    answered = set()
    while frame := client.frame(0.5):
        if ARP in (packet := Ether(frame)):
            answered.add(packet[ARP].psrc)
    assert answered == {f"198.51.100.{n}" for n in range(1, 255)} - {HOST}
    unharmed(server, client, before)


def test_frames_from_our_own_address(server: Passt, client: Client) -> None:
    """A guest that claims our MAC address harms itself only."""
    before = resident_kib(server.daemon)
    ours, theirs = client.router_mac, client.mac
    client.mac = ours
    client.send(client.who_has(PEER), client.dhcp("discover"), client.ip(PEER) / ICMP() / b"x")
    client.mac = theirs
    unharmed(server, client, before)


def test_spoofed_sources(server: Passt, client: Client, lan: Lan) -> None:
    """From anywhere, a thousand sources: the connection that is there goes on."""
    before = resident_kib(server.daemon)
    with lan.host.listen("127.0.0.1") as listener:
        connection, far = opened(client, listener)
        with far:
            for n in range(1000):
                source = f"10.{n >> 8}.{n & 0xFF}.9"
                head = Ether(src=client.mac, dst=client.router_mac) / IP(src=source, dst=PEER)
                client.send(head / UDP(sport=9, dport=9) / b"x", head / TCP(sport=9, dport=9, flags="A"))
            connection.send(b"still there")
            assert exactly(far, 11) == b"still there"
    unharmed(server, client, before)
