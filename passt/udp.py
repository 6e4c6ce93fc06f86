"""UDP: datagrams between the guest and connected sockets of the host, in GSO batches wherever a kernel allows.

Guest -> host (`tap_handler`, once per flow and batch)
    The key finds the flow, or begins one: the forwarding rules give the host address, and a socket connects to it. The
    datagrams of a batch become GSO batches (`udp_engine/gso_batch.py`), and each is one write with UDP_SEGMENT
    (`udp_engine/io.py`). The host sees the guest's port if it is free, or the port of a listener that leads to the
    guest's (`UdpIn.open_socket`).

Host -> guest (`sock_handler`, on EPOLLIN)
    If the guest has sent since the last receive, one reply is likely, and one plain receive takes it. Everything else
    is recvmmsg, with UDP_GRO once a flow gets several datagrams at once. GSO batches go to the guest as UDP
    super-frames if it takes them, else frame by frame. Datagrams above the guest's MTU are fragmented, with their
    checksum complete (`_send_fragments`).

Queries to an address that stands for the host's resolvers (port 53), and datagrams to multicast groups, are flows of
other kinds: `udp_engine/dns.py`, `udp_engine/group_sender.py`.

Clients of the host (`inbound`, from `ports/udp_in.py`)
    The first datagrams of a client, which a listener received, and a socket connected to that client make a flow of the
    same kind. Its key is that of the guest's answers. Two clients may have the same key: they have the same port, and
    two addresses that the guest sees as one; one client wrote to two addresses or ports here; or the guest began the
    flow, and its peer now comes by a listener. The flow of the last one to send stays, so each gets its answers.

Errors (EPOLLERR, or a send or receive that reports the error of an earlier datagram)
    The error queue is emptied. Each ICMP error goes on to the guest, and quotes the guest's datagram. Errors of the
    host's own kernel (no route, prohibited, too big for the link or the path) reach the guest in the same way.

Fields of IP headers
    TTL, traffic class and DF of the guest's datagrams are those of its flow's socket (`flow/ip_fields.py`). The
    traffic class of what comes back is that of the frames to the guest.

    time    condition                              consequence
    ------  -------------------------------------  -------------------------
    180 s   nothing sent or received               the flow ends
    30 s    the same, and it began with a DNS      the flow ends
            query, to whatever port
    100 us  a receive brought 4 to 31 datagrams    the socket is read again

Left out: datagrams to flows of the guest from any but the peer that it wrote to, unless the port is forwarded; send
queues, since a full socket buffer is a drop, as on any link.
"""

from __future__ import annotations

import errno
import os
import random
import time
from collections.abc import Callable, Collection, Container
from functools import partial
from typing import Any, Final

from . import addr, log
from .drops import Drop, Failed, Reason
from .flow.context import Context
from .flow.errors import Errors
from .flow.idle import IdleFlows, flow_limit
from .flow.ip_fields import CLASS
from .flow.source import LOST
from .flow.table import ACTIVE, TableFull
from .linux.mmsg import SLOT, Receiver
from .linux.sockopt import (
    DESTROYED,
    Destroyed,
    default_hops,
    path_mtu,
    probe_udp_gro,
    probe_udp_segment,
    read_errors,
)
from .loop.each import each
from .loop.reactor import EPOLLERR, EPOLLIN, TYPE_UDP, ref_data
from .policy.config import Config
from .policy.resolvers import DNS_PORT
from .policy.rules import Listener
from .udp_engine.dns import Dns
from .udp_engine.flow import UdpFlow, timeout
from .udp_engine.group_sender import GroupSenders
from .udp_engine.groups import Groups
from .udp_engine.gso_batch import SEGMENTS_MAX, GsoBatch, gso_batches
from .udp_engine.io import CONGESTED, PLAIN, Pauses, datagram_count, receive, receive_one, retry_send, transmit
from .udp_engine.outbound import Outbound
from .udp_engine.sock import Client
from .wire import ether, icmp, udp
from .wire.checksum import PROTO_UDP
from .wire.fragment import fragments
from .wire.virtio import VNET

