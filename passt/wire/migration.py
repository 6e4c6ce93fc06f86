"""The state of a machine's network that moves with the machine: its addresses, and its TCP connections.

    header       magic 8 | version u16 | 0 u16 | connections u32
    guest        MAC 6 | IPv4 4 | IPv6 16 | IPv6 link-local 16                    zeros: not known
    connection   the guest's side: `_GUEST_SIDE`, then addresses                  as often as the header says
                 the host's socket: `_SOCKET`, addresses and queues               unless FLAG_SOCKET is clear

All numbers are big-endian. Addresses have 4 or 16 bytes, by FLAG_IP6 for the guest's view and by FLAG_SOCKET_IP6 for
the host's. The queues are last: bytes that the host peer has not acknowledged, then bytes that the guest has not.

The state comes from another host, by way of a program (QEMU) that does not look at it: it is checked like any input.
`docs/migration.md` has each field.
"""

from __future__ import annotations

from struct import Struct
from typing import Any

from ..lean.records import dataclass

MAGIC = b"passt-py"
VERSION = 1
CONNECTIONS_MAX = 131071  # as many as flows
QUEUE_MAX = 1 << 26  # bytes of one queue
STATE_MAX = 1 << 30  # bytes

_HEADER = Struct("!8sHHI")
_GUEST = Struct("!6s4s16s16s")
_GUEST_SIDE = Struct("!HHHHHBBBB9Q")
_SOCKET = Struct("!HHBBBBHIIIIIIIIIII")

FLAG_IP6, FLAG_HOST_IP6, FLAG_SOCKET, FLAG_SOCKET_IP6 = 1, 2, 4, 8
FLAG_SACK, FLAG_TIME_WAIT, FLAG_DELAYS_ACKS = 16, 32, 64
_FLAGS = 0x7F
FIN_SENT, FIN_RECEIVED, FIN_ACKED = 1, 2, 4  # of a socket
_FINS = 7
OPTION_TIMESTAMPS, OPTION_SACK, OPTION_WSCALE = 1, 2, 4  # TCPI_OPT_* (include/uapi/linux/tcp.h)
_OPTIONS = 7
_EVENTS = 0x3FF  # events of `tcp_engine/conn.py`
_ESTABLISHED = 0x10
_WSCALE_MAX = 14  # RFC 7323, 2.3
_SPAN_MAX = 1 << 30  # bytes that two sequence numbers of one direction may be apart
_NUMBER_MAX = 1 << 62


class InvalidState(Exception):
    """A state that is none, or of another version; its text says why."""


@dataclass(frozen=True, slots=True)
class SocketState:
    """A connected TCP socket of a kernel: all that TCP_REPAIR reads and writes (`linux/tcp_repair.py`).

    `snd_seq` is the sequence number of the first byte of `send_queue`, `rcv_seq` that of `receive_queue`. A FIN of the
    peer that has come stands between `rcv_seq` plus the queue's length and the next number expected.
    """

    local: tuple[bytes, int]
    peer: tuple[bytes, int]
    snd_seq: int
    rcv_seq: int
    send_queue: bytes  # not acknowledged; the last `unsent` bytes were not sent yet
    unsent: int
    receive_queue: bytes
    fins: int  # FIN_SENT, FIN_RECEIVED, FIN_ACKED
    mss: int
    options: int  # OPTION_TIMESTAMPS, ...
    snd_wscale: int
    rcv_wscale: int
    timestamp: int
    snd_wl1: int  # struct tcp_repair_window
    snd_wnd: int
    max_window: int
    rcv_wnd: int
    rcv_wup: int

    def emit(self) -> bytes:
        """The reverse of `_socket`."""
        fixed = _SOCKET.pack(
            self.local[1], self.peer[1], self.fins, self.options, self.snd_wscale, self.rcv_wscale, self.mss,
            self.snd_seq, self.rcv_seq, self.unsent, self.timestamp, self.snd_wl1, self.snd_wnd, self.max_window,
            self.rcv_wnd, self.rcv_wup, len(self.send_queue), len(self.receive_queue),
        )  # fmt: skip
        return b"".join((fixed, self.local[0], self.peer[0], self.send_queue, self.receive_queue))


@dataclass(frozen=True, slots=True)
class ConnectionState:
    """A connection as the guest sees it (`tcp_engine/conn.py` explains the numbers), and its socket on the host.

    Without a socket it ends where the machine arrives.
    """

    key: bytes  # guest address, peer address, guest port, peer port
    host: tuple[bytes, int]  # the peer of the socket
    events: int
    iss: int
    irs: int
    snd_una: int
    snd_nxt: int
    snd_wnd: int
    snd_wnd_max: int
    rcv_nxt: int
    rcv_acked: int
    rcv_edge: int
    mss: int
    snd_wscale: int
    rcv_wscale: int
    traffic_class: int
    sack: bool
    time_wait: bool
    delays_acks: bool
    socket: SocketState | None

    def emit(self) -> bytes:
        """The reverse of `_connection`."""
        flags = (FLAG_IP6 if len(self.key) == 36 else 0) | (FLAG_HOST_IP6 if len(self.host[0]) == 16 else 0)
        flags |= FLAG_SACK if self.sack else 0
        flags |= FLAG_TIME_WAIT if self.time_wait else 0
        flags |= FLAG_DELAYS_ACKS if self.delays_acks else 0
        rest = b""
        if self.socket is not None:
            flags |= FLAG_SOCKET | (FLAG_SOCKET_IP6 if len(self.socket.local[0]) == 16 else 0)
            rest = self.socket.emit()
        fixed = _GUEST_SIDE.pack(
            flags, self.events, self.mss, self.host[1], 0, self.snd_wscale, self.rcv_wscale, self.traffic_class, 0,
            self.iss, self.irs, self.snd_una, self.snd_nxt, self.snd_wnd, self.snd_wnd_max, self.rcv_nxt,
            self.rcv_acked, self.rcv_edge,
        )  # fmt: skip
        return b"".join((fixed, self.key, self.host[0], rest))


