"""All services around one Context, and the tap in front of them: who gets whom.

Importing this module imports everything that handles packets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from . import log
from .arp import Arp
from .conf_net import Decision
from .core.context import Context, Guest
from .core.flow import FlowTable, check_hash
from .core.fwd import Forwarding
from .core.link import TapLink
from .core.packet import PacketPool
from .core.reactor import TYPE_NAMES, TYPE_PING, TYPE_TCP, TYPE_TCP_TIMER, TYPE_UDP, Reactor
from .core.timers import TimerPool
from .dhcp import Dhcp
from .dhcpv6 import Dhcpv6
from .icmp import Icmp
from .linux.tun import Tap as TapDevice
from .ndp import Ndp
from .tap import Tap
from .tcp import Tcp
from .udp import Udp


def wire(decision: Decision, device: TapDevice, mac: bytes) -> tuple[Context, TapLink, Tap]:
    """All services around one Context, and the tap in front of them."""
    check_hash()
    config = decision.config
    reactor = Reactor()
    drops: Counter[str] = Counter()
    link = TapLink(device.fd, drops, tso=device.tso, uso=device.uso)
    guest = Guest(mac=mac)
    if config.ip4:
        guest.addr4 = config.ip4.addr
    if config.ip6 and config.ip6.addr:
        guest.addr6 = config.ip6.addr
    ctx = Context(
        config, reactor, TimerPool(reactor), PacketPool(), link, FlowTable(), Forwarding(config), guest, drops
    )
    ndp, icmp, udp, tcp = Ndp(ctx), Icmp(ctx), Udp(ctx), Tcp(ctx)
    tap = Tap(ctx, arp=Arp(ctx), ndp=ndp, dhcp=Dhcp(ctx), dhcpv6=Dhcpv6(ctx), icmp=icmp, udp=udp, tcp=tcp)
    tap.watch(device.fd)
    ndp.start(time.monotonic())
    reactor.on_fault = partial(
        _fault, {TYPE_TCP: tcp.fault, TYPE_TCP_TIMER: tcp.fault, TYPE_UDP: udp.fault, TYPE_PING: icmp.fault}
    )
    return ctx, link, tap


def _fault(handlers: Mapping[int, Callable[[int], None]], ref: int, e: Exception, now: float) -> None:
    """A handler failed: that costs the flow it was about, not the process."""
    kind = ref >> 56
    log.warn_ratelimited(f"fault {kind}", f"Handling an event of type {TYPE_NAMES[kind]} failed: {e!r}", now, 1.0)
    if kind in handlers:
        handlers[kind](ref)