UDP_FLOWS_MAX: Final = 32768
DESCRIPTOR_SHARE: Final = 2  # at most one in so many of the descriptors that the process may have
NO_ROUTE: Final = OSError(errno.ENETUNREACH, "the host has lost this family")


def refuse(src: bytes, dst: bytes, key: bytes) -> Reason | None:
    """The reason why a datagram of the guest cannot begin a flow, None if it can."""
    if not addr.is_unicast(src) or addr.is_unspecified(dst):
        return Drop.UDP_NO_ADDRESS
    if addr.is_martian(src) or addr.is_martian(dst):
        return Drop.UDP_MARTIAN
    if not any(key[-4:-2]) or not any(key[-2:]):
        return Drop.UDP_PORT_0
    return None


class Udp:
    """All UDP flows."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._drops = ctx.drops
        self._mv = ctx.pool.mv
        self._by_index: list[Any] = ctx.flows.by_index
        self._flows: IdleFlows[UdpFlow] = IdleFlows(ctx, TYPE_UDP, flow_limit(UDP_FLOWS_MAX, DESCRIPTOR_SHARE))
        self._by_key = self._flows.by_key
        self._errors = Errors(ctx)
        self._receiver = Receiver()
        self._ident = random.getrandbits(32)  # identification of the next fragmented datagram
        self._segments = SEGMENTS_MAX if probe_udp_segment() else 1
        self._gro = probe_udp_gro()
        log.debug(f"UDP: UDP_SEGMENT {'on' if self._segments > 1 else 'off'}, UDP_GRO {'on' if self._gro else 'off'}")
        self._hops = default_hops()
        self.outbound = Outbound(ctx)
        self.groups = Groups(ctx, self.outbound)
        self.senders = GroupSenders(ctx, self.outbound, self.groups)
        self.dns = Dns(ctx, self._to_guest, self._query_refused)
        self._pauses = Pauses(ctx, lambda flow, _, now: self._take(flow, now), self._flows.fault_at)
        ctx.services.on_forget.append(self.forget)
        ctx.services.take_end(UdpFlow.label, self._source_gone)
        ctx.reactor.handle(TYPE_UDP, self.sock_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._mtu, self._disabled = config.mtu, config.no_udp

    # Guest -> host ---------------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, frames: list[int], now: float, fields: int = 0) -> None:
        """Datagrams of one flow in the packet pool: [payload start, payload end, size of the datagrams in it or 0]*.

        `fields` are those of their IP headers (`flow/ip_fields.py`). The lengths were checked by the caller.
        """
        flow = self._by_key.get(key) or self._new_flow(key, frames, now, fields)
        if flow is None:
            return
        flow.last = now
        flow.reply_expected = True
        if fields != flow.fields:
            flow.set_fields(fields)
        if len(frames) == 3 and not frames[2]:
            size = frames[1] - frames[0]
            self._send(flow, size, size, [self._mv[frames[0] : frames[1]]], now)
            return
        for size, total, views in gso_batches(self._mv, frames, flow.gso_max_segs):
            self._send(flow, size, total, views, now)

    def _send(self, flow: UdpFlow, size: int, total: int, views: list[memoryview], now: float) -> None:
        """Send one GSO batch, and handle its errors."""
        try:
            if size == total > 0 and not flow.gso_size and flow.fd >= 0:
                os.writev(flow.fd, views)  # what `transmit` finds out in three times as long
            else:
                transmit(flow, size, total, views)
            flow.to_host += total
        except OSError as e:
            for why, count, first in retry_send(flow, size, total, views, e, partial(self._report, flow, now)):
                self._drops[Failed.UDP_SEND.of(why)] += count
                if why.errno in DESTROYED:
                    self._destroyed(flow)
                elif why.errno not in CONGESTED:
                    mtu = path_mtu(flow.sock, len(flow.host) == 16) if why.errno == errno.EMSGSIZE else 0
                    self._refused(why, flow.key, flow.src, flow.dst, first, now, mtu)

    def _new_flow(self, key: bytes, frames: list[int], now: float, fields: int) -> UdpFlow | None:
        """A flow for `key`; None if it is of another kind, or if there can be none, which is counted and reported."""
        ctx = self._ctx
        half = (len(key) - 4) // 2
        src, dst = key[:half], key[half : 2 * half]
        why = Drop.UDP_DISABLED if self._disabled else refuse(src, dst, key)
        if why is None and ctx.fwd.family(dst) is None:
            why = Drop.UDP_FAMILY_OFF
        if why is not None:
            self._drops[why] += len(frames) // 3
            return None
        if addr.is_multicast(dst):
            self.senders.tap_handler(key, frames, now, fields)
            return None
        sport, dport = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        host = ctx.fwd.outbound(dst)
        if ctx.resolvers.serve(dst, dport):
            if dport == DNS_PORT:
                self.dns.tap_handler(key, frames, now)
                return None
            resolver = ctx.resolvers.pick(len(dst) == 16, now)
            host = resolver.addr if resolver is not None else host
        flow = UdpFlow(key, host, now, self._hops[len(host)])
        flow.begins_with(self._mv[frames[0] : frames[0] + frames[2] if frames[2] else frames[1]])
        e = self._open(flow, partial(self.outbound.open, host, sport, dport, now), len(frames) // 3, now)
        if isinstance(e, OSError):
            self._refused(e, key, src, dst, self._mv[frames[0] : frames[1]], now)
        return flow if e is None else None

    def _open(self, flow: UdpFlow, make: Callable[[], Any], count: int, now: float) -> OSError | TableFull | None:
        """Open the socket of `flow` and add it to the table; returns the error otherwise, and counts `count` drops."""
        ctx = self._ctx
        try:
            sock = self._flows.open(make, now, foreign=flow.foreign)
        except OSError as e:
            self._drops[Failed.UDP_NO_SOCKET.of(e)] += count
            return e
        other = self._by_key.get(flow.key)
        if other is not None:
            self._flows.close(other, "replaced")
        try:
            self._flows.add(flow, sock, now)
        except (TableFull, OSError) as e:
            sock.close()
            self._drops[Failed.UDP_NO_FLOW.of(e) if isinstance(e, OSError) else Drop.UDP_TABLE_FULL] += count
            return e
        flow.gso_max_segs = self._segments
        flow.build_header(ctx.guest.mac_of(flow.src), ctx.lan.mac_of(flow.dst), self._mtu)
        return None

    def _refused(
        self, e: OSError, key: bytes, src: bytes, dst: bytes, payload: memoryview, now: float, mtu: int = 0
    ) -> None:
        """Report an error of the host's kernel to the guest, for one of its datagrams. `mtu` would fit it."""
        if addr.is_unicast(dst):
            self._errors.refused(e.errno or 0, src, dst, _quote(key, src, dst, payload[: icmp.QUOTE_MAX6]), now, mtu)

    def _query_refused(self, flow: UdpFlow, e: OSError, payload: bytes, now: float) -> None:
        """The same for a query that no resolver takes (`udp_engine/dns.py`)."""
        self._refused(e, flow.key, flow.src, flow.dst, memoryview(payload), now)

    # Host -> guest ---------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Errors first: they are about earlier datagrams. The event may be stale."""
        flow: UdpFlow = self._by_index[ref & 0xFFFFFFFF]
        if events & EPOLLERR:
            self._report(flow, now)
        if events & EPOLLIN and flow.state == ACTIVE:
            self._take(flow, now)

    def _take(self, flow: UdpFlow, now: float) -> None:
        """Receive, and let a stream gather for a moment."""
        try:
            if flow.reply_expected and not flow.gro:
                flow.reply_expected = False
                self._receive_one(flow)
            else:
                self._pauses.after(self._receive(flow), flow, flow, now)
            flow.last = now
        except BlockingIOError:
            pass  # the event was about an earlier owner of the descriptor, or nothing came during the pause
        except OSError as e:
            if e.errno in DESTROYED:
                self._destroyed(flow)
            else:
                self._report(flow, now)

    def _receive_one(self, flow: UdpFlow) -> None:
        receiver = self._receiver
        mv, n = receiver.mv, 0
        if flow.plain:
            flow.plain -= 1
            n = flow.sock.recv_into(mv, SLOT)
        else:
            n, tos = receive_one(receiver, flow.sock)
            if tos != flow.tos:
                flow.set_class(tos)
            if not tos and not flow.fields & CLASS:
                flow.plain = PLAIN
        if flow.asked >= 0:
            flow.answered(mv[:n])
        flow.to_guest += n
        if n > flow.payload_max:
            self._send_fragments(flow, mv[:n])
        else:
            self._ctx.link.send_payload((flow.header(n, n), mv[:n]))

    def _to_guest(self, flow: UdpFlow, payload: memoryview) -> None:
        """Send one datagram of a flow to the guest, also one of `udp_engine/dns.py`."""
        n = len(payload)
        flow.to_guest += n
        if n > flow.payload_max:
            self._send_fragments(flow, payload)
        else:
            self._ctx.link.send_payload((flow.header(n, n), payload))

    def _receive(self, flow: UdpFlow) -> int:
        """Receive a batch; returns its number of datagrams. Raises BlockingIOError, OSError."""
        segments = SEGMENTS_MAX if self._ctx.link.uso else 1
        received = receive(self._receiver, flow, self._gro, segments)
        return sum([self._deliver(flow, tos, batches) for tos, batches in received])

    def _deliver(self, flow: UdpFlow, tos: int, received: list[GsoBatch]) -> int:
        """Send GSO batches of one traffic class to the guest; returns their number of datagrams."""
        if tos != flow.tos:
            flow.set_class(tos)
        link = self._ctx.link
        count = 0
        for size, total, views in received:
            count += datagram_count(size, total)
            flow.to_guest += total
            self._ctx.reactor.moved += total
            if size > flow.payload_max:
                self._send_datagrams(flow, size, views)
            else:
                link.send_payload((flow.header(total, size), *views))
        return count

    def _send_datagrams(self, flow: UdpFlow, size: int, views: list[memoryview]) -> None:
        """Send each datagram of a GSO batch by itself, in fragments where it needs them."""
        joined = memoryview(b"".join(views))
        for start in range(0, len(joined), size):
            payload = joined[start : start + size]
            if len(payload) > flow.payload_max:
                self._send_fragments(flow, payload)
            else:
                self._ctx.link.send_payload((flow.header(len(payload), len(payload)), payload))

    def _send_fragments(self, flow: UdpFlow, payload: memoryview) -> None:
        """Send a datagram that is longer than the MTU that the guest had when the flow began."""
        message = udp.datagram(flow.dst, flow.src, flow.dport, flow.sport, bytes(payload))
        ip_at = VNET.size + ether.HEADER.size
        ether_header = bytes(flow.hdr[VNET.size : ip_at])
        mtu = flow.payload_max + len(flow.hdr) - ip_at
        self._ident += 1
        for packet in fragments(flow.dst, flow.src, PROTO_UDP, message, mtu, self._ident, tos=flow.tos):
            self._ctx.link.send_frame(ether_header + packet)

    def inbound(
        self,
        key: bytes,
        client: Client,
        make: Callable[[], Any],
        mv: memoryview,
        frames: list[int],
        now: float,
        tos: int = 0,
    ) -> None:
        """Send datagrams that a listener received from `client`, [start, end, 0]* in `mv`, to the guest under `key`.

        `tos` is their traffic class.
        `make` opens the socket for those that follow, unless there is one. Another client with the same key loses its
        flow: answers go to the one that sent last.
        """
        flow = self._by_key.get(key)
        if flow is None or flow.client != client:
            host = client.peer
            flow = UdpFlow(key, host, now, self._hops[len(host)], client)
            flow.timeout = timeout(mv[frames[0] : frames[1]])
            if self._open(flow, make, len(frames) // 3, now) is not None:
                return
        flow.last = now
        self._deliver(flow, tos, gso_batches(mv, frames, SEGMENTS_MAX if self._ctx.link.uso else 1))

    def end(self, listeners: Collection[Listener]) -> None:
        """Listeners on the host close: flows that may use their ports end, and the ports are free for others."""
        ports = {listener.to for listener in listeners}
        ending = [
            flow
            for flow in self._by_key.values()
            if (flow.sport in ports if flow.client is None else flow.client.listener in listeners)
        ]
        each(ending, self._flows.close, self._flows.fault_at, "listener gone")

    def flow(self, key: bytes) -> UdpFlow | None:
        """The flow with this key."""
        return self._by_key.get(key)

    def end_flow(self, flow: UdpFlow, why: str) -> None:
        """End a flow, and close its socket at once."""
        self._flows.close_at_once(flow, why)

    def ports_in_use(self, ports: Container[int]) -> set[int]:
        """Those of `ports` that the guest has flows from."""
        own = {f.sport for f in self._by_key.values() if f.client is None and f.sport in ports}
        return own | self.groups.ports_in_use(ports) | self.senders.ports_in_use(ports)

    def free_ports(self, ports: Container[int]) -> None:
        """Close flows of the guest that may have `ports`, for listeners about to open. They begin again."""
        conflicting = [f for f in self._by_key.values() if f.client is None and f.sport in ports]
        each(conflicting, self._make_way, self._flows.fault_at, time.monotonic())
        self.senders.free_ports(ports)
        self.groups.free_ports(ports)

    def _make_way(self, flow: UdpFlow, now: float) -> None:
        """Close a flow at once; its errors and a batch of datagrams, which came in this turn, reach the guest first."""
        self._report(flow, now)
        if flow.state == ACTIVE:
            self._take(flow, now)
        if flow.state == ACTIVE:
            self._flows.close_at_once(flow, "made way for a listener")

    # Errors ----------------------------------------------------------------------------------------------------------

    def _report(self, flow: UdpFlow, now: float) -> None:
        """Report what is in the flow's error queue to the guest."""
        try:
            errors = read_errors(flow.sock)
        except Destroyed:
            self._destroyed(flow)
            return
        for error, quoted in errors:
            if log.debug_on:
                log.debug(f"Flow {flow.index} (UDP flow): error on socket {flow.fd}: {error}")
            if error.too_big_here:
                continue  # the send that failed reports it (`_send`)
            if addr.is_unicast(flow.dst):
                packet = _quote(flow.key, flow.src, flow.dst, quoted)
                self._errors.reported(error, flow.src, flow.dst, flow.host, packet, now)

    def _source_gone(self, flow: Any, why: str) -> None:
        """The flow's address on the host is gone. Without another one, a guest that waits for an answer is told."""
        if why == LOST:
            self._refused(NO_ROUTE, flow.key, flow.src, flow.dst, memoryview(b""), time.monotonic())
        self._flows.end(flow, why)

    def _destroyed(self, flow: UdpFlow) -> None:
        """Its socket is of no use: the next datagram begins another flow."""
        if flow.state == ACTIVE:
            self._flows.close(flow, "socket destroyed")

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end only that flow."""
        self._flows.fault(ref_data(ref))

    def fault_key(self, key: bytes) -> None:
        """The same, for a handler that failed on datagrams of the guest."""
        self._flows.fault_key(key)
        self.dns.fault_key(key)
        self.senders.fault_key(key)

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")
        self.dns.forget()
        self.senders.forget()


def _quote(key: bytes, src: bytes, dst: bytes, payload: bytes | memoryview) -> bytes:
    """The guest's datagram, as an ICMP error quotes it."""
    sport, dport = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
    return icmp.quote_udp(src, dst, sport, dport, bytes(payload))
