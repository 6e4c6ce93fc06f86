"""One TCP connection: its record, its events, its pre-cooked header, and the pure functions that derive from them.

Everything that changes the events of a connection is `set_event` in this file, which also logs the transition.

Events (a bit set, not a state: both directions of both sides progress on their own)
====================================================================================

    TAP_SYN_RCVD        the guest sent SYN; the host socket connects
    TAP_SYN_ACK_SENT    the host socket is connected; SYN,ACK went to the guest
    SOCK_ACCEPTED       a host client connected
    TAP_SYN_SENT        SYN went to the guest
    ESTABLISHED         the guest acknowledged: data flows
      SOCK_FIN_RCVD       the host peer ended its direction (EPOLLRDHUP)
      TAP_FIN_SENT        ... everything before it was sent to the guest, and FIN
      TAP_FIN_ACKED       ... and the guest acknowledged it: this direction is done
      TAP_FIN_RCVD        the guest ended its direction, and the host socket took everything before it
      SOCK_FIN_SENT       ... shutdown(SHUT_WR) told the host peer: this direction is done

A connection begins with the first two or the next two. The indented ones come after ESTABLISHED, but for SOCK_FIN_RCVD:
a host client need not wait for the guest. A connection ends when TAP_FIN_ACKED and TAP_FIN_RCVD meet, and
the guest's FIN is acknowledged (`window.py`).

Sequence variables, named as in RFC 9293, 3.3.1, from our side of the link to the guest
=======================================================================================

They are Python integers that start in 32 bits and never wrap; they are masked when they are written to a header.

    snd_una    oldest byte sent to the guest that it has not acknowledged
    snd_nxt    next byte to send to the guest
    snd_wnd    bytes after snd_una that the guest is ready to take
    snd_wnd_max  the largest that snd_wnd has been (MAX.SND.WND)
    base       sequence number of the first byte that still lies in the socket: base <= snd_una
    rewound    snd_nxt before it was set back to snd_una: the guest may have got that far, and may say so at any time
    recover    snd_nxt when a retransmission began (RFC 6582); acknowledgements below it are partial
    rcv_nxt    next byte expected from the guest: everything before it is in the host socket
    rcv_acked  what the next segment to the guest acknowledges (`ack_due`: none has said so yet)
    rcv_edge   right edge of the window promised to the guest; it never moves left
"""

from __future__ import annotations

from struct import Struct

from .. import addr, log
from ..flow.table import GUEST, HOST, Endpoints, Flow, FlowInfo, TcpInfo
from ..link.tap_device import F_NEEDS_CSUM, GSO_NONE, VNET
from ..linux import tcpinfo
from ..policy.resolvers import Tried
from ..wire import tcp
from ..wire.checksum import PROTO_TCP, fold, ones_sum, pseudo_sum

TAP_SYN_RCVD = 1 << 0
TAP_SYN_ACK_SENT = 1 << 1
SOCK_ACCEPTED = 1 << 2
TAP_SYN_SENT = 1 << 3
ESTABLISHED = 1 << 4
SOCK_FIN_RCVD = 1 << 5
TAP_FIN_SENT = 1 << 6
TAP_FIN_ACKED = 1 << 7
TAP_FIN_RCVD = 1 << 8
SOCK_FIN_SENT = 1 << 9
EVENT_NAMES = (
    "TAP_SYN_RCVD", "TAP_SYN_ACK_SENT", "SOCK_ACCEPTED", "TAP_SYN_SENT", "ESTABLISHED",
    "SOCK_FIN_RCVD", "TAP_FIN_SENT", "TAP_FIN_ACKED", "TAP_FIN_RCVD", "SOCK_FIN_SENT",
)  # fmt: skip
CLOSED = TAP_FIN_ACKED | TAP_FIN_RCVD

SYN_TIMEOUT = 10.0  # s, from SYN or SYN,ACK to the guest until the connection is given up
SYN_RETRIES = 3  # of them, after 1, 2 and 4 s
RTO_INIT = 1.0  # s, RFC 6298, 2.1; the link's round trip is microseconds, so this only ever meets a loss
RTO_MAX = 60.0  # s, RFC 6298, 2.5
RETRIES_MAX = 7  # doubling from 1 s: about two minutes without any acknowledgement
SUCCESSOR_RETRIES = 1  # where a client waits to use the endpoints again: 3 s
PROBE_INIT = 0.2  # s, zero-window probes (RFC 9293, 3.8.6.1), doubling up to RTO_MAX, without end
KEEPALIVE_IDLE = 7200.0  # s, RFC 9293, 3.8.4: no less than two hours
KEEPALIVE_INTERVAL = 75.0  # s, between probes once the guest was idle for so long
WINDOW_MAX = 1 << 24  # bytes
WS_OFFERED = 8  # 65535 << 8 is WINDOW_MAX
WINDOW_DEFAULT = 114 << WS_OFFERED  # bytes promised with SYN: twice the initial window of RFC 6928, any socket takes it

