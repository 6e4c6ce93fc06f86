"""TCP handshakes, from either side: everything before ESTABLISHED.

The guest connects                                     A host client connects

    guest            here             host                 guest            here            host client
      |     SYN        |                |                    |                |     connect     |
      |--------------->|    connect     |                    |                |<----------------| accept()ed: `accepted`
      |                |--------------->|                    |      SYN       |                 |
      |    SYN,ACK     |   connected    |                    |<---------------|   data, FIN     |
      |<---------------|<---------------|                    |    SYN,ACK     |<----------------| stay in the socket
      |      ACK       |                |                    |--------------->|                 |
      |--------------->|                |                    |   ACK, data    |                 |
      |                |                |                    |<---------------|                 |

The kernel accepts a host client before the guest is asked, so the client believes that it is connected. Its data waits
in the socket. If the guest refuses or does not answer, the client is reset.

Too many connections that are not established refuse no other one: the oldest of them makes way (`eviction.py`), and so
do flows of little use where the table or descriptors are used up (`flow/room.py`). If there are none, a connection of
the guest is refused by RST, and counted: "flow table full"; "tcp socket": no descriptor or no memory is left.

    host client's connection                                                     counted as
    ---------------------------------------------------------------------------  -------------------------------
    TCP is off                                                                   tcp disabled
    too many clients wait for the end of a former connection (see below)         tcp inbound: too many half open
    no guest has spoken for 30 s, or too many wait for it (`flow/neighbours.py`)  tcp inbound: no guest
    the guest has no address, or none that it could answer to                    tcp inbound: no address
    the guest has a connection between the same endpoints, and it is not over    tcp inbound: endpoints in use
    for the host (see below)
    the table of flows is full                                                   flow table full
    it cannot be watched (epoll_ctl(2) has no memory)                            tcp inbound: no descriptor

The guest sees a client on the host's loopback under another address anyway, so the client's address family does not
matter. When the guest refuses one family, the other is tried before the client is reset. So a client that resolved
`localhost` to ::1 reaches a server that listens on IPv4 only, and the other way round.

A successor is a connection from the same client port, opened when the former connection is over for the client's kernel
and the host's (RFC 9293, 3.6.1; RFC 6191). For the guest it may not be over: the last bytes and FIN are in flight. SYN
of the successor waits until the guest has acknowledged these. After SUCCESSOR_RETRIES retransmissions without that, the
former connection is reset. A former connection that the client has reset makes room at once.

Segments in SYN-SENT, after our SYN to the guest (RFC 9293, 3.10.7.3)

    segment                              answer
    -----------------------------------  -----------------------------------------------------------------------------
    SYN,ACK of our SYN                   ACK, with data of the client if there is any
    RST,ACK of our SYN                   SYN in the other family, or RST to the client
    ACK of something else                RST, and SYN once more at once: an old connection was in its way, and is gone
    ICMP error that quotes our SYN       SYN in the other family, or RST to the client (`syn_errors.py`)
    RST that does not acknowledge SYN    ignored: it may be forged
    SYN alone: simultaneous open         nothing: the guest answers our SYN by SYN,ACK
    anything else                        nothing: SYN,ACK comes first, or is retransmitted

One address in the guest may stand for several resolvers (`policy/resolvers.py`). When connecting to one fails, the next
one is tried before the guest gets an answer.

SYN and SYN,ACK are retransmitted like data (`rtt.py`); after SYN_TIMEOUT both sides are reset.
"""

from __future__ import annotations

import errno
import os
from _blake2 import blake2s  # `hashlib` has the same, and loads OpenSSL: 2 ms and 4 MB
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from .. import addr, log
from ..drops import Drop, Reason
from ..flow.context import Context
from ..flow.table import TableFull, reason_of
from ..linux import tcpinfo
from ..loop.reactor import INTEREST, TYPE_TCP
from ..policy.config import Config
from ..policy.rules import Listener
from ..wire import tcp
from ..wire.cursor import Malformed
from ..wire.tcp import ACK, FIN, MASK, RST, SEQ_TO_WINDOW_UNPACK, SYN
from . import sock as tcp_sock
from .conn import (
    ESTABLISHED,
    SOCK_ACCEPTED,
    SOCK_FIN_SENT,
    TAP_SYN_ACK_SENT,
    TAP_SYN_RCVD,
    TAP_SYN_SENT,
    WINDOW_DEFAULT,
    TcpConn,
    apply_syn_options,
    may_connect_both,
    set_event,
)
from .eviction import Eviction, to_guest, to_peer
from .output import TcpOut
from .syn_errors import SynErrors
from .table import TcpTable
from .window import TcpAck

