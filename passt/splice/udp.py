"""Spliced UDP: datagrams between loopbacks, from one connected socket to another, without the tap.

                     client's end                         server's end
    ---------------  -----------------------------------  ----------------------------------------------------------
    inbound rule     the host: on the listener's port,    the namespace: its own address or its loopback
                     connected to the client
    outbound rule    the namespace: likewise              the host: its loopback
    address          the one that the client wrote to     the client's if both are loopback, else the kernel's choice
    port             the listener's                       the client's if it is free

Both directions are alike: an event at one end is a receive there and a send at the other. If an end has sent since its
last receive, one reply is likely: one plain receive, one plain write. Everything else is up to 64 messages per system
call, and GSO batches with UDP_SEGMENT (`udp_engine/io.py`). Either end turns UDP_GRO on once several datagrams come at
once.

The server. A rule names one address, or the server may listen in one family only while the client comes by the other.
The targets are tried in order. A target to which connect(2) fails is skipped. A target that refuses (ECONNREFUSED, for
an earlier datagram) is replaced by the next, which also gets the first datagram of the last batch, if that is short
enough to be kept. When every target has refused, the next batch begins with the first target again, so a server that
starts late is found in either family. After a reply nothing is kept until that server refuses. When all have refused, a
client of a loopback listener is told at its next datagram (`refusal.py`); others get no error.

Datagrams keep their traffic class. Errors are counted, and the error queue is emptied. A full socket buffer is a drop,
as on any link.

    time    condition                              consequence
    ------  -------------------------------------  -------------------------
    180 s   nothing sent or received               the flow ends
    30 s    the same, and one port is 53           the flow ends
    100 us  a receive brought 4 to 31 datagrams    the end is read again

Left out: the client's TTL, and other ICMP errors to either side.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Container
from functools import partial
from typing import Any, ClassVar

from .. import addr, log
from ..drops import Drop, Failed
from ..flow.context import Context
from ..flow.idle import IdleFlow, IdleFlows, flow_limit
from ..flow.table import ACTIVE, GUEST, HOST, Endpoints, TableFull, name_of
from ..linux.mmsg import SLOT, Receiver
from ..linux.sockopt import (
    DESTROYED,
    TRAFFIC_CLASS,
    Destroyed,
    probe_udp_gro,
    probe_udp_segment,
    read_errors,
    setting,
)
from ..loop.each import each
from ..loop.reactor import EPOLLERR, EPOLLIN, TYPE_UDP_SPLICE, Reactor, ref_data
from ..policy.rules import Listener
from ..udp_engine.flow import timeout
from ..udp_engine.gso_batch import SEGMENTS_MAX, GsoBatch, gso_batches
from ..udp_engine.io import PLAIN, Pauses, datagram_count, receive, receive_one, retry_send, transmit
from ..udp_engine.sock import Client, open_target, opener
from .refusal import Refusals

FLOWS_MAX = 8192
DESCRIPTOR_SHARE = 8  # flows of two sockets take a quarter of the descriptors that the process may have, at most
KEPT_MAX = 2048  # bytes of a datagram that is retransmitted if the server refuses it

CLIENT, SERVER = range(2)

CALLS = setting(*TRAFFIC_CLASS)


class End:
    """One socket of a flow, and the other one."""

    __slots__ = ("fd", "gro", "gso_max_segs", "gso_size", "other", "plain", "reply_expected", "side", "sock", "tos")
    other: End

    def __init__(self, side: int, segments: int) -> None:
        self.side = side
        self.gso_max_segs = segments
        self.reply_expected = False  # it has sent since the last receive: one datagram, the reply, is likely
        self.fd = -1
        self.sock: Any = None

    def attach(self, sock: Any) -> None:
        """Use `sock`, which is new, from now on."""
        self.sock, self.fd = sock, sock.fileno()
        self.gro = False
        self.gso_size = 0
        self.tos = 0  # traffic class of what it sends
        self.plain = 0  # so many single replies are received next without a look at the class


class SpliceFlow(IdleFlow):
    """A client and its server. The client's end is the flow's first socket.

    `targets` are the server's addresses, and `targets[at]` is in use. `kept` is the datagram to retransmit if that one
    refuses, to `left` more targets; None while the server replies.
    """

    __slots__ = ("answered", "at", "client", "ends", "kept", "left", "targets")
    kind = "spliced UDP flow"
    evicted = Drop.UDP_SPLICE_EVICTED
    label: ClassVar[str] = "udp_splice"
    path = "splice"

    def __init__(
        self, key: bytes, client: Client, targets: list[bytes], segments: int, idle: float, now: float
    ) -> None:
        super().__init__(key, idle, now)
        self.client = client
        self.targets = targets
        self.at = 0
        self.answered = len(targets) == 1  # with one target there is no choice
        self.kept: bytes | None = None
        self.left = 0
        self.ends = End(CLIENT, segments), End(SERVER, segments)
        self.ends[CLIENT].other, self.ends[SERVER].other = self.ends[SERVER], self.ends[CLIENT]

    @property
    def foreign(self) -> bool:
        return not self.client.listener.rule.outbound

    def endpoints(self) -> Endpoints:
        client, listener = self.client, self.client.listener
        who = addr.host_port(client.peer, client.port)
        server = addr.host_port(self.targets[self.at], listener.to)
        if listener.rule.outbound:
            return Endpoints(GUEST, who, addr.host_port(client.local, listener.port), server)
        return Endpoints(HOST, server, name_of(self.ends[SERVER].sock.getsockname), who)

    def watch(self, reactor: Reactor, kind: int) -> None:
        watched: list[int] = []
        try:
            for end in self.ends:
                if end.fd >= 0:
                    reactor.watch(end.fd, kind, self.index << 1 | end.side, EPOLLIN | EPOLLERR)
                    watched.append(end.fd)
        except OSError:
            for fd in watched:
                reactor.forget(fd)
            raise

    def sockets(self) -> tuple[tuple[int, Any], ...]:
        return tuple((end.fd, end.sock) for end in self.ends if end.fd >= 0)


class UdpSplice:
    """All spliced UDP flows."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._drops = ctx.drops
        self._by_index: list[Any] = ctx.flows.by_index
        self._flows: IdleFlows[SpliceFlow] = IdleFlows(ctx, TYPE_UDP_SPLICE, flow_limit(FLOWS_MAX, DESCRIPTOR_SHARE))
        self._receiver = Receiver()
        self._segments = SEGMENTS_MAX if probe_udp_segment() else 1
        self._gro = probe_udp_gro()
        self._to_guest, self._to_host = ctx.stats.spliced["udp"]
        self.refusals = Refusals(ctx)
        self._pauses = Pauses(ctx, self._take, self._flows.fault_at)
        ctx.reactor.handle(TYPE_UDP_SPLICE, self.sock_handler)

    # Flows -----------------------------------------------------------------------------------------------------------

    def inbound(
        self, client: Client, make: Callable[[], Any], mv: memoryview, frames: list[int], now: float, tos: int = 0
    ) -> None:
        """Send datagrams that a listener received from `client`, [start, end, 0]* in `mv`, to its server.

        `tos` is their traffic class.
        `make` opens the socket for those that follow, unless there is one.
        """
        key = _key(client)
        flow = self._flows.by_key.get(key) or self._new_flow(key, client, make, mv, frames, now)
        if flow is not None:
            flow.last = now
            self._forward(flow, flow.ends[CLIENT], gso_batches(mv, frames, flow.ends[SERVER].gso_max_segs), tos)

    def _new_flow(
        self, key: bytes, client: Client, make: Callable[[], Any], mv: memoryview, frames: list[int], now: float
    ) -> SpliceFlow | None:
        """A flow for `client`; None if there can be none, and the drops are counted."""
        ctx, count = self._ctx, len(frames) // 3
        targets = ctx.fwd.splice_targets(len(client.peer) == 16, client.listener.rule, ctx.guest)
        if not targets:
            self._drops[Drop.UDP_SPLICE_NO_TARGET] += count
            return None
        flow = SpliceFlow(key, client, targets, self._segments, timeout(mv[frames[0] : frames[1]]), now)
        try:
            flow.ends[CLIENT].attach(self._flows.open(make, now, foreign=flow.foreign))
            flow.ends[SERVER].attach(self._flows.open(lambda: self._connect(flow), now, foreign=flow.foreign))
            self._flows.add(flow, flow.ends[CLIENT].sock, now)
        except (TableFull, OSError) as e:
            for _, sock in flow.sockets():
                sock.close()
            why = Failed.UDP_SPLICE_NO_FLOW.of(e) if isinstance(e, OSError) else Drop.UDP_SPLICE_TABLE_FULL
            self._drops[why] += count
            return None
        return flow

    def _connect(self, flow: SpliceFlow) -> Any:
        """A socket connected to the target in use, or to the next one to which connect(2) succeeds. Raises OSError."""
        first = flow.at
        while True:
            try:
                return self._open(flow.client, flow.targets[flow.at])
            except OSError:
                flow.at = (flow.at + 1) % len(flow.targets)
                if flow.at == first:
                    raise

    def _open(self, client: Client, target: bytes) -> Any:
        """A socket on the side opposite to the listener, connected to `target`. Raises OSError."""
        ctx, listener = self._ctx, client.listener
        make = opener(ctx, not listener.rule.outbound)
        source, interface = ctx.fwd.source(target) if listener.rule.outbound else (None, None)
        if len(client.peer) == len(target) and addr.is_loopback(client.peer) and addr.is_loopback(target):
            source = client.peer
        family = addr.family(target)
        return open_target(
            lambda: make(family, socket.SOCK_DGRAM), ctx.fwd, source, interface, client.port, target, listener.to
        )

    # Datagrams -------------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Errors first: they are about earlier datagrams. The event may be stale."""
        flow: SpliceFlow = self._by_index[(ref & 0xFFFFFFFF) >> 1]
        end = flow.ends[ref & 1]
        if events & EPOLLERR:
            self._report(flow, end)
        if events & EPOLLIN and flow.state == ACTIVE:
            self._take(flow, end, now)

    def _take(self, flow: SpliceFlow, end: End, now: float) -> None:
        """Receive at `end` and send at the other one, and let a stream gather for a moment."""
        try:
            if end.reply_expected and not end.gro:
                end.reply_expected = False
                self._take_one(flow, end)
            else:
                received = receive(self._receiver, end, self._gro, end.other.gso_max_segs)
                count = sum([self._forward(flow, end, batches, tos) for tos, batches in received])
                self._pauses.after(count, flow, end, now)
            flow.last = now
        except BlockingIOError:
            pass  # the event was about an earlier owner of the descriptor, or nothing came during the pause
        except OSError as e:
            if e.errno in DESTROYED:
                self._destroyed(flow)
            else:
                self._report(flow, end)

    def _take_one(self, flow: SpliceFlow, end: End) -> None:
        """The same for one datagram. Raises BlockingIOError, OSError."""
        tos = 0
        if end.plain:
            end.plain -= 1
            n = end.sock.recv_into(self._receiver.mv, SLOT)
        else:
            n, tos = receive_one(self._receiver, end.sock)
            end.plain = 0 if tos or end.tos else PLAIN
        self._forward(flow, end, [(n, n, [self._receiver.mv[:n]])], tos)

    def _forward(self, flow: SpliceFlow, end: End, received: list[GsoBatch], tos: int) -> int:
        """Send what `end` received in traffic class `tos` at the other end; returns the number of datagrams."""
        other = end.other
        if tos != other.tos:
            peer = flow.client.peer if other.side == CLIENT else flow.targets[flow.at]
            other.sock.setsockopt(*TRAFFIC_CLASS[len(peer) == 16], tos)
            other.tos, other.plain = tos, 0
        count = moved = 0
        for size, total, views in received:
            count += datagram_count(size, total)
            moved += total
            try:
                transmit(other, size, total, views)
            except OSError as e:
                report = partial(self._report, flow, other)
                for why, lost, _ in retry_send(other, size, total, views, e, report):
                    self._drops[Failed.UDP_SPLICE_SEND.of(why)] += lost
                    if why.errno in DESTROYED:
                        self._destroyed(flow)
        other.reply_expected = True
        if (end.side == SERVER) == flow.client.listener.rule.outbound:
            flow.to_guest += moved
            self._to_guest.bytes += moved
        else:
            flow.to_host += moved
            self._to_host.bytes += moved
        if end.side == SERVER:
            if not flow.answered:
                flow.answered, flow.kept = True, None
        elif not flow.answered:
            self._keep(flow, received)
        return count

    # The server ------------------------------------------------------------------------------------------------------

    def _keep(self, flow: SpliceFlow, received: list[GsoBatch]) -> None:
        """No reply has come: keep the first datagram, in case the target refuses it."""
        size, _, views = received[0]
        flow.kept = bytes(views[0][:size]) if size <= KEPT_MAX else None
        flow.left = len(flow.targets) - 1

    def _report(self, flow: SpliceFlow, end: End) -> None:
        """Empty the error queue of `end`; replace a server that refuses."""
        refused = False
        try:
            errors = read_errors(end.sock)
        except Destroyed:
            self._destroyed(flow)
            return
        for error, _ in errors:
            if log.debug_on:
                log.debug(f"Flow {flow.index} ({flow.kind}): error on socket {end.fd}: {error}")
            self._drops[Failed.UDP_SPLICE.of(error.errno)] += 1
            refused = refused or error.errno == errno.ECONNREFUSED
        if not refused or end.side != SERVER:
            return
        if len(flow.targets) == 1 or (flow.kept is not None and not flow.left):
            self._ctx.reactor.between_turns(partial(self._refuse, flow))
        if len(flow.targets) > 1:
            self._next_target(flow)

    def _refuse(self, flow: SpliceFlow, now: float) -> None:
        """All targets have refused: let the client's next datagram be refused."""
        listener = flow.client.listener
        if flow.state == ACTIVE and self.refusals.refuse(listener, now):
            self._flows.close_at_once(flow, "refused")

    def _destroyed(self, flow: SpliceFlow) -> None:
        """A socket of it is of no use: the client's next datagram begins another flow."""
        if flow.state == ACTIVE:
            self._flows.close(flow, "socket destroyed")

    def _next_target(self, flow: SpliceFlow) -> None:
        """The server refused: try the next target, with the datagram that was kept unless all have refused it."""
        server = flow.ends[SERVER]
        flow.answered = False
        flow.at = (flow.at + 1) % len(flow.targets)
        try:
            sock = self._connect(flow)
        except OSError as e:
            self._drops[Failed.UDP_SPLICE_NO_SERVER.of(e)] += 1
            return
        self._ctx.reactor.retire(server.fd, server.sock)
        server.attach(sock)
        self._ctx.reactor.watch(server.fd, TYPE_UDP_SPLICE, flow.index << 1 | SERVER, EPOLLIN | EPOLLERR)
        if flow.kept is not None and flow.left:
            flow.left -= 1
            size = len(flow.kept)
            try:
                transmit(server, size, size, [memoryview(flow.kept)])
            except OSError as e:
                self._drops[Failed.UDP_SPLICE_SEND.of(e)] += 1

    def end(self, listeners: Container[Listener]) -> None:
        """Listeners close, or lead elsewhere: their flows end, whose sockets would keep the port from the next one."""
        self.refusals.end(listeners)
        ending = [f for f in self._flows.by_key.values() if f.client.listener in listeners]
        each(ending, self._flows.close, self._flows.fault_at, "listener gone")

    def fault(self, ref: int) -> None:
        """A handler failed on the flow of this reference: end only that flow."""
        self._flows.fault(ref_data(ref) >> 1)


def _key(client: Client) -> bytes:
    """Key of a client's flow: the listener's side and port, and both addresses."""
    ports = client.port.to_bytes(2, "big") + client.listener.port.to_bytes(2, "big")
    return bytes((client.listener.rule.outbound,)) + client.peer + client.local + ports
