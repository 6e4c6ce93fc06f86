"""One TCP connection: its record, its events, its pre-cooked header, and the pure functions that derive from them.

`set_event` is the only writer of a connection's events; it also logs each transition.

Events (a bit set, not a state: both directions of both sides progress on their own)
====================================================================================

    TAP_SYN_RCVD        the guest sent SYN; the host socket connects
    TAP_SYN_ACK_SENT    the host socket is connected; SYN,ACK went to the guest
    SOCK_ACCEPTED       a host client connected
    TAP_SYN_SENT        SYN went to the guest
    ESTABLISHED         the guest acknowledged SYN or SYN,ACK: data flows
      SOCK_FIN_RCVD       the host peer sent FIN (EPOLLRDHUP)
      TAP_FIN_SENT        ... all data before it went to the guest, and FIN
      TAP_FIN_ACKED       ... and the guest acknowledged FIN: this direction is done
      TAP_FIN_RCVD        the guest sent FIN, and the host socket took all data before it
      SOCK_FIN_SENT       ... shutdown(SHUT_WR) sent FIN to the host peer: this direction is done
    SOCK_FAILED         the host socket has failed; what it holds still goes to the guest

A connection of the guest begins with the first two events, a host client's with the next two. The indented events
follow ESTABLISHED, except for SOCK_FIN_RCVD: a host client may send FIN before the guest has answered. SOCK_FAILED
comes at any time after the host's socket is connected. A connection ends when it has TAP_FIN_ACKED and TAP_FIN_RCVD,
and the guest's FIN is acknowledged (`window.py`).

Sequence variables, seen from our end of the link to the guest (RFC 9293, 3.3.1; RFC 6582; kernel)
==================================================================================================

They are Python integers that start in 32 bits and never wrap. A mask is applied where they are written to a header.

    iss, irs     initial sequence numbers: ours, and the guest's
    snd_una      oldest byte sent to the guest that it has not acknowledged
    snd_nxt      next byte to send to the guest for the first time; it never moves back
    snd_wnd      bytes after snd_una that the guest is ready to take
    snd_wnd_max  the largest snd_wnd so far (MAX.SND.WND)
    base         first byte that is still in the socket: base <= snd_una
    rtt_end      end of the segment that is timed (`rtt.py`); 0: none is
    rcv_nxt      next byte expected from the guest: everything before it is in the host socket
    rcv_acked    acknowledgement number of the next segment to the guest: rcv_acked <= rcv_nxt. `ack_due`: no segment
                 has carried it yet
    rcv_edge     right edge of the window advertised to the guest; it never moves left
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import ClassVar, Final

from .. import NEVER, addr, log
from ..flow.table import GUEST, HOST, Endpoints, Flow, FlowInfo, TcpInfo
from ..linux import tcpinfo
from ..loop.timers import NO_TIMER
from ..policy.resolvers import Tried
from ..wire import ether, ip, tcp
from ..wire.checksum import PROTO_TCP, fold, ones_sum, pseudo_sum
from ..wire.virtio import F_NEEDS_CSUM, GSO_NONE, VNET
from .pieces import NO_PIECES
from .scoreboard import Scoreboard

TAP_SYN_RCVD: Final = 1 << 0
TAP_SYN_ACK_SENT: Final = 1 << 1
SOCK_ACCEPTED: Final = 1 << 2
TAP_SYN_SENT: Final = 1 << 3
ESTABLISHED: Final = 1 << 4
SOCK_FIN_RCVD: Final = 1 << 5
TAP_FIN_SENT: Final = 1 << 6
TAP_FIN_ACKED: Final = 1 << 7
TAP_FIN_RCVD: Final = 1 << 8
SOCK_FIN_SENT: Final = 1 << 9
SOCK_FAILED: Final = 1 << 10
EVENT_NAMES: Final = (
    "TAP_SYN_RCVD", "TAP_SYN_ACK_SENT", "SOCK_ACCEPTED", "TAP_SYN_SENT", "ESTABLISHED",
    "SOCK_FIN_RCVD", "TAP_FIN_SENT", "TAP_FIN_ACKED", "TAP_FIN_RCVD", "SOCK_FIN_SENT",
    "SOCK_FAILED",
)  # fmt: skip
CLOSED: Final = TAP_FIN_ACKED | TAP_FIN_RCVD

SYN_TIMEOUT: Final = 10.0  # s, from the first SYN or SYN,ACK to the guest until the handshake fails
RTO_INIT_MAX: Final = 1.0  # s, the most for the first SYN and SYN,ACK (RFC 6298, 2.1)
RTO_MAX: Final = 60.0  # s, RFC 6298, 2.5
GIVE_UP: Final = 180.0  # s without acknowledgement, from the first timeout to the end (RFC 9293, 3.8.3: R2)
SUCCESSOR_GIVE_UP: Final = 3.0  # s, likewise, where a client waits to use the endpoints again
PROBE_INIT: Final = 0.05  # s, zero-window probes (RFC 9293, 3.8.6.1), doubling up to RTO_MAX, as it answers
FAILED_PROBES: Final = 7  # zero-window probes, in 13 s: then the rest of a failed socket is given up
KEEPALIVE_IDLE: Final = 7200.0  # s, RFC 9293, 3.8.4: no less than two hours
KEEPALIVE_INTERVAL: Final = 75.0  # s, between probes once the guest has been idle for that long
WS_OFFERED: Final = 8  # 65535 << 8 is WINDOW_MAX
WINDOW_DEFAULT: Final = 114 << WS_OFFERED  # bytes, with SYN: twice RFC 6928's initial window, any socket takes it

L2: Final = VNET.size  # offset of the Ethernet header in a pre-cooked frame
L3: Final = L2 + ether.HEADER.size
L4_IPV4: Final = L3 + ip.HEADER4.size
L4_IPV6: Final = L3 + ip.HEADER6.size

NO_HOST: Final = b"", 0
_U32: Final = Struct("!I")


class Slot:
    """Connections that the wheel looks at from the time `at` on (`wheel.py`)."""

    __slots__ = ("at", "conns")

    def __init__(self, at: float) -> None:
        self.at = at
        self.conns: dict[TcpConn, None] = {}


class TcpConn(Flow):
    """A connection. `opening.py` creates it; `hdr` is built by `build_header`."""

    __slots__ = (
        "ack_due",  # an acknowledgement is delayed: the next segment to the guest carries it
        "acks_unconsumed",  # acknowledgements of the guest since bytes were last consumed from the socket
        "asked_at",  # time of a keep-alive probe of the guest that waits for the host peer (`keepalive.py`), or 0
        "base",
        "bulk",  # the last peek brought much, and the next one may as well
        "chunk",  # most payload bytes in one frame to the guest, a multiple of the MSS
        "consume_next",  # the last consumption was a large one: consume the rest, too, which may pin a large buffer
        "deadline",  # time.monotonic() at which `TcpTimer` acts
        "delack_at",  # time at which the delayed-ACK timer is going to handle this connection, 0: it is not
        "delays_acks",  # the guest has delayed an acknowledgement for longer than PTO_MIN (`rtt.py`)
        "drained",  # the last peek was short: the receive queue is empty until the socket reports an event
        "dsack",  # a segment that came twice and is to be reported, or () (`held.py`)
        "events",
        "fallback_key",  # key in the other address family, tried if the guest refuses a host client; or b""
        "gso",  # `hdr` has its segmentation fields set
        "hdr",  # pre-cooked frame: vnet, Ethernet, IP, TCP headers
        "held",  # blocks behind a hole, the latest first (`held.py`)
        "hops",  # TTL or hop limit set on the socket, 0: the system's
        "ip_sum",  # folded sum of the IPv4 header without total length and checksum
        "irs",  # the guest's
        "iss",  # our initial sequence number
        "keepalive",  # SO_KEEPALIVE is on
        "l4",  # offset of the TCP header in `hdr`
        "length",  # of the segment that the IP header in `hdr` tells of
        "look_at",  # time at which the heap of near deadlines looks at this connection, 0: it does not
        "mapped_host",  # `host` where it differs from the peer in the key; () where it does not
        "min_rtt",  # s, the least round trip to the guest
        "moved",  # of a connection from another host: where the counters of its socket begin (`_counted`), both numbers
        "mss",  # largest segment to the guest
        "near",  # acknowledgements to the guest need not wait for the host peer's (`window.py`)
        "out_of_order",  # the out-of-order queue (`out_of_order.py`)
        "pingpong",  # how often data to the guest followed data of the guest within ACK_DELAY (0..PINGPONG_MAX), or -1
        "poll_interval",  # s until TCP_INFO is read for acknowledgements of the host peer; 0: it was never read
        "probe_at",  # time of a tail loss probe that nothing has answered yet; 0; TIMED_OUT (`recovery.py`)
        "pto",  # s, from data to a probe (RFC 8985, 7.2)
        "rcv_acked",
        "rcv_edge",
        "rcv_grown",  # bytes of window beyond what the socket has room for, on a long link (`window.py`)
        "rcv_mark",  # an edge that was advertised: data beyond it comes a round trip later (`window.py`)
        "rcv_mark_at",  # when it was advertised
        "rcv_nxt",
        "rcv_refused",  # the socket refused payload of the guest, which waits in the out-of-order queue
        "rcv_rtt",  # s, the least round trip that these marks have shown
        "rcv_wnd_low",  # a window smaller than this is computed again
        "rcv_wnd_max",  # largest window that the guest has seen
        "rcv_wscale",  # window scale shift of what is advertised to the guest (RFC 7323, 2.2)
        "reorders",  # the link to the guest has delivered out of order (`scoreboard.py`)
        "resent",  # retransmissions to the guest
        "resolvers_tried",  # while the host socket connects to one of several resolvers: those tried, in this order
        "retries",  # expiries of the timer in a row, without progress
        "rto",  # s, from data to a timeout; doubled with each (RFC 6298)
        "rtt_at",  # time of the segment that is timed; before ESTABLISHED, of the first SYN or SYN,ACK to the guest
        "rtt_end",
        "rttvar",
        "sack",  # SACK is offered to the guest, or permitted by both ends
        "scoreboard",  # what is missing of the data in flight; None: nothing, as far as is known (`scoreboard.py`)
        "slot",  # of the wheel that the connection waits in, or None (`wheel.py`)
        "snd_nxt",
        "snd_una",
        "snd_wnd",
        "snd_wnd_max",
        "snd_wscale",  # window scale shift of the windows that the guest advertises
        "srtt",  # s, 0: not measured yet
        "stalled_at",  # time of the first of the expiries that `retries` counts; before ESTABLISHED, of the last one
        "t_rx",  # time of the last data from the guest
        "tcp_sum",  # folded sum of the pseudo-header without length
        "time_wait",  # the guest enters TIME-WAIT when both directions are done
        "timer",  # descriptor from the timer pool, or NO_TIMER
        "urgent",  # urgent data was seen: a peek may stop at its mark
        "wait_writable",  # the send buffer is nearly full: EPOLLOUT is awaited
    )
    kind = "TCP connection"
    label: ClassVar[str] = "tcp"

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.events = 0
        self.mapped_host: tuple[()] | tuple[bytes, int] = NO_HOST
        self.fallback_key = b""
        self.resolvers_tried: Tried = ()
        self.out_of_order = NO_PIECES
        self.held: tuple[tuple[int, int], ...] = ()
        self.dsack: tuple[int, int] | tuple[()] = ()
        self.scoreboard: Scoreboard | None = None
        self.hdr = bytearray()
        self.l4 = self.ip_sum = self.tcp_sum = self.length = 0
        self.mss = tcp.MSS_DEFAULT
        self.chunk = self.snd_wscale = self.rcv_wscale = 0
        self.iss = self.irs = self.rcv_nxt = self.rcv_acked = self.rcv_edge = self.rcv_wnd_low = self.rcv_wnd_max = 0
        self.snd_una = self.snd_nxt = self.snd_wnd = self.snd_wnd_max = self.base = self.rtt_end = 0
        self.gso = self.near = self.wait_writable = self.rcv_refused = self.ack_due = self.time_wait = False
        self.urgent = self.consume_next = self.keepalive = self.delays_acks = self.reorders = self.bulk = False
        self.drained = self.sack = True
        self.pingpong = self.retries = self.acks_unconsumed = self.resent = self.rcv_grown = self.rcv_mark = 0
        self.hops = 0
        self.rcv_mark_at, self.rcv_rtt = 0.0, NEVER
        self.timer = NO_TIMER
        self.slot: Slot | None = None
        self.moved: tuple[int, int] | None = None
        self.deadline = self.delack_at = self.t_rx = self.poll_interval = self.rtt_at = self.stalled_at = 0.0
        self.look_at = self.srtt = self.rttvar = self.min_rtt = self.rto = self.pto = self.probe_at = 0.0
        self.asked_at = 0.0

    @property
    def peer(self) -> tuple[bytes, int]:
        """The peer's address and port, as the guest sees them."""
        key = self.key
        return key[len(key) // 2 - 2 : -4], key[-2] << 8 | key[-1]

    @property
    def host(self) -> tuple[bytes, int]:
        """Address and port that the host socket is connected to. They are nearly always the peer's, and kept once."""
        return self.mapped_host or self.peer

    @host.setter
    def host(self, host: tuple[bytes, int]) -> None:
        self.mapped_host = () if host == self.peer else host

    def endpoints(self) -> Endpoints:
        n = (len(self.key) - 4) // 2
        guest = addr.host_port(self.key[:n], int.from_bytes(self.key[2 * n : 2 * n + 2], "big"))
        began = HOST if self.events & SOCK_ACCEPTED else GUEST
        host = "" if self.mapped_host == NO_HOST else addr.host_port(*self.host)
        return Endpoints(began, guest, addr.host_port(*self.peer), host)

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        if self.hdr:
            self.hdr[L2 : L2 + 12] = guest + peer

    def traffic(self) -> tuple[int, int]:
        """Bytes that the guest acknowledged, and bytes that the host socket took: the sequence numbers have both."""
        to_guest = self.snd_una - self.iss - 1 - (1 if self.events & TAP_FIN_ACKED else 0)
        to_host = self.rcv_nxt - self.irs - 1 - (1 if self.events & TAP_FIN_RCVD else 0)
        return max(to_guest, 0), max(to_host, 0)

    def _counted(self, received: int, acked: int) -> tuple[int, int]:
        """Bytes of the host peer's stream, and bytes of the guest's that it has acknowledged, by the kernel's counters.

        These count SYN and FIN as a byte each, and begin with a socket, which a connection that moved has another of.
        """
        if self.moved is not None:
            return received + self.moved[1] - self.iss - 1, acked + self.moved[0] - self.irs - 1
        received -= 1 if self.events & SOCK_FIN_RCVD else 0
        return received, acked - (0 if self.events & SOCK_ACCEPTED else 1)

    def info(self, now: float) -> FlowInfo:
        events, age = self.events, now - self.opened
        to_guest, to_host = traffic = self.traffic()
        details = tcpinfo.details(self.sock) if self.sock is not None else None
        waiting = unacked = None
        if details is not None and details.received is not None and details.acked is not None:
            received, acked = self._counted(details.received, details.acked)
            waiting, unacked = max(received - to_guest, 0), max(to_host - acked, 0)
        tcp_info = TcpInfo(
            rtt=details.rtt if details else None,
            snd_wnd=self.snd_wnd,
            rcv_wnd=max(self.rcv_edge - self.rcv_nxt, 0),
            resent_to_guest=self.resent,
            resent_to_host=details.retransmits if details else None,
            queue_to_guest=waiting,
            queue_to_host=unacked,
        )
        # Before a socket is connected, the kernel counts its idle time from boot.
        idle = min(details.idle, age) if details else None
        state = event_text(events)
        return FlowInfo(self.index, "tcp", "tap", self.endpoints(), state, *traffic, age, idle, tcp_info)


def event_text(events: int) -> str:
    """TAP_SYN_RCVD|ESTABLISHED, or "none"."""
    return "|".join(name for i, name in enumerate(EVENT_NAMES) if events >> i & 1) or "none"


def set_event(conn: TcpConn, bits: int, clear: int = 0) -> None:
    """The only writer of `conn.events`."""
    old = conn.events
    conn.events = old & ~clear | bits
    if log.trace_on and conn.events != old:
        log.trace(f"Flow {conn.index} (TCP connection): {event_text(old)} -> {event_text(conn.events)}")


def timeout(conn: TcpConn) -> float:
    """Seconds until the timer of a connection expires (the table in `tcp.py`); inf: it does not."""
    events = conn.events
    if events == TAP_SYN_RCVD:
        return NEVER  # the host's connect(2) has its own timeout
    if not events & ESTABLISHED:
        return conn.rto
    if conn.snd_nxt != conn.snd_una:
        return conn.rto if conn.retries or conn.scoreboard is not None else conn.pto
    if not conn.snd_wnd and not conn.drained:
        return min(PROBE_INIT * (1 << min(conn.retries, 11)), RTO_MAX)
    return KEEPALIVE_INTERVAL if conn.retries else KEEPALIVE_IDLE


@lru_cache(256)
def may_connect(a: bytes) -> bool:
    """Whether `a` may be an end of a connection on the link to the guest."""
    return addr.is_unicast(a) and not addr.is_martian(a)


@lru_cache(256)
def may_connect_both(addresses: bytes) -> bool:
    """The same for the guest's address and the peer's behind it."""
    n = len(addresses) // 2
    return may_connect(addresses[:n]) and may_connect(addresses[n:])


def apply_syn_options(conn: TcpConn, options: tcp.SynOptions) -> None:
    """Take the options of the guest's SYN."""
    conn.sack = options.sack
    default = tcp.MSS_DEFAULT if len(conn.key) == 12 else tcp.MSS_DEFAULT6
    conn.mss = max(options.mss or default, tcp.MSS_MIN)
    if options.ws is not None:
        conn.snd_wscale, conn.rcv_wscale = options.ws, WS_OFFERED


def build_header(conn: TcpConn, guest_mac: bytes, peer_mac: bytes, mtu: int, *, tso: bool) -> None:
    """Build the pre-cooked header of a connection from its key: every field that stays as it is gets its value here.

        0        10         24            44|64       64|84
        | vnet   | Ethernet | IPv4|IPv6   | TCP       |

    IPv4: TTL 255, id 0, DF clear. IPv6: a flow label of 20 bits from the flow's index, never 0 (RFC 6437, 3).
    The MSS must be known. With `mtu` 0, which is unknown, only the guest's MSS limits a segment.
    """
    key = conn.key
    template, l4, conn.ip_sum, conn.tcp_sum = _template(key[:-4], guest_mac, peer_mac)
    conn.l4 = l4
    hdr = conn.hdr = bytearray(template)
    conn.length = 0
    hdr[l4 : l4 + 2] = key[-2:]
    hdr[l4 + 2 : l4 + 4] = key[-4:-2]
    if l4 == L4_IPV6:
        _U32.pack_into(hdr, L3, ip.VERSION6 | (conn.index + 1 & ip.FLOW_LABEL_MASK or 1))
    conn.gso = False
    limit_mss(conn, mtu, tso=tso)


@lru_cache(256)
def _template(addresses: bytes, guest_mac: bytes, peer_mac: bytes) -> tuple[bytes, int, int, int]:
    """The header of connections between two addresses, without what differs, and without segmentation; and `l4`,
    `ip_sum` and `tcp_sum` of these connections.
    """
    v4 = len(addresses) == 8
    n = len(addresses) // 2
    guest, peer = addresses[:n], addresses[n:]
    l4 = L4_IPV4 if v4 else L4_IPV6
    hdr = bytearray(l4 + tcp.HEADER_LEN)
    VNET.pack_into(hdr, 0, F_NEEDS_CSUM, GSO_NONE, 0, 0, l4 - L2, 16)
    ether.HEADER.pack_into(hdr, L2, guest_mac, peer_mac, ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6)
    ip_sum = 0
    if v4:
        ip.HEADER4.pack_into(hdr, L3, ip.VERSION_IHL4, 0, 0, 0, 0, ip.TTL, PROTO_TCP, 0, peer, guest)
        ip_sum = ones_sum(hdr[L3:l4])
    else:
        ip.HEADER6.pack_into(hdr, L3, ip.VERSION6, 0, PROTO_TCP, ip.TTL, peer, guest)
    return bytes(hdr), l4, ip_sum, fold(pseudo_sum(peer, guest, PROTO_TCP, 0))


def limit_mss(conn: TcpConn, mtu: int, *, tso: bool) -> None:
    """Limit the MSS that the guest announced to what a frame can carry, and derive the longest frame from it."""
    conn.mss, conn.chunk = _lengths(conn.mss, conn.l4, mtu, tso)


@lru_cache(64)
def _lengths(mss: int, l4: int, mtu: int, tso: bool) -> tuple[int, int]:
    """The longest segment, and the most payload in a frame. The objects are those of other connections: own ones would
    cost each of them 64 bytes.
    """
    overhead = l4 - L3 + tcp.HEADER_LEN
    longest = 65535 - (overhead if l4 == L4_IPV4 else tcp.HEADER_LEN)  # IPv4's length counts its header
    mss = min(mss, longest, mtu - overhead if mtu else longest)
    return mss, longest // mss * mss if tso else mss


def set_segmentation(conn: TcpConn, gso_type: int) -> None:
    """Write the vnet header: the kernel completes the checksum and, with a `gso_type`, segments at the MSS."""
    conn.gso = gso_type != GSO_NONE
    hdr_len, gso_size = (conn.l4 - L2 + tcp.HEADER_LEN, conn.mss) if conn.gso else (0, 0)
    VNET.pack_into(conn.hdr, 0, F_NEEDS_CSUM, gso_type, hdr_len, gso_size, conn.l4 - L2, 16)
