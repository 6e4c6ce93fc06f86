"""The steps of a migration, on the host that the machine leaves (source) and on the one that it comes to (target).

    front end                    source                             target
    ---------------------------  ---------------------------------  --------------------------------------------------
    rings stop
    SET_DEVICE_STATE_FD, SAVE    connections halt; helper: on;
                                   described; the state is sent
    CHECK_DEVICE_STATE           whether it was
    SET_DEVICE_STATE_FD, LOAD                                       guest's addresses; sockets; helper: on; connected
    CHECK_DEVICE_STATE                                              whether the state is one of this program
    rings start                  the migration has failed:          helper: off; connections go on, those that cannot
                                   helper: off; connections go on     get RST; then the machine's frames are read
    the front end goes           sockets stay for LINGER, and       the migration has failed: sockets close in silence
                                   close in silence

Until the machine runs somewhere, the connections of neither side have sent anything, and either may go on. Nothing that
a host peer sends meanwhile is acknowledged: it sends it again.

A socket that stays behind discards all that comes, where the kernel without a socket would send RST to the peer, which
may still be routed here. --migrate-no-linger closes it as soon as the state was sent. Then a target on the same host
can have its endpoints, and a migration that fails afterwards has lost the connections.

    phase       what is in progress                       front end gone           rings start
    ----------  ----------------------------------------  -----------------------  ---------------------------
    IDLE        nothing                                   -                        they start
    FREEZING    helper: on, for halted connections        undone after the answer  wait, then as in HALTED
    HALTED      the state was sent, or is being sent      sockets stay behind, or  RESUMING
                                                            are undone, if it was
                                                            not sent
    RESUMING    helper: off                               reset after the answer   wait for the answer
    CONNECTING  helper: on, for new sockets               closed after the answer  wait, then as in ARRIVED
    ARRIVED     connected, in repair mode                 closed in silence        ADOPTING
    ADOPTING    helper: off                               reset after the answer   wait for the answer

Without a helper, or where the address of the source is not one of the target's, connections do not move. The guest gets
RST for each, at once. On the source, the host peers get RST if they were not in repair mode.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from .. import addr, log
from ..flow.context import Context
from ..lean.tuples import NamedTuple
from ..link.vhost_user import VhostLink
from ..linux.tcp_repair import OFF, ON
from ..loop.each import record
from ..tcp import Tcp
from ..tcp_engine.conn import TcpConn
from ..tcp_engine.moving import TcpMoving
from ..wire.migration import ConnectionState, InvalidState, State
from .helper import Helper

LINGER = 60.0  # s that the network may take to learn where the address is
IDLE, FREEZING, HALTED, RESUMING, CONNECTING, ARRIVED, ADOPTING = range(7)

Send = Callable[[bytes | None], None]
Loaded = Callable[[bool], None]


class Halted(NamedTuple):
    """A connection of the source, and its socket."""

    conn: TcpConn
    sock: Any


class Arrived(NamedTuple):
    """A connection at the target, and its socket, which is connected and in repair mode."""

    state: ConnectionState
    sock: Any
    queued: int = 0  # bytes in its send queue


class Migration:
    """Both ends of it. `on_end()` is called when the front end of a machine that has moved is gone; None: another may
    come. `linger`: sockets stay behind.
    """

    def __init__(
        self,
        ctx: Context,
        tcp: Tcp,
        link: VhostLink,
        helper: Helper,
        *,
        linger: bool = True,
        on_end: Callable[[], None] | None = None,
    ) -> None:
        self._ctx, self._tcp, self._link, self._helper = ctx, tcp, link, helper
        self._moving: TcpMoving = tcp.mover()
        self._linger, self._on_end = linger, on_end
        self.phase = IDLE
        self._abandoned = False  # the front end went during the phase
        self._waits = False  # the rings wait for `proceed`
        self._plain: list[Halted] = []  # of the source: not in repair mode
        self._frozen: list[Halted] = []  # of the source: in repair mode
        self._closed: list[TcpConn] = []  # of the source, whose sockets were closed when the state was sent
        self._sent = False
        self._arrived: list[Arrived] = []
        self._lost: list[ConnectionState] = []
        self._ended: list[tuple[TcpConn, Any]] = []  # of the source, whose guest is to get RST
        self._behind: list[Any] = []  # sockets that stay behind
        self._timer = ctx.timers.services.new(self._leave)
        link.state.on_save, link.state.on_load, link.state.on_sent = self._save, self._load, self._was_sent
        link.on_start, link.on_room = self._starts, self._room
        ctx.services.on_forget.append(self._forget)

    # Source ----------------------------------------------------------------------------------------------------------

    def _save(self, send: Send) -> None:
        """The machine has stopped: collect its state."""
        if self.phase == HALTED:
            self._describe(send)  # a second attempt, without a start of the rings in between
            return
        if self.phase not in (IDLE, ARRIVED):
            send(None)
            return
        self._drop_arrived()
        for conn in self._moving.established():
            self._attempt(self._halt, conn)
        self.phase = FREEZING
        self._helper.ask(ON, _sockets(self._plain), partial(self._on, send), time.monotonic())

    def _halt(self, conn: TcpConn) -> None:
        self._plain.append(Halted(conn, self._moving.halt(conn)))

    def _on(self, send: Send, count: int, now: float) -> None:
        """`count` sockets are in repair mode."""
        self._frozen, self._plain = self._plain[:count], self._plain[count:]
        self.phase = HALTED
        if self._abandoned:
            self._abandoned = False
            self._forget()
            return
        self._describe(send)
        if self._waits:
            self._resume(now)

    def _describe(self, send: Send) -> None:
        """Send the state."""
        states = [self._moving.describe(conn, sock) for conn, sock in self._frozen]
        states += [self._moving.describe(conn, None) for conn, _ in self._plain]
        guest = self._ctx.guest
        mac = bytes(6) if guest.mac == addr.BROADCAST_MAC else guest.mac
        data = State(mac, guest.addr4, guest.addr6, guest.addr6_ll, tuple(states)).emit()
        moving = sum(state.socket is not None for state in states)
        log.info(f"Migration: {moving} of {len(states)} TCP connections can move, the state has {len(data)} bytes")
        send(data)

    def _was_sent(self, done: bool) -> None:
        """The front end has the state, or does not want it."""
        self._sent = done
        if done and not self._linger:
            for conn, sock in self._frozen:
                self._ctx.reactor.retire(sock.fileno(), sock)
                self._closed.append(conn)
            self._frozen = []

    def _resume(self, now: float) -> None:
        self.phase = RESUMING
        for _, sock in self._frozen:
            self._attempt(self._moving.let_in, sock)
        self._helper.ask(OFF, _sockets(self._frozen), self._off, now)

    def _off(self, count: int, now: float) -> None:
        """The machine goes on here, and `count` sockets have left repair mode."""
        halted, self._frozen, plain, self._plain = self._frozen, [], self._plain, []
        closed, self._closed = self._closed, []
        going = [*plain, *halted[:count]]
        if self._abandoned:
            for _, sock in going:
                self._moving.reset(sock)
            _close(_sockets(halted[count:]))
        else:
            for conn, sock in going:
                self._attempt(self._moving.resume, conn, sock, now)
            self._ended += [*halted[count:], *((conn, None) for conn in closed)]
            log.info(f"Migration: the machine goes on here, with {len(going)} TCP connections")
        self._run(now)

    def _leave(self, now: float) -> None:
        """The network has learnt where the address is."""
        behind, self._behind = self._behind, []
        _close(behind)

    # Target ----------------------------------------------------------------------------------------------------------

    def _load(self, data: bytes, done: Loaded) -> None:
        """The state of a machine that comes here."""
        try:
            if self.phase not in (IDLE, ARRIVED):
                raise InvalidState("a migration is in progress")
            state = State.parse(data)
        except InvalidState as e:
            log.err(f"The machine's state cannot be used: {e}")
            done(False)
            return
        self._drop_arrived()
        self._ctx.neighbours.arrived(state.mac, state.addr4, state.addr6, state.addr6_ll)
        opened = []
        for connection in state.connections:
            if connection.socket is None:
                self._lost.append(connection)
                continue
            try:
                opened.append(Arrived(connection, self._moving.open(connection.socket)))
            except OSError as e:
                self._lose(connection, e)
        self.phase = CONNECTING
        self._helper.ask(ON, _sockets(opened), partial(self._connect, opened, done), time.monotonic())

    def _connect(self, opened: list[Arrived], done: Loaded, count: int, now: float) -> None:
        """`count` sockets are in repair mode."""
        self.phase = ARRIVED
        for i, (connection, sock, _) in enumerate(opened):
            assert connection.socket is not None
            try:
                if self._abandoned or i >= count:
                    raise ConnectionError("it is not in repair mode")
                queued = self._moving.make(sock, connection.socket)
                self._arrived.append(Arrived(connection, sock, queued))
            except OSError as e:
                sock.close()
                self._lose(connection, e)
        if self._abandoned:
            self._abandoned = False
            self._drop_arrived()
            return
        total = len(self._arrived) + len(self._lost)
        log.info(f"Migration: {len(self._arrived)} of {total} TCP connections can go on here")
        done(True)
        if self._waits:
            self._adopt(now)

    def _lose(self, connection: ConnectionState, e: OSError) -> None:
        log.debug(f"A TCP connection of the machine cannot go on here: {e.strerror or e}")
        self._lost.append(connection)

    def _adopt(self, now: float) -> None:
        self.phase = ADOPTING
        for sock in _sockets(self._arrived):
            self._attempt(self._moving.let_in, sock)
        self._helper.ask(OFF, _sockets(self._arrived), self._adopted, now)

    def _adopted(self, count: int, now: float) -> None:
        """The machine runs here, and `count` of the sockets have left repair mode."""
        arrived, self._arrived = self._arrived, []
        for connection, sock, queued in arrived[:count]:
            if self._abandoned:
                self._moving.reset(sock)
            else:
                self._attempt(self._moving.adopt, connection, sock, queued, now)
        for connection, sock, _ in arrived[count:]:
            sock.close()
            self._lost.append(connection)
        self._run(now)

    def _drop_arrived(self) -> None:
        """Forget a machine that has not run here. Its sockets are in repair mode, and close in silence."""
        _close(_sockets(self._arrived))
        self._arrived, self._lost = [], []
        self.phase = IDLE

    # Both ------------------------------------------------------------------------------------------------------------

    def _starts(self, now: float) -> bool:
        """The machine is about to run; whether it has to wait for `VhostLink.proceed`."""
        self._waits = False
        if self.phase == HALTED:
            self._resume(now)
        elif self.phase == ARRIVED:
            self._adopt(now)
        self._waits = self.phase != IDLE and not self._abandoned
        return self._waits

    def _run(self, now: float) -> None:
        """All connections are what they will be: the machine's frames are read from now on."""
        self.phase, self._sent = IDLE, False
        self._helper.release()
        if self._abandoned:
            self._abandoned = False
            self._lost = []
            return
        self._ctx.reactor.between_turns(self._go_on)

    def _go_on(self, now: float) -> None:
        """The machine's frames are read from now on."""
        if self._waits:
            self._waits = False
            self._link.proceed(now)
        if not self._link.full:
            self._room(now)

    def _room(self, now: float) -> None:
        """The link takes frames: the guest gets RST for connections that are lost, and data for the others."""
        lost, self._lost, ended, self._ended = self._lost, [], self._ended, []
        for connection in lost:
            self._attempt(self._moving.lose, connection, now)
        for conn, sock in ended:
            self._attempt(self._moving.end, conn, sock)
        self._tcp.resume(now)

    def _attempt(self, step: Callable[..., None], *args: Any) -> None:
        """A step of one connection, which may fail for this one alone."""
        try:
            step(*args)
        except OSError as e:
            log.debug(f"A TCP connection of the machine does not move: {e.strerror or e}")
        except Exception as e:
            record(self._ctx.drops, "a TCP connection that moves", e)

    def _forget(self) -> None:
        """The front end is gone. Connections of the table have ended already."""
        self._waits = False
        ended, self._ended = self._ended, []
        _close([sock for _, sock in ended if sock is not None])
        if self.phase == ARRIVED:
            self._drop_arrived()
            self._helper.release()
        elif self.phase == HALTED:
            self._left()
        elif self.phase != IDLE:
            self._abandoned = True

    def _left(self) -> None:
        """The machine has left, or its front end has failed before it had the state."""
        now = time.monotonic()
        sockets, self._frozen = _sockets(self._frozen), []
        for _, sock in self._plain:
            self._moving.reset(sock)
        self._plain, self._closed, self.phase = [], [], IDLE
        if not self._sent:
            self._helper.ask(OFF, sockets, partial(self._undone, sockets), now)
            return
        self._sent = False
        self._helper.release()
        self._behind += sockets
        self._ctx.timers.services.arm(self._timer, now + LINGER)
        if self._on_end is not None:
            self._on_end()

    def _undone(self, sockets: list[Any], count: int, now: float) -> None:
        """`count` of the sockets of a machine that is gone have left repair mode."""
        for sock in sockets[:count]:
            self._moving.reset(sock)
        _close(sockets[count:])
        self._helper.release()


def _sockets(ends: Sequence[Halted] | Sequence[Arrived]) -> list[Any]:
    return [end[1] for end in ends]


def _close(sockets: Sequence[Any]) -> None:
    """Close sockets that are not watched."""
    for sock in sockets:
        sock.close()
