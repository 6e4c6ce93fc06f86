"""UDP clients of listeners: first datagrams, and a connected socket for each client.

A listener (`policy/rules.py`) receives the datagrams of all clients. Each client gets a socket of its own, bound to the
address and port that it wrote to, and connected to the client (`udp_engine.sock.open_client`). From then on the kernel
delivers the client's datagrams there, and answers leave from there. So a listener receives first datagrams, and those
of clients that cannot have a socket.

    rule      client      configuration                  goes to                        address that is seen
    --------  ----------  -----------------------------  -----------------------------  ----------------------------
    outbound  loopback    any                            UdpSplice: the host            loopback
    inbound   loopback    no --no-splice                 UdpSplice: the namespace       loopback, or the namespace's
    inbound   any other   --splice-only                  dropped, counted
    inbound   any other   otherwise                      Udp: the guest, by the tap     `Forwarding.inbound_source`

Order. An event brings a batch, grouped by client and local address. Datagrams that the kernel queues at the listener
while the batch is handled are older than any at the new sockets, so the listener is read until it is empty, for a
bounded number of batches. Then come misdelivered datagrams: those that a new socket received before connect(2), from
its own client or from others, which may get sockets in turn. Later datagrams at a new socket are read in a later turn.

A datagram to a broadcast address always comes by the listener, and goes to the flow of its client. Those to multicast
groups come by other sockets (`udp_engine/groups.py`).
So do all datagrams of a client whose socket may not bind the port (`udp_engine.sock.SharedSocket`).

Flows of the guest. A flow from a guest port that a listener leads to is seen as coming from the listener's port: the
peer's answers, and its own first datagrams, reach the same program. So the sockets of these flows are bound to the
listener's port, too (`udp_engine/outbound.py`). Flows older than the listener, as is usual with `auto`, may have the
port that it wants. They begin again, if it can be had by that (`free_ports`, `Listeners.open`).

No guest has spoken yet: a few datagrams are held until one does (`flow/neighbours.py`).

A port of the guest that is closed: `udp_refused.py`.

Dropped and counted: sources that cannot be answered (multicast, broadcast, unspecified, port 0); clients of a family in
which the guest has no address; clients without a socket, with the kernel's reason.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from functools import partial

from .. import addr
from ..drops import Drop, Failed, Reason
from ..flow.context import Context
from ..linux.mmsg import SLOT, AddressReceiver, Envelope
from ..loop.each import each, record
from ..policy.rules import Listener
from ..splice.udp import UdpSplice
from ..udp import Udp
from ..udp_engine.outbound import Outbound
from ..udp_engine.sock import Client, Misdelivered
from .udp_refused import UdpRefused

BATCHES_MAX = 8  # per event
MISDELIVERED_MAX = 1024  # datagrams per event


def refuse(peer: bytes, port: int) -> Reason | None:
    """The reason why a datagram from there cannot be answered, None if it can."""
    if not addr.is_unicast(peer):
        return Drop.UDP_SOURCE
    return None if port else Drop.UDP_SOURCE_PORT_0


class UdpIn:
    """The datagrams of listeners. `udp` is None without a tap."""

    def __init__(self, ctx: Context, udp: Udp | None) -> None:
        self._ctx = ctx
        self._udp = udp
        self.splice = UdpSplice(ctx)
        self._receiver = AddressReceiver()
        self._outbound = udp.outbound if udp is not None else Outbound(ctx)
        if udp is not None:
            UdpRefused(ctx, udp, self.splice.refusals)
        self._outbound.timer = ctx.timers.services.new(self._deliver_misdelivered)

    def sock_handler(self, listener: Listener, now: float) -> None:
        """A listener is readable."""
        for _ in range(BATCHES_MAX):
            try:
                self._receive(listener, now)
            except BlockingIOError:
                break
            except OSError as e:
                self._ctx.drops[Failed.UDP_RECEIVE.of(e)] += 1
                break
        self._deliver_misdelivered(now)

    def _receive(self, listener: Listener, now: float) -> None:
        """Receive and hand on a batch. Raises BlockingIOError, OSError."""
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
        self._dispatch(Client(listener, e.peer, e.port, e.local, e.scope), self._receiver.mv, frames, now, e.tos)

    def _fault_at(self, what: object, e: Exception) -> None:
        """Datagrams of one client are lost, or a listener ends; the others go on."""
        record(self._ctx.drops, "datagrams at a listener", e)

    def _deliver_misdelivered(self, now: float) -> None:
        """Hand on what sockets of clients received before connect(2)."""
        misdelivered, left = self._outbound.misdelivered, MISDELIVERED_MAX
        while misdelivered and left:
            some = misdelivered[:left]  # each of them may add others
            del misdelivered[:left]
            left -= len(some)
            each(some, self._deliver_one, self._fault_at, now)
        if misdelivered:
            self._ctx.drops[Drop.UDP_TOO_MUCH] += len(misdelivered)
            misdelivered.clear()

    def _deliver_one(self, datagram: Misdelivered, now: float) -> None:
        client, payload = datagram
        self._dispatch(client, memoryview(payload), [0, len(payload), 0], now)

    def _dispatch(self, client: Client, mv: memoryview, frames: list[int], now: float, tos: int = 0) -> None:
        """Hand on datagrams of one client and one traffic class, [start, end, 0]* in `mv`."""
        why = refuse(client.peer, client.port)
        if why is not None:
            self._ctx.drops[why] += len(frames) // 3
        elif self._ctx.fwd.spliced(client.peer, client.listener.rule):
            self.splice.inbound(client, lambda: self._outbound.open_client(client), mv, frames, now, tos)
        else:
            self._to_guest(client, mv, frames, now, tos)

    def _to_guest(self, client: Client, mv: memoryview, frames: list[int], now: float, tos: int) -> None:
        """Hand datagrams of one client to the tap."""
        ctx, listener = self._ctx, client.listener
        source = ctx.fwd.inbound_source(client.peer, ctx.guest)
        target = None if source is None else ctx.fwd.inbound_target(source, listener.rule, ctx.guest)
        if self._udp is None:
            ctx.drops[Drop.UDP_NOT_FROM_LOOPBACK] += len(frames) // 3
        elif source is None or target is None:
            ctx.drops[Drop.UDP_NO_TARGET] += len(frames) // 3
        elif ctx.guest.mac == addr.BROADCAST_MAC:
            self._hold(client, target, mv, frames, now)
        else:
            key = target + source + listener.to.to_bytes(2, "big") + client.port.to_bytes(2, "big")
            self._udp.inbound(key, client, lambda: self._outbound.open_client(client), mv, frames, now, tos)

    def _hold(self, client: Client, target: bytes, mv: memoryview, frames: list[int], now: float) -> None:
        """Keep datagrams until the guest's MAC address is known (`flow/neighbours.py`)."""
        for i in range(0, len(frames), 3):
            datagram = client, bytes(mv[frames[i] : frames[i + 1]])
            if not self._ctx.neighbours.hold(target, partial(self._deliver_one, datagram), self._give_up, now):
                self._give_up(now)

    def _give_up(self, now: float) -> None:
        self._ctx.drops[Drop.UDP_NO_GUEST] += 1

    # Ports -----------------------------------------------------------------------------------------------------------

    def ports_in_use(self, ports: Container[int]) -> set[int]:
        """Those of `ports` of the host that flows of the guest may keep."""
        return self._udp.ports_in_use(ports) if self._udp is not None else set()

    def free_ports(self, ports: Container[int]) -> None:
        """Close flows that keep `ports` of the host from listeners about to open."""
        if self._udp is not None:
            self._udp.free_ports(ports)

    def begin(self, listener: Listener) -> None:
        """A listener opens."""
        rule = listener.rule
        if not rule.outbound and rule.target is None and rule.ifname is None:
            self._outbound.lead(listener)

    def end(self, listeners: Iterable[Listener]) -> None:
        """Listeners close: their flows end, whose sockets would keep the port from the next listener.

        One call for all of them, since it looks at every flow, and a range of ports has as many listeners.
        """
        ending = frozenset(listeners)
        each(ending, self._outbound.lead_no_more, self._fault_at)
        if ending:
            self.splice.end(ending)
        inbound = frozenset(listener for listener in ending if not listener.rule.outbound)
        if self._udp is not None and inbound:
            self._udp.end(inbound)
