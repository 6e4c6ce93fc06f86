"""The command line of slirp4netns(1) -> Options: pasta and passt for programs that know only that.

    slirp4netns [OPTION]... PID|PATH [TAPNAME]     pasta --foreground --ns-ifname TAPNAME, without ports
    slirp4netns --target-type=bess PATH            passt --foreground --one-off, at a socket of packets

Its network is that of --cidr, 10.0.2.0/24 by default, and fd00::/64 with --enable-ipv6:

    address      IPv4     IPv6        is
    -----------  -------  ----------  ---------------------------------------------------------------------------------
    of the host  .2       fd00::2     the gateway, and the host's loopback unless --disable-host-loopback is given
    resolver     .3       fd00::3     those of the host, unless --disable-dns is given
    guest        .100     fd00::100   given by --configure and by DHCP. libslirp's DHCP begins with .15, which its own
                                      port forwarding does not reach without being told

Options stand before, between and behind the operands. --enable-sandbox and --enable-seccomp are always on. Of what the
original does, two things do not happen: an option that cannot take effect (an address that the host does not have, a
descriptor that is not open) is an error and not silence, and a request to the API never ends the program.

Like the original, it does not end with the process of PID: the network stays until --exit-fd has an event, or until a
signal.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import __version__, addr, log
from ..log import Fatal
from ..policy.config import PASST, PASTA
from . import actions, values
from . import help as conf_help
from .actions import Done, Fields, Pair, Row
from .argv import PID_MAX
from .getopt import Getopt
from .options import Options
from .row import ADDRESSES, BASIC, GROUPS, NAMESPACE, RUNNING, Option, Record, field, flag, option, value

NAME = "slirp4netns"
VERSION = "1.2.0"  # the one whose options and answers these are
TAP_NAME = "tap0"
MTU_MAX = 65521
HOST, RESOLVER, GUEST = 2, 3, 100  # within the network
PREFIX6, PREFIX6_LEN = addr.packed("fd00::"), 64
PREFIX_MAX = 25
BESS, NETNS, PATH, PID = "bess", "netns", "path", "pid"

_HEAD = """\
Usage: slirp4netns [OPTION]... PID|PATH [TAPNAME]

