"""/etc/resolv.conf.

Invariants: any text gives servers and a search list: servers are addresses, names can be encoded and printed.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt import addr
from passt.conf.resolv_conf import parse
from passt.wire import domain


def seeds() -> Iterable[bytes]:
    yield b"nameserver 192.0.2.53\nsearch example.org a.example\noptions edns0 trust-ad\n"
    yield b"# comment\nnameserver fe80::1%eth0\nnameserver ::ffff:127.0.0.53\nsearch .\n"


def one(data: bytes) -> None:
    found = parse(data.decode("utf-8", "replace"))
    for server in found.servers:
        assert len(server) in (4, 16) and addr.packed(addr.text(server)) == server
    for name in found.search:
        assert domain.encode(name) and name.isprintable()
