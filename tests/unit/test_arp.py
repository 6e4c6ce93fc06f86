"""ARP: which requests get an answer, that it is us, and that our addresses are defended."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import log
from passt.addr import ANY4, BROADCAST4, packed
from passt.arp import DEFEND_INTERVAL, Arp, conflict, ignore
from passt.flow.context import Context
from passt.wire.arp import REPLY, REQUEST, Packet
from passt.wire.cursor import Malformed

from .oracle import dissect, recomputed
from .support import CONFIG, GATEWAY4, GUEST4, GUEST_MAC, IP4, OUR_MAC, T0, link, make_context

OTHER = packed("198.51.100.7")
NEIGHBOUR = packed("192.0.2.77")  # on the guest's subnet, and free
OTHER_MAC = bytes.fromhex("525400999999")
LINK_LOCAL = packed("169.254.17.4")
MAPPED, RESOLVER, FORWARDED = packed("192.0.2.8"), packed("192.0.2.53"), packed("192.0.2.54")


def request(target: bytes, sender: bytes = GUEST4, operation: int = REQUEST) -> Packet:
    return Packet(operation, GUEST_MAC, sender, bytes(6), target)


@pytest.mark.parametrize(
    ("packet", "ignored"),
    [
        (request(GATEWAY4), False),
        (request(OTHER), False),
        (request(NEIGHBOUR), False),
        (request(ANY4, ANY4), False),  # what qrap sends
        (request(GUEST4), True),
        (request(GUEST4, ANY4), True),  # the guest's own probe for duplicates must have no answer
        (request(GUEST4, OTHER), True),
        (request(OTHER, OTHER), True),  # an announcement
        (request(GATEWAY4, operation=REPLY), True),
        (request(GATEWAY4, operation=3), True),
        (request(packed("127.0.0.1")), True),
        (request(packed("224.0.0.1")), True),
        (request(BROADCAST4), True),
    ],
)
def test_ignore(packet: Packet, ignored: bool) -> None:
    assert ignore(packet, CONFIG) is ignored


@pytest.mark.parametrize("target", [OTHER, NEIGHBOUR, LINK_LOCAL, GUEST4, MAPPED, RESOLVER, FORWARDED])
def test_probe_for_a_free_address(target: bytes) -> None:
    """An answer would be a conflict (RFC 5227, 2.1.1), and the guest would not take the address."""
    assert ignore(request(target, ANY4), CONFIG)


@pytest.mark.parametrize("target", [GATEWAY4, MAPPED, RESOLVER, FORWARDED, packed("192.0.2.9")])
def test_probe_for_an_address_of_ours(target: bytes) -> None:
    ip4 = replace(IP4, map_guest_addr=MAPPED, map_host_loopback=packed("192.0.2.9"), dns=(RESOLVER,))
    config = replace(CONFIG, ip4=ip4, dns_match=(FORWARDED,))
    assert not ignore(request(target, ANY4), config)
    assert ignore(request(GUEST4, ANY4), replace(config, dns_match=(GUEST4,))), "what the guest was assigned is its own"


@pytest.mark.parametrize(("target", "taken"), [(OTHER, True), (GATEWAY4, False)])
def test_what_is_probed_for_is_going_to_be_the_guests(ctx: Context, target: bytes, taken: bool) -> None:
    Arp(ctx).tap_handler(GUEST_MAC, request(target, ANY4).emit(), T0)
    assert (ctx.guest.addr4 == target) is taken


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


def test_a_machine_beside_the_one_that_asks_answers_itself(ctx: Context) -> None:
    """Several are behind one link: it is ours to answer again for an address that has moved to the one that asks."""
    arp = Arp(ctx)
    ctx.neighbours.sender(OTHER_MAC)
    ctx.neighbours.learn(NEIGHBOUR, OTHER_MAC)
    arp.tap_handler(GUEST_MAC, request(NEIGHBOUR).emit(), T0)
    assert link(ctx).take() == []
    arp.tap_handler(OTHER_MAC, request(NEIGHBOUR).emit(), T0)
    assert Packet.parse(link(ctx).take_one()[14:]).operation == REPLY


def test_our_addresses_are_defended(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 5227, 2.4 c: an announcement, but not in answer to each packet."""
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    arp = Arp(ctx)
    arp.tap_handler(GUEST_MAC, request(GATEWAY4, GATEWAY4).emit(), T0)
    frame = link(ctx).take_one()
    assert (frame[:6], frame[6:12]) == (b"\xff" * 6, OUR_MAC)
    assert Packet.parse(frame[14:]) == Packet(REQUEST, OUR_MAC, GATEWAY4, bytes(6), GATEWAY4)
    assert lines == ["ARP: the guest uses an address that is not free: 192.0.2.1 at 52:54:00:12:34:56"]
    arp.tap_handler(GUEST_MAC, request(GATEWAY4, GATEWAY4, REPLY).emit(), T0 + DEFEND_INTERVAL - 0.1)
    assert link(ctx).take() == []
    arp.tap_handler(GUEST_MAC, request(OTHER, GATEWAY4).emit(), T0 + DEFEND_INTERVAL)
    announced, answer = link(ctx).take()
    assert Packet.parse(announced[14:]).operation == REQUEST
    assert Packet.parse(answer[14:]).operation == REPLY, "a request is answered all the same"


