"""Processes that hold a port, for messages about ports in use. It takes two steps, as in ss(8) -p:

    port -> sockets       sock_diag(7), which filters by source port: inode, UID and addresses of each
    inode -> processes    links /proc/PID/fd/N -> socket:[INODE], where the caller may read them: its own processes, or
                          those of all users for root

    struct inet_diag_req_v2    family u8 | protocol u8 | ext u8 | pad u8 | states u32 | sockid (48): source port u16, ..
    struct inet_diag_msg       family u8 | state u8 | timer u8 | retrans u8 | sockid (48): source port u16, destination
                               port u16, source address (16), ... | expires, rqueue, wqueue, uid, inode u32 each

The search ends after TIME_MAX, whatever it has found: it runs in a start that fails, on machines with any number of
processes. No failure of it matters, since nothing but a message depends on it.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import time
from collections.abc import Iterator, Sequence
from struct import Struct

from ..lean.tuples import NamedTuple
from ..wire.checksum import PROTO_TCP
from . import proc
from .from_kernel import DUMP, NLMSG_DONE, NLMSG_ERROR
from .ports import NETLINK_SOCK_DIAG, RECEIVE, SOCK_DIAG_BY_FAMILY

TIME_MAX = 0.5  # s
LISTEN, BOUND_INACTIVE = 0x0A, 0x0D  # the latter since Linux 6.8: bound, and neither listening nor connected
_TIME_WAIT = 0x06
_STATES = (1 << 14) - 1 & ~(1 << _TIME_WAIT)
_REQUEST = Struct("=IHHIIBBBxI")
_SOURCE_PORT = Struct("!H46x")
_HEADER = Struct("=IH10x")
_MESSAGE = Struct("=BB2x")
_IDS = Struct("=II")
_ADDRESS_AT, _IDS_AT, _SIZE = 16 + 8, 16 + 64, 16 + 72


class Socket(NamedTuple):
    """A socket that has a port."""

    state: int
    address: bytes
    uid: int
    inode: int


def describe(proto: int, port: int, addresses: Sequence[bytes] = ()) -> str:
    """'nginx (PID 123)', or less, for the holder of a port of `addresses` (none given: any) in the network namespace of
    the calling thread. Empty if nothing is known.
    """
    end = time.monotonic() + TIME_MAX
    try:
        found = [s for s in _sockets(proto, port, end) if _conflicts(s.address, addresses)]
    except OSError:
        return ""  # a kernel without it, or one that is slow
    if not found:
        return ""
    main = [s for s in found if s.state in (LISTEN, BOUND_INACTIVE) or proto != PROTO_TCP] or found
    inodes = {s.inode for s in main}
    pids, complete = _processes(inodes, end)
    if pids:
        others = f" and {len(pids) - 1} more" if len(pids) > 1 else ""
        return f"{_name(pids[0])} (PID {pids[0]}{others})"
    user = _user(main[0].uid)
    if complete and os.geteuid() == 0:
        return f"the kernel, or a process of {user} in another PID namespace"
    return f"a process of {user}"


def _conflicts(theirs: bytes, ours: Sequence[bytes]) -> bool:
    """Whether a socket at `theirs` keeps its port from one at an address of `ours`."""
    return not ours or not any(theirs) or any(theirs == address or not any(address) for address in ours)


# sock_diag -----------------------------------------------------------------------------------------------------------


def _sockets(proto: int, port: int, end: float) -> list[Socket]:
    """Those with that source port, of both families. Raises OSError, also at the time `end`."""
    found: list[Socket] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_SOCK_DIAG) as sock:
        sock.connect((0, 0))  # from now on, it takes datagrams of the kernel only
        for number, family in enumerate((socket.AF_INET, socket.AF_INET6), 1):
            request = _SOURCE_PORT.pack(port)
            size = _REQUEST.size + len(request)
            head = _REQUEST.pack(size, SOCK_DIAG_BY_FAMILY, DUMP, number, 0, family, proto, 0, _STATES)
            sock.send(head + request)
            done = False
            while not done:
                sock.settimeout(max(1e-3, end - time.monotonic()))
                data, (sender, _) = sock.recvfrom(RECEIVE)
                done = sender == 0 and _parse(data, found)
    return found


def _parse(data: bytes, into: list[Socket]) -> bool:
    """Add the sockets of a part of a dump; whether it is the last one."""
    at = 0
    while at + 16 <= len(data):
        length, kind = _HEADER.unpack_from(data, at)
        if kind in (NLMSG_DONE, NLMSG_ERROR) or length < 16:
            return True
        if kind == SOCK_DIAG_BY_FAMILY and length >= _SIZE and at + _SIZE <= len(data):
            family, state = _MESSAGE.unpack_from(data, at + 16)
            size = 4 if family == socket.AF_INET else 16
            uid, inode = _IDS.unpack_from(data, at + _IDS_AT)
            into.append(Socket(state, data[at + _ADDRESS_AT : at + _ADDRESS_AT + size], uid, inode))
        at += length + 3 & ~3
    return False


# /proc ---------------------------------------------------------------------------------------------------------------


def _processes(inodes: set[int], end: float) -> tuple[list[int], bool]:
    """PIDs of processes that have a socket open, in ascending order; and whether all that may be read were read."""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    pids: list[int] = []
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        if time.monotonic() > end:
            return pids, False
        if any(link in wanted for link in _links(pid)):
            pids.append(pid)
    return pids, True


def _links(pid: int) -> Iterator[str]:
    """The files of all descriptors of a process; none if they may not be read, or if it has ended."""
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for fd in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                yield os.readlink(f"{directory}/{fd}")


def _name(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as f:
            text = f.read().rstrip("\n")
    except OSError:
        return "a process"
    return "".join(c if c.isprintable() else "?" for c in text)


def _user(uid: int) -> str:
    if uid == proc.overflow_uid() and not proc.in_init_userns():
        return "another user"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"UID {uid}"
