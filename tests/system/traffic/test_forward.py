"""Forwarded ports: from the host's loopback and from another host to servers in the guest, and -T/-U the other way.

One guest has every form of specification at once. The test holds both ends of each conversation; real programs follow
below. "loopback" is a client on the host that goes to 127.0.0.1 or ::1, which is spliced; "tap" is the peer, which goes
to the host's address.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from bench.content import CHUNK, content, digest

from ..support import User, wait_for
from .servers import bytes_server, dns_server, running
from .support import HOST, HOST6, PEER, PEER6, Guest, Lan, Namespace, in_thread, read_all

GIB = 1 << 30
FORMS = [
    "7001",
    "7010-7013",
    "7020:8020,7030-7032:8030-8032",
    f"{HOST}/7040:8040",
    f"{HOST6}/7040:8040",
    "127.0.0.1/7041",
    "[::1]/7041",
    "%eth0/7050",
    "%lo/7051:8051",
]
OPTIONS = [word for form in FORMS for option in ("-t", "-u") for word in (option, form)]
# form -> path -> (port to connect to, port that it leads to)
PORTS = {
    "plain": {"tap": (7001, 7001), "loopback": (7001, 7001)},
    "range": {"tap": (7012, 7012), "loopback": (7012, 7012)},
    "remapped": {"tap": (7020, 8020), "loopback": (7031, 8031)},
    "address-bound": {"tap": (7040, 8040), "loopback": (7041, 7041)},
    "interface-bound": {"tap": (7050, 7050), "loopback": (7051, 8051)},
}
FAMILIES = {"v4": (socket.AF_INET, HOST, "127.0.0.1", PEER), "v6": (socket.AF_INET6, HOST6, "::1", PEER6)}


@pytest.fixture(scope="module")
def forwarding_guest(lan: Lan, someone: User) -> Iterator[Guest]:
    """A guest that all forms of FORMS lead to."""
    with lan.pasta(someone, "-q", "--config-net", *OPTIONS, "-T", "none", "-U", "none") as made:
        yield made


@pytest.fixture
def served(forwarding_guest: Guest, lan: Lan) -> Iterator[Guest]:
    """That guest; sockets of the test end with it."""
    yield from lan.lend(forwarding_guest)


def server_in(guest: Namespace, family: int, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A server of one family on every address of the guest."""
    sock = guest.make_socket(family, kind)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("::" if family == socket.AF_INET6 else "0.0.0.0", port))
    if kind == socket.SOCK_STREAM:
        sock.listen(64)
    return sock


def client_of(lan: Lan, path: str) -> Namespace:
    return lan.host if path == "loopback" else lan.peer


