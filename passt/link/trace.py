"""--trace: every packet in one line, decoded by scapy, with its direction and its flow.

    guest -> host [192.0.2.2]:43210 -> [198.51.100.7]:443 TCP 66: Ether / IP / TCP 192.0.2.2:43210 > ... S

scapy is imported with this module, which only --trace imports: it takes a second.
"""

from __future__ import annotations

import logging
import warnings

from .. import log
from .pcap import complete

logging.getLogger("scapy").setLevel(logging.CRITICAL)  # it warns about routes and providers that are not used here
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecated ciphers, in an optional part
    from scapy.layers.dhcp import DHCP  # noqa: F401  importing binds the layer to its ports, as does each below
    from scapy.layers.dhcp6 import DHCP6  # noqa: F401
    from scapy.layers.dns import DNS  # noqa: F401
    from scapy.layers.inet import ICMP, IP, TCP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

DIRECTIONS = ("guest -> host", "host -> guest")


def capture(to_guest: bool, data: bytes) -> None:
    """Log a frame that comes with its vnet header."""
    log.trace(f"{DIRECTIONS[to_guest]} {line(complete(data))}")


def line(frame: bytes) -> str:
    """Flow, length and layers of an Ethernet frame. Never raises: the frame is the guest's."""
    try:
        packet = Ether(frame)
        return f"{_flow(packet)}{len(frame)}: {packet.summary()}"
    except Exception as e:  # scapy's dissectors raise whatever comes up in them
        return f"{len(frame)}: not decoded ({type(e).__name__}): {frame[:64].hex()}"


def _flow(packet: Ether) -> str:
    """`[src]:port -> [dst]:port protocol `, as far as there is one."""
    network = packet.getlayer(IP) or packet.getlayer(IPv6)
    if network is None:
        return ""
    for layer in (TCP, UDP):
        if layer in packet:
            l4 = packet[layer]
            return f"[{network.src}]:{l4.sport} -> [{network.dst}]:{l4.dport} {layer.__name__} "
    kind = "ICMP " if ICMP in packet else "ICMPv6 " if isinstance(network, IPv6) and network.nh == 58 else ""
    return f"[{network.src}] -> [{network.dst}] {kind}"
