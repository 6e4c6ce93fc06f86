"""Segments that a link which cuts gets at once: the guest gets the same frames as of segments sent one by one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.drops import Drop
from passt.link.gso import Gso
from passt.link.stream_socket import FLUSH_AT, LIMIT, NET_BUFSIZE
from passt.wire.checksum import ones_sum
from passt.wire.tcp import ACK

from .test_gso import Case
from .test_stream_socket import Guest, guest

__all__ = ["guest"]

DATA = memoryview(random.Random(5).randbytes(1 << 18))
SHORTEST = {4: 28, 6: 1220}  # MSS of the least MTU


def segments(case: Case, payload: memoryview, seq: int) -> tuple[bytearray, list[tuple[bytearray, memoryview]]]:
    """The header of the first, and all of them as they would be sent one by one."""
    pieces = [payload[at : at + case.size] for at in range(0, len(payload), case.size)]
    frames = []
    for number, piece in enumerate(pieces):
        hdr = bytearray(case.parts(piece, ACK, seq + number * case.size)[0])
        if case.version == 4:
            set_ident(hdr, number)
        frames.append((hdr, piece))
    return bytearray(frames[0][0]), frames


def set_ident(hdr: bytearray, ident: int) -> None:
    hdr[28:30], hdr[34:36] = (ident & 0xFFFF).to_bytes(2, "big"), bytes(2)
    hdr[34:36] = (0xFFFF - ones_sum(hdr[24:44])).to_bytes(2, "big")


@given(
    st.sampled_from([4, 6]),
    st.data(),
    st.integers(1, 300),
    st.integers(0, 1 << 33),
    st.lists(st.integers(1, 3000), max_size=3),
)
@settings(deadline=None)
def test_frames_are_those_of_segments_sent_one_by_one(
    version: int, data: st.DataObject, number: int, seq: int, before: list[int]
) -> None:
    case = Case("tcp", version, data.draw(st.integers(SHORTEST[version], 9000)))
    payload = DATA[: max(1, min(number, len(DATA) // case.size)) * case.size]
    hdr, one_by_one = segments(case, payload, seq)
    unchanged = bytes(hdr)
    sent = []
    for at_once in (True, False):
        guest = Guest(1 << 21)
        for n in before:
            guest.link.send_payload((one_by_one[0][0], bytes(n)))
        if at_once:
            guest.link.send_segments(hdr, payload, case.size)
            assert hdr == unchanged, "the next frame of the connection begins with it"
        else:
            for frame in one_by_one:
                guest.link.send_payload(frame)
        sent.append((guest.end_turn(), guest.link.sent_frames, guest.link.sent_bytes))
        guest.ours.close()
        guest.theirs.close()
    assert sent[0] == sent[1]


@pytest.mark.parametrize("sum_of_first", [1, 2, 9, 10, 11, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize("ident", [0, 0xFFF0, 0xFFFF])
def test_header_checksum_at_the_ends_of_its_range(sum_of_first: int, ident: int) -> None:
    """Ids count up, so sums count down, and go on at the other end."""
    rows, hdr = 10, segments(Case("tcp", 4, 1460), DATA[:1460], 1)[0]
    set_ident(hdr, ident)
    more = int.from_bytes(hdr[34:36], "big") - sum_of_first
    address = (int.from_bytes(hdr[42:44], "big") + more) % 0xFFFF  # of the guest, whatever that is then
    hdr[42:44] = address.to_bytes(2, "big")
    set_ident(hdr, ident)
    assert (int.from_bytes(hdr[34:36], "big") - sum_of_first) % 0xFFFF == 0
    out = memoryview(bytearray(rows * 1518))
    assert Gso(out).rows(0, hdr, rows, 1460, DATA[: rows * 1460]) == len(out)
    for number in range(rows):
        header = out[number * 1518 + 18 :][:20]
        assert int.from_bytes(header[4:6], "big") == (ident + number) & 0xFFFF
        assert ones_sum(header) == 0xFFFF


def test_capture_has_them_all(guest: Guest) -> None:
    captured: list[bytes] = []
    guest.link.capture = lambda to_guest, frame: captured.append(frame[10:])
    guest.link.send_segments(segments(Case("tcp", 4, 1460), DATA[:1460], 1)[0], DATA[:14600], 1460)
    assert captured == guest.end_turn() and len(captured) == 10


def test_what_waits_is_sent_first_where_there_is_no_room(guest: Guest) -> None:
    hdr = segments(Case("tcp", 4, 1460), DATA[:1460], 1)[0]
    rows = FLUSH_AT * 2 // 3 // 1518
    for _ in range(3):
        guest.link.send_segments(hdr, DATA[: rows * 1460], 1460)
    guest.read()
    assert len(guest.stream) == 2 * rows * 1518, "not the last ones, which wait for the end of the turn"
    assert len(guest.end_turn()) == 3 * rows


def test_dropped_where_they_do_not_get_through(guest: Guest) -> None:
    """All of them: longer than the guest's buffer, behind a queue that is full, and without a guest."""
    hdr = segments(Case("tcp", 4, 1460), DATA[:1460], 1)[0]
    guest.link.send_segments(hdr, DATA[: 3 * NET_BUFSIZE], NET_BUFSIZE)
    assert guest.drops.pop(Drop.STREAM_FRAME_TOO_LONG) == 3
    while not guest.link.full:
        guest.link.send_payload((hdr, bytes(60_000)))
    while not guest.drops[Drop.STREAM_FULL]:
        sent = guest.link.sent_frames
        guest.link.send_segments(hdr, DATA[: 170 * 1460], 1460)
    assert guest.drops == {Drop.STREAM_FULL: 170} and guest.link.sent_frames == sent
    assert sent * 1400 < 3 * LIMIT
    guest.link.attach(None)
    guest.link.send_segments(hdr, DATA[: 2 * 1460], 1460)
    assert guest.drops[Drop.NO_GUEST] == 2
