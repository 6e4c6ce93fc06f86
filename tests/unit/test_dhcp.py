"""DHCP: one lease for all clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr, log
from passt import dhcp as dhcp_service
from passt.addr import packed
from passt.dhcp import Dhcp, ignore, ordered
from passt.flow.context import Context
from passt.wire import dhcp, domain
from passt.wire.cursor import Malformed
from passt.wire.dhcp import Message

from .oracle import dissect, recomputed
from .support import CONFIG, GATEWAY4, GUEST4, GUEST_MAC, IP4, OUR_MAC, T0, link, make_context, reconfigure

CHADDR = GUEST_MAC + bytes(10)
MASK = packed("255.255.255.0")
DNS = packed("192.0.2.53"), packed("198.51.100.53")
FOREIGN = packed("10.0.0.1")
RELAY = packed("192.0.2.8")
EVERYBODY = addr.BROADCAST_MAC, addr.BROADCAST4, 68


def request(kind: int | None = dhcp.DISCOVER, flags: int = 0, **options: bytes) -> Message:
    """A request; options by the names of wire.dhcp without OPT_."""
    named = {getattr(dhcp, f"OPT_{name}"): value for name, value in options.items()}
    typed = {} if kind is None else {dhcp.OPT_TYPE: bytes((kind,))}
    return Message(dhcp.BOOTREQUEST, 0xDEADBEEF, flags=flags, chaddr=CHADDR, secs=7, options={**typed, **named})


def send(ctx: Context, message: Message, src: bytes = addr.ANY4) -> bytes | None:
    """The frame that answers `message`, checked by scapy."""
    handler = ctx.services.ports4.get(dhcp.SERVER_PORT) or Dhcp(ctx).tap_handler
    handler(GUEST_MAC, src, addr.BROADCAST4, 68, message.emit(), T0)
    frames = link(ctx).take()
    if not frames:
        return None
    (frame,) = frames
    assert frame == recomputed(frame)
    assert "DHCP" in dissect(frame)
    return frame


def ask(ctx: Context, message: Message) -> Message:
    frame = send(ctx, message)
    assert frame is not None
    return Message.parse(frame[14 + 20 + 8 :])


def goes_to(frame: bytes | None) -> tuple[bytes, bytes, int]:
    """MAC, address and port that a frame is for."""
    assert frame is not None
    return frame[:6], frame[30:34], int.from_bytes(frame[36:38], "big")


# Requests with an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (dhcp.DISCOVER, dhcp.OFFER),
        (dhcp.REQUEST, dhcp.ACK),
        (dhcp.OFFER, None),
        (dhcp.DECLINE, None),
        (dhcp.ACK, None),
        (dhcp.NAK, None),
        (dhcp.RELEASE, None),
        (dhcp.INFORM, dhcp.ACK),
        (0, None),
        (255, None),
    ],
)
def test_message_types(ctx: Context, kind: int | None, answer: int | None) -> None:
    message = request(kind)
    assert ignore(message, CONFIG) is (answer is None and kind not in (dhcp.DECLINE, dhcp.RELEASE))
    if answer is None:
        assert send(ctx, message) is None
    else:
        assert ask(ctx, message).options[dhcp.OPT_TYPE] == bytes((answer,))


def test_bootp(ctx: Context) -> None:
    """No message type in the answer, nor what belongs to it (RFC 1534, 2)."""
    frame = send(ctx, request(None))
    assert frame is not None
    assert not ignore(request(None), CONFIG)
    packet = dissect(frame)
    assert (packet["BOOTP"].op, packet["BOOTP"].yiaddr) == (2, "192.0.2.2")
    assert packet["DHCP"].options[:4] == [
        ("subnet_mask", "255.255.255.0"),
        ("router", "192.0.2.1"),
        ("interface-mtu", 65520),
        "end",
    ]
    assert packet["UDP"].len == 8 + 300


def test_bootp_without_vendor_information(ctx: Context) -> None:
    Dhcp(ctx).tap_handler(GUEST_MAC, addr.ANY4, addr.BROADCAST4, 68, request(None).emit()[:236] + bytes(64), T0)
    answer = Message.parse(link(ctx).take_one()[42:])
    assert (answer.yiaddr, answer.options[dhcp.OPT_ROUTER]) == (GUEST4, GATEWAY4)


@pytest.mark.parametrize(
    "change",
    [{"no_dhcp": True}, {"ip4": None}, {"ip4": replace(IP4, gateway=None)}],
    ids=["off", "no v4", "no gateway"],
)
def test_off(change: dict[str, Any]) -> None:
    ctx = make_context(**change)
    assert ignore(request(), ctx.config)
    assert send(ctx, request()) is None


def test_replies_are_not_answered(ctx: Context) -> None:
    assert send(ctx, replace(request(), op=dhcp.BOOTREPLY)) is None


# Answers -----------------------------------------------------------------------------------------------------------


def test_offer(ctx: Context) -> None:
    frame = send(ctx, request())
    assert frame is not None
    packet = dissect(frame)
    assert (packet.src, packet.dst) == ("9a:55:9a:55:9a:55", "52:54:00:12:34:56")
    assert (packet["IP"].src, packet["IP"].dst, packet["IP"].ttl) == ("192.0.2.1", "192.0.2.2", 255)
    assert (packet["UDP"].sport, packet["UDP"].dport) == (67, 68)
    assert packet["IP"].len == 328
    assert (packet["BOOTP"].op, packet["BOOTP"].xid, packet["BOOTP"].yiaddr) == (2, 0xDEADBEEF, "192.0.2.2")
    assert packet["DHCP"].options[:7] == [
        ("subnet_mask", "255.255.255.0"),
        ("router", "192.0.2.1"),
        ("interface-mtu", 65520),
        ("lease_time", 0xFFFFFFFF),
        ("message-type", 2),
        ("server_id", "192.0.2.1"),
        "end",
    ]


def test_fields_of_the_request_come_back(ctx: Context) -> None:
    message = replace(
        request(dhcp.REQUEST),
        ciaddr=GUEST4,
        siaddr=packed("192.0.2.9"),
        giaddr=RELAY,
        sname=b"server".ljust(64, b"\0"),
        file=b"boot".ljust(128, b"\0"),
        hops=3,
        flags=0x8001,
    )
    answer = ask(ctx, message)
    for name in ("xid", "ciaddr", "siaddr", "giaddr", "chaddr", "sname", "file", "htype", "hlen", "flags"):
        assert getattr(answer, name) == getattr(message, name), name
    assert (answer.op, answer.secs, answer.hops, answer.yiaddr) == (dhcp.BOOTREPLY, 0, 0, GUEST4)


def test_fields_that_hold_options_do_not(ctx: Context) -> None:
    message = replace(request(OVERLOAD=b"\3"), sname=b"\xff".ljust(64, b"\0"), file=b"\xff".ljust(128, b"\0"))
    answer = ask(ctx, message)
    assert (answer.sname, answer.file) == (bytes(64), bytes(128))


@pytest.mark.parametrize(
    ("theirs", "wanted", "told"),
    [
        (None, b"", None),
        (None, b"\x51", "0c ff ff 02766d 076578616d706c65 00"),  # asked for, not told
        ("04 00 00 03666f6f", b"", "0c ff ff 02766d 076578616d706c65 00"),
        ("05 00 00 03666f6f", b"", "0e ff ff 02766d 076578616d706c65 00"),  # S: overridden
        ("00 00 00 666f6f", b"", "08 ff ff 766d2e6578616d706c65"),  # in ASCII
        ("f1 00 00", b"", "0a ff ff 766d2e6578616d706c65"),  # flags that must be zero are not answered
        ("0c 00 00 03666f6f", b"", "0c ff ff 02766d 076578616d706c65 00"),  # N: nor would we
    ],
)
def test_names_of_the_guest(theirs: str | None, wanted: bytes, told: str | None) -> None:
    ctx = make_context(hostname="vm", fqdn="vm.example")
    options = {"PARAMETERS": wanted} if wanted else {}
    if theirs is not None:
        options["FQDN"] = bytes.fromhex(theirs)
    answer = ask(ctx, request(dhcp.REQUEST, **options)).options
    assert answer[dhcp.OPT_HOSTNAME] == b"vm"
    assert answer.get(dhcp.OPT_FQDN) == (bytes.fromhex(told) if told else None)
    assert not {dhcp.OPT_HOSTNAME, dhcp.OPT_FQDN} & ask(make_context(), request(**options)).options.keys()


def test_name_of_the_guest_that_is_cut_off() -> None:
    with pytest.raises(Malformed, match="FQDN truncated"):
        ask(make_context(fqdn="vm.example"), request(FQDN=b"\x04\0"))


def test_ciaddr_of_an_offer_is_zero(ctx: Context) -> None:
    """RFC 2131, 4.3.1, table 3."""
    assert ask(ctx, replace(request(), ciaddr=FOREIGN)).ciaddr == addr.ANY4
    assert ask(ctx, replace(request(dhcp.REQUEST), ciaddr=GUEST4)).ciaddr == GUEST4


# Where answers go (RFC 2131, 4.1) ----------------------------------------------------------------------------------

CHADDR_MAC = bytes.fromhex("020000000009")


@pytest.mark.parametrize("kind", [None, dhcp.DISCOVER, dhcp.REQUEST])
def test_unicast_to_the_hardware_address(ctx: Context, kind: int | None) -> None:
    """It need not be that of the frame: a bridge may have put its own there."""
    assert goes_to(send(ctx, request(kind))) == (GUEST_MAC, GUEST4, 68)
    message = replace(request(kind), chaddr=CHADDR_MAC.ljust(16, b"\0"))
    assert goes_to(send(ctx, message)) == (CHADDR_MAC, GUEST4, 68)


@pytest.mark.parametrize("change", [{"htype": 6}, {"hlen": 16}, {"chaddr": bytes(16)}, {"chaddr": b"\xff" * 16}])
def test_hardware_address_that_is_none_of_ethernet(ctx: Context, change: dict[str, Any]) -> None:
    assert goes_to(send(ctx, replace(request(), **change))) == (GUEST_MAC, GUEST4, 68)


@pytest.mark.parametrize("kind", [None, dhcp.DISCOVER, dhcp.REQUEST])
def test_broadcast_flag(ctx: Context, kind: int | None) -> None:
    assert goes_to(send(ctx, request(kind, flags=dhcp.BROADCAST))) == EVERYBODY


def test_client_with_an_address(ctx: Context) -> None:
    """It has it already (RENEWING): the broadcast flag does not matter then."""
    message = replace(request(dhcp.REQUEST, flags=dhcp.BROADCAST), ciaddr=GUEST4, chaddr=CHADDR_MAC.ljust(16, b"\0"))
    assert goes_to(send(ctx, message)) == (GUEST_MAC, GUEST4, 68)


@pytest.mark.parametrize("ciaddr", ["127.0.0.1", "224.0.0.1", "255.255.255.255"])
def test_address_that_no_client_has(ctx: Context, ciaddr: str) -> None:
    assert goes_to(send(ctx, replace(request(), ciaddr=packed(ciaddr)))) == (GUEST_MAC, GUEST4, 68)


def test_relay_agent(ctx: Context) -> None:
    """The answer goes to the agent's server port, whatever flag and address the client has."""
    message = replace(request(dhcp.REQUEST, flags=dhcp.BROADCAST), ciaddr=GUEST4, giaddr=RELAY)
    assert goes_to(send(ctx, message)) == (GUEST_MAC, RELAY, 67)


