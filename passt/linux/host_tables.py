"""The host's links, addresses, routes and rules: read at start, and again after the kernel has told of a change. And
its neighbours, which change all the time.

    socket      purpose                                                       in the sandbox
    ----------  ------------------------------------------------------------  ------------------------------------------
    monitor     member of the groups below: the kernel sends a message for    recvfrom(2)
                each change
    requests    dumps of the tables, by `netlink.Rtnetlink`                   sendto(2), recvfrom(2)
    neighbours  both, for the MAC addresses that IP addresses have on a       sendto(2), recvfrom(2)
                link (ARP, RFC 826; NDP, RFC 4861)

All are opened before the sandbox is closed; no netlink socket can be created in it. They belong to the namespace of
the thread that opened them, which is the host's, and give no right over it.

A message of the monitor says that something has changed, and no more: it is discarded unread, and all tables are
read anew. So a queue that has overflowed (ENOBUFS) means the same as a message, and nothing has to be kept in step with
the kernel. Messages count if they come from the kernel (`from_kernel.py`).

    message to the socket of neighbours     consequence
    --------------------------------------  ------------------------------------------------------------------------
    RTM_NEWNEIGH                            a neighbour, if its MAC address is known: an answer, or a change
    RTM_DELNEIGH, a failed entry            none: the kernel forgets what has not been used for a minute
    the end of a table                      the next one is asked for: while it answers one request, the kernel
                                              refuses others (EBUSY)
    ENOBUFS                                 all tables of neighbours are asked for again

    bound                                   value
    --------------------------------------  ------------------------------------------------------------------------
    messages discarded by one `drain`       DRAIN_MAX; the rest is taken by the next one
    processor time of one reading           READ_TIME: a table of half a million routes takes longer, and the reading
                                              fails with ETIMEDOUT
    bytes of neighbours in one reading      NEIGHBOURS_READ_MAX, some 1200 of them; `more` tells that there may be
                                              others
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

from ..calls import calls
from . import from_kernel
from .from_kernel import ERROR, HEADER, NLMSG_DONE, NLMSG_ERROR
from .netlink import Rtnetlink
from .routes import Host, Route
from .rtnl_messages import RTM_NEWNEIGH, Neighbour, Table, neighbour_request, parse_neighbour

CALLS = calls("recvfrom", "sendto", "close")

# Multicast groups (include/uapi/linux/rtnetlink.h, RTMGRP_*), as bits of a mask. Rules have numbers alone
GROUP_LINK = 0x1
GROUP_ADDRESS4, GROUP_ROUTE4 = 0x10, 0x40
GROUP_ADDRESS6, GROUP_ROUTE6 = 0x100, 0x400
GROUP_RULE4, GROUP_RULE6 = 1 << 7, 1 << 18  # RTNLGRP_IPV4_RULE is 8, RTNLGRP_IPV6_RULE 19
GROUPS = GROUP_LINK | GROUP_ADDRESS4 | GROUP_ROUTE4 | GROUP_ADDRESS6 | GROUP_ROUTE6 | GROUP_RULE4 | GROUP_RULE6
GROUP_NEIGHBOUR = 0x4

DRAIN_MAX = 4096  # more than the default receive buffer holds
NEIGHBOURS_READ_MAX = 1 << 16
_NEIGHBOURS_RECEIVE = 1 << 15  # the longest datagram of a table
_DATAGRAM_COST = 64  # bytes: that of a datagram, beside what is in it
READ_TIME = 0.5  # s, in which the loop stands still


def _member(groups: int, sock: Any) -> Any:
    """A socket that the kernel sends messages of these groups to, and no other sender any; or `sock` as one."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    made = sock or socket.socket(socket.AF_NETLINK, kind, 0)
    made.bind((0, groups))
    from_kernel.connect(made)
    return made


