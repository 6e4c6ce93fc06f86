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

A connection of the guest begins with the first two events, a host client's with the next two. The indented events
follow ESTABLISHED, except for SOCK_FIN_RCVD: a host client may send FIN before the guest has answered. A connection
ends when it has TAP_FIN_ACKED and TAP_FIN_RCVD, and the guest's FIN is acknowledged (`window.py`).

Sequence variables, seen from our end of the link to the guest (RFC 9293, 3.3.1; RFC 6582; kernel)
==================================================================================================

They are Python integers that start in 32 bits and never wrap. A mask is applied where they are written to a header.

    iss, irs     initial sequence numbers: ours, and the guest's
    snd_una      oldest byte sent to the guest that it has not acknowledged
    snd_nxt      next byte to send to the guest
    snd_max      highest snd_nxt that a retransmission timeout has set back to snd_una: the guest may acknowledge up to
                 there at any time. It is brought up to date at the next timeout only, so it may lie below snd_nxt
    snd_wnd      bytes after snd_una that the guest is ready to take
    snd_wnd_max  the largest snd_wnd so far (MAX.SND.WND)
    base         first byte that is still in the socket: base <= snd_una
    recover      snd_nxt when a fast retransmit began; acknowledgements below it are partial
    rcv_nxt      next byte expected from the guest: everything before it is in the host socket
    rcv_acked    acknowledgement number of the next segment to the guest: rcv_acked <= rcv_nxt. `ack_due`: no segment
                 has carried it yet
    rcv_edge     right edge of the window advertised to the guest; it never moves left
