"""Flows whose address on the host is gone: their sockets cannot send any more, and their peers cannot answer.

A socket keeps the local address that it had when it was connected. After a change of the host's addresses the kernel
goes on to retransmit from an address that is nowhere, for a quarter of an hour. So each flow's local address is
compared with those that the host has:

    local address                          consequence
    -------------------------------------  ------------------------------------------------------------------------
    the host has it, loopback, or any      none: the flow goes on
    gone                                   TCP: RST to the guest and to the host peer. UDP, ping: the flow ends, and
                                             the next packet begins another one, from the new address
    gone, and so is the host's family      likewise; the guest is told of a UDP flow's end, too, by an ICMP error,
                                             since there is no other address

A pass is over all flows, SHARE at a time, every STEP. Another change begins a pass anew. Queries to resolvers have a
timeout of seconds, and flows between loopbacks have no such address: both are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable

from .. import addr
from ..calls import calls
from ..loop.each import each, record
from .context import Context
from .table import FREE, Flow

SHARE = 256  # flows: half a millisecond
STEP = 0.001  # s
REASON = "host address gone"
LOST = "host family gone"

CALLS = calls("getsockname")


def local_address(flow: Flow) -> bytes | None:
    """The address that the flow's socket is bound to on the host; None if it has no socket of its own."""
    if flow.sock is None or flow.fd < 0:
        return None
    try:
        host, *_ = flow.sock.getsockname()
    except OSError:
        return None  # the handler of its events meets the error
    return addr.unmapped(addr.packed(host.partition("%")[0]))


def gone(local: bytes, addresses: frozenset[bytes]) -> bool:
    """Whether a local address is none of the host's `addresses`."""
    return not (addr.is_loopback(local) or addr.is_unspecified(local) or local in addresses)


class Sources:
    """Passes over the flows of one process."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._addresses: frozenset[bytes] = frozenset()
        self._lengths: frozenset[int] = frozenset()
        self._lost: frozenset[int] = frozenset()
        self._at = 0
        self._timer = -1
        self.ended = 0  # flows

    def check(self, addresses: Iterable[bytes], lengths: Iterable[int], now: float, lost: Iterable[int] = ()) -> None:
        """Begin a pass: these are the host's addresses. `lengths` has 4, 16, or both: the families to look at. The host
        has lost those of `lost`.
        """
        self._addresses, self._lengths, self._at = frozenset(addresses), frozenset(lengths), 0
        self._lost = frozenset(lost)
        if self._ctx.flows.count:
            if self._timer < 0:
                self._timer = self._ctx.timers.services.new(self._step)
            self._ctx.timers.services.arm(self._timer, now)

    def _step(self, now: float) -> None:
        flows, at = self._ctx.flows.by_index, self._at
        self._at += SHARE
        each([f for f in flows[at : self._at] if f is not None], self._look, self._fault_at)
        if self._at < len(flows):
            self._ctx.timers.services.arm(self._timer, now + STEP)

    def _look(self, flow: Flow) -> None:
        end = self._ctx.services.enders.get(flow.label)
        if end is None or flow.state == FREE:
            return
        local = local_address(flow)
        if local is not None and len(local) in self._lengths and gone(local, self._addresses):
            self.ended += 1
            end(flow, LOST if len(local) in self._lost else REASON)

    def _fault_at(self, flow: Flow, e: Exception) -> None:
        """A fault of ours in the look at one flow: it ends, and the others have their turn (`each`)."""
        record(self._ctx.drops, "the address of a flow", e)
        end = self._ctx.services.enders.get(flow.label)
        if end is not None and flow.state != FREE:
            end(flow, "fault")

    def in_use(self, wanted: Iterable[bytes]) -> set[bytes]:
        """Those of the guest's addresses `wanted` that flows have."""
        left, found = set(wanted), set[bytes]()
        for flow in self._ctx.flows.by_index:
            if not left:
                break
            if flow is not None and (a := flow.key[: (len(flow.key) - 4) // 2]) in left:
                left.discard(a)
                found.add(a)
        return found
