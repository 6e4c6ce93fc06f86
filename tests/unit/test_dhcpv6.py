"""DHCPv6: one address for all clients."""

from __future__ import annotations

import struct
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import log
from passt.addr import packed
from passt.dhcpv6 import ASSOCIATIONS_MAX, RULES, TEXTS, WITHDRAWN_MAX, Dhcpv6, ignore
from passt.flow.context import Context
from passt.wire import dhcpv6, domain
from passt.wire.cursor import Malformed
from passt.wire.dhcpv6 import Ia, IaAddress, Message, Prefix

from .oracle import dissect, recomputed
from .support import CONFIG, GUEST6, GUEST_LL, GUEST_MAC, IP6, OUR_MAC, T0, link, make_context, reconfigure

GROUP = packed("ff02::1:2")
OTHER = packed("2001:db8:1::9")
CLIENT = dhcpv6.OPT_CLIENT_ID, b"\0\3\0\1" + GUEST_MAC
DNS = packed("2001:db8::53"), packed("2001:db8::54")
XID = b"\xab\xcd\xef"

ADDRESS = IaAddress(GUEST6).emit()
ASKED = Ia(0x1234, (), 0, 0).emit()
NAMED = Ia(0x1234, (ADDRESS,), 0, 0).emit()
WRONG = Ia(0x1234, (IaAddress(OTHER).emit(),), 3600, 5400).emit()
NEAR = packed("2001:db8::9")  # of the link, but not the one that is assigned
RAPID = dhcpv6.OPT_RAPID_COMMIT, b""
DELEGATED = packed("2001:db8:5::")

CODE = {
    **{name: getattr(dhcpv6, name) for name in ("SOLICIT", "REQUEST", "RENEW", "CONFIRM", "REBIND")},
    **{name: getattr(dhcpv6, name) for name in ("RELEASE", "DECLINE", "INFORMATION_REQUEST")},
}
TO_US = frozenset((dhcpv6.REQUEST, dhcpv6.RENEW, dhcpv6.RELEASE, dhcpv6.DECLINE))


def ia(*addresses: bytes, iaid: int = 0x1234, code: int = dhcpv6.OPT_IA_NA) -> dhcpv6.Option:
    """An association for these addresses, as a client sends it."""
    return Ia(iaid, tuple(IaAddress(a, 3600, 7200).emit() for a in addresses), 900, 1800, code).emit()


def pd(*prefixes: bytes, iaid: int = 9) -> dhcpv6.Option:
    """An association for these prefixes of 56 bits."""
    return Ia(iaid, tuple(Prefix(p, 56, 3600, 7200).emit() for p in prefixes), 900, 1800, dhcpv6.OPT_IA_PD).emit()


def with_status(code: int, iaid: int = 0x1234, kind: int = dhcpv6.OPT_IA_NA) -> dhcpv6.Option:
    """An association that holds a status and nothing else."""
    return Ia(iaid, (dhcpv6.status(code, TEXTS[code]),), 0, 0, kind).emit()


def gone(*addresses: bytes) -> dhcpv6.Options:
    """Addresses that the client gives up."""
    return tuple(IaAddress(a, 0, 0).emit() for a in addresses)


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
        client: dhcpv6.Option | None = CLIENT,
        src: bytes = GUEST_LL,
    ) -> bytes | None:
        """The answering frame. The server identifier is what the message type calls for unless given."""
        if server_id == b"":
            server_id = self.server.server_id if kind in TO_US else None
        theirs = () if server_id is None else ((dhcpv6.OPT_SERVER_ID, server_id),)
        message = Message(kind, XID, (*((client,) if client else ()), *theirs, *options))
        self.seen = self.server.tap_handler(GUEST_MAC, src, dst, 546, message.emit(), T0)
        frames = link(self.ctx).take()
        if not frames:
            assert self.seen is None
            return None
        (frame,) = frames
        assert frame == recomputed(frame)
        dissect(frame)
        return frame

    def ask(self, kind: int, *options: dhcpv6.Option, **how: Any) -> Message:
        frame = self.send(kind, *options, **how)
        assert frame is not None
        return Message.parse(frame[14 + 40 + 8 :])

    def associations(self, kind: int, *options: dhcpv6.Option) -> dhcpv6.Options:
        """Those of the answer."""
        return tuple(o for o in self.ask(kind, *options).options if o[0] in dhcpv6.IA_CODES)


