"""DHCP messages and options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dhcp import BOOTP, DHCP

from passt.addr import packed
from passt.wire import dhcp
from passt.wire.cursor import Malformed
from passt.wire.dhcp import Fqdn, Message

CHADDR = bytes.fromhex("525400123456") + bytes(10)
HEAD = "0101 06 00 deadbeef 0003 8000 00000000 00000000 00000000 00000000" + CHADDR.hex() + "00" * 192
COOKIE = "63825363"

DISCOVER = bytes.fromhex(HEAD + COOKIE + "35 01 01" + "37 04 01 03 06 0f" + "50 00" + "ff" + "00" * 48)
MESSAGE = Message(
    dhcp.BOOTREQUEST,
    0xDEADBEEF,
    flags=dhcp.BROADCAST,
    chaddr=CHADDR,
    secs=3,
    options={dhcp.OPT_TYPE: b"\1", dhcp.OPT_PARAMETERS: b"\1\3\6\x0f", dhcp.OPT_RAPID_COMMIT: b""},
)


def parse(options: str, head: str = HEAD) -> Message:
    return Message.parse(bytes.fromhex(head + COOKIE + options))


def test_both_ways() -> None:
    assert Message.parse(DISCOVER) == MESSAGE
    assert MESSAGE.emit() == DISCOVER


def test_never_shorter_than_bootp() -> None:
    """300 bytes (RFC 951, 3): 328 with IP and UDP headers."""
    assert len(Message(dhcp.BOOTREPLY, 1).emit()) == 300


def test_scapy_agrees() -> None:
    packet = BOOTP(DISCOVER)
    assert (packet.op, packet.xid, packet.secs, packet.flags) == (1, 0xDEADBEEF, 3, 0x8000)
    assert packet[DHCP].options[:2] == [("message-type", 1), ("param_req_list", [1, 3, 6, 15])]
    theirs = BOOTP(op=2, xid=7, yiaddr="192.0.2.2", chaddr=CHADDR) / DHCP(
        options=[("message-type", "offer"), ("subnet_mask", "255.255.255.0"), ("lease_time", 0xFFFFFFFF), "end"]
    )
    ours = Message(
        dhcp.BOOTREPLY,
        7,
        yiaddr=packed("192.0.2.2"),
        chaddr=CHADDR,
        options={dhcp.OPT_TYPE: b"\2", dhcp.OPT_MASK: packed("255.255.255.0"), dhcp.OPT_LEASE: b"\xff" * 4},
    )
    assert ours.emit().rstrip(b"\0") == bytes(theirs).rstrip(b"\0")
    assert Message.parse(bytes(theirs)) == ours


def test_order_is_kept() -> None:
    assert list(parse("350101 370101 330400000001 ff").options) == [53, 55, 51]


def test_padding_between_options() -> None:
    assert parse("0000 350101 00 ff").options == {53: b"\1"}


def test_nothing_after_the_end() -> None:
    assert parse("350101 ff 3601").options == {53: b"\1"}


def test_end_may_be_missing() -> None:
    assert parse("350101").options == {53: b"\1"}


def test_long_option_in_pieces() -> None:
    """RFC 3396: pieces of one option are joined, and written when longer than 255 bytes."""
    assert parse("7702 0161 350101 7701 00 ff").options == {119: b"\1a\0", 53: b"\1"}
    data = Message(dhcp.BOOTREPLY, 1, options={119: bytes(300), 1: b"abcd"}).emit()
    assert data[240:242] == bytes((119, 255))
    assert data[497:499] == bytes((119, 45))
    assert Message.parse(data).options == {119: bytes(300), 1: b"abcd"}


def test_bootp_without_cookie_has_no_options() -> None:
    plain = bytes.fromhex(HEAD) + bytes(64)
    assert Message.parse(plain).options == {}
    assert Message.parse(bytes.fromhex(HEAD)).options == {}


@pytest.mark.parametrize(
    ("overload", "found", "file_left", "sname_left"),
    [(1, {50: b"file"}, False, True), (2, {61: b"name"}, True, False), (3, {50: b"file", 61: b"name"}, False, False)],
)
def test_overload(overload: int, found: dict[int, bytes], file_left: bool, sname_left: bool) -> None:
    sname = b"\x3d\4name\xff".ljust(64, b"\0")
    file = b"\x32\4file\xff".ljust(128, b"\0")
    message = Message(1, 1, sname=sname, file=file, options={52: bytes((overload,)), 53: b"\3"})
    parsed = Message.parse(message.emit())
    assert parsed.options == {53: b"\3", **found}
    assert parsed.file == (file if file_left else bytes(128))
    assert parsed.sname == (sname if sname_left else bytes(64))
    assert Message.parse(parsed.emit()) == parsed


def test_overload_counts_once() -> None:
    """Said again in a field that holds options, it neither changes what was said nor makes more of it."""
    message = Message(1, 1, sname=b"\x34\1\1\xff".ljust(64, b"\0"), file=b"name".ljust(128, b"\0"), options={52: b"\2"})
    parsed = Message.parse(message.emit())
    assert parsed.options == {}
    assert parsed.file == message.file


def test_padding_of_any_length() -> None:
    """It is skipped as one, and does not count as options."""
    for before in (bytes(60000), b"\0" * 1000 + b"\x0c\1a" + b"\0" * 50000):
        assert Message.parse(DISCOVER[:240] + before + b"\x35\1\1\xff").options[53] == b"\1"


@pytest.mark.parametrize("option", [b"\x37\0", b"\x37\1a", b"\0\x37\1a"])
def test_options_are_counted(option: bytes) -> None:
    """64 KiB of options are given up after the first few. A full message of long ones is not too many."""
    with pytest.raises(Malformed, match="too many options"):
        Message.parse(DISCOVER[:240] + option * 20000)
    with pytest.raises(Malformed, match="too many options"):
        Message.parse(DISCOVER[:240] + b"\x37\0" * dhcp.OPTIONS_MAX + b"\xff")
    assert Message.parse(DISCOVER[:240] + b"\x37\0" * (dhcp.OPTIONS_MAX - 1) + b"\xff").options == {55: b""}
    assert len(Message.parse(DISCOVER[:240] + (b"\x37\xff" + bytes(255)) * 250).options[55]) == 250 * 255


def test_options_in_fields_are_counted_with_the_others() -> None:
    full = b"\x34\1\3" + b"\x37\0" * (dhcp.OPTIONS_MAX - 30)
    fields = DISCOVER[:44] + b"\x37\0" * 32 + b"\x37\0" * 64 + DISCOVER[236:240]
    with pytest.raises(Malformed, match="too many options"):
        Message.parse(fields + full + b"\xff")


def test_address_of_an_option() -> None:
    message = Message(1, 1, options={50: b"\xc0\0\2\2", 54: b"abc"})
    assert message.address(50) == b"\xc0\0\2\2"
    assert message.address(51) is None
    with pytest.raises(Malformed, match="address option length"):
        message.address(54)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "DHCP truncated"),
        (DISCOVER[:235], "DHCP truncated"),
        (DISCOVER[:2] + b"\x11" + DISCOVER[3:], "hardware address length"),
        (DISCOVER[:240] + b"\x35", "DHCP option truncated"),
        (DISCOVER[:240] + b"\x35\2\1", "DHCP option truncated"),
        (DISCOVER[:240] + b"\x35\xff" + bytes(200), "DHCP option truncated"),
    ],
)
def test_malformed(data: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        Message.parse(data)


def test_fqdn_both_ways() -> None:
    literal = bytes.fromhex("0c ff ff 02766d 076578616d706c65 00")
    option = Fqdn(Fqdn.NO_UPDATES | Fqdn.CANONICAL, b"\x02vm\x07example\0")
    assert Fqdn.parse(literal) == option
    assert option.emit() == literal
    assert Fqdn.parse(b"\x05\0\0vm") == Fqdn(Fqdn.SERVER_UPDATES | Fqdn.CANONICAL, b"vm")


@given(st.binary(max_size=20))
def test_fqdn_parses_or_malformed(value: bytes) -> None:
    if len(value) < 3:
        with pytest.raises(Malformed, match="client FQDN truncated"):
            Fqdn.parse(value)
    else:
        assert Fqdn.parse(value).emit() == value[:1] + b"\xff\xff" + value[3:]


@given(st.binary(max_size=300) | st.binary(max_size=80).map(lambda b: DISCOVER[:240] + b))
def test_parses_or_malformed(data: bytes) -> None:
    try:
        message = Message.parse(data)
    except Malformed:
        return
    assert Message.parse(message.emit()).emit() == message.emit()
