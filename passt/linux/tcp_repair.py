"""TCP_REPAIR of the kernel (include/uapi/linux/tcp.h; CONFIG_CHECKPOINT_RESTORE): a connection is read, and made again.

A socket in repair mode sends nothing when it is connected or closed, and shows its sequence numbers, options, windows
and queues. Only a process with CAP_NET_ADMIN may turn the mode on and off: the helper passt-repair, which gets the
socket for that. Everything else is allowed to any process that has the socket.

    read    `fence`, [helper: on], `read`
    undo    `lift_fence`, [helper: off], `lift_fence`
    make    socket(2), `fence`, [helper: on], `restore`, `lift_fence`, [helper: off], `finish`, `lift_fence`

The fence is lifted before repair mode ends: the kernel sends a probe then, and the answer tells what the peer has.

Repair mode does not stop a socket from receiving. `fence` does: the kernel discards packets whose TTL or hop limit is
less than that of IP_MINTTL (RFC 5082; IPv6: IPV6_MINHOPCOUNT) before it looks at them, and 255 is what no packet has
that came through a router, nor one of a host with the usual initial value of 64 or 128. So nothing is acknowledged that
was not read, and a socket that stays behind answers nothing.

Nor does it stop a socket from sending what it has not sent yet. Where the kernel paces, or waits for a queue of the
network card, it goes on after `read`, for as long as the peer's window has room. A new socket that did not count these
bytes as sent would ignore the acknowledgement of them, and each further one, for good. So it counts all as sent that
the peer's window had room for, which the fence leaves as it was (`_kept_back`): the peer acknowledges what has come,
and the rest is retransmitted.

MSS. The option sets a limit for the next change of the path's MTU; until then, the socket would send segments of 536
bytes, the default. TCP_MAXSEG before connect(2) has the same limit count from the beginning.

FIN. A sent FIN is queued again by shutdown(2) in repair mode, which counts as a transmission; the peer acknowledges it
once more. A received FIN cannot be made again, and need not be: the next number expected is behind it, and the caller
knows of it.

SO_REUSEADDR, which lets a listener start where connections of an earlier one are left, is off when repair mode ends,
and `lift_fence` turns it on: that is what it is called for once more.

Bytes that were sent must be queued in repair mode, whatever the size of the send buffer: the kernel ignores
acknowledgements of what it has not sent. net.core.wmem_max limits the buffer of a new socket, 416 KiB by default, where
that of the former one may have grown to tcp_wmem's 4 MiB. So the helper, which may do so, gives a new socket a buffer
beyond this limit (`make_room`), which `restore` takes back. SO_BUF_LOCK (5.15) leaves the buffer to the kernel's own
management then. The original's helper gives none: there, bytes that were sent and do not fit end the connection. The
caller sends the bytes that were never sent, as the socket drains.
"""

from __future__ import annotations

import errno
import os
import socket
from struct import Struct
from typing import Any

from .. import PASST, addr
from ..calls import calls
from ..wire.migration import (
    FIN_ACKED,
    FIN_RECEIVED,
    FIN_SENT,
    OPTION_SACK,
    OPTION_TIMESTAMPS,
    OPTION_WSCALE,
    QUEUE_MAX,
    SocketState,
)
from ..wire.tcp import MASK
from . import tcpinfo
from .sockopt import SO_MEMINFO, SO_PEEK_OFF, setting

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_REPAIR_OPTIONS, TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 22, 24, 29
ON, OFF, OFF_WITHOUT_PROBE = 1, 0, -1  # of TCP_REPAIR
SUFFIX = ".repair"  # of the path of the helper's socket, behind that of the guest's
SOCKETS_MAX = 253  # of one message to the helper (SCM_MAX_FD of Linux)
_NO_QUEUE, _RECEIVE, _SEND = range(3)
_MSS, _WSCALE, _SACK, _TIMESTAMPS = 2, 3, 4, 8  # kinds of options (RFC 9293, 3.2)
_OPTION = Struct("=II")  # struct tcp_repair_opt
_WINDOW = Struct("=IIIII")  # struct tcp_repair_window
_U32 = Struct("=I")
SO_SNDBUFFORCE, SO_BUF_LOCK = 32, 72
_MAXSEG_MIN, _MAXSEG_MAX = 88, 32767  # of TCP_MAXSEG
IP_MINTTL, IPV6_MINHOPCOUNT = 21, 73
_FENCE = 255
_SNDBUF_MIN = 1 << 16  # bytes that a socket without any has room for, once the buffer of `make_room` is taken back
_CHUNK = 1 << 15  # bytes that the kernel takes in one buffer of a receive queue
_NOTSENT = 144  # tcpi_notsent_bytes
# tcpi_state (include/net/tcp_states.h)
_ESTABLISHED, _FIN_WAIT1, _FIN_WAIT2, _CLOSE, _CLOSE_WAIT, _LAST_ACK, _CLOSING = 1, 4, 5, 7, 8, 9, 11
_FINS = {
    _ESTABLISHED: 0,
    _FIN_WAIT1: FIN_SENT,
    _FIN_WAIT2: FIN_SENT | FIN_ACKED,
    _CLOSE_WAIT: FIN_RECEIVED,
    _LAST_ACK: FIN_RECEIVED | FIN_SENT,
    _CLOSING: FIN_RECEIVED | FIN_SENT,
}
_MIN_TTL = (socket.IPPROTO_IP, IP_MINTTL), (socket.IPPROTO_IPV6, IPV6_MINHOPCOUNT)  # by family
_TCP = socket.IPPROTO_TCP

