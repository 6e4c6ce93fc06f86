"""Handlers of services for frames of the guest. A service registers them when it is made, and `tap` calls them.

    registered by     handler is called with                             for
    ----------------  -------------------------------------------------  ------------------------------------------
    take_ethertype    MAC of the sender, bytes behind the Ethernet       frames of another EtherType; an answer is the
                        header, now                                         address that the guest has
    take_port         MAC, source, destination, source port, payload,    datagrams to a UDP port, whatever address;
                        now                                                an answer is the address that the guest has
    take_icmp         MAC, source, destination, message from its type    messages of ICMP or ICMPv6 of some types
                        byte on, now, fields (`ip_fields.py`)
    take_protocol     the same, from behind the IP header                packets of another IP protocol
    take_errors       key of a flow, 8 bytes that it sent the guest,     ICMP errors of the guest about packets of a
                      now; returns whether it did                        protocol (`guest_errors.py`)
    take_end          flow, reason                                       flows of a label whose address on the host is
                                                                           gone (`source.py`)

A handler raises `Malformed` for an invalid message. Frames without a handler are dropped and counted. TCP and UDP are
not registered: `tap` calls them directly, with all segments or datagrams of a flow at once.

`on_forget` is called when the guest is gone, `on_link_up` a moment after its link has come up: our addresses are
announced. `solicit4` and `solicit6` ask the guest for the MAC address of an address (`flow/neighbours.py`). `announce4`
and `announce6` tell it the one of an address (`daemon/lan.py`).

The message, a view, is valid until the handler returns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from ..lean.tuples import NamedTuple
from ..wire.checksum import PROTO_ICMP, PROTO_ICMPV6
from .table import Flow

FrameHandler = Callable[[bytes, bytes, float], bytes | None]
PortHandler = Callable[[bytes, bytes, bytes, int, bytes, float], bytes | None]
MessageHandler = Callable[[bytes, bytes, bytes, memoryview, float, int], None]
ErrorHandler = Callable[[bytes, bytes, float], bool]
EndHandler = Callable[[Flow, str], None]

T = TypeVar("T")
Name = TypeVar("Name", int, str)


class Taken(NamedTuple):
    """A handler of messages, and whether they may come in fragments."""

    handler: MessageHandler
    fragments: bool


class Services:
    """One per process. Tables end in 4 and 6 for the families."""

    __slots__ = (
        *("enders", "errors", "ethertypes", "icmp4", "icmp6", "ports4", "ports6", "protocols4", "protocols6"),
        *("announce4", "announce6", "on_forget", "on_link_up", "solicit4", "solicit6"),
    )

    def __init__(self) -> None:
        self.ethertypes: dict[int, FrameHandler] = {}
        self.ports4: dict[int, PortHandler] = {}
        self.ports6: dict[int, PortHandler] = {}
        self.icmp4: dict[int, Taken] = {}
        self.icmp6: dict[int, Taken] = {}
        self.protocols4: dict[int, Taken] = {}
        self.protocols6: dict[int, Taken] = {}
        self.errors: dict[int, ErrorHandler] = {}
        self.enders: dict[str, EndHandler] = {}
        self.on_forget: list[Callable[[], None]] = []
        self.on_link_up: list[Callable[[], None]] = []
        self.solicit4: Callable[[bytes], None] | None = None
        self.solicit6: Callable[[bytes], None] | None = None
        self.announce4: Callable[[bytes], None] | None = None
        self.announce6: Callable[[bytes], None] | None = None

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

    def taken(self, v4: bool, protocol: int, kind: int) -> Taken | None:
        """The service that took a message, if one did; `kind` is its first byte, the type of ICMP."""
        if protocol != (PROTO_ICMP if v4 else PROTO_ICMPV6):
            return (self.protocols4 if v4 else self.protocols6).get(protocol)
        return (self.icmp4 if v4 else self.icmp6).get(kind)

    def take_errors(self, protocol: int, handler: ErrorHandler) -> None:
        """ICMP errors of the guest about packets of an IP protocol go to `handler`."""
        _take(self.errors, protocol, handler)

    def take_end(self, label: str, handler: EndHandler) -> None:
        """Flows of a label are ended by `handler`, which tells the guest and the host peer where they need to know."""
        _take(self.enders, label, handler)


def _take(table: dict[Name, T], name: Name, handler: T) -> None:
    """Each number or label goes to one service."""
    if name in table:
        raise ValueError(f"{name} is taken by another service")
    table[name] = handler
