"""--doctor: what this machine allows, tried rather than read off, and what to do where it does not.

    verdict   meaning                                                                                   exit status
    --------  ----------------------------------------------------------------------------------------  -----------
    ok        it works                                                                                  0
    note      the program starts without it; the line says what is missing or slower then               0
    FAIL      the program does not start, or reaches nothing                                            1

Each check is a function that yields findings; an error that it does not expect is one as well. A child process, which
becomes the user that the program runs as (`nobody`, for root), tries the rights of the program. Nothing is sent to the
network, and nothing stays.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from textwrap import TextWrapper

from .. import log, seccomp
from ..addr import text
from ..conf.resolv_conf import RESOLV_CONF, Follower
from ..icmp import PingNotAllowed
from ..lean.records import dataclass
from ..lean.tuples import NamedTuple
from ..linux import host_tables, routes, tcpinfo, tun
from ..linux.syscall import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWUTS, unshare
from ..log import WIDTH, Fatal
from ..policy.config import PASTA
from ..sandbox import isolation

OK, NOTE, FAIL = "ok", "note", "FAIL"
BUFFER = 4 << 20  # bytes: sysctl values below hold back a stream on a path of 1 Gbit/s and 30 ms
DESCRIPTORS = 4096
MODULES = (  # and what they are for
    ("pyroute2", FAIL, "it reads the host's addresses and routes"),
    ("psutil", FAIL, "it reads facts about processes"),
    ("numpy", FAIL, "it computes checksums"),
    ("scapy", NOTE, "--trace needs it"),
)
BUFFERS = "/proc/sys/net/ipv4/"
_COMMAND = ": sysctl "  # in a cure, before its arguments
UNPRIVILEGED_PORT = "/proc/sys/net/ipv4/ip_unprivileged_port_start"


class Finding(NamedTuple):
    verdict: str  # OK, NOTE, FAIL
    said: str
    cure: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    text: str
    status: int  # exit status


def report(mode: str) -> Report:
    """All findings for a mode, PASTA or PASST, each wrapped to 80 columns. Must run in a single-threaded process."""
    findings = [finding for check in CHECKS for finding in _checked(check, mode)]
    failed = sum(finding.verdict == FAIL for finding in findings)
    notes = sum(finding.verdict == NOTE for finding in findings)
    system = f"Linux {platform.release()}, Python {platform.python_version()}"
    lines = [f"{mode} on {system}, as user {isolation.choose_identity(None).uid}:", ""]
    for finding in findings:
        lines += _wrapped(finding)
    if failed:
        summary = f"{mode} can't run here: {_count(failed, 'failure')}, {_count(notes, 'note')}."
    else:
        summary = f"{mode} can run here; {_count(notes, 'note')}."
    return Report("\n".join([*lines, "", summary, ""]), 1 if failed else 0)


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"


def _wrapped(finding: Finding) -> list[str]:
    first = TextWrapper(WIDTH, initial_indent=f"  {finding.verdict:<6}", subsequent_indent=" " * 8)
    then = TextWrapper(WIDTH, initial_indent=" " * 8 + "-> ", subsequent_indent=" " * 11)
    cure = then.wrap(finding.cure)
    advice, sign, arguments = finding.cure.partition(_COMMAND)
    if sign and len(cure) > 1:  # a command that is to be copied begins a line
        cure = [*then.wrap(f"{advice}:"), f"{then.subsequent_indent}{_COMMAND[2:]}{arguments}"]
    return first.wrap(finding.said) + cure


Check = Callable[[str], Iterable[Finding]]


def _checked(check: Check, mode: str) -> Iterator[Finding]:
    """The findings of a check; an error that it does not expect is a finding, too."""
    try:
        yield from check(mode)
    except ImportError as e:
        yield Finding(FAIL, f"Not checked without the Python module {e.name}: {_name(check)}")
    except OSError as e:
        yield Finding(FAIL, f"The check of {_name(check)} failed: {log.where(e)}")


def _name(check: Check) -> str:
    return check.__name__.replace("_", " ")


# Checks --------------------------------------------------------------------------------------------------------------


def modules(mode: str) -> Iterator[Finding]:
    """Python's packages, as this interpreter finds them."""
    missing = [m for m in MODULES if importlib.util.find_spec(m[0]) is None]
    for name, verdict, use in missing:
        cure = f"pip install {name} for {sys.executable}, or install Debian's python3-{name}"
        yield Finding(verdict, f"The Python module {name} is missing: {use}", cure)
    if not missing:
        yield Finding(OK, f"Python modules: {', '.join(m[0] for m in MODULES)}")


def system_call_filter(mode: str) -> Iterator[Finding]:
    """libseccomp, its binding, and a filter that can be built for this processor."""
    try:
        seccomp.build(mode, platform.machine())
    except Fatal as e:
        yield Finding(FAIL, str(e))
    else:
        yield Finding(OK, f"System call filter: libseccomp knows all calls on {platform.machine()}")