# Messages with an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        (dhcpv6.SOLICIT, dhcpv6.ADVERTISE),
        (dhcpv6.REQUEST, dhcpv6.REPLY),
        (dhcpv6.RENEW, dhcpv6.REPLY),
        (dhcpv6.CONFIRM, dhcpv6.REPLY),
        (dhcpv6.REBIND, dhcpv6.REPLY),
        (dhcpv6.RELEASE, dhcpv6.REPLY),
        (dhcpv6.DECLINE, dhcpv6.REPLY),
        (dhcpv6.INFORMATION_REQUEST, dhcpv6.REPLY),
    ],
)
def test_answers(kind: int, answer: int) -> None:
    message = Talk().ask(kind, *(() if kind == dhcpv6.INFORMATION_REQUEST else (NAMED,)))
    assert (message.kind, message.transaction) == (answer, XID)


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
        ("RELEASE", False, True, False),
        ("DECLINE", False, True, False),
        ("INFORMATION_REQUEST", True, True, False),
    ],
)
def test_server_identifier(kind: str, none: bool, ours: bool, other: bool) -> None:
    """RFC 8415, 16."""
    talk = Talk()
    options = () if kind == "INFORMATION_REQUEST" else (NAMED,)
    assert (talk.send(CODE[kind], *options, server_id=None) is not None) is none
    assert (talk.send(CODE[kind], *options, server_id=talk.server.server_id) is not None) is ours
    assert (talk.send(CODE[kind], *options, server_id=b"\0\3\0\1abcdef") is not None) is other


@pytest.mark.parametrize("kind", ["SOLICIT", "CONFIRM", "REBIND", "INFORMATION_REQUEST"])
def test_unicast_is_not_answered(kind: str) -> None:
    options = () if kind == "INFORMATION_REQUEST" else (NAMED,)
    assert Talk().send(CODE[kind], *options, dst=IP6.our_ll) is None


@pytest.mark.parametrize("kind", ["REQUEST", "RENEW", "RELEASE", "DECLINE"])
def test_unicast_to_the_server_that_did_not_offer_it(kind: str) -> None:
    """RFC 8415, 18.4: the status, the identifiers, and no more; the client sends it again to the group."""
    talk = Talk(**FULL)
    status = dhcpv6.status(dhcpv6.USE_MULTICAST, TEXTS[dhcpv6.USE_MULTICAST])
    message = talk.ask(CODE[kind], NAMED, dst=IP6.our_ll)
    assert (message.kind, message.options) == (
        dhcpv6.REPLY,
        ((dhcpv6.OPT_SERVER_ID, talk.server.server_id), CLIENT, status),
    )
    assert talk.seen is None
    assert talk.send(CODE[kind], NAMED, dst=IP6.our_ll, server_id=b"other") is None


@pytest.mark.parametrize("src", ["::", "ff02::1"])
def test_client_without_an_address(src: str) -> None:
    """Answers that no client or all clients would get."""
    assert Talk().send(dhcpv6.SOLICIT, ASKED, src=packed(src)) is None


@pytest.mark.parametrize(("length", "answered"), [(0, False), (1, True), (130, True), (131, False)])
@pytest.mark.parametrize("kind", ["SOLICIT", "INFORMATION_REQUEST"])
def test_client_identifier_length(kind: str, length: int, answered: bool) -> None:
    """RFC 8415, 11.1: 128 bytes besides the type."""
    message = Message(CODE[kind], XID, ((dhcpv6.OPT_CLIENT_ID, bytes(length)),))
    assert ignore(message, GUEST_LL, GROUP, b"server", CONFIG) is not answered


@pytest.mark.parametrize("kind", sorted(set(RULES) - {dhcpv6.INFORMATION_REQUEST}))
def test_no_client_identifier(kind: int) -> None:
    assert Talk().send(kind, NAMED, client=None) is None


@pytest.mark.parametrize("option", [ASKED, ia(code=dhcpv6.OPT_IA_TA), pd()])
def test_information_request_asks_for_no_address(option: dhcpv6.Option) -> None:
    assert Talk().send(dhcpv6.INFORMATION_REQUEST, option) is None