Connect a network namespace to the network of the host, without privileges, by
the command line of slirp4netns(1). This is pasta."""


def mtu(text: str) -> int:
    """Raises Fatal."""
    try:
        number = values.number(text)
    except ValueError:
        number = 0
    if not 0 < number <= MTU_MAX:
        raise Fatal(f"MTU must be a positive integer (< {MTU_MAX + 1})")
    return values.mtu(text)


def cidr(text: str) -> tuple[bytes, int]:
    """The address of a network, and the length of its prefix. Raises Fatal."""
    plain, _, length = text.partition("/")
    try:
        network, bits = addr.packed(plain), values.number(length)
    except ValueError:
        network, bits = b"", 0
    if len(network) != 4:
        raise Fatal(f"invalid CIDR: {text}")
    if not 1 <= bits <= PREFIX_MAX:
        raise Fatal(f"prefix length needs to be 1-{PREFIX_MAX}, not {bits}")
    if int.from_bytes(network, "big") & (1 << 32 - bits) - 1:
        raise Fatal(f"CIDR needs to be a network address like 10.0.2.0/24, not like {text}")
    return network, bits


def _one_of(*words: str) -> actions.Action:
    def action(fields: Fields, text: str, row: Row) -> None:
        if text not in words:
            raise Fatal(f"--{row.name} must be either {' or '.join(words)}, not {text}")
        fields[row.field] = text

    return action


def _descriptor(fields: Fields, text: str, row: Row) -> None:
    fields[row.field] = values.descriptor(text, f"--{row.name}")


def _outbound(fields: Fields, text: str, row: Row) -> None:
    """An address of the family, or the name of an interface."""
    v6 = row.name.endswith("6")
    try:
        packed = addr.packed(text)
    except ValueError:
        fields[row.field] = values.interface(text)
        return
    if (len(packed) == 16) != v6:
        raise Fatal(f"--{row.name} has to be a valid IPv{6 if v6 else 4} address or the name of an interface: {text}")
    fields[row.field] = values.outbound(text)


def _help(_: Fields, __: str, ___: Row) -> None:
    raise Done(conf_help.text(_HEAD, ROWS, GROUPS))


def _version(_: Fields, __: str, ___: Row) -> None:
    """The first line is the one that programs parse, and podman info shows all of them."""
    from . import build

    raise Done(f"{NAME} version {VERSION}\npasta: {__version__}\n{build.description()}\n")


class Line(Record):
    """The parsed command line."""

    # fmt: off
    configure: bool = flag("-c, --configure", BASIC, "Set up the interface: address, route, MTU, and the loopback")
    exit_fd: int | None = field(
        None, option("-e, --exit-fd FD", RUNNING, "End when descriptor FD has an event, such as its end", _descriptor))
    ready_fd: int | None = field(
        None, option("-r, --ready-fd FD", RUNNING, "Write '1' to FD when everything is ready, and close it",
                     _descriptor))
    mtu: int = value("-m, --mtu MTU", ADDRESSES, f"Set the MTU (default=1500, max={MTU_MAX})", mtu, default=1500)
    ipv6: bool = flag("-6, --enable-ipv6", ADDRESSES, "Use IPv6, too")
    api_socket: str | None = value(
        "-a, --api-socket PATH", RUNNING, "Listen on PATH for requests that change ports",
        values.socket_path, default=None)
    cidr: tuple[bytes, int] = value(
        "--cidr CIDR", ADDRESSES, "Use this network (default=10.0.2.0/24)", cidr, default=(addr.packed("10.0.2.0"), 24))
    host_loopback: bool = flag(
        "--disable-host-loopback", ADDRESSES, "Don't lead to 127.0.0.1 of the host, by the address of the gateway",
        to=False)
    netns_type: str = field(
        "", option("--netns-type TYPE", NAMESPACE, "The namespace is given as 'path' or 'pid' (default=pid)",
                   _one_of(PATH, PID)))
    userns_path: str | None = field(
        None, option("--userns-path PATH", NAMESPACE, "Join this user namespace", actions.file))
    sandbox: bool = flag("--enable-sandbox", RUNNING, "No effect: always on")
    seccomp: bool = flag("--enable-seccomp", RUNNING, "No effect: always on")
    outbound4: bytes | str | None = field(
        None, option("--outbound-addr ADDR", ADDRESSES, "Send IPv4 from this address, or through this interface",
                     _outbound))
    outbound6: bytes | str | None = field(
        None, option("--outbound-addr6 ADDR", ADDRESSES, "Send IPv6 from this address, or through this interface",
                     _outbound))
    dns: bool = flag("--disable-dns", ADDRESSES, "Don't forward queries from the resolver of the network", to=False)
    mac: bytes | None = value(
        "--macaddress MAC", ADDRESSES, "Set the MAC address of the interface (with --configure)",
        values.guest_mac, default=None)
    target_type: str = field(
        NETNS, option("--target-type TYPE", NAMESPACE,
                      "Connect a namespace ('netns', the default), or a machine at socket PATH ('bess')",
                      _one_of(NETNS, BESS)))
    # fmt: on


ROWS: tuple[Option, ...] = (
    *Line.ROWS,
    option("-h, --help", BASIC, "Show this help and exit", _help),
    option("-v, --version", BASIC, "Show the version and exit", _version),
)


def parse(argv: Sequence[str]) -> Options:
    """Options from argv without the program's name. Raises Fatal, or Done (--help, --version)."""
    fields: Fields = {}
    operands: list[str] = []
    left = list(argv)
    while left:
        parsed = Getopt(NAME, ROWS, left)
        for row, argument in parsed:
            row.action(fields, argument, row)
        left = parsed.operands
        operands += left[:1]
        del left[:1]
    line = Line(**fields)
    _check(line, operands)
    return _translated(line, operands)