_IP4 = Struct("!BBHHHBBH4s4s")
_IP6 = Struct("!IHBB16s16s")
_ETH = Struct("!6s6sH")
L2 = VNET.size  # offset of the Ethernet header in a pre-cooked frame
L3 = L2 + _ETH.size
TTL = 255
NEVER = float("inf")


class TcpConn(Flow):
    """A connection. Created by `tcp.Tcp`; `hdr` is built by `cook`."""

    __slots__ = (
        "ack_due",  # data from the guest waits for its acknowledgement to ride on an answer
        "base",
        "chunk",  # most payload bytes in one frame to the guest, a multiple of the MSS
        "deadline",  # time.monotonic() at which `Tcp.timer_handler` has something to do
        "drained",  # a peek came back short: nothing to read until the socket says so
        "eager",  # much was dropped from the socket last time: what is left may pin a large buffer, drop it at once
        "early",  # pieces of data behind a hole (`out_of_order.py`)
        "events",
        "fin_rewound",  # FIN is what is before `rewound`
        "gso",  # whether `hdr` has segmentation fields set
        "hdr",  # pre-cooked frame: vnet, Ethernet, IP, TCP headers
        "host",  # address and port that the host socket is connected to
        "ip_sum",  # folded sum of the IPv4 header without total length and checksum
        "isn",  # our initial sequence number
        "isn_tap",  # the guest's
        "keepalive",  # the guest probes this connection, and so does the host socket
        "l4",  # offset of the TCP header in `hdr`
        "lazy",  # acknowledgements since anything was dropped from the socket
        "lost",  # payload of the guest that the socket did not take was dropped: ask for it when there is room
        "low",  # the send buffer is nearly full: EPOLLOUT will say when it is not
        "mss",  # the guest's
        "near",  # the host peer is so close that an acknowledgement need not wait for it
        "other",  # key to go on with when the guest refuses a host client's connection, or b""
        "pingpong",  # how often an answer followed within the delay of an acknowledgement (0..PINGPONG_MAX)
        "poll",  # s until TCP_INFO is looked at for acknowledgements of the host peer; 0: it never was
        "queued",  # the timer of delayed acknowledgements will look at this connection
        "rcv_acked",
        "rcv_edge",
        "rcv_low",  # a window smaller than this is computed again
        "rcv_max",  # largest window that the guest has seen
        "rcv_nxt",
        "recover",
        "resent",  # retransmissions to the guest
        "retries",
        "rewound",  # what snd_nxt was before everything after snd_una was forgotten; less than that, or 0: nothing was
        "snd_nxt",
        "snd_una",
        "snd_wnd",
        "snd_wnd_max",
        "t_rx",  # when data of the guest last came
        "tcp_sum",  # folded sum of the pseudo-header without length
        "timer",  # descriptor from the timer pool, or -1
        "tried",  # while it is opened towards a resolver: those that were, in this order
        "urgent",  # urgent data was seen: a short peek may be cut at its mark
        "ws_from",  # guest's window scale
        "ws_to",  # ours
    )
    kind = "TCP connection"
    label = "tcp"

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.events = 0
        self.host: tuple[bytes, int] = b"", 0
        self.other = b""
        self.tried: Tried = ()
        self.early: tuple[tuple[int, memoryview, int], ...] = ()
        self.hdr = bytearray()
        self.l4 = self.ip_sum = self.tcp_sum = 0
        self.mss = tcp.MSS_DEFAULT
        self.chunk = self.ws_from = self.ws_to = 0
        self.isn = self.isn_tap = self.rcv_nxt = self.rcv_acked = self.rcv_edge = self.rcv_low = self.rcv_max = 0
        self.snd_una = self.snd_nxt = self.snd_wnd = self.snd_wnd_max = self.base = self.recover = self.rewound = 0
        self.gso = self.near = self.low = self.lost = self.ack_due = False
        self.queued = self.urgent = self.eager = self.keepalive = self.fin_rewound = False
        self.drained = True
        self.pingpong = self.retries = self.lazy = self.resent = 0
        self.timer = -1
        self.deadline = self.t_rx = self.poll = 0.0

    def endpoints(self) -> Endpoints:
        n = (len(self.key) - 4) // 2
        ports = self.key[2 * n :]
        guest = addr.host_port(self.key[:n], int.from_bytes(ports[:2], "big"))
        peer = addr.host_port(self.key[n : 2 * n], int.from_bytes(ports[2:], "big"))
        began = HOST if self.events & SOCK_ACCEPTED else GUEST
        return Endpoints(began, guest, peer, addr.host_port(*self.host) if self.host[0] else "")

    def traffic(self) -> tuple[int, int]:
        """What the guest has acknowledged, and what the host socket has taken: both are in the sequence numbers."""
        to_guest = self.snd_una - self.isn - 1 - (1 if self.events & TAP_FIN_ACKED else 0)
        to_host = self.rcv_nxt - self.isn_tap - 1 - (1 if self.events & TAP_FIN_RCVD else 0)
        return max(to_guest, 0), max(to_host, 0)

    def info(self, now: float) -> FlowInfo:
        events, age = self.events, now - self.opened
        to_guest, to_host = traffic = self.traffic()
        details = tcpinfo.details(self.sock) if self.sock is not None else None
        waiting = unacked = None
        if details is not None and details.received is not None and details.acked is not None:
            waiting = max(details.received - (1 if events & SOCK_FIN_RCVD else 0) - to_guest, 0)
            unacked = max(to_host - details.acked + (0 if events & SOCK_ACCEPTED else 1), 0)
        tcp_info = TcpInfo(
            rtt=details.rtt if details else None,
            snd_wnd=self.snd_wnd,
            rcv_wnd=max(self.rcv_edge - self.rcv_nxt, 0),
            resent_to_guest=self.resent,
            resent_to_host=details.retransmits if details else None,
            queue_to_guest=waiting,
            queue_to_host=unacked,
        )
        # Before a connection is there, the kernel counts the time from its own start.
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
    """Seconds until something must be done if nothing happens (the table in `tcp.py`); inf: nothing."""
    events = conn.events
    if events == TAP_SYN_RCVD:
        return NEVER  # the host's connect() has its own time-out
    if not events & ESTABLISHED:
        waited = RTO_INIT * ((1 << conn.retries) - 1)
        return min(RTO_INIT + waited, SYN_TIMEOUT - waited)
    if conn.snd_nxt != conn.snd_una:
        return min(RTO_INIT * (1 << conn.retries), RTO_MAX)
    if not conn.snd_wnd and not conn.drained:
        return min(PROBE_INIT * (1 << min(conn.retries, 10)), RTO_MAX)
    return KEEPALIVE_INTERVAL if conn.retries else KEEPALIVE_IDLE


