"""ARP towards the guest (RFC 826): our MAC address answers for addresses that the guest does not have.

We are the gateway and, by translation, all hosts behind it. A probe (RFC 5227, 2.1.1) is a request without a sender
address: the guest asks whether it may take the target. An answer to a probe means a conflict, so a probe has an answer
only if its target is in use on the link: the gateway, mapped addresses, resolvers (`Config.ours`).

    request                                                  answer
    -------------------------------------------------------  ------------------------------
    for the address that is assigned to the guest            none
    for an address that no host has: loopback, multicast,    none
      broadcast
    probe for an address of ours                             our MAC
    probe for 0.0.0.0, sent by `qrap`                        our MAC
    probe for any other address                              none: it is free
    announcement (RFC 5227, 2.3): sender is target           none
    anything else                                            our MAC

    from the guest                                           consequence
    -------------------------------------------------------  ----------------------------------------------------
    a packet whose sender is an address of ours: a conflict  an announcement of ours (RFC 5227, 2.4 c), at most one
                                                               in `DEFEND_INTERVAL`, and a line in the log

Replies and announcements of the guest have no other effect: `tap.py` has its MAC from every frame.
"""

from __future__ import annotations

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .policy.config import Config
from .wire import ether
from .wire.arp import REPLY, REQUEST, Packet
from .wire.cursor import Malformed

DEFEND_INTERVAL = 10.0  # s; RFC 5227, 1.1
NO_MAC = bytes(6)


def ignore(packet: Packet, config: Config) -> bool:
    """Whether `packet` gets no answer."""
    if packet.operation != REQUEST or config.ip4 is None:
        return True
    target = packet.target
    if target == config.ip4.addr or addr.is_loopback(target) or addr.is_multicast(target) or target == addr.BROADCAST4:
        return True
    if addr.is_unspecified(packet.sender):
        return not (addr.is_unspecified(target) or config.ours(target))
    return packet.sender == target


def conflict(packet: Packet, config: Config) -> bool:
    """Whether the guest uses an address of ours as its own."""
    return packet.sender_mac != config.our_mac and config.ours(packet.sender)


class Arp:
    """Answers requests, and defends our addresses."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._defend_at = 0.0  # earliest time of the next announcement
        ctx.services.take_ethertype(ether.TYPE_ARP, self.tap_handler)

    def tap_handler(self, src_mac: bytes, payload: bytes, now: float) -> None:
        """A packet from the guest, without its Ethernet header. Raises Malformed."""
        config = self._ctx.config
        if config.ip4 is None:
            raise Malformed(Drop.IPV4_DISABLED)
        packet = Packet.parse(payload)
        if conflict(packet, config):
            self._defend(packet, now)
        if not ignore(packet, config):
            self._send(src_mac, Packet(REPLY, config.our_mac, packet.target, packet.sender_mac, packet.sender))

    def _defend(self, packet: Packet, now: float) -> None:
        """Announce that an address is ours, unless that was done a short while ago."""
        if now < self._defend_at:
            return
        self._defend_at = now + DEFEND_INTERVAL
        theirs = f"{addr.text(packet.sender)} at {addr.mac_text(packet.sender_mac)}"
        log.warn_ratelimited("ARP conflict", f"ARP: the guest uses an address that is not free: {theirs}", now)
        announced = Packet(REQUEST, self._ctx.config.our_mac, packet.sender, NO_MAC, packet.sender)
        self._send(addr.BROADCAST_MAC, announced)

    def _send(self, dst_mac: bytes, packet: Packet) -> None:
        header = ether.HEADER.pack(dst_mac, self._ctx.config.our_mac, ether.TYPE_ARP)
        self._ctx.link.send_frame(header + packet.emit())
