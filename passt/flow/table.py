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

What is told of a flow
======================

The debug log has a line for its beginning and one for its end, with the reason that whoever ended it gave:

    Flow 12 (TCP connection): 10.0.2.15:40000 -> 93.184.216.34:443 opened
    Flow 12 (TCP connection): closed: reset by guest; 1234 bytes out, 567 in, 1.2 s

"out" is from the guest to the host. Where the host's side is another than the guest knows (a mapped address, a client
on loopback), the first line says so. `info` tells the same of a flow that is alive, and all else that can be known.
None of this costs anything while nobody asks: a protocol keeps no count that the kernel, or its own sequence numbers,
can give; where it must, that is one addition for a batch.

Flows are counted by their `label` when they begin, and by label and reason when they end. Reasons are few and fixed:
those of the protocols, and what the kernel says (`reason_of`).
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .. import addr, log
from ..calls import calls
from ..log import Fatal

CALLS = calls("getsockname")

FREE, NEW, ACTIVE = range(3)
STATE_NAMES = ("FREE", "NEW", "ACTIVE")
FLOW_MAX = 131071
LABELS = ("tcp", "tcp_splice", "udp", "udp_splice", "dns", "ping")  # all there are
GUEST, HOST = "guest", "host"  # who began a flow
RECENT = 5.0  # s since the last packet of an active flow; then it is idle

_REASONS = {
    errno.ECONNREFUSED: "refused",
    errno.ECONNRESET: "reset by peer",
    errno.EPIPE: "reset by peer",
    errno.ETIMEDOUT: "timed out",
    errno.EHOSTUNREACH: "no route",
    errno.ENETUNREACH: "no route",
    errno.EMFILE: "no descriptor",
    errno.ENFILE: "no descriptor",
}


def reason_of(error: int) -> str:
    """Why a flow ends whose socket failed with an errno."""
    return _REASONS.get(error) or os.strerror(error).lower()


def name_of(ask: Callable[[], Any]) -> str:
    """What getsockname() of a socket says, as ADDRESS:PORT; empty if it has no such end (any more)."""
    try:
        host, port, *_ = ask()
    except OSError:
        return ""
    return addr.host_port(addr.unmapped(addr.packed(host.partition("%")[0])), port)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """Who talks to whom, as ADDRESS:PORT; what is not known (yet, or any more) is empty."""

    began: str  # GUEST or HOST
    guest: str
    peer: str  # as the guest sees it
    host: str  # whom our socket on the host is connected to

    def __str__(self) -> str:
        """A -> B, the one who began first; and who that is on the host, if the guest knows it by another name."""
        if self.began == GUEST:
            other = f" (host {self.host})" if self.host not in ("", self.peer) else ""
            return f"{self.guest} -> {self.peer or self.host}{other}"
        other = f" (seen as {self.peer})" if self.peer not in ("", self.host) else ""
        return f"{self.host}{other} -> {self.guest}"


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """What only a TCP connection has. Windows and queues in bytes; None: not known, or no such side."""

    rtt: float | None  # s, of the host's socket
    snd_wnd: int | None  # what the guest is ready to take
    rcv_wnd: int | None  # what the guest was promised
    resent_to_guest: int | None  # retransmissions to the guest
    resent_to_host: int | None  # segments that the host's kernel has sent again
    queue_to_guest: int | None  # bytes received, and not yet acknowledged by the guest
    queue_to_host: int | None  # bytes taken from the guest, and not yet acknowledged by the peer


