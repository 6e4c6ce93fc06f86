"""UDP that others begin: first datagrams from listening sockets, and a connected socket for each client.

A listener (`policy/rules.py`) gets the datagrams of everybody. Each client gets a socket of its own, bound to the
address and port that it wrote to and connected to it (`udp_engine.sock.open_client`): from then on the kernel delivers
what it sends there, and answers leave from there. So the listener sees first datagrams, and whatever cannot have a
socket.

    rule      client      configuration                  goes to                        address that is seen
    --------  ----------  -----------------------------  -----------------------------  ----------------------------
    outbound  loopback    any                            UdpSplice: the host            loopback
    inbound   loopback    no --no-splice                 UdpSplice: the namespace       loopback, or the namespace's
    inbound   any other   --splice-only                  nobody, counted
    inbound   any other   otherwise                      Udp: the guest, by the tap     `Forwarding.inbound_source`

Order. The event brings a batch, grouped by client and address of ours. What the kernel queues at the listener while the
batch is handled is older than anything at the new sockets, so the listener is read until it is empty, for a bounded
number of batches. Only then those datagrams have their turn that came to a new socket before it was connected, of its
own client or of others, who may get sockets in turn. What comes later to a new socket is read in a later turn.

A datagram to a group or a broadcast address always comes by the listener, and goes to the flow of its client. So does
all of it if the client cannot have a socket because we may not bind the port (`udp_engine.sock.SharedSocket`).

The guest's own flows. From a guest port that a listener leads to, it is seen as coming from the listener's port: who
answers there, and who writes there first, finds the same program. So the sockets of those flows are bound beside the
listener, too (`open_socket`). Flows that were there before the listener, as is usual with `auto`, have the port that it
wants, and begin again (`free_ports`).

Dropped and counted: sources that nobody can answer to (multicast, broadcast, unspecified, port 0); clients of a family
that the guest has no address in; clients for whom there is no socket, for the reason that the kernel gives.
"""

from __future__ import annotations

import socket
from collections.abc import Container, Iterable
from typing import Any

from .. import addr
from ..flow.context import Context
from ..linux.mmsg import SLOT, AddressReceiver, Envelope
from ..loop.each import each, record
from ..policy.rules import Listener
from ..splice.udp import UdpSplice
from ..udp import Udp
from ..udp_engine.io import reason
from ..udp_engine.sock import Client, Misdelivered, SharedSocket, is_self_connected, open_client, open_socket, opener

BATCHES_MAX = 8  # for one event
MISDELIVERED_MAX = 1024  # handled for one event


def refuse(peer: bytes, port: int) -> str | None:
    """Why nobody can answer to a datagram from there, None if that is possible."""
    if not addr.is_unicast(peer):
        return "udp: source is not unicast"
    return None if port else "udp: source port 0"


def _one_address(listener: Listener) -> bool:
    return listener.rule.addr is not None and not addr.is_unspecified(listener.rule.addr)