CALLS = (
    *setting(*((_TCP, o) for o in (TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ, TCP_REPAIR_OPTIONS, TCP_TIMESTAMP)), mode=PASST),
    *setting((_TCP, TCP_REPAIR_WINDOW), (_TCP, socket.TCP_MAXSEG), *_MIN_TTL, mode=PASST),
    *setting(*((socket.SOL_SOCKET, o) for o in (socket.SO_SNDBUF, SO_BUF_LOCK)), mode=PASST),
    *setting(*((socket.SOL_SOCKET, o) for o in (SO_PEEK_OFF, socket.SO_REUSEADDR)), mode=PASST),
    *calls("sendto", "recvfrom", "shutdown", mode=PASST),
)


class NotMovable(Exception):
    """A connection that stays; its text says why."""


def fence(sock: Any) -> None:
    """Let the kernel discard all that comes for a socket. Raises OSError."""
    _set_fence(sock, _FENCE)


def lift_fence(sock: Any) -> None:
    """Let it in again. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _set_fence(sock, 0)


def _set_fence(sock: Any, value: int) -> None:
    """A socket of IPv6 may have a peer of IPv4 (`::ffff:192.0.2.1`), and has both limits."""
    sock.setsockopt(*_MIN_TTL[0], value)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(*_MIN_TTL[1], value)


# Reading -----------------------------------------------------------------------------------------------------------


def read(sock: Any, peer: tuple[bytes, int], *, peek_off: bool) -> SocketState:
    """The state of a socket in repair mode, which is connected to `peer`. Raises NotMovable or OSError.

    `peek_off`: it has an offset of peeks (SO_PEEK_OFF), which is off afterwards.
    """
    info = tcpinfo.tcp_info(sock)
    if info[0] not in _FINS:
        raise NotMovable(f"a socket in state {info[0]}")
    fins = _FINS[info[0]]
    if peek_off:
        sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    memory = tcpinfo.MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, tcpinfo.MEMINFO.size))
    snd_end, send_queue = _queue(sock, _SEND, memory[5])
    rcv_end, receive_queue = _queue(sock, _RECEIVE, memory[0])
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, _NO_QUEUE)
    wscale = info[6]
    waiting = fins & (FIN_SENT | FIN_ACKED) == FIN_SENT  # FIN, which has a number, is in the queue
    unsent = min(tcpinfo.u32(info, _NOTSENT), len(send_queue) + waiting)
    window = _WINDOW.unpack(sock.getsockopt(_TCP, TCP_REPAIR_WINDOW, _WINDOW.size))
    return SocketState(
        local=_end(sock.getsockname()),
        peer=peer,
        snd_seq=(snd_end - len(send_queue) - (1 if fins & FIN_SENT else 0)) & MASK,
        rcv_seq=(rcv_end - len(receive_queue)) & MASK,
        send_queue=send_queue,
        unsent=max(unsent - waiting, 0),
        receive_queue=receive_queue,
        fins=fins,
        mss=sock.getsockopt(_TCP, socket.TCP_MAXSEG),
        options=info[5] & (OPTION_TIMESTAMPS | OPTION_SACK | OPTION_WSCALE),
        snd_wscale=wscale & 15,
        rcv_wscale=wscale >> 4,
        timestamp=sock.getsockopt(_TCP, TCP_TIMESTAMP) & MASK,
        snd_wl1=window[0],
        snd_wnd=window[1],
        max_window=window[2],
        rcv_wnd=window[3],
        rcv_wup=window[4],
    )


def _queue(sock: Any, queue: int, memory: int) -> tuple[int, bytes]:
    """The number behind the last byte of a queue, and the bytes; `memory` is what the kernel charges for them."""
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, queue)
    end = sock.getsockopt(_TCP, TCP_QUEUE_SEQ) & MASK
    if memory > 4 * QUEUE_MAX:
        raise NotMovable(f"a queue of {memory} bytes")
    try:
        data: bytes = sock.recv(memory + 1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except BlockingIOError:
        data = b""
    if len(data) > min(memory, QUEUE_MAX):
        raise NotMovable(f"a queue of {len(data)} bytes")
    return end, data


def _end(sockaddr: tuple[Any, ...]) -> tuple[bytes, int]:
    """Packed address and port, of IPv4 for an address that stands for one."""
    return addr.unmapped(addr.packed(sockaddr[0].partition("%")[0])), sockaddr[1]


# Making ------------------------------------------------------------------------------------------------------------


def make_room(sock: Any) -> None:
    """For the helper: let a new socket have all that the former one may have had in flight, until `restore`.

    CAP_NET_ADMIN in another user namespace than the first one is not enough: net.core.wmem_max is the limit then.
    """
    if tcpinfo.tcp_info(sock)[0] == _CLOSE:
        try:
            sock.setsockopt(socket.SOL_SOCKET, SO_SNDBUFFORCE, QUEUE_MAX)
        except PermissionError:
            pass


def restore(sock: Any, state: SocketState, local: Any, peer: Any) -> int:
    """Connect a new socket, which is in repair mode, between the addresses `local` and `peer`, for bind(2) and
    connect(2), as `state` has it. Returns how many bytes its send queue has.

    Raises OSError: EADDRNOTAVAIL where the address is not on this host, ENOBUFS where it has no room for what was sent.
    """
    sock.bind(local)
    sock.setsockopt(_TCP, socket.TCP_MAXSEG, min(max(state.mss, _MAXSEG_MIN), _MAXSEG_MAX))
    acked_fin = state.fins & FIN_ACKED
    for queue, number in ((_SEND, state.snd_seq), (_RECEIVE, state.rcv_seq)):
        sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, queue)
        sock.setsockopt(_TCP, TCP_QUEUE_SEQ, _U32.pack(number))
    sock.connect(peer)
    options = [_OPTION.pack(_MSS, state.mss)]
    if state.options & OPTION_WSCALE:
        options.append(_OPTION.pack(_WSCALE, state.snd_wscale | state.rcv_wscale << 16))
    if state.options & OPTION_SACK:
        options.append(_OPTION.pack(_SACK, 0))
    if state.options & OPTION_TIMESTAMPS:
        options.append(_OPTION.pack(_TIMESTAMPS, 0))
    sock.setsockopt(_TCP, TCP_REPAIR_OPTIONS, b"".join(options))
    if state.options & OPTION_TIMESTAMPS:
        sock.setsockopt(_TCP, TCP_TIMESTAMP, _U32.pack(state.timestamp))
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, _RECEIVE)
    if _fill(sock, state.receive_queue) < len(state.receive_queue):
        raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
    sock.setsockopt(_TCP, TCP_REPAIR_QUEUE, _SEND)
    total, queued = len(state.send_queue), 0
    if sent := state.send_queue[: total - _kept_back(state)]:
        _enlarge(sock, total)
        queued = _fill(sock, sent)
        if queued < total - state.unsent:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) > QUEUE_MAX:
        _limit(sock, max(total, _SNDBUF_MIN))
    if state.fins & FIN_SENT and (acked_fin or queued == total):
        sock.shutdown(socket.SHUT_WR)
    window = _WINDOW.pack(state.snd_wl1, state.snd_wnd, state.max_window, state.rcv_wnd, state.rcv_wup)
    sock.setsockopt(_TCP, TCP_REPAIR_WINDOW, window)
    return queued


def _kept_back(state: SocketState) -> int:
    """Bytes at the end of the send queue that the former socket cannot have sent, also not since it was read."""
    return min(state.unsent, max(len(state.send_queue) - state.snd_wnd, 0))


def _fill(sock: Any, data: bytes | memoryview) -> int:
    """Put bytes into the queue that is chosen; how many it has taken. Raises OSError."""
    view = memoryview(data)
    try:
        while view:
            view = view[sock.send(view[:_CHUNK], socket.MSG_DONTWAIT) :]
    except BlockingIOError:
        pass  # it is full
    return len(data) - len(view)


def _enlarge(sock: Any, size: int) -> None:
    """See that the send buffer holds `size` bytes, as far as net.core.wmem_max allows it. Raises OSError."""
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) < 2 * size:
        _limit(sock, size)


def _limit(sock: Any, size: int) -> None:
    """Have a send buffer for `size` bytes or what net.core.wmem_max allows. Raises OSError."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size + (size >> 1))  # the kernel doubles it
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_BUF_LOCK, 0)
    except OSError:
        pass  # before 5.15 the buffer stays as it is


def finish(sock: Any, state: SocketState, queued: int) -> bytes:
    """The socket has left repair mode, with so many bytes `queued`: send the others, and FIN behind them.

    Returns bytes that it has no room for; they are to be sent later, and FIN with them. Raises OSError.
    """
    left = memoryview(state.send_queue)[queued:]
    if not left:
        return b""
    _enlarge(sock, len(state.send_queue))
    rest = bytes(left[_fill(sock, left) :])
    if state.fins & FIN_SENT and not rest:
        sock.shutdown(socket.SHUT_WR)
    return rest