@dataclass(frozen=True, slots=True)
class FlowInfo:
    """A flow, as it is shown. Bytes are payload; times in seconds."""

    index: int
    protocol: str  # tcp, udp, icmp
    path: str  # tap, splice
    endpoints: Endpoints
    state: str  # TCP: its events; others: active, idle
    to_guest: int
    to_host: int
    age: float
    idle: float | None
    tcp: TcpInfo | None = None

    def row(self) -> dict[str, object]:
        """For JSON: no value but text, numbers, None."""
        tcp: dict[str, object] = {}
        if self.tcp is not None:
            tcp = {name: getattr(self.tcp, name) for name in self.tcp.__slots__}
            if self.tcp.rtt is not None:
                tcp["rtt"] = round(self.tcp.rtt, 6)
        return {
            "index": self.index,
            "protocol": self.protocol,
            "path": self.path,
            "direction": self.endpoints.began,
            "guest": self.endpoints.guest,
            "peer": self.endpoints.peer,
            "host": self.endpoints.host,
            "state": self.state,
            "bytes_to_guest": self.to_guest,
            "bytes_to_host": self.to_host,
            "age": round(self.age, 3),
            "idle": None if self.idle is None else round(self.idle, 3),
            **tcp,
        }


class Flow:
    """Common part. Subclasses add their slots, and answer `endpoints`, `traffic` and `info`.

    `kind` is the text of log lines, `label` the name in statistics, one of LABELS.
    """

    __slots__ = ("fd", "index", "key", "opened", "sock", "state")
    kind = "flow"
    label = ""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.index = -1
        self.state = FREE
        self.fd = -1
        self.sock: Any = None
        self.opened = 0.0  # time.monotonic()

    def endpoints(self) -> Endpoints:
        """Who talks to whom."""
        return Endpoints(GUEST, "", "", "")

    def traffic(self) -> tuple[int, int]:
        """Bytes of payload to the guest, and to the host."""
        return 0, 0

    def info(self, now: float) -> FlowInfo:
        """All that can be known at the moment; costs some system calls."""
        raise NotImplementedError


class TableFull(Exception):
    """No index is free."""


class FlowTable:
    """Index -> flow, for all protocols together. Keys are kept by each protocol in a dict of its own.

    `opened` counts by label, `closed` by (label, reason).
    """

    def __init__(self, limit: int = FLOW_MAX, clock: Callable[[], float] = time.monotonic) -> None:
        self.by_index: list[Flow | None] = []
        self._free: list[int] = []
        self._clock = clock
        self.limit = limit
        self.count = 0
        self.opened: Counter[str] = Counter()
        self.closed: Counter[tuple[str, str]] = Counter()

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
        flow.opened = self._clock()
        self.count += 1
        self.opened[flow.label] += 1
        if log.debug_on:
            log.debug(f"Flow {flow.index} ({flow.kind}): {flow.endpoints()} opened")
        self._set(flow, NEW)

    def activate(self, flow: Flow) -> None:
        """NEW -> ACTIVE."""
        self._set(flow, ACTIVE)

    def free(self, flow: Flow, why: str) -> None:
        """Any state but FREE -> FREE; the index may be used again at once. The caller has retired the socket.

        `why` is one of a few fixed texts. Raises RuntimeError for a flow that is not in the table: a second time would
        give its index to two others.
        """
        if flow.state == FREE:
            raise RuntimeError(f"flow {flow.index} ({flow.kind}) is not in the table")
        self.by_index[flow.index] = None
        self._free.append(flow.index)
        self.count -= 1
        self.closed[flow.label, why] += 1
        if log.debug_on:
            to_guest, to_host = flow.traffic()
            what = f"{to_host} bytes out, {to_guest} in, {self._clock() - flow.opened:.1f} s"
            log.debug(f"Flow {flow.index} ({flow.kind}): closed: {why}; {what}")
        self._set(flow, FREE)

    def _set(self, flow: Flow, state: int) -> None:
        if log.trace_on:
            log.trace(f"Flow {flow.index} ({flow.kind}): {STATE_NAMES[flow.state]} -> {STATE_NAMES[state]}")
        flow.state = state


def check_hash() -> None:
    """Raise Fatal unless `bytes` keys are hashed by SipHash under a random key."""
    if not sys.hash_info.algorithm.startswith("siphash") or not sys.flags.hash_randomization:
        raise Fatal(
            f"the flow table needs Python's SipHash with a random key (here: {sys.hash_info.algorithm}, "
            f"randomisation {'on' if sys.flags.hash_randomization else 'off'}): unset PYTHONHASHSEED"
        )
