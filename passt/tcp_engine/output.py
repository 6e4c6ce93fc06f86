"""TCP segments to the guest: every frame of a TCP connection is written here, and the payload peeked.

The module keeps no payload. Payload stays in the host socket until the guest acknowledges it. MSG_PEEK reads it into
one buffer that all connections share; views of that buffer become frames. A frame is the connection's pre-cooked header
and a view, handed to the link together. Only lengths, checksums, sequence numbers and the window are written per frame.

    host socket    base            snd_una          snd_nxt
    receive queue  |  acknowledged |  in flight     |  not sent yet
                   '- consumed late, by MSG_TRUNC   '- SO_PEEK_OFF points here

Acknowledged bytes cost nothing while they stay in the socket, but they pin the kernel's buffers: a few bytes left of a
large buffer can close the receive window, and then no event comes any more. So a large amount is consumed at once, and
so is the rest that follows it. Small amounts add up for as long as an acknowledgement may be delayed.

With SO_PEEK_OFF (TCP: kernel 6.9) the kernel keeps the offset of the next peek. Without it every peek starts at `base`,
and what is in flight already is read into a buffer that nothing reads.

Silly window avoidance (RFC 9293, 3.8.6.2.1). A segment below the MSS is sent beside others in flight if it is all that
the socket has, or if it fills half of the largest window of the guest. Otherwise it waits for the window to open: a
guest with two segments in flight acknowledges at once, so the socket is not even read then. At an MTU of 65520 the
window of a guest is often not much more than one segment, and an answer in two writes depends on this rule.

A link may have places for payload of its own (`lay_out`), which saves a copy. It is asked where the last peek brought
much (`bulk`): to lay out a window takes longer than to copy a few bytes.

A link that cuts super-frames in software gets none of TCP. It gets the segments of a peek, all but the last at once
(`send_segments`): what it does for each such call costs as much as a dozen segments, and an IP packet is a quarter of a
peek at most.

A short peek means that the receive queue is empty (`drained`): the next peek follows an event of the socket. Urgent
data makes a peek short as well, so a connection that has seen any always peeks twice, and after CUTS_MAX marks in a row
requests the event once more: a peer may move the mark on as fast as it is reached. Without SO_PEEK_OFF it waits
until the guest has acknowledged everything before the mark.

If the peer's FIN was reported before a short peek, the peek ends the stream, and our FIN rides on the last segment.

Loss. `recovery.py` decides what is sent again, and `resend` peeks it once more, wherever it lies in flight.
"""

from __future__ import annotations

import mmap
import socket
from collections.abc import Sequence
from struct import Struct
from typing import Final

from ..calls import calls
from ..flow.context import Context
from ..linux.memory import zeros
from ..linux.sockopt import SO_PEEK_OFF, setting
from ..linux.tcpinfo import Features
from ..loop.reactor import EPOLLOUT, INTEREST
from ..policy.config import Config
from ..wire import ip, tcp
from ..wire.checksum import PROTO_TCP, fold
from ..wire.tcp import MASK
from ..wire.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6
from .conn import (
    ESTABLISHED,
    L3,
    L4_IPV4,
    SOCK_FAILED,
    SOCK_FIN_RCVD,
    TAP_FIN_ACKED,
    TAP_FIN_SENT,
    TAP_SYN_SENT,
    WS_OFFERED,
    TcpConn,
    build_header,
    limit_mss,
    set_event,
    set_segmentation,
)
from .held import sack_blocks
from .turns import SPARSE, Turns

PEEK_MAX: Final = 1 << 18  # bytes in one peek: four super-frames, small enough for the second-level cache
ROWS_MIN: Final = 6  # segments: a link that cuts gets more than these at once, if they are one peek
BULK: Final = 1 << 14  # bytes in one peek from which on the next one goes where the link wants it
CUTS_MAX: Final = 16  # urgent marks passed in one turn
DISCARD_MAX: Final = 1 << 22  # bytes in flight to the guest without SO_PEEK_OFF; also the most consumed in one call
_PACK_TCP: Final = Struct("!IIHHH").pack_into  # seq, ack, offset and flags, window, checksum: at offset 4
_PACK_IP4: Final = Struct("!HHHHH").pack_into  # total length, id, fragment, TTL and protocol, checksum: at offset 2
_U16: Final = Struct("!H")
_TTL_PROTO: Final = ip.TTL << 8 | PROTO_TCP
_OFFSET_5: Final = 5 << 12
_NO_VIEWS: Final[tuple[list[memoryview], int]] = ([], 0)
MSG_PEEK: Final = socket.MSG_PEEK
MSG_TRUNC: Final = socket.MSG_TRUNC

