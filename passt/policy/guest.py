"""The observed state of the guest: its addresses, as seen in its frames.

There may be several machines behind one link: `macs` has the MAC addresses of IP addresses that have spoken.
"""

from __future__ import annotations

from .. import addr
from ..lean.records import dataclass, field


@dataclass(slots=True)
class Guest:
    """The guest's addresses. `flow/neighbours.py` alone writes them."""

    mac: bytes = addr.BROADCAST_MAC  # of the last frame; none yet: broadcast
    addr4: bytes = addr.ANY4  # last IPv4 source seen, unless the address is fixed by -a
    addr6: bytes = addr.ANY6  # last IPv6 source seen that is not link-local, likewise
    addr6_ll: bytes = addr.ANY6  # last link-local source seen
    macs: dict[bytes, bytes] = field(default_factory=dict, compare=False)

    def mac_of(self, a: bytes) -> bytes:
        """The MAC address that frames to the guest's address `a` go to."""
        return self.macs.get(a, self.mac)

    def is_beside(self, a: bytes, mac: bytes) -> bool:
        """Whether `a` is an address of another machine of the link than the one with `mac`, as far as is known."""
        return self.macs.get(a, mac) != mac
