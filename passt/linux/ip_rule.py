"""Routing rules (ip-rule(8)), read from the messages of a dump.

    struct fib_rule_hdr   family u8 | dst_len u8 | src_len u8 | tos u8 | table u8 | reserved u16 | action u8 | flags u32
    attributes            length u16 | type u16 | value, aligned to 4 bytes

pyroute2's class for them is not used: its import would cost every start several milliseconds, and nearly no host has
such rules.
"""

from __future__ import annotations

from struct import Struct

from .routes import RoutingRule

RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255

_RULE = Struct("=BBBBBxxBI")
_ATTRIBUTE = Struct("=HH")
_U32 = Struct("=I")
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE = 3, 6, 15
_FRA_PLAIN = frozenset((_FRA_PRIORITY, _FRA_TABLE, 13, 14, 21))  # and FRA_SUPPRESS_..., FRA_PROTOCOL: no selectors
_FR_ACT_TO_TBL, _FIB_RULE_INVERT = 1, 2


def parse(data: bytes) -> RoutingRule | None:
    """The value of a routing rule, None if it is not one for the packets of this host and a table of its own."""
    if len(data) < _RULE.size:
        return None
    _, dst_len, src_len, tos, table, action, flags = _RULE.unpack_from(data)
    found: dict[int, bytes] = {}
    at = _RULE.size
    while at + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, at)
        if length < _ATTRIBUTE.size:
            break
        found[kind] = data[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & ~3
    table = _number(found.get(_FRA_TABLE)) or table
    if action != _FR_ACT_TO_TBL or table in (0, RT_TABLE_MAIN, RT_TABLE_LOCAL) or _FRA_IIFNAME in found:
        return None
    selects = bool(dst_len or src_len or tos or flags & _FIB_RULE_INVERT or found.keys() - _FRA_PLAIN)
    return RoutingRule(_number(found.get(_FRA_PRIORITY)), table, selects)


def _number(value: bytes | None) -> int:
    number: int = _U32.unpack(value)[0] if value is not None and len(value) == _U32.size else 0
    return number