CALLS = (*setting((socket.SOL_SOCKET, SO_PEEK_OFF)), *calls("recvmsg", "recvfrom"))


class TcpOut:
    """The sender of all connections."""

    def __init__(self, ctx: Context, features: Features) -> None:
        self._link = ctx.link
        self._reactor = ctx.reactor
        self._guest, self._lan = ctx.guest, ctx.lan
        self._peek_off = features.peek_off
        self.turns = Turns(ctx)
        self._buf = memoryview(zeros(PEEK_MAX))
        # With MSG_TRUNC the kernel writes nothing, and with SO_PEEK_OFF no peek uses it: memory that is never touched.
        self._discard = memoryview(mmap.mmap(-1, DISCARD_MAX))
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._mtu = config.mtu

    def build_header(self, conn: TcpConn) -> None:
        """Prepare the header of a new connection."""
        n = (len(conn.key) - 4) // 2
        guest, peer = self._guest.mac_of(conn.key[:n]), self._lan.mac_of(conn.key[n : 2 * n])
        build_header(conn, guest, peer, self._mtu, tso=self._link.tso)

    def limit_mss(self, conn: TcpConn) -> None:
        """Limit the MSS that the guest announced, and the length of frames by it."""
        limit_mss(conn, self._mtu, tso=self._link.tso)

    def header(self, conn: TcpConn, seq: int, flags: int, length: int, options: int = 0) -> None:
        """Write the fields that change into the pre-cooked header: `length` and `options` are in bytes."""
        l4 = conn.l4
        length += 20 + options
        window = conn.rcv_edge - conn.rcv_acked >> conn.rcv_wscale
        s = conn.tcp_sum + length
        _PACK_TCP(
            conn.hdr,
            l4 + 4,
            seq & MASK,
            conn.rcv_acked & MASK,
            _OFFSET_5 + (options << 10) | flags,
            window if window < 65535 else 65535,
            (s & 0xFFFF) + (s >> 16),
        )
        if length == conn.length:
            return  # the IP header stays as it is
        conn.length = length
        if l4 == L4_IPV4:
            length += 20
            s = conn.ip_sum + length
            _PACK_IP4(conn.hdr, L3 + 2, length, 0, 0, _TTL_PROTO, 0xFFFF - ((s & 0xFFFF) + (s >> 16)))
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
        """Send an acknowledgement with the current window, and with SACK where the guest has to know of a hole."""
        if conn.held or conn.dsack:
            blocks = sack_blocks(conn)
            if blocks:
                self._sack(conn, blocks)
                return
        self.bare(conn, tcp.ACK, conn.snd_nxt)

    def _sack(self, conn: TcpConn, blocks: Sequence[tuple[int, int]]) -> None:
        """Send an acknowledgement with the option."""
        options = tcp.emit_sack(blocks)
        if conn.gso:
            set_segmentation(conn, GSO_NONE)
        self.header(conn, conn.snd_nxt, tcp.ACK, 0, len(options))
        conn.ack_due = False
        self._link.send_payload((conn.hdr, options))

    def reset(self, conn: TcpConn) -> None:
        """Send RST. It carries ACK, which a guest in SYN-SENT requires (RFC 9293, 3.10.7.3).

        Before the guest's SYN,ACK there is nothing to acknowledge.
        """
        begun = conn.events & (TAP_SYN_SENT | ESTABLISHED) == TAP_SYN_SENT
        self.bare(conn, tcp.RST if begun else tcp.RST | tcp.ACK, conn.snd_nxt)

    def syn(self, conn: TcpConn) -> None:
        """Send SYN; its window is `rcv_edge`."""
        self._syn(conn, tcp.SYN, WS_OFFERED)

    def syn_ack(self, conn: TcpConn, offered_ws: bool) -> None:
        """Send SYN,ACK."""
        self._syn(conn, tcp.SYN | tcp.ACK, WS_OFFERED if offered_ws else None)

    def _syn(self, conn: TcpConn, flags: int, ws: int | None) -> None:
        """The window of a SYN is never scaled (RFC 7323, 2.2)."""
        overhead = conn.l4 - L3 + tcp.HEADER_LEN
        mss = (self._mtu or 1500) - overhead
        options = tcp.emit_syn_options(mss, ws, conn.sack)
        scale, conn.rcv_wscale = conn.rcv_wscale, 0
        self.header(conn, conn.snd_una, flags, 0, len(options))
        conn.rcv_wscale = scale
        self._link.send_payload((conn.hdr, options))

    def refuse(self, key: bytes, seq: int, ack: int, flags: int, length: int) -> None:
        """Answer a segment that belongs to no connection with RST (RFC 9293, 3.10.7.1); `length` counts SYN and FIN."""
        stray = TcpConn(key)
        self.build_header(stray)
        if flags & tcp.ACK:
            self.bare(stray, tcp.RST, ack)
        else:
            stray.rcv_acked = stray.rcv_edge = seq + length
            self.bare(stray, tcp.RST | tcp.ACK, 0)

    def send_data(self, conn: TcpConn) -> None:
        """Send what the socket has and the guest's window takes, and FIN after the last byte. Raises OSError.

        Where the socket has failed, an empty receive queue is not the end of the peer's stream.

        Longer than most on purpose: each step decides on what the one before has found, and it runs for every event.
        """
        cuts, turns, link = 0, self.turns, self._link
        while not conn.events & TAP_FIN_SENT:
            if link.full or link.room <= 0:
                turns.waiting[conn.index] = conn
                return
            in_flight = conn.snd_nxt - conn.snd_una
            want = conn.snd_wnd - in_flight
            if want <= 0:
                return
            over = turns.left <= 0 and turns.renewed() <= 0
            busy = in_flight >= SPARSE or (turns.light and conn.bulk)
            if busy and (over or ((turns.waiting or turns.light) and not turns.walking)):
                turns.put_off(conn)
                return
            silly = in_flight and want < conn.mss and want < conn.snd_wnd_max >> 1
            if silly and in_flight >= 2 * conn.mss:
                return  # the acknowledgement on its way opens the window
            if want > PEEK_MAX:
                want = PEEK_MAX - PEEK_MAX % conn.chunk  # the next peek goes on with a whole frame
            if want > link.room:
                want = link.room
            if over and want > SPARSE - in_flight:
                want = SPARSE - in_flight
            if not self._peek_off:
                if conn.urgent:
                    self.consume(conn)
                want = min(want, DISCARD_MAX - (conn.snd_nxt - conn.base))
                if want <= 0:
                    return
            if conn.bulk:
                n, want, laid_out = self._peek_next(conn, want)
            else:
                n, laid_out = self._peek(conn, conn.snd_nxt, want), False
            conn.bulk = n >= BULK
            if not n and not conn.events & SOCK_FAILED:
                set_event(conn, SOCK_FIN_RCVD)
            elif n < 0:
                n = 0
            # Perhaps short at an urgent mark: a peek that begins before the mark ends there.
            cut = n < want and conn.urgent and (n or (not self._peek_off and conn.snd_nxt != conn.base))
            if silly and n == want and not cut:
                self._seek(conn, conn.snd_nxt)
                return
            ended = n < want and conn.events & SOCK_FIN_RCVD and not cut
            if n:
                self._reactor.moved += n
                self._segments(conn, conn.snd_nxt, n, tcp.FIN if ended else 0, laid_out)
                conn.snd_nxt += n
                turns.left -= n
            elif ended:
                self.bare(conn, tcp.FIN | tcp.ACK, conn.snd_nxt)
            if ended:
                conn.snd_nxt += 1
                set_event(conn, TAP_FIN_SENT)
            if n < want and not cut:
                conn.drained = True
                return
            if not n:
                return  # the bytes after the mark can be peeked when the guest has acknowledged those before it
            if cut:
                cuts += 1
                if cuts == CUTS_MAX and not conn.events & SOCK_FAILED:
                    self._reactor.change(conn.fd, INTEREST | (EPOLLOUT if conn.wait_writable else 0))
                    return

    def _peek_next(self, conn: TcpConn, want: int) -> tuple[int, int, bool]:
        """Peek what comes next of much, where the link wants it: (as of `_peek`, at most, whether there)."""
        views, laid_out = _NO_VIEWS
        if conn.chunk <= conn.mss or not self._link.cuts:
            views, laid_out = self._link.lay_out(len(conn.hdr), conn.chunk, want)
            if conn.sock is None:
                return -1, 0, False  # the link made room, and found that the guest is gone: all connections have ended
        if laid_out:
            return self._peek_into(conn, conn.snd_nxt, views), laid_out, True
        return self._peek(conn, conn.snd_nxt, want), want, False

    def _peek(self, conn: TcpConn, seq: int, want: int) -> int:
        """Read up to `want` bytes at `seq` and leave them in the socket; 0: end of stream, -1: no bytes now.

        With SO_PEEK_OFF, `seq` is where the last peek ended, or `_seek` went.
        """
        if not self._peek_off:
            return self._peek_into(conn, seq, [self._buf[:want]])
        try:
            n: int = conn.sock.recv_into(self._buf, want, MSG_PEEK)
        except BlockingIOError:
            return -1
        return n

    def _peek_into(self, conn: TcpConn, seq: int, views: list[memoryview]) -> int:
        """The same, into `views`."""
        sent = 0 if self._peek_off else seq - conn.base
        if sent:
            views.insert(0, self._discard[:sent])
        try:
            n: int = conn.sock.recvmsg_into(views, 0, MSG_PEEK)[0]
        except BlockingIOError:
            return -1
        if sent:
            # With bytes in flight in the queue, a peek cannot tell an end from a pause: EPOLLRDHUP does.
            return n - sent if n > sent else -1
        return n

    def _segments(self, conn: TcpConn, seq: int, n: int, last_flags: int, laid_out: bool = False) -> None:
        """Send `n` bytes as segments at `seq`; the last one has PSH. They are in the peek buffer, or `laid_out`."""
        hdr, chunk, mss = conn.hdr, conn.chunk, conn.mss
        buf, link = self._buf, self._link
        conn.ack_due = False
        if n <= mss:  # one segment, as the loop would send it
            if conn.gso:
                set_segmentation(conn, GSO_NONE)
            self.header(conn, seq, tcp.ACK | tcp.PSH | last_flags, n)
            if laid_out:
                link.send_laid_out(hdr, n)
            else:
                link.send_payload((hdr, buf[:n]))
            return
        offset = 0
        if chunk > mss and link.cuts:
            chunk = mss
            if n > ROWS_MIN * mss:
                if conn.gso:
                    set_segmentation(conn, GSO_NONE)
                self.header(conn, seq, tcp.ACK, mss)
                offset = (n - 1) // mss * mss  # the last one has other flags, and may be shorter
                link.send_segments(hdr, buf[:offset], mss)
        while offset < n:
            end = offset + chunk
            flags = tcp.ACK
            if end >= n:
                end = n
                flags |= tcp.PSH | last_flags
            gso = end - offset > mss
            if gso != conn.gso:
                set_segmentation(conn, (GSO_TCPV4 if conn.l4 == L4_IPV4 else GSO_TCPV6) if gso else GSO_NONE)
            self.header(conn, seq + offset, flags, end - offset)
            if laid_out:
                link.send_laid_out(hdr, end - offset)
            else:
                link.send_payload((hdr, buf[offset:end]))
            offset = end

    def resend(self, conn: TcpConn, ranges: Sequence[tuple[int, int]]) -> None:
        """Send ranges of what is in flight once more, FIN included. Raises OSError."""
        fin = conn.snd_nxt - 1 if conn.events & TAP_FIN_SENT else -1
        for seq, right in ranges:
            ends = right - 1 == fin
            data_end = fin if ends else right
            conn.resent += 1
            if seq == fin:
                self.bare(conn, tcp.FIN | tcp.ACK, fin)
                continue
            self._seek(conn, seq)
            at = seq
            while at < data_end:
                n = self._peek(conn, at, min(data_end - at, PEEK_MAX))
                if n <= 0:
                    break  # without SO_PEEK_OFF, no peek gets beyond an urgent mark in front of this
                self._segments(conn, at, n, tcp.FIN if ends and at + n == data_end else 0)
                at += n
        self._seek(conn, conn.snd_nxt if fin < 0 else fin)

    def consume(self, conn: TcpConn) -> None:
        """Take what the guest acknowledged out of the socket, without a copy. The kernel adjusts the peek offset."""
        left = conn.snd_una - conn.base - (1 if conn.events & TAP_FIN_ACKED else 0)
        while left > 0:
            try:
                n = conn.sock.recv_into(self._discard, min(left, DISCARD_MAX), MSG_TRUNC)
            except OSError:
                return  # the host peer reset the connection: the error event ends it
            left -= n
            conn.base += n
            if not n:
                return  # the same
        if conn.base == conn.snd_una:
            conn.base = conn.snd_una  # one object for both: each is 32 bytes, of every idle connection

    def _seek(self, conn: TcpConn, seq: int) -> None:
        """Set the offset of the next peek to sequence number `seq`."""
        if self._peek_off:
            conn.sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, seq - conn.base)


assert fold(0x1FFFE) == 0xFFFF  # one fold is enough for a folded sum plus a 16-bit length, which `header` relies on
