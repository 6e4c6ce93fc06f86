"""Headers of flows, written again where a MAC address is another one: that of the guest, or that of the peer.

A flow has its Ethernet header ready, from its beginning on. Later the guest's address may speak from another MAC
address (`neighbours.py`), or the host's neighbour may have another one (`policy/lan.py`). Either is rare, and a hostile
host may cause it at will, so it costs the same however many flows there are and however often it happens:

    event                             consequence
    --------------------------------  ------------------------------------------------------------------------------
    a MAC address is another one      a pass over all flows begins: the first REWRITES of them at once
    timer, STEP later                 the next REWRITES
    the same, during a pass or        another pass, with the next timer
      less than STEP behind it
"""

from __future__ import annotations

from collections import Counter

from ..drops import Reason
from ..loop.each import each, record
from ..loop.timers import TimerPool
from ..policy.guest import Guest
from ..policy.lan import Lan
from .table import Flow, FlowTable

REWRITES = 128  # flows: 70 us
STEP = 0.001  # s


class Headers:
    """Passes over the flows of one process."""

    def __init__(self, flows: FlowTable, guest: Guest, lan: Lan, timers: TimerPool, drops: Counter[Reason]) -> None:
        self._flows, self._guest, self._lan = flows, guest, lan
        self._timers, self._drops = timers, drops
        self._timer = -1
        self._at = -1  # index of the next flow of the pass; -1: there is none
        self._again = self._armed = False

    def rewrite(self, now: float) -> None:
        """Write the MAC addresses as they are now into the headers of all flows."""
        self._again = True
        if not self._armed:
            self._step(now)

    def _step(self, now: float) -> None:
        self._armed = False
        if self._at < 0:
            if not self._again:
                return
            self._at, self._again = 0, False
        at, flows = self._at, self._flows.by_index
        each([flow for flow in flows[at : at + REWRITES] if flow is not None], self._update, self._fault_at)
        self._at = at + REWRITES if at + REWRITES < len(flows) else -1
        if self._timer < 0:
            self._timer = self._timers.services.new(self._step)
        self._timers.services.arm(self._timer, now + STEP)
        self._armed = True

    def _update(self, flow: Flow) -> None:
        key = flow.key
        n = (len(key) - 4) // 2
        flow.set_macs(self._guest.mac_of(key[:n]), self._lan.mac_of(key[n : 2 * n]))

    def _fault_at(self, flow: Flow, e: Exception) -> None:
        record(self._drops, "the header of a flow", e)
