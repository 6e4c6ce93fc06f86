"""Opening the sockets of the rules: one per port where the kernel allows, bound before anybody is told "ready".

    rule listens on                     both families are on        IPv4 only     IPv6 only
    ----------------------------------  --------------------------  ------------  ---------------
    any address (inbound)               [::], which takes both      0.0.0.0       [::], IPv6 only
    an address                          that address, for its own family alone
    loopback (outbound, in the          127.0.0.1 and [::1]         127.0.0.1     [::1]
    namespace)

Where the host or the namespace has no IPv6 after all (EAFNOSUPPORT, EADDRNOTAVAIL) IPv4 does alone. That is the only
failure which is taken for an answer: somebody who has the port in one family has it, and we do not take the half.

A port that is in use may still belong to a predecessor that is just about to end, so it is tried again for a moment.
Then every port that could not be had is named, run by run, in words that clients match. Weak rules (`all`, or only
exclusions) take what they get, which must be something.

TCP sockets pass their options on to what they accept, so those of a connection are set here (`tcp_engine/sock.py`). On
Linux all options are passed on but SO_PRIORITY.

UDP sockets do without SO_REUSEADDR and SO_REUSEPORT, or the same port could be had twice. They tell where a datagram
was sent to.
"""

from __future__ import annotations

import errno
import os
import resource
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .. import addr, log
from ..calls import calls
from ..flow.idle import NO_DESCRIPTORS
from ..linux.nspool import new_socket
from ..linux.ports import PortTables, open_tables
from ..linux.sockopt import FREEBIND, IP_PKTINFO, freebind, setting
from ..linux.tcpinfo import Features, probe
from ..log import Fatal
from ..policy.config import Config
from ..policy.rules import Listener, Rule
from ..tcp_engine.sock import prepare_listener
from ..udp_engine.sock import BUFFER_SIZE
from ..wire.checksum import PROTO_TCP

PATIENCE = 1.0  # s that a port in use is waited for, all in all
RETRY_INTERVAL = 0.05  # s
BACKLOG = 4096  # connections that wait to be accepted; net.core.somaxconn may say less
RESERVE = 128  # descriptors that must be left for flows, and for us

_NO_FAMILY = frozenset((errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL))
_FLAGS = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_PKTINFO = {
    socket.AF_INET: (socket.IPPROTO_IP, IP_PKTINFO, 1),
    socket.AF_INET6: (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1),
}

Wanted = tuple[Rule, int]  # a port of a rule

