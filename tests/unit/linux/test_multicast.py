"""Membership, source filters and the interface of datagrams to groups, with the kernel, on the loopback interface."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from passt import addr
from passt.linux import multicast

GROUP, GROUP6 = addr.packed("239.77.1.2"), addr.packed("ff02::7701")
LO = 1  # its index in any network namespace
HERE, ELSEWHERE = addr.LOOPBACK4, addr.packed("192.0.2.9")
ELSEWHERE6 = addr.packed("2001:db8::9")


@pytest.fixture
def receiver() -> Iterator[socket.socket]:
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.bind((addr.text(GROUP), 0))
        s.setblocking(False)
        multicast.only_joined(s, False)
        yield s


@pytest.fixture
def sender() -> Iterator[socket.socket]:
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        multicast.set_interface(s, False, LO)
        yield s


def arrives(sender: socket.socket, receiver: socket.socket) -> bool:
    """Whether a datagram to the group arrives: on the loopback interface it is there when sendto() returns."""
    sender.sendto(b"x", receiver.getsockname())
    try:
        return receiver.recv(10) == b"x"
    except BlockingIOError:
        return False


def test_only_what_was_joined(receiver: socket.socket, sender: socket.socket) -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as another:
        multicast.join(another, GROUP, LO)
        assert not arrives(sender, receiver)
    multicast.join(receiver, GROUP, LO)
    assert arrives(sender, receiver)


def test_sources(receiver: socket.socket, sender: socket.socket) -> None:
    multicast.join(receiver, GROUP, LO, frozenset((HERE, ELSEWHERE)))
    assert arrives(sender, receiver)
    for sources, expected in (
        (frozenset((ELSEWHERE,)), False),
        (None, True),
        (frozenset((ELSEWHERE, HERE)), True),
        (frozenset((ELSEWHERE,)), False),
    ):
        multicast.set_sources(receiver, GROUP, LO, sources)
        assert arrives(sender, receiver) == expected


def test_sources_of_ipv6() -> None:
    """The kernel takes changes of a list that it has."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as s:
        multicast.only_joined(s, True)
        multicast.set_interface(s, True, LO)
        assert s.getsockopt(*multicast.MULTICAST_IF[True]) == LO
        assert s.getsockopt(*multicast.MULTICAST_ALL[True]) == 0
        multicast.join(s, GROUP6, LO, frozenset((ELSEWHERE6,)))
        multicast.set_sources(s, GROUP6, LO, None)
        multicast.set_sources(s, GROUP6, LO, frozenset((ELSEWHERE6, addr.LOOPBACK6)))
        with pytest.raises(OSError, match="in use"):
            multicast.join(s, GROUP6, LO)
        multicast.set_sources(s, GROUP6, LO, frozenset())  # leaves
        multicast.join(s, GROUP6, LO)


def test_source_address_of_a_socket_without_one(receiver: socket.socket) -> None:
    multicast.join(receiver, GROUP, LO)
    with socket.socket(type=socket.SOCK_DGRAM) as s:
        multicast.set_interface(s, False, LO, HERE)
        s.sendto(b"x", receiver.getsockname())
        assert receiver.recvfrom(10)[1][0] == "127.0.0.1"


def test_no_interface(receiver: socket.socket) -> None:
    with pytest.raises(OSError, match="No such device"):
        multicast.join(receiver, GROUP, 1 << 30)
