"""Domain names as bytes (RFC 1035, 3.1 and 4.1.4), for search lists: DHCP (RFC 3397), DHCPv6 (RFC 3646), RA (RFC 8106).

Text is ASCII with dots between labels; a dot at the end is the root, which every encoded name ends with anyway.
DHCP compresses: a name may end in a pointer, 0xc000 plus the offset in the list of an earlier occurrence of its rest.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..drops import Drop
from .cursor import Malformed

LABEL_MAX = 63
NAME_MAX = 255
POINTER = 0xC0
OFFSET_MAX = 0x3FFF


def labels(name: str) -> list[bytes]:
    """The labels of `name`; raises ValueError if it is not a domain name."""
    text = name.removesuffix(".")
    try:
        found = [label.encode("ascii") for label in text.split(".")] if text else []
    except UnicodeEncodeError:
        raise ValueError(f"not an ASCII domain name: {name}") from None
    if not found or any(not 0 < len(label) <= LABEL_MAX for label in found):
        raise ValueError(f"not a domain name: {name}")
    if sum(map(len, found)) + len(found) + 1 > NAME_MAX:
        raise ValueError(f"domain name too long: {name}")
    return found


def is_name(text: str) -> bool:
    """Whether `text` can be encoded, and printed without escapes."""
    try:
        return bool(labels(text)) and text.isprintable() and " " not in text
    except ValueError:
        return False


def encode(name: str) -> bytes:
    """One name, without compression; raises ValueError if it is not a domain name."""
    return b"".join(bytes((len(label),)) + label for label in labels(name)) + b"\0"


def encode_list(names: Iterable[str]) -> bytes:
    """Names one after the other, without compression."""
    return b"".join(map(encode, names))


def leading(names: Iterable[str], room: int) -> tuple[str, ...]:
    """As many names from the front as take no more than `room` bytes together, without compression."""
    found = []
    for name in names:
        room -= len(encode(name))
        if room < 0:
            break
        found.append(name)
    return tuple(found)


def compress_list(names: Iterable[str]) -> bytes:
    """Names one after the other, with pointers to earlier ones (RFC 3397, section 2)."""
    out = bytearray()
    seen: dict[tuple[bytes, ...], int] = {}
    for name in names:
        left = tuple(labels(name))
        while left and left not in seen:
            if len(out) <= OFFSET_MAX:
                seen[left] = len(out)
            out.append(len(left[0]))
            out += left[0]
            left = left[1:]
        out += (POINTER << 8 | seen[left]).to_bytes(2, "big") if left else b"\0"
    return bytes(out)


def _name_at(data: bytes, pos: int, compressed: bool) -> tuple[str, int]:
    """The name at `pos` and the position after it. Pointers lead back, and are no more than labels: the walk ends."""
    found: list[str] = []
    length, after, floor = 1, -1, pos
    for _ in range(NAME_MAX):
        if pos >= len(data):
            raise Malformed(Drop.NAME_TRUNCATED)
        size = data[pos]
        pos += 1
        if size >= POINTER:
            if not compressed:
                raise Malformed(Drop.NAME_COMPRESSED)
            if pos >= len(data):
                raise Malformed(Drop.NAME_TRUNCATED)
            target = (size & ~POINTER) << 8 | data[pos]
            after = pos + 1 if after < 0 else after
            if target >= floor:
                raise Malformed(Drop.NAME_POINTER)
            pos = floor = target
            continue
        if size > LABEL_MAX:
            raise Malformed(Drop.NAME_LABEL)
        if size == 0:
            return ".".join(found), pos if after < 0 else after
        label = data[pos : pos + size]
        length += 1 + size
        if len(label) < size:
            raise Malformed(Drop.NAME_TRUNCATED)
        if length > NAME_MAX:
            raise Malformed(Drop.NAME_TOO_LONG)
        if not label.isascii() or b"." in label:
            raise Malformed(Drop.NAME_NOT_TEXT)
        found.append(label.decode("ascii"))
        pos += size
    raise Malformed(Drop.NAME_POINTERS)


def decode_list(data: bytes, *, compressed: bool = True) -> tuple[str, ...]:
    """The names of a list, which may be `compressed`; empty ones are padding (RFC 8106, 5.2). Raises Malformed."""
    names = []
    pos = 0
    while pos < len(data):
        name, pos = _name_at(data, pos, compressed)
        if name:
            names.append(name)
    return tuple(names)
