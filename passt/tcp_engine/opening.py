"""Opening of TCP connections, from either side: everything before ESTABLISHED.

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

The kernel has accepted a host client before the guest is asked, so the client believes that it is connected. What it
sends waits in its socket; if the guest refuses or does not answer, it is reset.

A guest's connection is refused by RST, and counted, when there is no room for it: OPENING_MAX of its own are not
established yet, or one in OPENING_SHARE of descriptors ("tcp: too many half open"; the host's kernel may try for two
minutes to connect); the table of flows is full ("flow table full"); no descriptor or no memory is left ("tcp socket").

    host client's connection                                                     counted as
    ---------------------------------------------------------------------------  -------------------------------
    TCP is off                                                                   tcp disabled
    HALF_OPEN_MAX wait for the guest, or one in HALF_OPEN_SHARE of descriptors   tcp inbound: too many half open
    nobody is connected to us, or has not shown its MAC address yet              tcp inbound: no guest
    no address of the guest, or none that it could answer to                     tcp inbound: no address
    the guest has a connection between the same endpoints, that is not over      tcp inbound: endpoints in use
    for the host (see below)
    the table of flows is full                                                   flow table full
    no descriptor for its timer                                                  tcp inbound: no descriptor

Whoever is on the host's loopback is seen by the guest under another address anyway, so its address family does not
matter: when the guest refuses one, the other is tried before the client is reset. A server that listens on IPv4 only
is found by a client that resolved `localhost` to ::1, and the other way round.

A client may come back from the same port at once, as soon as its kernel and ours agree that the former connection is
over (RFC 9293, 3.6.1; RFC 6191). The guest may not know yet: the last bytes and FIN are on their way to it. The new
connection waits until the guest has acknowledged those, and SYN follows. A guest that leaves them unacknowledged for
SUCCESSOR_RETRIES retransmissions is sent RST instead. A former connection that was reset makes room at once.

Answers to our SYN (RFC 9293, 3.10.7.3)

    segment                              answer
    -----------------------------------  -----------------------------------------------------------------------------
    SYN,ACK of our SYN                   ACK, on which data of the client may ride
    RST,ACK of our SYN                   other family, or RST to the client
    ACK of something else                RST; and SYN again at once, since what was in its way may be gone
    RST that acknowledges nothing of us  ignored: anybody could have sent it
    SYN alone: both connect at once      nothing: the guest answers our SYN by SYN,ACK, as we would its
    anything else                        nothing: SYN,ACK comes first, or again

Of several resolvers (`policy/resolvers.py`) that one address of the guest's stands for, the next one is tried when
connecting to one fails, before the guest hears anything.

SYN and SYN,ACK are repeated after 1, 2, 4 s; after 10 s both sides are reset.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any

from .. import addr, log
from ..flow.context import Context
from ..flow.idle import flow_limit
from ..flow.siphash import siphash24
from ..flow.table import TableFull, reason_of
from ..linux import tcpinfo
from ..loop.reactor import TYPE_TCP
from ..policy.config import Config
from ..policy.rules import Listener
from ..wire import tcp
from ..wire.cursor import Malformed
from ..wire.tcp import ACK, FIN, RST, SEQ_TO_WINDOW, SYN
from . import sock as tcp_sock
from .conn import (
    ESTABLISHED,
    SOCK_ACCEPTED,
    SOCK_FIN_SENT,
    TAP_SYN_ACK_SENT,
    TAP_SYN_RCVD,
    TAP_SYN_SENT,
    WINDOW_DEFAULT,
    WS_OFFERED,
    TcpConn,
    set_event,
)
from .output import TcpOut
from .sock import INTEREST
from .table import TcpTable
from .window import TcpAck

HALF_OPEN_MAX = 4096  # connections of host clients that wait for the guest
HALF_OPEN_SHARE = 8
OPENING_MAX = 8192  # connections of the guest on their way to being established
OPENING_SHARE = 4
REFUSED = frozenset((errno.ECONNREFUSED, errno.ECONNRESET))

_MASK = 0xFFFFFFFF


class TcpOpen:
    """The handshakes of both directions."""

    def __init__(self, ctx: Context, features: tcpinfo.Features, out: TcpOut, acks: TcpAck, table: TcpTable) -> None:
        self._ctx = ctx
        self._pool = ctx.pool
        self._features = features
        self._out = out
        self._acks = acks
        self._table = table
        self._secret = os.urandom(16)  # RFC 6528: new at each start
        self._replaced = 0  # connections whose client came back
        self.half_open_max = flow_limit(HALF_OPEN_MAX, HALF_OPEN_SHARE)
        self.opening_max = flow_limit(OPENING_MAX, OPENING_SHARE)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._disabled = config.no_tcp

    def segments(self, conn: TcpConn | None, key: bytes, segments: list[int], now: float) -> TcpConn | None:
        """Handle segments before ESTABLISHED.

        Returns the connection when it has become that, with what is left to handle in `segments`.
        """
        if self._disabled:
            self._ctx.drops["tcp disabled"] += len(segments) // 2
            return None
        for i in range(0, len(segments), 2):
            offset, end = segments[i], segments[i + 1]
            numbers = seq, ack, bits, _ = SEQ_TO_WINDOW.unpack_from(self._pool.buf, offset + 4)
            data = offset + (bits >> 10 & 0x3C)
            if data > end or data < offset + 20:
                self._ctx.drops["tcp header length"] += 1
                continue
            if conn is not None and conn.events & TAP_SYN_SENT:
                if self._answered(conn, offset, data, numbers, now):
                    del segments[: i + 2]
                    return conn
                conn = self._table.by_key.get(key)  # gone, or it went on to the other family
                continue
            flags = bits & (SYN | RST | ACK)
            if conn is not None and flags == SYN and seq != conn.isn_tap:
                self._table.abort(conn, "replaced")  # the guest gave up the old attempt and reuses the port
                conn = None
            if conn is None:
                conn = self._no_connection(key, offset, data, end, now)
            elif flags == SYN:
                if conn.events & TAP_SYN_ACK_SENT:
                    self.again(conn)
            elif bits & RST:
                self._table.reset_by_guest(conn)
                return None
            elif flags == ACK and conn.events & TAP_SYN_ACK_SENT and ack == conn.snd_nxt & _MASK:
                self._table.opening -= 1
                self._established(conn, numbers)
                del segments[:i]  # the ACK may carry data
                return conn
            elif flags == ACK:
                self._out.refuse(key, seq, ack, bits, 0)
        return None

    def _no_connection(self, key: bytes, offset: int, data: int, end: int, now: float) -> TcpConn | None:
        """A segment of no connection: SYN opens one, anything but RST is answered by RST."""
        seq, ack, bits, win = self._pool.unpack(SEQ_TO_WINDOW, offset + 4, end)
        if bits & RST:
            return None
        if bits & (SYN | ACK) == SYN:
            n = (len(key) - 4) // 2
            ends = key[:n], key[n : 2 * n]
            if not all(map(_may_connect, ends)) or not any(key[2 * n : 2 * n + 2]) or not any(key[2 * n + 2 :]):
                self._ctx.drops["tcp endpoint"] += 1
                return None
            try:
                options = tcp.SynOptions.parse(self._pool.copy(offset + 20, data))
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
                return None
            return self._open(key, seq, win, options, now)
        length = end - data + (1 if bits & SYN else 0) + (1 if bits & FIN else 0)
        self._out.refuse(key, seq, ack, bits, length)
        return None

    def again(self, conn: TcpConn) -> None:
        """SYN or SYN,ACK was lost, or may have been."""
        conn.resent += 1
        if conn.events & TAP_SYN_SENT:
            self._out.syn(conn)
        else:
            self._out.syn_ack(conn, conn.ws_to != 0)

    def isn(self, key: bytes, now: float) -> int:
        """Our initial sequence number, RFC 6528: a keyed hash of the endpoints plus a clock of 4 us.

        A connection may be replaced in the turn in which it began, at the same time: so that an answer to the first
        SYN does not look like one to the second, each replacement is a tick of the clock, too.
        """
        h = siphash24(self._secret, key)
        return ((h >> 32 ^ h) + int(now * 250_000) + self._replaced) & _MASK

    def _number(self, conn: TcpConn, now: float) -> None:
        """Choose where our sequence begins: nothing is sent yet, and the first byte comes after SYN."""
        conn.isn = conn.snd_una = conn.snd_nxt = self.isn(conn.key, now)
        conn.base = conn.snd_una + 1

    def _established(self, conn: TcpConn, numbers: tuple[int, ...]) -> None:
        """The guest acknowledged our SYN. A window in a SYN is not scaled (RFC 7323, 2.2)."""
        _, _, bits, win = numbers
        conn.snd_una = conn.snd_nxt
        conn.snd_wnd = conn.snd_wnd_max = win if bits & SYN else win << conn.ws_from
        conn.retries = 0
        set_event(conn, ESTABLISHED)

    # The guest connects --------------------------------------------------------------------------------------------

    def _open(self, key: bytes, isn: int, window: int, options: tcp.SynOptions, now: float) -> TcpConn | None:
        """The guest connects: so do we, on the host."""
        if self._table.opening >= self.opening_max:
            self._no_room(key, isn, "tcp: too many half open")
            return None
        conn = TcpConn(key)
        conn.isn_tap = isn
        conn.rcv_nxt = conn.rcv_acked = conn.rcv_edge = isn + 1
        _agree(conn, options)
        conn.snd_wnd = window
        tcp_sock.aim(self._ctx, conn, now)
        try:
            self._table.add(conn)
        except TableFull:
            self._no_room(key, isn, "flow table full")
            return None
        self._number(conn, now)
        self._out.cook(conn)
        set_event(conn, TAP_SYN_RCVD)
        self._table.opening += 1
        try:
            error = tcp_sock.connect(self._ctx, self._features, conn)
        except OSError as e:  # no descriptor, no memory: ours to answer for, so RST
            self._no_socket(conn, e, now)
            return None
        if error != errno.EINPROGRESS:
            self.connected(conn, error, now)
        return conn if conn.sock is not None else None

    def _no_room(self, key: bytes, isn: int, why: str) -> None:
        """Refuse the guest's connection."""
        self._ctx.drops[why] += 1
        self._out.refuse(key, isn, 0, SYN, 1)

    def _no_socket(self, conn: TcpConn, e: OSError, now: float) -> None:
        """Likewise, one that has its place already."""
        log.warn_ratelimited("tcp socket", f"Cannot open a TCP socket: {e.strerror}", now)
        self._no_room(conn.key, conn.isn_tap, "tcp socket")
        self._table.reset_by_guest(conn, "no socket")

    def connected(self, conn: TcpConn, error: int, now: float) -> None:
        """The host socket is connected, or `error` says why it is not: tell the guest."""
        if error and conn.tried:
            error = tcp_sock.connect_next(self._ctx, self._features, conn, error, now)
            if error == errno.EINPROGRESS:
                return
        if error:
            self.connect_failed(conn, error, now)
            return
        if conn.tried:
            self._ctx.resolvers.answered(conn.tried[-1], now)
            conn.tried = ()
            tcp_sock.be_patient(conn.sock)
        set_event(conn, TAP_SYN_ACK_SENT)
        try:
            self._table.schedule(conn, now)  # which may take a descriptor, the last one of a connection
        except OSError as e:
            self._no_socket(conn, e, now)
            return
        self._ctx.flows.activate(conn)
        self._acks.open_window(conn, now)
        self._out.syn_ack(conn, conn.ws_to != 0)
        conn.snd_nxt = conn.snd_una + 1
        conn.t_rx = now

    def connect_failed(self, conn: TcpConn, error: int, now: float) -> None:
        """RST for a refused connection, an ICMP error for an unreachable peer; a time-out stays one."""
        if error in REFUSED:
            self._out.reset(conn)
        elif error != errno.ETIMEDOUT:
            self._out.unreachable(conn, error, now)
        self._table.close(conn, reason_of(error))

    # A host client connects ----------------------------------------------------------------------------------------

    def accepted(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> None:
        """Ask the guest for a connection from `peer` to the port that `listener` leads to, or reset the client.

        `sock` is ours from here on, non-blocking; the listener was prepared by `sock.prepare_listener`. Raises nothing.
        """
        reason = self._accept(listener, sock, peer, peer_port, now)
        if reason:
            self._ctx.drops[reason] += 1
            tcp_sock.reset_on_close(sock)
            self._ctx.reactor.retire(sock.fileno(), sock)

    def _accept(self, listener: Listener, sock: Any, peer: bytes, peer_port: int, now: float) -> str:
        """Send SYN to the guest; returns why not, if so, with nothing kept."""
        table = self._table
        if self._disabled:
            return "tcp disabled"
        if self._ctx.guest.mac == addr.BROADCAST_MAC:
            return "tcp inbound: no guest"  # or it is still booting: rather a refusal than 10 s of silence
        if table.half_open + len(table.successors) >= self.half_open_max:
            log.warn_ratelimited("half open", f"The guest leaves {table.half_open} connections unanswered", now)
            return "tcp inbound: too many half open"
        keys = self._keys(listener, peer, peer_port)
        if not keys:
            return "tcp inbound: no address"
        free = [key for key in keys if self._is_free(key)]
        if keys[0] not in free and self._wait(keys[0], partial(self.accepted, listener, sock, peer, peer_port)):
            return ""
        if not free:
            return "tcp inbound: endpoints in use"
        conn = TcpConn(free[0])
        conn.other = free[1] if len(free) > 1 else b""
        conn.host = peer, peer_port
        set_event(conn, SOCK_ACCEPTED)
        try:
            table.add(conn)
        except TableFull:
            return "flow table full"
        conn.near = tcp_sock.is_near(self._ctx.fwd, self._features, peer)
        conn.fd = sock.fileno()
        table.half_open += 1
        try:
            self._ctx.reactor.watch(conn.fd, TYPE_TCP, conn.index, INTEREST)
            self._syn(conn, now)
        except OSError as e:
            log.warn_ratelimited("tcp socket", f"Cannot forward a TCP connection: {e.strerror}", now)
            table.release(conn, "no descriptor")
            return "tcp inbound: no descriptor"
        conn.sock = sock
        return ""

    def _is_free(self, key: bytes) -> bool:
        """Whether there is no connection between these endpoints; one that was reset gives way, although we have not
        heard of its end yet.
        """
        conn = self._table.by_key.get(key)
        if conn is not None and not conn.events & SOCK_FIN_SENT and tcpinfo.is_closed(conn.sock):
            self._table.reset_by_host(conn, "replaced")
            self._replaced += 1
            return True
        return conn is None

    def _wait(self, key: bytes, accept: Callable[[float], None]) -> bool:
        """Call accept(now) when the connection `key` ends; False if that is not over for the host, or awaited."""
        conn = self._table.by_key[key]
        if key in self._table.successors or not tcpinfo.is_closed(conn.sock):
            return False
        self._table.successors[key] = accept
        return True

    def _keys(self, listener: Listener, peer: bytes, peer_port: int) -> list[bytes]:
        """Between which endpoints the guest may see the connection: first choice first, none if it cannot."""
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
        """Begin the handshake with the guest. Raises OSError, with nothing sent."""
        self._number(conn, now)
        conn.rcv_edge = WINDOW_DEFAULT  # the numbers of the guest begin at 0 until it tells
        self._out.cook(conn)
        conn.snd_nxt += 1
        conn.retries = 0
        self._table.schedule(conn, now)
        self._out.syn(conn)
        set_event(conn, TAP_SYN_SENT)

    def _answered(self, conn: TcpConn, offset: int, data: int, numbers: tuple[int, ...], now: float) -> bool:
        """A segment after our SYN, as in the table above; returns whether the connection is established."""
        seq, ack, bits, _ = numbers
        ours = bits & ACK and ack == conn.snd_nxt & _MASK
        if bits & RST:
            if ours:
                self._refused(conn, now)
            else:
                self._ctx.drops["tcp reset out of window"] += 1
        elif ours and bits & SYN:
            try:
                options = tcp.SynOptions.parse(self._pool.copy(offset + 20, data))
            except Malformed as e:
                self._ctx.drops[e.reason] += 1
                return False
            _agree(conn, options)
            self._out.fit(conn)
            conn.isn_tap = seq
            conn.rcv_nxt = conn.rcv_acked = seq + 1
            conn.rcv_max, conn.rcv_low = WINDOW_DEFAULT, WINDOW_DEFAULT // 2
            conn.rcv_edge = conn.rcv_nxt + WINDOW_DEFAULT
            conn.t_rx = now
            self._table.half_open -= 1
            self._established(conn, numbers)
            self._ctx.flows.activate(conn)
            return True
        elif bits & ACK and not ours:
            self._out.refuse(conn.key, seq, ack, bits, 0)
            if not conn.retries:
                conn.retries = 1
                self.again(conn)
                self._table.schedule(conn, now)
        return False

    def _refused(self, conn: TcpConn, now: float) -> None:
        """The guest has no server there; of the other family, perhaps."""
        if not conn.other or conn.other in self._table.by_key:
            self._table.reset_by_guest(conn, "refused by guest")
            return
        self._table.rekey(conn, conn.other)
        conn.other = b""
        if log.debug_on:
            log.debug(f"Flow {conn.index} (TCP connection): refused, now {conn.endpoints()}")
        self._syn(conn, now)


def _agree(conn: TcpConn, options: tcp.SynOptions) -> None:
    """Take over what the guest's SYN says: its MSS, and whether windows are scaled."""
    default = tcp.MSS_DEFAULT if len(conn.key) == 12 else tcp.MSS_DEFAULT6
    conn.mss = max(options.mss or default, tcp.MSS_MIN)
    if options.ws is not None:
        conn.ws_from, conn.ws_to = options.ws, WS_OFFERED


def _may_connect(a: bytes) -> bool:
    """Whether `a` may be an end of a connection on the link to the guest."""
    return addr.is_unicast(a) and not addr.is_martian(a)
