"""Handlers of services for frames of the guest. A service registers them when it is made, and `tap` calls them.

    registered by     handler is called with                             for
    ----------------  -------------------------------------------------  ------------------------------------------
    take_ethertype    MAC of the sender, bytes behind the Ethernet       frames that are neither IPv4 nor IPv6
                        header, now
    take_port         MAC, source, destination, source port, payload,    datagrams to a UDP port, whatever address;
                        now                                                an answer is the address that the guest has
    take_icmp         MAC, source, destination, message from its type    messages of ICMP or ICMPv6 of some types
                        byte on, now, TTL or hop limit (0: not known)
    take_protocol     the same, from behind the IP header                packets of another IP protocol

A handler raises `Malformed` for an invalid message. Frames without a handler are dropped and counted. TCP and UDP are
not registered: `tap` calls them directly, with all segments or datagrams of a flow at once.

`on_forget` is called when the guest is gone, `on_mac` with its address when it sends from another one.

The message, a view, is valid until the handler returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

FrameHandler = Callable[[bytes, bytes, float], None]
PortHandler = Callable[[bytes, bytes, bytes, int, bytes, float], bytes | None]
MessageHandler = Callable[[bytes, bytes, bytes, memoryview, float, int], None]

T = TypeVar("T")


class Taken(NamedTuple):
    """A handler of messages, and whether they may come in fragments."""

    handler: MessageHandler
    fragments: bool


class Services:
    """One per process. Tables end in 4 and 6 for the families."""

    __slots__ = ("ethertypes", "icmp4", "icmp6", "on_forget", "on_mac", "ports4", "ports6", "protocols4", "protocols6")

    def __init__(self) -> None:
        self.ethertypes: dict[int, FrameHandler] = {}
        self.ports4: dict[int, PortHandler] = {}
        self.ports6: dict[int, PortHandler] = {}
        self.icmp4: dict[int, Taken] = {}
        self.icmp6: dict[int, Taken] = {}
        self.protocols4: dict[int, Taken] = {}
        self.protocols6: dict[int, Taken] = {}
        self.on_forget: list[Callable[[], None]] = []
        self.on_mac: list[Callable[[bytes], None]] = []

    def take_ethertype(self, ethertype: int, handler: FrameHandler) -> None:
        """Frames of one EtherType go to `handler`."""
        _take(self.ethertypes, ethertype, handler)

    def take_port(self, v4: bool, port: int, handler: PortHandler) -> None:
        """Datagrams of a family to one port go to `handler`."""
        _take(self.ports4 if v4 else self.ports6, port, handler)

    def take_icmp(self, v4: bool, kinds: Iterable[int], handler: MessageHandler, *, fragments: bool = False) -> None:
        """Messages of ICMP or ICMPv6 of these types go to `handler`."""
        for kind in kinds:
            _take(self.icmp4 if v4 else self.icmp6, kind, Taken(handler, fragments))

    def take_protocol(self, v4: bool, protocol: int, handler: MessageHandler, *, fragments: bool = False) -> None:
        """Packets of an IP protocol go to `handler`."""
        _take(self.protocols4 if v4 else self.protocols6, protocol, Taken(handler, fragments))


def _take(table: dict[int, T], number: int, handler: T) -> None:
    """Each number goes to one service."""
    if number in table:
        raise ValueError(f"{number} is taken by another service")
    table[number] = handler
