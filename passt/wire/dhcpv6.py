"""DHCPv6 (RFC 8415) between client and server: messages, and the options that assign an address.

    msg-type 8 | transaction-id 24 | options: code 16, length 16, value ...

Options stand in a tuple of (code, value) pairs, in their order; options within options likewise.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct

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
OPT_REQUESTED = 6  # option codes that the client would like to have (RFC 8415, 21.7)
OPT_STATUS = 13
OPT_DNS = 23  # RFC 3646, 3
OPT_SEARCH = 24  # RFC 3646, 4
OPT_FQDN = 39  # RFC 4704, 4

STATUS_NOT_ON_LINK = 4
INFINITE = 0xFFFFFFFF
DUID_MAX = 128  # RFC 8415, 11.1, besides the type

Option = tuple[int, bytes]
Options = tuple[Option, ...]

_MESSAGE = Struct("!B3s")
OPTION = Struct("!HH")
_DUID_LLT = Struct("!HHI6s")  # type, hardware type, seconds since 2000 modulo 2**32, MAC
_DUID_TYPE_LLT = 1
_HARDWARE_ETHERNET = 1
EPOCH_2000 = 946684800  # 2000-01-01 00:00 UTC, in Unix time


def parse_options(c: Cursor) -> Options:
    """The options up to the end of the region."""
    options = []
    while c.left:
        code, length = c.unpack(OPTION)
        options.append((code, c.take(length)))
    return tuple(options)


def emit_options(options: Iterable[Option]) -> bytes:
    return b"".join(OPTION.pack(code, len(value)) + value for code, value in options)


def find(options: Options, code: int) -> bytes | None:
    """The value of the first option `code`."""
    return next((value for found, value in options if found == code), None)


def requests(options: Options, code: int) -> bool:
    """Whether the client would like to have the option `code`. Raises Malformed."""
    c = Cursor(find(options, OPT_REQUESTED) or b"", "DHCPv6 option request")
    return code in iter(lambda: c.u16() if c.left else None, None)


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
        """Raises Malformed, also for what relays say to servers: that has another layout."""
        c = Cursor(data, "DHCPv6")
        kind, transaction = c.unpack(_MESSAGE)
        if kind in (RELAY_FORW, RELAY_REPL):
            raise Malformed("DHCPv6 relayed")
        return cls(kind, transaction, parse_options(c))

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
        c = Cursor(value, "DHCPv6 IA address")
        address, preferred, valid = c.unpack(cls.LAYOUT)
        return cls(address, preferred, valid, parse_options(c))

    def emit(self) -> Option:
        return OPT_IA_ADDRESS, self.LAYOUT.pack(self.address, self.preferred, self.valid) + emit_options(self.options)


@dataclass(frozen=True, slots=True)
class Ia:
    """Identity association for addresses, IA_NA (RFC 8415, 21.4: IAID, T1, T2, options) or IA_TA (21.5: no times)."""

    LAYOUT_NA = Struct("!III")
    LAYOUT_TA = Struct("!I")

    iaid: int
    options: Options = ()
    t1: int = INFINITE
    t2: int = INFINITE
    temporary: bool = False

    @classmethod
    def parse(cls, option: Option) -> Ia:
        """Of an option whose code is OPT_IA_NA or OPT_IA_TA."""
        code, value = option
        c = Cursor(value, "DHCPv6 IA")
        if code == OPT_IA_TA:
            (iaid,) = c.unpack(cls.LAYOUT_TA)
            return cls(iaid, parse_options(c), 0, 0, True)
        iaid, t1, t2 = c.unpack(cls.LAYOUT_NA)
        return cls(iaid, parse_options(c), t1, t2)

    @property
    def addresses(self) -> tuple[bytes, ...]:
        """The addresses in it. Raises Malformed."""
        return tuple(IaAddress.parse(value).address for code, value in self.options if code == OPT_IA_ADDRESS)

    def emit(self) -> Option:
        if self.temporary:
            return OPT_IA_TA, self.LAYOUT_TA.pack(self.iaid) + emit_options(self.options)
        return OPT_IA_NA, self.LAYOUT_NA.pack(self.iaid, self.t1, self.t2) + emit_options(self.options)


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
        c = Cursor(value, "DHCPv6 client FQDN")
        return cls(c.u8(), c.rest())

    def emit(self) -> Option:
        return OPT_FQDN, bytes((self.flags,)) + self.name


def status(code: int, text: str) -> Option:
    """Status Code option (RFC 8415, 21.13)."""
    return OPT_STATUS, code.to_bytes(2, "big") + text.encode()
