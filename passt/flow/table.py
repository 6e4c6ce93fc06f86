"""The flow table: all conversations of the guest, in all protocols.

A flow has an index, which epoll references carry, and a key, by which its protocol finds it:

    IPv4: guest address (4), peer address (4), guest port (2), peer port (2)
    IPv6: guest address (16), peer address (16), guest port (2), peer port (2)

in the order of a packet from the guest, so a look-up is one slice of the packet and one `dict` access. Python hashes
`bytes` by SipHash under a key drawn at start, so a guest cannot choose keys that collide (`check_hash`).

States, changed only here:

    state   permitted                                             left by
    ------  ----------------------------------------------------  --------------
    FREE    nothing: the index may be used again                  insert
    NEW     the protocol opens its socket and writes headers      activate, free
    ACTIVE  events and packets are handled                        free

When the table is full, the protocols close the longest idle ping and UDP flows; established TCP connections stay.

Logs and statistics
===================

The debug log has a line for the beginning of a flow and one for its end, with a reason:

    Flow 12 (TCP connection): 10.0.2.15:40000 -> 93.184.216.34:443 opened
    Flow 12 (TCP connection): closed: reset by guest; 1234 bytes out, 567 in, 1.2 s

"out" is from the guest to the host. Where the host's side has an address that the guest does not know (a mapped
address, a client on loopback), the first line has it, too. `info` reports a flow in progress in full. It costs nothing
until it is called: a protocol keeps no count that the kernel or its own sequence numbers have, and else adds up once
per batch.

Flows are counted by `label` at their beginning, and by label and reason at their end. Reasons are few and fixed: those
of the protocols, and those of errnos (`reason_of`).
"""

from __future__ import annotations

import errno
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar, Final

from .. import addr, log
from ..calls import calls
from ..lean.records import dataclass
from ..log import Fatal

CALLS = calls("getsockname")

FREE: Final = 0
NEW: Final = 1
ACTIVE: Final = 2
STATE_NAMES = ("FREE", "NEW", "ACTIVE")
FLOW_MAX = 131071
LABELS = ("tcp", "tcp_splice", "udp", "udp_splice", "dns", "ping")
GUEST, HOST = "guest", "host"  # the side that began a flow
RECENT = 5.0  # s after its last packet a flow counts as idle

RESET: Final = frozenset((errno.ECONNRESET, errno.EPIPE))  # errnos of a socket that was connected: a refusal differs
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
    """The reason for the end of a flow whose socket failed with an errno."""
    return _REASONS.get(error) or os.strerror(error).lower()


def name_of(ask: Callable[[], Any]) -> str:
    """The result of getsockname() as ADDRESS:PORT, empty if the socket has none (any more)."""
    try:
        host, port, *_ = ask()
    except OSError:
        return ""
    return addr.host_port(addr.unmapped(addr.packed(host.partition("%")[0])), port)


@dataclass(frozen=True, slots=True)
class Endpoints:
    """The ends of a flow, as ADDRESS:PORT; an unknown end is empty."""

    began: str  # GUEST or HOST
    guest: str
    peer: str  # as the guest sees it
    host: str  # the peer of the socket on the host

    def __str__(self) -> str:
        """A -> B, where A began the flow, and the host's address of the peer if the guest has another for it."""
        if self.began == GUEST:
            other = f" (host {self.host})" if self.host not in ("", self.peer) else ""
            return f"{self.guest} -> {self.peer or self.host}{other}"
        other = f" (seen as {self.peer})" if self.peer not in ("", self.host) else ""
        return f"{self.host}{other} -> {self.guest}"


@dataclass(frozen=True, slots=True)
class TcpInfo:
    """Figures of a TCP connection. Windows and queues in bytes; None: not known, or no such side."""

    rtt: float | None  # s, of the host's socket
    snd_wnd: int | None  # the guest's window
    rcv_wnd: int | None  # the window advertised to the guest
    resent_to_guest: int | None  # retransmissions to the guest
    resent_to_host: int | None  # retransmissions of the host's kernel
    queue_to_guest: int | None  # bytes received, not acknowledged by the guest
    queue_to_host: int | None  # bytes taken from the guest, not acknowledged by the peer


@dataclass(frozen=True, slots=True)
class FlowInfo:
    """A flow, for display. Bytes are payload; times in seconds."""

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
        """For JSON: text, numbers, None."""
        tcp: dict[str, object] = {}
        if self.tcp is not None:
            tcp = {name: getattr(self.tcp, name) for name in self.tcp.__match_args__}
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
    """The common part. Subclasses add slots, and implement `endpoints`, `traffic` and `info`.

    `kind` is the text of log lines, `label` the name in statistics, one of LABELS.
    """

    __slots__ = ("fd", "index", "key", "opened", "sock", "state")
    kind = "flow"
    label: ClassVar[str] = ""

    def __init__(self, key: bytes) -> None:
        self.key = key
        self.index = -1
        self.state = FREE
        self.fd = -1
        self.sock: Any = None
        self.opened = 0.0  # time.monotonic()

    def endpoints(self) -> Endpoints:
        """The ends of the flow."""
        return Endpoints(GUEST, "", "", "")

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        """Write the MAC addresses of the guest and of the peer into the header, if there is one."""

    def traffic(self) -> tuple[int, int]:
        """Bytes of payload to the guest, and to the host."""
        return 0, 0

    def info(self, now: float) -> FlowInfo:
        """The flow in full; costs some system calls."""
        raise NotImplementedError


class TableFull(Exception):
    """No index is free."""


class FlowTable:
    """Index -> flow, for all protocols together. Each protocol has a dict of its own by key.

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
        if log.trace_on:
            _trace(flow, NEW)
        flow.state = NEW

    def activate(self, flow: Flow) -> None:
        """NEW -> ACTIVE."""
        if log.trace_on:
            _trace(flow, ACTIVE)
        flow.state = ACTIVE

    def free(self, flow: Flow, why: str) -> None:
        """Any state but FREE -> FREE; the index may be used again at once. The caller has retired the socket.

        `why` is one of a few fixed texts. Raises RuntimeError for a flow that is not in the table: freed twice, its
        index would go to two flows.
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
        if log.trace_on:
            _trace(flow, FREE)
        flow.state = FREE


def _trace(flow: Flow, state: int) -> None:
    log.trace(f"Flow {flow.index} ({flow.kind}): {STATE_NAMES[flow.state]} -> {STATE_NAMES[state]}")


def check_hash() -> None:
    """Raise Fatal unless `bytes` keys are hashed by SipHash under a random key."""
    if not sys.hash_info.algorithm.startswith("siphash") or not sys.flags.hash_randomization:
        raise Fatal(
            f"the flow table needs Python's SipHash with a random key (here: {sys.hash_info.algorithm}, "
            f"randomisation {'on' if sys.flags.hash_randomization else 'off'}): unset PYTHONHASHSEED"
        )
