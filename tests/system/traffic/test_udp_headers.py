"""Fields of IP headers beside the addresses: don't fragment, traffic class."""

from __future__ import annotations

import errno
import socket
import struct
import time
from collections.abc import Iterator

import pytest

from ..support import DEADLINE, User, wait_for
from .support import GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Guest, Lan, new_lan, root_user

IP_MTU_DISCOVER, IP_MTU, IP_RECVTOS = 10, 14, 13
LAST_OPTIONS4, LAST_OPTIONS6 = (socket.IPPROTO_IP, 9), (socket.IPPROTO_IPV6, 6)  # IP_PKTOPTIONS, IPV6_2292PKTOPTIONS
IPV6_MTU_DISCOVER, IPV6_MTU = 23, 24
DISCOVER = {
    socket.AF_INET: ((socket.IPPROTO_IP, IP_MTU_DISCOVER), (socket.IPPROTO_IP, IP_MTU)),
    socket.AF_INET6: ((socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER), (socket.IPPROTO_IPV6, IPV6_MTU)),
}
DONT, DO = 0, 2  # IP_PMTUDISC_DONT, IP_PMTUDISC_DO
NARROW = 1400
EF, ECT1, CE = 0xB8, 0x01, 0x03


@pytest.fixture
def narrow_lan() -> Iterator[Lan]:
    """A host of its own, whose link and routes may change."""
    with new_lan(root_user()) as made:
        yield made


def narrow_link(lan: Lan) -> None:
    lan.host.run("ip", "link", "set", "eth0", "mtu", str(NARROW))


def narrow_route(lan: Lan) -> None:
    lan.host.run("ip", "route", "add", f"{PEER}/32", "dev", "eth0", "mtu", str(NARROW))
    lan.host.run("ip", "-6", "route", "add", f"{PEER6}/128", "dev", "eth0", "mtu", str(NARROW))


@pytest.mark.parametrize("mtu", [1500, 65520])
@pytest.mark.parametrize("peer", [PEER, PEER6])
@pytest.mark.parametrize("narrow", [narrow_link, narrow_route])
def test_path_mtu_discovery_finds_a_narrow_place_on_the_host(
    narrow_lan: Lan, ordinary_user: User, narrow: object, peer: str, mtu: int
) -> None:
    with narrow_lan.pasta(ordinary_user, "-q", "--config-net", "-m", str(mtu)) as guest:
        narrow(narrow_lan)  # type: ignore[operator]
        server = narrow_lan.peer.listen(peer, socket.SOCK_DGRAM)
        client = guest.connect(peer, server.getsockname()[1], socket.SOCK_DGRAM)
        discover, path_mtu = DISCOVER[client.family]
        client.setsockopt(*discover, DO)
        assert client.send(bytes(1450 - 48)) == 1450 - 48  # does not fit either
        deadline = time.monotonic() + DEADLINE
        while client.getsockopt(*path_mtu) != NARROW:
            assert time.monotonic() < deadline, "the guest was not told"
            time.sleep(0.01)
        with pytest.raises(OSError, match="too long"):
            client.send(bytes(1450 - 48))
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) in (0, errno.EMSGSIZE)
        fits = b"f" * (NARROW - (28 if client.family == socket.AF_INET else 48))
        client.send(fits)
        assert server.recv(2000) == fits


@pytest.mark.parametrize("peer", [PEER, PEER6])
@pytest.mark.parametrize(("size", "mtu"), [(1450, 1280), (4000, 65520), (60000, 65520)])
def test_what_may_be_fragmented_arrives(narrow_lan: Lan, ordinary_user: User, peer: str, size: int, mtu: int) -> None:
    """By the guest, or, beyond what other links take, by the host."""
    with narrow_lan.pasta(ordinary_user, "-q", "--config-net", "-m", str(mtu)) as guest:
        narrow_link(narrow_lan)
        server = narrow_lan.peer.listen(peer, socket.SOCK_DGRAM)
        client = guest.connect(peer, server.getsockname()[1], socket.SOCK_DGRAM)
        discover, _ = DISCOVER[client.family]
        client.setsockopt(*discover, DONT)
        client.send(bytes(size))
        assert len(server.recv(1 << 16)) == size


