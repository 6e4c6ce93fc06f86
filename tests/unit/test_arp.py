"""ARP: who gets an answer, and that it is us."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.addr import ANY4, packed
from passt.arp import Arp, ignore
from passt.flow.context import Context
from passt.wire.arp import REPLY, REQUEST, Packet
from passt.wire.cursor import Malformed

from .oracle import dissect, recomputed
from .support import CONFIG, GATEWAY4, GUEST4, GUEST_MAC, OUR_MAC, T0, link, make_context

OTHER = packed("198.51.100.7")


def request(target: bytes, sender: bytes = GUEST4, operation: int = REQUEST) -> Packet:
    return Packet(operation, GUEST_MAC, sender, bytes(6), target)


@pytest.mark.parametrize(
    ("packet", "ignored"),
    [
        (request(GATEWAY4), False),
        (request(OTHER), False),
        (request(OTHER, ANY4), False),  # a probe for an address that is not the guest's
        (request(ANY4, ANY4), False),  # what qrap sends
        (request(GUEST4), True),
        (request(GUEST4, ANY4), True),  # the guest's own probe for duplicates must find nobody
        (request(GUEST4, OTHER), True),
        (request(OTHER, OTHER), True),  # an announcement
        (request(GATEWAY4, operation=REPLY), True),
        (request(GATEWAY4, operation=3), True),
    ],
)
def test_ignore(packet: Packet, ignored: bool) -> None:
    assert ignore(packet, CONFIG) is ignored


def test_family_off() -> None:
    assert ignore(request(GATEWAY4), make_context(ip4=None).config)


def test_reply(ctx: Context) -> None:
    Arp(ctx).tap_handler(GUEST_MAC, request(OTHER).emit() + bytes(18), T0)
    frame = link(ctx).take_one()
    assert frame == recomputed(frame)
    ether = dissect(frame)
    assert (ether.src, ether.dst, ether.type) == ("9a:55:9a:55:9a:55", "52:54:00:12:34:56", 0x0806)
    assert Packet.parse(frame[14:]) == Packet(REPLY, OUR_MAC, OTHER, GUEST_MAC, GUEST4)


def test_reply_goes_to_who_sent_the_frame(ctx: Context) -> None:
    mac = bytes.fromhex("020000000001")
    Arp(ctx).tap_handler(mac, request(OTHER).emit(), T0)
    assert link(ctx).take_one()[:6] == mac


def test_silence(ctx: Context) -> None:
    arp = Arp(ctx)
    arp.tap_handler(GUEST_MAC, request(GUEST4, ANY4).emit(), T0)
    arp.tap_handler(GUEST_MAC, request(GATEWAY4, operation=REPLY).emit(), T0)
    assert link(ctx).take() == []


@given(st.binary(max_size=40) | st.binary(min_size=20, max_size=20).map(lambda b: request(OTHER).emit()[:8] + b))
def test_answers_or_malformed(data: bytes) -> None:
    ctx = make_context()
    try:
        Arp(ctx).tap_handler(GUEST_MAC, data, T0)
    except Malformed:
        assert link(ctx).take() == []
