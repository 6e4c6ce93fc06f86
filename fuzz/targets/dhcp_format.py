"""DHCP and BOOTP messages, with options in three places.

Invariants: parsing gives a message or `Malformed`; what is emitted is parsed as the same message; options hold no more
bytes than the message.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import dhcp
from passt.wire.cursor import Malformed


def seeds() -> Iterable[bytes]:
    options = {dhcp.OPT_TYPE: b"\1", dhcp.OPT_PARAMETERS: b"\1\3\6", dhcp.OPT_FQDN: b"\4\0\0\5guest\0", 61: b"\1" * 7}
    plain = dhcp.Message(1, 0x12345678, chaddr=b"RT\0\x12\x34\x56".ljust(16, b"\0"), options=options)
    yield plain.emit()
    split = dhcp.Message(1, 1, options={dhcp.OPT_TYPE: b"\3", dhcp.OPT_OVERLOAD: b"\3", 12: b"x" * 40})
    raw = bytearray(split.emit())
    raw[44:50], raw[108:114] = b"\x32\4\xc0\0\2\2", b"\x0c\2ab\xff\0"
    yield bytes(raw)
    yield bytes(raw[:236])


def one(data: bytes) -> None:
    try:
        message = dhcp.Message.parse(data)
    except Malformed:
        return
    assert sum(map(len, message.options.values())) <= len(data)
    assert dhcp.Message.parse(message.emit()) == message
    try:
        name = dhcp.Fqdn.parse(message.options.get(dhcp.OPT_FQDN, b""))
    except Malformed:
        return
    assert dhcp.Fqdn.parse(name.emit()) == name
