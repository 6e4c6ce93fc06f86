"""Sockets of the flows that the guest begins: from the guest's port if it can be had.

A flow from a guest port that a listener of the host leads to is seen as coming from the listener's port: the peer's
answers, and its own first datagrams, reach the same program. So the sockets of these flows are bound to the listener's
port, beside it (`open_client`). `ports/udp_in.py` tells which listeners there are (`lead`), and hands on what such a
socket receives that is another client's: see `misdelivered`.

A flow from a port that the guest has in a multicast group is seen as coming from there, beside other programs that have
the port (`beside`): it is the port of mDNS, whose queriers take no answer from another one (RFC 6762, 6.7).
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from .. import addr
from ..flow.context import Context
from ..policy.rules import Listener
from .sock import Client, Misdelivered, SharedSocket, is_self_connected, open_client, open_socket, opener


class Outbound:
    """One for all flows of `Udp`."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.leading: dict[int, list[Listener]] = {}  # to a port of the guest
        self.misdelivered: list[Misdelivered] = []
        self.group_ports: set[int] = set()  # that receivers of groups have (`groups.py`)
        self.on_change: Callable[[], None] = _nothing  # called when listeners come or go
        self.timer = -1  # armed when there are some, outside of an event of a listener

    def lead(self, listener: Listener) -> None:
        """A listener leads to the guest's port `listener.to`."""
        leading = self.leading.setdefault(listener.to, [])
        leading.append(listener)
        leading.sort(key=_one_address)  # any peer of the guest reaches those of all addresses
        self.on_change()

    def lead_no_more(self, listener: Listener) -> None:
        """It closes, if it is one of those."""
        leading = self.leading.get(listener.to, [])
        if listener in leading:
            leading.remove(listener)
            self.on_change()

    def open_client(self, client: Client) -> Any:
        """Open the client's socket, on the side of its listener. Raises OSError."""
        make = opener(self._ctx, client.listener.rule.outbound)
        return open_client(lambda: make(addr.family(client.peer), socket.SOCK_DGRAM), client, self.misdelivered)

    def open(self, host: bytes, sport: int, dport: int, now: float) -> Any:
        """A socket connected to `host`, for a flow that the guest begins from port `sport`. Raises OSError."""
        fwd = self._ctx.fwd
        source, interface = fwd.source(host)
        for listener in self.leading.get(sport, ()) if interface is None else ():
            client = Client(listener, host, dport, source or bytes(len(host)), fwd.scope(host))
            try:
                sock = self.open_client(client)
            except OSError:
                continue  # the listener's port is not available
            if self.misdelivered:
                self._ctx.timers.services.arm(self.timer, now)
            if isinstance(sock, SharedSocket) or is_self_connected(sock, client.sockaddr(host, dport)):
                sock.close()  # a shared socket reports no errors; a self-connected one receives what it sends
                continue
            return sock
        return open_socket(fwd, host, sport, dport, beside=sport in self.group_ports)


def _one_address(listener: Listener) -> bool:
    return listener.rule.addr is not None and not addr.is_unspecified(listener.rule.addr)


def _nothing() -> None:
    """Without multicast: nothing follows listeners."""
