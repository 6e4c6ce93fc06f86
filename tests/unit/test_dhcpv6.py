"""DHCPv6: one address for whoever asks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import log
from passt.addr import packed
from passt.dhcpv6 import REFUSED_MAX, RULES, Dhcpv6, ignore
from passt.flow.context import Context
from passt.wire import dhcpv6, domain
from passt.wire.cursor import Malformed
from passt.wire.dhcpv6 import Ia, IaAddress, Message

from .oracle import dissect, recomputed
from .support import CONFIG, GUEST6, GUEST_LL, GUEST_MAC, IP6, OUR_MAC, T0, link, make_context

GROUP = packed("ff02::1:2")
OTHER = packed("2001:db8:1::9")
CLIENT = dhcpv6.OPT_CLIENT_ID, b"\0\3\0\1" + GUEST_MAC
DNS = packed("2001:db8::53"), packed("2001:db8::54")
XID = b"\xab\xcd\xef"

ADDRESS = IaAddress(GUEST6).emit()
ASKED = Ia(0x1234, (), 0, 0).emit()
NAMED = Ia(0x1234, (ADDRESS,), 0, 0).emit()
WRONG = Ia(0x1234, (IaAddress(OTHER).emit(),), 3600, 5400).emit()

CODE = {
    name: getattr(dhcpv6, name) for name in ("SOLICIT", "REQUEST", "RENEW", "CONFIRM", "REBIND", "INFORMATION_REQUEST")
}


class Talk:
    """A client and the server."""

    def __init__(self, **changes: Any) -> None:
        self.ctx: Context = make_context(**changes)
        self.server = Dhcpv6(self.ctx)
        self.seen: bytes | None = None

    def send(
        self,
        kind: int,
        *options: dhcpv6.Option,
        server_id: bytes | None = b"",
        dst: bytes = GROUP,
        client: dhcpv6.Option = CLIENT,
    ) -> bytes | None:
        """The answering frame. The server identifier is what the message type calls for unless given."""
        if server_id == b"":
            server_id = self.server.server_id if kind in (dhcpv6.REQUEST, dhcpv6.RENEW) else None
        theirs = () if server_id is None else ((dhcpv6.OPT_SERVER_ID, server_id),)
        message = Message(kind, XID, (client, *theirs, *options))
        self.seen = self.server.tap_handler(GUEST_MAC, GUEST_LL, dst, 546, message.emit(), T0)
        frames = link(self.ctx).take()
        assert (self.seen is None) == (not frames)
        if not frames:
            return None
        (frame,) = frames
        assert frame == recomputed(frame)
        dissect(frame)
        return frame

    def ask(self, kind: int, *options: dhcpv6.Option, server_id: bytes | None = b"") -> Message:
        frame = self.send(kind, *options, server_id=server_id)
        assert frame is not None
        return Message.parse(frame[14 + 40 + 8 :])


# Who is answered ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (dhcpv6.SOLICIT, dhcpv6.ADVERTISE),
        (dhcpv6.REQUEST, dhcpv6.REPLY),
        (dhcpv6.RENEW, dhcpv6.REPLY),
        (dhcpv6.CONFIRM, dhcpv6.REPLY),
        (dhcpv6.REBIND, dhcpv6.REPLY),
        (dhcpv6.INFORMATION_REQUEST, dhcpv6.REPLY),
    ],
)
def test_answers(kind: int, answer: int) -> None:
    talk = Talk()
    message = talk.ask(kind)
    assert (message.kind, message.transaction) == (answer, XID)
    assert talk.seen == GUEST6


@pytest.mark.parametrize("kind", sorted(set(range(256)) - set(RULES) - {dhcpv6.RELAY_FORW, dhcpv6.RELAY_REPL}))
def test_other_types(kind: int) -> None:
    assert Talk().send(kind) is None


@pytest.mark.parametrize(
    ("kind", "none", "ours", "other"),
    [
        ("SOLICIT", True, False, False),
        ("REQUEST", False, True, False),
        ("RENEW", False, True, False),
        ("CONFIRM", True, False, False),
        ("REBIND", True, False, False),
        ("INFORMATION_REQUEST", True, True, False),
    ],
)
def test_server_identifier(kind: str, none: bool, ours: bool, other: bool) -> None:
    """RFC 8415, 16."""
    talk = Talk()
    assert (talk.send(CODE[kind], server_id=None) is not None) is none
    assert (talk.send(CODE[kind], server_id=talk.server.server_id) is not None) is ours
    assert (talk.send(CODE[kind], server_id=b"\0\3\0\1abcdef") is not None) is other


def test_unicast_is_not_answered() -> None:
    assert Talk().send(dhcpv6.SOLICIT, dst=IP6.our_ll) is None


@pytest.mark.parametrize(("length", "answered"), [(1, True), (128, True), (129, False)])
def test_client_identifier_length(length: int, answered: bool) -> None:
    message = Message(dhcpv6.SOLICIT, XID, ((dhcpv6.OPT_CLIENT_ID, bytes(length)),))
    assert ignore(message, GROUP, b"server", CONFIG) is not answered


def test_no_client_identifier() -> None:
    assert ignore(Message(dhcpv6.SOLICIT, XID), GROUP, b"server", CONFIG)


@pytest.mark.parametrize("ia", [ASKED, Ia(1, (), 0, 0, True).emit()])
def test_information_request_asks_for_no_address(ia: dhcpv6.Option) -> None:
    assert Talk().send(dhcpv6.INFORMATION_REQUEST, ia) is None


@pytest.mark.parametrize("change", [{"no_dhcpv6": True}, {"ip6": None}, {"ip6": replace(IP6, addr=None)}])
def test_off(change: dict[str, Any]) -> None:
    assert Talk(**change).send(dhcpv6.SOLICIT, ASKED) is None


# What they are told ------------------------------------------------------------------------------------------------


def test_advertise() -> None:
    frame = Talk().send(dhcpv6.SOLICIT, ASKED)
    assert frame is not None
    packet = dissect(frame)
    assert (packet.src, packet.dst) == ("9a:55:9a:55:9a:55", "52:54:00:12:34:56")
    assert (packet["IPv6"].src, packet["IPv6"].dst, packet["IPv6"].hlim) == ("fe80::1", "fe80::5054:ff:fe12:3456", 255)
    assert packet["IPv6"].fl == 0xBCDEF, "the flow label is of the transaction"
    assert (packet["UDP"].sport, packet["UDP"].dport) == (547, 546)
    assert packet["DHCP6_Advertise"].trid == 0xABCDEF
    assert packet["DHCP6OptServerId"].duid.lladdr == "9a:55:9a:55:9a:55"
    association = packet["DHCP6OptIA_NA"]
    assert (association.iaid, association.T1, association.T2) == (0x1234, 0xFFFFFFFF, 0xFFFFFFFF)
    (address,) = association.ianaopts
    assert (address.addr, address.preflft, address.validlft) == ("2001:db8::2", 0xFFFFFFFF, 0xFFFFFFFF)


def test_server_identifier_is_a_duid_llt() -> None:
    server_id = Talk().server.server_id
    assert server_id[:4] == bytes.fromhex("00010001")
    assert server_id[8:] == OUR_MAC


FULL: dict[str, Any] = {
    "ip6": replace(IP6, dns=DNS),
    "advertise_dns": True,
    "advertise_search": True,
    "dns_search": ("example.com", "a.example.com"),
}


def test_options_in_order() -> None:
    talk = Talk(**FULL)
    assert talk.ask(dhcpv6.REQUEST, NAMED).options == (
        (dhcpv6.OPT_SERVER_ID, talk.server.server_id),
        Ia(0x1234, (ADDRESS,)).emit(),
        CLIENT,
        (dhcpv6.OPT_DNS, DNS[0] + DNS[1]),
        (dhcpv6.OPT_SEARCH, b"\x07example\x03com\0\x01a\x07example\x03com\0"),
    )


@pytest.mark.parametrize(
    ("change", "absent"),
    [
        ({"advertise_dns": False}, dhcpv6.OPT_DNS),
        ({"ip6": IP6}, dhcpv6.OPT_DNS),
        ({"advertise_search": False}, dhcpv6.OPT_SEARCH),
        ({"dns_search": ()}, dhcpv6.OPT_SEARCH),
    ],
)
def test_an_option_less(change: dict[str, Any], absent: int) -> None:
    whole = {code for code, _ in Talk(**FULL).ask(dhcpv6.SOLICIT).options}
    assert whole - {code for code, _ in Talk(**{**FULL, **change}).ask(dhcpv6.SOLICIT).options} == {absent}


NAME = b"\x02vm\x07example\0"


@pytest.mark.parametrize(
    ("theirs", "told"),
    [
        ((), None),
        (((dhcpv6.OPT_REQUESTED, b"\0\x17\0\x27"),), b"\4" + NAME),
        (((dhcpv6.OPT_FQDN, b"\0\3foo"),), b"\4" + NAME),
        (((dhcpv6.OPT_FQDN, b"\1\3foo"),), b"\6" + NAME),  # S: overridden
        (((dhcpv6.OPT_FQDN, b"\xf4"),), b"\4" + NAME),  # N: nor would we; flags that must be zero are not answered
    ],
)
@pytest.mark.parametrize("kind", ["SOLICIT", "REQUEST", "INFORMATION_REQUEST"])
def test_name_of_the_guest(kind: str, theirs: dhcpv6.Options, told: bytes | None) -> None:
    options = Talk(fqdn="vm.example").ask(CODE[kind], *theirs).options
    assert dhcpv6.find(options, dhcpv6.OPT_FQDN) == told
    assert dhcpv6.find(Talk().ask(CODE[kind], *theirs).options, dhcpv6.OPT_FQDN) is None


@pytest.mark.parametrize(("mtu", "count"), [(1280, 4), (1500, 5), (65520, 6), (0, 6)])
def test_search_list_that_does_not_fit(mtu: int, count: int) -> None:
    domains = tuple(f"{i}" + f".{'d' * 59}" * 3 for i in range(6))  # 184 bytes each
    fqdn = dhcpv6.OPT_FQDN, b"\0"
    talk = Talk(**{**FULL, "mtu": mtu, "dns_search": domains, "fqdn": f"{'f' * 63}." * 3 + "f" * 61})
    frame = talk.send(dhcpv6.SOLICIT, fqdn)
    assert frame is not None
    assert len(frame) - 14 <= (mtu or 65535)
    options = Message.parse(frame[62:]).options
    assert domain.decode_list(dhcpv6.find(options, dhcpv6.OPT_SEARCH) or b"") == domains[:count]


def test_information() -> None:
    codes = [code for code, _ in Talk(**FULL).ask(dhcpv6.INFORMATION_REQUEST).options]
    assert codes == [dhcpv6.OPT_SERVER_ID, dhcpv6.OPT_CLIENT_ID, dhcpv6.OPT_DNS, dhcpv6.OPT_SEARCH]


@pytest.mark.parametrize("kind", ["SOLICIT", "REQUEST", "RENEW", "CONFIRM", "REBIND"])
def test_address_though_none_was_asked_for(kind: str) -> None:
    assert Talk().ask(CODE[kind]).options[1] == Ia(1, (ADDRESS,)).emit()


@pytest.mark.parametrize("kind", ["REQUEST", "RENEW", "CONFIRM"])
def test_not_on_link(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    lines = heard(monkeypatch)
    talk = Talk(**FULL)
    message = talk.ask(CODE[kind], WRONG)
    status = dhcpv6.OPT_STATUS, b"\0\4Prefix not appropriate for link."
    assert message.options == (
        (dhcpv6.OPT_SERVER_ID, talk.server.server_id),
        Ia(0x1234, (status,), 3600, 5400).emit(),
        CLIENT,
    )
    assert lines[0] == "DHCPv6: requested address 2001:db8:1::9 not on link"


def test_temporary_address_not_on_link() -> None:
    wrong = Ia(5, (IaAddress(OTHER).emit(),), 0, 0, True).emit()
    (_, found, _) = Talk().ask(dhcpv6.REQUEST, NAMED, wrong).options
    assert Ia.parse(found).iaid == 5
    assert found[0] == dhcpv6.OPT_IA_TA


@pytest.mark.parametrize("wrong", [WRONG, Ia(5, (IaAddress(OTHER).emit(),), 0, 0, True).emit()])
def test_more_wrong_associations_than_an_answer_holds(monkeypatch: pytest.MonkeyPatch, wrong: dhcpv6.Option) -> None:
    lines = heard(monkeypatch)
    talk = Talk(mtu=1280)
    longest = dhcpv6.OPT_CLIENT_ID, b"\0\2\0\0\0\1".ljust(dhcpv6.DUID_MAX, b"x")  # DUID-EN (RFC 8415, 11.3)
    frame = talk.send(dhcpv6.CONFIRM, *(wrong,) * 1400, client=longest)
    assert frame is not None
    assert len(frame) - 14 <= 1280
    assert len(Message.parse(frame[62:]).options) == 2 + REFUSED_MAX
    assert len(lines) == 2


@pytest.mark.parametrize("kind", ["SOLICIT", "REBIND"])
def test_hint_is_no_demand(kind: str) -> None:
    assert Talk().ask(CODE[kind], WRONG).options[1] == Ia(0x1234, (ADDRESS,)).emit()


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        ("SOLICIT", "DHCPv6: received SOLICIT, sending ADVERTISE"),
        ("REQUEST", "DHCPv6: received REQUEST, sending REPLY"),
        ("INFORMATION_REQUEST", "DHCPv6: received INFORMATION_REQUEST, sending REPLY"),
    ],
)
def test_log(monkeypatch: pytest.MonkeyPatch, kind: str, line: str) -> None:
    lines = heard(monkeypatch)
    Talk().send(CODE[kind])
    assert lines == [line]


def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged from now on."""
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    return lines


# Bad input ---------------------------------------------------------------------------------------------------------


def test_association_that_lies() -> None:
    with pytest.raises(Malformed, match="truncated"):
        Talk().send(dhcpv6.REQUEST, (dhcpv6.OPT_IA_NA, bytes(12) + b"\0\5\0\xff"))


@given(st.sampled_from(sorted(RULES)), st.binary(max_size=64))
def test_answers_or_malformed(kind: int, tail: bytes) -> None:
    talk = Talk(**FULL)
    payload = Message(kind, XID, (CLIENT,)).emit() + tail
    try:
        talk.server.tap_handler(GUEST_MAC, GUEST_LL, GROUP, 546, payload, T0)
    except Malformed:
        assert link(talk.ctx).take() == []
        return
    for frame in link(talk.ctx).take():
        assert frame == recomputed(frame)
