"""Payload that is received in the stream's own buffer: the guest gets the same frames as of payload that is copied."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.link.stream_socket import FLUSH_AT, NET_BUFSIZE
from passt.wire.checksum import ones_sum
from passt.wire.virtio import GSO_NONE, VNET, VNET_LEN

from .test_stream_socket import Guest, guest

__all__ = ["guest"]

L4 = {4: 34, 6: 54}


def header(version: int, checked: bool = True) -> bytearray:
    """The headers of a segment, of which only lengths and the partial checksum matter."""
    hdr = bytearray(VNET.pack(checked, GSO_NONE, 0, 0, L4[version], 16) + bytes(L4[version] + 20))
    hdr[VNET_LEN + 12 : VNET_LEN + 14] = b"\x08\x00" if version == 4 else b"\x86\xdd"
    hdr[VNET_LEN + L4[version] + 16 : VNET_LEN + L4[version] + 18] = b"\x12\x34"
    return hdr


def received(views: list[memoryview], data: bytes) -> None:
    """Fill views in turn, as recvmsg(2) does."""
    for view in views:
        view[: len(data)], data = data[: len(view)], data[len(view) :]
    assert not data


def send(guest: Guest, hdr: bytearray, data: bytes, chunk: int, want: int) -> bool:
    """Send `data` as segments, of which `want` bytes were asked for; whether it was received in place."""
    views, total = guest.link.lay_out(len(hdr), chunk, want)
    pieces = [data[i : i + chunk] for i in range(0, len(data), chunk)]
    if not total:
        for piece in pieces:
            guest.link.send_payload((hdr, piece))
        return False
    assert total == want == sum(map(len, views))
    received(views, data)
    for piece in pieces:
        guest.link.send_laid_out(hdr, len(piece))
    return True


@given(
    st.sampled_from([4, 6]),
    st.booleans(),
    st.integers(6, 65480),
    st.integers(1, 5),
    st.integers(1, 1 << 17),
    st.lists(st.integers(1, 3000), max_size=3),
)
@settings(deadline=None)
def test_frames_are_those_of_payload_that_is_copied(
    version: int, checked: bool, chunk: int, number: int, length: int, before: list[int]
) -> None:
    data = random.Random(length).randbytes(min(length, number * chunk))
    hdr = header(version, checked)
    frames = []
    for place in (True, False):
        guest = Guest(1 << 20)
        for n in before:
            guest.link.send_payload((header(version), bytes(n)))
        if place:
            assert send(guest, hdr, data, chunk, min(number * chunk, 1 << 17))
        else:
            for i in range(0, len(data), chunk):
                guest.link.send_payload((hdr, data[i : i + chunk]))
        counts = guest.link.sent_frames, guest.link.sent_bytes
        frames.append((guest.end_turn(), counts))
        guest.ours.close()
        guest.theirs.close()
    assert frames[0] == frames[1]


def test_sum_of_a_segment_is_right(guest: Guest) -> None:
    """One's complement: with the sum of its pseudo-header, which stood in the field, all words make 0xffff."""
    for length in range(40_000, 40_009):
        data = random.Random(length).randbytes(length)
        assert send(guest, header(4), data, 65480, 65480)
        (frame,) = guest.end_turn()
        assert frame[54:] == data
        assert (ones_sum(frame[34:]) + 0x1234) % 0xFFFF == 0


def test_what_waits_is_sent_first_where_there_is_no_room(guest: Guest) -> None:
    hdr = header(4)
    first = bytes(60_000)
    for _ in range(FLUSH_AT // 65536):
        guest.link.send_payload((hdr, first))
    data = random.Random(0).randbytes(1 << 17)
    assert send(guest, hdr, data, 65480, 1 << 17)
    sent = [len(frame) - 54 for frame in guest.end_turn()]
    assert sent == [*[len(first)] * (FLUSH_AT // 65536), 65480, 65480, (1 << 17) - 2 * 65480]


def test_nowhere_while_the_socket_is_full(guest: Guest) -> None:
    hdr = header(4)
    while not guest.link.full:
        guest.link.send_payload((hdr, bytes(60_000)))
    assert guest.link.lay_out(len(hdr), 65480, 65480) == ([], 0)


def test_nowhere_without_a_guest(guest: Guest) -> None:
    guest.link.attach(None)
    assert guest.link.lay_out(64, 1460, 1460) == ([], 0)


@pytest.mark.parametrize("chunk", [NET_BUFSIZE, 5])
def test_nowhere_for_frames_that_are_too_long_or_are_padded(guest: Guest, chunk: int) -> None:
    assert guest.link.lay_out(64, chunk, 10 * chunk) == ([], 0)


@pytest.mark.parametrize("short", [1, 5, 6])
def test_last_segment_may_be_short(guest: Guest, short: int) -> None:
    """It is padded, whatever lay there."""
    hdr = header(4)
    assert send(guest, hdr, b"\xff" * 65480, 65480, 1 << 17)
    guest.end_turn()
    assert send(guest, hdr, bytes([1] * short), 65480, 65480)
    (frame,) = guest.end_turn()
    assert frame[54:] == bytes([1] * short).ljust(6, b"\0")


def test_capture_gets_what_the_guest_gets(guest: Guest) -> None:
    shown: list[bytes] = []
    guest.link.capture = lambda to_guest, frame: shown.append(frame[VNET_LEN:])
    assert send(guest, header(6), bytes(3000), 1000, 5000)
    assert guest.end_turn() == shown and len(shown) == 3
