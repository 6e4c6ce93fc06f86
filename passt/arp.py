"""ARP towards the guest (RFC 826): every address but its own is ours.

We are the gateway and, by translation, everything behind it, so a request for any address is answered with our MAC.

    request                                                  answer
    -------------------------------------------------------  ------------------------------
    for the address that is assigned to the guest            none: its own probes must pass
    announcement (RFC 5227, 2.3): sender is target           none
    probe (RFC 5227, 2.1.1): no sender, other target         ours
    anything else                                            ours

Replies and announcements of the guest teach us nothing: `tap.py` knows its MAC from every frame.
"""

from __future__ import annotations

from . import addr
from .flow.context import Context
from .policy.config import Config
from .wire import ether
from .wire.arp import REPLY, REQUEST, Packet


def ignore(packet: Packet, config: Config) -> bool:
    """Whether `packet` gets no answer."""
    if packet.operation != REQUEST or config.ip4 is None:
        return True
    announced = packet.sender == packet.target and not addr.is_unspecified(packet.sender)
    return announced or packet.target == config.ip4.addr


class Arp:
    """Answers requests."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def tap_handler(self, src_mac: bytes, payload: bytes, now: float) -> None:
        """A packet from the guest, from behind the Ethernet header. Raises Malformed."""
        request = Packet.parse(payload)
        config = self._ctx.config
        if ignore(request, config):
            return
        reply = Packet(
            REPLY,
            sender_mac=config.our_mac,
            sender=request.target,
            target_mac=request.sender_mac,
            target=request.sender,
        )
        self._ctx.link.send_frame(ether.HEADER.pack(src_mac, config.our_mac, ether.TYPE_ARP) + reply.emit())
