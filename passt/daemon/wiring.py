"""Composition of all services around one Context, with the tap and the listening sockets in front of them. Services
register themselves with the tap (`flow/services.py`).

This module imports every module that handles packets.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from functools import partial

from ..arp import Arp
from ..conf.decide import Decision
from ..dhcp import Dhcp
from ..dhcpv6 import Dhcpv6
from ..drops import Reason
from ..flow.context import Context
from ..flow.guest_errors import GuestErrors
from ..flow.table import FlowTable, check_hash
from ..icmp import Icmp
from ..igmp import Igmp
from ..lean.tuples import NamedTuple
from ..link.backend import Link, NoLink
from ..linux.netns import Namespace
from ..linux.nspool import NsSockets
from ..loop import busy_poll
from ..loop.each import record
from ..loop.reactor import (
    TYPE_DNS,
    TYPE_GROUP,
    TYPE_GROUP_FLOW,
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
from ..loop.timers import TimerPool
from ..ndp import Ndp
from ..policy.config import Config
from ..policy.forwarding import Forwarding
from ..policy.guest import Guest
from ..policy.resolvers import Resolvers
from ..policy.settings import Settings
from ..ports.forwards import Forwards
from ..ports.listen import Listeners
from ..ports.scan import Scanner
from ..ports.sockets import Side
from ..ports.udp_in import UdpIn
from ..splice.tcp import TcpSplice
from ..tap import Tap
from ..tcp import Tcp
from ..udp import Udp


class Wired(NamedTuple):
    """The parts for a guest: services, rules in force, and, if there is a link, the tap, which takes its frames."""

    ctx: Context
    forwards: Forwards
    tap: Tap | None


Faults = dict[int, Callable[[int], None]]  # by type of the epoll reference


def wire(decision: Decision, link: Link | None, mac: bytes, namespace: Namespace | None, host: Side, ns: Side) -> Wired:
    """All services for a guest. `link` leads to it; None: without a tap.

    `namespace` is the guest's, if known; `host` and `ns` are the sockets opened in the host and in the namespace.
    """
    ctx, faults = _context(decision, link or NoLink(Counter()), mac)
    ctx.ns = NsSockets(namespace) if namespace else None
    udp = tcp = tap = None
    if link is not None:
        udp, tcp = Udp(ctx), Tcp(ctx)
        tap = _wire_tap(ctx, udp, tcp, faults)
        link.on_room = tcp.resume
    forwards = _wire_ports(ctx, tcp, udp, namespace, host, ns, faults)
    if link is not None and tap is not None:
        link.start(ctx.reactor, ctx.pool, tap)
    return Wired(ctx, forwards, tap)


def _context(decision: Decision, link: Link, mac: bytes) -> tuple[Context, Faults]:
    """The Context that all services share, and the empty table of fault handlers."""
    check_hash()
    config = decision.config
    guest = Guest(mac=mac)
    if config.ip4:
        guest.addr4 = config.ip4.addr
    if config.ip6 and config.ip6.addr:
        guest.addr6 = config.ip6.addr
    reactor = Reactor()
    faults: Faults = {}
    reactor.on_fault = partial(_fault, faults, link.drops)
    timers, pool, settings = TimerPool(reactor), link.make_pool(), Settings(config, link.drops)
    settings.subscribe(partial(_adopt_busy_poll, reactor))
    fwd, resolvers = Forwarding(settings), Resolvers(settings)
    ctx = Context(settings, reactor, timers, pool, link, FlowTable(), fwd, resolvers, guest, link.drops)
    return ctx, faults


def _adopt_busy_poll(reactor: Reactor, config: Config) -> None:
    reactor.busy_poll = busy_poll.chosen(config.busy_poll)


def _wire_tap(ctx: Context, udp: Udp, tcp: Tcp, faults: Faults) -> Tap:
    """The tap and the handlers of the guest's frames."""
    for service in (Arp, Dhcp, Dhcpv6, GuestErrors):
        service(ctx)
    ndp, icmp = Ndp(ctx), Icmp(ctx)
    Igmp(ctx, udp.groups)
    ndp.start(time.monotonic())
    faults.update({TYPE_TCP: tcp.fault, TYPE_TCP_TIMER: tcp.fault, TYPE_PING: icmp.fault})
    faults.update({TYPE_UDP: udp.fault, TYPE_DNS: udp.dns.fault})
    faults.update({TYPE_GROUP: udp.groups.fault, TYPE_GROUP_FLOW: udp.senders.fault})
    return Tap(ctx, udp=udp, tcp=tcp)


def _wire_ports(
    ctx: Context, tcp: Tcp | None, udp: Udp | None, namespace: Namespace | None, host: Side, ns: Side, faults: Faults
) -> Forwards:
    """The handlers of incoming connections; returns the rules in force."""
    tcp_splice, udp_in = TcpSplice(ctx), UdpIn(ctx, udp)
    opened = host.listeners + ns.listeners
    opening = tcp.opening if tcp else None
    listeners = Listeners(ctx, tcp=opening, tcp_splice=tcp_splice, udp_in=udp_in, namespace=namespace, opened=opened)
    scanner = Scanner(ctx, listeners, host.tables, ns.tables)
    scanner.start(time.monotonic())
    splice_faults = {TYPE_TCP_SPLICE: tcp_splice.fault, TYPE_UDP_SPLICE: udp_in.splice.fault}
    faults.update({TYPE_LISTEN: listeners.fault, **splice_faults})
    return Forwards(ctx, listeners, scanner)


def _fault(handlers: Faults, drops: Counter[Reason], ref: int, e: Exception, now: float) -> None:
    """End the flow whose handler failed; the process goes on."""
    kind = ref >> 56
    record(drops, f"an event of type {TYPE_NAMES[kind]}", e)
    if kind in handlers:
        handlers[kind](ref)