def test_information_without_client_identifier() -> None:
    """It need not have one (RFC 8415, 18.2.6); the answer has none then."""
    talk = Talk(**FULL)
    codes = [code for code, _ in talk.ask(dhcpv6.INFORMATION_REQUEST, client=None).options]
    assert codes == [dhcpv6.OPT_SERVER_ID, dhcpv6.OPT_DNS, dhcpv6.OPT_SEARCH]
    assert talk.seen is None, "the client has an address of its own choice"


@pytest.mark.parametrize("change", [{"no_dhcpv6": True}, {"ip6": None}, {"ip6": replace(IP6, addr=None)}])
def test_off(change: dict[str, Any]) -> None:
    assert Talk(**change).send(dhcpv6.SOLICIT, ASKED) is None


# Answers -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("quiet", "seconds"), [(0, 600), (599, 600), (3000, 3000), (1 << 20, 86400)])
def test_who_has_no_address_of_ours_asks_again_as_early(quiet: int, seconds: int) -> None:
    """RFC 8415, 21.23: resolvers change with the host's network. 600 s is the least that there is."""
    asks = dhcpv6.OPT_REQUESTED, struct.pack("!HH", dhcpv6.OPT_DNS, dhcpv6.OPT_REFRESH)
    talk = Talk(followed=True)
    talk.server._quiet._since = T0 - quiet
    frame = talk.send(dhcpv6.INFORMATION_REQUEST, asks)
    assert frame is not None
    assert dissect(frame)["DHCP6OptInfoRefreshTime"].reftime == seconds
    for kind, option, followed in (
        (dhcpv6.INFORMATION_REQUEST, (dhcpv6.OPT_REQUESTED, b"\0\x17"), True),
        (dhcpv6.INFORMATION_REQUEST, asks, False),
        (dhcpv6.REQUEST, asks, True),
    ):
        given = (ASKED,) if kind == dhcpv6.REQUEST else ()
        answer = Talk(followed=followed).ask(kind, option, *given)
        assert dhcpv6.find(answer.options, dhcpv6.OPT_REFRESH) is None


def test_lifetimes_are_short_where_the_network_is_followed() -> None:
    talk = Talk(followed=True)
    talk.server._quiet._since = T0 - 300
    for since, seconds in ((T0 - 300, 300), (T0, 60)):
        frame = talk.send(dhcpv6.SOLICIT, ASKED)
        assert frame is not None
        association = dissect(frame)["DHCP6OptIA_NA"]
        (address,) = association.ianaopts
        assert (address.preflft, address.validlft, association.T1, association.T2) == (seconds, seconds, 0, 0), since
        reconfigure(talk.ctx, T0, ip6=replace(IP6, addr=NEAR))


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
@pytest.mark.parametrize("kind", ["SOLICIT", "REQUEST", "INFORMATION_REQUEST", "RENEW", "REBIND"])
def test_name_of_the_guest(kind: str, theirs: dhcpv6.Options, told: bytes | None) -> None:
    options = Talk(fqdn="vm.example").ask(CODE[kind], *theirs).options
    assert dhcpv6.find(options, dhcpv6.OPT_FQDN) == told
    assert dhcpv6.find(Talk().ask(CODE[kind], *theirs).options, dhcpv6.OPT_FQDN) is None


@pytest.mark.parametrize(("mtu", "count"), [(1280, 4), (1500, 5), (65520, 6), (0, 6)])
def test_search_list_that_does_not_fit(mtu: int, count: int) -> None:
    domains = tuple(f"{i}" + f".{'d' * 59}" * 3 for i in range(6))  # 184 bytes each
    fqdn = dhcpv6.OPT_FQDN, b"\0"
    talk = Talk(**{**FULL, "mtu": mtu, "dns_search": domains, "fqdn": f"{'f' * 63}." * 3 + "f" * 61})
    frame = talk.send(dhcpv6.SOLICIT, ASKED, fqdn)
    assert frame is not None
    assert len(frame) - 14 <= (mtu or 65535)
    options = Message.parse(frame[62:]).options
    assert domain.decode_list(dhcpv6.find(options, dhcpv6.OPT_SEARCH) or b"") == domains[:count]


