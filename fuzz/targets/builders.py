"""Frames that we build of any content: UDP, ICMP errors, neighbour discovery, in Ethernet and IP of both families.

Invariants: lengths in the headers are those of the frame; every checksum adds up; an ICMP error fits into what every
host can receive, and quotes the beginning of the packet.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt.wire import ether, icmp
from passt.wire.checksum import PROTO_ICMP, PROTO_ICMPV6, PROTO_UDP

MAC = b"\x52\x54\0\x12\x34\x56"


def seeds() -> Iterable[bytes]:
    for kind in range(8):
        yield bytes((kind,)) + bytes(range(32)) + bytes(range(40))
    yield b"\1" + b"\xff" * 32 + b"\xff\xff"


def total(data: bytes) -> int:
    """The ones' complement sum of 16-bit words: the whole as one number, modulo 0xFFFF (RFC 1071, 2)."""
    number = int.from_bytes(data, "big") << 8 * (len(data) & 1)
    return number % 0xFFFF or (0xFFFF if number else 0)


def check(frame: bytes, v4: bool, proto: int, payload: int) -> bytes:
    """The transport message in a frame."""
    assert frame[:12] == MAC + MAC
    assert frame[12:14] == (b"\x08\0" if v4 else b"\x86\xdd")
    if v4:
        head, message = frame[14:34], frame[34:]
        assert int.from_bytes(head[2:4], "big") == len(head) + len(message) and total(head) == 0xFFFF
        assert head[9] == proto
        pseudo = head[12:] if proto != PROTO_ICMP else b""
    else:
        head, message = frame[14:54], frame[54:]
        assert int.from_bytes(head[4:6], "big") == len(message) and head[6] == proto
        pseudo = head[8:]
    assert len(message) == payload
    if pseudo:
        pseudo += proto.to_bytes(2, "big") + payload.to_bytes(2, "big")
    assert total(pseudo + message) == 0xFFFF
    return message


def one(data: bytes) -> None:
    if len(data) < 33:
        return
    kind, n = data[0], 4 if data[0] & 1 else 16
    v4 = n == 4
    src, dst, rest = data[1 : 1 + n], data[17 : 17 + n], data[33:]
    if kind & 2:
        frame = ether.udp_frame(MAC, MAC, src, dst, data[5], data[6] << 8, rest)
        assert check(frame, v4, PROTO_UDP, 8 + len(rest))[8:] == rest
        return
    if kind & 4 and not v4:
        message = bytes((data[7], data[8], 0, 0)) + rest
        frame = ether.icmp6_frame(MAC, MAC, src, dst, message)
        assert check(frame, v4, PROTO_ICMPV6, len(message))[4:] == rest
        return
    packet = icmp.quote_udp(dst, src, data[5], data[6], rest * (data[7] // 16))
    error = icmp.too_big(src, dst, data[9] << 12, packet) if kind & 8 else icmp.port_unreachable(src, dst, packet)
    frame = ether.ip_frame(MAC, MAC, src, dst, icmp.protocol(src), error)
    assert packet.startswith(check(frame, v4, icmp.protocol(src), len(error))[8:])
    assert len(frame) - 14 <= (icmp.ERROR_MAX4 if v4 else icmp.ERROR_MAX6)
