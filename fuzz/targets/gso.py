"""Segmentation and checksums in software: a super-frame of any size, cut at any size, for TCP and UDP of both families.

Invariants: the segments are as many as there must be, none longer than asked for, together exactly the payload, in
order; lengths, sequence numbers, ids and flags are those of each; every checksum adds up; nothing is written behind.
"""

from __future__ import annotations

from collections.abc import Iterable

from fuzz.steps import Steps
from fuzz.targets.builders import total
from passt.link.gso import FRAME_MIN, Gso
from passt.wire import ether, ip
from passt.wire.checksum import PROTO_TCP, PROTO_UDP, checksum, pseudo_sum
from passt.wire.tcp import HEADER
from passt.wire.virtio import F_NEEDS_CSUM, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, VNET

SIZE = 1 << 18
OUT = memoryview(bytearray(SIZE))
GSO = Gso(OUT)
MAC = b"\x52\x54\0\x12\x34\x56"
ENDS = {4: (b"\xc0\0\2\1", b"\xc0\0\2\2"), 16: (b"\xfe\x80" + bytes(13) + b"\1", b"\x20\1\x0d\xb8" + bytes(12))}
DATA = bytes(i * 89 + (i >> 8) * 7 & 0xFF for i in range(1 << 16)) + b"\xff" * (1 << 12)
AT = 40


def seeds() -> Iterable[bytes]:
    for kind in range(4):
        yield bytes((kind, 0, 100, 0, 30)) + bytes(16)
        yield bytes((kind, 0x20, 0, 5, 0xB4, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xF0, 9, 9))
        yield bytes((kind, 0xFF, 0xFF, 0x05, 0xB4)) + bytes(8)


def header(v4: bool, tcp: bool, payload: int, size: int, seq: int, ident: int, flags: int) -> bytes:
    """The headers of a super-frame, as the services write them."""
    src, dst = ENDS[4 if v4 else 16]
    proto, l4_len = (PROTO_TCP, 20) if tcp else (PROTO_UDP, 8)
    length = l4_len + payload
    head = ip.header(src, dst, proto, length)
    if v4:
        fields = (ip.VERSION_IHL4, 0, ip.HEADER4.size + length, ident, 0, ip.TTL, proto)
        head = ip.HEADER4.pack(*fields, checksum(ip.HEADER4.pack(*fields, 0, src, dst)), src, dst)
    partial = pseudo_sum(src, dst, proto, length)
    if tcp:
        l4 = HEADER.pack(80, 40000, seq, 7, 5 << 12 | flags, 500, partial, 0)
    else:
        l4 = b"\0\x50\x9c\x40" + length.to_bytes(2, "big") + partial.to_bytes(2, "big")
    gso = GSO_NONE if payload <= size else GSO_UDP_L4 if not tcp else GSO_TCPV4 if v4 else GSO_TCPV6
    start = 14 + len(head)
    vnet = VNET.pack(F_NEEDS_CSUM, gso, start + l4_len, size if gso else 0, start, 16 if tcp else 6)
    return vnet + ether.HEADER.pack(MAC, MAC, ether.TYPE_IPV4 if v4 else ether.TYPE_IPV6) + head + l4


def one(data: bytes) -> None:
    steps = Steps(data)
    kind = steps.byte()
    v4, tcp = bool(kind & 1), bool(kind & 2)
    l4 = 34 if v4 else 54
    front = l4 + (20 if tcp else 8)
    payload = steps.word()
    payload = (payload & 0x1FFF if payload & 0xE000 != 0xE000 else payload % (65535 - front + 14 + 1)) or 1
    size = steps.word() % 9000 or 1
    if payload // size > 10:  # each is looked at
        size = payload // 10
    seq, ident, flags, where = steps.word() << 16 | steps.word(), steps.word(), steps.byte() & 0x3F, steps.byte()
    content = DATA[where * 8 : where * 8 + payload]
    payload = len(content)
    hdr = header(v4, tcp, payload, size, seq, ident, flags)
    end_mark = 0xA5
    count = -(-payload // size)
    last = payload - (count - 1) * size
    end = AT + (count - 1) * (4 + max(front + size, FRAME_MIN)) + 4 + max(front + last, FRAME_MIN)
    OUT[AT - 1], OUT[end] = end_mark, end_mark
    if count > 1:
        assert GSO.cut(AT, hdr, content) == end
    else:
        GSO.frame(AT, front + payload, (hdr, content))
    assert OUT[AT - 1] == OUT[end] == end_mark
    at, taken = AT, 0
    for i in range(count):
        length = int.from_bytes(OUT[at : at + 4], "big")
        frame = bytes(OUT[at + 4 : at + 4 + length])
        at += 4 + length
        n = min(size, payload - taken)
        assert length == max(front + n, FRAME_MIN)
        frame, padding = frame[: front + n], frame[front + n :]
        assert not any(padding)
        assert frame[front:] == content[taken : taken + n]
        check(frame, v4, tcp, l4, (seq + taken) & 0xFFFFFFFF, (ident + i) & 0xFFFF)
        if tcp:
            assert frame[l4 + 13] == (flags if i == count - 1 else flags & ~9)
        taken += n
    assert at == end and taken == payload


def check(frame: bytes, v4: bool, tcp: bool, l4: int, seq: int, ident: int) -> None:
    proto = PROTO_TCP if tcp else PROTO_UDP
    message = frame[l4:]
    if v4:
        assert total(frame[14:34]) == 0xFFFF and int.from_bytes(frame[16:18], "big") == len(frame) - 14
        assert int.from_bytes(frame[18:20], "big") == ident
        pseudo = frame[26:34]
    else:
        assert int.from_bytes(frame[18:20], "big") == len(message)
        pseudo = frame[22:54]
    if tcp:
        assert int.from_bytes(message[4:8], "big") == seq
    else:
        assert int.from_bytes(message[4:6], "big") == len(message)
        if v4:
            assert message[6:8] == b"\0\0"
            return
        assert message[6:8] != b"\0\0"
    assert total(pseudo + proto.to_bytes(2, "big") + len(message).to_bytes(2, "big") + message) == 0xFFFF