def test_relay_agent_of_another_subnet(ctx: Context) -> None:
    """RFC 2131, 4.3.1: the address is of the subnet of giaddr; there we have none."""
    assert send(ctx, replace(request(), giaddr=FOREIGN)) is None


# Requests (RFC 2131, 4.3.2) ----------------------------------------------------------------------------------------


def states(address: bytes) -> dict[str, Message]:
    """A REQUEST for `address` in each state of a client."""
    return {
        "selecting": request(dhcp.REQUEST, REQUESTED=address, SERVER_ID=GATEWAY4),
        "init-reboot": request(dhcp.REQUEST, REQUESTED=address),
        "renewing": replace(request(dhcp.REQUEST), ciaddr=address),
    }


@pytest.mark.parametrize("state", states(GUEST4))
def test_request_for_our_address(ctx: Context, state: str) -> None:
    answer = ask(ctx, states(GUEST4)[state])
    assert (answer.yiaddr, answer.options[dhcp.OPT_TYPE]) == (GUEST4, bytes((dhcp.ACK,)))


@pytest.mark.parametrize("address", [FOREIGN, packed("192.0.2.3")])
@pytest.mark.parametrize("state", states(GUEST4))
def test_request_for_another_address(ctx: Context, state: str, address: bytes) -> None:
    """A NAK to all, so that the client begins anew; with nothing that table 3 does not allow."""
    message = replace(states(address)[state], sname=b"s" * 64, file=b"f" * 128, siaddr=RELAY)
    message = replace(message, options={**message.options, dhcp.OPT_CLIENT_ID: b"\1id"})
    frame = send(make_context(**FULL), message)
    assert goes_to(frame) == EVERYBODY
    answer = Message.parse((frame or b"")[42:])
    assert (answer.xid, answer.chaddr, answer.ciaddr, answer.yiaddr, answer.siaddr, answer.sname, answer.file) == (
        *(message.xid, message.chaddr, addr.ANY4, addr.ANY4, addr.ANY4, bytes(64), bytes(128)),
    )
    assert answer.options == {
        dhcp.OPT_TYPE: bytes((dhcp.NAK,)),
        dhcp.OPT_SERVER_ID: GATEWAY4,
        dhcp.OPT_CLIENT_ID: b"\1id",
        dhcp.OPT_MESSAGE: b"not the address of this network",
    }


