"""All services around one Context, the tap and the listening sockets in front of them: who gets whom.

Importing this module imports everything that handles packets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from . import log
from .arp import Arp
from .conf_net import Decision
from .core.context import Context, Guest
from .core.flow import FlowTable, check_hash
from .core.fwd import Forwarding
from .core.link import NoLink, TapLink
from .core.nspool import NsSockets
from .core.packet import PacketPool
from .core.reactor import (
    TYPE_LISTEN,
    TYPE_NAMES,
    TYPE_PING,
    TYPE_TCP,
    TYPE_TCP_SPLICE,
    TYPE_TCP_TIMER,
    TYPE_UDP,
    TYPE_UDP_SPLICE,
    Reactor,
)
from .core.timers import TimerPool
from .dhcp import Dhcp
from .dhcpv6 import Dhcpv6
from .icmp import Icmp
from .linux.tun import Tap as TapDevice
from .listen import Listeners
from .listen_sock import Side
from .ndp import Ndp
from .scan import Scanner
from .tap import Tap
from .tcp import Tcp
from .tcp_splice import TcpSplice
from .udp import Udp
from .udp_in import UdpIn

Faults = dict[int, Callable[[int], None]]  # by type of the epoll reference


def wire(
    decision: Decision, device: TapDevice | None, mac: bytes, netns: int, host: Side, ns: Side
) -> tuple[Context, tuple[TapLink, Tap] | None]:
    """All services around one Context, and the ways out and in if there is a tap device.

    `netns` is the descriptor of the guest's network namespace, `host` and `ns` what was opened on either side.
    """
    check_hash()
    config = decision.config
    reactor = Reactor()
    drops: Counter[str] = Counter()
    out = TapLink(device.fd, drops, tso=device.tso, uso=device.uso) if device else None
    guest = Guest(mac=mac)
    if config.ip4:
        guest.addr4 = config.ip4.addr
    if config.ip6 and config.ip6.addr:
        guest.addr6 = config.ip6.addr
    ctx = Context(
        config, reactor, TimerPool(reactor), PacketPool(), out or NoLink(drops), FlowTable(), Forwarding(config), guest,
        drops, NsSockets(netns),
    )  # fmt: skip
    faults: Faults = {}
    reactor.on_fault = partial(_fault, faults)
    udp = tcp = way = None
    if out is not None:
        udp, tcp = Udp(ctx), Tcp(ctx)
        way = out, _wire_tap(ctx, out.fd, udp, tcp, faults)
    _wire_ports(ctx, tcp, udp, netns, host, ns, faults)
    return ctx, way


def _wire_tap(ctx: Context, fd: int, udp: Udp, tcp: Tcp, faults: Faults) -> Tap:
    """What the guest's frames go to."""
    ndp, icmp = Ndp(ctx), Icmp(ctx)
    tap = Tap(ctx, arp=Arp(ctx), ndp=ndp, dhcp=Dhcp(ctx), dhcpv6=Dhcpv6(ctx), icmp=icmp, udp=udp, tcp=tcp)
    tap.watch(fd)
    ndp.start(time.monotonic())
    faults.update({TYPE_TCP: tcp.fault, TYPE_TCP_TIMER: tcp.fault, TYPE_UDP: udp.fault, TYPE_PING: icmp.fault})
    return tap


def _wire_ports(
    ctx: Context, tcp: Tcp | None, udp: Udp | None, netns: int, host: Side, ns: Side, faults: Faults
) -> None:
    """What connects to us."""
    tcp_splice, udp_in = TcpSplice(ctx), UdpIn(ctx, udp)
    opened = host.listeners + ns.listeners
    listeners = Listeners(ctx, tcp=tcp, tcp_splice=tcp_splice, udp_in=udp_in, netns=netns, opened=opened)
    Scanner(ctx, listeners, host.tables, ns.tables).start(time.monotonic())
    splice_faults = {TYPE_TCP_SPLICE: tcp_splice.fault, TYPE_UDP_SPLICE: udp_in.splice.fault}
    faults.update({TYPE_LISTEN: listeners.fault, **splice_faults})


def _fault(handlers: Faults, ref: int, e: Exception, now: float) -> None:
    """A handler failed: that costs the flow it was about, not the process."""
    kind = ref >> 56
    log.warn_ratelimited(f"fault {kind}", f"Handling an event of type {TYPE_NAMES[kind]} failed: {e!r}", now, 1.0)
    if kind in handlers:
        handlers[kind](ref)
