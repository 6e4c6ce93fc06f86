"""TCP segments to the guest: everything that writes a frame of a TCP connection, and the peeking behind it.

Payload is never kept. It stays in the host socket until the guest acknowledges it, and is read by MSG_PEEK into one
buffer that all connections share, cut into frames by views, and forgotten. A frame is the connection's pre-cooked
header and a view, handed to the link together; only lengths, checksums, sequence numbers and the window are written.

    host socket    base            snd_una          snd_nxt
    receive queue  |  acknowledged |  sent          |  not sent yet
                   '- dropped late, by MSG_TRUNC    '- SO_PEEK_OFF points here

Acknowledged bytes cost nothing while they lie in the socket, but they pin the kernel's buffers: a few bytes left of a
large one can close the receive window, and then nothing happens any more. So large amounts, and the rest that follows
them, are dropped at once; small ones may add up for as long as an acknowledgement may be delayed.

SO_PEEK_OFF (TCP: kernel 6.9) lets the kernel keep the offset of the next peek. Without it every peek starts at `base`,
and what was sent already lands in a buffer nobody reads.

A segment below the MSS goes out beside others in flight when it is all that is queued, or when it fills half of the
largest window that the guest has opened (RFC 9293, 3.8.6.2.1). Otherwise it waits for the window to open further: a
guest with two segments in flight acknowledges at once, so the socket is not even asked then. At an MTU of 65520 the
window of a guest is often not much more than one segment, and an answer in two writes depends on this rule.

A short peek means that the queue is empty (`drained`), so the question "is there more?" is not asked again until the
socket reports an event; urgent data also cuts a peek short, so a connection that has seen any always asks twice, and
without SO_PEEK_OFF waits for the guest to acknowledge what is before the mark.
If the peer's FIN was reported before the peek, a short one ends the stream, and our FIN rides on the last segment.
"""

from __future__ import annotations

import mmap
import socket
from struct import Struct

from ..calls import calls
from ..flow.context import Context
from ..flow.errors import Errors
from ..link.tap_device import GSO_NONE, GSO_TCPV4, GSO_TCPV6
from ..linux.sockopt import setting
from ..linux.tcpinfo import SO_PEEK_OFF, Features
from ..policy.config import Config
from ..wire import icmp, tcp
from ..wire.checksum import PROTO_TCP, fold
from .conn import (
    ESTABLISHED,
    L3,
    SOCK_FIN_RCVD,
    TAP_FIN_ACKED,
    TAP_FIN_SENT,
    TAP_SYN_SENT,
    TTL,
    WS_OFFERED,
    TcpConn,
    cook,
    fit,
    set_event,
    set_segmentation,
)

PEEK_MAX = 1 << 18  # bytes in one peek: four super-frames, small enough for the second-level cache
DISCARD_MAX = 1 << 22  # bytes in flight to the guest without SO_PEEK_OFF; also the most dropped in one call
_TCP_VARIABLE = Struct("!IIHHH")  # seq, ack, offset and flags, window, checksum: at offset 4
_IP4_VARIABLE = Struct("!HHHHH")  # total length, id, fragment, TTL and protocol, checksum: at offset 2
_U16 = Struct("!H")
_TTL_PROTO = TTL << 8 | PROTO_TCP
_MASK = 0xFFFFFFFF
_OFFSET_5 = 5 << 12
MSG_PEEK = socket.MSG_PEEK
MSG_TRUNC = socket.MSG_TRUNC

CALLS = (*setting((socket.SOL_SOCKET, SO_PEEK_OFF)), *calls("recvmsg", "recvfrom"))