def client_to(lan: Lan, family: str, path: str, port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A client of a forwarded port: on the host's loopback, or the peer by its second address, which no router has."""
    number, host, loopback, peer = FAMILIES[family]
    client = client_of(lan, path).make_socket(number, kind)
    if path == "tap":
        client.bind((peer, 0))
    client.connect((loopback if path == "loopback" else host, port))
    return client


@pytest.mark.parametrize("form", PORTS)
@pytest.mark.parametrize("path", ["tap", "loopback"])
@pytest.mark.parametrize("family", FAMILIES)
def test_tcp(served: Guest, lan: Lan, family: str, path: str, form: str) -> None:
    number, _, _, peer = FAMILIES[family]
    port, to = PORTS[form][path]
    server = server_in(served, number, to)
    client = client_to(lan, family, path, port)
    accepted, seen = server.accept()
    accepted.settimeout(30)
    with accepted:
        if path == "tap":
            assert seen[:2] == (peer, client.getsockname()[1]), "the server sees who the client is"
        client.sendall(b"question")
        assert accepted.recv(100) == b"question"
        accepted.sendall(b"answer" * 50_000)
        accepted.shutdown(socket.SHUT_WR)
        assert read_all(client) == b"answer" * 50_000
        client.sendall(b"still open")
        client.shutdown(socket.SHUT_WR)
        assert read_all(accepted) == b"still open"


@pytest.mark.parametrize("form", PORTS)
@pytest.mark.parametrize("path", ["tap", "loopback"])
@pytest.mark.parametrize("family", FAMILIES)
def test_udp(served: Guest, lan: Lan, family: str, path: str, form: str) -> None:
    number, _, _, peer = FAMILIES[family]
    port, to = PORTS[form][path]
    server = server_in(served, number, to, socket.SOCK_DGRAM)
    client = client_to(lan, family, path, port, socket.SOCK_DGRAM)
    for content_ in (b"one", b"", b"x" * 1400, b"y" * 9000):
        client.send(content_)
        received, seen = server.recvfrom(1 << 16)
        assert received == content_
        if path == "tap":
            assert seen[:2] == (peer, client.getsockname()[1]), "the server sees who the client is"
        server.sendto(received[::-1] + b"!", seen)
        assert client.recv(1 << 16) == content_[::-1] + b"!"  # from the address and port that it was sent to


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("outer", "inner"), [((7040, 8040), (7041, 7041)), ((7050, 7050), (7051, 8051))])
def test_a_bound_port_is_open_there_only(
    served: Guest, lan: Lan, family: str, outer: tuple[int, int], inner: tuple[int, int]
) -> None:
    """By an address, and by an interface: (port, where it leads) of the host's network and of its loopback."""
    number, host, loopback, _ = FAMILIES[family]
    server_in(served, number, outer[1])
    server_in(served, number, inner[1])
    with pytest.raises(ConnectionRefusedError):
        lan.host.connect(loopback, outer[0])
    with pytest.raises(ConnectionRefusedError):
        lan.peer.connect(host, inner[0])


@pytest.mark.parametrize(("asks", "listens"), [("::1", "v4"), ("127.0.0.1", "v6")])
def test_localhost_whatever_family_the_server_listens_on(served: Guest, lan: Lan, asks: str, listens: str) -> None:
    server = server_in(served, FAMILIES[listens][0], 7001)
    client = lan.host.connect(asks, 7001)
    accepted, _ = server.accept()
    with accepted:
        client.sendall(b"hello")
        assert accepted.recv(10) == b"hello"