REFUSED: Final = frozenset((errno.ECONNREFUSED, errno.ECONNRESET))

_NO_PORT: Final = bytes(2)
_WINDOW_LOW: Final = WINDOW_DEFAULT // 2


class TcpOpen:
    """The handshakes of both directions."""

    def __init__(self, ctx: Context, features: tcpinfo.Features, out: TcpOut, acks: TcpAck, table: TcpTable) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._features = features
        self._out = out
        self._acks = acks
        self._table = table
        self._errors = SynErrors(ctx, table, self._refused)
        self._secret = os.urandom(16)  # RFC 6528: new at each start
        self._replaced = 0  # connections that gave way to a successor
        self._eviction = Eviction(ctx, table)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._disabled = config.no_tcp

    def segments(
        self, conn: TcpConn | None, key: bytes, segments: list[int], now: float, hops: int = 0
    ) -> TcpConn | None:
        """Handle segments before ESTABLISHED. `hops` is the TTL or hop limit of the first, 0: not known.

        Returns a connection that has become established, with the rest of its segments in `segments`.
        """
        if self._disabled:
            self._ctx.drops[Drop.TCP_DISABLED] += len(segments) // 2
            return None
        for i in range(0, len(segments), 2):
            offset, end = segments[i], segments[i + 1]
            numbers = seq, ack, bits, _ = SEQ_TO_WINDOW_UNPACK(self._pool.buf, offset + 4)
            data = offset + (bits >> 10 & 0x3C)
            if data > end or data < offset + 20:
                self._ctx.drops[Drop.TCP_HEADER_LENGTH] += 1
                continue
            flags = bits & (SYN | RST | ACK)
            if conn is not None and conn.events & TAP_SYN_SENT:
                if self._in_syn_sent(conn, offset, data, numbers, now):
                    del segments[: i + 2]
                    return conn
                conn = self._table.by_key.get(key)  # it ended, or has the key of the other family
                continue
            if conn is not None and flags == SYN and seq != conn.irs:
                self._table.abort(conn, "replaced")  # a new attempt of the guest from the same port
                conn = None
            if conn is None:
                conn = self._no_connection(key, offset, data, end, numbers, now, hops)
            elif flags == SYN:
                if conn.events & TAP_SYN_ACK_SENT:
                    self.retransmit_syn(conn)
                else:
                    self._errors.set_hops(conn, hops)
            elif bits & RST:
                self._table.reset_by_guest(conn)
                return None
            elif flags == ACK and conn.events & TAP_SYN_ACK_SENT and ack == conn.snd_nxt & MASK:
                self._table.outbound.discard(conn)
                self._established(conn, numbers, now)
                del segments[: i + 2 * (data == end and seq == conn.rcv_nxt & MASK and not bits & FIN)]  # a bare ACK
                return conn
            elif flags == ACK:
                self._out.refuse(key, seq, ack, bits, 0)
        return None

    def _no_connection(
        self, key: bytes, offset: int, data: int, end: int, numbers: tuple[int, ...], now: float, hops: int
    ) -> TcpConn | None:
        """A segment of no connection: SYN opens one, and RST is ignored. RST answers everything else."""
        seq, ack, bits, win = numbers
        if bits & RST:
            return None
        if bits & (SYN | ACK) == SYN:
            if not may_connect_both(key[:-4]) or _NO_PORT in (key[-4:-2], key[-2:]):
                self._ctx.drops[Drop.TCP_ENDPOINT] += 1
                return None
            try:
                options = tcp.syn_options(self._pool.copy(offset + 20, data))
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
                return None
            return self._open(key, to_peer(key), seq, win, options, now, hops)
        if self._table.timed_out.ignores(key, now):
            return None
        length = end - data + (1 if bits & SYN else 0) + (1 if bits & FIN else 0)
        self._out.refuse(key, seq, ack, bits, length)
        return None

    def retransmit_syn(self, conn: TcpConn) -> None:
        """Send SYN or SYN,ACK once more."""
        conn.resent += 1
        if conn.events & TAP_SYN_SENT:
            self._ctx.neighbours.solicit(conn.key[: len(conn.key) // 2 - 2])  # it may have another MAC
            self._out.syn(conn)
        else:
            self._out.syn_ack(conn, conn.rcv_wscale != 0)

    def isn(self, key: bytes, now: float) -> int:
        """An initial sequence number, RFC 6528: a keyed hash of the endpoints (BLAKE2s, RFC 7693), and a clock of 4 us.

        A connection may be replaced in the turn in which it began, at the same time. Each replacement advances the
        clock, too, so that an answer to the first SYN is none to the second.
        """
        h = int.from_bytes(blake2s(key, digest_size=4, key=self._secret).digest(), "big")
        return (h + int(now * 250_000) + self._replaced) & MASK

    def _choose_iss(self, conn: TcpConn, now: float) -> None:
        """Choose our initial sequence number. Nothing is sent yet; the first byte follows SYN."""
        conn.iss = conn.snd_una = conn.snd_nxt = self.isn(conn.key, now)
        conn.base = conn.snd_una + 1

    def _established(self, conn: TcpConn, numbers: tuple[int, ...], now: float) -> None:
        """The guest acknowledged our SYN. The window of a SYN is not scaled (RFC 7323, 2.2)."""
        self._table.end_handshake(conn, now)
        _, _, bits, win = numbers
        conn.snd_una = conn.snd_nxt
        conn.snd_wnd = conn.snd_wnd_max = win if bits & SYN else win << conn.snd_wscale
        conn.retries = 0
        set_event(conn, ESTABLISHED)

    # The guest connects --------------------------------------------------------------------------------------------

    def _open(
        self, key: bytes, peer: bytes, isn: int, window: int, options: tcp.SynOptions, now: float, hops: int
    ) -> TcpConn | None:
        """The guest connects: connect on the host."""
        self._eviction.outbound(peer, now)
        conn = TcpConn(key)
        conn.irs = isn
        conn.rcv_nxt = conn.rcv_acked = conn.rcv_edge = isn + 1
        apply_syn_options(conn, options)
        conn.snd_wnd = window
        tcp_sock.choose_host(self._ctx, conn, now)
        self._errors.set_hops(conn, hops)
        try:
            self._table.add(conn, now)
        except TableFull:
            self._no_room(key, isn, Drop.TCP_TABLE_FULL)
            return None
        self._choose_iss(conn, now)
        self._out.build_header(conn)
        set_event(conn, TAP_SYN_RCVD)
        try:
            error = tcp_sock.connect(self._ctx, self._features, conn, now)
        except OSError as e:  # no descriptor, no memory
            self._no_socket(conn, e, now)
            return None
        if error == errno.EINPROGRESS:
            self._table.outbound.add(conn, peer)
        elif error:
            self.connected(conn, error, now)
        else:
            self._answer(conn, peer, now)
        return conn if conn.sock is not None else None

    def _no_room(self, key: bytes, isn: int, why: Reason) -> None:
        """Refuse the guest's connection."""
        self._ctx.drops[why] += 1
        self._out.refuse(key, isn, 0, SYN, 1)

    def _no_socket(self, conn: TcpConn, e: OSError, now: float) -> None:
        """Refuse a connection that is in the table already."""
        log.warn_ratelimited("tcp socket", f"Cannot open a TCP socket: {e.strerror}", now)
        self._no_room(conn.key, conn.irs, Drop.TCP_NO_SOCKET)
        self._table.reset_by_guest(conn, "no socket")

    def connected(self, conn: TcpConn, error: int, now: float) -> None:
        """The host socket is connected, or failed with `error`: answer the guest."""
        self._table.outbound.discard(conn)  # or it could be what makes way for its own timer or next socket
        if error and conn.resolvers_tried:
            error = tcp_sock.connect_next(self._ctx, self._features, conn, error, now)
            if error == errno.EINPROGRESS:
                self._table.outbound.add(conn, to_peer(conn.key))
                return
        if error:
            self.connect_failed(conn, error, now)
        else:
            self._answer(conn, to_peer(conn.key), now)

    def _answer(self, conn: TcpConn, peer: bytes, now: float) -> None:
        """The host socket is connected: send SYN,ACK."""
        if conn.resolvers_tried:
            self._ctx.resolvers.answered(conn.resolvers_tried[-1], now)
            conn.resolvers_tried = ()
            tcp_sock.clear_user_timeout(conn.sock)
        if conn.hops:
            tcp_sock.no_error_queue(conn)
        set_event(conn, TAP_SYN_ACK_SENT)
        self._table.begin_handshake(conn, now)
        self._table.outbound.add(conn, peer)
        self._ctx.flows.activate(conn)
        self._acks.first_window(conn, now)
        self._out.syn_ack(conn, conn.rcv_wscale != 0)
        conn.snd_nxt = conn.base  # the same object
        conn.t_rx = now

    def connect_failed(self, conn: TcpConn, error: int, now: float) -> None:
        """Answer a refused connection by RST, an unreachable peer by an ICMP error, a timeout not at all."""
        if error in REFUSED:
            self._out.reset(conn)
        else:
            self._errors.unreachable(conn, error, now)
        self._table.close(conn, reason_of(error))

    # A host client connects ----------------------------------------------------------------------------------------

    def accepted(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> None:
        """Ask the guest for a connection from `peer` to the port that `listener` leads to, or reset the client.

        `sock` is non-blocking, of a listener that `sock.prepare_listener` set up. Takes it over, and raises nothing.
        """
        reason = self._accept(listener, sock, peer, peer_port, now)
        if reason is not None:
            tcp_sock.turn_away(self._ctx, sock, reason, now)

    def _accept(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> Reason | None:
        """Send SYN to the guest; otherwise returns the reason, with nothing kept."""
        table = self._table
        if self._disabled:
            return Drop.TCP_DISABLED
        keys = self._keys(listener, peer, peer_port)
        if not keys:
            return Drop.TCP_INBOUND_NO_ADDRESS
        if self._ctx.guest.mac == addr.BROADCAST_MAC:
            retry = partial(self.accepted, listener, sock, peer, peer_port)
            give_up = partial(tcp_sock.turn_away, self._ctx, sock, Drop.TCP_INBOUND_NO_GUEST)
            held = self._ctx.neighbours.hold(keys[0][: len(keys[0]) // 2 - 2], retry, give_up, now)
            return None if held else Drop.TCP_INBOUND_NO_GUEST
        if not self._eviction.inbound(keys[0], now):
            return Drop.TCP_INBOUND_HALF_OPEN
        free = [key for key in keys if self._is_free(key)]
        taken = keys[0] not in free
        if taken and self._queue_successor(keys[0], partial(self.accepted, listener, sock, peer, peer_port)):
            return None
        if not free:
            return Drop.TCP_INBOUND_IN_USE
        conn = TcpConn(free[0])
        conn.fallback_key = free[1] if len(free) > 1 else b""
        conn.host = peer, peer_port
        set_event(conn, SOCK_ACCEPTED)
        try:
            table.add(conn, now)
        except TableFull:
            return Drop.TCP_TABLE_FULL
        conn.near = tcp_sock.is_near(self._ctx.fwd, self._features, peer)
        conn.fd = sock.fileno()
        try:
            self._ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST)
            self._syn(conn, now)
        except OSError as e:
            log.warn_ratelimited("tcp socket", f"Cannot forward a TCP connection: {e.strerror}", now)
            table.release(conn, "no descriptor")
            return Drop.TCP_INBOUND_NO_DESCRIPTOR
        conn.sock = sock
        table.inbound.add(conn, to_guest(conn.key))
        return None

    def _is_free(self, key: bytes) -> bool:
        """Whether no connection has these endpoints. One that the host peer reset gives way, although its event is
        still to come.
        """
        conn = self._table.by_key.get(key)
        if conn is not None and not conn.events & SOCK_FIN_SENT and tcpinfo.is_closed(conn.sock):
            self._table.reset_by_host(conn, "replaced")
            self._replaced += 1
            return True
        return conn is None

    def _queue_successor(self, key: bytes, accept: Callable[[float], None]) -> bool:
        """Call accept(now) when the connection `key` ends; False if the host's end is open, or a successor waits."""
        conn = self._table.by_key[key]
        if key in self._table.successors or not tcpinfo.is_closed(conn.sock):
            return False
        self._table.successors[key] = accept
        return True

    def _keys(self, listener: Listener, peer: bytes, peer_port: int) -> list[bytes]:
        """Endpoints between which the guest may see the connection, the first choice first."""
        peers = [peer]
        if addr.is_loopback(peer):
            peers.append(addr.LOOPBACK6 if len(peer) == 4 else addr.LOOPBACK4)
        ports = listener.to.to_bytes(2, "big") + peer_port.to_bytes(2, "big")
        fwd, guest = self._ctx.fwd, self._ctx.guest
        keys = []
        for p in peers:
            source = fwd.inbound_source(p, guest)
            target = fwd.inbound_target(source, listener.rule, guest) if source is not None else None
            if source is not None and target is not None and source != target:
                keys.append(target + source + ports)
        return keys

    def _syn(self, conn: TcpConn, now: float) -> None:
        """Start the handshake with the guest."""
        self._choose_iss(conn, now)
        conn.rcv_edge = WINDOW_DEFAULT  # the guest's sequence numbers count from 0 until SYN,ACK tells IRS
        self._out.build_header(conn)
        conn.snd_nxt = conn.base
        self._table.begin_handshake(conn, now)
        self._out.syn(conn)
        set_event(conn, TAP_SYN_SENT)

    def _in_syn_sent(self, conn: TcpConn, offset: int, data: int, numbers: tuple[int, ...], now: float) -> bool:
        """Handle a segment in SYN-SENT, as in the table above; returns whether the connection is established."""
        seq, ack, bits, _ = numbers
        ours = bits & ACK and ack == conn.snd_nxt & MASK
        if bits & RST:
            if ours:
                self._refused(conn, "refused by guest", now)
            else:
                self._ctx.drops[Drop.TCP_RESET_OUT_OF_WINDOW] += 1
        elif ours and bits & SYN:
            try:
                options = tcp.syn_options(self._pool.copy(offset + 20, data))
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
                return False
            apply_syn_options(conn, options)
            self._out.limit_mss(conn)
            conn.irs = seq
            conn.rcv_nxt = conn.rcv_acked = seq + 1
            conn.rcv_wnd_max, conn.rcv_wnd_low = WINDOW_DEFAULT, _WINDOW_LOW
            conn.rcv_edge = conn.rcv_nxt + WINDOW_DEFAULT
            conn.t_rx = now
            self._table.inbound.discard(conn)
            self._established(conn, numbers, now)
            self._ctx.flows.activate(conn)
            return True
        elif bits & ACK and not ours:
            self._out.refuse(conn.key, seq, ack, bits, 0)
            if not conn.retries:
                conn.retries = 1
                self.retransmit_syn(conn)
                self._table.schedule(conn, now)
        return False

    def _refused(self, conn: TcpConn, why: str, now: float) -> None:
        """The guest has no server at this address: try the other family."""
        if not conn.fallback_key or conn.fallback_key in self._table.by_key:
            self._table.reset_by_guest(conn, why)
            return
        self._table.rekey(conn, conn.fallback_key)
        conn.fallback_key = b""
        if log.debug_on:
            log.debug(f"Flow {conn.index} (TCP connection): refused, now {conn.endpoints()}")
        self._syn(conn, now)
