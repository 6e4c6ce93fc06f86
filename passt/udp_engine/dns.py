"""Queries of the guest by UDP to an address that stands for the host's resolvers: one is asked; if need be, the next.

    guest                        here                                     resolvers (policy/resolvers.py)
      |  query 7, query 8          |                                          A            B
      |--------------------------->|  query 7, query 8                        |            |
      |                            |----------------------------------------->|            |
      |                            |  no answer to 7 for PATIENCE seconds     |            |
      |                            |------------------------------------------------------>|
      |  answer 7                  |  the first answer that comes to 7, also if it is A's  |
      |<---------------------------|<------------------------------------------------------|

A flow is what comes from one port of the guest. It has a socket for each resolver that it asked, connected to it, from
a port of the kernel's choice: a stranger would have to guess that port and the identifier of the query. Queries go on
as they are. Of a message nothing is read but its identifier and whether it is a query or an answer (RFC 1035, 4.1.1):

     0                15  16 17
    +------------------+--+--------
    |   identifier     |QR|  ...      12 bytes at least
    +------------------+--+--------

    event                                                consequence
    ---------------------------------------------------  ---------------------------------------------------------------
    query                                                to the best resolver; kept until its answer comes
    query that waits already                             sent again to whom has it; if all were tried, another round
    answer, of a resolver that this query was sent to    to the guest; the query is done
    any other answer                                     dropped, counted
    error (ICMP, or the kernel's own)                    the resolver is held; its queries go to the next one at once
    no answer for PATIENCE seconds                       the resolver is held; the query goes to the next one
    all resolvers reported errors                        the guest gets the last one as an ICMP message, at once
    ... some kept silent                                 nothing: a late answer is still an answer
    no answer for GIVE_UP seconds                        the query is forgotten

    limit               value                                       beyond it
    ------------------  ------------------------------------------  -----------------------------------
    queries that wait   QUESTIONS_MAX in all                        the one that waits longest is forgotten
    a query's length    QUESTION_SIZE bytes                         dropped, counted
    flows               DNS_FLOWS_MAX, and a share of descriptors   the longest idle go (flow/idle.py)
    a flow's silence    30 s                                        it ends

One timer serves all queries; it is armed only while some wait. What is longer than the guest's MTU goes to it in
fragments, like any datagram (`deliver`).

Left out: what answers say. A failure to resolve (SERVFAIL, REFUSED) is an answer: asking another resolver would undo
the verdict of one that validates. Queries to port 853 (DTLS, QUIC) have a state that no other resolver knows: they are
flows of `udp.py` to the best one. Names are not cached.
"""

from __future__ import annotations

import errno
import os
import socket
from collections import OrderedDict
from collections.abc import Callable
from itertools import takewhile
from typing import Any

from .. import addr, log
from ..calls import calls
from ..flow.context import Context
from ..flow.idle import IdleFlows, flow_limit
from ..flow.table import ACTIVE, GUEST, Endpoints, TableFull
from ..linux.sockopt import RECVERR, read_errors, recverr, setting
from ..loop.each import each
from ..loop.reactor import EPOLLERR, EPOLLIN, TYPE_DNS, Reactor, ref_data, ref_fd
from ..policy.config import Config
from ..policy.forwarding import Forwarding
from ..policy.resolvers import DNS_PORT, Resolver, Tried
from .flow import UdpFlow
from .io import CONGESTED, reason

PATIENCE = 1.5  # s; a resolver's own retries are done, and glibc waits for another 3.5
GIVE_UP = 12.0  # s; BIND answers SERVFAIL after 10
QUESTIONS_MAX = 2048
QUESTION_SIZE = 4096  # bytes
DNS_FLOWS_MAX = 4096
DESCRIPTOR_SHARE = 8  # of the descriptors that the process may have, at most one flow in so many
ANSWERS_PER_EVENT = 32

