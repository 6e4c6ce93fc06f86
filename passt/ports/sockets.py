"""The sockets of the rules: one per port where the kernel allows, bound before the start is reported as done.

    rule listens on                     both families are on        IPv4 only     IPv6 only
    ----------------------------------  --------------------------  ------------  ---------------
    any address (inbound)               [::], which takes both      0.0.0.0       [::], IPv6 only
    an address                          that address, for its own family alone
    loopback (outbound, in the          127.0.0.1 and [::1]         127.0.0.1     [::1]
    namespace)

Where the host or the namespace has no IPv6 (EAFNOSUPPORT, EADDRNOTAVAIL), IPv4 is enough. No other failure is accepted:
a port that another program has in one family is not taken in the other.

A port in use may belong to a predecessor that is about to exit, so bind(2) is tried again for BIND_TIMEOUT. Then all
ports that failed are reported, range by range, in words that clients match. Weak rules (`all`, or only exclusions)
take the ports that they get, and need at least one.

Accepted TCP sockets inherit the options of the listening socket, all but SO_PRIORITY on Linux, so the options of
connections are set here (`tcp_engine/sock.py`).

UDP sockets have neither SO_REUSEADDR nor SO_REUSEPORT, or two sockets could bind the same port. They report the
destination address of datagrams, and their traffic class. A port in use may be held by sockets of this program alone,
those of the guest's flows (`udp_engine/sock.py`); `held_by_us` tells.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from typing import Any

from .. import addr, log
from ..calls import calls
from ..flow.room import NO_DESCRIPTORS
from ..lean.records import dataclass
from ..linux import holders
from ..linux.multicast import only_joined
from ..linux.nspool import new_socket
from ..linux.ports import PortTables, open_tables
from ..linux.sockopt import FREEBIND, IP_PKTINFO, RECEIVE_CLASS, REUSEPORT, freebind, setting
from ..linux.tcpinfo import Features, probe
from ..log import Fatal
from ..policy.config import Config
from ..policy.rules import Listener, Rule
from ..tcp_engine.sock import prepare_listener
from ..udp_engine.sock import BUFFER_SIZE
from ..wire.checksum import PROTO_TCP

BIND_TIMEOUT = 1.0  # s, for all ports in use together
RETRY_INTERVAL = 0.05  # s
BACKLOG = 4096  # of listen(2); net.core.somaxconn limits it
HOLDERS_MAX = 3  # ports in use whose holders are looked for
RESERVE = 128  # descriptors left for flows and for the program, where the limit is not lower than twice as many

_NO_FAMILY = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_PKTINFO = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_PKTINFO, 1),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1),
}

Wanted = tuple[Rule, int]  # a port of a rule

CALLS = (
    *setting(REUSEPORT, *FREEBIND, *RECEIVE_CLASS, *((level, option) for level, option, _ in _PKTINFO.values())),
    *setting(
        (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
        (socket.SOL_SOCKET, socket.SO_BINDTODEVICE),
        (socket.SOL_SOCKET, socket.SO_REUSEADDR),
        (socket.SOL_SOCKET, socket.SO_RCVBUF),
        (socket.SOL_SOCKET, socket.SO_SNDBUF),
    ),
    *calls("listen"),
)


@dataclass(frozen=True, slots=True)
class Side:
    """Sockets opened on one side, the host's or the namespace's, before the loop runs."""

    listeners: list[Listener]
    tables: PortTables | None  # the ports bound there; None where no automatic rule leads


NO_SOCKETS = Side([], None)


@dataclass(frozen=True, slots=True)
class Failure:
    """A port that could not be opened, and the errno."""

    rule: Rule
    port: int
    errno: int

    @property
    def reason(self) -> str:
        return os.strerror(self.errno)


# All ports of one side ---------------------------------------------------------------------------------------------


def reserve(limit: int) -> int:
    """Descriptors that ports leave free with this limit of them."""
    return min(RESERVE, limit // 2)


def open_side(config: Config, outbound: bool, *, owner: int | None = None, changing: bool = False) -> Side:
    """Open the sockets of outbound or of inbound rules at start, in the network namespace of the calling thread.

    `owner`: the UID that root is going to have. `changing`: rules may be added later, also automatic ones, if tables of
    bound ports can be opened. Raises Fatal, with nothing left open.
    """
    rules = [rule for rule in config.forwards if rule.outbound == outbound]
    for rule in rules:
        _check_interface(rule)
    fixed = [rule for rule in rules if not rule.auto]
    listeners: list[Listener] = []
    try:
        _open_firm(config, [rule for rule in fixed if not rule.weak], listeners)
        _open_weak(config, [rule for rule in fixed if rule.weak], listeners)
        if owner is not None:
            _set_owner(listeners, owner)
        scanned = any(rule.auto and rule.outbound != outbound for rule in config.forwards)
        tables = _open_tables() if scanned else None
        if changing:
            _features()  # while every system call is allowed
        leading = not outbound and any(r.outbound and r.addr is None and r.target is None for r in config.forwards)
        if (changing or leading) and not scanned:
            tables = _try_tables()
        return Side(listeners, tables)
    except BaseException:
        for listener in listeners:
            listener.sock.close()
        raise


def _set_owner(listeners: Iterable[Listener], uid: int) -> None:
    """Give UDP sockets to `uid`: the sockets of clients share their ports (`udp_engine/sock.py`)."""
    for listener in [listener for listener in listeners if listener.rule.proto != PROTO_TCP]:
        try:
            os.fchown(listener.fd, uid, -1)
        except OSError as e:
            raise Fatal(f"Couldn't give UDP port {listener.port} to UID {uid}: {e.strerror} (CAP_CHOWN)") from None


def _open_tables() -> PortTables:
    try:
        return open_tables()
    except OSError as e:
        raise Fatal(f"Couldn't open {e.filename}, which automatic port forwarding needs: {e.strerror}") from None


def _try_tables() -> PortTables | None:
    try:
        return open_tables()
    except OSError as e:
        log.debug(f"{e.filename}: {e.strerror}: bound ports are not followed")
        return None


def _open_firm(config: Config, rules: Sequence[Rule], into: list[Listener]) -> None:
    """Open every port. Raises Fatal."""
    failed = open_ports(config, _ports(rules), into)
    deadline = time.monotonic() + BIND_TIMEOUT
    while any(f.errno == errno.EADDRINUSE for f in failed) and time.monotonic() < deadline:
        time.sleep(RETRY_INTERVAL)
        failed = [g for f in failed for g in (_retry_bind(config, f, into) if f.errno == errno.EADDRINUSE else [f])]
    if failed:
        _check_descriptors(failed)
        raise Fatal(*describe(failed), *holders_of(failed))


def _retry_bind(config: Config, failure: Failure, into: list[Listener]) -> list[Failure]:
    return open_ports(config, [(failure.rule, failure.port)], into)


def _open_weak(config: Config, rules: Sequence[Rule], into: list[Listener]) -> None:
    """Open as many ports of each option as possible. Raises Fatal if an option gets none."""
    for option in dict.fromkeys(rule.option for rule in rules):
        failed = open_ports(config, _ports([rule for rule in rules if rule.option == option]), into)
        _check_descriptors(failed)
        if not any(listener.rule.option == option for listener in into):
            raise Fatal(f"Failed to bind any port for '{option}', exiting")
        if log.debug_on:
            for line in describe(failed):
                log.debug(line)


def _ports(rules: Iterable[Rule]) -> Iterator[Wanted]:
    return ((rule, port) for rule in rules for port in rule.ports)


def _check_interface(rule: Rule) -> None:
    if rule.ifname is not None:
        try:
            socket.if_nametoindex(rule.ifname)
        except OSError:
            raise Fatal(f"Invalid interface name {rule.ifname}: No such device (option '{rule.option}')") from None


def _check_descriptors(failed: Iterable[Failure]) -> None:
    for f in failed:
        if f.errno in NO_DESCRIPTORS:
            raise Fatal(f"Can't open enough sockets for port specifier: {f.rule.option} ({f.reason})")


def sockets(config: Config, rule: Rule) -> int:
    """Most sockets that a port of `rule` takes."""
    both = config.ip4 is not None and config.ip6 is not None
    return 2 if both and rule.outbound and rule.addr is None else 1


def describe(failed: Sequence[Failure]) -> list[str]:
    """A line for each range of ports that failed for the same reason, and the sysctl for ports below 1024."""
    ranges: list[tuple[Failure, int]] = []  # the first failure, and the last port
    for f in failed:
        start, last = ranges[-1] if ranges else (f, -2)
        if (start.rule.option, start.errno, last + 1) == (f.rule.option, f.errno, f.port):
            ranges[-1] = start, f.port
        else:
            ranges.append((f, f.port))
    lines = [
        f"Failed to bind {f'ports {f.port}-{last}' if last > f.port else f'port {last}'} ({f.reason}) "
        f"for option '{f.rule.option}'"
        for f, last in ranges
    ]
    low = min((f.port for f in failed if f.errno == errno.EACCES), default=0)
    if low:
        lines.append(f"To let all users bind ports from {low} up: sysctl -w net.ipv4.ip_unprivileged_port_start={low}")
    return lines


def holders_of(failed: Iterable[Failure]) -> Iterator[str]:
    """A line for each of the first ports in use, if it is known who has it."""
    in_use = [f for f in failed if f.errno == errno.EADDRINUSE]
    for f in in_use[:HOLDERS_MAX]:
        loopbacks = (addr.LOOPBACK4, addr.LOOPBACK6) if f.rule.outbound else ()
        at = loopbacks if f.rule.addr is None else (f.rule.addr,)
        if who := holders.describe(f.rule.proto, f.port, at):
            yield f"{'TCP' if f.rule.proto == PROTO_TCP else 'UDP'} port {f.port} is held by {who}"


# Ports -------------------------------------------------------------------------------------------------------------


def open_ports(config: Config, wanted: Iterable[Wanted], into: list[Listener]) -> list[Failure]:
    """Append listeners to `into`, all sockets of a port or none; returns the failures.

    The first port without a descriptor is the last one that is tried: the others fail by the same reason.
    """
    failed: list[Failure] = []
    left = iter(wanted)
    for rule, port in left:
        try:
            into += [Listener(rule, port, sock) for sock in open_port(config, rule, port)]
        except OSError as e:
            failed.append(Failure(rule, port, e.errno or 0))
            if e.errno in NO_DESCRIPTORS:
                failed += [Failure(rule, port, e.errno) for rule, port in left]
    return failed


def held_by_us(config: Config, rule: Rule, port: int) -> bool:
    """Whether the sockets that keep a UDP port of an inbound rule would let one of ours, with SO_REUSEPORT, have it.

    These are sockets of flows of the guest, and perhaps of other programs of the same user that set SO_REUSEPORT.
    """
    try:
        for sock in open_port(config, rule, port, shared=True):
            sock.close()
    except OSError:
        return False
    return True


def open_port(config: Config, rule: Rule, port: int, *, shared: bool = False) -> list[Any]:
    """The sockets of one port, in the network namespace of the calling thread. Raises OSError.

    `shared`: an inbound UDP port may be shared with other sockets of the same user.
    """
    if rule.addr is not None:
        return [_open(config, rule, port, rule.addr, shared=shared)]
    if rule.outbound:
        return _open_loopback(config, rule, port)
    if config.ip6 is None:
        return [_open(config, rule, port, addr.ANY4, shared=shared)]
    try:
        return [_open(config, rule, port, addr.ANY6, dual=config.ip4 is not None, shared=shared)]
    except OSError as e:
        if e.errno not in _NO_FAMILY or config.ip4 is None:
            raise
    return [_open(config, rule, port, addr.ANY4, shared=shared)]


def _open_loopback(config: Config, rule: Rule, port: int) -> list[Any]:
    if config.ip4 is None:
        return [_open(config, rule, port, addr.LOOPBACK6)]
    found = [_open(config, rule, port, addr.LOOPBACK4)]
    if config.ip6 is not None:
        try:
            found.append(_open(config, rule, port, addr.LOOPBACK6))
        except OSError as e:
            if e.errno not in _NO_FAMILY:
                found[0].close()
                raise
    return found


def _open(config: Config, rule: Rule, port: int, address: bytes, *, dual: bool = False, shared: bool = False) -> Any:
    family = addr.family(address)
    tcp = rule.proto == PROTO_TCP
    sock: Any = new_socket(family, (socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) | _FLAGS)
    try:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not dual)
        if config.freebind and not rule.outbound:
            sock.setsockopt(*freebind(family), 1)
        if rule.ifname is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, rule.ifname.encode() + b"\0")
        if tcp:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for connections of a predecessor in TIME-WAIT
            prepare_listener(sock, _features())
            sock.bind(_sockaddr(config, rule, port, address))
            sock.listen(BACKLOG)
        else:
            sock.setsockopt(*_PKTINFO[family])
            sock.setsockopt(*RECEIVE_CLASS[family == socket.AF_INET6], 1)
            _own_groups_only(sock, family, dual)
            if dual:  # the source address of answers to IPv4 datagrams, also to broadcasts
                sock.setsockopt(*_PKTINFO[socket.AF_INET])
                sock.setsockopt(*RECEIVE_CLASS[0], 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)
            if shared:
                sock.setsockopt(*REUSEPORT, 1)
            sock.bind(_sockaddr(config, rule, port, address))
    except BaseException:
        sock.close()
        raise
    return sock


def _own_groups_only(sock: Any, family: int, dual: bool) -> None:
    """Datagrams to multicast groups come by the sockets that joined these (`udp_engine/groups.py`). Raises OSError."""
    only_joined(sock, family == socket.AF_INET6)
    if dual:
        only_joined(sock, False)


@cache
def _features() -> Features:
    return probe()


def _sockaddr(config: Config, rule: Rule, port: int, address: bytes) -> tuple[Any, ...]:
    """For bind(2): a link-local address belongs to the rule's interface, or else to the template interface.

    The socket is bound to the rule's interface already, so the scope ID is not needed.
    """
    if not addr.is_link_local(address) or len(address) == 4 or rule.ifname is not None:
        return addr.text(address), port
    return addr.text(address), port, 0, config.scope_id
