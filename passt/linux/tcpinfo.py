"""What the kernel tells about a TCP socket: TCP_INFO and SO_MEMINFO, and what this kernel lacks of it.

struct tcp_info (include/uapi/linux/tcp.h) only ever grew at its end, so a field exists if the kernel returned enough
bytes. Every field used here has a fallback where it is used; `HAS` is probed once by `probe` and may be replaced by a
test to hide a field.

    field              offset  size  since
    tcpi_state              0     1  2.4
    tcpi_snd_cwnd          80     4  2.4
    tcpi_bytes_acked      120     8  4.1
    tcpi_min_rtt          148     4  4.6
    tcpi_snd_wnd          228     4  5.4
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from struct import Struct
from typing import Any

SO_PEEK_OFF = 42
SO_MEMINFO = 55
TCP_INFO_LEN = 232

_U32 = Struct("=I")
_U64 = Struct("=Q")
_MEMINFO = Struct("=9I")  # include/uapi/linux/sock_diag.h, SK_MEMINFO_*: [3] sndbuf, [5] wmem_queued

BYTES_ACKED, MIN_RTT, SND_WND = 120, 148, 228
TCP_CLOSE = 7  # tcpi_state, include/net/tcp_states.h


@dataclass(frozen=True, slots=True)
class Features:
    """What the kernel offers on TCP sockets."""

    bytes_acked: bool = True
    min_rtt: bool = True
    snd_wnd: bool = True
    peek_off: bool = True
    meminfo: bool = True


def probe() -> Features:
    """Ask a socket of the running kernel."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as s:
        n = len(s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_LEN))
        return Features(
            bytes_acked=n >= BYTES_ACKED + 8,
            min_rtt=n >= MIN_RTT + 4,
            snd_wnd=n >= SND_WND + 4,
            peek_off=_works(s, lambda: s.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)),
            meminfo=_works(s, lambda: s.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size)),
        )


def _works(s: socket.socket, call: Any) -> bool:
    try:
        call()
    except OSError:
        return False
    return True


def tcp_info(sock: Any) -> bytes:
    """The raw structure, as long as the kernel has it (at most TCP_INFO_LEN). Raises OSError."""
    info: bytes = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, TCP_INFO_LEN)
    return info


def is_closed(sock: Any) -> bool:
    """Whether a socket that was connected is so no more: reset, or at its end in both directions. Raises OSError."""
    return bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE)


def u32(info: bytes, offset: int) -> int:
    value: int = _U32.unpack_from(info, offset)[0]
    return value


def u64(info: bytes, offset: int) -> int:
    value: int = _U64.unpack_from(info, offset)[0]
    return value


def send_buffer(sock: Any, features: Features) -> tuple[int, int]:
    """(size, used) of the send buffer in bytes of kernel memory. Raises OSError.

    Without SO_MEMINFO the use is unknown: half of the buffer is taken as used, which promises less than there is.
    """
    if features.meminfo:
        m = _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size))
        return m[3], m[5]
    size: int = sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    return size, size // 2
