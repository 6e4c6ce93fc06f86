"""Messages of the vhost-user protocol: a front end (QEMU) tells a back end where a device's rings and memory are.

    request u32 | flags u32 | size u32 | payload of `size` bytes          little-endian; descriptors by SCM_RIGHTS

`Message` is one of them. The payloads are u64 (`u64`), `RingState`, `RingAddresses`, `LogArea`, `StateTransfer`, and
memory regions (`Region`).

Source: docs/interop/vhost-user.rst of QEMU ("Front-end message types", "Memory region description").
"""

from __future__ import annotations

from struct import Struct

from ..lean.records import dataclass

HEADER = Struct("<III")
_U64 = Struct("<Q")
_STATE = Struct("<II")
_ADDRESSES = Struct("<IIQQQQ")
_REGION = Struct("<QQQQ")
_LOG = Struct("<QQ")
_COUNT = Struct("<II")  # of regions, and padding
SIZE_MAX = 4096  # bytes of payload: more than any message that is known here
DESCRIPTORS_MAX = 8  # of one message: a memory table has at most so many regions

VERSION = 1
VERSION_MASK = 3
REPLY = 4
NEED_REPLY = 8

GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_LOG_BASE = 6
SET_LOG_FD = 7
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
NET_SET_MTU = 20
GET_MAX_MEM_SLOTS = 36
ADD_MEM_REG = 37
REM_MEM_REG = 38
SET_DEVICE_STATE_FD = 42
CHECK_DEVICE_STATE = 43

RING_INDEX = 0xFF  # bits of the u64 of SET_VRING_KICK and its like
NO_DESCRIPTOR = 0x100
RING_LOGGED = 1  # flag of SET_VRING_ADDR: the used ring is logged
SAVE, LOAD = range(2)  # directions of SET_DEVICE_STATE_FD
STOPPED = 0  # the phase in which all rings are stopped

# Protocol features, as bits of a mask
P_MQ = 1 << 0
P_LOG_SHMFD = 1 << 1
P_REPLY_ACK = 1 << 3
P_NET_MTU = 1 << 4
P_CONFIGURE_MEM_SLOTS = 1 << 15
P_DEVICE_STATE = 1 << 19


class Invalid(Exception):
    """A message that is not one, or that asks for what cannot be done; its text says what."""


@dataclass(frozen=True, slots=True)
class Message:
    """One message, in either direction."""

    request: int
    flags: int
    payload: bytes = b""

    @classmethod
    def parse_header(cls, data: bytes) -> tuple[int, int, int]:
        """(request, flags, size of the payload) of the 12 bytes of a header. Raises Invalid."""
        request, flags, size = HEADER.unpack(data)
        if flags & VERSION_MASK != VERSION:
            raise Invalid(f"version {flags & VERSION_MASK} of the protocol ({VERSION} is known)")
        if size > SIZE_MAX:
            raise Invalid(f"a message of {size} bytes (at most {SIZE_MAX} are possible)")
        return request, flags, size

    def emit(self) -> bytes:
        """Bytes to send."""
        return HEADER.pack(self.request, self.flags, len(self.payload)) + self.payload

    @property
    def needs_reply(self) -> bool:
        """Whether the front end waits to hear of success, if the message has no reply of its own."""
        return bool(self.flags & NEED_REPLY)


def reply(request: int, payload: bytes) -> Message:
    """The reply to a request."""
    return Message(request, VERSION | REPLY, payload)


def u64(payload: bytes) -> int:
    """A payload of one number. Raises Invalid."""
    value: int = _fields(_U64, payload)[0]
    return value


def emit_u64(value: int) -> bytes:
    """The reverse of `u64`."""
    return _U64.pack(value)


def _fields(layout: Struct, payload: bytes, at: int = 0) -> tuple[int, ...]:
    if len(payload) < at + layout.size:
        raise Invalid(f"a payload of {len(payload)} bytes ({at + layout.size} are needed)")
    return layout.unpack_from(payload, at)


