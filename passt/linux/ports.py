"""Which ports are bound in a network namespace: /proc/net/{tcp,tcp6,udp,udp6}, opened once and read again and again.

A line of these files (proc(5)); addresses in host order, ports as they are read, all in hexadecimal:

      sl  local_address rem_address   st tx_queue rx_queue ...
       0: 00000000:1F90 00000000:0000 0A 00000000:00000000 ...

    file         state  that is
    -----------  -----  ------------------------------------------
    tcp, tcp6    0A     TCP_LISTEN
    udp, udp6    07     TCP_CLOSE: bound, and not connected to one peer

A file belongs to the namespace of the thread that opened it for as long as it is open, whoever reads it, so neither
a path nor a thread inside is needed later. The kernel writes listening TCP sockets before all others, and the first
other one ends the reading: ten thousand connections cost nothing. UDP has no such order. A line costs about 2 us,
nearly all of it in the kernel, and an empty table 10 us.
"""

from __future__ import annotations

import os
import re

from ..wire.checksum import PROTO_TCP, PROTO_UDP

THREAD_NET = "/proc/thread-self/net"  # /proc/net is that of the process's first thread

_FILES = {PROTO_TCP: ("tcp", "tcp6"), PROTO_UDP: ("udp", "udp6")}
_LINE = rb"^ *\d+: [0-9A-F]+:([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]{4} "
_BOUND = {
    PROTO_TCP: re.compile(_LINE + rb"0A ", re.MULTILINE),
    PROTO_UDP: re.compile(_LINE + rb"07 ", re.MULTILINE),
}
_NOT_LISTENING = re.compile(_LINE + rb"(?!0A)[0-9A-F]{2} ")
_READ_SIZE = 65536  # the kernel gives a page or so at a time


def parse(proto: int, text: bytes) -> set[int]:
    """Ports that are bound, in the text of a file of protocol `proto`. Lines of any other shape say nothing."""
    return {int(port, 16) for port in _BOUND[proto].findall(text)} - {0}


class PortTables:
    """The tables of the namespace that the calling thread is in. Raises OSError if there is no /proc."""

    def __init__(self, directory: str = THREAD_NET) -> None:
        self._fds: dict[int, list[int]] = {}
        for proto, names in _FILES.items():
            fds = self._fds[proto] = []
            for name in names:
                try:
                    fds.append(os.open(f"{directory}/{name}", os.O_RDONLY | os.O_CLOEXEC))
                except FileNotFoundError:
                    if not name.endswith("6"):  # a kernel without IPv6 lacks those
                        self.close()
                        raise

    def bound(self, proto: int) -> set[int]:
        """Ports that are bound now. Raises OSError."""
        return {port for fd in self._fds[proto] for port in parse(proto, _read(fd, proto))}

    def close(self) -> None:
        """Close the files."""
        for fds in self._fds.values():
            while fds:
                os.close(fds.pop())


def _read(fd: int, proto: int) -> bytes:
    """The part of a file that matters."""
    parts = []
    offset = 0
    while part := os.pread(fd, _READ_SIZE, offset):
        parts.append(part)
        offset += len(part)
        if proto == PROTO_TCP and _NOT_LISTENING.match(part[part.rfind(b"\n", 0, -1) + 1 :]):
            break
    return b"".join(parts)
