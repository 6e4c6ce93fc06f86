"""The MAC addresses that the guest sees for the hosts of the network: those that they have on the host's link.

    address                                              MAC address
    ---------------------------------------------------  ------------------------------------------------------------
    one that leads to us: it maps the host's loopback    ours
      or the host itself, or is forwarded to resolvers
    a neighbour on the template's link, the gateway      its own, as the host's kernel knows it
      included
    any other                                            that of the gateway, which is where its packets come from:
                                                           ours where the gateway's is ours, or is not known

All that the guest gets from an address has this MAC address as its source, and all that it is told of the address (ARP,
neighbour discovery) says the same. Where the gateway maps the host's loopback, which is the default, only neighbours
differ from ours. The guest never sees its own MAC address with another host.

The guest may send its frames to any of these: all of them are ours.

A neighbour stays known until another MAC address is known for it, or the template is another link: the host's kernel
forgets neighbours that were not used for a while, and comes back with the same.

    bound                                    value
    ---------------------------------------  ------------------------------------------------------------------------
    neighbours                               NEIGHBOURS_MAX; the one that changed longest ago is forgotten
    addresses that the guest was told of     TOLD_MAX; the one told longest ago is forgotten, and the guest asks again

Pure: `daemon/lan.py` reads the host's table, all the time or, while no flow needs it, by `before_use` alone. A flow
has the MAC address in its header, so it is looked up when a flow begins, and after a change (`flow/neighbours.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from .config import Config
from .guest import Guest
from .settings import Settings

NEIGHBOURS_MAX: Final = 4096
TOLD_MAX: Final = 1024


Gateways = dict[int, bytes]  # by the length of an address


def settings_of(config: Config) -> tuple[bytes, frozenset[bytes | None], Gateways]:
    """Our MAC address, the addresses that lead to us, the gateways."""
    families = [ip for ip in (config.ip4, config.ip6) if ip is not None]
    mapped = [a for ip in families for a in (ip.map_host_loopback, ip.map_guest_addr)]
    gateways = {len(ip.gateway): ip.gateway for ip in families if ip.gateway is not None}
    return config.our_mac, frozenset((*mapped, *config.dns_match)), gateways


class Lan:
    """One per process. `daemon/lan.py` writes the neighbours, ARP and neighbour discovery what the guest was told."""

    __slots__ = ("_gateways", "_given", "_guest", "_neighbours", "_our_mac", "_ours", "_quiet", "_told", "before_use")

    def __init__(self, settings: Settings, guest: Guest) -> None:
        self._guest = guest
        self._neighbours: dict[bytes, bytes] = {}
        self._told: dict[bytes, bytes] = {}
        self.before_use: Callable[[], None] | None = None  # lets the neighbours come that wait to be read
        settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._our_mac, self._ours, self._gateways = settings_of(config)
        ip6 = config.ip6  # the host has our link-local address itself, if that is not the gateway's: it is no neighbour
        self._quiet = self._ours | ({ip6.our_ll} if ip6 is not None and ip6.gateway in self._ours else set())
        self._given = {ip.addr for ip in (config.ip4, config.ip6) if ip is not None}

    def mac_of(self, a: bytes) -> bytes:
        """The source of frames from the address `a`."""
        if a in self._ours:
            return self._our_mac
        if self.before_use is not None:
            self.before_use()
        mac = self._neighbours.get(a)
        if mac is None:
            gateway = self._gateways.get(len(a), b"")
            mac = None if gateway in self._ours else self._neighbours.get(gateway)
        return self._our_mac if mac is None or mac == self._guest.mac else mac

    def knows(self, a: bytes) -> bool:
        """Whether the guest sees the MAC address of the host that has the address `a`."""
        if self.before_use is not None:
            self.before_use()
        return a in self._neighbours and a not in self._ours

    # Neighbours ------------------------------------------------------------------------------------------------------

    def note(self, a: bytes, mac: bytes) -> bool:
        """The neighbour `a` has this MAC address; returns whether that is new."""
        neighbours = self._neighbours
        if neighbours.get(a) == mac:
            return False
        neighbours.pop(a, None)
        if len(neighbours) >= NEIGHBOURS_MAX:
            del neighbours[next(iter(neighbours))]
        neighbours[a] = mac
        return True

    def forget(self, length: int) -> None:
        """The neighbours with addresses of so many bytes were those of another link."""
        self._neighbours = {a: mac for a, mac in self._neighbours.items() if len(a) != length}

    @property
    def count(self) -> int:
        """How many neighbours are known."""
        return len(self._neighbours)

    # The guest was told ----------------------------------------------------------------------------------------------

    def tell(self, a: bytes) -> bytes:
        """The MAC address of `a`, which the guest is about to be told."""
        if not any(a):
            return self.mac_of(a)  # a source of requests, of which nothing is learned
        told = self._told
        told.pop(a, None)
        if len(told) >= TOLD_MAX:
            del told[next(iter(told))]
        mac = told[a] = self.mac_of(a)
        return mac

    def outdated(self) -> list[bytes]:
        """Addresses that have another MAC address than the guest was told, the one told longest ago first; not those
        that the guest has itself by now.
        """
        own = self._given | self._guest.macs.keys()
        return [a for a, mac in self._told.items() if self.mac_of(a) != mac and a not in own]

    def told_of_others(self) -> bool:
        """Whether the guest was told of an address that does not lead to us, and is to be told of its changes."""
        return any(a not in self._quiet for a in self._told)

    def guest_gone(self) -> None:
        """The next guest was told nothing."""
        self._told.clear()
