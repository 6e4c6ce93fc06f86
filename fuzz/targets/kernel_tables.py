"""Tables and events of the kernel: sock_diag messages, the files under /proc/net, inotify events.

Invariants: any bytes give ports or an `OSError` that the kernel meant; ports are of 16 bits, never 0 in a file;
addresses are of 127/8; names of inotify events have no zero byte at their end and lie inside the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from passt.linux import from_kernel, inotify, ports
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

LINE = b"   0: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 639 1 0 100 0\n"


def seeds() -> Iterable[bytes]:
    yield b"\0" + LINE + LINE.replace(b"0A", b"07").replace(b"0100007F", b"3500007F")
    message = Struct("=IHHIIBBBBHH4s12x").pack(40, 20, 2, 1, 0, 2, 10, 0, 0, 0x1600, 0, b"\x7f\0\0\x35")
    yield b"\1" + message + Struct("=IHHII").pack(16, from_kernel.NLMSG_DONE, 2, 1, 0)
    yield b"\1" + Struct("=IHHIIi").pack(20, from_kernel.NLMSG_ERROR, 2, 1, 0, -2)
    yield b"\2" + Struct("=iIII").pack(1, 2, 0, 16) + b"resolv.conf".ljust(16, b"\0")


def one(data: bytes) -> None:
    kind, data = data[:1], data[1:]
    pinned: ports.Pinned = set()
    found: set[int] = set()
    if kind == b"\0":
        for proto in (PROTO_TCP, PROTO_UDP):
            found |= ports.parse(proto, data, pinned)
        assert 0 not in found
    elif kind == b"\1":
        try:
            ports.parse_diag(data, 1, found, pinned)
        except OSError as e:
            assert "sock_diag" in str(e)
    else:
        for event in inotify.parse(data):
            assert not event.name.endswith("\0") and len(event.name) <= len(data)
    assert all(0 <= port <= 0xFFFF for port in found)
    assert all(address[0] == 127 and len(address) == 4 and 0 <= port <= 0xFFFF for address, port in pinned)
