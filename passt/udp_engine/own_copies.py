"""The guest's own datagrams to groups, which come back: IP_MULTICAST_LOOP for the host, but not for the guest.

A datagram to a group is for other programs on the host, too, so the kernel gives each socket on the host that has
joined the group a copy: the one that receives for the guest as well. On a real link, an interface does not receive what
it sends: the guest's own kernel loops it back inside.

A copy has an address of the host as its source, and the sender's port. A responder on the host, such as avahi-daemon,
has both as well. So copies are told by port and payload. Each datagram that was sent is expected back once. If another
program has sent the same from the same port, one of the two is taken for the copy, and the guest gets the other.

    bound     value    consequence
    --------  -------  --------------------------------------------------------------------------------------
    KEPT      1 s      a copy that did not come (a full buffer, a list of sources) is not expected any more
    COPIES    1024     the oldest is not expected any more
"""

from __future__ import annotations

KEPT = 1.0  # s; the kernel hands a copy on before send(2) returns, it waits in the buffer only
COPIES = 1024

Mark = tuple[bytes, int, int, int]  # group, its port, port of the sender, hash of the payload


class OwnCopies:
    """Marks of datagrams that were sent, each for one copy that is expected."""

    def __init__(self) -> None:
        self._sent: dict[int, tuple[float, Mark]] = {}  # by a serial number, so the oldest comes first
        self._by_mark: dict[Mark, list[int]] = {}
        self._serial = 0

    def __len__(self) -> int:
        return len(self._sent)

    def sent(self, group: bytes, port: int, sport: int, payload: bytes, now: float) -> None:
        """A datagram left from port `sport` of the host for `port` of `group`."""
        self._forget(now)
        mark = group, port, sport, hash(payload)
        self._serial += 1
        self._sent[self._serial] = now, mark
        self._by_mark.setdefault(mark, []).append(self._serial)

    def take(self, group: bytes, port: int, sport: int, payload: bytes, now: float) -> bool:
        """Whether a datagram that was received is an expected copy. It is not expected again."""
        if not self._sent:
            return False
        self._forget(now)
        found = self._by_mark.get((group, port, sport, hash(payload)))
        if found is None:
            return False
        self._remove(found[0])
        return True

    def _remove(self, serial: int) -> None:
        _, mark = self._sent.pop(serial)
        serials = self._by_mark[mark]
        serials.remove(serial)
        if not serials:
            del self._by_mark[mark]

    def _forget(self, now: float) -> None:
        while self._sent:
            oldest = next(iter(self._sent))
            if self._sent[oldest][0] > now - KEPT and len(self._sent) < COPIES:
                return
            self._remove(oldest)
