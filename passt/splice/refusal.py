"""Refusals of spliced UDP: the client's next datagram meets a closed port.

A UDP socket cannot send an ICMP error, not even to answer one. The kernel sends Port Unreachable by itself where no
socket takes a datagram. So when the server's host has refused, with all targets tried, the flow ends, and the listener
is connected to its own address for REFUSE seconds: it keeps its port, which was given to bind(2), and takes no datagram
of any client. A client that sends again meanwhile gets ECONNREFUSED, as it would from a closed port, one datagram
later.

    time    condition                       consequence
    ------  ------------------------------  --------------------------------------------------
    1 s     the listener was disconnected   it takes datagrams again, and the server is asked
    -       its rule leads elsewhere        the same, at once

The same for a client whose datagrams the guest refuses, by the tap (`ports/udp_refused.py`).

Only for listeners at a loopback address (-U, and -u with such an address): all of their clients reach the same server,
so a refusal is true for all. A listener at any address would lose its hold of the others while it is connected, and
another program could take the port; remote clients would depend on what loopback clients are told. Automatic ports need
none of this: a port that is not bound is not listened on.
"""

from __future__ import annotations

import ctypes
from collections.abc import Container

from .. import addr
from ..calls import calls
from ..flow.context import Context
from ..linux.syscall import check
from ..loop.each import each, record
from ..policy.rules import Listener

REFUSE = 1.0  # s

_connect = ctypes.CDLL(None, use_errno=True).connect
_connect.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_uint32)
_UNSPEC = bytes(16)  # struct sockaddr of AF_UNSPEC: dissolves the association (connect(2))

CALLS = calls("connect", "getsockname")


class Refusals:
    """The listeners that refuse."""

    def __init__(self, ctx: Context) -> None:
        self._timers = ctx.timers.services
        self._drops = ctx.drops
        self._timer = self._timers.new(self._resume)
        self._until: dict[Listener, float] = {}  # in the order of their ends

    def refuse(self, listener: Listener, now: float) -> bool:
        """The server's host has refused what came by `listener`; returns whether its clients will be told.

        Raises OSError.
        """
        rule = listener.rule
        if listener in self._until:
            return True
        if not rule.outbound and (rule.addr is None or not addr.is_loopback(rule.addr)):
            return False
        listener.sock.connect(listener.sock.getsockname())
        if not self._until:
            self._timers.arm(self._timer, now + REFUSE)
        self._until[listener] = now + REFUSE
        return True

    def _resume(self, now: float) -> None:
        over = [listener for listener, until in self._until.items() if until <= now]
        self._until = {listener: until for listener, until in self._until.items() if until > now}
        each(over, _take_again, self._fault_at)
        if self._until:
            self._timers.arm(self._timer, next(iter(self._until.values())))

    def _fault_at(self, listener: Listener, e: Exception) -> None:
        record(self._drops, "a listener that has refused", e)

    def end(self, listeners: Container[Listener]) -> None:
        """These close, or lead to another server from now on."""
        ending = [listener for listener in self._until if listener in listeners]
        self._until = {listener: until for listener, until in self._until.items() if listener not in listeners}
        each(ending, _take_again, self._fault_at)


def _take_again(listener: Listener) -> None:
    """Raises OSError."""
    check(_connect(listener.fd, _UNSPEC, len(_UNSPEC)), "connect")
