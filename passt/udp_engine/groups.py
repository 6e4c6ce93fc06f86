"""Multicast groups that the guest has joined: sockets of the host that receive for it, and the way to the guest.

    host: group, port -> receiver -> own copies left out (`own_copies.py`) -> source translated (`policy.forwarding`)
                                  -> frame to the group's MAC address -> guest

`igmp.py` says which groups (`follow`, `leave`). A membership names no port, and a socket has one, so there is a
receiver for each port that a program of the guest can be expected at:

    ports of a group                                                      at most
    --------------------------------------------------------------------  ---------
    those of its protocol: mDNS, LLMNR, SSDP, WS-Discovery (`PORTS`)      2
    those that the guest has sent to in this group                        LEARNED_MAX, the last ones
    those that lead to the guest (-u; in a namespace, by default, the     the rest of PORTS_MAX
      ports that are bound there)

A receiver is bound to the group itself, with SO_REUSEADDR: other programs of the host that have it, too, as responders
do, share the port. Each gets its copy of what goes to the group, and none loses a datagram that is for one address. It
has joined on the template interface, or on that of --outbound-if4/6, and receives nothing else (IP_MULTICAST_ALL is
off). A listener of ours at the port shares it during bind(2), by SO_REUSEPORT, as with sockets of clients (`sock.py`).
A listener that wants the port of a receiver gets it: receivers make way, and open again beside it. Flows of the guest
from that port share it as well (`outbound.py`): a responder answers single hosts from it (RFC 6762, 6.7).

    time    condition                                              consequence
    ------  -----------------------------------------------------  ----------------------------------------------------
    0.1 s   listeners opened or closed, receivers made way, one    the receivers of all groups are compared with what
              was destroyed, or the configuration has changed:       they should be
              the host's network leads elsewhere

    bound              value        consequence
    -----------------  -----------  -----------------------------------------------------------------------------------
    RECEIVERS_MAX      128, or a    no further receivers, counted
                       sixteenth of the descriptors
    PER_EVENT          32           datagrams of one receiver, before others have their turn

Left out: the TTL and the traffic class of what a receiver gets (frames to the guest have TTL 255, which mDNS asks for);
a receiver that could not be opened is tried again with the next change or report, not before.
"""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Container, Iterable
from typing import Any, NamedTuple

from .. import addr, log
from ..drops import Drop, Failed
from ..flow.context import Context
from ..flow.idle import flow_limit
from ..linux import multicast
from ..linux.multicast import Sources
from ..linux.sockopt import DESTROYED, REUSEPORT, setting
from ..loop.each import each, record
from ..loop.reactor import EPOLLERR, EPOLLIN, TYPE_GROUP, ref_fd
from ..policy.config import Config
from ..policy.forwarding import SockAddr
from ..policy.rules import Listener
from ..wire import ether, ip, udp
from ..wire.checksum import PROTO_UDP
from ..wire.fragment import fragments
from .outbound import Outbound
from .own_copies import OwnCopies

RECEIVERS_MAX = 128
DESCRIPTOR_SHARE = 16  # at most one in so many of the descriptors that the process may have
PORTS_MAX = 12  # of a group
LEARNED_MAX = 4  # ports of a group that the guest has sent to
GROUPS_LEARNED = 64  # groups that such ports are known of
PER_EVENT = 32
REFRESH = 0.1  # s
SIZE_MAX = 65536

MDNS, LLMNR, SSDP, WS_DISCOVERY = 5353, 5355, 1900, 3702
# RFC 6762, 3; RFC 4795, 2; UPnP Device Architecture 2.0, 1.1.3 and annex A; WS-Discovery 1.1, 2.4
PORTS: dict[bytes, tuple[int, ...]] = {
    addr.packed(group): ports
    for groups, ports in (
        (("224.0.0.251", "ff02::fb", "ff05::fb"), (MDNS,)),
        (("224.0.0.252", "ff02::1:3"), (LLMNR,)),
        (("239.255.255.250", "ff02::c", "ff05::c"), (SSDP, WS_DISCOVERY)),
        (("ff08::c", "ff0e::c"), (SSDP,)),
    )
    for group in groups
}

