"""TCP segments (RFC 9293, 3.1): header layout, flags, and the supported options.

     0                   1                   2                   3
    |          source port          |       destination port        |
    |                        sequence number                        |
    |                    acknowledgment number                      |
    | offset| rsvd  |   flags       |            window             |
    |           checksum            |         urgent pointer        |
    |                    options, padded to 32 bits                 |

    option              in                   RFC
    ------------------  -------------------  ----------
    maximum segment     SYN, SYN,ACK         9293, 3.7.1
    window scale        SYN, SYN,ACK         7323, 2
    SACK permitted      SYN, SYN,ACK         2018, 2
    SACK                ACK                  2018, 3; with a duplicate in front: D-SACK, 2883

There are no timestamps: segments stay shorter without, and the guest's kernel reads headers of one length faster. The
time of one segment per flight tells the round trip as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from struct import Struct
from typing import Final

from ..drops import Drop
from ..lean.records import dataclass
from .cursor import Malformed

HEADER: Final = Struct("!HHIIHHHH")  # ports, seq, ack, offset and flags, window, checksum, urgent
SEQ_TO_WINDOW: Final = Struct("!IIHH")  # the part that changes, at offset 4: seq, ack, offset and flags, window
SEQ_TO_WINDOW_UNPACK: Final[Callable[[bytearray, int], tuple[int, int, int, int]]] = SEQ_TO_WINDOW.unpack_from
HEADER_LEN: Final = 20

MASK: Final = 0xFFFFFFFF  # sequence numbers are modulo 2**32 (RFC 9293, 3.4)
HALF: Final = 1 << 31  # a difference of less: the number is not before the other one

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
FLAG_MASK: Final = 0x3F

OPT_END, OPT_NOP, OPT_MSS, OPT_WS, OPT_SACK_PERMITTED, OPT_SACK = 0, 1, 2, 3, 4, 5
MSS_DEFAULT: Final = 536  # RFC 9293, 3.7.1: assumed when the option is absent, IPv4; 1220 for IPv6
MSS_DEFAULT6: Final = 1220
MSS_MIN: Final = 28  # fits into the 68 bytes that any link takes (RFC 791, 3.2); less would cost a frame for each byte
WS_MAX: Final = 14  # RFC 7323, 2.3: larger values are treated as 14

SACK_BLOCKS_MAX: Final = 4  # RFC 2018, 3: as many as 40 bytes of options have room for

_LINUX: Final = bytes((OPT_MSS, 4)), bytes((OPT_SACK_PERMITTED, 2, 8, 10))  # before and behind the MSS
_MSS: Final = Struct("!BBH")
_MSS_WS: Final = Struct("!BBHBBBB")
_SACK_PERMITTED: Final = bytes((OPT_NOP, OPT_NOP, OPT_SACK_PERMITTED, 2))
_BLOCK: Final = Struct("!II")


def flag_names(flags: int) -> str:
    """SA for SYN and ACK, as tcpdump abbreviates."""
    return "".join(c for c, bit in zip("FSRPAU", (FIN, SYN, RST, PSH, ACK, URG), strict=True) if flags & bit)


@dataclass(frozen=True, slots=True)
class SynOptions:
    """Options of a SYN. `ws` None: the option is absent, and neither end scales (RFC 7323, 2.2). `sack`: permitted."""

    mss: int | None = None
    ws: int | None = None
    sack: bool = False

    @classmethod
    def parse(cls, data: bytes) -> SynOptions:
        """From the bytes between header and payload; raises Malformed."""
        mss = ws = None
        sack = False
        for kind, value in _options(data):
            if kind == OPT_MSS and len(value) == 2:
                mss = int.from_bytes(value, "big") or None
            elif kind == OPT_WS and len(value) == 1:
                ws = min(value[0], WS_MAX)
            elif kind == OPT_SACK_PERMITTED and not value:
                sack = True
        return cls(mss, ws, sack)

    def emit(self) -> bytes:
        """A multiple of four bytes; the MSS must be set."""
        if self.mss is None:
            raise ValueError("a SYN must have an MSS")
        sack = _SACK_PERMITTED if self.sack else b""
        if self.ws is None:
            return _MSS.pack(OPT_MSS, 4, self.mss) + sack
        return _MSS_WS.pack(OPT_MSS, 4, self.mss, OPT_NOP, OPT_WS, 3, self.ws) + sack


def syn_options(data: bytes) -> SynOptions:
    """`SynOptions.parse`, which nearly all SYN ask for the same: it is done once for those that differ in no more than
    their timestamps, where Linux has them. Raises Malformed.
    """
    if len(data) >= 16 and (data[:2], data[4:8]) == _LINUX:
        data = data[:6] + data[16:]
    return _syn_options(data)


@lru_cache(64)
def _syn_options(data: bytes) -> SynOptions:
    return SynOptions.parse(data)


@lru_cache(64)
def emit_syn_options(mss: int, ws: int | None, sack: bool) -> bytes:
    """The same the other way: `SynOptions.emit`."""
    return SynOptions(mss, ws, sack).emit()


def parse_sack(data: bytes) -> list[tuple[int, int]]:
    """The blocks (left edge, right edge) of a SACK option among the options `data`; raises Malformed."""
    for kind, value in _options(data):
        if kind == OPT_SACK and not len(value) & 7:
            return list(_BLOCK.iter_unpack(value))
    return []


def _options(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(kind, value) of each option but NOP, up to the end of the list (RFC 9293, 3.1); raises Malformed."""
    i, end = 0, len(data)
    while i < end and data[i] != OPT_END:
        if data[i] == OPT_NOP:
            i += 1
            continue
        if i + 2 > end or data[i + 1] < 2 or i + data[i + 1] > end:
            raise Malformed(Drop.TCP_OPTION_LENGTH)
        yield data[i], data[i + 2 : i + data[i + 1]]
        i += data[i + 1]


def emit_sack(blocks: Iterable[tuple[int, int]]) -> bytes:
    """A SACK option with one to SACK_BLOCKS_MAX blocks, a multiple of four bytes; edges may exceed 32 bits."""
    raw = b"".join(_BLOCK.pack(left & MASK, right & MASK) for left, right in blocks)
    return bytes((OPT_NOP, OPT_NOP, OPT_SACK, 2 + len(raw))) + raw