@pytest.fixture(scope="module")
def narrow(ordinary_user: User) -> Iterator[tuple[Lan, Guest]]:
    """A host with a narrow link, and its guest."""
    with new_lan(root_user()) as lan, lan.pasta(ordinary_user, "-q", "--config-net", "-m", "1500") as guest:
        narrow_link(lan)
        yield lan, guest


@pytest.mark.parametrize(("peer", "size"), [(PEER, NARROW - 28), (PEER6, NARROW - 48)])
def test_ping_finds_a_narrow_place_on_the_host(narrow: tuple[Lan, Guest], peer: str, size: int) -> None:
    """ping(8) is told the MTU once, and its kernel knows it afterwards. Without DF the host makes fragments."""
    _, guest = narrow
    ping = "ping", "-n", "-c", "1", "-W", "1", peer, "-M"
    assert "1 received" in guest.run(*ping, "do", "-s", str(size)).stdout
    told = guest.run(*ping, "do", "-s", str(size + 1), check=False).stdout
    assert f"mtu = {NARROW}" in told or f"mtu={NARROW}" in told, told
    known = guest.run(*ping, "do", "-s", str(size + 1), check=False)
    assert f"mtu: {NARROW}" in known.stdout + known.stderr.replace("=", ": "), "the local error of the guest's kernel"
    if peer == PEER:
        assert "1 received" in guest.run(*ping, "dont", "-s", str(size + 1)).stdout


# Traffic class -------------------------------------------------------------------------------------------------------


def ask_for_class(sock: socket.socket) -> socket.socket:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, 1)
    return sock


def set_class(sock: socket.socket, tos: int) -> None:
    if sock.family == socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
    else:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, tos)


def receive(sock: socket.socket) -> tuple[bytes, int, tuple[str, int]]:
    data, control, _, sender = sock.recvmsg(2048, 256)
    ((_, _, value),) = control
    return data, struct.unpack("=i", value)[0] if len(value) == 4 else value[0], sender


WAYS = {"peer4": (PEER, PEER), "peer6": (PEER6, PEER6), "host4": ("127.0.0.1", GATEWAY), "host6": ("::1", GATEWAY6)}


@pytest.mark.parametrize("way", WAYS)
def test_traffic_class_both_ways(guest: Guest, lan: Lan, way: str) -> None:
    bind, address = WAYS[way]
    server = ask_for_class((lan.peer if way.startswith("peer") else lan.host).listen(bind, socket.SOCK_DGRAM))
    client = ask_for_class(guest.connect(address, server.getsockname()[1], socket.SOCK_DGRAM))
    for there, back in ((0, 0), (EF, ECT1), (ECT1, CE), (0, EF), (EF, 0)):
        set_class(client, there)
        client.send(b"question")
        data, tos, sender = receive(server)
        assert (data, tos) == (b"question", there)
        set_class(server, back)
        for _ in range(8):  # one alone, and several at a time, are received in different ways
            server.sendto(b"answer", sender)
        assert {receive(client)[:2] for _ in range(8)} == {(b"answer", back)}


@pytest.mark.parametrize("address", [HOST, HOST6])
def test_traffic_class_of_clients_of_a_port_that_only_root_may_bind(lan: Lan, root: User, address: str) -> None:
    """Their datagrams keep coming by the listener, which answers as well."""
    with lan.pasta(root, "-q", "--config-net", "-u", "500") as guest:
        server = guest.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        server.bind(("::" if ":" in address else "0.0.0.0", 500))
        ask_for_class(server)
        client = ask_for_class(lan.peer.connect(address, 500, socket.SOCK_DGRAM))
        for there, back in ((EF, CE), (ECT1, 0), (0, EF)):
            set_class(client, there)
            client.send(b"question")
            data, tos, sender = receive(server)
            assert (data, tos) == (b"question", there)
            set_class(server, back)
            server.sendto(b"answer", sender)
            assert receive(client)[:2] == (b"answer", back)


@pytest.mark.parametrize(("where", "address"), [("peer", "198.51.100.2"), ("peer", "2001:db8:1::2"),
                                                ("host", "127.0.0.1"), ("host", "::1")])  # fmt: skip
