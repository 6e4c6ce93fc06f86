"""DNS queries of the guest by UDP to an address that stands for the host's resolvers: to one, then to the next.

    guest                        here                                     resolvers (policy/resolvers.py)
      |  query 7, query 8          |                                          A            B
      |--------------------------->|  query 7, query 8                        |            |
      |                            |----------------------------------------->|            |
      |                            |  no response to 7 for QUERY_TIMEOUT      |            |
      |                            |------------------------------------------------------>|
      |  response to 7             |  the first response to 7, also if it is A's           |
      |<---------------------------|<------------------------------------------------------|

A flow has the queries from one port of the guest. It has a socket for each resolver that got one of them, connected to
it, from a port of the kernel's choice: an attacker would have to guess that port and the identifier of the query.
Queries are forwarded as they are. Of a message, only the identifier and the QR bit are read (RFC 1035, 4.1.1):

     0                15  16 17
    +------------------+--+--------
    |   identifier     |QR|  ...      12 bytes at least
    +------------------+--+--------

    event                                                consequence
    ---------------------------------------------------  ---------------------------------------------------------------
    query                                                to the best resolver; kept until its response comes
    query that waits already                             again to the same resolver; after all were tried, another round
    response of a resolver that got this query           to the guest; the query is done
    any other response                                   dropped, counted
    error (ICMP, or of the host's kernel)                the resolver is held; its queries go to the next one at once
    no response for QUERY_TIMEOUT seconds                the resolver is held; the query goes to the next one
    all resolvers reported errors                        the last error goes to the guest as an ICMP message, at once
    ... or some did not respond                          nothing: a late response is still one
    no response for QUERY_LIFETIME seconds               the query is dropped

    limit               value                                       beyond it
    ------------------  ------------------------------------------  -----------------------------------
    queries that wait   QUERIES_MAX in all                          the one that waits longest is dropped
    a query's length    QUERY_SIZE_MAX bytes                        dropped, counted
    flows               DNS_FLOWS_MAX, and a share of descriptors   the longest idle end (flow/idle.py)
    a flow's idle time  30 s                                        it ends

One timer serves all queries; it is armed only while some wait. Responses above the guest's MTU are fragmented, like any
datagram (`deliver`).

Left out: the contents of responses. A failure to resolve (SERVFAIL, REFUSED) is a response: a query to another resolver
would override the verdict of one that validates. Queries to port 853 (DTLS, QUIC) have a state that no other resolver
knows, so they are flows of `udp.py` to the best one. There is no cache.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from itertools import takewhile
from typing import Any

from .. import addr, log
from ..calls import calls
from ..drops import Drop, Failed
from ..flow.context import Context
from ..flow.idle import IdleFlows, flow_limit
from ..flow.table import ACTIVE, GUEST, Endpoints, TableFull
from ..linux.memory import zeros
from ..linux.sockopt import DESTROYED, RECVERR, read_errors, recverr, setting
from ..loop.each import each
from ..loop.reactor import EPOLLERR, EPOLLIN, TYPE_DNS, Reactor, ref_data, ref_fd
from ..policy.config import Config
from ..policy.forwarding import Forwarding
from ..policy.resolvers import DNS_PORT, Resolver, Tried
from .flow import DNS_TIMEOUT, UdpFlow
from .io import CONGESTED

QUERY_TIMEOUT = 1.5  # s; the resolver's own retries are over, and glibc waits for another 3.5
QUERY_LIFETIME = 12.0  # s; BIND answers SERVFAIL after 10
QUERIES_MAX = 2048
QUERY_SIZE_MAX = 4096  # bytes
DNS_FLOWS_MAX = 4096
DESCRIPTOR_SHARE = 8  # at most one flow for so many descriptors that the process may have
RESPONSES_PER_EVENT = 32

CALLS = (
    *setting(*RECVERR, (socket.SOL_SOCKET, socket.SO_BINDTODEVICE)),
    *calls("sendto", "recvfrom", "recvmsg"),
)

_HEADER_SIZE = 12
_QR = 0x80
_SIZE_MAX = 65535


def query_id(message: bytes) -> int:
    """The identifier of a query, -1 if `message` is none."""
    return _ident(message) if len(message) >= _HEADER_SIZE and not message[2] & _QR else -1


def response_id(message: bytes | memoryview) -> int:
    """The identifier of a response, -1 if `message` is none."""
    return _ident(message) if len(message) >= _HEADER_SIZE and message[2] & _QR else -1


def _ident(message: bytes | memoryview) -> int:
    return message[0] << 8 | message[1]


class Query:
    """A query that waits for its response."""

    __slots__ = ("error", "exhausted", "flow", "ident", "payload", "received", "sent", "sent_to", "silent", "tried")

    def __init__(self, flow: DnsFlow, ident: int, payload: bytes, now: float) -> None:
        self.flow = flow
        self.ident = ident
        self.payload = payload
        self.received = self.sent = now
        self.tried: Tried = ()  # in this round
        self.sent_to: Tried = ()  # in all rounds: their responses count
        self.error: OSError | None = None
        self.silent = False  # a resolver has reported no error, and may still respond
        self.exhausted = False  # all resolvers were tried in this round


class DnsFlow(UdpFlow):
    """A port of the guest. `ends`: socket by resolver; `by_fd`: resolver by descriptor; `queries`: by identifier."""

    __slots__ = ("by_fd", "ends", "queries")
    kind = "DNS flow"
    label = "dns"
    evicted = Drop.DNS_EVICTED

    def __init__(self, key: bytes, now: float) -> None:
        super().__init__(key, b"", now)
        self.timeout = DNS_TIMEOUT
        self.ends: dict[Resolver, Any] = {}
        self.by_fd: dict[int, Resolver] = {}
        self.queries: dict[int, Query] = {}

    def endpoints(self) -> Endpoints:
        """The host's end is the resolver that the last socket leads to."""
        guest, peer = addr.host_port(self.src, self.sport), addr.host_port(self.dst, self.dport)
        hosts = [addr.host_port(resolver.addr, DNS_PORT) for resolver in self.ends]
        return Endpoints(GUEST, guest, peer, hosts[-1] if hosts else "")

    def watch(self, reactor: Reactor, kind: int) -> None:
        """Sockets are opened and watched with the first query to a resolver."""

    def sockets(self) -> tuple[tuple[int, Any], ...]:
        return tuple((sock.fileno(), sock) for sock in self.ends.values())