def test_information() -> None:
    codes = [code for code, _ in Talk(**FULL).ask(dhcpv6.INFORMATION_REQUEST).options]
    assert codes == [dhcpv6.OPT_SERVER_ID, dhcpv6.OPT_CLIENT_ID, dhcpv6.OPT_DNS, dhcpv6.OPT_SEARCH]


# Associations (RFC 8415, 18.3) -------------------------------------------------------------------------------------

ASKING = ["SOLICIT", "REQUEST", "RENEW", "REBIND"]


@pytest.mark.parametrize("kind", ASKING)
def test_the_address(kind: str) -> None:
    """Only an answer that assigns it tells what the guest has from now on."""
    talk = Talk()
    for option in (ASKED, NAMED):
        assert talk.associations(CODE[kind], option) == (Ia(0x1234, (ADDRESS,)).emit(),)
        assert talk.seen == (None if kind == "SOLICIT" else GUEST6)


@pytest.mark.parametrize("kind", ASKING)
def test_no_association_that_was_not_asked_for(kind: str) -> None:
    talk = Talk()
    assert talk.associations(CODE[kind]) == ()
    assert talk.seen is None


@pytest.mark.parametrize("kind", ASKING)
def test_second_association(kind: str) -> None:
    """There is one address. The association that has it keeps it, or else the first gets it; each has its answer."""
    none = with_status(dhcpv6.NO_ADDRS_AVAIL, iaid=2)
    first, second = Ia(1, (ADDRESS,)).emit(), Ia(2, (ADDRESS,)).emit()
    assert Talk().associations(CODE[kind], ia(iaid=1), ia(iaid=2)) == (first, none)
    other = with_status(dhcpv6.NO_ADDRS_AVAIL, iaid=1)
    assert Talk().associations(CODE[kind], ia(iaid=1), ia(GUEST6, iaid=2)) == (other, second)


@pytest.mark.parametrize("kind", ASKING)
def test_temporary_addresses_and_prefixes(kind: str) -> None:
    """We have none, and say it (18.3.2, 18.3.9); beside them the address is given."""
    talk = Talk()
    temporary = ia(iaid=5, code=dhcpv6.OPT_IA_TA)
    refusals = (
        with_status(dhcpv6.NO_ADDRS_AVAIL, 5, dhcpv6.OPT_IA_TA),
        with_status(dhcpv6.NO_PREFIX_AVAIL, 9, dhcpv6.OPT_IA_PD),
    )
    assert talk.associations(CODE[kind], temporary, pd()) == refusals
    assert talk.seen is None
    assert talk.associations(CODE[kind], temporary, pd(), ASKED) == (*refusals, Ia(0x1234, (ADDRESS,)).emit())


@pytest.mark.parametrize("wrong", [OTHER, NEAR])
def test_hint_is_no_demand(wrong: bytes) -> None:
    assert Talk().associations(dhcpv6.SOLICIT, ia(wrong)) == (Ia(0x1234, (ADDRESS,)).emit(),)


def test_request_for_an_address_of_another_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """18.3.2: that association has NotOnLink; others have what they ask for."""
    lines = heard(monkeypatch)
    talk = Talk()
    refused = with_status(dhcpv6.NOT_ON_LINK)
    assert talk.associations(dhcpv6.REQUEST, WRONG) == (refused,)
    assert talk.seen is None
    assert lines[0] == "DHCPv6: requested address 2001:db8:1::9 not on link"
    assert talk.associations(dhcpv6.REQUEST, WRONG, ia(iaid=2)) == (refused, Ia(2, (ADDRESS,)).emit())
    assert talk.associations(dhcpv6.REQUEST, ia(OTHER, code=dhcpv6.OPT_IA_TA)) == (
        with_status(dhcpv6.NOT_ON_LINK, kind=dhcpv6.OPT_IA_TA),
    )


def test_request_for_another_address_of_the_link() -> None:
    assert Talk().associations(dhcpv6.REQUEST, ia(NEAR)) == (Ia(0x1234, (ADDRESS,)).emit(),)