"""

from __future__ import annotations

from .. import NEVER, addr, log
from ..flow.table import GUEST, HOST, Endpoints, Flow, FlowInfo, TcpInfo
from ..linux import tcpinfo
from ..policy.resolvers import Tried
from ..wire import ether, ip, tcp
from ..wire.checksum import PROTO_TCP, fold, ones_sum, pseudo_sum
from ..wire.virtio import F_NEEDS_CSUM, GSO_NONE, VNET

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

SYN_TIMEOUT = 10.0  # s, from the first SYN or SYN,ACK to the guest until the handshake fails
SYN_RETRIES = 3  # retransmissions of SYN or SYN,ACK, after 1, 2 and 4 s
RTO_INIT = 1.0  # s, RFC 6298, 2.1; the link's round trip takes microseconds, so this only expires after a loss
RTO_MAX = 60.0  # s, RFC 6298, 2.5
RETRIES_MAX = 7  # retransmissions: the eighth timeout ends the connection, after three minutes without acknowledgement
SUCCESSOR_RETRIES = 1  # likewise, where a client waits to use the endpoints again: 3 s
PROBE_INIT = 0.2  # s, zero-window probes (RFC 9293, 3.8.6.1), doubling up to RTO_MAX, without end
KEEPALIVE_IDLE = 7200.0  # s, RFC 9293, 3.8.4: no less than two hours
KEEPALIVE_INTERVAL = 75.0  # s, between probes once the guest has been idle for that long
WINDOW_MAX = 1 << 24  # bytes
WS_OFFERED = 8  # 65535 << 8 is WINDOW_MAX
WINDOW_DEFAULT = 114 << WS_OFFERED  # bytes, advertised with SYN: twice RFC 6928's initial window, any socket takes it

L2 = VNET.size  # offset of the Ethernet header in a pre-cooked frame
L3 = L2 + ether.HEADER.size
L4_IPV4 = L3 + ip.HEADER4.size
L4_IPV6 = L3 + ip.HEADER6.size


class TcpConn(Flow):
    """A connection. `opening.py` creates it; `hdr` is built by `build_header`."""

    __slots__ = (
        "ack_due",  # an acknowledgement is delayed: the next segment to the guest carries it
        "acks_unconsumed",  # acknowledgements of the guest since bytes were last consumed from the socket
        "base",
        "chunk",  # most payload bytes in one frame to the guest, a multiple of the MSS
        "consume_next",  # the last consumption was a large one: consume the rest, too, which may pin a large buffer
        "deadline",  # time.monotonic() at which `Tcp.timer_handler` acts
        "delack_at",  # time at which the delayed-ACK timer is going to handle this connection, 0: it is not
        "drained",  # the last peek was short: the receive queue is empty until the socket reports an event
        "events",
        "fallback_key",  # key in the other address family, tried if the guest refuses a host client; or b""
        "gso",  # `hdr` has its segmentation fields set
        "hdr",  # pre-cooked frame: vnet, Ethernet, IP, TCP headers
        "host",  # address and port that the host socket is connected to
        "ip_sum",  # folded sum of the IPv4 header without total length and checksum
        "irs",  # the guest's
        "iss",  # our initial sequence number
        "keepalive",  # the guest has sent a keep-alive probe, so SO_KEEPALIVE is on
        "l4",  # offset of the TCP header in `hdr`
        "mss",  # largest segment to the guest
        "near",  # acknowledgements to the guest need not wait for the host peer's (`window.py`)
        "out_of_order",  # the out-of-order queue (`out_of_order.py`)
        "pingpong",  # how often data to the guest followed data of the guest within ACK_DELAY (0..PINGPONG_MAX)
        "poll_interval",  # s until TCP_INFO is read for acknowledgements of the host peer; 0: it was never read
        "rcv_acked",
        "rcv_dropped",  # the socket refused payload of the guest: ask for it when there is room
        "rcv_edge",
        "rcv_nxt",
        "rcv_wnd_low",  # a window smaller than this is computed again
        "rcv_wnd_max",  # largest window that the guest has seen
        "rcv_wscale",  # window scale shift of what is advertised to the guest (RFC 7323, 2.2)
        "recover",
        "resent",  # retransmissions to the guest
        "resolvers_tried",  # while the host socket connects to one of several resolvers: those tried, in this order
        "retries",  # expiries of the timer in a row, without progress
        "snd_max",
        "snd_max_fin",  # the guest's acknowledgement of `snd_max` acknowledges FIN
        "snd_nxt",
        "snd_una",
        "snd_wnd",
        "snd_wnd_max",
        "snd_wscale",  # window scale shift of the windows that the guest advertises
        "t_rx",  # time of the last data from the guest
        "tcp_sum",  # folded sum of the pseudo-header without length
        "timer",  # descriptor from the timer pool, or -1
        "urgent",  # urgent data was seen: a peek may stop at its mark
        "wait_writable",  # the send buffer is nearly full: EPOLLOUT is awaited
    )
    kind = "TCP connection"
    label = "tcp"

    def __init__(self, key: bytes) -> None:
        super().__init__(key)
        self.events = 0
        self.host: tuple[bytes, int] = b"", 0
        self.fallback_key = b""
        self.resolvers_tried: Tried = ()
        self.out_of_order: tuple[tuple[int, memoryview, int], ...] = ()
        self.hdr = bytearray()
        self.l4 = self.ip_sum = self.tcp_sum = 0
        self.mss = tcp.MSS_DEFAULT
        self.chunk = self.snd_wscale = self.rcv_wscale = 0
        self.iss = self.irs = self.rcv_nxt = self.rcv_acked = self.rcv_edge = self.rcv_wnd_low = self.rcv_wnd_max = 0
        self.snd_una = self.snd_nxt = self.snd_wnd = self.snd_wnd_max = self.base = self.recover = self.snd_max = 0
        self.gso = self.near = self.wait_writable = self.rcv_dropped = self.ack_due = False
        self.urgent = self.consume_next = self.keepalive = self.snd_max_fin = False
        self.drained = True
        self.pingpong = self.retries = self.acks_unconsumed = self.resent = 0
        self.timer = -1
        self.deadline = self.delack_at = self.t_rx = self.poll_interval = 0.0

    def endpoints(self) -> Endpoints:
        n = (len(self.key) - 4) // 2
        ports = self.key[2 * n :]
        guest = addr.host_port(self.key[:n], int.from_bytes(ports[:2], "big"))
        peer = addr.host_port(self.key[n : 2 * n], int.from_bytes(ports[2:], "big"))
        began = HOST if self.events & SOCK_ACCEPTED else GUEST
        return Endpoints(began, guest, peer, addr.host_port(*self.host) if self.host[0] else "")

    def traffic(self) -> tuple[int, int]:
        """Bytes that the guest acknowledged, and bytes that the host socket took: the sequence numbers have both."""
        to_guest = self.snd_una - self.iss - 1 - (1 if self.events & TAP_FIN_ACKED else 0)
        to_host = self.rcv_nxt - self.irs - 1 - (1 if self.events & TAP_FIN_RCVD else 0)
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
        waited = RTO_INIT * ((1 << conn.retries) - 1)
        return min(RTO_INIT + waited, SYN_TIMEOUT - waited)
    if conn.snd_nxt != conn.snd_una:
        return min(RTO_INIT * (1 << conn.retries), RTO_MAX)
    if not conn.snd_wnd and not conn.drained:
        return min(PROBE_INIT * (1 << min(conn.retries, 10)), RTO_MAX)
    return KEEPALIVE_INTERVAL if conn.retries else KEEPALIVE_IDLE


def build_header(conn: TcpConn, guest_mac: bytes, our_mac: bytes, mtu: int, *, tso: bool) -> None:
    """Build the pre-cooked header of a connection from its key: every field that stays as it is gets its value here.

        0        10         24            44|64       64|84
        | vnet   | Ethernet | IPv4|IPv6   | TCP       |

    IPv4: TTL 255, id 0, DF clear. IPv6: a flow label of 20 bits from the flow's index, never 0 (RFC 6437, 3).
    The MSS must be known. With `mtu` 0, which is unknown, only the guest's MSS limits a segment.
    """
    v4 = len(conn.key) == 12
    n = 4 if v4 else 16
    guest, peer, ports = conn.key[:n], conn.key[n : 2 * n], conn.key[2 * n :]
    conn.l4 = L4_IPV4 if v4 else L4_IPV6
    hdr = conn.hdr = bytearray(conn.l4 + tcp.HEADER_LEN)
    ether.HEADER.pack_into(hdr, L2, guest_mac, our_mac, ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6)
    if v4:
        ip.HEADER4.pack_into(hdr, L3, ip.VERSION_IHL4, 0, 0, 0, 0, ip.TTL, PROTO_TCP, 0, peer, guest)
        conn.ip_sum = ones_sum(hdr[L3 : conn.l4])
    else:
        label = conn.index + 1 & ip.FLOW_LABEL_MASK or 1
        ip.HEADER6.pack_into(hdr, L3, ip.VERSION6 | label, 0, PROTO_TCP, ip.TTL, peer, guest)
    hdr[conn.l4 : conn.l4 + 4] = ports[2:] + ports[:2]
    conn.tcp_sum = fold(pseudo_sum(peer, guest, PROTO_TCP, 0))
    limit_mss(conn, mtu, tso=tso)
    set_segmentation(conn, gso_type=GSO_NONE)


def limit_mss(conn: TcpConn, mtu: int, *, tso: bool) -> None:
    """Limit the MSS that the guest announced to what a frame can carry, and derive the longest frame from it."""
    v4 = conn.l4 == L3 + 20
    overhead = conn.l4 - L3 + tcp.HEADER_LEN
    if mtu:
        conn.mss = min(conn.mss, mtu - overhead)
    longest = 65535 - (overhead if v4 else tcp.HEADER_LEN)  # IPv4's length counts the IP header, IPv6's does not
    conn.mss = min(conn.mss, longest)
    conn.chunk = longest // conn.mss * conn.mss if tso else conn.mss


def set_segmentation(conn: TcpConn, gso_type: int) -> None:
    """Write the vnet header: the kernel completes the checksum and, with a `gso_type`, segments at the MSS."""
    conn.gso = gso_type != GSO_NONE
    hdr_len, gso_size = (conn.l4 - L2 + tcp.HEADER_LEN, conn.mss) if conn.gso else (0, 0)
    VNET.pack_into(conn.hdr, 0, F_NEEDS_CSUM, gso_type, hdr_len, gso_size, conn.l4 - L2, 16)