class TcpOut:
    """Sends to the guest. One per process; connections are its arguments."""

    def __init__(self, ctx: Context, features: Features, *, tso: bool) -> None:
        self._link = ctx.link
        self._guest = ctx.guest
        self._errors = Errors(ctx)
        self._tso = tso
        self._peek_off = features.peek_off
        self.stalled: dict[int, TcpConn] = {}  # connections whose data waits until the link takes frames, by index
        self._buf = memoryview(bytearray(PEEK_MAX))
        # With MSG_TRUNC the kernel writes nothing, with SO_PEEK_OFF nobody peeks into it: memory that is never touched.
        self._discard = memoryview(mmap.mmap(-1, DISCARD_MAX))
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._our_mac, self._mtu = config.our_mac, config.mtu

    def cook(self, conn: TcpConn) -> None:
        """Prepare the header of a new connection."""
        cook(conn, self._guest.mac, self._our_mac, self._mtu, tso=self._tso)

    def fit(self, conn: TcpConn) -> None:
        """The guest told its MSS: limit it, and the length of frames by it."""
        fit(conn, self._mtu, tso=self._tso)

    def header(self, conn: TcpConn, seq: int, flags: int, length: int, options: int = 0) -> None:
        """Write what changes into the pre-cooked header: `length` bytes of payload, `options` bytes of options."""
        l4 = conn.l4
        length += 20 + options
        window = conn.rcv_edge - conn.rcv_acked >> conn.ws_to
        s = conn.tcp_sum + length
        _TCP_VARIABLE.pack_into(
            conn.hdr,
            l4 + 4,
            seq & _MASK,
            conn.rcv_acked & _MASK,
            _OFFSET_5 + (options << 10) | flags,
            window if window < 65535 else 65535,
            (s & 0xFFFF) + (s >> 16),
        )
        if l4 == L3 + 20:
            length += 20
            s = conn.ip_sum + length
            _IP4_VARIABLE.pack_into(
                conn.hdr, L3 + 2, length, 0, 0, _TTL_PROTO, 0xFFFF - ((s & 0xFFFF) + (s >> 16))
            )
        else:
            _U16.pack_into(conn.hdr, L3 + 4, length)

    def bare(self, conn: TcpConn, flags: int, seq: int) -> None:
        """Send a segment without payload. Its acknowledgement is `rcv_acked`."""
        if conn.gso:
            set_segmentation(conn, GSO_NONE)
        self.header(conn, seq, flags, 0)
        conn.ack_due = False
        self._link.send(conn.hdr)

    def ack(self, conn: TcpConn) -> None:
        """Send an acknowledgement with the current window."""
        self.bare(conn, tcp.ACK, conn.snd_nxt)

    def reset(self, conn: TcpConn) -> None:
        """Send RST. It carries ACK, which a peer in SYN-SENT insists on (RFC 9293, 3.10.7.3).

        A guest that answers our SYN is in SYN-RECEIVED, and we have nothing to acknowledge yet.
        """
        begun = conn.events & (TAP_SYN_SENT | ESTABLISHED) == TAP_SYN_SENT
        self.bare(conn, tcp.RST if begun else tcp.RST | tcp.ACK, conn.snd_nxt)

    def syn(self, conn: TcpConn) -> None:
        """Send SYN, with rcv_edge as its window."""
        self._syn(conn, tcp.SYN, WS_OFFERED)

    def syn_ack(self, conn: TcpConn, offered_ws: bool) -> None:
        """Send SYN,ACK."""
        self._syn(conn, tcp.SYN | tcp.ACK, WS_OFFERED if offered_ws else None)

    def _syn(self, conn: TcpConn, flags: int, ws: int | None) -> None:
        """The window in it is never scaled (RFC 7323, 2.2)."""
        overhead = conn.l4 - L3 + tcp.HEADER_LEN
        mss = (self._mtu or 1500) - overhead
        options = tcp.SynOptions(mss, ws).emit()
        scale, conn.ws_to = conn.ws_to, 0
        self.header(conn, conn.snd_una, flags, 0, len(options))
        conn.ws_to = scale
        self._link.send_payload((conn.hdr, options))

    def refuse(self, key: bytes, seq: int, ack: int, flags: int, length: int) -> None:
        """Answer a segment that belongs to no connection with RST (RFC 9293, 3.10.7.1); `length` counts SYN and FIN."""
        stray = TcpConn(key)
        self.cook(stray)
        if flags & tcp.ACK:
            self.bare(stray, tcp.RST, ack)
        else:
            stray.rcv_acked = stray.rcv_edge = seq + length
            self.bare(stray, tcp.RST | tcp.ACK, 0)

    def unreachable(self, conn: TcpConn, error: int, now: float) -> None:
        """Tell the guest by ICMP that its SYN went nowhere, so that its connect() fails with the errno of ours."""
        n = (len(conn.key) - 4) // 2
        guest, peer, ports = conn.key[:n], conn.key[n : 2 * n], conn.key[2 * n :]
        syn = icmp.quote(guest, peer, PROTO_TCP, ports + conn.isn_tap.to_bytes(4, "big") + bytes(12))
        self._errors.refused(error, guest, peer, syn, now)

    def data(self, conn: TcpConn, *, reset: bool = False) -> None:
        """Send what the socket has and the guest's window takes, and FIN after the last byte. Raises OSError.

        `reset`: the host peer has reset the connection, so that an empty queue is not the end of its stream.
        """
        while not conn.events & TAP_FIN_SENT:
            if self._link.full:
                self.stalled[conn.index] = conn
                return
            in_flight = conn.snd_nxt - conn.snd_una
            want = conn.snd_wnd - in_flight
            if want <= 0:
                return
            silly = in_flight and want < conn.mss and want < conn.snd_wnd_max >> 1
            if silly and in_flight >= 2 * conn.mss:
                return  # the acknowledgement on its way opens the window
            if want > PEEK_MAX:
                want = PEEK_MAX
            if not self._peek_off:
                if conn.urgent:
                    self.consume(conn)
                want = min(want, DISCARD_MAX - (conn.snd_nxt - conn.base))
                if want <= 0:
                    return
            n = self._peek(conn, want)
            if not n and not reset:
                set_event(conn, SOCK_FIN_RCVD)
            n = max(n, 0)
            # Short at an urgent mark, perhaps. A peek that begins before the mark does not get beyond it.
            cut = n < want and conn.urgent and (n or (not self._peek_off and conn.snd_nxt != conn.base))
            if silly and n == want and not cut:
                self._seek(conn, conn.snd_nxt)
                return
            ended = n < want and conn.events & SOCK_FIN_RCVD and not cut
            if n:
                self._segments(conn, n, tcp.FIN if ended else 0)
                conn.snd_nxt += n
            elif ended:
                self.bare(conn, tcp.FIN | tcp.ACK, conn.snd_nxt)
            if ended:
                conn.snd_nxt += 1
                set_event(conn, TAP_FIN_SENT)
            if n < want and not cut:
                conn.drained = True
                return
            if not n:
                return  # what comes after the mark can be seen when the guest has what is before it

    def _peek(self, conn: TcpConn, want: int) -> int:
        """Read up to `want` bytes at snd_nxt without taking them; 0: the stream ends there, -1: no bytes for now."""
        try:
            if self._peek_off:
                n: int = conn.sock.recv_into(self._buf, want, MSG_PEEK)
            else:
                sent = conn.snd_nxt - conn.base
                n = conn.sock.recvmsg_into((self._discard[:sent], self._buf[:want]), 0, MSG_PEEK)[0]
                if sent:
                    # With unacknowledged bytes in the queue an end cannot be told from a pause: EPOLLRDHUP tells it.
                    return n - sent if n > sent else -1
        except BlockingIOError:
            return -1
        return n

    def _segments(self, conn: TcpConn, n: int, last_flags: int) -> None:
        """Send the first `n` bytes of the peek buffer as segments from snd_nxt on; the last one gets PSH."""
        hdr, chunk, mss, seq = conn.hdr, conn.chunk, conn.mss, conn.snd_nxt
        buf, send = self._buf, self._link.send_payload
        conn.ack_due = False
        offset = 0
        while offset < n:
            end = offset + chunk
            flags = tcp.ACK
            if end >= n:
                end = n
                flags |= tcp.PSH | last_flags
            gso = end - offset > mss
            if gso != conn.gso:
                set_segmentation(conn, (GSO_TCPV4 if conn.l4 == L3 + 20 else GSO_TCPV6) if gso else GSO_NONE)
            self.header(conn, seq + offset, flags, end - offset)
            send((hdr, buf[offset:end]))
            offset = end

    def again(self, conn: TcpConn) -> None:
        """Resend one frame from snd_una, whatever else is in flight (fast retransmit, RFC 6582)."""
        conn.resent += 1
        in_flight = conn.snd_nxt - conn.snd_una
        if conn.events & TAP_FIN_SENT and in_flight == 1:
            self.bare(conn, tcp.FIN | tcp.ACK, conn.snd_una)
            return
        fin = 1 if conn.events & TAP_FIN_SENT else 0
        nxt, conn.snd_nxt = conn.snd_nxt, conn.snd_una
        self._seek(conn, conn.snd_una)
        n = self._peek(conn, min(in_flight - fin, conn.chunk))
        if n > 0:
            self._segments(conn, n, 0)
        conn.snd_nxt = nxt
        self._seek(conn, nxt - fin)

    def rewind(self, conn: TcpConn) -> None:
        """Forget that anything after snd_una was sent: the next `data` sends it again."""
        conn.resent += 1
        conn.rewound = max(conn.rewound, conn.snd_nxt)
        conn.fin_rewound = conn.fin_rewound or bool(conn.events & TAP_FIN_SENT)
        conn.snd_nxt = conn.snd_una
        conn.drained = False
        set_event(conn, 0, clear=TAP_FIN_SENT)
        self._seek(conn, conn.snd_una)

    def catch_up(self, conn: TcpConn) -> None:
        """The guest acknowledged what was forgotten: it is not sent again. FIN was behind the last byte, if it was."""
        conn.snd_nxt = conn.snd_una
        fin = 0
        if conn.snd_una == conn.rewound and conn.fin_rewound:
            set_event(conn, TAP_FIN_SENT)
            fin = 1
        self._seek(conn, conn.snd_una - fin)

    def consume(self, conn: TcpConn) -> None:
        """Take what the guest acknowledged out of the socket, without copying it. The peek offset follows."""
        left = conn.snd_una - conn.base - (1 if conn.events & TAP_FIN_ACKED else 0)
        while left > 0:
            try:
                n = conn.sock.recv_into(self._discard, min(left, DISCARD_MAX), MSG_TRUNC)
            except OSError:
                return  # the host peer reset the connection: its error event ends it
            left -= n
            conn.base += n
            if not n:
                return  # likewise

    def _seek(self, conn: TcpConn, seq: int) -> None:
        """Point the next peek at the byte with sequence number `seq`."""
        if self._peek_off:
            conn.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, seq - conn.base)


assert fold(0x1FFFE) == 0xFFFF  # one fold is enough for a folded sum plus a 16-bit length, which `header` relies on
