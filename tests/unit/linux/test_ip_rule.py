"""Routing rules: messages against bytes, and the kernel's own."""

from __future__ import annotations

import socket
import struct

import pytest

from passt.linux import ip_rule
from passt.linux.netlink import Rtnetlink
from passt.linux.routes import RoutingRule

TO_TABLE, UNREACHABLE = 1, 7
IIFNAME, PRIORITY, FWMARK, SUPPRESS, TABLE = 3, 6, 10, 14, 15


def rule(
    *attributes: tuple[int, bytes], table: int = 0, action: int = TO_TABLE, src_len: int = 0, flags: int = 0
) -> bytes:
    head = struct.pack("=BBBBBxxBI", socket.AF_INET, 0, src_len, 0, table, action, flags)
    padded = ((kind, len(value), value + bytes(-len(value) % 4)) for kind, value in attributes)
    return head + b"".join(struct.pack("=HH", 4 + n, kind) + value for kind, n, value in padded)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


NUMBERS = (PRIORITY, u32(100)), (TABLE, u32(1000))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (rule(*NUMBERS), RoutingRule(100, 1000)),
        (rule((PRIORITY, u32(7)), table=99), RoutingRule(7, 99)),
        (rule(*NUMBERS, (SUPPRESS, u32(0xFFFFFFFF))), RoutingRule(100, 1000)),
        (rule(*NUMBERS, src_len=24), RoutingRule(100, 1000, selects=True)),
        (rule(*NUMBERS, (FWMARK, u32(1))), RoutingRule(100, 1000, selects=True)),
        (rule(*NUMBERS, flags=2), RoutingRule(100, 1000, selects=True)),
        (rule(*NUMBERS, (IIFNAME, b"eth1\0")), None),  # for forwarded packets
        (rule(*NUMBERS, action=UNREACHABLE), None),
        (rule(table=254), None),
        (rule((TABLE, u32(255))), None),
        (rule(), None),
        (rule(*NUMBERS)[:11], None),
        (rule() + struct.pack("=HH", 0, TABLE), None),  # a length that leads nowhere
    ],
)
def test_rules(data: bytes, expected: RoutingRule | None) -> None:
    assert ip_rule.parse(data) == expected


def test_the_kernels_own() -> None:
    """Those of every host lead to the local, the main and the default table."""
    with Rtnetlink() as nl:
        assert 253 in {r.table for r in nl._rules(v6=False)}
