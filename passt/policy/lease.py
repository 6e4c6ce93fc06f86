"""Lease times of DHCP and DHCPv6: short while the host's network moves, long when it is quiet.

A guest asks again at half of its lease. If nothing is followed, a lease never ends. Otherwise it is as long as the
network has been quiet: since the start, or since the last change of what the guest is told.

    quiet for         lease       the guest asks again after
    ----------------  ----------  --------------------------
    less than 60 s    60 s        30 s
    an hour           an hour     half an hour
    a day or more     a day       12 h

So a quiet network costs some twenty renewals on its first day, and two on each of the others. A guest whose lease is
long keeps its former address for long after a change. It loses nothing but the knowledge: the former address works as
before, since every packet of the guest is translated.
"""

from __future__ import annotations

from ..wire.dhcpv6 import INFINITE
from .config import Config

LEASE_MIN, LEASE_MAX = 60, 86400  # s


class Quiet:
    """The time since when the network is quiet."""

    def __init__(self, now: float) -> None:
        self._since = now

    def changed(self, former: Config, config: Config, now: float) -> None:
        """Another configuration is in force."""
        if told(former) != told(config):
            self._since = now

    def lease(self, config: Config, now: float) -> int:
        """A lease from now on, in seconds."""
        if not config.followed:
            return INFINITE
        return max(LEASE_MIN, min(int(now - self._since), LEASE_MAX))


def told(config: Config) -> tuple[object, ...]:
    """The values that a guest is told by DHCP or DHCPv6, and that may change."""
    families = ((ip.addr, ip.prefix_len, ip.gateway, ip.dns) for ip in (config.ip4, config.ip6) if ip is not None)
    return *families, config.dns_search, config.mtu