@pytest.mark.parametrize(
    ("dst", "server"), [("10.9.0.1", "10.9.0.1"), ("255.255.255.255", "192.0.2.1"), ("192.0.2.1", "192.0.2.1")]
)
def test_a_client_is_refused_in_the_name_of_the_server_that_it_knows(ctx: Context, dst: str, server: str) -> None:
    """It renews its lease by unicast with the gateway of the network that the host has left."""
    former = addr.packed("10.9.0.20")
    message = replace(states(former)["renewing"], ciaddr=former)
    Dhcp(ctx).tap_handler(GUEST_MAC, former, addr.packed(dst), 68, message.emit(), T0)
    answer = Message.parse(link(ctx).take_one()[42:])
    assert answer.options[dhcp.OPT_TYPE] == bytes((dhcp.NAK,))
    assert addr.text(answer.options[dhcp.OPT_SERVER_ID]) == server


def test_a_lease_is_short_where_the_network_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dhcp_service.time, "monotonic", lambda: T0)
    ctx = make_context(followed=True)
    server = Dhcp(ctx)

    def lease(now: float) -> int:
        server.tap_handler(GUEST_MAC, addr.ANY4, addr.BROADCAST4, 68, request().emit(), now)
        return int.from_bytes(Message.parse(link(ctx).take_one()[42:]).options[dhcp.OPT_LEASE], "big")

    assert (lease(T0), lease(T0 + 600)) == (60, 600)
    reconfigure(ctx, T0 + 600, ip4=replace(IP4, addr=addr.packed("192.0.2.9")))
    assert (lease(T0 + 600), lease(T0 + 700)) == (60, 100)


