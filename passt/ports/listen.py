"""Listening sockets in the loop: clients are accepted, or datagrams announced, and handed on.

    rule      client           configuration    handed to
    --------  ---------------  ---------------  -----------------------------------------------------
    outbound  (loopback)       any              splice.tcp, from socket to socket
    inbound   loopback         no --no-splice   splice.tcp
    inbound   any              --splice-only    none: reset, counted
    inbound   any              otherwise        tcp_engine.opening, through the tap
    UDP       any              any              ports.udp_in, which makes the same choice per datagram

All listeners are in one list; the index in it is the data of a listener's epoll reference. An accepted connection is a
non-blocking socket of the C type, and belongs to the module that it is handed to.

An accept(2) without a client costs nearly as much as one that succeeds, so the number of them per event follows the
length of the backlog at earlier events. epoll reports the rest once more, after other descriptors had their turn.

Without free descriptors, flows of little use make way for a client (`flow/room.py`). If there are none, it is accepted
with a spare descriptor, and reset. Where that fails as well, and after a fault in a handler, the listener rests for a
moment (`flow/spare.py`).

Root of the host, and of the namespace, may destroy any socket there (`ss -K`, SOCK_DESTROY of sock_diag(7)). For a TCP
listener, accept(2) then fails by EINVAL, epoll reports EPOLLHUP for ever, and connections would be born closed if it
listened again. So its port is closed, and opened anew after REOPEN, which bounds the work that a hostile guest can
cause; automatic rules do so at their next scan. A port that cannot be opened is given up. A UDP listener reports one
error and goes on.
"""

from __future__ import annotations

import errno
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Final

from .. import log
from ..calls import calls
from ..drops import Drop
from ..flow.context import Context
from ..flow.room import DESCRIPTORS, NO_DESCRIPTORS
from ..flow.spare import Spare
from ..linux.accepting import ACCEPTED, accept
from ..linux.netns import Namespace
from ..linux.nspool import new_socket
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN, TYPE_LISTEN, ref_data
from ..policy.rules import Listener, Rule
from ..splice.tcp import TcpSplice
from ..tcp_engine.opening import TcpOpen
from ..tcp_engine.sock import reset
from ..wire.checksum import PROTO_TCP
from .sockets import Failure, Wanted, describe, held_by_us, open_ports
from .udp_in import UdpIn

BUDGET_MAX: Final = 16  # connections accepted per event, so that established ones get their turn
REOPEN = 0.5  # s
STREAK: Final = 8  # events in a row that use up the budget before it doubles


CALLS = calls("accept4")


