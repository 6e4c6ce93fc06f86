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
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ND_RA,
    ICMPv6NDOptDstLLAddr,
    ICMPv6PacketTooBig,
    IPv6,
)
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet

from bench.lab import resident_kib

from ..support import User
from ..traffic.support import GATEWAY, HOST, HOST6, PEER, PEER6, Lan, in_thread
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
    made = Standing(lan, ordinary_user, "-t", f"{FORWARDED}:80", "-u", f"{FORWARDED}:80")
    yield made
    made.close()


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
        client.router_mac = client.expect(lambda p: p[ARP].hwsrc if ARP in p and p[ARP].op == 2 else None)
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
            if frame[12:14] == b"\x08\x06" and frame[21] == 2:  # a reply; scapy would take seconds
                assert frame[28:32] == socket.inet_aton(GATEWAY)
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


@pytest.mark.parametrize("goes_on", [False, True], ids=["silent", "sending"])
def test_guest_that_takes_no_frames_makes_room(server: Passt, goes_on: bool) -> None:
    """After shutdown(SHUT_RD), which no machine does, a client that sends for ever does not keep passt from others."""
    with socket.socket(socket.AF_UNIX) as deaf, contextlib.ExitStack() as stack:
        deaf.connect(str(server.path))
        server.expect(ACCEPTED)
        deaf.shutdown(socket.SHUT_RD)
        if goes_on:
            deaf.settimeout(5)
            stack.enter_context(in_thread(send_for_ever, deaf))
        with attached(server) as other:
            other.configure().ping(PEER)


def send_for_ever(sock: socket.socket) -> None:
    """Frames without an answer, until passt has closed the connection."""
    frame = framed([Ether(src=OTHER_MAC, type=0x88B5) / bytes(60)])
    with contextlib.suppress(OSError):
        while True:
            sock.sendall(frame * 100)


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


# A guest that has not spoken ----------------------------------------------------------------------------------------


def answer_solicitation(guest: Client, address: str) -> None:
    """Answer an ARP request for `address`, and say nothing else."""
    asked = guest.expect(lambda p: p if ARP in p and p[ARP].op == 1 and p[ARP].pdst == address else None)
    reply = ARP(op=2, hwsrc=guest.mac, psrc=address, hwdst=asked.src, pdst=asked[ARP].psrc)
    guest.send(Ether(src=guest.mac, dst=asked.src) / reply)
    guest.address, guest.router_mac = address, asked.src


def test_connection_to_a_guest_that_is_silent(server: Passt, lan: Lan) -> None:
    """It was there before passt was, and has nothing to say: it is asked where it is, and gets SYN."""
    with Client.at(str(server.path)) as guest, lan.peer.make_socket() as sock:
        with in_thread(sock.connect, (HOST, FORWARDED)):
            answer_solicitation(guest, HOST)
            connection = guest.accept(80)
        sock.sendall(b"ping")
        assert connection.receive(4) == b"ping"


def test_connection_before_the_guest_comes(server: Passt, lan: Lan) -> None:
    """As after a restart of passt: QEMU connects again a second later."""
    with attached(server) as old:
        old.send(old.who_has(PEER))
        gone = server.count(GONE)
    server.expect(GONE, gone + 1)
    with lan.peer.make_socket() as sock, in_thread(sock.connect, (HOST, FORWARDED)):
        time.sleep(0.3)  # the connection is there first
        with Client.at(str(server.path), OTHER_MAC) as guest:
            answer_solicitation(guest, HOST)
            connection = guest.accept(80)
            sock.sendall(b"ping")
            assert connection.receive(4) == b"ping"


def test_datagrams_to_a_guest_that_is_silent(server: Passt, lan: Lan) -> None:
    with Client.at(str(server.path)) as guest, lan.peer.make_socket(kind=socket.SOCK_DGRAM) as sock:
        sock.connect((HOST, FORWARDED))
        for data in (b"one", b"two"):
            sock.send(data)
        answer_solicitation(guest, HOST)
        for data in (b"one", b"two"):
            assert guest.expect(lambda p: bytes(p[UDP].payload) if UDP in p else None) == data