@pytest.mark.parametrize("kind", ["RENEW", "REBIND"])
@pytest.mark.parametrize("wrong", [OTHER, NEAR])
def test_extension_of_another_address(kind: str, wrong: bytes) -> None:
    """18.3.4, 18.3.5: the right one, and the wrong one with lifetime 0, so that the client changes over at once."""
    talk = Talk()
    assert talk.associations(CODE[kind], ia(wrong)) == (Ia(0x1234, (ADDRESS, *gone(wrong))).emit(),)
    assert talk.seen == GUEST6
    assert talk.associations(CODE[kind], ia(wrong, GUEST6)) == (Ia(0x1234, (ADDRESS, *gone(wrong))).emit(),)


@pytest.mark.parametrize("kind", ["RENEW", "REBIND"])
def test_extension_of_what_we_do_not_have(kind: str) -> None:
    found = Talk().associations(CODE[kind], NAMED, ia(NEAR, iaid=2), ia(NEAR, code=dhcpv6.OPT_IA_TA), pd(DELEGATED))
    assert found == (
        Ia(0x1234, (ADDRESS,)).emit(),
        Ia(2, gone(NEAR), 0, 0).emit(),
        Ia(0x1234, gone(NEAR), 0, 0, dhcpv6.OPT_IA_TA).emit(),
        Ia(9, (Prefix(DELEGATED, 56, 0, 0).emit(),), 0, 0, dhcpv6.OPT_IA_PD).emit(),
    )


@pytest.mark.parametrize(
    ("addresses", "status"),
    [
        ((GUEST6,), dhcpv6.SUCCESS),
        ((NEAR,), dhcpv6.SUCCESS),
        ((OTHER,), dhcpv6.NOT_ON_LINK),
        ((GUEST6, OTHER), dhcpv6.NOT_ON_LINK),
    ],
)
@pytest.mark.parametrize("code", [dhcpv6.OPT_IA_NA, dhcpv6.OPT_IA_TA])
def test_confirm(addresses: tuple[bytes, ...], status: int, code: int) -> None:
    """18.3.3: a status for the message, no association. It is about the link, not about what is assigned."""
    talk = Talk(**FULL)
    message = talk.ask(dhcpv6.CONFIRM, ia(*addresses, code=code))
    told = dhcpv6.status(status, TEXTS[status])
    assert message.options == ((dhcpv6.OPT_SERVER_ID, talk.server.server_id), CLIENT, told)
    assert talk.seen == (GUEST6 if addresses == (GUEST6,) else None)


@pytest.mark.parametrize("options", [(), (ASKED,), (pd(DELEGATED),)])
def test_nothing_to_confirm(options: dhcpv6.Options) -> None:
    """18.3.3: no answer, rather than a success that was not asked for."""
    assert Talk().send(dhcpv6.CONFIRM, *options) is None


@pytest.mark.parametrize("kind", ["RELEASE", "DECLINE"])
def test_release_and_decline(kind: str) -> None:
    """18.3.7, 18.3.8: success for the message, NoBinding for associations that do not have the address."""
    talk = Talk(**FULL)
    success = dhcpv6.status(dhcpv6.SUCCESS, "")
    server = dhcpv6.OPT_SERVER_ID, talk.server.server_id
    assert talk.ask(CODE[kind], NAMED).options == (server, CLIENT, success)
    assert talk.seen is None
    unknown = (ia(NEAR, iaid=2), ia(GUEST6, iaid=3, code=dhcpv6.OPT_IA_TA), pd(DELEGATED))
    assert talk.ask(CODE[kind], NAMED, *unknown).options == (
        server,
        with_status(dhcpv6.NO_BINDING, 2),
        with_status(dhcpv6.NO_BINDING, 3, dhcpv6.OPT_IA_TA),
        with_status(dhcpv6.NO_BINDING, 9, dhcpv6.OPT_IA_PD),
        CLIENT,
        success,
    )
    assert talk.associations(dhcpv6.SOLICIT, ASKED) == (Ia(0x1234, (ADDRESS,)).emit(),), "it is given again"


def test_decline_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = heard(monkeypatch)
    Talk().send(dhcpv6.DECLINE, NAMED)
    assert lines == [
        "DHCPv6: the guest declines 2001:db8::2: another station uses it",
        "DHCPv6: received DECLINE, sending REPLY",
    ]


