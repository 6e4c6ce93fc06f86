"""The run-time state that handlers share. `daemon/wiring.py` makes it once; each field has one writer, named here."""

from __future__ import annotations

from collections import Counter

from ..drops import Reason
from ..lean.records import dataclass, field
from ..link.backend import Link
from ..link.packet import PacketPool
from ..linux.nspool import NsSockets
from ..loop.reactor import Reactor
from ..loop.timers import TimerPool
from ..policy.config import Config
from ..policy.forwarding import Forwarding
from ..policy.guest import Guest
from ..policy.lan import Lan
from ..policy.resolvers import Resolvers
from ..policy.settings import Settings
from .headers import Headers
from .neighbours import Neighbours
from .room import Room
from .services import Services
from .stats import Stats
from .table import FlowTable


@dataclass(slots=True)
class Context:
    """One per process."""

    settings: Settings  # the configuration in force, and its only writer
    reactor: Reactor
    timers: TimerPool
    pool: PacketPool
    link: Link
    flows: FlowTable
    fwd: Forwarding
    resolvers: Resolvers
    guest: Guest = field(default_factory=Guest)
    drops: Counter[Reason] = field(default_factory=Counter)  # by reason; the module that drops a packet counts it
    services: Services = field(default_factory=Services)  # each registers itself
    classes: dict[bytes, int] = field(default_factory=dict)  # of TCP connections by key: traffic, if not 0
    room: Room = field(default_factory=Room)  # each protocol offers what it can end
    stats: Stats = field(default_factory=Stats)  # writers: see there
    ns: NsSockets | None = None  # sockets of the guest's namespace; a virtual machine has none
    lan: Lan = field(init=False)  # MAC addresses of the host's neighbours
    headers: Headers = field(init=False)
    neighbours: Neighbours = field(init=False)

    def __post_init__(self) -> None:
        self.lan = Lan(self.settings, self.guest)
        self.headers = Headers(self.flows, self.guest, self.lan, self.timers, self.drops)
        self.neighbours = Neighbours(
            self.settings, self.guest, self.flows, self.headers, self.services, self.timers, self.reactor, self.drops
        )

    @property
    def config(self) -> Config:
        """The configuration in force, for the control plane, which reads it each time and keeps no copy."""
        return self.settings.current
