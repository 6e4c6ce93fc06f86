"""Group membership: IGMPv1 (RFC 1112, appendix I), v2 (RFC 2236), v3 (RFC 3376); MLDv1 (RFC 2710), v2 (RFC 3810).

MLD is IGMP with addresses of 16 bytes, in messages of ICMPv6. The length of a group's address tells which one it is.

    IGMPv1, v2: single group          type u8 | response u8 | checksum u16 | group (4)
    MLDv1: single group               type u8 | code u8 | checksum u16 | response u16 | reserved u16 | group (16)
    query of IGMPv3, MLDv2            the same, then | S and QRV u8 | QQIC u8 | sources u16 | source *
    report of IGMPv3, MLDv2           type u8 | u8 | checksum u16 | u16 | records u16 | record *
        record                        type u8 | auxiliary words u8 | sources u16 | group | source * | auxiliary data

The checksum of MLD is that of ICMPv6, with a pseudo-header: `parse` leaves it to the caller, and `emit` leaves it zero.

Messages are sent with TTL or hop limit 1 and a Router Alert option (RFC 2113, RFC 2711): `packet`.
"""

from __future__ import annotations

from struct import Struct

from ..drops import Drop
from ..lean.records import dataclass
from . import ip
from .checksum import PROTO_ICMPV6, checksum, transport_checksum
from .cursor import Cursor, Malformed

PROTO_IGMP = 2
HOPS = 1  # of all messages: they stay on the link

# Types of IGMP, and those of ICMPv6 that are MLD
QUERY4, REPORT_V1, REPORT_V2, LEAVE_V2, REPORT_V3 = 0x11, 0x12, 0x16, 0x17, 0x22
QUERY6, REPORT6_V1, DONE6_V1, REPORT6_V2 = 130, 131, 132, 143
MLD_TYPES = (QUERY6, REPORT6_V1, DONE6_V1, REPORT6_V2)
_QUERIES = frozenset((QUERY4, QUERY6))
_SINGLE = frozenset((REPORT_V1, REPORT_V2, LEAVE_V2, REPORT6_V1, DONE6_V1))
_REPORTS = frozenset((REPORT_V3, REPORT6_V2))
LEAVES = frozenset((LEAVE_V2, DONE6_V1))

# Types of group records: RFC 3376, 4.2.12; RFC 3810, 5.2.12
IS_INCLUDE, IS_EXCLUDE, TO_INCLUDE, TO_EXCLUDE, ALLOW, BLOCK = range(1, 7)

RECORDS_MAX = 256  # of a report that are looked at: with an MTU of 65520 a host may put thousands into one
SOURCES_MAX = 256  # in a record or a query; the same
REPORT_SOURCES_MAX = 4096  # in all records of a report that are looked at: more than ten for each

_SINGLE4 = Struct("!BBH4s")
_SINGLE6 = Struct("!BBHHH16s")
_QUERY_MORE = Struct("!BBH")
_REPORT = Struct("!BBHHH")
_RECORD = Struct("!BBH")
_S_FLAG = 8  # the robustness variable is in the three bits below it

_ALERT4 = bytes((148, 4, 0, 0))  # RFC 2113, 2.1
_ALERT6 = bytes((PROTO_ICMPV6, 0, 5, 2, 0, 0, 1, 0))  # hop-by-hop header: RFC 2711, 2.1, with value 0 for MLD; PadN
_TOS = 0xC0  # Internetwork Control: RFC 3376, 4


@dataclass(frozen=True, slots=True)
class Single:
    """A report or a leave for one group: versions 1 and 2 of IGMP, version 1 of MLD."""

    kind: int
    group: bytes

    def emit(self) -> bytes:
        if len(self.group) == 4:
            return _complete(_SINGLE4.pack(self.kind, 0, 0, self.group))
        return _SINGLE6.pack(self.kind, 0, 0, 0, 0, self.group)


@dataclass(frozen=True, slots=True)
class Record:
    """A group, and the sources that a host wants or does not want."""

    kind: int  # IS_INCLUDE ... BLOCK
    group: bytes
    sources: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, c: Cursor, size: int) -> Record:
        """The next record of a report. Raises Malformed."""
        kind, words, count = c.unpack(_RECORD)
        group = c.take(size)
        sources = _addresses(c, size, count)
        c.take(4 * words)
        return cls(kind, group, sources)

    def emit(self) -> bytes:
        return _RECORD.pack(self.kind, 0, len(self.sources)) + self.group + b"".join(self.sources)