_REUSEADDR = socket.SOL_SOCKET, socket.SO_REUSEADDR
CALLS = setting(
    _REUSEADDR,
    REUSEPORT,
    (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
)


class Way(NamedTuple):
    """How datagrams of a family to groups leave the host, and where its groups are joined."""

    interface: int  # index; 0: none
    bound_to: str | None  # name of the interface that sockets are bound to
    source: bytes | None  # address that sockets are bound to


def way(config: Config, group: bytes) -> Way:
    """The way of the family of `group`, which is on."""
    settings = config.ip4 if len(group) == 4 else config.ip6
    assert settings is not None, "the family is on"
    return Way(settings.group_index, settings.if_out, settings.addr_out)


def sockaddr(group: bytes, port: int, index: int) -> SockAddr:
    """For bind(2) and sendto(2). Groups of link scope (RFC 4291, 2.7) are those of an interface."""
    if len(group) == 4:
        return addr.text(group), port
    return addr.text(group), port, 0, index if group[1] & 0xF <= 2 else 0


def new_socket(group: bytes, to: Way) -> Any:
    """An unbound, non-blocking socket for datagrams to and from `group`. Raises OSError."""
    v6 = len(group) == 16
    sock = socket.socket(addr.family(group), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        multicast.only_joined(sock, v6)
        if to.bound_to is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, to.bound_to.encode())
    except BaseException:
        sock.close()
        raise
    return sock


def bind_beside(sock: Any, where: SockAddr, listeners: Iterable[Listener]) -> None:
    """Bind a port of a group, beside other programs, and beside those of our listeners that have it. Raises OSError."""
    ours = [listener.sock for listener in listeners if listener.port == where[1]]
    sharing = [sock, *ours] if ours else []
    sock.setsockopt(*_REUSEADDR, 1)
    for one in sharing:
        one.setsockopt(*REUSEPORT, 1)
    try:
        sock.bind(where)
    finally:
        for one in sharing:
            one.setsockopt(*REUSEPORT, 0)


class ToGuest:
    """Datagrams as frames to the guest, complete with their checksums: some to groups, some to an address."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._ident = random.getrandbits(32)  # of the next fragmented datagram

    def send(self, mac: bytes, dst: bytes, dport: int, peer: bytes, port: int, payload: bytes) -> None:
        """Send a datagram of `peer` on the host's side, or count the reason why it is dropped."""
        ctx = self._ctx
        if not addr.is_unicast(peer) or not port:
            ctx.drops[Drop.UDP_SOURCE if port else Drop.UDP_SOURCE_PORT_0] += 1
            return
        src = ctx.fwd.inbound_source(peer, ctx.guest)
        if src is None:
            ctx.drops[Drop.UDP_NO_TARGET] += 1
            return
        config = ctx.config
        header = ip.HEADER4.size if len(src) == 4 else ip.HEADER6.size
        if not config.mtu or header + udp.HEADER.size + len(payload) <= config.mtu:
            ctx.link.send_frame(ether.udp_frame(mac, ctx.lan.mac_of(src), src, dst, port, dport, payload))
            return
        self._ident += 1
        ethernet = ether.HEADER.pack(mac, ctx.lan.mac_of(src), ether.TYPE_IPV4 if len(src) == 4 else ether.TYPE_IPV6)
        message = udp.datagram(src, dst, port, dport, payload)
        for packet in fragments(src, dst, PROTO_UDP, message, config.mtu, self._ident):
            ctx.link.send_frame(ethernet + packet)


class Receiver:
    """A socket that is bound to a port of a group, and has joined it."""

    __slots__ = ("fd", "group", "port", "sock", "sources", "to")

    def __init__(self, group: bytes, port: int, sources: Sources, sock: Any, to: Way) -> None:
        self.group, self.port, self.sources, self.to = group, port, sources, to
        self.sock, self.fd = sock, sock.fileno()


class Groups:
    """The groups that are followed, and their receivers."""

    def __init__(self, ctx: Context, outbound: Outbound) -> None:
        self._ctx = ctx
        self._outbound = outbound
        self._to_guest = ToGuest(ctx)
        self._wanted: dict[bytes, Sources] = {}
        self._learned: dict[bytes, list[int]] = {}  # by group; the last port is the last one
        self._receivers: dict[tuple[bytes, int], Receiver] = {}
        self._by_fd: dict[int, Receiver] = {}
        self._limit = flow_limit(RECEIVERS_MAX, DESCRIPTOR_SHARE)
        self._timer = ctx.timers.services.new(self._refresh_all)
        self._refreshing = False
        self.copies = OwnCopies()
        outbound.on_change = self.refresh_soon
        ctx.settings.react(lambda former, now: self.refresh_soon())
        ctx.reactor.handle(TYPE_GROUP, self.sock_handler)
        ctx.stats.gauges["groups"] = lambda: len(self._wanted)

    # Membership ------------------------------------------------------------------------------------------------------

    def follow(self, group: bytes, sources: Sources, now: float) -> None:
        """The guest wants datagrams of `sources` to `group`."""
        self._wanted[group] = sources
        self._refresh(group, now)

    def leave(self, group: bytes) -> None:
        """It does not any more."""
        if self._wanted.pop(group, ()) != ():
            each([r for r in self._receivers.values() if r.group == group], self._close, self._fault_at)

    def leave_all(self) -> None:
        """The guest is gone."""
        self._wanted.clear()
        self._learned.clear()
        each(list(self._receivers.values()), self._close, self._fault_at)

    def sent(self, group: bytes, port: int, sport: int, payload: bytes, now: float) -> None:
        """The guest's datagram left from port `sport` of the host for `port` of `group`."""
        if (group, port) in self._receivers:
            self.copies.sent(group, port, sport, payload, now)

    def learn(self, group: bytes, port: int, now: float) -> None:
        """The guest begins to send to `port` of `group`: it may listen there."""
        ports = self._learned.pop(group, [])
        self._learned[group] = [*(p for p in ports if p != port), port][-LEARNED_MAX:]
        if len(self._learned) > GROUPS_LEARNED:
            del self._learned[next(iter(self._learned))]
        if group in self._wanted and (group, port) not in self._receivers:
            self._refresh(group, now)

    def ports(self, group: bytes) -> list[int]:
        """The ports of `group` that the guest may listen at."""
        known = [*PORTS.get(group, ()), *reversed(self._learned.get(group, ()))]
        leading = sorted(port for port, listeners in self._outbound.leading.items() if listeners)
        return list(dict.fromkeys((*known, *leading)))[:PORTS_MAX]

    # Receivers -------------------------------------------------------------------------------------------------------

    def _refresh(self, group: bytes, now: float) -> None:
        """Open, change and close the receivers of a group that is followed."""
        config = self._ctx.config
        if (config.ip4 if len(group) == 4 else config.ip6) is None:
            return  # the host has lost the family: the receivers wait for it
        sources, ports, to = self._wanted[group], self.ports(group), way(config, group)
        for receiver in [r for r in self._receivers.values() if r.group == group]:  # few; errors are handled
            if receiver.port not in ports or receiver.to != to:
                self._close(receiver)
            elif receiver.sources != sources:
                self._change(receiver, sources, now)
        for port in ports:
            if (group, port) not in self._receivers:
                self._open(group, port, sources, now)

    def _open(self, group: bytes, port: int, sources: Sources, now: float) -> None:
        """Open a receiver, or count why there is none."""
        ctx = self._ctx
        if len(self._receivers) >= self._limit:
            ctx.drops[Drop.GROUP_RECEIVERS] += 1
            return
        to = way(ctx.config, group)
        try:
            sock = new_socket(group, to)
            try:
                bind_beside(sock, sockaddr(group, port, to.interface), self._outbound.leading.get(port, ()))
                multicast.join(sock, group, to.interface, sources)
                ctx.reactor.watch(sock.fileno(), TYPE_GROUP, 0, EPOLLIN | EPOLLERR)
            except BaseException:
                sock.close()
                raise
        except OSError as e:
            self._failed(group, port, e, now)
            return
        receiver = Receiver(group, port, sources, sock, to)
        self._receivers[group, port] = self._by_fd[receiver.fd] = receiver
        self._outbound.group_ports.add(port)
        if log.debug_on:
            log.debug(f"Group {addr.host_port(group, port)}: joined on interface {to.interface}")

    def _change(self, receiver: Receiver, sources: Sources, now: float) -> None:
        """Another list of sources for a receiver. One that cannot have it closes."""
        try:
            to = way(self._ctx.config, receiver.group)
            multicast.set_sources(receiver.sock, receiver.group, to.interface, sources)
            receiver.sources = sources
        except OSError as e:
            self._failed(receiver.group, receiver.port, e, now)
            self._close(receiver)

    def _failed(self, group: bytes, port: int, e: OSError, now: float) -> None:
        self._ctx.drops[Failed.GROUP_JOIN.of(e)] += 1
        text = f"The guest's multicast group {addr.host_port(group, port)} is not received: {e.strerror}"
        log.warn_ratelimited("group", text, now)

    def _close(self, receiver: Receiver) -> None:
        """The kernel leaves the group when the turn ends, unless another socket has joined it."""
        self._forget(receiver)
        self._ctx.reactor.retire(receiver.fd, receiver.sock)
        if log.debug_on:
            log.debug(f"Group {addr.host_port(receiver.group, receiver.port)}: left")

    def _forget(self, receiver: Receiver) -> None:
        del self._receivers[receiver.group, receiver.port]
        del self._by_fd[receiver.fd]
        if receiver.port not in {port for _, port in self._receivers}:
            self._outbound.group_ports.discard(receiver.port)

    def _fault_at(self, what: object, e: Exception) -> None:
        record(self._ctx.drops, "a multicast group", e)

    # Ports of listeners ----------------------------------------------------------------------------------------------

    def ports_in_use(self, ports: Container[int]) -> set[int]:
        """Those of `ports` that receivers have, which now show whose they are (`ports.sockets.held_by_us`)."""
        holding = [r for r in self._receivers.values() if r.port in ports]
        each(holding, _show, self._fault_at)
        return {receiver.port for receiver in holding}

    def free_ports(self, ports: Container[int]) -> None:
        """Close receivers at `ports` now, for listeners about to open. They open again beside these."""
        closing = [r for r in self._receivers.values() if r.port in ports]
        each(closing, self._close_at_once, self._fault_at)
        self.refresh_soon()

    def _close_at_once(self, receiver: Receiver) -> None:
        self._forget(receiver)
        self._ctx.reactor.forget(receiver.fd)
        receiver.sock.close()

    def refresh_soon(self) -> None:
        """Compare receivers with what they should be, in a moment: many listeners change at once."""
        if self._refreshing or not self._wanted:
            return
        self._refreshing = True
        self._ctx.timers.services.arm(self._timer, time.monotonic() + REFRESH)

    def _refresh_all(self, now: float) -> None:
        self._refreshing = False
        each(list(self._wanted), self._refresh, self._fault_at, now)

    # Host -> guest ---------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Datagrams to a group. The event may be stale."""
        receiver = self._by_fd[ref_fd(ref)]
        try:
            for _ in range(PER_EVENT):
                payload, sender = receiver.sock.recvfrom(SIZE_MAX)
                self._deliver(receiver, payload, addr.packed(sender[0].partition("%")[0]), sender[1], now)
        except BlockingIOError:
            pass  # that was all
        except OSError as e:
            self._ctx.drops[Failed.UDP_RECEIVE.of(e)] += 1
            if e.errno in DESTROYED or e.errno in (errno.ENODEV, errno.ENETDOWN):
                self._close(receiver)
                self.refresh_soon()

    def _deliver(self, receiver: Receiver, payload: bytes, peer: bytes, port: int, now: float) -> None:
        group = receiver.group
        if self.copies.take(group, receiver.port, port, payload, now):
            return
        self._to_guest.send(ether.multicast_mac(group), group, receiver.port, peer, port, payload)

    def fault(self, ref: int) -> None:
        """A handler failed on an event of a receiver, which closes. It opens again with the next report."""
        receiver = self._by_fd.get(ref_fd(ref))
        if receiver is not None:
            self._close(receiver)


def _show(receiver: Receiver) -> None:
    """Let sockets of the same user share its port."""
    receiver.sock.setsockopt(*REUSEPORT, 1)