class _NoSocket:
    """The socket of a flow without queries."""

    def fileno(self) -> int:
        return -1


class FlowEvicted(Exception):
    """Descriptors ran out while a socket was opened for the flow, and the flow itself was evicted."""


def open_socket(fwd: Forwarding, host: bytes) -> Any:
    """A non-blocking UDP socket connected to port 53 of `host`, from a port of its own. Raises OSError."""
    source, interface = fwd.source(host)
    sock = socket.socket(addr.family(host), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(*recverr(addr.family(host)), 1)
        if interface is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if source is not None:
            sock.bind(fwd.sockaddr(source, 0))
        sock.connect(fwd.sockaddr(host, DNS_PORT))
    except BaseException:
        sock.close()
        raise
    return sock


class Dns:
    """All flows of queries.

    `deliver(flow, payload)` sends a datagram to the guest; `refuse(flow, error, payload, now)` reports an error to it.
    """

    def __init__(
        self,
        ctx: Context,
        deliver: Callable[[UdpFlow, memoryview], None],
        refuse: Callable[[UdpFlow, OSError, bytes, float], None],
    ) -> None:
        self._ctx = ctx
        self._drops = ctx.drops
        self._resolvers = ctx.resolvers
        self._mv = ctx.pool.mv
        self._by_index: list[Any] = ctx.flows.by_index
        self._deliver = deliver
        self._refuse = refuse
        self._flows: IdleFlows[DnsFlow] = IdleFlows(ctx, TYPE_DNS, flow_limit(DNS_FLOWS_MAX, DESCRIPTOR_SHARE))
        self._by_key = self._flows.by_key
        self._waiting: OrderedDict[Query, None] = OrderedDict()  # the one sent first comes first
        self._timer = ctx.timers.services.new(self.timer_handler)
        self._armed = False
        self._answer = memoryview(zeros(_SIZE_MAX))
        ctx.reactor.handle(TYPE_DNS, self.sock_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._mtu = config.mtu

    # Guest -> resolvers ----------------------------------------------------------------------------------------------

    def tap_handler(self, key: bytes, frames: list[int], now: float) -> None:
        """Datagrams of one flow in the packet pool: [payload start, payload end, size of the datagrams in it or 0]*."""
        flow = self._by_key.get(key) or self._new_flow(key, len(frames) // 3, now)
        if flow is None:
            return
        flow.last = now
        for i in range(0, len(frames), 3):
            start, end, size = frames[i : i + 3]
            if 0 < size < _HEADER_SIZE:
                self._drops[Drop.DNS_NO_QUERY] += 1
                continue
            for at in range(start, max(end, start + 1), size or end - start or 1):
                self._query(flow, bytes(self._mv[at : min(at + size, end) if size else end]), now)
                if flow.state != ACTIVE:
                    return

    def _new_flow(self, key: bytes, count: int, now: float) -> DnsFlow | None:
        flow = DnsFlow(key, now)
        try:
            self._flows.add(flow, _NoSocket(), now)  # type: ignore[arg-type]
        except TableFull:
            self._drops[Drop.DNS_TABLE_FULL] += count
            return None
        ctx = self._ctx
        flow.build_header(ctx.guest.mac_of(flow.src), ctx.lan.mac_of(flow.dst), self._mtu)
        return flow

    def _query(self, flow: DnsFlow, payload: bytes, now: float) -> None:
        """Handle one datagram of the guest."""
        ident = query_id(payload)
        if ident < 0 or len(payload) > QUERY_SIZE_MAX:
            self._drops[Drop.DNS_NO_QUERY if ident < 0 else Drop.DNS_TOO_LONG] += 1
            return
        query = flow.queries.get(ident)
        if query is not None and query.payload == payload and not query.exhausted:
            self._resend(query, now)  # the resolver's timeout stays as it is
            return
        new = Query(flow, ident, payload, now)
        if query is not None:
            new.sent_to = query.sent_to if query.payload == payload else ()
            self._remove(query)
        elif len(self._waiting) >= QUERIES_MAX:
            self._drops[Drop.DNS_TOO_MANY] += 1
            self._remove(next(iter(self._waiting)))
        flow.queries[ident] = new
        self._waiting[new] = None
        self._try_next(new, now)
        if not self._armed and self._waiting:
            self._arm(now + QUERY_TIMEOUT)

    def _resend(self, query: Query, now: float) -> None:
        """The guest retransmits a query that waits: send it to the same resolver."""
        try:
            self._send(query.flow, query.tried[-1], query.payload, now)
        except (OSError, FlowEvicted):
            self._drops[Drop.DNS_NOT_REPEATED] += 1  # its timeout stays

    def _try_next(self, query: Query, now: float) -> None:
        """Send a query to the best resolver that was not tried yet; report an error to the guest if all failed."""
        flow = query.flow
        while resolver := self._resolvers.pick(len(flow.src) == 16, now, query.tried):
            query.tried += (resolver,)
            query.sent_to = query.sent_to if resolver in query.sent_to else (*query.sent_to, resolver)
            try:
                self._send(flow, resolver, query.payload, now)
            except FlowEvicted:
                return
            except OSError as e:
                if e.errno not in CONGESTED:
                    query.error = e
                    self._failed(resolver, e, now)
                    continue
                self._drops[Failed.DNS_SEND.of(e)] += 1  # lost, as on any link
            query.sent = now
            self._waiting.move_to_end(query)
            return
        query.exhausted = True
        query.sent = now
        self._waiting.move_to_end(query)
        if query.error is not None and not query.silent:
            self._remove(query)
            self._drops[Drop.DNS_ALL_FAILED] += 1
            self._resolvers.exhausted(query.received, now)
            self._refuse(flow, query.error, query.payload, now)

    def _failed(self, resolver: Resolver, e: OSError, now: float) -> None:
        self._drops[Failed.DNS_RESOLVER.of(e)] += 1
        self._resolvers.failed(resolver, e.strerror or str(e), now)

    def _send(self, flow: DnsFlow, resolver: Resolver, payload: bytes, now: float) -> None:
        """Raises OSError, FlowEvicted."""
        sock = flow.ends.get(resolver) or self._open(flow, resolver, now)
        flow.to_host += len(payload)
        try:
            sock.send(payload)
        except OSError as e:
            if e.errno in CONGESTED:
                raise
            if e.errno not in DESTROYED:
                read_errors(sock)  # the error may be about an earlier query
            else:
                self._destroyed(flow, resolver)
                sock = self._open(flow, resolver, now)
            sock.send(payload)

    def _open(self, flow: DnsFlow, resolver: Resolver, now: float) -> Any:
        """The socket of `flow` towards `resolver`, watched. Raises OSError, FlowEvicted."""
        sock = self._flows.open(partial(open_socket, self._ctx.fwd, resolver.addr), now)
        if flow.state != ACTIVE:  # evicted, to free descriptors
            sock.close()
            self._drops[Drop.DNS_NO_DESCRIPTOR] += 1
            raise FlowEvicted
        fd = sock.fileno()
        try:
            self._ctx.reactor.watch(fd, TYPE_DNS, flow.index, EPOLLIN | EPOLLERR)
        except OSError:
            sock.close()
            raise
        flow.ends[resolver] = sock
        flow.by_fd[fd] = resolver
        if log.debug_on:
            log.debug(f"Flow {flow.index} (DNS flow): queries {addr.text(resolver.addr)}")
        return sock

    # Resolvers -> guest ----------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Errors first: they are about earlier queries. The event may be stale."""
        flow: DnsFlow = self._by_index[ref_data(ref)]
        resolver = flow.by_fd.get(ref_fd(ref))
        if resolver is None:
            return
        try:
            if events & EPOLLERR:
                self._report(flow, resolver, now)
            if events & EPOLLIN and flow.state == ACTIVE:
                self._receive(flow, resolver, now)
        except ConnectionAbortedError:
            self._destroyed(flow, resolver)

    def _receive(self, flow: DnsFlow, resolver: Resolver, now: float) -> None:
        sock = flow.ends[resolver]
        for _ in range(RESPONSES_PER_EVENT):
            try:
                answer = self._answer[: sock.recv_into(self._answer)]
            except BlockingIOError:
                return
            except ConnectionAbortedError:  # as `Destroyed`
                raise
            except OSError:
                self._report(flow, resolver, now)
                return
            ident = response_id(answer)
            query = flow.queries.get(ident)
            if query is None or resolver not in query.sent_to:
                self._drops[Drop.DNS_NOT_AN_ANSWER if ident < 0 else Drop.DNS_ANSWER_TO_NONE] += 1
                continue
            self._resolvers.answered(resolver, now)
            flow.last = now
            self._remove(query)
            self._deliver(flow, answer)

    def _destroyed(self, flow: DnsFlow, resolver: Resolver) -> None:
        """The socket towards `resolver` is of no use: the next query there gets another one."""
        sock = flow.ends.pop(resolver)
        del flow.by_fd[sock.fileno()]
        self._ctx.reactor.retire(sock.fileno(), sock)

    def _report(self, flow: DnsFlow, resolver: Resolver, now: float) -> None:
        """Errors came back from `resolver`: its queries go to the next one."""
        # A path whose MTU is too small is no fault of the resolver
        errors = [e for e, _ in read_errors(flow.ends[resolver]) if e.errno != errno.EMSGSIZE]
        if not errors:
            return
        failure = OSError(errors[-1].errno, os.strerror(errors[-1].errno))
        self._failed(resolver, failure, now)
        for query in list(flow.queries.values()):
            if query.tried[-1:] == (resolver,):
                query.error = failure
                self._try_next(query, now)

    # Time ------------------------------------------------------------------------------------------------------------

    def timer_handler(self, now: float) -> None:
        """Handle queries without a response for QUERY_TIMEOUT, and arm the timer for the next one."""
        self._armed = False
        each(takewhile(lambda q: q.sent + QUERY_TIMEOUT <= now, self._waiting), self._timed_out, self._fault_at, now)
        if self._waiting:
            self._arm(next(iter(self._waiting)).sent + QUERY_TIMEOUT)

    def _fault_at(self, query: Query, e: Exception) -> None:
        self._flows.fault_at(query.flow, e)
        if query in self._waiting:
            self._remove(query)

    def _timed_out(self, query: Query, now: float) -> None:
        """No response came in time."""
        if query.flow.state != ACTIVE:
            self._remove(query)
            return
        query.silent = True
        if not query.exhausted and self._resolvers.silent(query.tried[-1], query.sent, now):
            self._drops[Drop.DNS_RESOLVER_SILENT] += 1
        if now - query.received >= QUERY_LIFETIME:
            self._remove(query)
            self._drops[Drop.DNS_NO_ANSWER] += 1
            self._resolvers.exhausted(query.received, now)
            return
        self._try_next(query, now)

    def _remove(self, query: Query) -> None:
        """Drop a query: it has its response, or gets none."""
        del self._waiting[query]
        queries = query.flow.queries
        if queries.get(query.ident) is query:
            del queries[query.ident]

    def _arm(self, deadline: float) -> None:
        self._armed = True
        self._ctx.timers.services.arm(self._timer, deadline)

    # The guest -------------------------------------------------------------------------------------------------------

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end only that flow."""
        self._flows.fault(ref_data(ref))

    def fault_key(self, key: bytes) -> None:
        """The same, for a handler that failed on datagrams of the guest."""
        self._flows.fault_key(key)

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")
