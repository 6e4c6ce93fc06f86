"""UDP: datagrams between the guest and connected sockets of the host, in runs of equal size wherever a kernel allows.

Guest -> host (`tap_handler`, once per flow and batch)
    The key finds the flow, or makes one: host address by the forwarding rules, a socket connected to it. The datagrams
    of the batch are joined to runs (`udp_engine/gso_batch.py`) and each run is one write with UDP_SEGMENT
    (`udp_engine/io.py`). The host sees the guest's port, or the one that leads to it (`UdpIn.open_socket`), if it can
    be had.

Host -> guest (`sock_handler`, on EPOLLIN)
    If the guest has sent since we last received, one datagram is likely and one plain receive takes it. Everything else
    is recvmmsg, with UDP_GRO once a flow gets several at once. Runs go to the guest as UDP super-frames if it takes
    them, else frame by frame. What is longer than the guest's MTU is fragmented, with its checksum complete
    (`_send_fragments`).

Queries to an address that stands for the host's resolvers (port 53) are flows of another kind: `udp_engine/dns.py`.

Host first (`inbound`, from `ports/udp_in.py`)
    A client's first datagrams, which a listener got, and a socket connected to that client make a flow of the same
    kind: its key is what the guest's answers will have. Two clients with the same key (one port, and two addresses that
    the guest sees as one; one client, and two of our addresses or ports; or the guest began it, and the peer now comes
    by a listener) cannot both have it. The one heard last has, so each gets the answers to what it asks.

Errors (EPOLLERR, or a send or receive that reports what an earlier datagram met)
    The error queue is emptied; each ICMP error goes on to the guest, quoting its own datagram. What the
    kernel refuses by itself (no route, prohibited) is told to the guest in the same way.

    time    condition                              consequence
    ------  -------------------------------------  -------------------------
    180 s   nothing sent or received               the flow ends
    30 s    the same, one of the ports is 53       the flow ends
    100 us  a receive brought 4 to 31 datagrams    the socket is read again

What is left out: datagrams to the guest's flows from anybody but the peer it wrote to (so answers to multicast queries
that come from single hosts), unless the port is forwarded; send queues: a full socket buffer is a drop, as on any link.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Container
from functools import partial
from typing import Any

from . import addr, log
from .flow.context import Context
from .flow.errors import Errors
from .flow.idle import IdleFlows, flow_limit
from .flow.table import TableFull
from .link.tap_device import VNET
from .linux.mmsg import SLOT, Receiver
from .linux.sockopt import default_hops, probe_udp_gro, probe_udp_segment, read_errors
from .loop.each import each
from .loop.reactor import EPOLLERR, EPOLLIN, TYPE_UDP, ref_data
from .policy.config import Config
from .policy.resolvers import DNS_PORT
from .policy.rules import Listener
from .udp_engine.dns import Dns
from .udp_engine.flow import UdpFlow
from .udp_engine.gso_batch import SEGMENTS_MAX, Run, runs
from .udp_engine.io import CONGESTED, Pauses, datagrams, reason, receive, send_again, transmit
from .udp_engine.sock import Client, open_socket
from .wire import ether, icmp, udp
from .wire.checksum import PROTO_UDP
from .wire.fragment import fragments

UDP_FLOWS_MAX = 16384
DESCRIPTOR_SHARE = 2  # of the descriptors that the process may have, at most one in so many


def refuse(src: bytes, dst: bytes, key: bytes) -> str | None:
    """Why a datagram of the guest cannot begin a flow, None if it can."""
    if not addr.is_unicast(src) or addr.is_unspecified(dst):
        return "udp: no address to answer or to send to"
    if addr.is_martian(src) or addr.is_martian(dst):
        return "udp: martian address"
    if not any(key[-4:-2]) or not any(key[-2:]):
        return "udp: port 0"
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
        self._ident = random.getrandbits(32)  # of the next fragmented datagram
        self._segments = SEGMENTS_MAX if probe_udp_segment() else 1
        self._gro = probe_udp_gro()
        log.debug(f"UDP: UDP_SEGMENT {'on' if self._segments > 1 else 'off'}, UDP_GRO {'on' if self._gro else 'off'}")
        self._hops = default_hops()
        # Opens the socket of a flow that the guest begins: (host's address, guest's port, host's port, now)
        self.opener: Callable[[bytes, int, int, float], Any] = lambda host, sport, dport, now: open_socket(
            ctx.fwd, host, sport, dport
        )
        self.dns = Dns(ctx, self._to_guest, self._tell)
        self._pauses = Pauses(ctx, lambda flow, _, now: self._take(flow, now), self._flows.fault_at)
        ctx.reactor.handle(TYPE_UDP, self.sock_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._our_mac, self._mtu, self._disabled = config.our_mac, config.mtu, config.no_udp

    # Guest -> host ---------------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, frames: list[int], now: float, hops: int = 0) -> None:
        """Datagrams of one flow in the packet pool: [payload start, payload end, size of the datagrams in it or 0]*.

        `hops` is the TTL or hop limit of the first, 0: not known. The lengths were checked by the caller.
        """
        flow = self._by_key.get(key) or self._new_flow(key, frames, now)
        if flow is None:
            return
        flow.last = now
        flow.asked = True
        if hops and hops != flow.hops:
            flow.set_hops(hops)
        if len(frames) == 3 and not frames[2]:
            size = frames[1] - frames[0]
            self._send(flow, size, size, [self._mv[frames[0] : frames[1]]], now)
            return
        for size, total, views in runs(self._mv, frames, flow.segments):
            self._send(flow, size, total, views, now)

    def _send(self, flow: UdpFlow, size: int, total: int, views: list[memoryview], now: float) -> None:
        """Send one run, and see to what comes of it."""
        try:
            transmit(flow, size, total, views)
            flow.to_host += total
        except OSError as e:
            for why, count, first in send_again(flow, size, total, views, e, partial(self._report, flow, now)):
                self._drops[f"udp: send: {reason(why)}"] += count
                if why.errno not in CONGESTED:
                    self._refused(why, flow.key, flow.src, flow.dst, first, now)

    def _new_flow(self, key: bytes, frames: list[int], now: float) -> UdpFlow | None:
        """A flow for `key`; None, counted and told to the guest, if there can be none."""
        ctx = self._ctx
        half = (len(key) - 4) // 2
        src, dst = key[:half], key[half : 2 * half]
        why = "udp: disabled" if self._disabled else refuse(src, dst, key)
        if why is None and ctx.fwd.family(dst) is None:
            why = "udp: address family is off"
        if why is not None:
            self._drops[why] += len(frames) // 3
            return None
        sport, dport = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        host = ctx.fwd.outbound(dst)
        if ctx.resolvers.serve(dst, dport):
            if dport == DNS_PORT:
                self.dns.tap_handler(key, frames, now)
                return None
            resolver = ctx.resolvers.pick(len(dst) == 16, now)
            host = resolver.addr if resolver is not None else host
        flow = UdpFlow(key, host, now, 0 if addr.is_multicast(host) else self._hops[len(host)])
        e = self._open(flow, lambda: self.opener(host, sport, dport, now), len(frames) // 3, now)
        if isinstance(e, OSError):
            self._refused(e, key, src, dst, self._mv[frames[0] : frames[1]], now)
        return flow if e is None else None

    def _open(self, flow: UdpFlow, make: Callable[[], Any], count: int, now: float) -> OSError | TableFull | None:
        """Give `flow` its socket and its place; else why not, with `count` drops counted."""
        ctx = self._ctx
        try:
            sock = self._flows.open(make, foreign=flow.foreign)
        except OSError as e:
            self._drops[f"udp: no socket: {reason(e)}"] += count
            return e
        other = self._by_key.get(flow.key)
        if other is not None:
            self._flows.close(other, "replaced")
        try:
            self._flows.add(flow, sock, now)
        except (TableFull, OSError) as e:
            sock.close()
            self._drops[f"udp: no flow: {reason(e) if isinstance(e, OSError) else 'table full'}"] += count
            return e
        flow.segments = self._segments
        flow.build_header(ctx.guest.mac, self._our_mac, self._mtu)
        return None

    def _refused(self, e: OSError, key: bytes, src: bytes, dst: bytes, payload: memoryview, now: float) -> None:
        """Tell the guest what the host's kernel said to one of its datagrams."""
        if addr.is_unicast(dst):
            self._errors.refused(e.errno or 0, src, dst, _quote(key, src, dst, payload[: icmp.QUOTE_MAX6]), now)

    def _tell(self, flow: UdpFlow, e: OSError, payload: bytes, now: float) -> None:
        """The same for one that `udp_engine/dns.py` could not send anywhere."""
        self._refused(e, flow.key, flow.src, flow.dst, memoryview(payload), now)

    # Host -> guest ---------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Errors first: they are about datagrams sent before what can be read. May be called for nothing."""
        flow: UdpFlow = self._by_index[ref & 0xFFFFFFFF]
        if events & EPOLLERR:
            self._report(flow, now)
        if events & EPOLLIN:
            self._take(flow, now)

    def _take(self, flow: UdpFlow, now: float) -> None:
        """Receive what there is, and let a stream gather for a moment."""
        try:
            if flow.asked and not flow.gro:
                flow.asked = False
                self._receive_one(flow)
            else:
                self._pauses.after(self._receive(flow), flow, flow, now)
            flow.last = now
        except BlockingIOError:
            pass  # the event was meant for an earlier owner of the descriptor, or the pause brought nothing
        except OSError:
            self._report(flow, now)

    def _receive_one(self, flow: UdpFlow) -> None:
        receiver = self._receiver
        n = flow.sock.recv_into(receiver.mv, SLOT)
        flow.to_guest += n
        if n > flow.payload_max:
            self._send_fragments(flow, receiver.mv[:n])
        else:
            self._ctx.link.send_payload((flow.header(n, n), receiver.mv[:n]))

    def _to_guest(self, flow: UdpFlow, payload: memoryview) -> None:
        """One datagram of a flow, also one of `udp_engine/dns.py`."""
        n = len(payload)
        flow.to_guest += n
        if n > flow.payload_max:
            self._send_fragments(flow, payload)
        else:
            self._ctx.link.send_payload((flow.header(n, n), payload))

    def _receive(self, flow: UdpFlow) -> int:
        """A batch; returns how many datagrams it had. Raises BlockingIOError, OSError."""
        return self._deliver(flow, receive(self._receiver, flow, self._gro, SEGMENTS_MAX if self._ctx.link.uso else 1))

    def _deliver(self, flow: UdpFlow, received: list[Run]) -> int:
        """Runs to the guest; returns how many datagrams they have."""
        link = self._ctx.link
        count = 0
        for size, total, views in received:
            count += datagrams(size, total)
            flow.to_guest += total
            if size > flow.payload_max:
                self._fragment_run(flow, size, views)
            else:
                link.send_payload((flow.header(total, size), *views))
        return count

    def _fragment_run(self, flow: UdpFlow, size: int, views: list[memoryview]) -> None:
        """Each datagram of a run in fragments, as far as it needs them."""
        joined = memoryview(b"".join(views))
        for start in range(0, len(joined), size):
            payload = joined[start : start + size]
            if len(payload) > flow.payload_max:
                self._send_fragments(flow, payload)
            else:
                self._ctx.link.send_payload((flow.header(len(payload), len(payload)), payload))

    def _send_fragments(self, flow: UdpFlow, payload: memoryview) -> None:
        """A datagram that is longer than the MTU that the guest had when the flow began."""
        message = udp.datagram(flow.dst, flow.src, flow.dport, flow.sport, bytes(payload))
        ip_at = VNET.size + ether.HEADER.size
        ether_header = bytes(flow.hdr[VNET.size : ip_at])
        mtu = flow.payload_max + len(flow.hdr) - ip_at
        self._ident += 1
        for packet in fragments(flow.dst, flow.src, PROTO_UDP, message, mtu, self._ident):
            self._ctx.link.send_frame(ether_header + packet)

    def inbound(
        self, key: bytes, client: Client, make: Callable[[], Any], mv: memoryview, frames: list[int], now: float
    ) -> None:
        """Datagrams that came to a listener from `client`, [start, end, 0]* in `mv`, on to the guest as those of `key`.

        Those that follow are expected at a socket that `make` opens, unless there is one. Another peer that the guest
        would see as the same one loses its flow: the answers go to whom the guest has heard last.
        """
        flow = self._by_key.get(key)
        if flow is None or flow.origin != client:
            host = client.peer
            flow = UdpFlow(key, host, now, self._hops[len(host)], client)
            if self._open(flow, make, len(frames) // 3, now) is not None:
                return
        flow.last = now
        self._deliver(flow, runs(mv, frames, SEGMENTS_MAX if self._ctx.link.uso else 1))

    def end(self, listeners: Collection[Listener]) -> None:
        """Listeners in the host close: what may use their ports ends, or the next ones could not have these."""
        ports = {listener.to for listener in listeners}
        ending = [
            flow
            for flow in self._by_key.values()
            if (flow.sport in ports if flow.origin is None else flow.origin.listener in listeners)
        ]
        each(ending, self._flows.close, self._flows.fault_at, "listener gone")

    def make_way(self, ports: Container[int]) -> None:
        """Somebody is about to listen on `ports`, which flows that the guest began may have: they begin again."""
        in_the_way = [f for f in self._by_key.values() if f.origin is None and f.sport in ports]
        each(in_the_way, self._flows.close_at_once, self._flows.fault_at, "made way for a listener")

    # Errors, and the guest's hardware address ------------------------------------------------------------------------

    def _report(self, flow: UdpFlow, now: float) -> None:
        """Hand what is in the flow's error queue to the guest."""
        for error, quoted in read_errors(flow.sock):
            if log.debug_on:
                log.debug(f"Flow {flow.index} (UDP flow): error on socket {flow.fd}: {error}")
            if addr.is_unicast(flow.dst):
                packet = _quote(flow.key, flow.src, flow.dst, quoted)
                self._errors.reported(error, flow.src, flow.dst, flow.host, packet, now)

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end that flow, and only that."""
        self._flows.fault(ref_data(ref))

    def fault_key(self, key: bytes) -> None:
        """Likewise, when it failed on datagrams from the guest."""
        flow = self._by_key.get(key)
        if flow is not None:
            self._flows.close(flow, "fault")
        self.dns.fault_key(key)

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")
        self.dns.forget()

    def set_guest_mac(self, mac: bytes) -> None:
        """The guest has another hardware address: all pre-cooked headers get it."""
        each(self._by_key.values(), UdpFlow.set_guest_mac, self._flows.fault_at, mac)
        self.dns.set_guest_mac(mac)


def _quote(key: bytes, src: bytes, dst: bytes, payload: bytes | memoryview) -> bytes:
    """The guest's datagram, as an ICMP error quotes it."""
    sport, dport = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
    return icmp.quote_udp(src, dst, sport, dport, bytes(payload))
