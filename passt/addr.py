"""Addresses as packed bytes: 4 (IPv4) or 16 (IPv6). Tests and text; `ipaddress` objects stay in the configuration."""

from __future__ import annotations

import socket
from typing import Final

ANY4: Final[bytes] = bytes(4)
ANY6: Final[bytes] = bytes(16)
BROADCAST4: Final = b"\xff" * 4
LOOPBACK4: Final = b"\x7f\x00\x00\x01"
LOOPBACK6: Final = bytes(15) + b"\x01"
ALL_NODES6: Final = bytes.fromhex("ff020000000000000000000000000001")
BROADCAST_MAC: Final[bytes] = b"\xff" * 6
V4_MAPPED_PREFIX: Final = bytes(10) + b"\xff\xff"


def is_loopback(a: bytes) -> bool:
    """127.0.0.0/8, ::1, and 127.0.0.0/8 mapped into IPv6."""
    if len(a) == 4:
        return a[0] == 127
    return a == LOOPBACK6 or (a[:12] == V4_MAPPED_PREFIX and a[12] == 127)


def is_martian(a: bytes) -> bool:
    """An address that no packet on a link may have (RFC 1812, 5.3.7): loopback, or IPv4 mapped into IPv6.

    The latter is the notation of IPv4 addresses between a program and its own kernel (RFC 4291, 2.5.5.2):
    ::ffff:127.0.0.1 is its loopback, too.
    """
    return is_loopback(a) or a[:12] == V4_MAPPED_PREFIX


def unmapped(a: bytes) -> bytes:
    """The IPv4 address that is mapped into an IPv6 one (RFC 4291, 2.5.5.2), or else `a` itself."""
    return a[12:] if a[:12] == V4_MAPPED_PREFIX else a


def is_unspecified(a: bytes) -> bool:
    return not any(a)


def is_multicast(a: bytes) -> bool:
    """224.0.0.0/4 (RFC 5771), ff00::/8 (RFC 4291, 2.7)."""
    return a[0] >> 4 == 0xE if len(a) == 4 else a[0] == 0xFF


def is_link_local(a: bytes) -> bool:
    """169.254.0.0/16 (RFC 3927), fe80::/10 (RFC 4291, 2.5.6)."""
    if len(a) == 4:
        return a[:2] == b"\xa9\xfe"
    return a[0] == 0xFE and a[1] & 0xC0 == 0x80


def is_unicast(a: bytes) -> bool:
    """An address that an endpoint of a connection can have: not unspecified, multicast or limited broadcast."""
    return any(a) and not is_multicast(a) and a != BROADCAST4


def family(a: bytes) -> socket.AddressFamily:
    return socket.AF_INET if len(a) == 4 else socket.AF_INET6


def text(a: bytes) -> str:
    return socket.inet_ntop(family(a), a)


def packed(s: str) -> bytes:
    """4 or 16 bytes of the textual address; raises ValueError."""
    try:
        return socket.inet_pton(socket.AF_INET6 if ":" in s else socket.AF_INET, s)
    except OSError:
        raise ValueError(f"not an IP address: {s}") from None


def host_port(a: bytes, port: int) -> str:
    """addr:port, with brackets where the address has colons of its own (RFC 5952, 6)."""
    return f"{text(a)}:{port}" if len(a) == 4 else f"[{text(a)}]:{port}"


def mac_text(mac: bytes) -> str:
    return mac.hex(":")


def netmask(prefix_len: int) -> bytes:
    """The IPv4 mask of a prefix length, 4 bytes."""
    return ((0xFFFFFFFF << (32 - prefix_len)) & 0xFFFFFFFF).to_bytes(4, "big")


def in_subnet(a: bytes, net: bytes, prefix_len: int) -> bool:
    """Whether `a` and `net`, of one family, share their first `prefix_len` bits."""
    shift = len(a) * 8 - prefix_len
    return int.from_bytes(a, "big") >> shift == int.from_bytes(net, "big") >> shift
