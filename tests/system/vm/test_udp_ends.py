"""Datagrams to a closed port of a guest by the tap, and the path that traceroute sees: guests of both modes."""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Iterator

import pytest

from ..support import User, wait_for
from ..traffic.support import GATEWAY, HOST, PEER, Lan, Namespace
from .support import guest_behind, passt

LOOPBACK_PORT, TRACED = 18281, "198.18.0.1"


@pytest.fixture(scope="module", params=["pasta", "passt"])
def guest(request: pytest.FixtureRequest, lan: Lan, ordinary_user: User) -> Iterator[Namespace]:
    """A guest with a forwarded port on the host's loopback, whose clients come by the tap."""
    forward = ["-u", f"127.0.0.1/{LOOPBACK_PORT}"]
    with contextlib.ExitStack() as stack:
        if request.param == "pasta":
            yield stack.enter_context(lan.pasta(ordinary_user, "-q", "--config-net", "--no-splice", *forward))
        else:
            server = stack.enter_context(passt(lan, ordinary_user, "-m", "1500", *forward))
            made, _ = stack.enter_context(guest_behind(lan, server, 1500))
            made.run("ping", "-c1", GATEWAY)  # passt has seen its address
            yield made


def is_refused(sock: socket.socket) -> bool:
    """Whether a datagram is answered by Port Unreachable; kernels send few of these (icmp_ratelimit)."""
    sock.settimeout(0.3)
    try:
        sock.send(b"anybody?")
        sock.recv(16)
    except ConnectionRefusedError:
        return True
    except TimeoutError:
        pass
    return False


def test_a_client_of_a_closed_port_is_told(lan: Lan, guest: Namespace) -> None:
    with lan.host.connect("127.0.0.1", LOOPBACK_PORT, socket.SOCK_DGRAM) as client:
        wait_for(lambda: is_refused(client), "its next datagram is refused")
        with guest.make_socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
            server.bind(("0.0.0.0", LOOPBACK_PORT))
            wait_for(lambda: not is_refused(client), "the listener listens again")
            client.send(b"last")
            while (got := server.recvfrom(16))[0] != b"last":
                pass
            server.sendto(b"yes", got[1])
            client.settimeout(5)
            assert client.recv(16) == b"yes"


def test_the_peer_of_a_program_that_has_ended_is_told(lan: Lan, guest: Namespace) -> None:
    with lan.peer.listen(PEER, socket.SOCK_DGRAM) as server:
        with guest.connect(PEER, server.getsockname()[1], socket.SOCK_DGRAM) as client:
            client.send(b"?")
            _, source = server.recvfrom(16)
        server.connect(source)
        wait_for(lambda: is_refused(server), "its next datagram is refused")


@pytest.mark.skipif(not shutil.which("traceroute"), reason="traceroute is missing")
def test_traceroute_by_tcp(lan: Lan, guest: Namespace) -> None:
    """`traceroute -T`: the router on the way, as from the host itself; the peer's route leads back to the host."""
    lan.peer.run("ip", "route", "add", TRACED, "via", HOST)
    lan.peer.write("/proc/sys/net/ipv4/ip_forward", "1")
    try:
        command = ("traceroute", "-T", "-n", "-q1", "-w2", "-m1", "-p80", TRACED)
        lines = [where.run(*command).stdout.splitlines()[-1] for where in (lan.host, guest)]
    finally:
        lan.peer.write("/proc/sys/net/ipv4/ip_forward", "0")
        lan.peer.run("ip", "route", "del", TRACED)
    hops = [line.split()[1] for line in lines]
    assert hops[0] == hops[1] and hops[0] in (GATEWAY, PEER), lines
