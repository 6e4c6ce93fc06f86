"""ARP (RFC 826) for IPv4 over Ethernet."""

from __future__ import annotations

from struct import Struct

from ..drops import Drop
from ..lean.records import dataclass
from .cursor import Cursor, Malformed

# Hardware type, protocol type, their address lengths, operation, sender MAC and address, target MAC and address
LAYOUT = Struct("!HHBBH6s4s6s4s")
ETHERNET_IPV4 = (1, 0x0800, 6, 4)

REQUEST = 1
REPLY = 2


@dataclass(frozen=True, slots=True)
class Packet:
    """The packet after the Ethernet header."""

    operation: int
    sender_mac: bytes
    sender: bytes
    target_mac: bytes
    target: bytes

    @classmethod
    def parse(cls, data: bytes) -> Packet:
        """Bytes beyond the packet are padding of a short frame. Raises Malformed."""
        *kind, operation, sender_mac, sender, target_mac, target = Cursor(data, Drop.ARP_TRUNCATED).unpack(LAYOUT)
        if tuple(kind) != ETHERNET_IPV4:
            raise Malformed(Drop.ARP_FORMAT)
        return cls(operation, sender_mac, sender, target_mac, target)

    def emit(self) -> bytes:
        return LAYOUT.pack(*ETHERNET_IPV4, self.operation, self.sender_mac, self.sender, self.target_mac, self.target)
