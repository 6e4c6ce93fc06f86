"""The memory of an idle connection that was used: all that the package allocates for one, in whatever module.

The sockets are fakes, made by this file, so that theirs is not counted; a real one is added.
"""

from __future__ import annotations

import gc
import sys
import tracemalloc
from pathlib import Path

import pytest

import passt
from passt import addr
from passt.linux.nspool import new_socket
from passt.tcp_engine import sock as tcp_sock
from passt.wire.tcp import ACK
from tests.unit.tcp_support import FakeSocket, Talk, accepted_socket, fake_sockets, listener

__all__ = ["fake_sockets"]

IDLE_MAX = 1376  # bytes; the allocators round them up, and tables have room for more: 1536 are resident at the most
ROUND_TRIP = 0.0002  # s, of the link
OPENED = 256  # so that tables are as full as with 50 000, and what is kept of addresses as full as before
SOCKET = new_socket.__basicsize__
KEY = {False: sys.getsizeof(bytes(12)), True: sys.getsizeof(bytes(36))}  # cut out of a packet by the tap's input
REFERENCE = 8  # in the reactor's table; the reactor is a fake here

PACKAGE = str(Path(passt.__file__).parent / "*")


class ForgetfulSocket(FakeSocket):
    """Does not keep the address that it is given, as the kernel does not keep Python's objects."""

    def connect_ex(self, peer: object) -> int:
        return 0


def forgetful(*kind: int) -> ForgetfulSocket:
    """An allocation counts by the file that makes it: this one makes the sockets."""
    return ForgetfulSocket(*kind)


def open_many(talk: Talk, began: str, first: int, last: int) -> None:
    """Open connections, some milliseconds one after another, and leave them alone for a while."""
    for port in range(first, last):
        if began == "guest":
            talk.key = talk.key[:-4] + port.to_bytes(2, "big") + (80).to_bytes(2, "big")
            talk.syn(sack=True)
            talk.taken()
            talk.now += ROUND_TRIP
            talk.guest(ACK, seq=1, ack=1)
        else:
            peer = addr.packed(f"2001:db8:ffff::{port:x}" if talk.v6 else f"198.51.{port >> 8}.{port & 255}")
            talk.tcp.opening.accepted(listener(), accepted_socket(peer), peer, port, talk.now)
            talk.taken()
            talk.now += ROUND_TRIP
            talk.answer(sack=True)
        talk.taken()
        exchange(talk)
        talk.end_turn()
        talk.wait(0.01)
    talk.wait(20.0)


def exchange(talk: Talk) -> None:
    """A byte each way: what has been used is idle, too."""
    talk.wait(0.001)
    talk.guest(ACK, b"?", seq=1, ack=1)
    talk.wait(0.001)
    talk.host(b"!")
    talk.wait(0.001)
    assert [s.payload for s in talk.taken() if s.payload] == [b"!"]
    talk.guest(ACK, seq=2, ack=2)
    talk.wait(0.05)
    talk.taken()


def allocated() -> int:
    """Bytes that code of the package has allocated and not freed."""
    only = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, PACKAGE)])
    return sum(trace.size for trace in only.traces)


@pytest.mark.parametrize(
    ("most", "began", "v6"),
    [(1 << 20, "guest", False), (0, "guest", True), (0, "host", False), (1 << 20, "host", True)],
    ids=["timerfd-guest-IPv4", "wheel-guest-IPv6", "wheel-host-IPv4", "timerfd-host-IPv6"],
)
def test_an_idle_connection_costs_little(most: int, began: str, v6: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """`most`: each has a timerfd, or none has."""
    monkeypatch.setattr(tcp_sock, "new_socket", forgetful)
    talk = Talk(v6=v6)
    talk.timers.most = most
    gc.disable()  # it would walk over all of them again and again
    tracemalloc.start()
    try:
        open_many(talk, began, 20_000, 20_000 + OPENED)
        before = allocated()
        open_many(talk, began, 30_000, 30_000 + OPENED)
        cost = (allocated() - before) / OPENED
    finally:
        tracemalloc.stop()
        gc.enable()
    assert talk.ctx.flows.count == 2 * OPENED
    assert cost + KEY[v6] + SOCKET + REFERENCE <= IDLE_MAX
