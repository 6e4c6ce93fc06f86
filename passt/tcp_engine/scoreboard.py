"""The scoreboard of data in flight to the guest: SACKed, lost, sent again (RFC 2018, RFC 6675, RFC 8985).

A scoreboard exists while something is known to be missing, and for connections that permit SACK as well as for others.

    snd_una                                                         edge          snd_nxt
    | lost  |  SACKed  | lost  | SACKed | resent | SACKed |  lost   |             |
                                                 '- high_rxt

    sacked     ranges that the guest has, from SACK options. They are sorted and do not touch each other
    edge       everything below is lost unless it is SACKed or resent
    high_rxt   holes below were resent at least once (HighRxt of RFC 6675)
    resent     retransmissions that are on their way, in the order in which they were made: (left, right, mark)
    again      retransmissions that got lost
    point      snd_nxt when the loss was noticed (RecoveryPoint): an acknowledgement of it ends the recovery
    allowance  bytes of retransmissions that may be on their way

Order. The link is a queue: what was sent first arrives first. So a byte is lost as soon as a later one has arrived, and
so is a retransmission: when data beyond its `mark`, which is snd_nxt at its time, is SACKed, or a retransmission that
was made after it. That is the idea of RACK (RFC 8985), with the order of transmissions in the place of their times. It
repairs the loss of retransmissions without a timeout.

A D-SACK in the answer to a retransmission shows a link that does reorder. From then on a byte counts as lost when more
than DUP_THRESH - 1 segments beyond it are SACKed (IsLost of RFC 6675), and for retransmissions only the timer counts.

A timeout makes everything lost that is not SACKed (RFC 6675, 5.1). The third expiry in a row, a probe included, clears
`sacked`, and so does an acknowledgement up to SACKed bytes, but not of them: the guest has reneged (RFC 2018, 8).

After a timeout `allowance` starts with one frame and doubles with each acknowledgement of new data, since a link that
lost all that was on it may be overrun. It has no limit otherwise: between this program and the guest there is no
network to share, and the guest's window limits what is sent.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from typing import Final

from ..lean.records import dataclass, field

RANGES_MAX: Final = 256  # SACKed ranges of one connection; a new one beyond is ignored, as if its SACK had got lost
DUP_THRESH: Final = 3  # segments (RFC 6675, 2)
NO_LIMIT: Final = 1 << 62

Range = tuple[int, int]  # [left, right)


@dataclass(slots=True)
class Scoreboard:
    """The scoreboard of one connection. Sequence numbers are those of `conn.py`: they do not wrap."""

    edge: int
    high_rxt: int
    point: int
    allowance: int = NO_LIMIT
    sacked: list[Range] = field(default_factory=list)
    resent: list[tuple[int, int, int]] = field(default_factory=list)
    again: list[Range] = field(default_factory=list)

    def add(self, left: int, right: int) -> bool:
        """The guest has [left, right); returns whether that is new."""
        sacked = self.sacked
        i = bisect_left(sacked, (left,))
        if i and sacked[i - 1][1] >= left:
            i -= 1
            if sacked[i][1] >= right:
                return False
            left = sacked[i][0]
        elif len(sacked) >= RANGES_MAX:
            return False
        j = i
        while j < len(sacked) and sacked[j][0] <= right:
            right = max(right, sacked[j][1])
            j += 1
        if sacked[i:j] == [(left, right)]:
            return False
        sacked[i:j] = [(left, right)]
        return True

    def _top(self, left: int, right: int, una: int) -> int:
        """The end of what arrived of [left, right); `left` if nothing did."""
        i = bisect_left(self.sacked, (right,)) - 1
        top = self.sacked[i][1] if i >= 0 else 0
        return max(left, min(max(top, una), right))

    def update(self, una: int, mss: int, in_order: bool) -> None:
        """Everything before `una` is acknowledged, and blocks were added: decide what is lost."""
        sacked = self.sacked
        while sacked and sacked[0][1] <= una:
            del sacked[0]
        self.high_rxt = max(self.high_rxt, una)
        if sacked and sacked[0][0] <= una:  # the guest has reneged, or it would acknowledge this
            sacked.clear()
            self.high_rxt = una
        self.edge = max(self.edge, una, self._lost_below(mss, in_order))
        if self.again:
            self.again = [(max(left, una), right) for left, right in self.again if right > una]
        if self.resent:
            self._judge(una, in_order)

    def _lost_below(self, mss: int, in_order: bool) -> int:
        sacked = self.sacked
        if not sacked:
            return 0
        if in_order:
            return sacked[-1][1]
        beyond = 0
        for left, right in reversed(sacked):
            beyond += right - left
            if beyond > (DUP_THRESH - 1) * mss:
                return left
        return 0

    def _judge(self, una: int, in_order: bool) -> None:
        """Sort retransmissions into those that arrived, those that got lost, and those on their way."""
        resent, high = self.resent, self.sacked[-1][1] if self.sacked else 0
        tops = [self._top(left, right, una) for left, right, _ in resent]
        last = max((i for i, top in enumerate(tops) if top > resent[i][0]), default=-1)
        kept = []
        for i, (start, right, mark) in enumerate(resent):
            left = max(start, una)
            holes = self._holes(left, right)
            if not holes:
                continue
            if not in_order:
                kept.append((left, right, mark))
            elif i < last or mark < high:
                self.again.append((left, right))
            else:
                top = max(tops[i], left)
                if holes[0][0] < top:
                    self.again.append((left, top))
                if top < right:
                    kept.append((top, right, mark))
        self.resent = kept

    def timeout(self, una: int, nxt: int, allowance: int, *, forget: bool) -> None:
        """Nothing arrived in time: everything up to `nxt` is lost that is not SACKed."""
        if forget:
            self.sacked.clear()
        self.resent.clear()
        self.again.clear()
        self.high_rxt, self.edge, self.point, self.allowance = una, nxt, max(self.point, nxt), allowance

    def next(self, nxt: int, limit: int, room: int = NO_LIMIT) -> list[Range]:
        """The ranges below `limit` to resend now, as far as the allowance and `room` go; they count as resent then."""
        left_over = min(self.allowance - sum(right - left for left, right, _ in self.resent), room)
        ranges: list[Range] = []
        while self.again and left_over > 0:
            left, right = self.again.pop()
            for hole in self._holes(left, right):
                ranges.append(hole)
                left_over -= hole[1] - hole[0]
        edge = min(self.edge, limit)
        for left, right in self._holes(self.high_rxt, edge):
            if left_over <= 0:
                break
            self.high_rxt = min(right, left + left_over)
            ranges.append((left, self.high_rxt))
            left_over -= self.high_rxt - left
        self.resent += [(left, right, nxt) for left, right in ranges]
        return ranges

    def _holes(self, left: int, right: int) -> list[Range]:
        """The parts of [left, right) that are not SACKed."""
        sacked, holes = self.sacked, []
        i = max(bisect_right(sacked, (left, NO_LIMIT)) - 1, 0)
        while left < right:
            while i < len(sacked) and sacked[i][1] <= left:
                i += 1
            if i == len(sacked) or sacked[i][0] >= right:
                holes.append((left, right))
                break
            if sacked[i][0] > left:
                holes.append((left, sacked[i][0]))
            left = sacked[i][1]
        return holes
