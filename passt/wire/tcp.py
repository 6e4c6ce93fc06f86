"""TCP segments (RFC 9293, 3.1): header layout, flags, and the two supported options.

     0                   1                   2                   3
    |          source port          |       destination port        |
    |                        sequence number                        |
    |                    acknowledgment number                      |
    | offset| rsvd  |   flags       |            window             |
    |           checksum            |         urgent pointer        |
    |                    options, padded to 32 bits                 |

Only the maximum segment size and the window scale are sent and parsed: no SACK, no timestamps, since the link to the
guest does not reorder and its round-trip time is negligible.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

from ..drops import Drop
from .cursor import Malformed

HEADER = Struct("!HHIIHHHH")  # ports, seq, ack, offset and flags, window, checksum, urgent
SEQ_TO_WINDOW = Struct("!IIHH")  # the part that changes, at offset 4: seq, ack, offset and flags, window
HEADER_LEN = 20

FIN, SYN, RST, PSH, ACK, URG = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
FLAG_MASK = 0x3F

OPT_END, OPT_NOP, OPT_MSS, OPT_WS = 0, 1, 2, 3
MSS_DEFAULT = 536  # RFC 9293, 3.7.1: assumed when the option is absent, IPv4; 1220 for IPv6
MSS_DEFAULT6 = 1220
MSS_MIN = 28  # fits into the 68 bytes that any link takes (RFC 791, 3.2); less would cost a frame for each byte
WS_MAX = 14  # RFC 7323, 2.3: larger values are treated as 14

_MSS = Struct("!BBH")
_MSS_WS = Struct("!BBHBBBB")


def flag_names(flags: int) -> str:
    """SA for SYN and ACK, as tcpdump abbreviates."""
    return "".join(c for c, bit in zip("FSRPAU", (FIN, SYN, RST, PSH, ACK, URG), strict=True) if flags & bit)


@dataclass(frozen=True, slots=True)
class SynOptions:
    """Options of a SYN. `ws` None: the option is absent, and neither end scales (RFC 7323, 2.2)."""

    mss: int | None = None
    ws: int | None = None

    @classmethod
    def parse(cls, data: bytes) -> SynOptions:
        """From the bytes between header and payload; raises Malformed."""
        mss = ws = None
        i, end = 0, len(data)
        while i < end and data[i] != OPT_END:
            if data[i] == OPT_NOP:
                i += 1
                continue
            if i + 2 > end or data[i + 1] < 2 or i + data[i + 1] > end:
                raise Malformed(Drop.TCP_OPTION_LENGTH)
            kind, length = data[i], data[i + 1]
            if kind == OPT_MSS and length == 4:
                mss = int.from_bytes(data[i + 2 : i + 4], "big") or None
            elif kind == OPT_WS and length == 3:
                ws = min(data[i + 2], WS_MAX)
            i += length
        return cls(mss, ws)

    def emit(self) -> bytes:
        """A multiple of four bytes; the MSS must be set."""
        if self.mss is None:
            raise ValueError("a SYN must have an MSS")
        if self.ws is None:
            return _MSS.pack(OPT_MSS, 4, self.mss)
        return _MSS_WS.pack(OPT_MSS, 4, self.mss, OPT_NOP, OPT_WS, 3, self.ws)