@dataclass(frozen=True, slots=True)
class RingState:
    """A number that belongs to a ring: its size, its base, whether it is enabled."""

    index: int
    number: int

    @classmethod
    def parse(cls, payload: bytes) -> RingState:
        """Raises Invalid."""
        return cls(*_fields(_STATE, payload))

    def emit(self) -> bytes:
        """The reverse."""
        return _STATE.pack(self.index, self.number)


@dataclass(frozen=True, slots=True)
class RingAddresses:
    """The places of a ring's three parts, as addresses in the front end."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    @classmethod
    def parse(cls, payload: bytes) -> RingAddresses:
        """Raises Invalid."""
        return cls(*_fields(_ADDRESSES, payload))

    def emit(self) -> bytes:
        """The reverse."""
        return _ADDRESSES.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)


@dataclass(frozen=True, slots=True)
class LogArea:
    """The part of a file that is the log of written pages."""

    size: int
    offset: int

    @classmethod
    def parse(cls, payload: bytes) -> LogArea:
        """Raises Invalid: also for an area that reaches beyond 64-bit numbers."""
        area = cls(*_fields(_LOG, payload))
        if not area.size or area.size + area.offset > 1 << 63:
            raise Invalid(f"a log of {area.size:#x} bytes at {area.offset:#x}")
        return area

    def emit(self) -> bytes:
        """The reverse."""
        return _LOG.pack(self.size, self.offset)


@dataclass(frozen=True, slots=True)
class StateTransfer:
    """The device's state is to be read or written: SAVE or LOAD, in a phase of the migration."""

    direction: int
    phase: int

    @classmethod
    def parse(cls, payload: bytes) -> StateTransfer:
        """Raises Invalid."""
        transfer = cls(*_fields(_STATE, payload))
        if transfer.direction not in (SAVE, LOAD) or transfer.phase != STOPPED:
            raise Invalid(f"a transfer of state in direction {transfer.direction}, phase {transfer.phase}")
        return transfer

    def emit(self) -> bytes:
        """The reverse."""
        return _STATE.pack(self.direction, self.phase)


@dataclass(frozen=True, slots=True)
class Region:
    """Memory of the machine: where the machine and the front end have it, and where it begins in its file."""

    guest: int
    size: int
    user: int
    offset: int

    @classmethod
    def parse(cls, payload: bytes, at: int = 0) -> Region:
        """Raises Invalid: also for a region that reaches beyond 64-bit addresses."""
        region = cls(*_fields(_REGION, payload, at))
        if not region.size or max(region.guest, region.user, region.offset) + region.size > 1 << 64:
            raise Invalid(f"a memory region of {region.size:#x} bytes at {region.guest:#x}")
        return region

    def emit(self) -> bytes:
        """The reverse."""
        return _REGION.pack(self.guest, self.size, self.user, self.offset)


def regions(payload: bytes) -> list[Region]:
    """The regions of SET_MEM_TABLE. Raises Invalid."""
    count = _fields(_COUNT, payload)[0]
    if count > DESCRIPTORS_MAX:
        raise Invalid(f"{count} memory regions (at most {DESCRIPTORS_MAX} are possible)")
    return [Region.parse(payload, _COUNT.size + i * _REGION.size) for i in range(count)]


def emit_regions(table: list[Region]) -> bytes:
    """The reverse of `regions`."""
    return _COUNT.pack(len(table), 0) + b"".join(region.emit() for region in table)


def single_region(payload: bytes) -> Region:
    """The region of ADD_MEM_REG and REM_MEM_REG, behind 8 bytes of padding. Raises Invalid."""
    return Region.parse(payload, _U64.size)


def emit_single_region(region: Region) -> bytes:
    """The reverse of `single_region`."""
    return bytes(_U64.size) + region.emit()
