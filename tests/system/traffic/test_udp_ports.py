"""UDP source ports of the guest, while pasta follows the ports that the guest binds."""

from __future__ import annotations

import socket
import time

import pytest

from ..support import User
from .support import PEER, PEER6, Guest, Lan

LOOKS = 2.5  # s, in which automatic ports are looked at three times


def seen_ports(guest: Guest, lan: Lan, peer: str, port: int, any_address: str) -> set[int]:
    """Source ports that the peer sees of a program of the guest that has bound `port`."""
    server = lan.peer.listen(peer, socket.SOCK_DGRAM)
    client = guest.make_socket(server.family, socket.SOCK_DGRAM)
    client.bind((any_address, port))
    seen = set()
    end = time.monotonic() + LOOKS
    while time.monotonic() < end:
        client.sendto(b"again", (peer, server.getsockname()[1]))
        seen.add(server.recvfrom(16)[1][1])
        time.sleep(0.1)
    return seen


@pytest.mark.parametrize(("peer", "any_address"), [(PEER, "0.0.0.0"), (PEER6, "::")])
def test_a_flow_keeps_its_port_while_the_host_has_that_of_the_guest(
    guest: Guest, lan: Lan, peer: str, any_address: str
) -> None:
    taken = lan.host.listen(any_address, socket.SOCK_DGRAM).getsockname()[1]
    assert len(seen_ports(guest, lan, peer, taken, any_address)) == 1


@pytest.mark.parametrize(("peer", "any_address"), [(PEER, "0.0.0.0"), (PEER6, "::")])
def test_a_flow_keeps_its_port_while_that_of_the_guest_may_not_be_bound(
    lan: Lan, ordinary_user: User, peer: str, any_address: str
) -> None:
    with lan.pasta(ordinary_user, "-q", "--config-net") as guest:
        guest.write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")
        assert len(seen_ports(guest, lan, peer, 500, any_address)) == 1


@pytest.mark.parametrize(("peer", "any_address"), [(PEER, "0.0.0.0"), (PEER6, "::")])
def test_a_flow_makes_way_for_a_port_that_can_be_had(guest: Guest, lan: Lan, peer: str, any_address: str) -> None:
    """The port is the guest's at the host from then on: any client reaches it there."""
    with lan.host.listen(any_address, socket.SOCK_DGRAM) as unused:
        port = unused.getsockname()[1]
    assert seen_ports(guest, lan, peer, port, any_address) == {port}
