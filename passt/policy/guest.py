"""The observed state of the guest: its addresses, as seen in its frames."""

from __future__ import annotations

from dataclasses import dataclass

from .. import addr


@dataclass(slots=True)
class Guest:
    """The guest's addresses. `tap.py` alone writes them."""

    mac: bytes = addr.BROADCAST_MAC
    addr4: bytes = addr.ANY4  # last IPv4 source seen
    addr6: bytes = addr.ANY6  # last IPv6 source seen that is not link-local
    addr6_ll: bytes = addr.ANY6  # last link-local source seen
