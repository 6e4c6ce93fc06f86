"""The state of a machine that comes from another host.

Invariants: parsing gives a state or `InvalidState`; what was parsed is emitted as the same bytes; numbers are in the
order that the protocol needs, so that no subtraction of theirs is negative.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire.migration import QUEUE_MAX, ConnectionState, InvalidState, SocketState, State

SOCKET = SocketState(
    (bytes(4), 1), (bytes(4), 2), 1, 2, b"to send", 3, b"to read", 0, 1460, 7, 7, 8, 9, 10, 11, 12, 13, 14
)
CONNECTION = ConnectionState(
    bytes(12), (bytes(4), 80), 0x10, 1, 1, 2, 3, 4, 5, 6, 5, 7, 1460, 7, 8, 0, True, False, False, SOCKET
)
V6 = ConnectionState(
    bytes(36), (bytes(16), 80), 0x1FF, 1, 1, 2, 3, 4, 5, 6, 5, 7, 1460, 7, 8, 0, True, False, False, None
)


def seeds() -> Iterable[bytes]:
    for connections in ((), (CONNECTION,), (V6,), (V6, CONNECTION)):
        yield State(bytes(6), bytes(4), bytes(16), bytes(16), connections).emit()


def one(data: bytes) -> None:
    try:
        state = State.parse(data)
    except InvalidState:
        return
    assert state.emit() == data
    for c in state.connections:
        assert c.iss < c.snd_una <= c.snd_nxt
        assert c.irs < c.rcv_acked <= c.rcv_nxt <= c.rcv_edge
        assert len(c.key) in (12, 36)
        if c.socket is not None:
            assert c.socket.unsent <= len(c.socket.send_queue) <= QUEUE_MAX
            assert len(c.socket.local[0]) == len(c.socket.peer[0]) in (4, 16)