def test_refusal_by_way_of_a_relay_agent(ctx: Context) -> None:
    """It has the broadcast flag, for the agent to broadcast it (4.3.2)."""
    frame = send(ctx, replace(states(FOREIGN)["init-reboot"], giaddr=RELAY))
    assert goes_to(frame) == (GUEST_MAC, RELAY, 67)
    answer = Message.parse((frame or b"")[42:])
    assert (answer.flags, answer.giaddr, answer.options[dhcp.OPT_TYPE]) == (dhcp.BROADCAST, RELAY, bytes((dhcp.NAK,)))


def test_no_address_in_particular(ctx: Context) -> None:
    for message in (request(dhcp.REQUEST), request(dhcp.REQUEST, REQUESTED=addr.ANY4)):
        assert ask(ctx, message).yiaddr == GUEST4


@pytest.mark.parametrize("kind", [dhcp.DISCOVER, dhcp.REQUEST, dhcp.INFORM, dhcp.DECLINE, dhcp.RELEASE])
def test_identifier_of_another_server(ctx: Context, kind: int) -> None:
    """The client has chosen that server, and tells us by this (3.1); an answer would be in its way."""
    assert ignore(request(kind, SERVER_ID=FOREIGN), CONFIG)
    assert not ignore(request(kind, SERVER_ID=GATEWAY4), CONFIG)
    assert send(ctx, request(kind, SERVER_ID=FOREIGN, REQUESTED=FOREIGN)) is None