def _check(line: Line, operands: Sequence[str]) -> None:
    """Raises Fatal."""
    if not operands:
        raise Fatal(f"{NAME}: PID or PATH is missing: see {NAME} --help")
    if len(operands) > 2:
        raise Fatal(f"too many arguments: {operands[2]}")
    if line.mac is not None and not line.configure:
        raise Fatal("--macaddress cannot be specified when --configure or -c is not specified")
    if line.target_type == BESS:
        given = {"configure": line.configure, "netns-type": line.netns_type, "userns-path": line.userns_path}
        for name, it in given.items():
            if it:
                raise Fatal(f"--{name} conflicts with --target-type={BESS}")
    if line.userns_path is not None and not os.path.lexists(line.userns_path):
        raise Fatal(f"userns path doesn't exist: {line.userns_path}")


def _translated(line: Line, operands: Sequence[str]) -> Options:
    network, prefix_len = line.cidr
    guest, host, resolver = (_addresses(network, number) for number in (GUEST, HOST, RESOLVER))
    outbound = Pair(line.outbound4, line.outbound6)
    resolvers = (resolver.v4, resolver.v6) if line.ipv6 else (resolver.v4,)
    return Options(
        **_target(line, operands),
        slirp4netns=True,
        level=log.WARNING,
        foreground=True,
        config_net=line.configure,
        no_ra=line.configure,  # as with --config-net
        address=guest,
        prefix_len=Pair(prefix_len, PREFIX6_LEN),
        gateway=host,
        use=Pair(True, line.ipv6),
        map_gw=line.host_loopback,
        mtu=line.mtu,
        dns=resolvers if line.dns else (),
        dns_none=not line.dns,
        dns_forward=resolvers if line.dns else (),
        search_none=True,
        dhcp_dns=line.dns,
        outbound=Pair(*(it if isinstance(it, bytes) else None for it in outbound)),
        outbound_if=Pair(*(it if isinstance(it, str) else None for it in outbound)),
        api_socket=line.api_socket,
        ready_fd=line.ready_fd,
        exit_fd=line.exit_fd,
    )


def _addresses(network: bytes, number: int) -> Pair:
    """The addresses of a number within the networks; those of IPv6 are written as those of IPv4 end."""
    v4 = (int.from_bytes(network, "big") + number).to_bytes(4, "big")
    return Pair(v4, PREFIX6[:14] + int(str(number), 16).to_bytes(2, "big"))


def _target(line: Line, operands: Sequence[str]) -> Fields:
    """The fields of what is connected. Raises Fatal."""
    target, name = operands[0], (*operands, TAP_NAME)[1]
    if line.target_type == BESS:
        return {"mode": PASST, "socket_path": values.socket_path(target), "packets": True, "one_off": True}
    fields: Fields = {"mode": PASTA, "netns_quit": False, "ns_ifname": values.new_interface(name), "ns_mac": line.mac}
    fields["userns"] = line.userns_path
    if line.netns_type == PATH:
        path = values.path(target, "PATH")
        if not os.path.lexists(path):
            raise Fatal(f"existing path expected when --netns-type=path: there is no {path}")
        return {**fields, "netns": os.path.abspath(path)}
    if not (target.isascii() and target.isdecimal()) or not 0 < int(target[:11]) <= PID_MAX:
        raise Fatal(f"PID must be a positive integer, not {target}")
    return {**fields, "pid": int(target)}


def started(options: Options) -> str:
    """The text for standard output at the start."""
    v4, resolver = options.address.v4, addr.text(options.dns[0]) if options.dns else ""
    network = (int.from_bytes(v4, "big") - GUEST).to_bytes(4, "big")
    gateway = addr.text(options.gateway.v4)
    facts = {
        "MTU": options.mtu,
        "Network": addr.text(network),
        "Netmask": addr.text(addr.netmask(options.prefix_len.v4)),
        "Gateway": gateway,
        "DNS": resolver,
        "Recommended IP": addr.text(v4),
        "API Socket": options.api_socket,
    }
    lines = ["Starting slirp", *(f"* {name + ':':<17}{fact}" for name, fact in facts.items() if fact)]
    if options.map_gw:
        cure = "set --disable-host-loopback to prohibit connecting to 127.0.0.1:*"
        lines.append(f"WARNING: 127.0.0.1:* on the host is accessible as {gateway} ({cure})")
    return "\n".join(lines) + "\n"