class Listeners:
    """All listeners. Those of outbound rules are in `namespace`."""

    def __init__(
        self,
        ctx: Context,
        *,
        tcp: TcpOpen | None,
        tcp_splice: TcpSplice,
        udp_in: UdpIn,
        namespace: Namespace | None,
        opened: Iterable[Listener] = (),
    ) -> None:
        self._ctx = ctx
        self._tcp, self._tcp_splice, self._udp_in = tcp, tcp_splice, udp_in
        self._namespace = namespace
        self._by_index: list[Listener | None] = []
        self._free: list[int] = []
        self._by_rule: dict[Rule, dict[int, tuple[Listener, ...]]] = {}
        self._held: Counter[tuple[int, bool, int]] = Counter()  # sockets by protocol, direction and port
        self._in_vain: set[int] = set()  # UDP ports that could not be had although flows of the guest made way
        self._budget = 1
        self._streak = 0
        self._spare = Spare(ctx)
        self._lost: dict[Wanted, None] = {}  # ports whose sockets were destroyed
        self._timer = -1
        ctx.reactor.handle(TYPE_LISTEN, self.sock_handler)
        ctx.stats.gauges["listeners"] = lambda: len(self._by_index) - len(self._free)
        for listener in opened:
            self._watch(listener)

    # Ports -----------------------------------------------------------------------------------------------------------

    def ports(self, rule: Rule) -> set[int]:
        """Ports of `rule` with a listener."""
        return set(self._by_rule.get(rule, ()))

    def has(self, proto: int, outbound: bool, port: int) -> bool:
        """Whether any rule of that kind listens on `port`."""
        return (proto, outbound, port) in self._held

    def add(self, rule: Rule, port: int) -> None:
        """Listen on a port of `rule`. Raises OSError, with nothing changed."""
        for failure in self.add_all([(rule, port)]):
            raise OSError(failure.errno, failure.reason)

    def add_all(self, wanted: Sequence[Wanted]) -> list[Failure]:
        """Listen on ports of rules of one direction, which have no listener; returns the failures."""
        listeners, failed = self.open(wanted)
        try:
            self.watch(listeners)
        except OSError as e:
            failed += [Failure(listener.rule, listener.port, e.errno or 0) for listener in listeners]
        return failed

    def open(self, wanted: Sequence[Wanted]) -> tuple[list[Listener], list[Failure]]:
        """Listeners for ports of rules of one direction, and the failures. The caller has to watch or to close the
        listeners.
        """
        outbound = bool(wanted) and wanted[0][0].outbound
        listeners: list[Listener] = []
        config = self._ctx.config
        if not outbound:
            return listeners, self._make_way(open_ports(config, wanted, listeners), listeners)
        assert self._namespace is not None, "a virtual machine has no outbound rules"
        try:
            return listeners, self._namespace.run(lambda: open_ports(config, wanted, listeners))
        except OSError as e:
            return listeners, [Failure(rule, port, e.errno or 0) for rule, port in wanted]

    def _make_way(self, failed: list[Failure], listeners: list[Listener]) -> list[Failure]:
        """Try ports again that flows of the guest keep, after closing these; returns the remaining failures.

        A flow that closes loses its port, so none does for a port that others have, or that may not be bound. Automatic
        rules try again all the time: a port that could not be had in spite of that is not cleared for them again.
        """
        config = self._ctx.config
        busy = [f for f in failed if f.rule.proto != PROTO_TCP and f.errno == errno.EADDRINUSE]
        busy = [f for f in busy if not (f.rule.auto and f.port in self._in_vain)]
        ours = self._udp_in.ports_in_use({f.port for f in busy}) if busy else ()
        held = [f for f in busy if f.port in ours and held_by_us(config, f.rule, f.port)]
        if not held:
            return failed
        self._udp_in.free_ports({f.port for f in held})
        again = open_ports(config, [(f.rule, f.port) for f in held], listeners)
        self._in_vain.difference_update(f.port for f in held)
        self._in_vain.update(f.port for f in again)
        return [f for f in failed if f not in held] + again

    def watch(self, listeners: Sequence[Listener]) -> None:
        """Serve the listeners of `open`. Raises OSError, with all of them closed.

        Only epoll_ctl(2) can fail, without memory or watches (fs.epoll.max_user_watches).
        """
        done: list[Wanted] = []
        try:
            for listener in listeners:
                self._watch(listener)
                done.append((listener.rule, listener.port))
        except BaseException:
            self.remove_all(dict.fromkeys(done))
            each(listeners, close_socket, self._fault_at)
            raise

    def remove(self, rule: Rule, port: int) -> None:
        """Stop to listen on a port of `rule`. Connections go on; UDP flows, which would keep the port, end."""
        self.remove_all([(rule, port)])

    def remove_all(self, ports: Iterable[Wanted]) -> None:
        """The same for ports of rules."""
        closed: list[Listener] = []
        each(ports, self._remove, self._fault_at, closed)
        self._udp_in.end([listener for listener in closed if listener.rule.proto != PROTO_TCP])

    def _remove(self, wanted: Wanted, closed: list[Listener]) -> None:
        rule, port = wanted
        listeners = self._take(rule, port)
        held = rule.proto, rule.outbound, port
        self._held[held] -= len(listeners)
        if not self._held[held]:
            del self._held[held]
        closed += listeners
        each(listeners, self._close_listener, self._fault_at)

    def _close_listener(self, listener: Listener) -> None:
        self._by_index[listener.index] = None
        self._free.append(listener.index)
        self._spare.forget(listener.fd)
        self._retire(listener)

    def _fault_at(self, what: object, e: Exception) -> None:
        """A port, or a listener of it, could not be closed or handed over; the others go on."""
        record(self._ctx.drops, "a change of ports", e)

    def hand_over(self, ports: Sequence[tuple[Rule, int, Rule]]) -> None:
        """Hand the listeners of (rule, port, successor) to the successor, a rule that listens in the same way.

        The port stays open, and connections go on. UDP flows end if the target of the port changes.
        """
        handed: list[tuple[Listener, Rule]] = []
        each(ports, self._hand_over, self._fault_at, handed)
        moved = [
            listener
            for listener, successor in handed
            if listener.rule.proto != PROTO_TCP and _moves(listener, successor)
        ]
        self._udp_in.end(moved)
        each(handed, _lead, self._fault_at)
        each(moved, self._udp_in.begin, self._fault_at)

    def _hand_over(self, what: tuple[Rule, int, Rule], handed: list[tuple[Listener, Rule]]) -> None:
        rule, port, successor = what
        listeners = self._take(rule, port)
        self._by_rule.setdefault(successor, {})[port] = listeners
        handed += [(listener, successor) for listener in listeners]

    def _take(self, rule: Rule, port: int) -> tuple[Listener, ...]:
        """Detach the listeners of a port from `rule`, and return them."""
        listeners = self._by_rule[rule].pop(port)
        if not self._by_rule[rule]:
            del self._by_rule[rule]
        return listeners

    @property
    def has_namespace(self) -> bool:
        """Whether there is a namespace to listen in."""
        return self._namespace is not None

    def close(self) -> None:
        """Close all listeners."""
        each(filter(None, self._by_index), self._retire, self._fault_at)
        for held in (self._by_index, self._by_rule, self._held, self._free):
            held.clear()
        self._lost.clear()
        self._spare.close()

    def _retire(self, listener: Listener) -> None:
        self._ctx.reactor.retire(listener.fd, listener.sock)

    def _watch(self, listener: Listener) -> None:
        """Raises OSError, with nothing changed."""
        listener.index = self._free[-1] if self._free else len(self._by_index)
        self._ctx.reactor.watch(listener.fd, TYPE_LISTEN, listener.index, EPOLLIN)
        if self._free:
            self._by_index[self._free.pop()] = listener
        else:
            self._by_index.append(listener)
        rule, port = listener.rule, listener.port
        ports = self._by_rule.setdefault(rule, {})
        ports[port] = (*ports.get(port, ()), listener)
        self._held[rule.proto, rule.outbound, port] += 1
        if listener.rule.proto != PROTO_TCP:
            self._udp_in.begin(listener)

    # Events ----------------------------------------------------------------------------------------------------------

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """A listener is readable."""
        listener = self._by_index[ref_data(ref)]
        assert listener is not None, "it was retired when it left the list"
        if listener.rule.proto != PROTO_TCP:
            self._udp_in.sock_handler(listener, now)
            return
        left = self._budget
        try:
            while left:
                self._accept(listener, now)
                left -= 1
        except BlockingIOError:
            self._budget = max(1, self._budget - left)
            self._streak = 0
            return
        self._streak += 1
        if self._streak >= STREAK:
            self._budget = min(2 * self._budget, BUDGET_MAX)
            self._streak = 0

    def _accept(self, listener: Listener, now: float) -> None:
        """Accept one connection. Raises BlockingIOError if the backlog is empty or the listener rests."""
        try:
            fd, peer, port = accept(listener.fd)
        except BlockingIOError:
            raise
        except OSError as e:
            self._accept_failed(listener, e, now)
            return
        sock: Any = new_socket(listener.sock.family, ACCEPTED, 0, fd)
        ctx = self._ctx
        if ctx.fwd.spliced(peer, listener.rule):
            self._tcp_splice.accepted(listener, sock, peer, port, now)
        elif self._tcp is not None:
            self._tcp.accepted(listener, sock, peer, port, now)
        else:
            ctx.drops[Drop.LISTEN_NOT_FROM_LOOPBACK] += 1
            reset(sock)

    def _accept_failed(self, listener: Listener, e: OSError, now: float) -> None:
        """Raises BlockingIOError if the listener rests, or has no backlog any more."""
        if e.errno == errno.EINVAL:
            self._destroyed(listener, now)
            raise BlockingIOError
        if e.errno in NO_DESCRIPTORS:
            if self._ctx.room.make(DESCRIPTORS, now, foreign=not listener.rule.outbound):
                return
            log.warn_ratelimited("listen", f"Refusing connections to port {listener.port}: {e.strerror}", now)
        elif log.debug_on:
            log.debug(f"Port {listener.port}: accept: {e.strerror}")
        if not self._spare.accept_failed(listener.fd, e, now, self._refuse):
            raise BlockingIOError

    def _destroyed(self, listener: Listener, now: float) -> None:
        """Its socket was destroyed: close the port, to open it again a little later."""
        rule, port = listener.rule, listener.port
        self._ctx.drops[Drop.LISTEN_DESTROYED] += 1
        text = f"Port {port} of '{rule.option}' was closed by another program: opening it again"
        log.warn_ratelimited("destroyed", text, now)
        self.remove(rule, port)
        if not rule.auto:
            if self._timer < 0:
                self._timer = self._ctx.timers.services.new(self._reopen)
            if not self._lost:
                self._ctx.timers.services.arm(self._timer, now + REOPEN)
            self._lost[rule, port] = None

    def _reopen(self, now: float) -> None:
        """Open ports whose sockets were destroyed, as far as their rules are in force."""
        lost, self._lost = self._lost, {}
        rules = set(self._ctx.config.forwards)
        wanted = [(rule, port) for rule, port in lost if rule in rules and port not in self.ports(rule)]
        failed: list[Failure] = []
        for outbound in (False, True):
            failed += self.add_all([w for w in wanted if w[0].outbound == outbound])
        for line in describe(failed):
            log.warn_ratelimited("given up", f"Closed by another program, and given up: {line}", now)

    def _refuse(self, fd: int) -> None:
        reset(new_socket(socket.AF_INET, ACCEPTED, 0, fd))
        self._ctx.drops[Drop.LISTEN_NO_DESCRIPTOR] += 1

    def fault(self, ref: int) -> None:
        """A handler failed on an event of the listener. The listener stays, and rests for a moment."""
        listener = self._by_index[ref_data(ref)]
        if listener is not None:
            self._spare.rest(listener.fd, time.monotonic())


def _moves(listener: Listener, successor: Rule) -> bool:
    """Whether the target of its port changes with `successor`."""
    return (listener.rule.target, listener.to) != (successor.target, successor.target_port(listener.port))


def close_socket(listener: Listener) -> None:
    """Close the socket of a listener that is not watched."""
    listener.sock.close()


def _lead(handed: tuple[Listener, Rule]) -> None:
    """Give a listener to the successor of its rule."""
    listener, successor = handed
    listener.rule, listener.to = successor, successor.target_port(listener.port)
