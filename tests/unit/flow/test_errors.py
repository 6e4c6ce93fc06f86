"""ICMP errors to the guest, for all protocols."""

from __future__ import annotations

import errno

import pytest
from scapy.layers.inet import IP, UDPerror
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.flow.errors import ERRORS_PER_SECOND, Errors, from_errno, from_extended
from passt.linux.sockopt import ORIGIN_ICMP, ORIGIN_ICMP6, ORIGIN_LOCAL, ExtendedError
from passt.wire.icmp import quote_udp

from ..oracle import recomputed
from ..support import GATEWAY6, GUEST4, GUEST6, T0, link, make_context

FAR4, FAR6 = addr.packed("198.51.100.9"), addr.packed("2001:db8:9::9")
ROUTER4, ROUTER6 = addr.packed("203.0.113.1"), addr.packed("2001:db8:f::1")


@pytest.mark.parametrize(
    ("number", "four", "six"),
    [
        (errno.ECONNREFUSED, (3, 3), (1, 4)),
        (errno.ENETUNREACH, (3, 0), (1, 0)),
        (errno.EHOSTUNREACH, (3, 1), (1, 3)),
        (errno.EACCES, (3, 13), (1, 1)),
        (errno.EPERM, (3, 13), (1, 1)),
        (errno.EINVAL, (3, 1), (1, 3)),
        (errno.EAFNOSUPPORT, (3, 0), (1, 0)),
        (errno.ENOPROTOOPT, (3, 2), (1, 3)),
        (errno.EMSGSIZE, (3, 4), (2, 0)),
    ],
)
def test_from_errno(number: int, four: tuple[int, int], six: tuple[int, int]) -> None:
    assert from_errno(number, 1400, v4=True) == (*four, 1400 if number == errno.EMSGSIZE else 0)
    assert from_errno(number, 1400, v4=False) == (*six, 1400 if number == errno.EMSGSIZE else 0)


def test_from_extended_keeps_what_is_of_the_guests_family() -> None:
    assert from_extended(ExtendedError(0, ORIGIN_ICMP, 3, 10, 99, None), v4=True) == (3, 10, 0)
    assert from_extended(ExtendedError(0, ORIGIN_ICMP, 3, 4, 1400, None), v4=True) == (3, 4, 1400)
    assert from_extended(ExtendedError(0, ORIGIN_ICMP6, 2, 0, 1400, None), v4=False) == (2, 0, 1400)
    assert from_extended(ExtendedError(0, ORIGIN_ICMP6, 4, 1, 40, None), v4=False) == (4, 1, 0)


def test_from_extended_translates_the_rest_by_errno() -> None:
    assert from_extended(ExtendedError(errno.EMSGSIZE, ORIGIN_ICMP, 3, 4, 1400, None), v4=False) == (2, 0, 1400)
    assert from_extended(ExtendedError(errno.ECONNREFUSED, ORIGIN_ICMP6, 1, 4, 0, None), v4=True) == (3, 3, 0)
    assert from_extended(ExtendedError(errno.EMSGSIZE, ORIGIN_LOCAL, 0, 0, 1280, None), v4=True) == (3, 4, 1280)


PACKET = quote_udp(GUEST4, FAR4, 1, 2, b"quoted")


def source_of(offender: bytes | None, dst: bytes = FAR4, host: bytes = FAR4) -> str:
    ctx = make_context()
    guest = GUEST4 if len(dst) == 4 else GUEST6
    origin = ORIGIN_ICMP if len(dst) == 4 else ORIGIN_ICMP6
    error = ExtendedError(errno.EHOSTUNREACH, origin, 3, 1, 0, offender)
    Errors(ctx).reported(error, guest, dst, host, quote_udp(guest, dst, 1, 2, b""), T0)
    frame = link(ctx).take_one()
    assert recomputed(frame) == frame
    src: str = Ether(frame)[IP if len(dst) == 4 else IPv6].src
    return src


@pytest.mark.parametrize(
    ("offender", "seen"),
    [
        (ROUTER4, ROUTER4),
        (FAR4, FAR4),
        (addr.packed("127.0.0.1"), FAR4),
        (GUEST4, FAR4),
        (addr.ANY4, FAR4),
        (None, FAR4),
        (ROUTER6, FAR4),
        (addr.packed("224.0.0.1"), FAR4),
    ],
)
def test_the_offender_as_the_guest_may_know_it(offender: bytes | None, seen: bytes) -> None:
    assert source_of(offender) == addr.text(seen)


def test_an_offender_that_stands_for_a_mapped_address() -> None:
    mapped = addr.packed("192.0.2.77")
    assert source_of(ROUTER4, dst=mapped, host=ROUTER4) == addr.text(mapped)
    assert source_of(ROUTER6, dst=GATEWAY6, host=addr.LOOPBACK6) == addr.text(ROUTER6)
    assert source_of(GUEST6, dst=FAR6, host=FAR6) == addr.text(FAR6)


def test_a_family_that_is_off_has_no_address_of_its_own() -> None:
    ctx = make_context(ip4=None)
    error = ExtendedError(errno.EHOSTUNREACH, ORIGIN_ICMP, 3, 1, 0, ROUTER4)
    Errors(ctx).reported(error, GUEST4, FAR4, FAR4, PACKET, T0)
    assert Ether(link(ctx).take_one())[IP].src == addr.text(ROUTER4)


def test_errors_are_limited_in_number() -> None:
    ctx = make_context()
    errors = Errors(ctx)
    for _ in range(ERRORS_PER_SECOND + 5):
        errors.refused(errno.EHOSTUNREACH, GUEST4, FAR4, PACKET, T0)
    assert len(link(ctx).take()) == ERRORS_PER_SECOND
    assert ctx.drops == {"icmp: error not sent": 5}
    errors.refused(errno.EHOSTUNREACH, GUEST4, FAR4, PACKET, T0 + 1)
    p = Ether(link(ctx).take_one())
    assert bytes(p[UDPerror].payload) == b"quoted"


def test_errors_never_come_from_a_group() -> None:
    ctx = make_context()
    Errors(ctx).refused(errno.EHOSTUNREACH, GUEST4, addr.packed("224.0.0.1"), PACKET, T0)
    assert link(ctx).frames == []