@dataclass(frozen=True, slots=True)
class Report:
    """The report of a host: IGMPv3 with addresses of 4 bytes, MLDv2 with 16."""

    size: int
    records: tuple[Record, ...]

    @classmethod
    def parse(cls, c: Cursor, size: int) -> Report:
        """Records beyond RECORDS_MAX are ignored, those behind REPORT_SOURCES_MAX sources, and data behind the last one
        (RFC 3376, 4.2.11; RFC 3810, 5.2.11). Raises Malformed.
        """
        *_, count = c.unpack(_REPORT)
        records, sources = [], 0
        for _ in range(min(count, RECORDS_MAX)):
            records.append(Record.parse(c, size))
            sources += len(records[-1].sources)
            if sources > REPORT_SOURCES_MAX:
                break
        return cls(size, tuple(records))

    def emit(self) -> bytes:
        kind = REPORT_V3 if self.size == 4 else REPORT6_V2
        message = _REPORT.pack(kind, 0, 0, 0, len(self.records)) + b"".join(r.emit() for r in self.records)
        return _complete(message) if self.size == 4 else message


@dataclass(frozen=True, slots=True)
class Query:
    """A query of IGMPv3 or MLDv2: for `group`, or a general one if that is unspecified."""

    group: bytes
    response: int  # code of the longest time before an answer, in 1/10 s; MLD: in ms
    robustness: int = 2  # QRV: how many times a report is sent
    interval: int = 0  # QQIC: code of the time between general queries, in s
    suppress: bool = False  # S: other routers do not lower their timers
    sources: tuple[bytes, ...] = ()

    @classmethod
    def parse(cls, c: Cursor, size: int) -> Query:
        """Raises Malformed, also for the shorter queries of versions 1 and 2 of IGMP and of MLDv1."""
        if size == 4:
            _, response, _, group = c.unpack(_SINGLE4)
        else:
            _, _, _, response, _, group = c.unpack(_SINGLE6)
        flags, interval, count = c.unpack(_QUERY_MORE)
        sources = _addresses(c, size, count)
        return cls(group, response, flags & _S_FLAG - 1, interval, bool(flags & _S_FLAG), sources)

    def emit(self) -> bytes:
        flags = self.robustness | (_S_FLAG if self.suppress else 0)
        more = _QUERY_MORE.pack(flags, self.interval, len(self.sources)) + b"".join(self.sources)
        if len(self.group) == 4:
            return _complete(_SINGLE4.pack(QUERY4, self.response, 0, self.group) + more)
        return _SINGLE6.pack(QUERY6, 0, 0, self.response, 0, self.group) + more


Message = Single | Report | Query


def parse(data: bytes, size: int) -> Message:
    """A message from its type on, with addresses of `size` bytes: 4 is IGMP, 16 is MLD. Raises Malformed."""
    c = Cursor(data, Drop.MEMBERSHIP_TRUNCATED)
    if len(data) < 8:
        raise Malformed(Drop.MEMBERSHIP_TRUNCATED)
    if size == 4 and checksum(data):
        raise Malformed(Drop.IGMP_CHECKSUM)
    kind = data[0]
    if (kind < QUERY6) != (size == 4):
        raise Malformed(Drop.MEMBERSHIP_TYPE)
    if kind in _SINGLE:
        group = c.unpack(_SINGLE4 if size == 4 else _SINGLE6)[-1]
        return Single(kind, group)
    if kind in _REPORTS:
        return Report.parse(c, size)
    if kind in _QUERIES:
        return Query.parse(c, size)
    raise Malformed(Drop.MEMBERSHIP_TYPE)


def packet(src: bytes, dst: bytes, message: bytes) -> bytes:
    """The IP packet with `message`, as `emit` gives it."""
    if len(src) == 4:
        header = ip.HEADER4.size + len(_ALERT4)
        fields = (4 << 4 | header // 4, _TOS, header + len(message), 0, 0, HOPS, PROTO_IGMP)
        fixed = ip.HEADER4.pack(*fields, 0, src, dst) + _ALERT4
        return fixed[:10] + checksum(fixed).to_bytes(2, "big") + fixed[12:] + message
    c = transport_checksum(src, dst, PROTO_ICMPV6, message)
    whole = _ALERT6 + message[:2] + c.to_bytes(2, "big") + message[4:]
    return ip.HEADER6.pack(ip.VERSION6, len(whole), ip.HOP_BY_HOP, HOPS, src, dst) + whole


def _addresses(c: Cursor, size: int, count: int) -> tuple[bytes, ...]:
    if count > SOURCES_MAX:
        raise Malformed(Drop.MEMBERSHIP_TOO_MANY)
    joined = c.take(size * count)
    return tuple([joined[i : i + size] for i in range(0, len(joined), size)])


def _complete(message: bytes) -> bytes:
    """An IGMP message with its checksum."""
    return message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
