"""What was observed of the guest: who it is, as far as its frames have told."""

from __future__ import annotations

from dataclasses import dataclass

from .. import addr


@dataclass(slots=True)
class Guest:
    """One per context. Written by `tap.py` only."""

    mac: bytes = addr.BROADCAST_MAC
    addr4: bytes = addr.ANY4  # last IPv4 source seen
    addr6: bytes = addr.ANY6  # last IPv6 source seen that is not link-local
    addr6_ll: bytes = addr.ANY6  # last link-local source seen
