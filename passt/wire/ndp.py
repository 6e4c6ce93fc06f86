"""Neighbour discovery for IPv6 (RFC 4861) with the options of router advertisements (RFC 4861, 4.6; RFC 8106).

Messages are ICMPv6: type, code and checksum come first. `emit` leaves the checksum zero, `ether.icmp6_frame` fills it
in. `parse` does the validation of RFC 4861 (6.1 and 7.1) that concerns the message itself; the caller validates the
packet (hop limit, source, destination).

An option is type, length in units of 8 bytes, value. An option is skipped, whatever it holds, where its type is unknown
(RFC 4861, 4.6) or is not one of those that the message is specified to have (RFC 4861, 6.1 and 7.1). A message of more
than `OPTIONS_MAX` options is refused, so that a frame of 64 KiB costs no more than another one.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from ..drops import Drop
from ..lean.records import dataclass
from . import domain
from .cursor import Cursor, Malformed

ROUTER_SOLICITATION = 133
ROUTER_ADVERTISEMENT = 134
NEIGHBOUR_SOLICITATION = 135
NEIGHBOUR_ADVERTISEMENT = 136
REDIRECT = 137
TYPES = range(ROUTER_SOLICITATION, REDIRECT + 1)

INFINITE = 0xFFFFFFFF  # s (RFC 4861, 4.6.2)
SOLICITED_NODE = bytes.fromhex("ff0200000000000000000001ff")  # and the last 3 bytes of an address (RFC 4291, 2.7.1)
OPTIONS_MAX = 64  # several times what a router advertisement of 1500 bytes has

_HEAD = Struct("!BBH")  # type, code, checksum
_RESERVED = Struct("!I")
_OPTION = Struct("!BB")  # type, length in units of 8 bytes


def _option(kind: int, body: bytes) -> bytes:
    """An option, padded with as few zero bytes as make it a multiple of 8 long."""
    size = -(-(_OPTION.size + len(body)) // 8)
    if size > 255:
        raise ValueError("NDP option too long")
    return (_OPTION.pack(kind, size) + body).ljust(8 * size, b"\0")


# Options -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LinkAddress:
    """Source or target link-layer address (RFC 4861, 4.6.1)."""

    SOURCE = 1
    TARGET = 2

    kind: int  # SOURCE or TARGET
    mac: bytes

    def emit(self) -> bytes:
        return _option(self.kind, self.mac)


@dataclass(frozen=True, slots=True)
class Prefix:
    """Prefix information (RFC 4861, 4.6.2): prefix length, flags, lifetimes in seconds, reserved, prefix."""

    KIND = 3
    LAYOUT = Struct("!BBIII16s")
    ON_LINK = 0x80
    AUTONOMOUS = 0x40

    prefix: bytes  # bits beyond the length are zero
    prefix_len: int
    flags: int = ON_LINK | AUTONOMOUS
    valid: int = INFINITE
    preferred: int = INFINITE

    @classmethod
    def parse(cls, c: Cursor) -> Prefix:
        prefix_len, flags, valid, preferred, _, prefix = c.unpack(cls.LAYOUT)
        return cls(prefix, prefix_len, flags, valid, preferred)

    def emit(self) -> bytes:
        fields = (self.prefix_len, self.flags, self.valid, self.preferred, 0, self.prefix)
        return _option(self.KIND, self.LAYOUT.pack(*fields))


@dataclass(frozen=True, slots=True)
class Mtu:
    """MTU of the link (RFC 4861, 4.6.4): reserved, MTU."""

    KIND = 5
    LAYOUT = Struct("!HI")

    mtu: int

    @classmethod
    def parse(cls, c: Cursor) -> Mtu:
        return cls(c.unpack(cls.LAYOUT)[1])

    def emit(self) -> bytes:
        return _option(self.KIND, self.LAYOUT.pack(0, self.mtu))


@dataclass(frozen=True, slots=True)
class Rdnss:
    """Recursive DNS servers (RFC 8106, 5.1): reserved, lifetime in seconds, addresses."""

    KIND = 25
    LAYOUT = Struct("!HI")

    servers: tuple[bytes, ...]
    lifetime: int = INFINITE

    @classmethod
    def parse(cls, c: Cursor) -> Rdnss:
        _, lifetime = c.unpack(cls.LAYOUT)
        servers = []
        while c.left:
            servers.append(c.take(16))
        return cls(tuple(servers), lifetime)

    def emit(self) -> bytes:
        return _option(self.KIND, self.LAYOUT.pack(0, self.lifetime) + b"".join(self.servers))


@dataclass(frozen=True, slots=True)
class Dnssl:
    """DNS search list (RFC 8106, 5.2): reserved, lifetime in seconds, names without compression, zero padding."""

    KIND = 31
    LAYOUT = Struct("!HI")

    names: tuple[str, ...]
    lifetime: int = INFINITE

    @classmethod
    def parse(cls, c: Cursor) -> Dnssl:
        _, lifetime = c.unpack(cls.LAYOUT)
        # RFC 8106, 5.2 forbids compression, by which the names of a frame could be hundreds of times its size
        return cls(domain.decode_list(c.rest(), compressed=False), lifetime)

    @classmethod
    def leading(cls, names: tuple[str, ...], room: int) -> tuple[str, ...]:
        """As many names from the front as an option of at most `room` bytes, 2040 at any rate, can hold."""
        size = min(room, 8 * 255) // 8 * 8
        return domain.leading(names, size - _OPTION.size - cls.LAYOUT.size)

    def emit(self) -> bytes:
        return _option(self.KIND, self.LAYOUT.pack(0, self.lifetime) + domain.encode_list(self.names))


Option = LinkAddress | Prefix | Mtu | Rdnss | Dnssl

Parsers = dict[int, Callable[[Cursor], Option]]

_FROM_SOURCE: Parsers = {LinkAddress.SOURCE: lambda c: LinkAddress(LinkAddress.SOURCE, c.take(6))}  # solicitations
_OF_TARGET: Parsers = {LinkAddress.TARGET: lambda c: LinkAddress(LinkAddress.TARGET, c.take(6))}  # neighbours' answers
_FROM_ROUTER: Parsers = {
    **_FROM_SOURCE,
    Prefix.KIND: Prefix.parse,
    Mtu.KIND: Mtu.parse,
    Rdnss.KIND: Rdnss.parse,
    Dnssl.KIND: Dnssl.parse,
}


def _options(c: Cursor, parsers: Parsers) -> tuple[Option, ...]:
    """The options up to the end of the message that have one of the parsers."""
    found: list[Option] = []
    for _ in range(OPTIONS_MAX):
        if not c.left:
            return tuple(found)
        kind, size = c.unpack(_OPTION)
        if size == 0:
            raise Malformed(Drop.NDP_OPTION_LENGTH)
        with c.exactly(8 * size - _OPTION.size, Drop.NDP_TRAILING):
            if kind in parsers:
                found.append(parsers[kind](c))
            c.rest()  # a known option may be longer in a later RFC
    if c.left:
        raise Malformed(Drop.NDP_TOO_MANY)
    return tuple(found)


def has_link_address(options: tuple[Option, ...]) -> bool:
    """Whether a link-layer address is among `options`."""
    return any(isinstance(o, LinkAddress) for o in options)


# Messages ----------------------------------------------------------------------------------------------------------


def _open(data: bytes, kind: int) -> Cursor:
    """A cursor behind the checksum of an ICMPv6 message of type `kind` and code 0."""
    c = Cursor(data, Drop.NDP_TRUNCATED)
    found, code, _ = c.unpack(_HEAD)
    if found != kind or code != 0:
        raise Malformed(Drop.NDP_TYPE)
    return c


def _join(kind: int, body: bytes, options: tuple[Option, ...]) -> bytes:
    return _HEAD.pack(kind, 0, 0) + body + b"".join(o.emit() for o in options)


@dataclass(frozen=True, slots=True)
class RouterSolicitation:
    """RFC 4861, 4.1: reserved, options."""

    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> RouterSolicitation:
        c = _open(data, ROUTER_SOLICITATION)
        c.unpack(_RESERVED)
        return cls(_options(c, _FROM_SOURCE))

    def emit(self) -> bytes:
        return _join(ROUTER_SOLICITATION, _RESERVED.pack(0), self.options)


@dataclass(frozen=True, slots=True)
class RouterAdvertisement:
    """RFC 4861, 4.2: hop limit, flags, router lifetime (s), reachable time (ms), retransmission timer (ms), options."""

    LAYOUT = Struct("!BBHII")
    MANAGED = 0x80
    OTHER = 0x40

    hop_limit: int
    flags: int
    lifetime: int
    options: tuple[Option, ...] = ()
    reachable: int = 0
    retransmit: int = 0

    @classmethod
    def parse(cls, data: bytes) -> RouterAdvertisement:
        c = _open(data, ROUTER_ADVERTISEMENT)
        hop_limit, flags, lifetime, reachable, retransmit = c.unpack(cls.LAYOUT)
        return cls(hop_limit, flags, lifetime, _options(c, _FROM_ROUTER), reachable, retransmit)

    def emit(self) -> bytes:
        fields = (self.hop_limit, self.flags, self.lifetime, self.reachable, self.retransmit)
        return _join(ROUTER_ADVERTISEMENT, self.LAYOUT.pack(*fields), self.options)


@dataclass(frozen=True, slots=True)
class NeighbourSolicitation:
    """RFC 4861, 4.3: reserved, target, options."""

    LAYOUT = Struct("!I16s")

    target: bytes
    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> NeighbourSolicitation:
        c = _open(data, NEIGHBOUR_SOLICITATION)
        _, target = c.unpack(cls.LAYOUT)
        return cls(_not_multicast(target), _options(c, _FROM_SOURCE))

    def emit(self) -> bytes:
        return _join(NEIGHBOUR_SOLICITATION, self.LAYOUT.pack(0, self.target), self.options)


@dataclass(frozen=True, slots=True)
class NeighbourAdvertisement:
    """RFC 4861, 4.4: flags and reserved, target, options."""

    LAYOUT = Struct("!I16s")
    ROUTER = 1 << 31
    SOLICITED = 1 << 30
    OVERRIDE = 1 << 29

    flags: int
    target: bytes
    options: tuple[Option, ...] = ()

    @classmethod
    def parse(cls, data: bytes) -> NeighbourAdvertisement:
        c = _open(data, NEIGHBOUR_ADVERTISEMENT)
        flags, target = c.unpack(cls.LAYOUT)
        return cls(flags, _not_multicast(target), _options(c, _OF_TARGET))

    def emit(self) -> bytes:
        return _join(NEIGHBOUR_ADVERTISEMENT, self.LAYOUT.pack(self.flags, self.target), self.options)


def _not_multicast(target: bytes) -> bytes:
    if target[0] == 0xFF:  # RFC 4861, 7.1.1 and 7.1.2
        raise Malformed(Drop.NDP_TARGET)
    return target