def test_a_silent_guest_by_ipv6(server: Passt, lan: Lan) -> None:
    """A neighbour solicitation, and then what has waited, in its order."""
    with (
        Client.at(str(server.path)) as guest,
        lan.peer.make_socket(socket.AF_INET6) as stream,
        lan.peer.make_socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
    ):
        stream.connect((HOST6, FORWARDED))  # the kernel accepts it
        sock.connect((HOST6, FORWARDED))
        sock.send(b"one")
        asked = guest.expect(lambda p: p if ICMPv6ND_NS in p and p[ICMPv6ND_NS].tgt == HOST6 else None)
        assert asked[IPv6].hlim == 255
        answer = ICMPv6ND_NA(tgt=HOST6, R=0, S=1, O=1) / ICMPv6NDOptDstLLAddr(lladdr=guest.mac)
        guest.send(Ether(src=guest.mac, dst=asked.src) / IPv6(src=HOST6, dst=asked[IPv6].src, hlim=255) / answer)
        syn = guest.expect(lambda p: p if TCP in p else None)
        assert (syn.dst, syn[IPv6].dst, syn[TCP].dport, str(syn[TCP].flags)) == (guest.mac, HOST6, 80, "S")
        assert guest.expect(lambda p: bytes(p[UDP].payload) if UDP in p and p[UDP].dport == 80 else None) == b"one"


def test_our_addresses_are_announced(server: Passt) -> None:
    """By ARP and neighbour discovery, to a machine that need not have noticed that it is connected again."""
    with Client.at(str(server.path)) as guest:
        packets = [guest.expect(lambda p: p) for _ in range(6)]
        assert any(ARP in p and p[ARP].psrc == p[ARP].pdst == GATEWAY for p in packets)
        assert any(ICMPv6ND_NA in p and p[ICMPv6ND_NA].O == 1 for p in packets)
        assert any(ICMPv6ND_RA in p for p in packets)


def test_static_address_of_a_guest_that_comes_back(server: Passt, lan: Lan) -> None:
    """The same machine, with the address that it has chosen, before it says anything but where that is."""
    with attached(server) as old:
        old.configure()
        old.address = STRANGE_ADDRESS
        old.ping(PEER)
        gone = server.count(GONE)
    server.expect(GONE, gone + 1)
    with (
        Client.at(str(server.path)) as guest,
        lan.peer.make_socket() as sock,
        in_thread(sock.connect, (HOST, FORWARDED)),
    ):
        answer_solicitation(guest, STRANGE_ADDRESS)
        guest.accept(80)
    with attached(server) as last:
        last.configure().ping(PEER)


# Frames of unusual shape --------------------------------------------------------------------------------------------


def test_short_frames_are_padded(client: Client) -> None:
    client.send(client.who_has(PEER))
    frames = iter(client.frame, None)
    reply = next(f for f in frames if f[12:14] == b"\x08\x06" and f[21] == 2)
    assert len(reply) == 60 and not any(reply[42:])


def test_priority_tags(client: Client, lan: Lan) -> None:
    """A frame of VLAN 0 has an answer, without a tag; a frame of another VLAN is not for us."""
    ask = client.ip(PEER) / ICMP(id=5, seq=9) / b"ping"
    for tag, answered in ((Dot1Q(prio=5, vlan=0), True), (Dot1Q(vlan=7), False), (Dot1AD(vlan=0), True)):
        ask = client.ip(PEER) / ICMP(id=5, seq=9) / b"ping"
        client.send(Ether(src=client.mac, dst=client.router_mac) / tag / ask.payload)
        if answered:
            reply = client.expect(lambda p: p if ICMP in p and p[ICMP].type == 0 else None)
            assert Dot1Q not in reply and Dot1AD not in reply
    client.ping(PEER, seq=10)


def test_two_machines_behind_one_socket(client: Client, lan: Lan) -> None:
    """Each has its answers, whatever the other sends meanwhile, and connections reach the one with the address."""
    other = Client(client.sock, OTHER_MAC)
    other.address, other.router_mac = STRANGE_ADDRESS, client.router_mac
    for round_ in range(3):
        pings = [who.ip(PEER) / ICMP(id=who is other, seq=round_) / b"ping" for who in (client, other)]
        client.send(*pings, *pings)
        seen: dict[str, int] = {}
        while sum(seen.values()) < 4:
            reply = client.expect(lambda p: p if ICMP in p and p[ICMP].type == 0 else None)
            assert reply.dst == {client.address: client.mac, STRANGE_ADDRESS: OTHER_MAC}[reply[IP].dst]
            seen[reply.dst] = seen.get(reply.dst, 0) + 1
        assert seen == {client.mac: 2, OTHER_MAC: 2}
    client.send(client.who_has(STRANGE_ADDRESS), client.who_has(PEER))
    reply = client.expect(lambda p: p[ARP] if ARP in p and p[ARP].op == 2 else None)
    assert reply.psrc == PEER, "the other machine is asked itself"


