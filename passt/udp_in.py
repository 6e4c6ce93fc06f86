"""UDP that others begin: first datagrams from listening sockets, and a connected socket for each client.

A listener (`core/rules.py`) gets the datagrams of everybody. Each client gets a socket of its own, bound to the address
and port that it wrote to and connected to it (`udp_sock.open_client`): from then on the kernel delivers what it sends
there, and answers leave from there. So the listener sees first datagrams, and whatever cannot have a socket.

    rule      client      configuration                  goes to                        address that is seen
    --------  ----------  -----------------------------  -----------------------------  ----------------------------
    outbound  loopback    any                            UdpSplice: the host            loopback
    inbound   loopback    no --no-splice                 UdpSplice: the namespace       loopback, or the namespace's
    inbound   any other   --splice-only                  nobody, counted
    inbound   any other   otherwise                      Udp: the guest, by the tap     `Forwarding.inbound_source`

Order. The event brings a batch, grouped by client and address of ours. What the kernel queues at the listener while the
batch is handled is older than anything at the new sockets, so the listener is read until it is empty, for a bounded
number of batches. Only then those datagrams have their turn that came to a new socket before it was connected, of its
own client or of others, who may get sockets in turn. What comes later to a new socket is read in a later turn.

A datagram to a group or a broadcast address always comes by the listener, and goes to the flow of its client. So does
all of it if the client cannot have a socket because we may not bind the port (`udp_sock.Shared`).

Dropped and counted: sources that nobody can answer to (multicast, broadcast, unspecified, port 0); clients of a family
that the guest has no address in; clients for whom there is no socket, for the reason that the kernel gives.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Any

from . import addr
from .core.context import Context
from .core.rules import Listener
from .linux.mmsg import SLOT, AddressReceiver, Envelope
from .udp import Udp
from .udp_io import reason
from .udp_sock import Client, Letter, open_client, opener
from .udp_splice import UdpSplice

BATCHES_MAX = 8  # for one event
LETTERS_MAX = 1024  # handled for one event


def refuse(peer: bytes, port: int) -> str | None:
    """Why nobody can answer to a datagram from there, None if that is possible."""
    if not addr.is_unicast(peer):
        return "udp: source is not unicast"
    return None if port else "udp: source port 0"


class UdpIn:
    """What listeners get. `udp` is None if there is no tap."""

    def __init__(self, ctx: Context, udp: Udp | None) -> None:
        self._ctx = ctx
        self._udp = udp
        self.splice = UdpSplice(ctx)
        self._receiver = AddressReceiver()
        self._letters: list[Letter] = []

    def sock_handler(self, listener: Listener, now: float) -> None:
        """A listener is readable."""
        for _ in range(BATCHES_MAX):
            try:
                self._receive(listener, now)
            except BlockingIOError:
                break
            except OSError as e:
                self._ctx.drops[f"udp: receive: {reason(e)}"] += 1
                break
        self._deliver_letters(now)

    def _receive(self, listener: Listener, now: float) -> None:
        """A batch. Raises BlockingIOError, OSError."""
        receiver = self._receiver
        lengths, envelopes = receiver.receive_from(listener.fd)
        groups: dict[bytes, list[int]] = {}
        start = 0
        for length, envelope in zip(lengths, envelopes, strict=True):
            groups.setdefault(envelope, []).extend((start, start + length, 0))
            start += SLOT
        for envelope, frames in groups.items():
            e = Envelope.parse(envelope)
            self._dispatch(Client(listener, e.peer, e.port, e.local, e.scope), receiver.mv, frames, now)

    def _deliver_letters(self, now: float) -> None:
        """Hand out what came to sockets of clients before they were connected."""
        if not self._letters:
            return
        waiting = deque[Letter]()
        for _ in range(LETTERS_MAX):
            waiting += self._letters
            self._letters.clear()
            if not waiting:
                return
            client, payload = waiting.popleft()
            self._dispatch(client, memoryview(payload), [0, len(payload), 0], now)
        self._ctx.drops["udp: too much for one event"] += len(waiting) + len(self._letters)
        self._letters.clear()

    def _dispatch(self, client: Client, mv: memoryview, frames: list[int], now: float) -> None:
        """Datagrams of one client, [start, end, 0]* in `mv`."""
        why = refuse(client.peer, client.port)
        if why is not None:
            self._ctx.drops[why] += len(frames) // 3
        elif self._ctx.fwd.spliced(client.peer, client.listener.rule):
            self.splice.inbound(client, lambda: self._open(client), mv, frames, now)
        else:
            self._to_guest(client, mv, frames, now)

    def _to_guest(self, client: Client, mv: memoryview, frames: list[int], now: float) -> None:
        """Datagrams of one client, through the tap."""
        ctx, listener = self._ctx, client.listener
        source = ctx.fwd.inbound_source(client.peer, ctx.guest)
        target = None if source is None else ctx.fwd.inbound_target(source, listener.rule, ctx.guest)
        if self._udp is None:
            ctx.drops["udp: not from loopback"] += len(frames) // 3
        elif source is None or target is None:
            ctx.drops["udp: no address to deliver to or from"] += len(frames) // 3
        else:
            key = target + source + listener.to.to_bytes(2, "big") + client.port.to_bytes(2, "big")
            self._udp.inbound(key, client, lambda: self._open(client), mv, frames, now)

    def _open(self, client: Client) -> Any:
        """The client's socket, on the side that the listener is on. Raises OSError."""
        make = opener(self._ctx, client.listener.rule.outbound)
        return open_client(lambda: make(addr.family(client.peer), socket.SOCK_DGRAM), client, self._letters)

    def end(self, listener: Listener) -> None:
        """A listener closes: what came by it ends with it, since its sockets keep the port from the next listener."""
        self.splice.end(listener)
        if self._udp is not None:
            self._udp.end(listener)
