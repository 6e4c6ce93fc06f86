"""DHCPv6 messages and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp6 import (
    DUID_LLT,
    DHCP6_Reply,
    DHCP6OptClientFQDN,
    DHCP6OptClientId,
    DHCP6OptIA_NA,
    DHCP6OptIA_PD,
    DHCP6OptIA_TA,
    DHCP6OptIAAddress,
    DHCP6OptIAPrefix,
    DHCP6OptServerId,
    DHCP6OptStatusCode,
)

from passt.addr import packed
from passt.drops import Drop
from passt.wire import dhcpv6
from passt.wire.cursor import Cursor, Malformed
from passt.wire.dhcpv6 import Fqdn, Ia, IaAddress, Message, Prefix

ADDRESS = packed("2001:db8::2")
MAC = bytes.fromhex("9a559a559a55")

ADDRESS_LITERAL = "20010db8000000000000000000000002 ffffffff ffffffff"
IA_NA_LITERAL = "0003 0028 00000007 ffffffff ffffffff" + "0005 0018" + ADDRESS_LITERAL
IA_TA_LITERAL = "0004 0004 00000009"
LITERAL = bytes.fromhex("07 123456" + "0001 0004 64756964" + IA_NA_LITERAL + IA_TA_LITERAL)

IA_NA = Ia(7, (IaAddress(ADDRESS).emit(),))
IA_TA = Ia(9, (), 0, 0, dhcpv6.OPT_IA_TA)
MESSAGE = Message(dhcpv6.REPLY, b"\x12\x34\x56", ((dhcpv6.OPT_CLIENT_ID, b"duid"), IA_NA.emit(), IA_TA.emit()))


def test_both_ways() -> None:
    assert Message.parse(LITERAL) == MESSAGE
    assert MESSAGE.emit() == LITERAL


def test_association_both_ways() -> None:
    option = (dhcpv6.OPT_IA_NA, bytes.fromhex(IA_NA_LITERAL)[4:])
    assert Ia.parse(option) == IA_NA
    assert IA_NA.emit() == option
    assert IA_NA.addresses == (ADDRESS,)
    option = (dhcpv6.OPT_IA_TA, bytes.fromhex(IA_TA_LITERAL)[4:])
    assert Ia.parse(option) == IA_TA
    assert IA_TA.emit() == option
    assert IA_TA.addresses == ()


def test_address_both_ways() -> None:
    value = bytes.fromhex(ADDRESS_LITERAL)
    assert IaAddress.parse(value) == IaAddress(ADDRESS)
    assert IaAddress(ADDRESS).emit() == (dhcpv6.OPT_IA_ADDRESS, value)
    with_status = IaAddress(ADDRESS, 1, 2, (dhcpv6.status(4, "no"),))
    assert IaAddress.parse(with_status.emit()[1]) == with_status


def test_prefix_both_ways() -> None:
    value = bytes.fromhex("00000001 00000002 30 20010db8000000000000000000000000")
    prefix = Prefix(packed("2001:db8::"), 48, 1, 2)
    assert Prefix.parse(value) == prefix
    assert prefix.emit() == (dhcpv6.OPT_IA_PREFIX, value)
    ia = Ia(8, (prefix.emit(), dhcpv6.status(0, "")), 3, 4, dhcpv6.OPT_IA_PD)
    assert Ia.parse(ia.emit()) == ia
    assert (ia.prefixes, ia.addresses) == (((packed("2001:db8::"), 48),), ())
    with pytest.raises(Malformed, match="IA prefix truncated"):
        Ia(8, ((dhcpv6.OPT_IA_PREFIX, value[:-1]),)).prefixes  # noqa: B018


@pytest.mark.parametrize("option", [(1, b""), (1, b"abc"), IA_TA.emit()])
def test_options_are_counted(option: dhcpv6.Option) -> None:
    """64 KiB of them are given up after the first few; and in an option after fewer, since options hold options."""
    most = (option,) * dhcpv6.OPTIONS_MAX
    assert len(Message.parse(Message(1, b"abc", most).emit()).options) == dhcpv6.OPTIONS_MAX
    for many in (most + most[:1], (option,) * 8000):
        with pytest.raises(Malformed, match="too many options"):
            Message.parse(Message(1, b"abc", many).emit())
    nested = (option,) * dhcpv6.NESTED_MAX
    assert Ia.parse(Ia(7, nested).emit()).options == nested
    with pytest.raises(Malformed, match="too many options"):
        Ia.parse(Ia(7, nested + nested[:1]).emit())


def test_duid() -> None:
    """One second after the turn of the century, in the time that RFC 8415, 11.2 counts."""
    literal = bytes.fromhex("0001 0001 00000001") + MAC
    assert dhcpv6.duid_llt(MAC, dhcpv6.EPOCH_2000 + 1.7) == literal
    assert bytes(DUID_LLT(timeval=1, lladdr="9a:55:9a:55:9a:55")) == literal


def test_find() -> None:
    options = ((1, b"a"), (2, b"b"), (1, b"c"))
    assert dhcpv6.find(options, 1) == b"a"
    assert dhcpv6.find(options, 3) is None


def test_scapy_agrees() -> None:
    theirs = (
        DHCP6_Reply(trid=0x123456)
        / DHCP6OptServerId(duid=DUID_LLT(timeval=1, lladdr="9a:55:9a:55:9a:55"))
        / DHCP6OptIA_NA(
            iaid=7,
            T1=0xFFFFFFFF,
            T2=0xFFFFFFFF,
            ianaopts=[DHCP6OptIAAddress(addr="2001:db8::2", preflft=0xFFFFFFFF, validlft=0xFFFFFFFF)],
        )
        / DHCP6OptIA_TA(iaid=9, iataopts=[DHCP6OptStatusCode(statuscode=4, statusmsg=b"no")])
        / DHCP6OptIA_PD(
            iaid=8, T1=0, T2=0, iapdopt=[DHCP6OptIAPrefix(prefix="2001:db8::", plen=48, preflft=1, validlft=2)]
        )
        / DHCP6OptClientId(duid=DUID_LLT(timeval=2, lladdr="52:54:00:12:34:56"))
    )
    ours = Message(
        dhcpv6.REPLY,
        b"\x12\x34\x56",
        (
            (dhcpv6.OPT_SERVER_ID, dhcpv6.duid_llt(MAC, dhcpv6.EPOCH_2000 + 1)),
            IA_NA.emit(),
            Ia(9, (dhcpv6.status(dhcpv6.NOT_ON_LINK, "no"),), code=dhcpv6.OPT_IA_TA).emit(),
            Ia(8, (Prefix(packed("2001:db8::"), 48, 1, 2).emit(),), 0, 0, dhcpv6.OPT_IA_PD).emit(),
            (dhcpv6.OPT_CLIENT_ID, dhcpv6.duid_llt(bytes.fromhex("525400123456"), dhcpv6.EPOCH_2000 + 2)),
        ),
    )
    assert ours.emit() == bytes(theirs)


def test_names() -> None:
    assert dhcpv6.NAMES[dhcpv6.SOLICIT] == "SOLICIT"
    assert dhcpv6.NAMES[dhcpv6.INFORMATION_REQUEST] == "INFORMATION_REQUEST"
    assert len(dhcpv6.NAMES) == dhcpv6.RELAY_REPL + 1


@pytest.mark.parametrize(
    ("literal", "reason"),
    [
        ("", "truncated"),
        ("011234", "truncated"),
        ("01123456 0001", "truncated"),
        ("01123456 0001 0002 aa", "truncated"),
        ("01123456 0001 ffff", "truncated"),
        ("0c00" + "00" * 32, "relayed"),
        ("0d00" + "00" * 32, "relayed"),
    ],
)
def test_malformed(literal: str, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        Message.parse(bytes.fromhex(literal))


@pytest.mark.parametrize("length", range(12))
def test_short_association(length: int) -> None:
    with pytest.raises(Malformed, match="IA truncated"):
        Ia.parse((dhcpv6.OPT_IA_NA, bytes(length)))


def test_fqdn_both_ways() -> None:
    literal = bytes.fromhex("06 02766d 076578616d706c65 00")
    option = Fqdn(Fqdn.NO_UPDATES | Fqdn.OVERRIDDEN, b"\x02vm\x07example\0")
    assert Fqdn.parse(literal) == option
    assert option.emit() == (dhcpv6.OPT_FQDN, literal)
    theirs = DHCP6OptClientFQDN(option.emit()[1].join([b"\0\x27\0\x0d", b""]))
    assert (theirs.flags, theirs.fqdn) == (6, b"vm.example.")
    with pytest.raises(Malformed, match="client FQDN truncated"):
        Fqdn.parse(b"")


def test_requested() -> None:
    options = ((dhcpv6.OPT_REQUESTED, bytes.fromhex("0017 0027")),)
    assert dhcpv6.requests(options, dhcpv6.OPT_FQDN)
    assert not dhcpv6.requests(options, dhcpv6.OPT_SEARCH)
    assert not dhcpv6.requests((), dhcpv6.OPT_FQDN)
    many = b"\0\x17" * 255 + b"\0\x27"
    assert dhcpv6.requests(((dhcpv6.OPT_REQUESTED, many),), dhcpv6.OPT_FQDN)
    assert not dhcpv6.requests(((dhcpv6.OPT_REQUESTED, b"\0\x17" + many),), dhcpv6.OPT_FQDN), "no more is looked at"
    with pytest.raises(Malformed, match="option request truncated"):
        dhcpv6.requests(((dhcpv6.OPT_REQUESTED, b"\0\x17\0"),), dhcpv6.OPT_FQDN)


@given(st.binary(max_size=80))
def test_parses_or_malformed(data: bytes) -> None:
    try:
        message = Message.parse(data)
    except Malformed:
        return
    assert message.emit() == data


@given(st.sampled_from(sorted(dhcpv6.IA_CODES)), st.binary(max_size=64))
def test_associations_parse_or_malformed(code: int, value: bytes) -> None:
    try:
        ia = Ia.parse((code, value))
        addresses, prefixes = ia.addresses, ia.prefixes
    except Malformed:
        return
    assert ia.emit() == (code, value)
    assert all(len(a) == 16 for a in (*addresses, *(prefix for prefix, _ in prefixes)))


@given(st.lists(st.tuples(st.integers(0, 65535), st.binary(max_size=20)), max_size=6))
def test_options_both_ways(options: list[tuple[int, bytes]]) -> None:
    assert dhcpv6.parse_options(Cursor(dhcpv6.emit_options(options), Drop.DHCPV6_TRUNCATED)) == tuple(options)