@contextlib.contextmanager
def narrow_link(lan: Lan) -> Iterator[int]:
    """The MTU of the host's link meanwhile."""
    lan.host.run("ip", "link", "set", "eth0", "mtu", "1400")
    yield 1400
    lan.host.run("ip", "link", "set", "eth0", "mtu", "1500")


def test_packets_that_may_not_be_fragmented(client: Client, lan: Lan) -> None:
    """Datagrams and pings of the machine, and its answers to a client of the host, which goes on without DF."""

    def told(inner: Packet) -> int:
        client.send(Ether(src=client.mac, dst=client.router_mac) / inner / bytes(1420))
        mtu: int = client.expect(
            lambda p: p[ICMP].nexthopmtu if ICMP in p and p[ICMP].type == 3
            else p[ICMPv6PacketTooBig].mtu if ICMPv6PacketTooBig in p else None
        )  # fmt: skip
        return mtu

    with narrow_link(lan) as mtu, lan.peer.connect(HOST, FORWARDED, socket.SOCK_DGRAM) as peer:
        for inner in UDP(sport=5, dport=6), ICMP(id=7):
            assert told(IP(src=client.address, dst=PEER, flags="DF") / inner) == mtu
        assert told(IPv6(src=HOST6, dst=PEER6) / ICMPv6EchoRequest(id=7)) == mtu
        peer.send(b"question")
        asked = client.expect(lambda p: p if UDP in p and p[UDP].dport == 80 else None)
        answer = UDP(sport=80, dport=asked[UDP].sport)
        assert told(IP(src=client.address, dst=asked[IP].src, flags="DF") / answer) == mtu
        client.send(Ether(src=client.mac, dst=client.router_mac) / IP(src=client.address, dst=asked[IP].src) / answer
                    / bytes(1420))  # fmt: skip
        assert peer.recv(2000) == bytes(1420)


def test_damaged_packets_are_dropped(client: Client, lan: Lan, echo: socket.socket) -> None:
    """One byte of each kind of packet is another: what comes through is what was sent."""
    connection, far = opened(client, echo)
    with far, lan.host.listen("127.0.0.1", socket.SOCK_DGRAM) as sock:
        good = bytes(connection.segment(ACK | PSH, b"good" * 100))
        for at in range(14 + 12, len(good), 37):
            client.send(good[:at] + bytes((good[at] ^ 0x40,)) + good[at + 1 :])
        datagram = bytes(client.udp(GATEWAY, sock.getsockname()[1], b"good" * 100))
        for at in range(14 + 12, len(datagram), 37):
            client.send(datagram[:at] + bytes((datagram[at] ^ 0x40,)) + datagram[at + 1 :])
        client.send(good, datagram)
        assert exactly(far, 400) == b"good" * 100
        assert sock.recv(1000) == b"good" * 100
        connection.sent += 400
        connection.send(b"end")
        assert exactly(far, 3) == b"end"


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


@pytest.mark.parametrize("length", [69633, 2**31, 2**32 - 1])
def test_length_that_lies(server: Passt, length: int) -> None:
    refused(server, LENGTH.pack(length))


@pytest.mark.parametrize("length", [69633, 2**32 - 1])
def test_length_that_lies_after_a_frame(server: Passt, length: int) -> None:
    """In the same write, with another frame behind it."""
    with attached(server) as client:
        ask = framed([client.who_has(PEER)])
    refused(server, ask + LENGTH.pack(length) + ask)


@pytest.mark.parametrize("length", [0, 1, 13, 65536, 69632])
def test_length_of_no_frame(client: Client, length: int) -> None:
    """Such a frame is skipped, and the connection goes on: QEMU's buffers are larger than a packet may be."""
    ask = framed([client.who_has(PEER)])
    client.send_bytes(LENGTH.pack(length) + bytes(length) + ask, 1 << 20)
    assert client.expect(lambda p: p[ARP].psrc if ARP in p and p[ARP].op == 2 else None) == PEER
    client.ping(PEER)


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
        while client.frame(0.2):
            pass  # announcements
        client.send_bytes(wire[:2])
        assert client.frame(0.5) is None
        with Client.at(str(server.path), OTHER_MAC) as second:
            assert second.at_end()
        client.send_bytes(wire[2:])
        assert client.expect(lambda p: p[ARP].psrc if ARP in p and p[ARP].op == 2 else None) == PEER


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