def test_traffic_class_of_clients_of_the_host(lan: Lan, ordinary_user: User, where: str, address: str) -> None:
    """Those of other hosts come by the tap, those of the host's loopback without it."""
    with lan.host.listen("::", socket.SOCK_DGRAM) as unused:
        port = unused.getsockname()[1]
    with lan.pasta(ordinary_user, "-q", "--config-net", "-u", str(port)) as guest:
        server = ask_for_class(
            guest.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        )
        server.bind(("::" if ":" in address else "0.0.0.0", port))
        client = ask_for_class((lan.peer if where == "peer" else lan.host).connect(address, port, socket.SOCK_DGRAM))
        for there, back in ((EF, CE), (ECT1, 0), (0, EF)):
            set_class(client, there)
            client.send(b"question")
            data, tos, sender = receive(server)
            assert (data, tos) == (b"question", there)
            set_class(server, back)
            server.sendto(b"answer", sender)
            assert receive(client)[:2] == (b"answer", back)


@pytest.mark.parametrize("way", WAYS)
def test_traffic_class_of_a_ping_and_its_reply(guest: Guest, way: str) -> None:
    """Linux answers with the class of the request."""
    v6 = way.endswith("6")
    family, protocol = (socket.AF_INET6, socket.IPPROTO_ICMPV6) if v6 else (socket.AF_INET, socket.IPPROTO_ICMP)
    client = ask_for_class(guest.make_socket(family, socket.SOCK_DGRAM, protocol))
    client.connect((WAYS[way][1], 0))
    for sequence, tos in enumerate((EF, 0, EF | ECT1)):
        set_class(client, tos)
        client.send(bytes((128 if v6 else 8, 0, 0, 0, 0, 0, 0, sequence)))
        reply, told, _ = receive(client)
        assert (reply[0], reply[7], told) == (129 if v6 else 0, sequence, tos)


@pytest.mark.parametrize("peer", [PEER, PEER6])
def test_traffic_class_of_a_datagram_in_fragments(narrow: tuple[Lan, Guest], peer: str) -> None:
    lan, guest = narrow
    server = ask_for_class(lan.peer.listen(peer, socket.SOCK_DGRAM))
    client = guest.connect(peer, server.getsockname()[1], socket.SOCK_DGRAM)
    set_class(client, EF)
    client.send(bytes(4000))
    data, control, _, _ = server.recvmsg(8000, 256)
    ((_, _, value),) = control
    assert (len(data), value[0]) == (4000, EF)


@pytest.mark.parametrize("way", WAYS)
def test_traffic_class_of_tcp(guest: Guest, lan: Lan, way: str) -> None:
    bind, address = WAYS[way]
    server = ask_for_class((lan.peer if way.startswith("peer") else lan.host).listen(bind))
    client = guest.make_socket(server.family)
    set_class(client, EF)
    client.connect((address, server.getsockname()[1]))
    with server.accept()[0] as accepted:
        client.send(b"x")
        assert accepted.recv(1) == b"x"
        v6 = server.family == socket.AF_INET6
        options = accepted.getsockopt(*(LAST_OPTIONS6 if v6 else LAST_OPTIONS4), 64)
        _, level, kind = struct.unpack_from("@Nii", options)
        expected = (socket.IPPROTO_IPV6, socket.IPV6_TCLASS) if v6 else (socket.IPPROTO_IP, socket.IP_TOS)
        assert (level, kind) == expected and EF in options[socket.CMSG_LEN(0) :][:4]


@pytest.mark.parametrize(("any_address", "address"), [("0.0.0.0", HOST), ("::", HOST6)])
def test_traffic_class_of_a_tcp_server_in_the_guest(guest: Guest, lan: Lan, any_address: str, address: str) -> None:
    """It may change in the middle of a connection. A raw socket of the peer sees the segments with data."""
    server = guest.listen(any_address)
    port = server.getsockname()[1]
    wait_for(lambda: f":{port} " in lan.host.run("ss", "-Hltn").stdout, "the port is forwarded")
    raw = ask_for_class(lan.peer.make_socket(server.family, socket.SOCK_RAW, socket.IPPROTO_TCP))
    client = lan.peer.connect(address, port)
    with server.accept()[0] as accepted:
        for tos in (EF, 0x28, 0):
            set_class(accepted, tos)
            accepted.send(b"unlike others")
            assert client.recv(64) == b"unlike others"
            while not (packet := receive(raw))[0].endswith(b"unlike others"):
                pass
            assert packet[1] == tos
