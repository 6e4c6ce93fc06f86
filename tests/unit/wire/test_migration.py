"""The state that moves with a machine: emit and parse are each other's reverse, and nothing else passes."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.wire import migration as wire
from passt.wire.migration import ConnectionState, InvalidState, SocketState, State

U8, U16, U32 = (st.integers(0, (1 << bits) - 1) for bits in (8, 16, 32))
PORT = st.integers(1, 65535)
SHIFT = st.integers(0, 14)
ADDRESS = st.binary(min_size=4, max_size=4) | st.binary(min_size=16, max_size=16)
FINS = (0, wire.FIN_SENT, wire.FIN_RECEIVED, wire.FIN_SENT | wire.FIN_RECEIVED)


@st.composite
def sockets(draw: st.DrawFn) -> SocketState:
    size = draw(st.sampled_from([4, 16]))
    address = st.binary(min_size=size, max_size=size)
    to_send = draw(st.binary(max_size=50))
    fins = draw(st.sampled_from([*FINS, *([wire.FIN_SENT | wire.FIN_ACKED] if not to_send else [])]))
    return SocketState(
        (draw(address), draw(PORT)), (draw(address), draw(PORT)), draw(U32), draw(U32), to_send,
        draw(st.integers(0, len(to_send))), draw(st.binary(max_size=50)), fins, draw(PORT), draw(st.integers(0, 7)),
        draw(SHIFT), draw(SHIFT), *(draw(U32) for _ in range(6)),
    )  # fmt: skip


@st.composite
def connections(draw: st.DrawFn) -> ConnectionState:
    number, step = st.integers(0, 1 << 40), st.integers(0, 1 << 20)
    iss, irs = draw(number), draw(number)
    una, acked = iss + 1 + draw(step), irs + 1 + draw(step)
    nxt = acked + draw(step)
    window = draw(step)
    return ConnectionState(
        key=draw(st.sampled_from([12, 36]).flatmap(lambda n: st.binary(min_size=n, max_size=n))),
        host=(draw(ADDRESS), draw(U16)), events=draw(st.integers(0, 0x3FF)) | 0x10, iss=iss, irs=irs, snd_una=una,
        snd_nxt=una + draw(step), snd_wnd=window, snd_wnd_max=window + draw(step), rcv_nxt=nxt, rcv_acked=acked,
        rcv_edge=nxt + draw(step), mss=draw(PORT), snd_wscale=draw(SHIFT), rcv_wscale=draw(SHIFT),
        traffic_class=draw(U8), sack=draw(st.booleans()), time_wait=draw(st.booleans()),
        delays_acks=draw(st.booleans()), socket=draw(st.none() | sockets()),
    )  # fmt: skip


STATES = st.builds(
    State, *(st.binary(min_size=n, max_size=n) for n in (6, 4, 16, 16)), st.lists(connections(), max_size=3).map(tuple)
)
SOCKET = SocketState(
    (bytes(4), 1), (bytes(4), 2), 1, 2, b"to send", 3, b"to read", 0, 1460, 7, 7, 8, 9, 10, 11, 12, 13, 14
)
CONNECTION = ConnectionState(
    bytes(12), (bytes(4), 80), 0x10, 1, 1, 2, 3, 4, 5, 6, 5, 7, 1460, 7, 8, 0, True, False, False, SOCKET
)


def state(connection: ConnectionState) -> bytes:
    return State(bytes(6), bytes(4), bytes(16), bytes(16), (connection,)).emit()


@given(STATES)
def test_parse_reverses_emit(one: State) -> None:
    assert State.parse(one.emit()) == one


@given(STATES, st.data())
def test_a_part_of_a_state_is_none(one: State, data: st.DataObject) -> None:
    emitted = one.emit()
    with pytest.raises(InvalidState, match=r"it ends after \d+ bytes"):
        State.parse(emitted[: data.draw(st.integers(0, len(emitted) - 1))])
    with pytest.raises(InvalidState, match="1 bytes follow it"):
        State.parse(emitted + b"\0")


@given(st.binary(max_size=400), st.booleans())
def test_any_bytes_are_a_state_or_invalid(data: bytes, headed: bool) -> None:
    head = b"passt-py\0\1\0\0\0\0\0\1" + bytes(42) if headed else b""
    with suppress(InvalidState):
        one = State.parse(head + data)
        assert one.emit() == head + data


@given(st.data())
def test_one_changed_byte_never_does_harm(data: st.DataObject) -> None:
    emitted = bytearray(state(CONNECTION))
    emitted[data.draw(st.integers(0, len(emitted) - 1))] = data.draw(U8)
    with suppress(InvalidState):
        assert State.parse(bytes(emitted)).emit() == emitted


def test_another_program_or_version() -> None:
    emitted = state(CONNECTION)
    with pytest.raises(InvalidState, match="it is not of this program"):
        State.parse(b"x" + emitted[1:])
    with pytest.raises(InvalidState, match=r"it has version 2 \(1 is known\)"):
        State.parse(emitted[:8] + b"\0\2" + emitted[10:])
    with pytest.raises(InvalidState, match="it has 4294967295 connections"):
        State.parse(emitted[:12] + b"\xff" * 4 + emitted[16:])


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"events": 0x20}, "a connection that is not established"),
        ({"events": 0x410}, "reserved bits"),
        ({"snd_wscale": 15}, "an option of TCP"),
        ({"mss": 0}, "an option of TCP"),
        ({"snd_una": 1}, "the numbers to the guest"),
        ({"snd_nxt": 1}, "the numbers to the guest"),
        ({"snd_nxt": 4 + (1 << 30)}, "the numbers to the guest"),
        ({"rcv_acked": 1}, "the numbers from the guest"),
        ({"rcv_nxt": 4}, "the numbers from the guest"),
        ({"rcv_edge": 5}, "the numbers from the guest"),
        ({"rcv_edge": 1 << 31}, "the numbers from the guest"),
        ({"rcv_edge": 1 << 62}, "a sequence number"),
        ({"snd_wnd": 6}, "the window of the guest"),
    ],
)
def test_connections_that_cannot_be(wrong: dict[str, int], what: str) -> None:
    with pytest.raises(InvalidState, match=f"^{what} cannot be so$"):
        State.parse(state(replace(CONNECTION, **wrong)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"fins": 8}, "FIN"),
        ({"fins": wire.FIN_ACKED}, "FIN"),
        ({"fins": wire.FIN_ACKED | wire.FIN_SENT}, "bytes before an acknowledged FIN"),
        ({"options": 8}, "an option of TCP"),
        ({"rcv_wscale": 15}, "an option of TCP"),
        ({"mss": 0}, "an option of TCP"),
        ({"unsent": 8}, "the length of a queue"),
        ({"local": (bytes(4), 0)}, "a port"),
        ({"peer": (bytes(4), 0)}, "a port"),
    ],
)
def test_sockets_that_cannot_be(wrong: dict[str, int], what: str) -> None:
    with pytest.raises(InvalidState, match=f"^{what} cannot be so$"):
        State.parse(state(replace(CONNECTION, socket=replace(SOCKET, **wrong))))  # type: ignore[arg-type]


def test_a_queue_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    emitted = state(CONNECTION)
    assert State.parse(emitted).connections == (CONNECTION,)
    monkeypatch.setattr(wire, "QUEUE_MAX", 6)
    with pytest.raises(InvalidState, match="the length of a queue"):
        State.parse(emitted)
