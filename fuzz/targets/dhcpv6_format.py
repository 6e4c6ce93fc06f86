"""DHCPv6 messages, and options within their options.

Invariants: parsing gives a value or `Malformed`, for a message and for each option in it; what is emitted are the bytes
that were parsed.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import dhcpv6
from passt.wire.cursor import Malformed

ADDRESS = b"\x20\1\x0d\xb8" + bytes(12)


def seeds() -> Iterable[bytes]:
    address = dhcpv6.IaAddress(ADDRESS, 1, 2, (dhcpv6.status(0, "well"),)).emit()
    options = (
        (dhcpv6.OPT_CLIENT_ID, dhcpv6.duid_llt(b"RT\0\x12\x34\x56", 1e9)),
        dhcpv6.Ia(7, (address,)).emit(),
        dhcpv6.Ia(8, (address,), 0, 0, dhcpv6.OPT_IA_TA).emit(),
        (dhcpv6.OPT_REQUESTED, b"\0\x17\0\x18\0\x27"),
        dhcpv6.Fqdn(1, b"\5guest\0").emit(),
    )
    yield dhcpv6.Message(dhcpv6.SOLICIT, b"abc", options).emit()
    yield dhcpv6.Message(dhcpv6.RELAY_FORW, b"abc", options).emit()


def option(code: int, value: bytes) -> None:
    if code in dhcpv6.IA_CODES:
        ia = dhcpv6.Ia.parse((code, value))
        assert ia.emit() == (code, value)
        assert all(len(address) == 16 for address in ia.addresses)
        assert all(len(prefix) == 16 for prefix, _ in ia.prefixes)
    elif code == dhcpv6.OPT_IA_ADDRESS:
        assert dhcpv6.IaAddress.parse(value).emit() == (code, value)
    elif code == dhcpv6.OPT_FQDN:
        assert dhcpv6.Fqdn.parse(value).emit() == (code, value)


def one(data: bytes) -> None:
    try:
        message = dhcpv6.Message.parse(data)
    except Malformed:
        return
    assert message.emit() == data
    for code, value in message.options:
        try:
            option(code, value)
        except Malformed:
            pass  # one option more or less
    try:
        dhcpv6.requests(message.options, dhcpv6.OPT_DNS)
    except Malformed:
        return