CALLS = (
    *setting(*FREEBIND, *((level, option) for level, option, _ in _PKTINFO.values())),
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
    """What is opened on one side, the host's or the namespace's, before the loop turns."""

    listeners: list[Listener]
    tables: PortTables | None  # of what is bound there; None where no automatic rule leads


NOTHING = Side([], None)


@dataclass(frozen=True, slots=True)
class Failure:
    """A port that could not be had, and the errno."""

    rule: Rule
    port: int
    errno: int

    @property
    def reason(self) -> str:
        return os.strerror(self.errno)


# All ports of one side ---------------------------------------------------------------------------------------------


def open_side(config: Config, outbound: bool, *, heir: int | None = None, changing: bool = False) -> Side:
    """All that must be there from the start on the side where outbound, or inbound, rules listen.

    `heir`: the UID that root is going to have. `changing`: rules may come later, and automatic ones where tables of
    what is bound can be had. In the network namespace of the calling thread. Raises Fatal, with nothing left open.
    """
    rules = [rule for rule in config.forwards if rule.outbound == outbound]
    for rule in rules:
        _check_interface(rule)
    fixed = [rule for rule in rules if not rule.auto]
    listeners: list[Listener] = []
    try:
        _open_firm(config, [rule for rule in fixed if not rule.weak], listeners)
        _open_weak(config, [rule for rule in fixed if rule.weak], listeners)
        if heir is not None:
            _give(listeners, heir)
        scanned = any(rule.auto and rule.outbound != outbound for rule in config.forwards)
        tables = _open_tables() if scanned else None
        if changing:
            _features()  # while every system call is allowed
        if changing and not scanned:
            tables = _try_tables()
        return Side(listeners, tables)
    except BaseException:
        for listener in listeners:
            listener.sock.close()
        raise


def _give(listeners: Iterable[Listener], uid: int) -> None:
    """UDP: only sockets of one user share a port, and those of clients will be of `uid` (`udp_engine/sock.py`)."""
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
        log.debug(f"{e.filename}: {e.strerror}: there can be no automatic port forwarding later")
        return None


def _open_firm(config: Config, rules: Sequence[Rule], into: list[Listener]) -> None:
    """Every port, or Fatal."""
    failed = open_ports(config, _ports(rules), into)
    deadline = time.monotonic() + PATIENCE
    while any(f.errno == errno.EADDRINUSE for f in failed) and time.monotonic() < deadline:
        time.sleep(RETRY_INTERVAL)
        failed = [g for f in failed for g in (_again(config, f, into) if f.errno == errno.EADDRINUSE else [f])]
    if failed:
        _check_descriptors(failed)
        raise Fatal(*describe(failed))


def _again(config: Config, failure: Failure, into: list[Listener]) -> list[Failure]:
    return open_ports(config, [(failure.rule, failure.port)], into)


def _open_weak(config: Config, rules: Sequence[Rule], into: list[Listener]) -> None:
    """Whatever can be had of each option, or Fatal."""
    for option in dict.fromkeys(rule.option for rule in rules):
        before = len(into)
        failed = open_ports(config, _ports([rule for rule in rules if rule.option == option]), into)
        _check_descriptors(failed)
        if len(into) == before:
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


def check_limit(config: Config) -> None:
    """Raise Fatal if the process may not have as many descriptors as the rules need."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return
    sizes = [(len(rule.ports) * sockets(config, rule), rule.option) for rule in config.forwards if not rule.auto]
    needed = sum(n for n, _ in sizes) + len(os.listdir("/proc/self/fd")) + RESERVE
    if sizes and needed > limit:
        raise Fatal(
            f"Can't open enough sockets for port specifier: {max(sizes)[1]} "
            f"(needs {needed} descriptors, the limit is {limit}: raise ulimit -Hn)"
        )


def sockets(config: Config, rule: Rule) -> int:
    """How many a port of `rule` takes, at most."""
    both = config.ip4 is not None and config.ip6 is not None
    return 2 if both and rule.outbound and rule.addr is None else 1


def describe(failed: Sequence[Failure]) -> list[str]:
    """A line for each run of ports that failed for the same reason, and what to do about those for root."""
    runs: list[tuple[Failure, int]] = []  # the first one, and the last port
    for f in failed:
        start, last = runs[-1] if runs else (f, -2)
        if (start.rule.option, start.errno, last + 1) == (f.rule.option, f.errno, f.port):
            runs[-1] = start, f.port
        else:
            runs.append((f, f.port))
    lines = [
        f"Failed to bind {f'ports {f.port}-{last}' if last > f.port else f'port {last}'} ({f.reason}) "
        f"for option '{f.rule.option}'"
        for f, last in runs
    ]
    low = min((f.port for f in failed if f.errno == errno.EACCES), default=0)
    if low:
        lines.append(f"To allow ports from {low} up to everybody: sysctl -w net.ipv4.ip_unprivileged_port_start={low}")
    return lines


# Ports -------------------------------------------------------------------------------------------------------------


def open_ports(config: Config, wanted: Iterable[Wanted], into: list[Listener]) -> list[Failure]:
    """Append listeners to `into`, all of a port or none; returns what failed."""
    failed = []
    for rule, port in wanted:
        try:
            into += [Listener(rule, port, sock) for sock in open_port(config, rule, port)]
        except OSError as e:
            failed.append(Failure(rule, port, e.errno or 0))
    return failed


def open_port(config: Config, rule: Rule, port: int) -> list[Any]:
    """The sockets of one port, in the network namespace of the calling thread. Raises OSError."""
    if rule.addr is not None:
        return [_open(config, rule, port, rule.addr)]
    if rule.outbound:
        return _open_loopback(config, rule, port)
    if config.ip6 is None:
        return [_open(config, rule, port, addr.ANY4)]
    try:
        return [_open(config, rule, port, addr.ANY6, dual=config.ip4 is not None)]
    except OSError as e:
        if e.errno not in _NO_FAMILY or config.ip4 is None:
            raise
    return [_open(config, rule, port, addr.ANY4)]


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


def _open(config: Config, rule: Rule, port: int, address: bytes, *, dual: bool = False) -> Any:
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
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of a predecessor may linger
            prepare_listener(sock, _features())
            sock.bind(_sockaddr(config, rule, port, address))
            sock.listen(BACKLOG)
        else:
            sock.setsockopt(*_PKTINFO[family])
            if dual:  # for IPv4 that tells what to answer from, also if the datagram was a broadcast
                sock.setsockopt(*_PKTINFO[socket.AF_INET])
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_SIZE)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_SIZE)
            sock.bind(_sockaddr(config, rule, port, address))
    except BaseException:
        sock.close()
        raise
    return sock


@cache
def _features() -> Features:
    return probe()


def _sockaddr(config: Config, rule: Rule, port: int, address: bytes) -> tuple[Any, ...]:
    """For bind(): a link-local address is one of the rule's interface, or else of the template interface.

    To the former the socket is bound already, which is as good as its number.
    """
    if not addr.is_link_local(address) or len(address) == 4 or rule.ifname is not None:
        return addr.text(address), port
    return addr.text(address), port, 0, config.scope_id
