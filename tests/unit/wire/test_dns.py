"""DNS messages are known by their look: queries of resolvers are, and hardly anything else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.dns import DNS, DNSQR, DNSRROPT

from passt.wire.dns import HEADER, is_answer, query_ident

QUERY = bytes(DNS(id=0x1234, rd=1, qd=DNSQR(qname="www.example.org", qtype="AAAA")))
EDNS = bytes(DNS(id=7, rd=1, ad=1, qd=DNSQR(qname="example.org"), ar=DNSRROPT(rclass=1232)))
ROOT = bytes(DNS(id=0, rd=0, qd=DNSQR(qname=".", qtype="NS")))


@pytest.mark.parametrize(("message", "ident"), [(QUERY, 0x1234), (EDNS, 7), (ROOT, 0)])
def test_queries(message: bytes, ident: int) -> None:
    assert query_ident(message) == query_ident(memoryview(message)) == ident


@pytest.mark.parametrize(
    "message",
    [
        b"",
        QUERY[:11],
        QUERY[:12],
        QUERY[:-1],
        QUERY + b"\0",
        bytes(DNS(id=1, qr=1, qd=DNSQR(qname="example.org"))),
        bytes(DNS(id=1, opcode=5, qd=DNSQR(qname="example.org"))),
        bytes(DNS(id=1, rcode=3, qd=DNSQR(qname="example.org"))),
        bytes(DNS(id=1, qd=[DNSQR(qname="example.org"), DNSQR(qname="example.net")])),
        HEADER.pack(1, 0x100, 1, 0, 0, 0) + b"\xc0\x0c" + bytes(4),
        HEADER.pack(1, 0x100, 1, 0, 0, 0) + b"\x3f" + bytes(4),
        HEADER.pack(1, 0x100, 1, 0, 0, 0) + 5 * (b"\x3f" + 63 * b"a") + bytes(5),
        HEADER.pack(1, 0x100, 1, 0, 0, 1) + bytes(5) + b"\0\0\1" + bytes(8),
        HEADER.pack(1, 0x100, 1, 1, 0, 0) + bytes(5),
        HEADER.pack(1, 0x100, 1, 0, 1, 0) + bytes(5),
        HEADER.pack(1, 0x100, 0, 0, 0, 0) + bytes(5),
        bytes(64),
        b"\x40\0\0\1\0\x01\0\0\0\0\0\0",
    ],
)
def test_what_is_none(message: bytes) -> None:
    assert query_ident(message) == -1


LABEL = st.binary(min_size=1, max_size=63)


@given(
    st.integers(0, 0xFFFF), st.booleans(), st.lists(LABEL, max_size=3), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)
)
def test_any_name_and_type_is_a_query(ident: int, desired: bool, labels: list[bytes], kind: int, where: int) -> None:
    name = b"".join(bytes((len(label),)) + label for label in labels) + b"\0"
    message = HEADER.pack(ident, desired << 8, 1, 0, 0, 0) + name + struct.pack("!HH", kind, where)
    assert query_ident(message) == ident
    for end in range(len(message)):
        assert query_ident(message[:end]) == -1


@given(st.binary(max_size=300) | st.binary(max_size=100).map(lambda more: HEADER.pack(1, 0, 1, 0, 0, 1) + more))
def test_any_bytes_are_looked_at(message: bytes) -> None:
    ident = query_ident(message)
    assert ident == -1 or ident == int.from_bytes(message[:2], "big")
    is_answer(message, 1)


def test_answers() -> None:
    answer = bytes(DNS(id=0x1234, qr=1, qd=DNSQR(qname="www.example.org")))
    assert is_answer(answer, 0x1234) and is_answer(memoryview(answer), 0x1234)
    assert not is_answer(answer, 0x1235)
    assert not is_answer(QUERY, 0x1234)
    assert not is_answer(answer[:11], 0x1234)