def rights(mode: str) -> Iterator[Finding]:
    """The rights of the user that the program runs as: tried in a child process, which becomes that user."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            os.write(writer, "\n".join("\t".join(finding) for finding in _as_user(mode)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(child, 0)
    if not said:
        yield Finding(FAIL, "The process that tried ping sockets and new namespaces was killed")
    for line in said.splitlines():
        yield Finding(*line.split("\t"))


def _as_user(mode: str) -> list[Finding]:
    isolation.become(isolation.choose_identity(None))
    return [*_ping(), *_in_namespaces(mode)]


def _ping() -> Iterator[Finding]:
    """Ping sockets."""
    for family, protocol in ((socket.AF_INET, socket.IPPROTO_ICMP), (socket.AF_INET6, socket.IPPROTO_ICMPV6)):
        try:
            socket.socket(family, socket.SOCK_DGRAM, protocol).close()
        except PermissionError:
            said, _, cure = str(PingNotAllowed()).partition(". ")
            yield Finding(NOTE, said, cure)
            return
        except OSError:
            continue  # the host lacks this family
        yield Finding(OK, "Ping sockets are allowed")
        return


def _in_namespaces(mode: str) -> list[Finding]:
    """New namespaces, and for pasta a tap device in them."""
    try:
        isolation.gain_rights()
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWNET)
    except Fatal as e:
        return [Finding(FAIL, str(e))]
    except OSError as e:
        return [Finding(FAIL, f"Couldn't create namespaces: {log.why(e)}", isolation.namespace_hint(e))]
    found = [Finding(OK, "Namespaces of users, networks and mounts can be created")]
    if mode != PASTA:
        return found
    try:
        tap = tun.open_tap("doctor0")
    except OSError as e:
        return [*found, Finding(FAIL, str(e.strerror))]
    lacks = [
        name for name, there in (("checksums", tap.csum), ("TSO", tap.tso), ("USO (Linux 6.2)", tap.uso)) if not there
    ]
    if lacks:
        said = f"{tun.TUN_DEVICE} can't leave work to the kernel: no {', '.join(lacks)}; these streams cost more"
        return [*found, Finding(NOTE, said)]
    return [*found, Finding(OK, f"{tun.TUN_DEVICE} with all offloads: checksums, TSO, USO")]


def host_network(mode: str) -> Iterator[Finding]:
    """The interface that the guest's addresses come from."""
    host = host_tables.read_host()
    for name, v6 in (("IPv4", False), ("IPv6", True)):
        index, _ = routes.pick_interface(host, v6)
        address = routes.pick_address(host, index, v6) if index else None
        if address is None:
            yield Finding(NOTE, f"The host has no {name} address beside loopback: the guest gets link-local ones only")
            continue
        link = next(link.name for link in host.links if link.index == index)
        gateway = routes.pick_gateway(host, index, v6)
        through = f"gateway {text(gateway)}" if gateway else "no gateway"
        yield Finding(OK, f"{name}: {text(address.addr)} of {link}, {through}")


def resolvers(mode: str) -> Iterator[Finding]:
    """Name servers of the host."""
    servers = Follower().current.servers
    if servers:
        yield Finding(OK, f"Resolvers in {RESOLV_CONF}: {', '.join(map(text, servers))}")
    else:
        yield Finding(NOTE, f"{RESOLV_CONF} names no server: the guest is told of none", "name one with --dns")


def low_ports(mode: str) -> Iterator[Finding]:
    """Ports that this user may forward."""
    with open(UNPRIVILEGED_PORT) as f:
        first = int(f.read())
    if os.geteuid() == 0 or first == 0:
        yield Finding(OK, "Any port can be forwarded")
    else:
        cure = f"as root: sysctl -w net.ipv4.ip_unprivileged_port_start={min(80, first)}"
        yield Finding(NOTE, f"Ports below {first} of the host can't be forwarded by this user", cure)


def descriptors(mode: str) -> Iterator[Finding]:
    """The limit of open descriptors: each flow and each forwarded port has one or two."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < DESCRIPTORS:
        cure = "raise the hard limit: ulimit -Hn, limits.conf(5), or LimitNOFILE= of the unit"
        yield Finding(NOTE, f"At most {hard} descriptors: some {hard // 2} connections at a time", cure)
    else:
        yield Finding(OK, f"Descriptors: {hard}")


def socket_buffers(mode: str) -> Iterator[Finding]:
    """The largest buffers of sockets, which limit a stream over a long path."""
    small = []
    for name in ("tcp_rmem", "tcp_wmem"):
        with open(BUFFERS + name) as f:
            largest = int(f.read().split()[2])
        if largest < BUFFER:
            small.append(f"net.ipv4.{name} ends at {largest >> 10} KiB")
    if small:
        cure = (
            f'as root, for long fast paths: sysctl -w net.ipv4.tcp_rmem="4096 131072 {BUFFER * 4}", tcp_wmem likewise'
        )
        yield Finding(NOTE, " and ".join(small), cure)
    else:
        yield Finding(OK, "TCP buffers grow far enough for long paths")


def socket_features(mode: str) -> Iterator[Finding]:
    """Features of the kernel's sockets without which more is copied."""
    if tcpinfo.probe().peek_off:
        yield Finding(OK, "SO_PEEK_OFF for TCP")
    else:
        yield Finding(
            NOTE, "SO_PEEK_OFF for TCP is missing (Linux 6.9): data in flight to the guest is read again and again"
        )


CHECKS: tuple[Check, ...] = (
    modules,
    system_call_filter,
    rights,
    host_network,
    resolvers,
    low_ports,
    descriptors,
    socket_buffers,
    socket_features,
)