@pytest.mark.parametrize("name", ["REQUESTED", "SERVER_ID"])
def test_address_option_of_another_length(ctx: Context, name: str) -> None:
    with pytest.raises(Malformed, match="address option length"):
        send(ctx, request(dhcp.REQUEST, **{name: b"\xc0\0\2"}))


# INFORM, DECLINE, RELEASE ------------------------------------------------------------------------------------------


def test_inform() -> None:
    """Parameters for a client that has an address (4.3.5): to that address, with no other and no lease."""
    frame = send(make_context(**FULL), replace(request(dhcp.INFORM, flags=dhcp.BROADCAST), ciaddr=packed("192.0.2.77")))
    assert goes_to(frame) == (GUEST_MAC, packed("192.0.2.77"), 68)
    answer = Message.parse((frame or b"")[42:])
    assert (answer.ciaddr, answer.yiaddr) == (packed("192.0.2.77"), addr.ANY4)
    assert answer.options[dhcp.OPT_TYPE] == bytes((dhcp.ACK,))
    assert answer.options.keys() == {1, 3, 6, 26, 53, 54, 119}, "no lease time"


@pytest.mark.parametrize(
    ("src", "where"),
    [(packed("192.0.2.77"), (GUEST_MAC, packed("192.0.2.77"), 68)), (addr.ANY4, EVERYBODY)],
)
def test_inform_without_ciaddr(ctx: Context, src: bytes, where: tuple[bytes, bytes, int]) -> None:
    """The source of the packet says as well where the client is."""
    assert goes_to(send(ctx, request(dhcp.INFORM), src)) == where


@pytest.mark.parametrize("ciaddr", ["127.0.0.1", "224.0.0.1"])
def test_inform_of_an_address_that_no_client_has(ctx: Context, ciaddr: str) -> None:
    assert goes_to(send(ctx, replace(request(dhcp.INFORM), ciaddr=packed(ciaddr)))) == EVERYBODY


