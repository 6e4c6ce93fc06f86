"""Handlers of services: one for each number; a new service needs no module but its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from passt import addr
from passt.flow.context import Context
from passt.flow.ip_fields import HOPS_MASK
from passt.flow.services import Services
from passt.tap import Tap

from ..support import GUEST4, GUEST6, GUEST_LL, GUEST_MAC, OUR_MAC, T0, make_context, pool_put


def nothing(*args: Any) -> None:
    """A handler."""


TAKE: list[Callable[[Services, bool], None]] = [
    lambda services, v4: services.take_ethertype(0x88CC, nothing),
    lambda services, v4: services.take_port(v4, 53, nothing),
    lambda services, v4: services.take_icmp(v4, (13, 15), nothing),
    lambda services, v4: services.take_protocol(v4, 2, nothing),
]


@pytest.mark.parametrize("take", TAKE)
@pytest.mark.parametrize("v4", [True, False])
def test_a_number_is_taken_once(take: Callable[[Services, bool], None], v4: bool) -> None:
    services = Services()
    take(services, v4)
    with pytest.raises(ValueError, match="is taken by another service"):
        take(services, v4)


@pytest.mark.parametrize("take", TAKE[1:])
def test_families_are_apart(take: Callable[[Services, bool], None]) -> None:
    services = Services()
    take(services, True)
    take(services, False)


class Multicast:
    """A service of this file: IGMP, a datagram to a port, LLDP. Its own module, and a line where it is made."""

    def __init__(self, ctx: Context) -> None:
        self.seen: list[tuple[Any, ...]] = []
        ctx.services.take_protocol(True, 2, self.tap_handler)
        ctx.services.take_protocol(False, 103, self.tap_handler, fragments=True)
        ctx.services.take_port(False, 5353, self.port_handler)
        ctx.services.take_ethertype(0x88CC, self.frame_handler)

    def tap_handler(self, mac: bytes, src: bytes, dst: bytes, message: memoryview, now: float, fields: int) -> None:
        self.seen.append((mac, src, bytes(message), fields & HOPS_MASK))

    def port_handler(self, mac: bytes, src: bytes, dst: bytes, sport: int, payload: bytes, now: float) -> bytes:
        self.seen.append((mac, src, sport, payload))
        return GUEST6

    def frame_handler(self, mac: bytes, payload: bytes, now: float) -> None:
        self.seen.append((mac, payload))


def test_a_new_service_gets_what_it_took() -> None:
    ctx = make_context(guest=None)
    ctx.guest.addr4 = ctx.guest.addr6 = b""
    service = Multicast(ctx)
    tap = Tap(ctx, udp=cast(Any, None), tcp=cast(Any, None))
    ether = Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC))
    packets: list[Packet] = [
        IP(src=addr.text(GUEST4), dst="239.1.2.3", ttl=1, proto=2) / Raw(b"\x16" + bytes(7)),
        IPv6(src=addr.text(GUEST_LL), dst="ff02::d", nh=103, hlim=1) / Raw(bytes(8)),
        IPv6(src=addr.text(GUEST_LL), dst="ff02::fb") / UDP(sport=9, dport=5353) / Raw(b"who"),
    ]
    frames = [bytes(ether / p) for p in packets]
    frames.append(bytes(Ether(src=addr.mac_text(GUEST_MAC), dst="01:80:c2:00:00:0e", type=0x88CC) / Raw(bytes(30))))
    for frame in frames:
        tap.received([*pool_put(ctx, bytes(10) + frame)], len(frame), T0)
    assert service.seen == [
        (GUEST_MAC, GUEST4, frames[0][34:], 1),
        (GUEST_MAC, GUEST_LL, bytes(8), 1),
        (GUEST_MAC, GUEST_LL, 9, b"who"),
        (GUEST_MAC, bytes(30)),
    ]
    assert (ctx.guest.addr4, ctx.guest.addr6, ctx.guest.addr6_ll) == (GUEST4, GUEST6, GUEST_LL)
    assert not ctx.drops
