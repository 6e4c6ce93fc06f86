"""DHCPv6 (RFC 8415) between client and server: messages, and the options that assign an address.

    msg-type 8 | transaction-id 24 | options: code 16, length 16, value ...

Options stand in a tuple of (code, value) pairs, in their order; options within options likewise. More than
`OPTIONS_MAX` of them in a message, or `NESTED_MAX` in an option, are refused, so that 64 KiB cost no more than a usual
message.
"""

from __future__ import annotations

from collections.abc import Iterable
from struct import Struct

from ..drops import Drop
from ..lean.records import dataclass
from .cursor import Cursor, Malformed

CLIENT_PORT = 546
SERVER_PORT = 547

# Message types (RFC 8415, 7.3)
SOLICIT, ADVERTISE, REQUEST, CONFIRM, RENEW, REBIND, REPLY, RELEASE, DECLINE = range(1, 10)
RECONFIGURE, INFORMATION_REQUEST, RELAY_FORW, RELAY_REPL = range(10, 14)
NAMES = (
    "(0)",
    *("SOLICIT", "ADVERTISE", "REQUEST", "CONFIRM", "RENEW", "REBIND", "REPLY", "RELEASE", "DECLINE"),
    *("RECONFIGURE", "INFORMATION_REQUEST", "RELAY_FORW", "RELAY_REPL"),
)

OPT_CLIENT_ID = 1
OPT_SERVER_ID = 2
OPT_IA_NA = 3
OPT_IA_TA = 4
OPT_IA_ADDRESS = 5
OPT_REQUESTED = 6  # Option Request: codes of options that the client requests (RFC 8415, 21.7)
OPT_PREFERENCE = 7  # of this server among others (RFC 8415, 21.8)
OPT_STATUS = 13
OPT_RAPID_COMMIT = 14
OPT_DNS = 23  # RFC 3646, 3
OPT_SEARCH = 24  # RFC 3646, 4
OPT_IA_PD = 25  # an association for prefixes (RFC 8415, 21.21)
OPT_IA_PREFIX = 26
OPT_REFRESH = 32  # seconds until a client without an association asks again (RFC 8415, 21.23)
OPT_FQDN = 39  # RFC 4704, 4

IA_CODES = frozenset((OPT_IA_NA, OPT_IA_TA, OPT_IA_PD))

# Status codes (RFC 8415, 21.13)
SUCCESS, UNSPEC_FAIL, NO_ADDRS_AVAIL, NO_BINDING, NOT_ON_LINK, USE_MULTICAST, NO_PREFIX_AVAIL = range(7)

INFINITE = 0xFFFFFFFF  # s; of DHCPv4 as well (RFC 8415, 7.7; RFC 2131, 3.3)
DUID_MAX = 2 + 128  # RFC 8415, 11.1: the type, and what depends on it
OPTIONS_MAX = 64  # in a message: clients send about ten
NESTED_MAX = 16  # in an option: an association has an address or two
REQUESTED_MAX = 2 * 256  # bytes of an option request that are looked at: there are fewer codes

Option = tuple[int, bytes]
Options = tuple[Option, ...]

_MESSAGE = Struct("!B3s")
OPTION = Struct("!HH")
_DUID_LLT = Struct("!HHI6s")  # type, hardware type, seconds since 2000 modulo 2**32, MAC
_DUID_TYPE_LLT = 1
_HARDWARE_ETHERNET = 1
EPOCH_2000 = 946684800  # 2000-01-01 00:00 UTC, in Unix time


def parse_options(c: Cursor, most: int = NESTED_MAX) -> Options:
    """The options up to the end of the region, no more than `most`. Raises Malformed."""
    options = []
    for _ in range(most):
        if not c.left:
            break
        code, length = c.unpack(OPTION)
        options.append((code, c.take(length)))
    if c.left:
        raise Malformed(Drop.DHCPV6_TOO_MANY)
    return tuple(options)


def emit_options(options: Iterable[Option]) -> bytes:
    return b"".join(OPTION.pack(code, len(value)) + value for code, value in options)


def find(options: Options, code: int) -> bytes | None:
    """The value of the first option `code`."""
    return next((value for found, value in options if found == code), None)


def requests(options: Options, code: int) -> bool:
    """Whether the client requests the option `code`. Raises Malformed."""
    codes = find(options, OPT_REQUESTED) or b""
    if len(codes) % 2:
        raise Malformed(Drop.DHCPV6_ORO_TRUNCATED)
    return code in (int.from_bytes(codes[i : i + 2], "big") for i in range(0, min(len(codes), REQUESTED_MAX), 2))


def duid_llt(mac: bytes, unix_time: float) -> bytes:
    """A DUID of a MAC address and the time at which it was made (RFC 8415, 11.2)."""
    return _DUID_LLT.pack(_DUID_TYPE_LLT, _HARDWARE_ETHERNET, int(unix_time - EPOCH_2000) & 0xFFFFFFFF, mac)