class Monitor:
    """A socket that becomes readable when the host's tables change. Raises OSError."""

    def __init__(self, sock: Any = None) -> None:
        self._sock = _member(GROUPS, sock)
        self.fd: int = self._sock.fileno()

    def drain(self) -> bool:
        """Discard what has come; returns whether the tables may have changed. Raises OSError."""
        changed = False
        for _ in range(DRAIN_MAX):
            try:
                _, (port, _) = self._sock.recvfrom(1)
            except BlockingIOError:
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                port = from_kernel.KERNEL  # the kernel's messages were too many
            changed = changed or port == from_kernel.KERNEL
        return changed

    def close(self) -> None:
        self._sock.close()


class NeighbourTable:
    """The socket of neighbours. It is readable when neighbours are there to read. Raises OSError."""

    def __init__(self, sock: Any = None) -> None:
        self._sock = _member(GROUP_NEIGHBOUR, sock)
        self.fd: int = self._sock.fileno()
        self._tables: tuple[Table, ...] = ()
        self._left: list[Table] = []  # to be asked for
        self.asking = False  # a table is on its way
        self.more = False  # after `read`: whether there may be more to read

    def close(self) -> None:
        self._sock.close()

    def ask(self, tables: Iterable[Table]) -> None:
        """Let the next calls of `read` return the neighbours of these tables, beside what changes. Raises OSError."""
        self._tables = tuple(tables)
        self._left = list(self._tables)
        if not self.asking:
            self._ask_next()

    def _ask_next(self) -> None:
        self.asking = False
        if self._left:
            self._sock.send(neighbour_request(self._left.pop(0)))
            self.asking = True

    def read(self) -> list[Neighbour]:
        """Neighbours that are new or have changed, and some that have not. Raises OSError."""
        found: list[Neighbour] = []
        room, self.more = NEIGHBOURS_READ_MAX, True
        while room > 0:
            try:
                data, (port, _) = self._sock.recvfrom(_NEIGHBOURS_RECEIVE)
            except BlockingIOError:
                self.more = False
                break
            except OSError as e:
                if e.errno != errno.ENOBUFS:
                    raise
                self.ask(self._tables)
                data, port = b"", from_kernel.KERNEL
            room -= len(data) + _DATAGRAM_COST
            if port == from_kernel.KERNEL:
                self._take(data, found)
        return found

    def _take(self, data: bytes, found: list[Neighbour]) -> None:
        """The messages of one datagram."""
        for kind, _, _, message in from_kernel.split(data):
            if kind == RTM_NEWNEIGH and (neighbour := parse_neighbour(message)) is not None:
                found.append(neighbour)
            elif kind == NLMSG_DONE:
                self._ask_next()
            elif kind == NLMSG_ERROR:
                self.asking = False
                (error,) = ERROR.unpack_from(message, HEADER.size)
                raise OSError(-error, os.strerror(-error))


class HostTables:
    """The monitor, the socket for requests, and that of neighbours. `last` has the tables as they were read last.
    Raises OSError.
    """

    def __init__(self) -> None:
        self.last = Host()
        with ExitStack() as undo:
            self.monitor = Monitor()
            undo.callback(self.monitor.close)
            self._requests = Rtnetlink()
            undo.callback(self._requests.close)
            self.neighbours = NeighbourTable()
            undo.pop_all()

    def read(self, seconds: float = READ_TIME) -> Host:
        """The tables as they are. Raises OSError: ETIMEDOUT if they take more processor time than `seconds`."""
        self._requests.limit(seconds)
        try:
            self.last = read(self._requests)
        except OSError:
            self._requests.abandon()
            raise
        return self.last

    def close(self) -> None:
        """Close the sockets."""
        self.monitor.close()
        self._requests.close()
        self.neighbours.close()


def read_host() -> Host:
    """The tables of the calling thread's namespace, once, however long they are. Raises OSError."""
    with Rtnetlink() as nl:
        return read(nl)


def read(nl: Rtnetlink) -> Host:
    """Links, addresses and routes of the namespace of `nl`. A family that the kernel lacks has none."""
    return Host(nl.links(), nl.addresses(), host_routes(nl, v6=False), host_routes(nl, v6=True))


def host_routes(nl: Rtnetlink, v6: bool) -> tuple[Route, ...]:
    """The main table, and default routes of others if it has none."""
    main = nl.routes(v6)
    return main if any(route.default for route in main) else main + nl.policy_defaults(v6)