class UdpIn:
    """What listeners get. `udp` is None if there is no tap."""

    def __init__(self, ctx: Context, udp: Udp | None) -> None:
        self._ctx = ctx
        self._udp = udp
        self.splice = UdpSplice(ctx)
        self._receiver = AddressReceiver()
        self._misdelivered: list[Misdelivered] = []
        self._timer = ctx.timers.services.new(self._deliver_misdelivered)
        self._leading: dict[int, list[Listener]] = {}  # to a port of the guest
        if udp is not None:
            udp.opener = self.open_socket

    def sock_handler(self, listener: Listener, now: float) -> None:
        """A listener is readable."""
        for _ in range(BATCHES_MAX):
            try:
                self._receive(listener, now)
            except BlockingIOError:
                break
            except OSError as e:
                self._ctx.drops[f"udp: receive: {reason(e)}"] += 1
                break
        self._deliver_misdelivered(now)

    def _receive(self, listener: Listener, now: float) -> None:
        """A batch. Raises BlockingIOError, OSError."""
        receiver = self._receiver
        lengths, envelopes = receiver.receive_from(listener.fd)
        groups: dict[bytes, list[int]] = {}
        start = 0
        for length, envelope in zip(lengths, envelopes, strict=True):
            groups.setdefault(envelope, []).extend((start, start + length, 0))
            start += SLOT
        each(groups.items(), self._group, self._fault_at, listener, now)

    def _group(self, group: tuple[bytes, list[int]], listener: Listener, now: float) -> None:
        """Hand on the datagrams of one client to one local address."""
        envelope, frames = group
        e = Envelope.parse(envelope)
        self._dispatch(Client(listener, e.peer, e.port, e.local, e.scope), self._receiver.mv, frames, now)

    def _fault_at(self, what: object, e: Exception) -> None:
        """Datagrams of one client are lost, or a listener ends; the others go on."""
        record(self._ctx.drops, "datagrams at a listener", e)

    def _deliver_misdelivered(self, now: float) -> None:
        """Hand out what came to sockets of clients before they were connected."""
        misdelivered, left = self._misdelivered, MISDELIVERED_MAX
        while misdelivered and left:
            some = misdelivered[:left]  # each of them may add others
            del misdelivered[:left]
            left -= len(some)
            each(some, self._deliver_one, self._fault_at, now)
        if misdelivered:
            self._ctx.drops["udp: too much for one event"] += len(misdelivered)
            misdelivered.clear()

    def _deliver_one(self, datagram: Misdelivered, now: float) -> None:
        client, payload = datagram
        self._dispatch(client, memoryview(payload), [0, len(payload), 0], now)

    def _dispatch(self, client: Client, mv: memoryview, frames: list[int], now: float) -> None:
        """Datagrams of one client, [start, end, 0]* in `mv`."""
        why = refuse(client.peer, client.port)
        if why is not None:
            self._ctx.drops[why] += len(frames) // 3
        elif self._ctx.fwd.spliced(client.peer, client.listener.rule):
            self.splice.inbound(client, lambda: self._open(client), mv, frames, now)
        else:
            self._to_guest(client, mv, frames, now)

    def _to_guest(self, client: Client, mv: memoryview, frames: list[int], now: float) -> None:
        """Datagrams of one client, through the tap."""
        ctx, listener = self._ctx, client.listener
        source = ctx.fwd.inbound_source(client.peer, ctx.guest)
        target = None if source is None else ctx.fwd.inbound_target(source, listener.rule, ctx.guest)
        if self._udp is None:
            ctx.drops["udp: not from loopback"] += len(frames) // 3
        elif source is None or target is None:
            ctx.drops["udp: no address to deliver to or from"] += len(frames) // 3
        else:
            key = target + source + listener.to.to_bytes(2, "big") + client.port.to_bytes(2, "big")
            self._udp.inbound(key, client, lambda: self._open(client), mv, frames, now)

    def _open(self, client: Client) -> Any:
        """The client's socket, on the side that the listener is on. Raises OSError."""
        make = opener(self._ctx, client.listener.rule.outbound)
        return open_client(lambda: make(addr.family(client.peer), socket.SOCK_DGRAM), client, self._misdelivered)

    # Ports -----------------------------------------------------------------------------------------------------------

    def free_ports(self, ports: Container[int]) -> None:
        """Somebody is about to listen on `ports` of the host."""
        if self._udp is not None:
            self._udp.free_ports(ports)

    def begin(self, listener: Listener) -> None:
        """A listener opens."""
        rule = listener.rule
        if not rule.outbound and rule.target is None and rule.ifname is None:
            leading = self._leading.setdefault(listener.to, [])
            leading.append(listener)
            leading.sort(key=_one_address)  # any peer of the guest reaches those of all addresses

    def end(self, listeners: Iterable[Listener]) -> None:
        """Listeners close: what came by them ends with them, since its sockets keep the port from the next listener.

        All at once, since this looks at every flow: a range of ports has as many listeners, and flows are the guest's.
        """
        ending = frozenset(listeners)
        each(ending, self._lead_no_more, self._fault_at)
        if ending:
            self.splice.end(ending)
        inbound = frozenset(listener for listener in ending if not listener.rule.outbound)
        if self._udp is not None and inbound:
            self._udp.end(inbound)

    def _lead_no_more(self, listener: Listener) -> None:
        leading = self._leading.get(listener.to, [])
        if listener in leading:
            leading.remove(listener)

    def open_socket(self, host: bytes, sport: int, dport: int, now: float) -> Any:
        """A socket connected to `host`, for a flow that the guest begins from port `sport`. Raises OSError."""
        fwd = self._ctx.fwd
        source, interface = fwd.source(host)
        for listener in self._leading.get(sport, ()) if interface is None else ():
            client = Client(listener, host, dport, source or bytes(len(host)), fwd.scope(host))
            try:
                sock = self._open(client)
            except OSError:
                continue  # the port as such cannot be had for this
            if self._misdelivered:
                self._ctx.timers.services.arm(self._timer, now)
            if isinstance(sock, SharedSocket) or is_self_connected(sock, client.sockaddr(host, dport)):
                sock.close()  # it would tell of no errors; it would hear itself
                continue
            return sock
        return open_socket(fwd, host, sport, dport)