@dataclass(frozen=True, slots=True)
class Message:
    """A message between client and server (RFC 8415, 8)."""

    kind: int
    transaction: bytes  # 3 bytes
    options: Options = ()

    @classmethod
    def parse(cls, data: bytes) -> Message:
        """Raises Malformed, also for messages between relays and servers: these have another layout."""
        c = Cursor(data, Drop.DHCPV6_TRUNCATED)
        kind, transaction = c.unpack(_MESSAGE)
        if kind in (RELAY_FORW, RELAY_REPL):
            raise Malformed(Drop.DHCPV6_RELAYED)
        return cls(kind, transaction, parse_options(c, OPTIONS_MAX))

    def emit(self) -> bytes:
        return _MESSAGE.pack(self.kind, self.transaction) + emit_options(self.options)


@dataclass(frozen=True, slots=True)
class IaAddress:
    """IA Address option (RFC 8415, 21.6): address, preferred and valid lifetime in seconds, options."""

    LAYOUT = Struct("!16sII")

    address: bytes
    preferred: int = INFINITE
    valid: int = INFINITE
    options: Options = ()

    @classmethod
    def parse(cls, value: bytes) -> IaAddress:
        c = Cursor(value, Drop.DHCPV6_ADDR_TRUNCATED)
        address, preferred, valid = c.unpack(cls.LAYOUT)
        return cls(address, preferred, valid, parse_options(c))

    def emit(self) -> Option:
        return OPT_IA_ADDRESS, self.LAYOUT.pack(self.address, self.preferred, self.valid) + emit_options(self.options)


@dataclass(frozen=True, slots=True)
class Prefix:
    """IA Prefix option (RFC 8415, 21.22): preferred and valid lifetime in seconds, length, prefix, options."""

    LAYOUT = Struct("!IIB16s")

    prefix: bytes
    prefix_len: int
    preferred: int = INFINITE
    valid: int = INFINITE
    options: Options = ()

    @classmethod
    def parse(cls, value: bytes) -> Prefix:
        c = Cursor(value, Drop.DHCPV6_PREFIX_TRUNCATED)
        preferred, valid, prefix_len, prefix = c.unpack(cls.LAYOUT)
        return cls(prefix, prefix_len, preferred, valid, parse_options(c))

    def emit(self) -> Option:
        fields = self.LAYOUT.pack(self.preferred, self.valid, self.prefix_len, self.prefix)
        return OPT_IA_PREFIX, fields + emit_options(self.options)


@dataclass(frozen=True, slots=True)
class Ia:
    """Identity association, for addresses or prefixes: IAID, T1, T2, options.

    IA_NA (RFC 8415, 21.4) is for addresses, IA_TA (21.5) for temporary ones, without times, IA_PD (21.21) for prefixes.
    """

    LAYOUT = Struct("!III")
    LAYOUT_TA = Struct("!I")

    iaid: int
    options: Options = ()
    t1: int = INFINITE
    t2: int = INFINITE
    code: int = OPT_IA_NA

    @classmethod
    def parse(cls, option: Option) -> Ia:
        """Of an option whose code is one of IA_CODES. Raises Malformed."""
        code, value = option
        c = Cursor(value, Drop.DHCPV6_IA_TRUNCATED)
        if code == OPT_IA_TA:
            (iaid,) = c.unpack(cls.LAYOUT_TA)
            return cls(iaid, parse_options(c), 0, 0, code)
        iaid, t1, t2 = c.unpack(cls.LAYOUT)
        return cls(iaid, parse_options(c), t1, t2, code)

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """The addresses in it. Raises Malformed."""
        values = (Cursor(value, Drop.DHCPV6_ADDR_TRUNCATED) for code, value in self.options if code == OPT_IA_ADDRESS)
        return tuple(c.unpack(IaAddress.LAYOUT)[0] for c in values)

    @property
    def prefixes(self) -> tuple[tuple[bytes, int], ...]:
        """The prefixes in it, with their lengths. Raises Malformed."""
        values = (Cursor(value, Drop.DHCPV6_PREFIX_TRUNCATED) for code, value in self.options if code == OPT_IA_PREFIX)
        fields = (c.unpack(Prefix.LAYOUT) for c in values)
        return tuple((prefix, prefix_len) for _, _, prefix_len, prefix in fields)

    def emit(self) -> Option:
        times = () if self.code == OPT_IA_TA else (self.t1, self.t2)
        layout = self.LAYOUT if times else self.LAYOUT_TA
        return self.code, layout.pack(self.iaid, *times) + emit_options(self.options)


@dataclass(frozen=True, slots=True)
class Fqdn:
    """Client FQDN option (RFC 4704, 4): flags, and a name that a client need not have qualified."""

    SERVER_UPDATES = 1  # flag S: the server updates the client's address record in the DNS
    OVERRIDDEN = 2  # O: S is not as the client asked
    NO_UPDATES = 4  # N: the server updates nothing

    flags: int
    name: bytes  # as in the DNS

    @classmethod
    def parse(cls, value: bytes) -> Fqdn:
        """Raises Malformed."""
        c = Cursor(value, Drop.DHCPV6_FQDN_TRUNCATED)
        return cls(c.u8(), c.rest())

    def emit(self) -> Option:
        return OPT_FQDN, bytes((self.flags,)) + self.name


def status(code: int, text: str) -> Option:
    """Status Code option (RFC 8415, 21.13)."""
    return OPT_STATUS, code.to_bytes(2, "big") + text.encode()
