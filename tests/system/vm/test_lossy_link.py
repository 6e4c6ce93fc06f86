"""A link to the guest that loses, reorders and delays frames: streams arrive whole, in both families and directions.

Chances come from a seed, which each test prints, and takes from LOSSY_SEED.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from bench import faulty_link

from ..support import User
from ..traffic.support import (
    HOST,
    HOST6,
    PEER,
    PEER6,
    Lan,
    Namespace,
    in_thread,
)
from .support import Passt, guest_behind, passt

SEED = int(os.environ.get("LOSSY_SEED") or random.randrange(1 << 32))
SIZE = 2 << 20  # bytes each way
MTU = 1500
FORWARDED = 18081
FAULTS: dict[str, dict[str, Any]] = {
    "loss": {"drop": 0.03},
    "much loss": {"drop": 0.1},
    "reordering": {"reorder": 0.05, "drop": 0.01},
    "a long link": {"delay": 0.02, "drop": 0.01},
    "the beginning and the end": {"lose": {"syn": 1, "data": 1, "fin": 1}},
}
PEERS = {"IPv4": PEER, "IPv6": PEER6}


class Machine:
    """A guest behind a link with faults."""

    def __init__(self, namespace: Namespace, rules: str) -> None:
        self.namespace = namespace
        self._rules = rules

    def faults(self, rule: dict[str, Any]) -> None:
        """The same faults in both directions from now on, with other chances."""
        print(f"LOSSY_SEED={SEED}")
        for i, way in enumerate(("up", "down")):
            faulty_link.control(self._rules, way, {**rule, "seed": SEED + i} if rule else {})


@pytest.fixture(scope="module")
def server(lan: Lan, ordinary_user: User) -> Iterator[Passt]:
    """passt for all tests."""
    with passt(lan, ordinary_user, "-t", f"{FORWARDED}:80", "-m", str(MTU)) as made:
        yield made


@pytest.fixture(scope="module")
def machine(lan: Lan, server: Passt) -> Iterator[Machine]:
    """The guest, with both families."""
    with guest_behind(lan, server, MTU) as (guest, rules):
        made = Machine(guest, rules)
        yield made
        made.faults({})


def digest_of(sock: socket.socket) -> str:
    """SHA-256 of everything up to the end."""
    digest = hashlib.sha256()
    while data := sock.recv(1 << 18):
        digest.update(data)
    return digest.hexdigest()


def send(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def exchange(a: socket.socket, b: socket.socket, size: int) -> None:
    """Both send at the same time, and both get what the other one sent."""
    chance = random.Random(SEED)
    data = [chance.randbytes(size), chance.randbytes(size)]
    with in_thread(send, a, data[0]), in_thread(send, b, data[1]), in_thread(digest_of, a) as at_a:
        assert digest_of(b) == hashlib.sha256(data[0]).hexdigest()
        assert at_a() == hashlib.sha256(data[1]).hexdigest()


@pytest.mark.parametrize("family", PEERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_streams_of_a_guest_that_connects(lan: Lan, machine: Machine, family: str, fault: str) -> None:
    with lan.peer.listen(PEERS[family]) as listener:
        machine.faults(FAULTS[fault])
        with machine.namespace.connect(PEERS[family], listener.getsockname()[1]) as near:
            far, _ = listener.accept()
            with far:
                exchange(near, far, SIZE if "lose" not in FAULTS[fault] else 1000)


@pytest.mark.parametrize("family", PEERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_streams_of_a_client_of_the_host(lan: Lan, machine: Machine, family: str, fault: str) -> None:
    v6 = family == "IPv6"
    listener = machine.namespace.make_socket(socket.AF_INET6 if v6 else socket.AF_INET)
    with listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("::" if v6 else "0.0.0.0", 80))
        listener.listen()
        machine.faults(FAULTS[fault])
        with lan.peer.connect(HOST6 if v6 else HOST, FORWARDED) as far:
            near, _ = listener.accept()
            with near:
                exchange(near, far, SIZE if "lose" not in FAULTS[fault] else 1000)