@pytest.mark.parametrize("sender", [GUEST4, NEIGHBOUR, ANY4])
def test_no_conflict(sender: bytes) -> None:
    assert not conflict(request(OTHER, sender), CONFIG, OUR_MAC)
    assert not conflict(Packet(REPLY, OUR_MAC, GATEWAY4, bytes(6), OTHER), CONFIG, OUR_MAC), "what we said ourselves"


def test_takes_its_frames_while_there_is_ipv4() -> None:
    ctx = make_context(ip4=None)
    arp = Arp(ctx)
    assert ctx.services.ethertypes == {0x0806: arp.tap_handler}
    with pytest.raises(Malformed, match="ipv4 disabled"):
        arp.tap_handler(GUEST_MAC, request(OTHER).emit(), T0)


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


@pytest.mark.parametrize("operation", [REQUEST, REPLY])
@pytest.mark.parametrize(("sender", "known"), [(OTHER, OTHER), (GUEST4, GUEST4), (GATEWAY4, None)])
def test_tells_the_senders_address(ctx: Context, operation: int, sender: bytes, known: bytes | None) -> None:
    """Where that of a conflict is, we know."""
    assert Arp(ctx).tap_handler(GUEST_MAC, request(NEIGHBOUR, sender, operation).emit(), T0) == known


def test_solicitation(ctx: Context) -> None:
    Arp(ctx)
    assert ctx.services.solicit4 is not None
    ctx.services.solicit4(OTHER)
    frame = link(ctx).take_one()
    assert frame[:14] == b"\xff" * 6 + OUR_MAC + b"\x08\x06"
    assert Packet.parse(frame[14:]) == Packet(REQUEST, OUR_MAC, GATEWAY4, bytes(6), OTHER)


def test_announcement_when_the_link_comes_up(ctx: Context) -> None:
    """RFC 5227, 3: sender and target are our address. The guest may have the assigned address, too."""
    Arp(ctx)
    (announce,) = ctx.services.on_link_up
    announce()
    assert Packet.parse(link(ctx).take_one()[14:]) == Packet(REQUEST, OUR_MAC, GATEWAY4, bytes(6), GATEWAY4)
    ctx.guest.addr4 = OTHER
    announce()
    _, asked = link(ctx).take()
    assert Packet.parse(asked[14:]).target == GUEST4


def test_nothing_is_announced_without_ipv4() -> None:
    ctx = make_context(ip4=None)
    Arp(ctx).announce()
    assert ctx.services.solicit4 is not None
    ctx.services.solicit4(GUEST4)
    assert link(ctx).take() == []


# Neighbours of the host ----------------------------------------------------------------------------------------------


NEIGHBOURS_MAC = bytes.fromhex("525400000077")


def test_a_neighbour_answers_for_itself(ctx: Context) -> None:
    ctx.lan.note(NEIGHBOUR, NEIGHBOURS_MAC)
    Arp(ctx).tap_handler(GUEST_MAC, request(NEIGHBOUR).emit(), T0)
    frame = link(ctx).take_one()
    assert frame[:14] == GUEST_MAC + NEIGHBOURS_MAC + b"\x08\x06"
    assert Packet.parse(frame[14:]) == Packet(REPLY, NEIGHBOURS_MAC, NEIGHBOUR, GUEST_MAC, GUEST4)


def test_a_neighbour_is_announced_and_counts_as_told(ctx: Context) -> None:
    """RFC 5227, 3."""
    arp = Arp(ctx)
    arp.tap_handler(GUEST_MAC, request(NEIGHBOUR).emit(), T0)
    link(ctx).take()
    ctx.lan.note(NEIGHBOUR, NEIGHBOURS_MAC)
    assert ctx.lan.outdated() == [NEIGHBOUR]
    assert ctx.services.announce4 is not None
    ctx.services.announce4(NEIGHBOUR)
    frame = link(ctx).take_one()
    assert frame[:14] == b"\xff" * 6 + NEIGHBOURS_MAC + b"\x08\x06"
    assert Packet.parse(frame[14:]) == Packet(REQUEST, NEIGHBOURS_MAC, NEIGHBOUR, bytes(6), NEIGHBOUR)
    assert ctx.lan.outdated() == []


def test_the_gateway_speaks_with_one_mac() -> None:
    """Where it is no address of ours, what we ask on its behalf has its own, and no conflict is seen in that."""
    ctx = make_context(ip4=replace(IP4, map_host_loopback=None))
    ctx.lan.note(GATEWAY4, NEIGHBOURS_MAC)
    arp = Arp(ctx)
    arp.solicit(OTHER)
    frame = link(ctx).take_one()
    assert (frame[6:12], Packet.parse(frame[14:]).sender_mac) == (NEIGHBOURS_MAC, NEIGHBOURS_MAC)
    assert not conflict(Packet(REQUEST, NEIGHBOURS_MAC, GATEWAY4, bytes(6), OTHER), ctx.config, NEIGHBOURS_MAC)
    assert conflict(Packet(REQUEST, GUEST_MAC, GATEWAY4, bytes(6), OTHER), ctx.config, NEIGHBOURS_MAC)
