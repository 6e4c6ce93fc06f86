"""DNS messages (RFC 1035, 4.1), as far as it takes to tell them from others: the header and the question.

    0        2        4        6        8        10       12
    +--------+--------+--------+--------+--------+--------+-------------------+---------------------+
    | ident  | flags  | QD     | AN     | NS     | AR     | QNAME, ends in 0  | QTYPE 2  | QCLASS 2 |
    +--------+--------+--------+--------+--------+--------+-------------------+---------------------+

A query with EDNS (RFC 6891, 6.1) has one additional record, which begins with the root's name and the type OPT.
"""

from __future__ import annotations

from struct import Struct

from .domain import LABEL_MAX, NAME_MAX

HEADER = Struct("!6H")
QR = 0x8000  # a response
NOT_IN_A_QUERY = 0xFFFF & ~(0x0100 | 0x0020 | 0x0010)  # all but RD, AD and CD: opcode 0 is the standard query
OPT = bytes((0, 0, 41))  # root, type 41

Buffer = bytes | bytearray | memoryview


def query_ident(message: Buffer) -> int:
    """The identifier of a standard query with one question, and nothing but that; -1: the message is none.

    Bytes of another protocol hardly ever look so: flags and counts are exact, and the question fills the message.
    """
    if len(message) < HEADER.size:
        return -1
    ident, flags, questions, answers, authorities, more = HEADER.unpack_from(message)
    if flags & NOT_IN_A_QUERY or questions != 1 or answers or authorities or more > 1:
        return -1
    end = _end_of_name(message) + 4
    if end < HEADER.size + 4 or end > len(message):
        return -1
    if message[end:] if not more else bytes(message[end : end + len(OPT)]) != OPT:
        return -1
    return int(ident)


def is_answer(message: Buffer, ident: int) -> bool:
    """Whether this is a response to the query with that identifier."""
    if len(message) < HEADER.size:
        return False
    found, flags, *_ = HEADER.unpack_from(message)
    return bool(flags & QR) and found == ident


def _end_of_name(message: Buffer) -> int:
    """Where the name of the first question ends; -1 if it is none. A question has no pointers: nothing is before it."""
    at = HEADER.size
    while at < min(len(message), HEADER.size + NAME_MAX):
        length = message[at]
        if not length:
            return at + 1
        if length > LABEL_MAX:
            return -1
        at += 1 + length
    return -1