def test_decline_and_release(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer (4.3.3, 4.3.4); the user is told; the address is offered again, since there is no other."""
    decline = request(dhcp.DECLINE, REQUESTED=GUEST4, SERVER_ID=GATEWAY4)
    release = replace(request(dhcp.RELEASE, SERVER_ID=GATEWAY4), ciaddr=GUEST4)
    lines = heard(monkeypatch, ctx, decline, release, replace(decline, options={53: b"\4"}))
    assert lines == ["DHCP: the guest declines 192.0.2.2: another station uses it", "DHCP: release of 192.0.2.2"]
    assert ask(ctx, request()).yiaddr == GUEST4


# Identifier of the client (RFC 6842) -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [dhcp.DISCOVER, dhcp.REQUEST, dhcp.INFORM])
@pytest.mark.parametrize("length", [0, 1, 7, 255])
def test_client_identifier_comes_back(ctx: Context, kind: int, length: int) -> None:
    """Even the longest fits, with all that must be told, into the shortest answer."""
    ip4 = replace(IP4, gateway=FOREIGN, prefix_len=32, dns=DNS)
    message = request(kind, CLIENT_ID=b"x" * length, RAPID_COMMIT=b"", FQDN=b"\4\0\0")
    answer = ask(make_context(**{**LONG, "ip4": ip4}), message)
    assert answer.options[dhcp.OPT_CLIENT_ID] == b"x" * length
    assert {dhcp.OPT_MASK, dhcp.OPT_ROUTER, dhcp.OPT_ROUTES, dhcp.OPT_SERVER_ID} <= answer.options.keys()
    assert dhcp.OPT_CLIENT_ID not in ask(ctx, request(kind)).options


def test_client_identifier_that_is_too_long(ctx: Context) -> None:
    with pytest.raises(Malformed, match="client identifier length"):
        send(ctx, request(CLIENT_ID=bytes(256)))


def address_given(ctx: Context, message: Message) -> bytes | None:
    """The address that the sender of `message` has by the answer."""
    return Dhcp(ctx).tap_handler(GUEST_MAC, addr.ANY4, addr.BROADCAST4, 68, message.emit(), T0)


def test_a_client_has_the_address_that_it_was_given() -> None:
    """It is reached there before it speaks. An offer may be refused, and a relay agent asks for others."""
    asked = replace(request(dhcp.REQUEST, REQUESTED=GUEST4), chaddr=GUEST_MAC)
    discover = replace(request(RAPID_COMMIT=b""), chaddr=GUEST_MAC)
    for message in (asked, discover, replace(request(None), chaddr=GUEST_MAC)):
        assert address_given(make_context(), message) == GUEST4
    for message in (
        replace(request(), chaddr=GUEST_MAC),
        replace(asked, chaddr=CHADDR_MAC),
        replace(asked, giaddr=RELAY),
        replace(request(dhcp.REQUEST, REQUESTED=FOREIGN), chaddr=GUEST_MAC),
        replace(request(dhcp.INFORM), chaddr=GUEST_MAC, ciaddr=GUEST4),
        replace(request(dhcp.RELEASE), chaddr=GUEST_MAC, ciaddr=GUEST4),
    ):
        assert address_given(make_context(), message) is None


def test_rapid_commit(ctx: Context) -> None:
    answer = ask(ctx, request(RAPID_COMMIT=b""))
    assert answer.options[dhcp.OPT_TYPE] == bytes((dhcp.ACK,))
    assert answer.options[dhcp.OPT_RAPID_COMMIT] == b""
    assert dhcp.OPT_RAPID_COMMIT not in ask(ctx, request(dhcp.REQUEST, RAPID_COMMIT=b"")).options
    assert dhcp.OPT_RAPID_COMMIT not in ask(ctx, request()).options


FULL: dict[str, Any] = {
    "ip4": replace(IP4, dns=DNS),
    "mtu": 1500,
    "advertise_dns": True,
    "advertise_search": True,
    "dns_search": ("example.com", "a.example.com"),
}


def test_all_options() -> None:
    options = ask(make_context(**FULL), request()).options
    assert options == {
        1: MASK,
        3: GATEWAY4,
        6: DNS[0] + DNS[1],
        26: (1500).to_bytes(2, "big"),
        51: b"\xff" * 4,
        53: bytes((dhcp.OFFER,)),
        54: GATEWAY4,
        119: b"\x07example\x03com\0\x01a\xc0\0",
    }
    assert list(options) == sorted(options)


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"mtu": 0}, dhcp.OPT_MTU),
        ({"advertise_dns": False}, dhcp.OPT_DNS),
        ({"ip4": IP4}, dhcp.OPT_DNS),
        ({"advertise_search": False}, dhcp.OPT_SEARCH),
        ({"dns_search": ()}, dhcp.OPT_SEARCH),
    ],
)
def test_an_option_less(change: dict[str, Any], absent: int) -> None:
    whole = ask(make_context(**FULL), request()).options
    assert whole.keys() - ask(make_context(**{**FULL, **change}), request()).options.keys() == {absent}


@pytest.mark.parametrize(
    ("gateway", "prefix_len", "routes"),
    [
        ("192.0.2.1", 24, None),
        ("192.0.2.1", 32, "20 c0000201 00000000 00 c0000201"),
        ("198.51.100.1", 24, "20 c6336401 00000000 00 c6336401"),
        ("198.51.100.1", 0, None),
    ],
)
def test_gateway_outside_the_subnet(gateway: str, prefix_len: int, routes: str | None) -> None:
    ip4 = replace(IP4, gateway=packed(gateway), our_addr=packed(gateway), prefix_len=prefix_len)
    options = ask(make_context(ip4=ip4), request()).options
    assert options.get(dhcp.OPT_ROUTES) == (bytes.fromhex(routes) if routes else None)
    assert options[dhcp.OPT_ROUTER] == packed(gateway)
    assert options[dhcp.OPT_MASK] == addr.netmask(prefix_len)


# Order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "order"),
    [
        (b"", [1, 3, 26, 51, 53, 54]),
        (b"\x1a\x01", [53, 26, 1, 3, 51, 54]),
        (b"\x03\x01", [53, 1, 3, 26, 51, 54]),  # the mask before the router (RFC 2132, 3.3)
        (b"\x03\x35\x01", [1, 3, 53, 26, 51, 54]),
        (b"\x36\x03\x03\x36\x0c\xff\x00", [53, 54, 1, 3, 26, 51]),
    ],
)
def test_order(ctx: Context, wanted: bytes, order: list[int]) -> None:
    assert list(ask(ctx, request(PARAMETERS=wanted)).options) == order


@given(st.dictionaries(st.integers(1, 254), st.binary(max_size=4)), st.binary(max_size=40))
def test_order_loses_nothing(options: dict[int, bytes], wanted: bytes) -> None:
    assert ordered(options, wanted) == options


def test_order_of_a_list_of_any_length(ctx: Context) -> None:
    """There are no more than 254 codes; a list of 60 KiB costs no more than one of these."""
    long = bytes((dhcp.OPT_MTU,)) * 255 + bytes((dhcp.OPT_SERVER_ID,)) * 60000
    assert list(ask(ctx, request(PARAMETERS=long)).options) == [53, 26, 1, 3, 51, 54]


# Size --------------------------------------------------------------------------------------------------------------


def names(count: int, length: int = 60) -> tuple[str, ...]:
    return tuple(f"{i:0{length}}.example" for i in range(count))


@pytest.mark.parametrize("limit", [None, 300, 576, 700, 1500, 65535])
def test_never_longer_than_the_client_takes(limit: int | None) -> None:
    search = names(12)
    ctx = make_context(**{**FULL, "dns_search": search})
    message = request() if limit is None else request(MAX_SIZE=limit.to_bytes(2, "big"))
    frame = send(ctx, message)
    assert frame is not None
    assert len(frame) - 14 <= max(576, limit or 0)
    options = Message.parse(frame[42:]).options
    told = domain.decode_list(options[dhcp.OPT_SEARCH])
    assert told == search[: len(told)]
    assert told == search if limit and limit >= 1500 else 0 < len(told) < 12


def test_a_name_that_does_not_fit() -> None:
    servers = replace(IP4, dns=tuple(packed(f"192.0.2.{i}") for i in range(60)))
    answer = ask(make_context(**{**FULL, "ip4": servers, "dns_search": names(1)}), request())
    assert dhcp.OPT_SEARCH not in answer.options
    assert len(answer.options[dhcp.OPT_DNS]) == 240


LONG = {
    **FULL,
    "hostname": f"{'h' * 60}." * 3 + "h" * 60,
    "fqdn": f"{'f' * 60}." * 3 + "f" * 60,
    "dns_search": names(6),
}


@pytest.mark.parametrize(
    ("message", "left_out"),
    [
        (request(MAX_SIZE=b"\xff\xff", FQDN=b"\4\0\0"), set()),
        (request(FQDN=b"\4\0\0"), {dhcp.OPT_SEARCH, dhcp.OPT_FQDN}),
        (request(dhcp.REQUEST, FQDN=b"\4\0\0", RAPID_COMMIT=b""), {dhcp.OPT_SEARCH, dhcp.OPT_FQDN}),
        (request(None, FQDN=b"\4\0\0"), {dhcp.OPT_SEARCH, dhcp.OPT_FQDN, dhcp.OPT_HOSTNAME}),
    ],
)
def test_what_does_not_fit_is_left_out_in_order(message: Message, left_out: set[int]) -> None:
    whole = {1, 3, 6, 12, 26, 81, 119} | (set() if message.options.get(dhcp.OPT_TYPE) is None else {51, 53, 54})
    assert ask(make_context(**LONG), message).options.keys() == whole - left_out


@pytest.mark.parametrize("kind", [None, dhcp.DISCOVER, dhcp.REQUEST])
def test_what_must_be_told_fits_into_the_shortest_answer(kind: int | None) -> None:
    """Even where the gateway is outside the subnet, and there are more resolvers than options allow."""
    servers = tuple(packed(f"192.0.2.{i}") for i in range(75))
    ip4 = replace(IP4, dns=servers, gateway=packed("198.51.100.1"), prefix_len=32)
    answer = ask(make_context(**{**LONG, "ip4": ip4}), request(kind, RAPID_COMMIT=b"", FQDN=b"\4\0\0"))
    assert {dhcp.OPT_MASK, dhcp.OPT_ROUTER, dhcp.OPT_ROUTES} <= answer.options.keys()


@pytest.mark.parametrize(("mtu", "longest"), [(1280, 1280), (576, 576), (68, 576), (0, 65535)])
def test_not_longer_than_the_link_takes(mtu: int, longest: int) -> None:
    """The client may say that it takes more than the MTU; and 576 bytes anyway."""
    frame = send(make_context(**{**LONG, "dns_search": names(30), "mtu": mtu}), request(MAX_SIZE=b"\xff\xff"))
    assert frame is not None
    assert len(frame) - 14 <= longest
    assert (len(frame) > 2000) == (mtu == 0)


# Logs, and bad input -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (request(), "DHCP: offer to discover"),
        (request(RAPID_COMMIT=b""), "DHCP: ack to discover (Rapid Commit)"),
        (request(dhcp.REQUEST), "DHCP: ack to request"),
        (request(None), "BOOTP: ack to request"),
        (request(dhcp.INFORM), "DHCP: ack to inform"),
        (request(dhcp.REQUEST, REQUESTED=FOREIGN), "DHCP: nak to request for 10.0.0.1"),
    ],
)
def test_log(ctx: Context, monkeypatch: pytest.MonkeyPatch, message: Message, line: str) -> None:
    assert heard(monkeypatch, ctx, message) == [line, "    from 52:54:00:12:34:56"]


def heard(monkeypatch: pytest.MonkeyPatch, ctx: Context, *messages: Message) -> list[str]:
    """The log of messages that come at the same time."""
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    for message in messages:
        send(ctx, message)
    return lines


def test_a_flood_from_many_clients(ctx: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    """All clients have an answer, no state is kept, and the log does not grow with them."""
    server = Dhcp(ctx)
    monkeypatch.setattr(log, "_held", {})
    lines: list[str] = []
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    for number in range(1000):
        mac = b"\x02\0\0\0" + number.to_bytes(2, "big")
        message = replace(request(), chaddr=mac + bytes(10), xid=number)
        server.tap_handler(mac, addr.ANY4, addr.BROADCAST4, 68, message.emit(), T0)
        frame = link(ctx).take_one()
        answer = Message.parse(frame[42:])
        assert (frame[:6], answer.chaddr[:6], answer.xid, answer.yiaddr) == (mac, mac, number, GUEST4)
    assert vars(server).keys() == {"_ctx", "_quiet"}
    assert len(log._held) == 1
    assert lines == ["DHCP: offer to discover", "    from 02:00:00:00:00:00"]


@given(st.binary(max_size=80))
def test_answers_or_malformed(tail: bytes) -> None:
    ctx = make_context(**FULL)
    try:
        Dhcp(ctx).tap_handler(GUEST_MAC, GUEST4, GATEWAY4, 68, request(None).emit()[:240] + tail, T0)
    except Malformed:
        assert link(ctx).take() == []
        return
    for frame in link(ctx).take():
        assert frame == recomputed(frame)
        assert frame[6:12] == OUR_MAC
