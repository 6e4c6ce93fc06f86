"""Limits that are reached: half-open connections, descriptors, the table of flows. Others are served meanwhile."""

from __future__ import annotations

import contextlib
import errno
import re
import socket
from collections.abc import Callable, Iterator

import pytest

from ..support import User, wait_for
from ..traffic.support import GATEWAY, PEER, Lan, Namespace
from .support import guest_behind, passt

SILENT, SLOW = "198.18.0.1", "198.18.0.2"  # where the peer, a router, drops what comes
MANY = 600  # connections to a silent port
DESCRIPTORS = 1024  # a quarter of these may be half open, and half of that to one destination
FEW = 160
FLOWS = 40
SMALL_TABLE = f"""
from passt.flow.table import FlowTable
FlowTable.__init__.__defaults__ = {FLOWS}, FlowTable.__init__.__defaults__[1]
"""
LINE = r"The host leaves \d+ connections unanswered"


@pytest.fixture(scope="module", autouse=True)
def silence(lan: Lan) -> Iterator[None]:
    """Nothing answers there."""
    lan.peer.write("/proc/sys/net/ipv4/ip_forward", "1")
    lan.peer.run("ip", "route", "add", "blackhole", "198.18.0.0/16")
    yield
    lan.peer.run("ip", "route", "del", "blackhole", "198.18.0.0/16")
    lan.peer.write("/proc/sys/net/ipv4/ip_forward", "0")


@contextlib.contextmanager
def guest_of(lan: Lan, user: User, mode: str) -> Iterator[tuple[Namespace, Callable[[], str]]]:
    """A guest of either mode, and what the daemon has said."""
    if mode == "pasta":
        with lan.pasta(user, "--config-net", descriptors=DESCRIPTORS) as guest:
            yield guest, guest.said
    else:
        limit = f"import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, ({DESCRIPTORS},) * 2)\n"
        with passt(lan, user, "-m", "1500", before=limit) as server, guest_behind(lan, server, 1500) as (guest, _):
            yield guest, server.said


def connect_in_vain(guest: Namespace, address: str, count: int) -> list[socket.socket]:
    """So many connections that wait."""
    made = []
    for _ in range(count):
        sock = guest.make_socket()
        sock.setblocking(False)
        assert sock.connect_ex((address, 80)) == errno.EINPROGRESS
        made.append(sock)
    return made


def served(guest: Namespace, listener: socket.socket, address: str) -> tuple[socket.socket, socket.socket]:
    """A connection of the guest, after a byte each way."""
    near = guest.connect(address, listener.getsockname()[1])
    far = listener.accept()[0]
    far.settimeout(10)
    works(near, far)
    return near, far


def works(near: socket.socket, far: socket.socket) -> None:
    near.sendall(b"?")
    assert far.recv(1) == b"?"
    far.sendall(b"!")
    assert near.recv(1) == b"!"


def errors(socks: list[socket.socket]) -> list[int]:
    return [e for sock in socks if (e := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))]


@pytest.mark.parametrize("mode", ["pasta", "passt"])
def test_connections_to_a_silent_port_keep_none_from_being_served(lan: Lan, ordinary_user: User, mode: str) -> None:
    """Nor are they refused, and one to another slow place keeps its own."""
    with guest_of(lan, ordinary_user, mode) as (guest, said), lan.peer.listen(PEER) as listener:
        kept = served(guest, listener, PEER)
        slow = connect_in_vain(guest, SLOW, 1)
        wait_for(lambda: f"{SLOW}:80" in lan.host.run("ss", "-Htn", "state", "syn-sent").stdout, "it waits")
        (before,) = re.findall(rf"\S+:(\d+) +{SLOW}:80", lan.host.run("ss", "-Htn", "state", "syn-sent").stdout)
        silent: list[socket.socket] = []
        for _ in range(12):
            silent += connect_in_vain(guest, SILENT, MANY // 12)
            for end in served(guest, listener, PEER):
                end.close()
        wait_for(lambda: re.search(LINE, said()), "the log has a line")
        waiting = lan.host.run("ss", "-Htn", "state", "syn-sent").stdout
        assert waiting.count(f"{SILENT}:80") <= DESCRIPTORS // 8
        assert re.findall(rf"\S+:(\d+) +{SLOW}:80", waiting) == [before], "it was not touched"
        assert not errors([*silent, *slow])
        assert len(re.findall(LINE, said())) <= 3, "one for an interval"
        works(*kept)
        for end in (*kept, *silent, *slow):
            end.close()


def test_half_open_connections_give_their_descriptors(lan: Lan, ordinary_user: User) -> None:
    with (
        lan.pasta(ordinary_user, "-q", "--config-net", descriptors=FEW) as guest,
        lan.host.listen("127.0.0.1") as listener,
    ):
        waiting = connect_in_vain(guest, SILENT, FEW // 8)
        pairs = []
        for _ in range(FEW):
            try:
                pairs.append(served(guest, listener, GATEWAY))
            except ConnectionRefusedError:
                break
        else:
            pytest.fail("it has more connections than descriptors")
        assert SILENT not in lan.host.run("ss", "-Htn", "state", "syn-sent").stdout, "these ended first"
        assert not errors(waiting)
        for near, far in pairs:
            works(near, far)
        wait_for(lambda: "No descriptor is left: closed" in guest.said(), "the log has a line")
        for end in (*waiting, *(end for pair in pairs for end in pair)):
            end.close()


def test_a_full_table_has_room_as_long_as_something_is_half_open(lan: Lan, ordinary_user: User) -> None:
    with (
        lan.pasta(ordinary_user, "-q", "--config-net", before=SMALL_TABLE) as guest,
        lan.peer.listen(PEER) as listener,
    ):
        waiting = connect_in_vain(guest, SILENT, FLOWS)
        pairs = [served(guest, listener, PEER) for _ in range(FLOWS)]
        with pytest.raises(ConnectionRefusedError):
            guest.connect(PEER, listener.getsockname()[1])
        for near, far in pairs:
            works(near, far)
        for end in pairs.pop():
            end.close()
        wait_for(lambda: _served(guest, listener), "a connection makes room")
        assert not errors(waiting)
        for end in (*waiting, *(end for pair in pairs for end in pair)):
            end.close()


def _served(guest: Namespace, listener: socket.socket) -> bool:
    try:
        pair = served(guest, listener, PEER)
    except ConnectionRefusedError:
        return False
    for end in pair:
        end.close()
    return True