CALLS = (
    *setting(*RECVERR, (socket.SOL_SOCKET, socket.SO_BINDTODEVICE)),
    *calls("sendto", "recvfrom", "recvmsg"),
)

_HEADER_SIZE = 12
_QR = 0x80
_SIZE_MAX = 65535


def question_id(message: bytes) -> int:
    """The identifier of a query, -1 if `message` is none."""
    return _ident(message) if len(message) >= _HEADER_SIZE and not message[2] & _QR else -1


def answer_id(message: bytes | memoryview) -> int:
    """The identifier of an answer, -1 if `message` is none."""
    return _ident(message) if len(message) >= _HEADER_SIZE and message[2] & _QR else -1


def _ident(message: bytes | memoryview) -> int:
    return message[0] << 8 | message[1]


class Question:
    """A query that waits for its answer."""

    __slots__ = ("asked", "begun", "error", "exhausted", "flow", "ident", "payload", "sent", "silent", "tried")

    def __init__(self, flow: DnsFlow, ident: int, payload: bytes, now: float) -> None:
        self.flow = flow
        self.ident = ident
        self.payload = payload
        self.begun = self.sent = now
        self.tried: Tried = ()  # in this round
        self.asked: Tried = ()  # ever: those whose answer is taken
        self.error: OSError | None = None
        self.silent = False  # one of them has not refused, and may still answer
        self.exhausted = False  # nobody is left to be tried in this round


class DnsFlow(UdpFlow):
    """A port of the guest. `ends`: socket by resolver; `by_fd`: resolver by descriptor; `questions`: by identifier."""

    __slots__ = ("by_fd", "ends", "questions")
    kind = "DNS flow"
    label = "dns"

    def __init__(self, key: bytes, now: float) -> None:
        super().__init__(key, b"", now)
        self.ends: dict[Resolver, Any] = {}
        self.by_fd: dict[int, Resolver] = {}
        self.questions: dict[int, Question] = {}

    def endpoints(self) -> Endpoints:
        """The host's end is the resolver that was asked last, if one was."""
        guest, peer = addr.host_port(self.src, self.sport), addr.host_port(self.dst, self.dport)
        hosts = [addr.host_port(resolver.addr, DNS_PORT) for resolver in self.ends]
        return Endpoints(GUEST, guest, peer, hosts[-1] if hosts else "")

    def watch(self, reactor: Reactor, kind: int) -> None:
        """Sockets are opened, and watched, when a resolver is asked."""

    def sockets(self) -> tuple[tuple[int, Any], ...]:
        return tuple((sock.fileno(), sock) for sock in self.ends.values())


class _NoSocket:
    """What a flow has before it has asked anybody."""

    def fileno(self) -> int:
        return -1