def test_rapid_commit() -> None:
    """18.3.1: the address at once, if the client wants that; not in answer to what is no SOLICIT."""
    talk = Talk(**FULL)
    message = talk.ask(dhcpv6.SOLICIT, ASKED, RAPID)
    assert message.kind == dhcpv6.REPLY
    assert message.options[:4] == (
        (dhcpv6.OPT_SERVER_ID, talk.server.server_id),
        Ia(0x1234, (ADDRESS,)).emit(),
        CLIENT,
        RAPID,
    )
    assert talk.seen == GUEST6
    for kind in ("REQUEST", "RENEW", "REBIND"):
        assert RAPID not in talk.ask(CODE[kind], ASKED, RAPID).options
    assert RAPID not in talk.ask(dhcpv6.SOLICIT, ASKED).options


def test_preference() -> None:
    """An advertisement ends the client's wait for other servers (18.2.1, 18.2.9), which takes a second."""
    assert dhcpv6.find(Talk().ask(dhcpv6.SOLICIT, ASKED).options, dhcpv6.OPT_PREFERENCE) == b"\xff"
    for kind in ("REQUEST", "RENEW", "REBIND"):
        assert dhcpv6.find(Talk().ask(CODE[kind], ASKED).options, dhcpv6.OPT_PREFERENCE) is None


FILLED = [
    ia(*(OTHER[:15] + bytes((i,)) for i in range(dhcpv6.NESTED_MAX))),
    ia(*(GUEST6[:15] + bytes((i,)) for i in range(dhcpv6.NESTED_MAX)), code=dhcpv6.OPT_IA_TA),
    pd(*(DELEGATED for _ in range(dhcpv6.NESTED_MAX))),
    ASKED,
]


@pytest.mark.parametrize("kind", ["SOLICIT", "REQUEST", "RENEW", "REBIND", "RELEASE", "DECLINE", "CONFIRM"])
@pytest.mark.parametrize("option", FILLED)
def test_more_associations_than_an_answer_holds(kind: str, option: dhcpv6.Option) -> None:
    talk = Talk(mtu=1280, fqdn=f"{'f' * 63}." * 3 + "f" * 61, advertise_dns=True, ip6=replace(IP6, dns=DNS))
    longest = dhcpv6.OPT_CLIENT_ID, b"\0\2\0\0\0\1".ljust(dhcpv6.DUID_MAX, b"x")  # DUID-EN (RFC 8415, 11.3)
    many = (option,) * (dhcpv6.OPTIONS_MAX - 3)
    frame = talk.send(CODE[kind], (dhcpv6.OPT_FQDN, b"\0"), *many, client=longest)
    if frame is None:
        assert kind == "CONFIRM"
        return
    assert len(frame) - 14 <= 1280
    found = [Ia.parse(o) for o in Message.parse(frame[62:]).options if o[0] in dhcpv6.IA_CODES]
    assert len(found) == (0 if kind == "CONFIRM" else ASSOCIATIONS_MAX)
    leases = [o for i in found for o in i.options if o[0] in (dhcpv6.OPT_IA_ADDRESS, dhcpv6.OPT_IA_PREFIX)]
    assert len(leases) <= WITHDRAWN_MAX + 1


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
    """Log lines from now on."""
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "info", lines.append)
    monkeypatch.setattr(log, "say", lambda level, text: lines.append(text))
    return lines


# Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", sorted(dhcpv6.IA_CODES))
@pytest.mark.parametrize("value", [bytes(12) + b"\0\5\0\xff", bytes(12) + b"\0\5\0\0", b"abc"])
def test_association_that_lies(code: int, value: bytes) -> None:
    value = value[:4] + value[12:] if code == dhcpv6.OPT_IA_TA else value
    value = value.replace(b"\0\5\0", b"\0\x1a\0") if code == dhcpv6.OPT_IA_PD else value
    with pytest.raises(Malformed, match="truncated"):
        Talk().send(dhcpv6.RENEW, (code, value))


@pytest.mark.parametrize("option", [(16, b""), (1, b"abc"), ASKED, WRONG])
def test_as_many_options_as_a_message_holds(option: dhcpv6.Option) -> None:
    """15 000 of them cost no more than the first few."""
    with pytest.raises(Malformed, match="too many options"):
        Talk().send(dhcpv6.REBIND, *(option,) * (60000 // (4 + len(option[1]))))


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