@pytest.mark.parametrize("path", ["tap", "loopback"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_port_without_a_listener(served: Guest, lan: Lan, family: str, path: str) -> None:
    _, host, loopback, _ = FAMILIES[family]
    with pytest.raises(ConnectionResetError):  # which may come before the client's connect() has returned
        client_of(lan, path).connect(loopback if path == "loopback" else host, 7010).recv(1)


@pytest.mark.parametrize("path", ["tap", "loopback"])
def test_resets_go_through(served: Guest, lan: Lan, path: str) -> None:
    server = server_in(served, socket.AF_INET, 7001)
    client = client_of(lan, path).connect("127.0.0.1" if path == "loopback" else HOST, 7001)
    accepted, _ = server.accept()
    accepted.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    accepted.close()
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_a_client_that_speaks_at_once(served: Guest, lan: Lan) -> None:
    """Data sent before the guest's answer, and the end of the stream, arrive."""
    server = server_in(served, socket.AF_INET, 7001)
    for path in ("tap", "loopback"):
        client = client_of(lan, path).connect("127.0.0.1" if path == "loopback" else HOST, 7001)
        client.sendall(b"GET / HTTP/1.0\r\n\r\n")
        client.shutdown(socket.SHUT_WR)
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(30)
            assert read_all(accepted) == b"GET / HTTP/1.0\r\n\r\n"


def test_two_clients_with_the_same_port(served: Guest, lan: Lan) -> None:
    """Told apart by their addresses, in both protocols, all the way."""
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        server = server_in(served, socket.AF_INET, 7001, kind)
        clients: list[socket.socket] = []
        for where, own in ((lan.peer, PEER), (lan.host, HOST)):
            client = where.make_socket(socket.AF_INET, kind)
            client.bind((own, clients[0].getsockname()[1] if clients else 0))
            client.connect((HOST, 7001))
            clients.append(client)
        for i, client in enumerate(clients):
            client.send(b"%d" % i)
        for _ in clients:
            if kind == socket.SOCK_STREAM:
                accepted, _ = server.accept()
                with accepted:
                    accepted.send(accepted.recv(1) * 2)
            else:
                data, seen = server.recvfrom(10)
                server.sendto(data * 2, seen)
        assert [client.recv(10) for client in clients] == [b"00", b"11"]
        for sock in (server, *clients):
            sock.close()


def test_a_gigabyte_through_a_pausing_reader(served: Guest, lan: Lan) -> None:
    server = server_in(served, socket.AF_INET, 7001)
    client = lan.host.connect("127.0.0.1", 7001)
    accepted, _ = server.accept()

    def write() -> None:
        for chunk in content(GIB):
            client.sendall(chunk)
        client.shutdown(socket.SHUT_WR)

    sha, size = hashlib.sha256(), 0
    buf = bytearray(CHUNK)
    with accepted, in_thread(write):
        accepted.settimeout(30)
        pauses = iter(range(1, 9))
        pause_at = 1 << 20
        while n := accepted.recv_into(buf):
            sha.update(memoryview(buf)[:n])
            size += n
            if size >= pause_at:
                time.sleep(0.05 * next(pauses, 0))  # long enough for everything on the way to fill up
                pause_at *= 3
    assert size == GIB
    assert sha.hexdigest() == digest(GIB)


@pytest.mark.parametrize("path", ["tap", "loopback"])
def test_udp_bursts_keep_order_and_borders(served: Guest, lan: Lan, path: str) -> None:
    server = server_in(served, socket.AF_INET, 7001, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    where = client_of(lan, path)
    client = where.connect("127.0.0.1" if path == "loopback" else HOST, 7001, socket.SOCK_DGRAM)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    sizes = [1400] * 20 + [700, 0, 1400, 1400, 1] + [512] * 20
    sent = [i.to_bytes(2, "big") + bytes(max(size - 2, 0)) if size else b"" for i, size in enumerate(sizes)]
    client.send(b"open")
    _, seen = server.recvfrom(10)
    for datagram in sent:
        client.send(datagram)
    assert [server.recv(2000) for _ in sent] == sent
    for datagram in sent:
        server.sendto(datagram, seen)
    assert [client.recv(2000) for _ in sent] == sent


# The other way: -T and -U ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outward_guest(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest whose loopback has ports of the host's."""
    ports = "9001,9010-9012,9020:9120"
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", "none", "-u", "none", "-T", ports, "-U", ports) as made:
        yield made


@pytest.mark.parametrize(("port", "to"), [(9001, 9001), (9011, 9011), (9020, 9120)])
@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_from_the_namespace_to_the_host(
    outward_guest: Guest, lan: Lan, kind: int, loopback: str, port: int, to: int
) -> None:
    family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
    with lan.host.make_socket(family, kind) as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind((loopback, to))
        if kind == socket.SOCK_STREAM:
            server.listen(8)
        with outward_guest.connect(loopback, port, kind) as client:
            client.send(b"question")
            if kind == socket.SOCK_STREAM:
                with server.accept()[0] as accepted:
                    assert accepted.recv(100) == b"question"
                    accepted.sendall(b"answer")
                    assert client.recv(100) == b"answer"
            else:
                data, seen = server.recvfrom(100)
                assert (data, seen[0]) == (b"question", loopback)
                server.sendto(b"answer", seen)
                assert client.recv(100) == b"answer"


# Options -----------------------------------------------------------------------------------------------------------


def test_no_splice_goes_through_the_tap(lan: Lan, ordinary_user: User) -> None:
    """A client on the host's loopback is seen as the address that maps it, also where the other family listens."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "--no-splice", "-t", "7101", "-u", "7101") as guest:
        server = server_in(guest, socket.AF_INET, 7101)
        for asks in ("127.0.0.1", "::1"):
            client = lan.host.connect(asks, 7101)
            accepted, seen = server.accept()
            with accepted:
                assert seen[0] == "198.51.100.1", "the gateway, which stands for the host's loopback"
                client.sendall(b"hello")
                assert accepted.recv(10) == b"hello"
        udp = server_in(guest, socket.AF_INET, 7101, socket.SOCK_DGRAM)
        client = lan.host.connect("127.0.0.1", 7101, socket.SOCK_DGRAM)
        client.send(b"hello")
        assert udp.recvfrom(10)[1][0] == "198.51.100.1"


def test_where_loopback_connections_arrive(lan: Lan, ordinary_user: User) -> None:
    """At the namespace's own address, or at its loopback with --host-lo-to-ns-lo."""
    for options, address in (((), HOST), (("--host-lo-to-ns-lo",), "127.0.0.1")):
        with lan.pasta(ordinary_user, "-q", "--config-net", "-t", "7102", *options) as guest:
            server = guest.make_socket()
            server.bind((address, 7102))
            server.listen(1)
            lan.host.connect("127.0.0.1", 7102)
            accepted, seen = server.accept()
            accepted.close()
            assert seen[0] == address


def test_splice_only(lan: Lan, ordinary_user: User) -> None:
    """No interface but loopback, and forwarded ports on it."""
    with lan.pasta(ordinary_user, "-q", "--splice-only", "-t", "7103", "-u", "7103", "-T", "9203") as guest:
        assert [link["ifname"] for link in guest.show("link")] == ["lo"]
        server = server_in(guest, socket.AF_INET, 7103)
        client = lan.host.connect("127.0.0.1", 7103)
        accepted, _ = server.accept()
        with accepted:
            client.sendall(b"hello")
            assert accepted.recv(10) == b"hello"
        with pytest.raises(ConnectionResetError):
            lan.peer.connect(HOST, 7103).recv(1)
        with lan.host.make_socket() as host_server:
            host_server.bind(("127.0.0.1", 9203))
            host_server.listen(1)
            guest.connect("127.0.0.1", 9203)
            host_server.accept()[0].close()


def test_a_target_beyond_the_guest(lan: Lan, ordinary_user: User) -> None:
    """An address that the guest has besides its own, as of a container behind it."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", "7104:192.0.2.20/8104") as guest:
        guest.run("ip", "address", "add", "192.0.2.20/32", "dev", "lo")
        server = guest.make_socket()
        server.bind(("192.0.2.20", 8104))
        server.listen(4)
        for where, address in ((lan.host, "127.0.0.1"), (lan.peer, HOST)):
            client = where.connect(address, 7104)
            accepted, _ = server.accept()
            with accepted:
                client.sendall(b"hello")
                assert accepted.recv(10) == b"hello"


def test_a_flood_is_refused_and_other_connections_go_on(lan: Lan, ordinary_user: User) -> None:
    """More connections than descriptors: the ones beyond are reset, the first goes on, and then all is as before."""
    with lan.pasta(ordinary_user, "-q", "--config-net", "-t", "7105", descriptors=500) as guest:
        server = server_in(guest, socket.AF_INET, 7105)
        first = lan.host.connect("127.0.0.1", 7105)
        held, _ = server.accept()
        clients = []
        for _ in range(500):
            with contextlib.suppress(ConnectionResetError):
                clients.append(lan.host.connect("127.0.0.1", 7105))
        first.sendall(b"still here")
        assert held.recv(100) == b"still here"
        for client in clients:
            client.close()
        server.settimeout(0.1)
        try:
            while True:
                server.accept()[0].close()
        except TimeoutError:
            pass
        server.settimeout(30)

        def again() -> bool:
            with lan.host.connect("127.0.0.1", 7105) as client:
                client.sendall(b"x")
                accepted, _ = server.accept()
                with accepted:
                    return accepted.recv(1) == b"x"

        wait_for(again, "a new connection")
        held.close()


# Programs, and automatic ports -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def auto_guest(lan: Lan, ordinary_user: User) -> Iterator[Guest]:
    """A guest of pasta with default options: ports are forwarded as they are bound, in both directions."""
    with lan.pasta(ordinary_user, "-q", "--config-net") as made:
        yield made


def url(address: str, port: int) -> str:
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


def answers(where: Namespace, address: str, port: int) -> bool:
    """Whether a server accepts connections there."""
    with where.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        return sock.connect_ex((address, port)) == 0


WAYS = [("loopback", "127.0.0.1"), ("loopback", "::1"), ("tap", HOST), ("tap", HOST6)]


@pytest.mark.parametrize(("path", "address"), WAYS)
def test_curl(auto_guest: Guest, lan: Lan, path: str, address: str) -> None:
    size = GIB // 8
    where = client_of(lan, path)
    with bytes_server(auto_guest, "::" if ":" in address else "0.0.0.0") as port:
        wait_for(lambda: answers(where, address, port), "the port to be forwarded")
        command = f"curl -fsSg --max-time 60 {url(address, port)}/{size} | sha256sum"
        assert where.run("sh", "-c", command, timeout=90).stdout.split()[0] == digest(size)
    wait_for(lambda: not answers(where, address, port), "the port to be closed again")


@pytest.mark.parametrize("options", [[], ["-R"], ["-P", "8"], ["--bidir"]], ids=" ".join)
@pytest.mark.parametrize(("path", "address"), WAYS)
def test_iperf3(auto_guest: Guest, lan: Lan, path: str, address: str, options: list[str]) -> None:
    where = client_of(lan, path)
    listen = "::" if ":" in address else "0.0.0.0"
    with running(auto_guest, listen, "iperf3", "-s", "-B", listen, "-p", "{port}") as port:
        wait_for(lambda: answers(where, address, port), "the port to be forwarded")
        # The server is not ready for a moment after the connection that asked whether it is.
        iperf3 = ("iperf3", "-J", "-c", address, "-p", str(port), "-n", "100M", *options)
        results: list[Any] = []

        def served() -> bool:
            results.append(json.loads(where.run(*iperf3, check=False).stdout))
            return "error" not in results[-1]

        wait_for(served, "the server")
    result = results[-1]
    assert all(stream["receiver"]["bytes"] > 0 for stream in result["end"]["streams"])


@pytest.mark.parametrize(("path", "address"), WAYS)
def test_socat(auto_guest: Guest, lan: Lan, path: str, address: str) -> None:
    """A shell's way: a program that answers each line, and ends when the client is done."""
    where = client_of(lan, path)
    kind, to = ("6", f"[{address}]") if ":" in address else ("4", address)
    with running(auto_guest, "::1" if kind == "6" else "127.0.0.1",
                 "socat", f"TCP{kind}-LISTEN:{{port}},fork,reuseaddr", "SYSTEM:tr a-z A-Z") as port:  # fmt: skip
        wait_for(lambda: answers(where, address, port), "the port to be forwarded")
        done = where.run("socat", "-t", "10", "-", f"TCP{kind}:{to}:{port}", input="hello, world\n")
    assert done.stdout == "HELLO, WORLD\n"


@pytest.mark.parametrize(("path", "address"), WAYS)
def test_dig(auto_guest: Guest, lan: Lan, path: str, address: str) -> None:
    where = client_of(lan, path)
    with dns_server(auto_guest, HOST6 if ":" in address else HOST) as port:
        wait_for(lambda: answers(where, address, port), "the port to be forwarded")

        def answer() -> str:
            dig = ("dig", "+short", "+time=1", "+tries=1", "-p", str(port), f"@{address}", "name.test")
            return where.run(*dig, check=False).stdout

        wait_for(lambda: answer() == "192.0.2.77\n", "the UDP port to be forwarded")


def test_ports_of_the_host_appear_in_the_namespace(auto_guest: Guest, lan: Lan) -> None:
    """And vanish; those that pasta itself has there are not taken for the host's."""
    with lan.host.make_socket() as server:
        server.bind(("127.0.0.1", 9301))
        server.listen(8)
        wait_for(lambda: answers(auto_guest, "127.0.0.1", 9301), "the port to be forwarded")
    wait_for(lambda: not answers(auto_guest, "127.0.0.1", 9301), "the port to be closed again")
    assert not answers(lan.host, "127.0.0.1", 9301)
