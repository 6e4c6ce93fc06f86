"""The flow table: what the guest talks to whom about, in all protocols.

A flow has an index, which is what an epoll reference carries, and a key, under which its protocol finds it:

    IPv4: guest address (4), peer address (4), guest port (2), peer port (2)
    IPv6: guest address (16), peer address (16), guest port (2), peer port (2)

as they stand in a packet from the guest, so a look-up is one slice of the packet and one `dict` access. Python hashes
`bytes` by SipHash under a key drawn at start, so a guest cannot choose keys that collide (`check_hash`).

States, changed here and nowhere else:

    state   what may be done                                      left by
    ------  ----------------------------------------------------  --------------
    FREE    nothing: the index waits to be used again             insert
    NEW     the protocol opens its socket, sets up headers        activate, free
    ACTIVE  events and packets are handled                        free

Ping and UDP flows go oldest first when the table is full; established TCP is never harmed (the protocols decide).
"""

from __future__ import annotations

import sys
from typing import Any

from .. import log
from ..log import Fatal

FREE, NEW, ACTIVE = range(3)
STATE_NAMES = ("FREE", "NEW", "ACTIVE")
FLOW_MAX = 131071


class Flow:
    """Common part. `kind` is the text of log lines; subclasses add their slots and set `kind`."""

    __slots__ = ("fd", "index", "key", "sock", "state")
    kind = "flow"

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.index = -1
        self.state = FREE
        self.fd = -1
        self.sock: Any = None


class TableFull(Exception):
    """No index is free."""


class FlowTable:
    """Index -> flow, for all protocols together. Keys are kept by each protocol in a dict of its own."""

    def __init__(self, limit: int = FLOW_MAX) -> None:
        self.by_index: list[Flow | None] = []
        self._free: list[int] = []
        self.limit = limit
        self.count = 0

    def insert(self, flow: Flow) -> None:
        """Give `flow` an index: FREE -> NEW. Raises TableFull."""
        if self._free:
            flow.index = self._free.pop()
            self.by_index[flow.index] = flow
        elif len(self.by_index) < self.limit:
            flow.index = len(self.by_index)
            self.by_index.append(flow)
        else:
            raise TableFull
        self.count += 1
        self._set(flow, NEW)

    def activate(self, flow: Flow) -> None:
        """NEW -> ACTIVE."""
        self._set(flow, ACTIVE)

    def free(self, flow: Flow) -> None:
        """Any state but FREE -> FREE; the index may be used again at once. The caller has retired the socket.

        Raises RuntimeError for a flow that is not in the table: a second time would give its index to two others.
        """
        if flow.state == FREE:
            raise RuntimeError(f"flow {flow.index} ({flow.kind}) is not in the table")
        self.by_index[flow.index] = None
        self._free.append(flow.index)
        self.count -= 1
        self._set(flow, FREE)

    def _set(self, flow: Flow, state: int) -> None:
        if log.debug_on:
            log.debug(f"Flow {flow.index} ({flow.kind}): {STATE_NAMES[flow.state]} -> {STATE_NAMES[state]}")
        flow.state = state


def check_hash() -> None:
    """Raise Fatal unless `bytes` keys are hashed by SipHash under a random key."""
    if not sys.hash_info.algorithm.startswith("siphash") or not sys.flags.hash_randomization:
        raise Fatal(
            f"the flow table needs Python's SipHash with a random key (here: {sys.hash_info.algorithm}, "
            f"randomisation {'on' if sys.flags.hash_randomization else 'off'}): unset PYTHONHASHSEED"
        )
