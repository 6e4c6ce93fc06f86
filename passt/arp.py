"""ARP towards the guest (RFC 826): we answer for addresses that the guest does not have.

We are the gateway and, by translation, all hosts behind it. The MAC address in an answer is that of `policy/lan.py`:
ours, or that of a neighbour on the host's link. A probe (RFC 5227, 2.1.1) is a request without a sender
address: the guest asks whether it may take the target. An answer to a probe means a conflict, so a probe has an answer
only if its target is in use on the link: the gateway, mapped addresses, resolvers (`Config.ours`).

    request                                                  answer
    -------------------------------------------------------  ------------------------------
    for the address that is assigned to the guest            none
    for an address that no host has: loopback, multicast,    none
      broadcast
    probe for an address of ours                             its MAC address
    probe for 0.0.0.0, sent by `qrap`                        a MAC address
    probe for any other address                              none: it is free, and going to be the guest's
                                                               (`flow/neighbours.py`)
    announcement (RFC 5227, 2.3): sender is target           none
    for an address of another machine behind the link        none: that one answers
    anything else                                            its MAC address

    from the guest                                           consequence
    -------------------------------------------------------  ----------------------------------------------------
    a packet whose sender is an address of ours: a conflict  an announcement of ours (RFC 5227, 2.4 c), at most one
                                                               in `DEFEND_INTERVAL`, and a line in the log

    guest's link comes up                                    our address is announced (RFC 5227, 3), and the assigned
                                                               address is solicited
    `flow/neighbours.py` does not know the guest's MAC       a request from our address
    an address has another MAC than the guest was told       it is announced

The sender of any other packet is where that address of the guest is. `tap.py` has the MAC from every frame.
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


def conflict(packet: Packet, config: Config, mac: bytes) -> bool:
    """Whether the guest uses an address of ours, which has `mac`, as its own."""
    return packet.sender_mac != mac and config.ours(packet.sender)


class Arp:
    """Answers requests, and defends our addresses."""

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._lan = ctx, ctx.lan
        self._defend_at = 0.0  # earliest time of the next announcement
        ctx.services.take_ethertype(ether.TYPE_ARP, self.tap_handler)
        ctx.services.solicit4 = self.solicit
        ctx.services.announce4 = self._announce
        ctx.services.on_link_up.append(self.announce)

    def tap_handler(self, src_mac: bytes, payload: bytes, now: float) -> bytes | None:
        """A packet from the guest, without its Ethernet header. Returns its sender's address. Raises Malformed."""
        config = self._ctx.config
        if config.ip4 is None:
            raise Malformed(Drop.IPV4_DISABLED)
        packet = Packet.parse(payload)
        if conflict(packet, config, self._lan.mac_of(packet.sender)):
            self._defend(packet, now)
        if addr.is_unspecified(packet.sender) and not config.ours(packet.target):
            self._ctx.neighbours.probed(packet.target)
        if not (ignore(packet, config) or self._ctx.guest.is_beside(packet.target, src_mac)):
            mac = self._lan.tell(packet.target)
            self._send(src_mac, Packet(REPLY, mac, packet.target, packet.sender_mac, packet.sender))
        return None if config.ours(packet.sender) else packet.sender

    def solicit(self, target: bytes) -> None:
        """Ask who has `target`, an address of the guest."""
        config = self._ctx.config
        if config.ip4 is not None:
            source = config.ip4.our_addr or addr.ANY4
            self._send(addr.BROADCAST_MAC, Packet(REQUEST, self._lan.tell(source), source, NO_MAC, target))

    def announce(self) -> None:
        """The guest's link has come up."""
        config = self._ctx.config
        if config.ip4 is None:
            return
        if (ours := config.ip4.our_addr) is not None:
            self._announce(ours)
        if config.ip4.addr != self._ctx.guest.addr4:
            self.solicit(config.ip4.addr)

    def _defend(self, packet: Packet, now: float) -> None:
        """Announce that an address is ours, unless that was done a short while ago."""
        if now < self._defend_at:
            return
        self._defend_at = now + DEFEND_INTERVAL
        theirs = f"{addr.text(packet.sender)} at {addr.mac_text(packet.sender_mac)}"
        log.warn_ratelimited("ARP conflict", f"ARP: the guest uses an address that is not free: {theirs}", now)
        self._announce(packet.sender)

    def _announce(self, a: bytes) -> None:
        """Tell the guest the MAC address of `a` (RFC 5227, 3)."""
        self._send(addr.BROADCAST_MAC, Packet(REQUEST, self._lan.tell(a), a, NO_MAC, a))

    def _send(self, dst_mac: bytes, packet: Packet) -> None:
        header = ether.HEADER.pack(dst_mac, packet.sender_mac, ether.TYPE_ARP)
        self._ctx.link.send_frame(header + packet.emit())
