"""The transfer of the device's state: messages, the pipe, and answers that come later."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from passt.link import device_state
from passt.wire import vhost
from passt.wire.vhost import RingState, StateTransfer

from .vhost_desk import Desk

BIG = os.urandom(1 << 20)


def stop(desk: Desk) -> None:
    """Both rings."""
    for ring in desk.machine.rings:
        desk.machine.tell(vhost.GET_VRING_BASE, RingState(ring.index, 0).emit())
        desk.run()
        desk.machine.answer()


def begin(desk: Desk, direction: int) -> int:
    """SET_DEVICE_STATE_FD, with its answer; our end of the pipe."""
    reader, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    ours, theirs = (reader, writer) if direction == vhost.SAVE else (writer, reader)
    desk.machine.tell(vhost.SET_DEVICE_STATE_FD, StateTransfer(direction, 0).emit(), [theirs])
    os.close(theirs)
    desk.run()
    answer = desk.machine.answer()
    assert (answer.request, vhost.u64(answer.payload)) == (vhost.SET_DEVICE_STATE_FD, vhost.NO_DESCRIPTOR)
    return ours


def check(desk: Desk) -> None:
    desk.machine.tell(vhost.CHECK_DEVICE_STATE)
    desk.run()


def outcome(desk: Desk) -> bool:
    """The answer to `check`, which is there."""
    desk.run()
    desk.machine.sock.settimeout(0)
    try:
        answer = desk.machine.answer()
    finally:
        desk.machine.sock.settimeout(None)
    assert answer.request == vhost.CHECK_DEVICE_STATE
    return vhost.u64(answer.payload) == 0


def read(desk: Desk, fd: int) -> bytes:
    """The pipe to its end, and close it."""
    data = b""
    for _ in range(3000):
        desk.run(1)
        try:
            piece = os.read(fd, 1 << 16)
        except BlockingIOError:
            continue
        if not piece:
            break
        data += piece
    os.close(fd)
    return data


def test_a_state_is_saved(desk: Desk) -> None:
    stop(desk)
    sent: list[bool] = []
    desk.link.state.on_save = lambda send: send(BIG)
    desk.link.state.on_sent = sent.append
    pipe = begin(desk, vhost.SAVE)
    assert read(desk, pipe) == BIG
    assert sent == [True]
    check(desk)
    assert outcome(desk)
    check(desk)
    assert not outcome(desk), "one answer for one transfer"


def test_a_state_that_comes_later(desk: Desk) -> None:
    stop(desk)
    sends: list[Callable[[bytes | None], None]] = []
    desk.link.state.on_save = sends.append
    pipe = begin(desk, vhost.SAVE)
    check(desk)
    with pytest.raises(BlockingIOError):
        outcome(desk)
    sends[0](b"state")
    assert read(desk, pipe) == b"state"
    assert outcome(desk)


@pytest.mark.parametrize("absent", [False, True])
def test_there_is_no_state(desk: Desk, absent: bool) -> None:
    stop(desk)
    desk.link.state.on_save = None if absent else lambda send: send(None)
    assert read(desk, begin(desk, vhost.SAVE)) == b""
    check(desk)
    assert not outcome(desk)


def test_a_front_end_that_does_not_read(desk: Desk) -> None:
    stop(desk)
    sent: list[bool] = []
    desk.link.state.on_save = lambda send: send(BIG)
    desk.link.state.on_sent = sent.append
    os.close(begin(desk, vhost.SAVE))
    desk.run()
    assert sent == [False]
    check(desk)
    assert not outcome(desk)


def test_a_state_is_loaded(desk: Desk) -> None:
    stop(desk)
    loaded: list[bytes] = []
    answers: list[Callable[[bool], None]] = []

    def load(state: bytes, done: Callable[[bool], None]) -> None:
        loaded.append(state)
        answers.append(done)

    desk.link.state.on_load = load
    pipe = begin(desk, vhost.LOAD)
    left = memoryview(BIG)
    while left:
        try:
            left = left[os.write(pipe, left) :]
        except BlockingIOError:
            desk.run(1)
    check(desk)
    assert not loaded
    os.close(pipe)
    desk.run(40)
    assert loaded == [BIG]
    with pytest.raises(BlockingIOError):
        outcome(desk)
    answers[0](True)
    assert outcome(desk)


def test_a_state_that_is_refused_or_too_long(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(desk)
    desk.link.state.on_load = lambda state, done: done(False)
    os.close(begin(desk, vhost.LOAD))
    check(desk)
    assert not outcome(desk)
    monkeypatch.setattr(device_state, "STATE_MAX", 3)
    pipe = begin(desk, vhost.LOAD)
    os.write(pipe, b"long")
    check(desk)
    assert not outcome(desk)
    os.close(pipe)
    desk.link.state.on_load = None
    os.close(begin(desk, vhost.LOAD))
    check(desk)
    assert not outcome(desk)


def test_a_new_transfer_replaces_the_one_before(desk: Desk) -> None:
    """The answer to the first one does not become that of the second."""
    stop(desk)
    sends: list[Callable[[bytes | None], None]] = []
    desk.link.state.on_save = sends.append
    first, second = begin(desk, vhost.SAVE), begin(desk, vhost.SAVE)
    sends[0](b"first")
    sends[1](b"second")
    assert read(desk, first) == b""
    assert read(desk, second) == b"second"
    check(desk)
    assert outcome(desk)


def test_a_front_end_that_goes_ends_its_transfer(desk: Desk) -> None:
    stop(desk)
    answers: list[Callable[[bool], None]] = []
    desk.link.state.on_load = lambda state, done: answers.append(done)
    os.close(begin(desk, vhost.LOAD))
    check(desk)
    desk.machine.sock.shutdown(socket.SHUT_RDWR)
    desk.run()
    assert len(desk.gone) == 1
    desk.link.attach(None)
    answers[0](True)  # too late to be told
    desk.run()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("rings", "a transfer of state while a ring runs"),
        ("file", "a transfer of state that is not over a pipe"),
        ("none", "a transfer of state with 0 descriptors"),
        ("phase", "a transfer of state in direction 0, phase 7"),
    ],
)
def test_transfers_that_are_refused(desk: Desk, what: str, why: str) -> None:
    if what != "rings":
        stop(desk)
    reader, writer = os.pipe()
    fds = {"none": [], "file": [desk.machine.file]}.get(what, [writer])
    transfer = StateTransfer(vhost.SAVE, 7 if what == "phase" else 0)
    desk.machine.tell(vhost.SET_DEVICE_STATE_FD, transfer.emit(), fds)
    desk.run()
    assert desk.gone == [f"The vhost-user connection failed: {why}"]
    os.close(reader)
    os.close(writer)


def test_the_machine_waits_until_it_may_proceed(desk: Desk) -> None:
    asked: list[float] = []
    held = [True]

    def starts(now: float) -> bool:
        asked.append(now)
        return held[0]

    desk.link.on_start = starts
    stop(desk)
    desk.machine.start_ring(desk.machine.rings[1])
    desk.run()
    assert len(asked) == 1
    desk.machine.send(bytes(60))
    assert desk.frames() == []
    held[0] = False
    desk.link.proceed(0.0)
    assert desk.frames() == [bytes(60)]
    assert desk.drops == {}