class Unasked(Exception):
    """The flow ended while a socket for it was opened: descriptors ran out."""


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

    `deliver(flow, payload)` sends a datagram to the guest, `refuse(flow, error, payload)` tells it that the one it sent
    met an error.
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
        self._waiting: OrderedDict[Question, None] = OrderedDict()  # in the order in which they were last sent
        self._timer = ctx.timers.services.new(self._overdue)
        self._armed = False
        self._answer = memoryview(bytearray(_SIZE_MAX))
        self.opener: Callable[[bytes], Any] = lambda host: open_socket(ctx.fwd, host)
        ctx.reactor.handle(TYPE_DNS, self.sock_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._our_mac, self._mtu = config.our_mac, config.mtu

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
                self._drops["dns: not a query"] += 1
                continue
            for at in range(start, max(end, start + 1), size or end - start or 1):
                self._question(flow, bytes(self._mv[at : min(at + size, end) if size else end]), now)
                if flow.state != ACTIVE:
                    return

    def _new_flow(self, key: bytes, count: int, now: float) -> DnsFlow | None:
        flow = DnsFlow(key, now)
        try:
            self._flows.add(flow, _NoSocket(), now)  # type: ignore[arg-type]
        except TableFull:
            self._drops["dns: no flow: table full"] += count
            return None
        flow.build_header(self._ctx.guest.mac, self._our_mac, self._mtu)
        return flow

    def _question(self, flow: DnsFlow, payload: bytes, now: float) -> None:
        """One datagram of the guest."""
        ident = question_id(payload)
        if ident < 0 or len(payload) > QUESTION_SIZE:
            self._drops["dns: not a query" if ident < 0 else "dns: query too long"] += 1
            return
        question = flow.questions.get(ident)
        if question is not None and question.payload == payload and not question.exhausted:
            self._repeat(question)  # the time of the resolver that has it runs on
            return
        fresh = Question(flow, ident, payload, now)
        if question is not None:
            fresh.asked = question.asked if question.payload == payload else ()
            self._forget(question)
        elif len(self._waiting) >= QUESTIONS_MAX:
            self._drops["dns: too many queries"] += 1
            self._forget(next(iter(self._waiting)))
        flow.questions[ident] = fresh
        self._waiting[fresh] = None
        self._ask(fresh, now)
        if not self._armed and self._waiting:
            self._arm(now + PATIENCE)

    def _repeat(self, question: Question) -> None:
        """The guest asks again what waits already."""
        try:
            self._send(question.flow, question.tried[-1], question.payload)
        except (OSError, Unasked):
            self._drops["dns: query not repeated"] += 1  # its time-out will see to it

    def _ask(self, question: Question, now: float) -> None:
        """Send it to the best resolver that was not tried yet; tell the guest if there is none."""
        flow = question.flow
        while resolver := self._resolvers.pick(len(flow.src) == 16, now, question.tried):
            question.tried += (resolver,)
            question.asked = question.asked if resolver in question.asked else (*question.asked, resolver)
            try:
                self._send(flow, resolver, question.payload)
            except Unasked:
                return
            except OSError as e:
                if e.errno not in CONGESTED:
                    question.error = e
                    self._failed(resolver, e, now)
                    continue
                self._drops[f"dns: send: {reason(e)}"] += 1  # lost, as on any link
            question.sent = now
            self._waiting.move_to_end(question)
            return
        question.exhausted = True
        question.sent = now
        self._waiting.move_to_end(question)
        if question.error is not None and not question.silent:
            self._forget(question)
            self._drops["dns: all resolvers failed"] += 1
            self._resolvers.exhausted(question.begun, now)
            self._refuse(flow, question.error, question.payload, now)

    def _failed(self, resolver: Resolver, e: OSError, now: float) -> None:
        self._drops[f"dns: resolver failed: {reason(e)}"] += 1
        self._resolvers.failed(resolver, e.strerror or reason(e), now)

    def _send(self, flow: DnsFlow, resolver: Resolver, payload: bytes) -> None:
        """Raises OSError, Unasked."""
        sock = flow.ends.get(resolver) or self._open(flow, resolver)
        flow.to_host += len(payload)
        try:
            sock.send(payload)
        except OSError as e:
            if e.errno in CONGESTED:
                raise
            read_errors(sock)  # it may have been an earlier query's
            sock.send(payload)

    def _open(self, flow: DnsFlow, resolver: Resolver) -> Any:
        """The socket of `flow` towards `resolver`, watched. Raises OSError, Unasked."""
        sock = self._flows.open(lambda: self.opener(resolver.addr))
        if flow.state != ACTIVE:  # it was the one that gave its descriptors up
            sock.close()
            self._drops["dns: no descriptor"] += 1
            raise Unasked
        fd = sock.fileno()
        try:
            self._ctx.reactor.watch(fd, TYPE_DNS, flow.index, EPOLLIN | EPOLLERR)
        except OSError:
            sock.close()
            raise
        flow.ends[resolver] = sock
        flow.by_fd[fd] = resolver
        if log.debug_on:
            log.debug(f"Flow {flow.index} (DNS flow): asks {addr.text(resolver.addr)}")
        return sock

    # Resolvers -> guest ----------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Errors first, as they are about what was sent before. May be called for nothing."""
        flow: DnsFlow = self._by_index[ref_data(ref)]
        resolver = flow.by_fd.get(ref_fd(ref))
        if resolver is None:
            return
        if events & EPOLLERR:
            self._report(flow, resolver, now)
        if events & EPOLLIN and flow.state == ACTIVE:
            self._receive(flow, resolver, now)

    def _receive(self, flow: DnsFlow, resolver: Resolver, now: float) -> None:
        sock = flow.ends[resolver]
        for _ in range(ANSWERS_PER_EVENT):
            try:
                answer = self._answer[: sock.recv_into(self._answer)]
            except BlockingIOError:
                return
            except OSError:
                self._report(flow, resolver, now)
                return
            ident = answer_id(answer)
            question = flow.questions.get(ident)
            if question is None or resolver not in question.asked:
                self._drops["dns: not an answer" if ident < 0 else "dns: answer to no query"] += 1
                continue
            self._resolvers.answered(resolver, now)
            flow.last = now
            self._forget(question)
            self._deliver(flow, answer)

    def _report(self, flow: DnsFlow, resolver: Resolver, now: float) -> None:
        """Errors met what was sent to `resolver`: those queries go to the next one."""
        # A link on the way that is too small for it is nothing that the resolver can be blamed for
        errors = [e for e, _ in read_errors(flow.ends[resolver]) if e.errno != errno.EMSGSIZE]
        if not errors:
            return
        failure = OSError(errors[-1].errno, os.strerror(errors[-1].errno))
        self._failed(resolver, failure, now)
        for question in list(flow.questions.values()):
            if question.tried[-1:] == (resolver,):
                question.error = failure
                self._ask(question, now)

    # Time ------------------------------------------------------------------------------------------------------------

    def _overdue(self, now: float) -> None:
        """Queries that have waited for long enough, and when to look again."""
        self._armed = False
        each(takewhile(lambda q: q.sent + PATIENCE <= now, self._waiting), self._wait_on, self._fault_at, now)
        if self._waiting:
            self._arm(next(iter(self._waiting)).sent + PATIENCE)

    def _fault_at(self, question: Question, e: Exception) -> None:
        self._flows.fault_at(question.flow, e)
        if question in self._waiting:
            self._forget(question)

    def _wait_on(self, question: Question, now: float) -> None:
        """Nobody has answered it in time."""
        if question.flow.state != ACTIVE:
            self._forget(question)
            return
        question.silent = True
        if not question.exhausted and self._resolvers.silent(question.tried[-1], question.sent, now):
            self._drops["dns: resolver failed: no answer"] += 1
        if now - question.begun >= GIVE_UP:
            self._forget(question)
            self._drops["dns: no answer"] += 1
            self._resolvers.exhausted(question.begun, now)
            return
        self._ask(question, now)

    def _forget(self, question: Question) -> None:
        """It is answered, or will not be."""
        del self._waiting[question]
        questions = question.flow.questions
        if questions.get(question.ident) is question:
            del questions[question.ident]

    def _arm(self, deadline: float) -> None:
        self._armed = True
        self._ctx.timers.services.arm(self._timer, deadline)

    # The guest -------------------------------------------------------------------------------------------------------

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end that flow, and only that."""
        self._flows.fault(ref_data(ref))

    def fault_key(self, key: bytes) -> None:
        """Likewise, when it failed on datagrams from the guest."""
        flow = self._by_key.get(key)
        if flow is not None:
            self._flows.close(flow, "fault")

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")

    def set_guest_mac(self, mac: bytes) -> None:
        """The guest has another hardware address."""
        each(self._by_key.values(), UdpFlow.set_guest_mac, self._flows.fault_at, mac)