def cook(conn: TcpConn, guest_mac: bytes, our_mac: bytes, mtu: int, *, tso: bool) -> None:
    """Build the pre-cooked header of a connection from its key: what does not change is written here, once.

        0        10         24            44|64       64|84
        | vnet   | Ethernet | IPv4|IPv6   | TCP       |

    IPv4: TTL 255, id 0, DF clear. IPv6: a flow label of 20 bits from the flow's index, never 0 (RFC 6437, 3).
    The MSS must be known. `mtu` 0: unknown, the guest's MSS alone limits a segment.
    """
    v4 = len(conn.key) == 12
    n = 4 if v4 else 16
    guest, peer, ports = conn.key[:n], conn.key[n : 2 * n], conn.key[2 * n :]
    conn.l4 = L3 + (20 if v4 else 40)
    hdr = conn.hdr = bytearray(conn.l4 + tcp.HEADER_LEN)
    _ETH.pack_into(hdr, L2, guest_mac, our_mac, 0x0800 if v4 else 0x86DD)
    if v4:
        _IP4.pack_into(hdr, L3, 0x45, 0, 0, 0, 0, TTL, PROTO_TCP, 0, peer, guest)
        conn.ip_sum = ones_sum(hdr[L3 : conn.l4])
    else:
        label = conn.index + 1 & 0xFFFFF or 1
        _IP6.pack_into(hdr, L3, 6 << 28 | label, 0, PROTO_TCP, TTL, peer, guest)
    hdr[conn.l4 : conn.l4 + 4] = ports[2:] + ports[:2]
    conn.tcp_sum = fold(pseudo_sum(peer, guest, PROTO_TCP, 0))
    fit(conn, mtu, tso=tso)
    set_segmentation(conn, gso_type=GSO_NONE)


def fit(conn: TcpConn, mtu: int, *, tso: bool) -> None:
    """Limit the guest's MSS, as it told it, to what a frame can carry, and derive the longest frame from it."""
    v4 = conn.l4 == L3 + 20
    overhead = conn.l4 - L3 + tcp.HEADER_LEN
    if mtu:
        conn.mss = min(conn.mss, mtu - overhead)
    longest = 65535 - (overhead if v4 else tcp.HEADER_LEN)  # IPv4's total length counts its header, IPv6's does not
    conn.mss = min(conn.mss, longest)
    conn.chunk = longest // conn.mss * conn.mss if tso else conn.mss


def set_segmentation(conn: TcpConn, gso_type: int) -> None:
    """Write the vnet header: the kernel completes the checksum; with a `gso_type`, it also cuts at the MSS."""
    conn.gso = gso_type != GSO_NONE
    hdr_len, gso_size = (conn.l4 - L2 + tcp.HEADER_LEN, conn.mss) if conn.gso else (0, 0)
    VNET.pack_into(conn.hdr, 0, F_NEEDS_CSUM, gso_type, hdr_len, gso_size, conn.l4 - L2, 16)
