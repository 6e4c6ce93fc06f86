"""The guest's addresses: its IP addresses, the MAC address that each of them is reached at, and what waits to be told.

The guest's own addresses, which connections of the host go to, are the sources of its last packets, but for those of
hosts behind it: the targets of rules. They stay those targets while they have flows, which outlive their rule. A guest
that has gone may come back with the same addresses, so these are kept, unless the next frame comes from another MAC.

There may be several machines behind one link, so each IP address has the MAC address that its last packet came from
(`learn`); any other has that of the last frame (`sender`).

    event                                     consequence
    ----------------------------------------  ---------------------------------------------------------------------
    an address speaks from another MAC        the headers of flows are written again (`headers.py`)
    the guest probes for an address that is   clients of the host go there, unless the guest has spoken from the one
      free (RFC 4862, 5.4; RFC 5227, 2.1.1)     that they go to and that is of the present network, or has it from us
                                                (--config-net)
    a flow of the host, and no MAC is known   it is held, and the guest is solicited: ARP, neighbour solicitation
    the first frame of a guest                all that is held is delivered, in the order in which it came
    a machine comes from another host         it has the addresses that it had there, until its next packets
    SYN to the guest is retransmitted         its address is solicited: the guest may have another MAC, and be silent
    another address is assigned to the guest  clients of the host go there as soon as the guest has it, or has used it;
                                                packets of its former flows do not bring them back
    the guest's link comes up (a machine      after LINK_UP_DELAY our addresses are announced, and the guest's known
      connects, a tap is created again)         addresses are solicited

    bound                                     value
    ----------------------------------------  ---------------------------------------------------------------------
    addresses with a MAC                      ADDRESSES_MAX; the one that changed longest ago is forgotten
    connections and datagrams that are held   HELD_MAX, each for HOLD seconds; the others are dropped and counted
    solicitations                             SOLICITED_PER_SECOND
    addresses that the guest had before       GIVEN_UP_MAX, the last ones

    timer      value                          consequence
    ---------  -----------------------------  ---------------------------------------------------------------------
    solicit    0.5 s, doubling up to 4 s      while something is held: its addresses are solicited again
    hold       30 s                           given up: a connection is reset, a datagram is lost, both are counted
    link up    20 ms                          announcements: a client that goes at once is read to its end before

The services send: `services.solicit4`, `solicit6`, `on_link_up`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable

from .. import NEVER, addr, log
from ..drops import Reason
from ..lean.tuples import NamedTuple
from ..loop.each import each, record
from ..loop.reactor import Reactor
from ..loop.timers import TimerPool
from ..policy.config import Config
from ..policy.guest import Guest
from ..policy.settings import Settings
from ..wire.ether import GROUP
from .headers import Headers
from .services import Services
from .table import FlowTable

ADDRESSES_MAX = 1024
HELD_MAX = 64
HOLD = 30.0  # s
SOLICIT_FIRST, SOLICIT_MAX = 0.5, 4.0  # s
SOLICITED_PER_SECOND = 16
GIVEN_UP_MAX = 16
LINK_UP_DELAY = 0.02  # s

Callback = Callable[[float], None]


class Held(NamedTuple):
    """Something for the guest that waits for its MAC address."""

    until: float
    target: bytes
    deliver: Callback
    give_up: Callback


class Neighbours:
    """Writes `guest`."""

    def __init__(
        self, settings: Settings, guest: Guest, flows: FlowTable, headers: Headers, services: Services,
        timers: TimerPool, reactor: Reactor, drops: Counter[Reason],
    ) -> None:  # fmt: skip
        self._guest, self._flows, self._headers, self._services = guest, flows, headers, services
        self._timers, self._reactor, self._drops = timers, reactor, drops
        self._several = False  # frames came from more than one MAC address
        self._held: list[Held] = []
        self._delay = SOLICIT_FIRST
        self._solicit_at = self._up_at = NEVER
        self._timer = -1
        self._second, self._left = 0.0, SOLICITED_PER_SECOND
        self._former = b""  # MAC address of the guest that has gone
        self._behind: frozenset[bytes] = frozenset()
        self._given_up: dict[bytes, None] = {}  # addresses that were assigned to the guest, and that it has flows from
        settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._ip4, self._ip6, self._configured = config.ip4, config.ip6, config.config_net
        behind = frozenset(rule.target for rule in config.forwards if rule.target is not None and not rule.outbound)
        self._named = behind
        self._behind = behind | self._with_flows(self._behind - behind)

    def _with_flows(self, gone: frozenset[bytes]) -> frozenset[bytes]:
        """Those of the former targets of rules that have flows."""
        if not gone:
            return gone
        keys = [flow.key for flow in self._flows.by_index if flow is not None]
        return frozenset(a for a in gone if any(len(key) == 2 * len(a) + 4 and key.startswith(a) for key in keys))

    # From frames -------------------------------------------------------------------------------------------------

    def sender(self, mac: bytes) -> None:
        """Frames come from `mac`, and the one before came from another, or there was none."""
        guest = self._guest
        if mac == guest.mac or mac[0] & GROUP:
            return
        if self._former and self._former != mac:
            guest.addr4 = self._ip4.addr if self._ip4 else addr.ANY4
            guest.addr6 = (self._ip6.addr if self._ip6 else None) or addr.ANY6
            guest.addr6_ll = addr.ANY6
        self._former = b""
        known = guest.mac != addr.BROADCAST_MAC
        guest.mac = mac
        if log.debug_on:
            log.debug(f"Guest MAC address: {addr.mac_text(mac)}")
        if known:
            self._several = True
        elif self._held:
            self._reactor.between_turns(self._deliver)

    def arrived(self, mac: bytes, addr4: bytes, addr6: bytes, addr6_ll: bytes) -> None:
        """A machine comes from another host, where it had this MAC address and these addresses, zero if unknown."""
        guest = self._guest
        self._former = b""
        if any(mac) and not mac[0] & GROUP:
            self.sender(mac)
        fixed4, fixed6 = self._ip4 and self._ip4.fixed, self._ip6 and self._ip6.fixed
        guest.addr4 = addr4 if any(addr4) and self._ip4 and not fixed4 else guest.addr4
        guest.addr6 = addr6 if any(addr6) and self._ip6 and not fixed6 else guest.addr6
        guest.addr6_ll = addr6_ll if any(addr6_ll) and self._ip6 else guest.addr6_ll

    def learn(self, a: bytes, mac: bytes) -> None:
        """A packet of the address `a` came from `mac`."""
        if addr.is_martian(a) or not addr.is_unicast(a):
            return
        if not mac[0] & GROUP:
            self._learn_mac(a, mac)
        if a in self._behind:
            return
        if a in self._given_up and self._has_moved(a):
            return  # flows from before
        self._reach_at(a)

    def probed(self, a: bytes) -> None:
        """The guest asks whether it may take the address `a`, and it may.

        A machine that configures itself, and has nothing to say yet, is reached at what it is going to use. One that
        is told of another network, too: it need not keep its former address.
        """
        guest = self._guest
        reached = guest.addr4 if len(a) == 4 else guest.addr6_ll if addr.is_link_local(a) else guest.addr6
        settled = reached in guest.macs and not (self._is_near(a) and not self._is_near(reached))
        if self._configured or settled or addr.is_martian(a) or not addr.is_unicast(a):
            return
        if a not in self._behind and a not in self._given_up:
            self._reach_at(a)

    def _is_near(self, a: bytes) -> bool:
        """Whether an address is of the subnet that the guest is told of; in IPv6 that is a /64 (RFC 4862, 5.5.3)."""
        ip = self._ip4 if len(a) == 4 else self._ip6
        length = 64 if len(a) == 16 or ip is None else ip.prefix_len
        return ip is not None and ip.addr is not None and addr.in_subnet(a, ip.addr, length)

    def _reach_at(self, a: bytes) -> None:
        """Clients of the host go to the guest at `a`, unless that is fixed."""
        guest = self._guest
        if len(a) == 4:
            if not (self._ip4 and self._ip4.fixed):
                guest.addr4 = a
        elif addr.is_link_local(a):
            guest.addr6_ll = a
        elif not (self._ip6 and self._ip6.fixed):
            guest.addr6 = a

    def _has_moved(self, a: bytes) -> bool:
        """Whether the guest has used the address that is assigned in place of `a`."""
        if len(a) == 4:
            return self._ip4 is not None and self._guest.addr4 == self._ip4.addr
        return self._ip6 is not None and self._guest.addr6 == self._ip6.addr

    def moves(self, former: bytes, now: bytes, *, done: bool) -> None:
        """Another address is assigned to the guest. `done`: the guest has it. Otherwise its frames will tell.

        Clients of the host go to the new one from the moment on at which the guest has it. Flows from the former go on,
        and its packets do not bring clients back.
        """
        guest = self._guest
        self._given_up.pop(now, None)
        self._given_up[former] = None
        if len(self._given_up) > GIVEN_UP_MAX:
            del self._given_up[next(iter(self._given_up))]
        if done and guest.addr4 == former:
            guest.addr4 = now
        if done and guest.addr6 == former:
            guest.addr6 = now

    @property
    def given_up(self) -> frozenset[bytes]:
        """Addresses that the guest had, and that flows may still have."""
        return frozenset(self._given_up)

    def release(self, unused: Iterable[bytes]) -> None:
        """No flow has these addresses any more."""
        for a in unused:
            self._given_up.pop(a, None)

    def _learn_mac(self, a: bytes, mac: bytes) -> None:
        macs = self._guest.macs
        if macs.get(a) == mac:
            return
        macs.pop(a, None)
        if len(macs) >= ADDRESSES_MAX:
            del macs[next(iter(macs))]
        macs[a] = mac
        if self._several:
            self._headers.rewrite(time.monotonic())

    def forget(self) -> None:
        """The guest is gone. Held connections and datagrams wait for the next one, which may be the same."""
        if self._guest.mac != addr.BROADCAST_MAC:
            self._former = self._guest.mac
        self._guest.macs.clear()
        self._guest.mac = addr.BROADCAST_MAC
        self._behind = self._with_flows(self._behind - self._named) | self._named
        self._several = False
        self._up_at = NEVER

    # Waiting for the guest ---------------------------------------------------------------------------------------

    def hold(self, target: bytes, deliver: Callback, give_up: Callback, now: float) -> bool:
        """Call deliver(now) when a guest has spoken, or give_up(now) if none does in time; False: there is no room."""
        if len(self._held) >= HELD_MAX:
            return False
        if not self._held:
            self._delay = SOLICIT_FIRST
            self._solicit_at = now + self._delay
            self._arm()
        if all(held.target != target for held in self._held):
            self.solicit(target)
        self._held.append(Held(now + HOLD, target, deliver, give_up))
        return True

    def _deliver(self, now: float) -> None:
        """A guest has spoken."""
        held, self._held = self._held, []
        self._solicit_at = NEVER
        each(held, _deliver, self._fault_of_held, now)

    def _solicit_again(self, now: float) -> None:
        """Give up what has waited for too long, and solicit for the rest."""
        late = [held for held in self._held if held.until <= now]
        self._held = [held for held in self._held if held.until > now]
        each(late, _give_up, self._fault_of_held, now)
        for target in dict.fromkeys(held.target for held in self._held):
            self.solicit(target)
        self._delay = min(2 * self._delay, SOLICIT_MAX)
        self._solicit_at = now + self._delay if self._held else NEVER

    def _fault_of_held(self, held: Held, e: Exception) -> None:
        record(self._drops, "what waits for the guest", e)

    def solicit(self, target: bytes) -> None:
        """Ask who has `target`, unless that was asked often enough in this second."""
        now = time.monotonic()
        if now - self._second >= 1:
            self._second, self._left = now, SOLICITED_PER_SECOND
        send = self._services.solicit4 if len(target) == 4 else self._services.solicit6
        if self._left > 0 and send is not None and addr.is_unicast(target):
            self._left -= 1
            send(target)

    # The link ----------------------------------------------------------------------------------------------------

    def link_up(self, now: float) -> None:
        """The guest's link has come up, perhaps unnoticed by the guest."""
        self._up_at = now + LINK_UP_DELAY
        self._arm()

    def _announce(self) -> None:
        each(self._services.on_link_up, _call, self._fault_of_service)
        guest = self._guest
        for target in (guest.addr4, guest.addr6, guest.addr6_ll):
            self.solicit(target)

    def _fault_of_service(self, callback: object, e: Exception) -> None:
        record(self._drops, "an announcement", e)

    def _arm(self) -> None:
        """Arm the timer for what is due first."""
        due = min(self._solicit_at, self._up_at)
        if due == NEVER:
            return
        if self._timer < 0:
            self._timer = self._timers.services.new(self._fired)
        self._timers.services.arm(self._timer, due)

    def _fired(self, now: float) -> None:
        if self._up_at <= now:
            self._up_at = NEVER
            self._announce()
        if self._solicit_at <= now:
            self._solicit_again(now)
        self._arm()


def _deliver(held: Held, now: float) -> None:
    held.deliver(now)


def _give_up(held: Held, now: float) -> None:
    held.give_up(now)


def _call(callback: Callable[[], None]) -> None:
    callback()
