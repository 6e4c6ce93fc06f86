"""Datagrams of the guest to multicast groups: flows whose answers come from any host.

    guest: port S, group, port P -> flow -> socket of the host -> group on the template interface
    any host -> the socket's port -> guest: port S                             (SSDP, LLMNR: answers by unicast)

A socket that is connected to a group would receive nothing, since no host answers from a group's address. So it is
not connected, and its port decides who answers:

    the guest's port                    bound to               answers by unicast
    ----------------------------------  ---------------------  --------------------------------------------------------
    leads to the guest (-u)             group, that port       come by the listener
    is the group's port (mDNS)          group, that port       go to the host's program at the port, if any
    is another one, and free            any address, the port  come here, from any host, for as long as the flow lasts
    is another one, and in use          any address, any port  the same

In the second case the source port must be kept, or a responder takes the sender for a program that is none (RFC 6762,
6.7). The port belongs to the host's own responder, if there is one, which must not lose its datagrams. Protocols that
send from their group's port answer to the group, so that little is lost; `-u 5353` leads the rest to the guest.

Datagrams leave by the template interface, or that of --outbound-if4/6 (IP_MULTICAST_IF), with the TTL and traffic class
that the guest gave them (`flow/ip_fields.py`). Other programs on the host get copies; the guest does not
(`own_copies.py`).

    time    condition                              consequence
    ------  -------------------------------------  -------------------------
    180 s   nothing sent or received               the flow ends

Left out: UDP_SEGMENT, since each datagram is looked at for its copy; errors to the guest, since a datagram to a group
causes none (RFC 1122, 3.2.2).
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, ClassVar

from .. import addr
from ..calls import calls
from ..drops import Drop, Failed
from ..flow.context import Context
from ..flow.idle import IdleFlow, IdleFlows, flow_limit
from ..flow.ip_fields import UNSET, apply
from ..flow.source import REASON
from ..flow.table import GUEST, Endpoints, TableFull
from ..linux import multicast
from ..linux.sockopt import DESTROYED, REUSEPORT, setting
from ..loop.each import each
from ..loop.reactor import EPOLLIN, TYPE_GROUP_FLOW, ref_data
from ..policy.forwarding import SockAddr
from .flow import FLOW_TIMEOUT
from .groups import PER_EVENT, SIZE_MAX, Groups, ToGuest, Way, bind_beside, new_socket, sockaddr, way
from .gso_batch import gso_batches
from .outbound import Outbound
from .sock import BUSY_PORT

GROUP_FLOWS_MAX = 1024
DESCRIPTOR_SHARE = 8  # at most one in so many of the descriptors that the process may have

CALLS = (*setting(REUSEPORT), *calls("sendto", "recvfrom"))


class GroupFlow(IdleFlow):
    """Datagrams from a port of the guest to a port of a group, and what comes back."""

    __slots__ = ("dport", "dst", "fields", "port", "sport", "src", "to", "way")
    kind = "UDP flow"
    label: ClassVar[str] = "udp"
    evicted = Drop.UDP_EVICTED

    def __init__(self, key: bytes, now: float) -> None:
        super().__init__(key, FLOW_TIMEOUT, now)
        half = (len(key) - 4) // 2
        self.src, self.dst = key[:half], key[half : 2 * half]
        self.sport, self.dport = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
        self.port = 0  # of the host
        self.to: SockAddr = ("", 0)
        self.way: Way | None = None  # that of its socket
        self.fields = UNSET

    def endpoints(self) -> Endpoints:
        peer = addr.host_port(self.dst, self.dport)
        return Endpoints(GUEST, addr.host_port(self.src, self.sport), peer, peer)


def open_sender(group: bytes, sport: int, dport: int, to: Way, outbound: Outbound) -> Any:
    """A socket that sends to `group`, for port `sport` of the guest: see the table above. Raises OSError."""
    leading = outbound.leading.get(sport, [])
    anywhere = addr.text(to.source or bytes(len(group)))
    if leading or sport == dport:
        port = leading[0].port if leading else sport
        try:
            return _opened(group, to, lambda sock: bind_beside(sock, sockaddr(group, port, to.interface), leading))
        except OSError as e:
            if e.errno not in BUSY_PORT:
                raise
    else:
        try:
            return _opened(group, to, lambda sock: _bind_shared(sock, (anywhere, sport)))
        except OSError as e:
            if e.errno not in BUSY_PORT:
                raise
    return _opened(group, to, lambda sock: sock.bind((anywhere, 0)))


def _opened(group: bytes, to: Way, bind: Any) -> Any:
    sock = new_socket(group, to)
    try:
        multicast.set_interface(sock, len(group) == 16, to.interface, to.source)
        bind(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_shared(sock: Any, where: SockAddr) -> None:
    """Other flows of the guest have the port as well, in sockets of the same user. Raises OSError."""
    sock.setsockopt(*REUSEPORT, 1)
    sock.bind(where)


class GroupSenders:
    """The flows to groups."""

    def __init__(self, ctx: Context, outbound: Outbound, groups: Groups) -> None:
        self._ctx = ctx
        self._outbound, self._groups = outbound, groups
        self._mv = ctx.pool.mv
        self._to_guest = ToGuest(ctx)
        self._flows: IdleFlows[GroupFlow] = IdleFlows(
            ctx, TYPE_GROUP_FLOW, flow_limit(GROUP_FLOWS_MAX, DESCRIPTOR_SHARE)
        )
        ctx.reactor.handle(TYPE_GROUP_FLOW, self.sock_handler)

    # Guest -> host ---------------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, frames: list[int], now: float, fields: int) -> None:
        """Datagrams to a group, as those of `Udp.tap_handler`."""
        if self._ctx.config.no_multicast:
            self._ctx.drops[Drop.MULTICAST_DISABLED] += len(frames) // 3
            return
        flow = self._flows.by_key.get(key)
        if flow is not None and flow.way != way(self._ctx.config, flow.dst):
            self._flows.close(flow, REASON)  # the host's network leads elsewhere
            flow = None
        flow = flow or self._new_flow(key, len(frames) // 3, now)
        if flow is None:
            return
        flow.last = now
        try:
            if fields != flow.fields:
                flow.fields = apply(flow.sock, flow.dst, flow.fields, fields)
            for _, total, views in gso_batches(self._mv, frames, 1):
                self._send(flow, bytes(views[0]), now)
                flow.to_host += total
        except OSError as e:
            self._ctx.drops[Failed.UDP_SEND.of(e)] += len(frames) // 3
            if e.errno in DESTROYED:
                self._flows.close(flow, "socket destroyed")

    def _send(self, flow: GroupFlow, payload: bytes, now: float) -> None:
        """Send a datagram. Raises OSError, if it is about more than this one."""
        try:
            flow.sock.sendto(payload, flow.to)
        except OSError as e:
            if e.errno in DESTROYED:
                raise
            self._ctx.drops[Failed.UDP_SEND.of(e)] += 1
            return
        self._groups.sent(flow.dst, flow.dport, flow.port, payload, now)

    def _new_flow(self, key: bytes, count: int, now: float) -> GroupFlow | None:
        """A flow for `key`; None if there can be none, which is counted."""
        ctx = self._ctx
        flow = GroupFlow(key, now)
        to = way(ctx.config, flow.dst)
        flow.way, flow.to = to, sockaddr(flow.dst, flow.dport, to.interface)
        try:
            sock = self._flows.open(lambda: open_sender(flow.dst, flow.sport, flow.dport, to, self._outbound), now)
        except OSError as e:
            ctx.drops[Failed.UDP_NO_SOCKET.of(e)] += count
            return None
        flow.port = sock.getsockname()[1]
        try:
            self._flows.add(flow, sock, now)
        except (TableFull, OSError) as e:
            sock.close()
            ctx.drops[Failed.UDP_NO_FLOW.of(e) if isinstance(e, OSError) else Drop.UDP_TABLE_FULL] += count
            return None
        self._groups.learn(flow.dst, flow.dport, now)
        return flow

    # Host -> guest ---------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Answers by unicast."""
        flow: Any = self._ctx.flows.by_index[ref_data(ref)]
        try:
            for _ in range(PER_EVENT if events & EPOLLIN else 1):
                payload, sender = flow.sock.recvfrom(SIZE_MAX)
                flow.last = now
                flow.to_guest += len(payload)
                mac, peer = self._ctx.guest.mac_of(flow.src), addr.packed(sender[0].partition("%")[0])
                self._to_guest.send(mac, flow.src, flow.sport, peer, sender[1], payload)
        except BlockingIOError:
            pass  # that was all
        except OSError as e:
            self._ctx.drops[Failed.UDP_RECEIVE.of(e)] += 1
            if e.errno in DESTROYED:
                self._flows.close(flow, "socket destroyed")

    # Ports, ends -----------------------------------------------------------------------------------------------------

    def ports_in_use(self, ports: Container[int]) -> set[int]:
        """Those of `ports` of the host that flows have, which now show whose they are."""
        holding = [flow for flow in self._flows.by_key.values() if flow.port in ports]
        each(holding, _show, self._flows.fault_at)
        return {flow.port for flow in holding}

    def free_ports(self, ports: Container[int]) -> None:
        """Close flows that have `ports`, for listeners about to open. They begin again."""
        conflicting = [flow for flow in self._flows.by_key.values() if flow.port in ports]
        each(conflicting, self._flows.close_at_once, self._flows.fault_at, "made way for a listener")

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end only that flow."""
        self._flows.fault(ref_data(ref))

    def fault_key(self, key: bytes) -> None:
        """The same, for a handler that failed on datagrams of the guest."""
        self._flows.fault_key(key)

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")


def _show(flow: GroupFlow) -> None:
    """Let sockets of the same user share its port."""
    flow.sock.setsockopt(*REUSEPORT, 1)
