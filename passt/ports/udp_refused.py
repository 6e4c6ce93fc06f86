"""Datagrams that meet a closed port of the guest, by the tap: their sender is told, where that is possible.

The guest answers by an ICMP error (`flow/guest_errors.py`). A UDP socket can receive such an error, and send none. The
host's kernel sends Port Unreachable by itself, to any sender, for a datagram that no socket takes. So the flow ends:

    flow of                                   the sender's next datagram
    ----------------------------------------  ------------------------------------------------------------------------
    the guest, whose program has ended        Port Unreachable: its socket is closed, and no other one takes it
    a client of a listener on loopback        the same: the listener takes nothing for a second (`splice/refusal.py`)
    a client of any other listener            reaches the guest, as before: nothing is told, as by a host that drops
"""

from __future__ import annotations

from functools import partial

from ..flow.context import Context
from ..flow.table import ACTIVE
from ..splice.refusal import Refusals
from ..udp import Udp
from ..udp_engine.flow import UdpFlow
from ..wire.checksum import PROTO_UDP


class UdpRefused:
    """Takes the guest's errors about datagrams that it was sent."""

    def __init__(self, ctx: Context, udp: Udp, refusals: Refusals) -> None:
        self._reactor = ctx.reactor
        self._udp = udp
        self._refusals = refusals
        ctx.services.take_errors(PROTO_UDP, self.guest_error)

    def guest_error(self, key: bytes, upper: bytes, now: float) -> bool:
        """The guest sent an error about a datagram that begins with `upper`; returns whether it is one of a flow."""
        flow = self._udp.flow(key)
        if flow is None:
            return False
        self._reactor.between_turns(partial(self._end, flow))
        return True

    def _end(self, flow: UdpFlow, now: float) -> None:
        """End the flow unless it has ended, with its socket closed at once. Raises OSError."""
        client = flow.client
        if flow.state == ACTIVE and (client is None or self._refusals.refuse(client.listener, now)):
            self._udp.end_flow(flow, "refused by guest")
