"""Lists of domain names, compressed and not.

Invariants: decoding gives names or `Malformed`; every name can be encoded again, in both ways, and is decoded as the
same.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import domain
from passt.wire.cursor import Malformed


def seeds() -> Iterable[bytes]:
    yield domain.compress_list(("example.org", "a.example.org", "b.a.example.org", "other.net"))
    yield domain.encode_list(("example.org", "x")) + bytes(5)
    yield b"\x3f" + b"x" * 63 + b"\0\xc0\0"


def one(data: bytes) -> None:
    try:
        names = domain.decode_list(data)
    except Malformed:
        return
    assert all(names)
    assert domain.decode_list(domain.encode_list(names)) == names
    if len(names) < 20:
        assert domain.decode_list(domain.compress_list(names)) == names
