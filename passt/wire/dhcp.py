"""DHCP messages (RFC 2131, 2) and their options (RFC 2132), and BOOTP (RFC 951), their predecessor.

    op htype hlen hops | xid | secs flags | ciaddr | yiaddr | siaddr | giaddr | chaddr 16 | sname 64 | file 128
    magic cookie | options: code, length, value ... | 255 | zero padding

A message of more than `OPTIONS_MAX` options is refused, so that 64 KiB of them cost no more than another message.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from struct import Struct

from ..drops import Drop
from ..lean.records import dataclass, field
from .cursor import Cursor, Malformed

HEADER = Struct("!BBBBIHH4s4s4s4s16s64s128s")
COOKIE = b"\x63\x82\x53\x63"

CLIENT_PORT = 68
SERVER_PORT = 67

BOOTREQUEST = 1
BOOTREPLY = 2
BROADCAST = 0x8000  # of flags: the client cannot receive unicast before it is configured

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)

OPT_PAD = 0
OPT_MASK = 1
OPT_ROUTER = 3
OPT_DNS = 6
OPT_HOSTNAME = 12
OPT_MTU = 26
OPT_REQUESTED = 50  # the address that a client would like to have
OPT_LEASE = 51
OPT_OVERLOAD = 52
OPT_TYPE = 53
OPT_SERVER_ID = 54
OPT_PARAMETERS = 55
OPT_MESSAGE = 56  # why there is a NAK, in words
OPT_MAX_SIZE = 57
OPT_CLIENT_ID = 61
OPT_RAPID_COMMIT = 80  # RFC 4039
OPT_FQDN = 81  # RFC 4702
OPT_SEARCH = 119  # RFC 3397
OPT_ROUTES = 121  # RFC 3442
OPT_END = 255

OVERLOAD_FILE = 1  # bits of OPT_OVERLOAD: which fields hold options, not names
OVERLOAD_SNAME = 2

OPTIONS_MIN = 60  # cookie and options are never shorter than BOOTP's 64 bytes of vendor information (RFC 951, 3)
BOOTP_SIZE = 300  # of any BOOTP message (RFC 951, 3)
SIZE_MIN = 576  # every client accepts an IP datagram of this size (RFC 2131, 2)
OPTIONS_MAX = 512  # there are 254 codes, and a message of 64 KiB can hold 250 full options
CLIENT_ID_MAX = 255  # bytes of one option

_PADDING = re.compile(rb"\0*")


def _parse_options(area: bytes, into: dict[int, bytearray], budget: int) -> int:
    """Add the options of `area`; one that comes again is continued (RFC 3396, 5). Returns what is left of `budget`."""
    pos, end = 0, len(area)
    while pos < end:
        if not budget:
            raise Malformed(Drop.DHCP_TOO_MANY)
        budget -= 1
        code = area[pos]
        pos += 1
        if code == OPT_END:
            break
        if code == OPT_PAD:
            pos = _PADDING.match(area, pos).end()  # type: ignore[union-attr]  # it matches the empty string, too
            continue
        start = pos + 1
        if start > end or start + area[pos] > end:
            raise Malformed(Drop.DHCP_OPTION_TRUNCATED)
        pos = start + area[pos]
        into.setdefault(code, bytearray()).extend(area[start:pos])
    return budget


def _emit_options(options: Mapping[int, bytes]) -> bytes:
    """The options in the order of the mapping, long ones in pieces (RFC 3396, 5), and the end."""
    out = bytearray()
    for code, value in options.items():
        for i in range(0, max(len(value), 1), 255):
            piece = value[i : i + 255]
            out += bytes((code, len(piece))) + piece
    out.append(OPT_END)
    return bytes(out.ljust(OPTIONS_MIN, b"\0"))


@dataclass(frozen=True, slots=True)
class Fqdn:
    """Client FQDN option (RFC 4702, 2): flags, two codes that are 255 from a server, name in either encoding."""

    LAYOUT = Struct("!BBB")
    SERVER_UPDATES = 1  # flag S: the server updates the client's address record in the DNS
    OVERRIDDEN = 2  # O: S is not as the client asked
    CANONICAL = 4  # E: the name is encoded as in the DNS; without it, as ASCII text
    NO_UPDATES = 8  # N: the server updates nothing
    CODE = 255

    flags: int
    name: bytes  # a client's need not be fully qualified

    @classmethod
    def parse(cls, value: bytes) -> Fqdn:
        """Raises Malformed."""
        c = Cursor(value, Drop.DHCP_FQDN_TRUNCATED)
        flags, _, _ = c.unpack(cls.LAYOUT)
        return cls(flags, c.rest())

    def emit(self) -> bytes:
        return self.LAYOUT.pack(self.flags, self.CODE, self.CODE) + self.name


@dataclass(frozen=True, slots=True)
class Message:
    """A UDP payload. Field names are those of RFC 2131, 2; the options keep their order."""

    op: int
    xid: int
    flags: int = 0
    ciaddr: bytes = bytes(4)
    yiaddr: bytes = bytes(4)
    siaddr: bytes = bytes(4)
    giaddr: bytes = bytes(4)
    chaddr: bytes = bytes(16)
    sname: bytes = bytes(64)
    file: bytes = bytes(128)
    htype: int = 1
    hlen: int = 6
    hops: int = 0
    secs: int = 0
    options: Mapping[int, bytes] = field(default_factory=dict)

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """Without the magic cookie it is plain BOOTP: no options. Raises Malformed."""
        c = Cursor(data, Drop.DHCP_TRUNCATED)
        op, htype, hlen, hops, xid, secs, flags, ci, yi, si, gi, chaddr, sname, file = c.unpack(HEADER)
        if hlen > len(chaddr):
            raise Malformed(Drop.DHCP_HARDWARE_ADDRESS)
        options: dict[int, bytearray] = {}
        budget = OPTIONS_MAX
        if c.left >= len(COOKIE) and c.take(len(COOKIE)) == COOKIE:
            budget = _parse_options(c.rest(), options, budget)
        # Fields that hold options hold no names (RFC 2132, 9.3); `file` is read first. The overload option has no
        # meaning inside these fields.
        overload = int.from_bytes(options.pop(OPT_OVERLOAD, b""), "big")
        if overload & OVERLOAD_FILE:
            budget = _parse_options(file, options, budget)
            file = bytes(128)
        if overload & OVERLOAD_SNAME:
            _parse_options(sname, options, budget)
            sname = bytes(64)
        options.pop(OPT_OVERLOAD, None)
        told = {code: bytes(value) for code, value in options.items()}
        return cls(op, xid, flags, ci, yi, si, gi, chaddr, sname, file, htype, hlen, hops, secs, told)

    def address(self, code: int) -> bytes | None:
        """The address in the option `code`, None without it. Raises Malformed."""
        value = self.options.get(code)
        if value is not None and len(value) != 4:
            raise Malformed(Drop.DHCP_ADDRESS_LENGTH)
        return value

    def emit(self) -> bytes:
        head = (self.op, self.htype, self.hlen, self.hops, self.xid, self.secs, self.flags)
        addresses = (self.ciaddr, self.yiaddr, self.siaddr, self.giaddr)
        header = HEADER.pack(*head, *addresses, self.chaddr, self.sname, self.file)
        return header + COOKIE + _emit_options(self.options)
