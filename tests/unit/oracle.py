"""scapy as the independent oracle for frames that we build: it takes them apart, and computes the same again."""

from __future__ import annotations

from scapy.layers.dhcp import BOOTP
from scapy.layers.dhcp6 import DHCP6_Advertise
from scapy.layers.inet import IP, UDP, IPerror
from scapy.layers.inet6 import IPerror6, IPv6
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

LAYERS = (ARP, IP, IPv6, BOOTP, DHCP6_Advertise)  # imported so that Ether and UDP can find what is in them

QUOTED = (IPerror, IPerror6)
COMPUTED = ("chksum", "cksum", "len", "plen", "optlen", "ihl", "dataofs")


def dissect(frame: bytes) -> Packet:
    """The frame as scapy sees it; nothing in it is left over or unknown to it."""
    packet = Ether(frame)
    assert not packet.haslayer(Raw), packet.show(dump=True)
    return packet


def recomputed(frame: bytes) -> bytes:
    """The frame with lengths and checksums filled in by scapy, but for those in what an error message quotes.

    The payload of a datagram stays as it is: its port may be that of a protocol which scapy would write another way.
    """
    packet = Ether(frame)
    layer = packet
    while layer and not isinstance(layer, QUOTED):
        for field in COMPUTED:
            if field in layer.fields:
                delattr(layer, field)
        if isinstance(layer, UDP) and layer.payload:
            payload = layer.payload.original
            layer.remove_payload()
            layer.add_payload(payload)
        layer = layer.payload
    return bytes(packet)
