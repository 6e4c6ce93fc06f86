"""State of a TCP socket in the kernel: TCP_INFO and SO_MEMINFO, and a probe for missing fields.

struct tcp_info (include/uapi/linux/tcp.h) has only grown at its end, so a field exists if the kernel returns enough
bytes. Each field used here has a fallback where it is used. `probe` runs once; a test may replace its result to hide a
field.

    field              offset  size  since
    tcpi_state              0     1  2.4
    tcpi_last_data_sent    44     4  2.4
    tcpi_last_data_recv    52     4  2.4
    tcpi_last_ack_recv     56     4  2.4
    tcpi_rtt               68     4  2.4
    tcpi_snd_cwnd          80     4  2.4
    tcpi_total_retrans    100     4  2.6.16
    tcpi_bytes_acked      120     8  4.1
    tcpi_bytes_received   128     8  4.1
    tcpi_min_rtt          148     4  4.6
    tcpi_snd_wnd          228     4  5.4
"""

from __future__ import annotations

import socket
from struct import Struct
from typing import Any, Final

from ..lean.records import dataclass
from .sockopt import SO_MEMINFO, SO_PEEK_OFF

TCP_INFO_LEN: Final = 232
MEMINFO: Final = Struct("=9I")  # include/uapi/linux/sock_diag.h, SK_MEMINFO_*: [3] sndbuf, [5] wmem_queued

_U32: Final = Struct("=I")
_U64: Final = Struct("=Q")

LAST_DATA_SENT, LAST_DATA_RECV, LAST_ACK_RECV, RTT, TOTAL_RETRANS = 44, 52, 56, 68, 100
BYTES_ACKED, BYTES_RECEIVED, NOTSENT_BYTES, MIN_RTT, SND_WND = 120, 128, 144, 148, 228
TCP_SYN_SENT: Final = 2  # tcpi_state, include/net/tcp_states.h
TCP_CLOSE: Final = 7


@dataclass(frozen=True, slots=True)
class Features:
    """Features of TCP sockets of the running kernel."""

    bytes_acked: bool = True
    min_rtt: bool = True
    snd_wnd: bool = True
    peek_off: bool = True
    meminfo: bool = True


def probe() -> Features:
    """Probe the running kernel with a socket."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        n = len(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_LEN))
        return Features(
            bytes_acked=n >= BYTES_ACKED + 8,
            min_rtt=n >= MIN_RTT + 4,
            snd_wnd=n >= SND_WND + 4,
            peek_off=_works(s, lambda: s.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)),
            meminfo=_works(s, lambda: s.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size)),
        )


def _works(s: socket.socket, call: Any) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def tcp_info(sock: Any) -> bytes:
    """The raw structure, in the length of the kernel (at most TCP_INFO_LEN). Raises OSError."""
    info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_LEN)
    return info


@dataclass(frozen=True, slots=True)
class Details:
    """Figures of a socket for users. None: the kernel lacks the field, or has no measurement yet.

    `acked` and `received` count SYN and FIN as a byte each, if these were acknowledged and received: all except the SYN
    of an accepted socket, and the peer's.
    """

    rtt: float | None  # s
    retransmits: int
    idle: float  # s since data was last sent or received
    acked: int | None  # bytes that the peer has acknowledged
    received: int | None  # bytes that came in order

    @classmethod
    def parse(cls, info: bytes) -> Details:
        """From TCP_INFO."""
        return cls(
            rtt=u32(info, RTT) / 1e6 or None,
            retransmits=u32(info, TOTAL_RETRANS),
            idle=min(u32(info, LAST_DATA_SENT), u32(info, LAST_DATA_RECV)) / 1e3,
            acked=u64(info, BYTES_ACKED) if len(info) >= BYTES_ACKED + 8 else None,
            received=u64(info, BYTES_RECEIVED) if len(info) >= BYTES_RECEIVED + 8 else None,
        )


def details(sock: Any) -> Details | None:
    """The figures of a socket; None if it has none any more."""
    try:
        return Details.parse(tcp_info(sock))
    except OSError:
        return None


def is_closed(sock: Any) -> bool:
    """Whether a socket is no longer connected: reset, or closed in both directions. Raises OSError."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE)


def unsent(sock: Any) -> int:
    """Bytes in the send queue that were never sent; 0 before kernel 4.6, which does not say. Raises OSError."""
    info = tcp_info(sock)
    return u32(info, NOTSENT_BYTES) if len(info) >= NOTSENT_BYTES + 4 else 0


def is_connected(sock: Any) -> bool:
    """Whether a connection that connect(2) began is established, or has been and is open still. Raises OSError."""
    state: int = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
    return state != TCP_SYN_SENT and state != TCP_CLOSE


def u32(info: bytes, offset: int) -> int:
    value: int = _U32.unpack_from(info, offset)[0]
    return value


def u64(info: bytes, offset: int) -> int:
    value: int = _U64.unpack_from(info, offset)[0]
    return value


def send_buffer(sock: Any, features: Features) -> tuple[int, int]:
    """(size, used) of the send buffer in bytes of kernel memory. Raises OSError.

    Without SO_MEMINFO the use is unknown and half of the buffer is assumed, which is conservative.
    """
    if features.meminfo:
        m = MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, MEMINFO.size))
        return m[3], m[5]
    size: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return size, size // 2