@dataclass(frozen=True, slots=True)
class State:
    """All that moves. An address that is not known is zero."""

    mac: bytes
    addr4: bytes
    addr6: bytes
    addr6_ll: bytes
    connections: tuple[ConnectionState, ...]

    @classmethod
    def parse(cls, data: bytes) -> State:
        """Raises InvalidState. Nothing may follow."""
        cursor = _Cursor(data)
        magic, version, zero, count = cursor.fields(_HEADER)
        if magic != MAGIC:
            raise InvalidState("it is not of this program")
        if version != VERSION:
            raise InvalidState(f"it has version {version} ({VERSION} is known)")
        if zero or count > CONNECTIONS_MAX:
            raise InvalidState(f"it has {count} connections (at most {CONNECTIONS_MAX} are possible)")
        mac, addr4, addr6, addr6_ll = cursor.fields(_GUEST)
        connections = tuple(_connection(cursor) for _ in range(count))
        if cursor.at != len(data):
            raise InvalidState(f"{len(data) - cursor.at} bytes follow it")
        return cls(mac, addr4, addr6, addr6_ll, connections)

    def emit(self) -> bytes:
        """The reverse."""
        header = _HEADER.pack(MAGIC, VERSION, 0, len(self.connections))
        guest = _GUEST.pack(self.mac, self.addr4, self.addr6, self.addr6_ll)
        return b"".join((header, guest, *(connection.emit() for connection in self.connections)))


class _Cursor:
    """Reads from the front; beyond the end is InvalidState."""

    def __init__(self, data: bytes) -> None:
        self._data, self.at = data, 0

    def fields(self, layout: Struct) -> tuple[Any, ...]:
        return layout.unpack(self.take(layout.size))

    def take(self, length: int) -> bytes:
        end = self.at + length
        if end > len(self._data):
            raise InvalidState(f"it ends after {len(self._data)} bytes, in the middle")
        taken, self.at = self._data[self.at : end], end
        return taken


def _connection(cursor: _Cursor) -> ConnectionState:
    """Raises InvalidState."""
    flags, events, mss, host_port, zero, snd_ws, rcv_ws, traffic_class, zero2, *numbers = cursor.fields(_GUEST_SIDE)
    iss, irs, snd_una, snd_nxt, snd_wnd, snd_wnd_max, rcv_nxt, rcv_acked, rcv_edge = numbers
    _check(not zero and not zero2 and not flags & ~_FLAGS and not events & ~_EVENTS, "reserved bits")
    _check(bool(events & _ESTABLISHED), "a connection that is not established")
    _check(max(snd_ws, rcv_ws) <= _WSCALE_MAX and mss > 0, "an option of TCP")
    _check(max(numbers) < _NUMBER_MAX, "a sequence number")
    _check(iss < snd_una <= snd_nxt <= snd_una + _SPAN_MAX, "the numbers to the guest")
    _check(irs < rcv_acked <= rcv_nxt <= rcv_edge <= rcv_acked + _SPAN_MAX, "the numbers from the guest")
    _check(snd_wnd <= snd_wnd_max <= _SPAN_MAX, "the window of the guest")
    key = cursor.take(36 if flags & FLAG_IP6 else 12)
    host = cursor.take(16 if flags & FLAG_HOST_IP6 else 4), host_port
    _check(bool(flags & FLAG_SOCKET) or not flags & FLAG_SOCKET_IP6, "reserved bits")
    sock = _socket(cursor, 16 if flags & FLAG_SOCKET_IP6 else 4) if flags & FLAG_SOCKET else None
    return ConnectionState(
        key, host, events, iss, irs, snd_una, snd_nxt, snd_wnd, snd_wnd_max, rcv_nxt, rcv_acked, rcv_edge, mss,
        snd_ws, rcv_ws, traffic_class, bool(flags & FLAG_SACK), bool(flags & FLAG_TIME_WAIT),
        bool(flags & FLAG_DELAYS_ACKS), sock,
    )  # fmt: skip


def _socket(cursor: _Cursor, length: int) -> SocketState:
    """Raises InvalidState. `length` is that of an address."""
    local_port, peer_port, fins, options, snd_ws, rcv_ws, mss, *numbers = cursor.fields(_SOCKET)
    snd_seq, rcv_seq, unsent, timestamp, snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup, to_send, to_read = numbers
    _check(not fins & ~_FINS and (not fins & FIN_ACKED or bool(fins & FIN_SENT)), "FIN")
    _check(not options & ~_OPTIONS and max(snd_ws, rcv_ws) <= _WSCALE_MAX and mss > 0, "an option of TCP")
    _check(max(to_send, to_read) <= QUEUE_MAX and unsent <= to_send, "the length of a queue")
    _check(not (fins & FIN_ACKED and to_send), "bytes before an acknowledged FIN")
    _check(bool(local_port) and bool(peer_port), "a port")
    local, peer = (cursor.take(length), local_port), (cursor.take(length), peer_port)
    send_queue, receive_queue = cursor.take(to_send), cursor.take(to_read)
    return SocketState(
        local, peer, snd_seq, rcv_seq, send_queue, unsent, receive_queue, fins, mss, options, snd_ws, rcv_ws,
        timestamp, snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup,
    )  # fmt: skip


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise InvalidState(f"{what} cannot be so")
