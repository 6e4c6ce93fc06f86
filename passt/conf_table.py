"""The options: one table, from which both the parser and --help are made, for pasta and for passt.

An entry says how an option is written and what it does to the fields of `Options`, a dictionary while the command line
is read. Its action is a function of the dictionary and the argument; there are few kinds of them.

An option that exists in one mode only is known in the other, too, by its long name: that says where it belongs, or
does nothing where it always did nothing. The letter is free for others there. Entries without help are options of the
original that do not exist here; they say so, in the words of getopt_long(3), by which clients know what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from . import conf_values as values
from . import log
from .conf_values import NONE
from .core.config import MTU_DEFAULT, OUR_MAC, PASST, PASTA
from .core.rules import Rule
from .log import Fatal

DNS_MAX = 3  # per family, as in resolv.conf(5)
SEARCH_MAX = 6
LOG_SIZE = 1 << 20  # bytes
PORT_SPECS = "port_specs"  # key of the specifications, (letter, argument), in the dictionary; no field of Options

Fields = dict[str, Any]
Action = Callable[[Fields, str], None]


@dataclass(frozen=True, slots=True)
class Pair:
    """A setting that exists once per family."""

    v4: Any = None
    v6: Any = None

    def get(self, v6: bool) -> Any:
        return self.v6 if v6 else self.v4


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for; nothing here was compared with the host yet."""

    mode: str = PASTA
    level: int = log.INFO
    foreground: bool = False
    log_file: str | None = None
    log_size: int = LOG_SIZE
    stats: float = 0.0  # seconds between tables of what was done, 0: none
    stats_json: bool = False  # ... as JSON
    conf_path: str | None = None  # control socket
    api_socket: str | None = None  # the same in the terms of slirp4netns
    chroot_fallback: bool = False  # where the root file system forbids pivot_root(2)
    runas: str | None = None
    pcap: str | None = None
    pid_file: str | None = None

    use: Pair = Pair(True, True)
    mtu: int = MTU_DEFAULT
    address: Pair = Pair()
    prefix_len: Pair = Pair(0, 0)
    netmask: int = 0
    gateway: Pair = Pair()
    interface: str | None = None
    our_mac: bytes = OUR_MAC
    outbound: Pair = Pair()
    outbound_if: Pair = Pair()

    dns: tuple[bytes, ...] = ()
    dns_none: bool = False
    dns_forward: Pair = Pair()
    dns_host: Pair = Pair()
    dhcp_dns: bool = False
    search: tuple[str, ...] = ()
    search_none: bool = False
    dhcp_search: bool = False
    hostname: str = ""
    fqdn: str = ""

    no_tcp: bool = False
    no_udp: bool = False
    no_icmp: bool = False
    no_dhcp: bool = False
    no_ndp: bool = False
    no_dhcpv6: bool = False
    no_ra: bool = False
    map_gw: bool = True
    map_host_loopback: Pair = Pair()  # False: mapped to nothing
    map_guest_addr: Pair = Pair()  # the same
    forwards: tuple[Rule, ...] = ()
    no_splice: bool = False
    splice_only: bool = False
    host_lo_to_ns_lo: bool = False
    freebind: bool = False

    socket_path: str | None = None  # None: the first default path that is free
    fd: int | None = None
    one_off: bool = False

    ns_ifname: str | None = None
    ns_mac: bytes | None = None
    config_net: bool = False
    copy_routes: bool = True
    copy_addrs: bool = True
    userns: str | None = None
    netns: str | None = None
    netns_only: bool = False
    netns_quit: bool = True
    pid: int | None = None
    command: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Option:
    """One entry. `short` and `arg` are empty when there is none; `help` lines are separated by newlines.

    In `help`, {guest} stands for what it is called in a mode.
    """

    name: str
    short: str
    arg: str
    action: Action
    help: str
    mode: str | None = None  # the only mode that has it
    ignored: bool = False  # in the other mode, as a long option


class Done(Exception):
    """--help and --version: print the text on standard output, exit status 0."""


DEFAULTS: dict[str, Fields] = {PASTA: {}, PASST: {"dhcp_dns": True, "dhcp_search": True}}  # unlike those of Options
GUEST = {PASTA: "namespace", PASST: "guest"}

# Kinds of actions --------------------------------------------------------------------------------------------------


def _set(field: str, value: Any) -> Action:
    def action(fields: Fields, _: str) -> None:
        fields[field] = value

    return action


def _value(field: str, parse: Callable[[str], Any]) -> Action:
    def action(fields: Fields, text: str) -> None:
        fields[field] = parse(text)

    return action


def _put(fields: Fields, field: str, value: Any, v6: bool) -> None:
    pair = fields.get(field, Options.__dataclass_fields__[field].default)
    fields[field] = Pair(pair.v4, value) if v6 else Pair(value, pair.v6)


def _per_family(field: str, parse: Callable[[str], bytes]) -> Action:
    """Once per family, the last wins."""

    def action(fields: Fields, text: str) -> None:
        value = parse(text)
        _put(fields, field, value, len(value) == 16)

    return action


def _mapping(field: str) -> Action:
    """Like _per_family, or `none` for both."""

    def action(fields: Fields, text: str) -> None:
        if text == NONE:
            fields[field] = Pair(False, False)
        else:
            _per_family(field, values.mapped)(fields, text)

    return action


def _absent(name: str, why: str) -> Option:
    """An option that clients may know from the original."""
    text, _, arg = name.partition(" ")

    def action(fields: Fields, _: str) -> None:
        raise Fatal(f"{fields['mode']}: unrecognized option '--{text}': {why}")

    return Option(text, "", arg, action, "", PASST)


def _elsewhere(option: Option) -> Option:
    """The entry in the mode that does not have it."""

    def refuse(_: Fields, __: str) -> None:
        raise Fatal(f"--{option.name} is for {option.mode} mode only")

    return replace(option, short="", action=_nothing if option.ignored else refuse)


def _outbound_if(v6: bool) -> Action:
    return lambda fields, text: _put(fields, "outbound_if", values.interface(text), v6)


def _ports(letter: str) -> Action:
    """Collected: what a specification means depends on the options after it."""
    return lambda fields, text: fields.setdefault(PORT_SPECS, []).append((letter, text))


# Single ones -------------------------------------------------------------------------------------------------------


def _address(fields: Fields, text: str) -> None:
    value, prefix_len = values.address(text)
    _put(fields, "address", value, len(value) == 16)
    _put(fields, "prefix_len", prefix_len, len(value) == 16)


def _dns(fields: Fields, text: str) -> None:
    """Adds to the list. `none` clears it, and what was said about forwarding; a later -D starts anew."""
    if text == NONE:
        fields.update(dns=(), dns_none=True, dns_forward=Pair(), dns_host=Pair())
        return
    value = values.dns(text)
    servers = (*fields.get("dns", ()), value)
    if len([s for s in servers if len(s) == len(value)]) > DNS_MAX:
        raise Fatal(f"Cannot use DNS address {text} (at most {DNS_MAX} per family)")
    fields.update(dns=servers, dns_none=False)


def _search(fields: Fields, text: str) -> None:
    if text == NONE:
        fields.update(search=(), search_none=True)
        return
    for name in text.split(" "):  # QEMU gives all of its search domains as one argument
        domains = (*fields.get("search", ()), values.domain(name))
        if len(domains) > SEARCH_MAX:
            raise Fatal(f"Cannot use DNS search domain {name} (at most {SEARCH_MAX})")
        fields.update(search=domains, search_none=False)


def _stats(fields: Fields, text: str) -> None:
    seconds, as_json = values.stats(text)
    fields.update(stats=seconds, stats_json=as_json)


def _socket(fields: Fields, text: str) -> None:
    fields.update(socket_path=values.socket_path(text), fd=None)


def _fd(fields: Fields, text: str) -> None:
    """One connection is all there will be."""
    fields.update(fd=values.fd(text), socket_path=None, one_off=True)


def _userns(fields: Fields, text: str) -> None:
    fields.update(userns=values.path(text), netns_only=False)


def _netns_only(fields: Fields, _: str) -> None:
    fields.update(userns=None, netns_only=True)


def _config_net(fields: Fields, _: str) -> None:
    fields.update(config_net=True, no_ra=True)


def _deprecated_copy(name: str, field: str) -> Action:
    def action(fields: Fields, _: str) -> None:
        log.warn(f"--{name} will be dropped soon")
        fields[field] = False

    return action


def _help(fields: Fields, _: str) -> None:
    raise Done(usage(fields["mode"]))


def _version(fields: Fields, _: str) -> None:
    from . import __version__

    raise Done(f"{fields['mode']} {__version__}\nIn pure Python. GPL-2.0-or-later; there is no warranty.\n")


def _nothing(_: Fields, __: str) -> None:
    """Accepted because clients give it."""


# Name, short name, argument, action, help ---------------------------------------------------------------------------

TABLE = (
    Option("debug", "d", "", _set("level", log.DEBUG),
           "Be verbose, log to standard error only"),
    Option("trace", "", "", _set("level", log.TRACE),
           "Be extra verbose: one line for each packet; implies --debug"),
    Option("quiet", "q", "", _set("level", log.WARNING),
           "Print warnings and errors only"),
    Option("foreground", "f", "", _set("foreground", True),
           "Don't run in background"),
    Option("stderr", "e", "", _nothing,
           "No effect: kept for compatibility"),
    Option("log-file", "l", "PATH", _value("log_file", values.path),
           "Log to file PATH, not to syslog"),
    Option("log-size", "", "BYTES", _value("log_size", values.log_size),
           f"Let the log file grow to BYTES; default: {LOG_SIZE}"),
    Option("stats", "", "SECONDS[,json]", _stats,
           "Log a table of traffic, flows and drops so often;\n"
           "signal USR1 does it once"),
    Option("conf-path", "c", "PATH", _value("conf_path", values.socket_path),
           "Listen for pesto(1) on UNIX domain socket PATH"),
    Option("api-socket", "", "PATH", _value("api_socket", values.socket_path),
           "Listen on PATH for requests as slirp4netns(1) has them"),
    Option("chroot-fallback", "", "", _set("chroot_fallback", True),
           "Where the root file system forbids pivot_root(2), as an\n"
           "initramfs does, use chroot(2) to let go of it"),
    Option("runas", "", "UID|UID:GID", _value("runas", str),
           "Run as given UID and GID, or LOGIN and GROUP\n"
           "default: as who started it, user nobody if that is root"),
    Option("help", "h", "", _help,
           "Display this help and exit"),
    Option("version", "", "", _version,
           "Show version and exit"),
    Option("pcap", "p", "FILE", _value("pcap", values.path),
           "Save all packets to pcap file"),
    Option("pid", "P", "FILE", _value("pid_file", values.path),
           "Write own PID to FILE once ready"),
    Option("mtu", "m", "MTU", _value("mtu", values.mtu),
           f"Assign MTU, 0: don't assign any; default: {MTU_DEFAULT}"),
    Option("address", "a", "ADDR[/PREFIX]", _address,
           "Assign IPv4 or IPv6 address; once for IPv4, once for IPv6\n"
           "default: from the interface with the default route"),
    Option("netmask", "n", "MASK", _value("netmask", values.netmask),
           "Assign IPv4 netmask, dotted or number of bits\n"
           "default: that of the interface with the default route"),
    Option("mac-addr", "M", "ADDR", _value("our_mac", values.guest_mac),
           "Use ADDR as our MAC address; default: 9a:55:9a:55:9a:55"),
    Option("gateway", "g", "ADDR", _per_family("gateway", values.gateway),
           "Use ADDR as gateway; once for IPv4, once for IPv6\n"
           "default: that of the default route"),
    Option("interface", "i", "NAME", _value("interface", values.interface),
           "Take addresses and routes from interface NAME\n"
           "default: the one with the default route"),
    Option("outbound", "o", "ADDR", _per_family("outbound", values.outbound),
           "Bind outbound sockets to ADDR; once for IPv4, once for IPv6"),
    Option("outbound-if4", "", "NAME", _outbound_if(False),
           "Bind outbound IPv4 sockets to interface NAME"),
    Option("outbound-if6", "", "NAME", _outbound_if(True),
           "Bind outbound IPv6 sockets to interface NAME"),
    Option("dns", "D", "ADDR", _dns,
           "Tell the {guest} this resolver, up to three per family\n"
           "'none': tell none; default: from /etc/resolv.conf"),
    Option("dns-forward", "", "ADDR", _per_family("dns_forward", values.dns_forward),
           "Forward queries sent to ADDR to the host's resolver\n"
           "once for IPv4, once for IPv6; default: none"),
    Option("dns-host", "", "ADDR", _per_family("dns_host", values.dns_host),
           "Resolver on the host to forward queries to\n"
           "default: the first in /etc/resolv.conf"),
    Option("search", "S", "DOMAIN", _search,
           "Tell the {guest} this search domain, up to six\n"
           "'none': tell none; default: from /etc/resolv.conf"),
    Option("dhcp-dns", "", "", _set("dhcp_dns", True),
           "Pass resolvers by DHCP, DHCPv6 and NDP", PASTA),
    Option("dhcp-search", "", "", _set("dhcp_search", True),
           "Pass search domains by DHCP, DHCPv6 and NDP", PASTA),
    Option("no-dhcp-dns", "", "", _set("dhcp_dns", False),
           "Don't pass resolvers by DHCP, DHCPv6 and NDP", PASST),
    Option("no-dhcp-search", "", "", _set("dhcp_search", False),
           "Don't pass search domains by DHCP, DHCPv6 and NDP", PASST),
    Option("hostname", "H", "NAME", _value("hostname", values.hostname),
           "Tell the {guest} by DHCP that this is its name"),
    Option("fqdn", "", "NAME", _value("fqdn", values.fqdn),
           "Tell the {guest} by DHCP and DHCPv6 its name with domain"),
    Option("no-tcp", "", "", _set("no_tcp", True),
           "Disable TCP"),
    Option("no-udp", "", "", _set("no_udp", True),
           "Disable UDP"),
    Option("no-icmp", "", "", _set("no_icmp", True),
           "Disable ICMP and ICMPv6 echo"),
    Option("no-dhcp", "", "", _set("no_dhcp", True),
           "Disable the DHCP server"),
    Option("no-ndp", "", "", _set("no_ndp", True),
           "Disable NDP responses"),
    Option("no-dhcpv6", "", "", _set("no_dhcpv6", True),
           "Disable the DHCPv6 server"),
    Option("no-ra", "", "", _set("no_ra", True),
           "Disable router advertisements"),
    Option("map-host-loopback", "", "ADDR", _mapping("map_host_loopback"),
           "Translate ADDR to the host's loopback address\n"
           "once for IPv4, once for IPv6; 'none': neither\n"
           "default: the gateway's address"),
    Option("no-map-gw", "", "", _set("map_gw", False),
           "Don't map the gateway's address to the host"),
    Option("map-guest-addr", "", "ADDR", _mapping("map_guest_addr"),
           "Translate ADDR to the host's own address\n"
           "once for IPv4, once for IPv6; 'none': neither; default: none"),
    Option("ipv4-only", "4", "", _set("use", Pair(True, False)),
           "Enable IPv4 operation only"),
    Option("ipv6-only", "6", "", _set("use", Pair(False, True)),
           "Enable IPv6 operation only"),
    Option("tcp-ports", "t", "SPEC", _ports("t"),
           "Forward TCP ports of the host to the {guest}, repeatable\n"
           "SPEC is 'none', the default of passt, 'auto', that of pasta\n"
           "(those bound in the namespace; not for passt), 'all', or a\n"
           "list: 22, 8080:80, 5000-5010:6000-6010, ~5003,\n"
           "127.0.0.1/22, %eth0/22, 6443:192.0.2.20/6443: see passt(1)"),
    Option("udp-ports", "u", "SPEC", _ports("u"),
           "The same for UDP"),
    Option("tcp-ns", "T", "SPEC", _ports("T"),
           "Forward TCP ports of the namespace's loopback to the host's\n"
           "SPEC as for -t, without address and interface", PASTA, ignored=True),
    Option("udp-ns", "U", "SPEC", _ports("U"),
           "The same for UDP", PASTA, ignored=True),
    Option("host-lo-to-ns-lo", "", "", _set("host_lo_to_ns_lo", True),
           "Connect the host's loopback to that of the namespace,\n"
           "not to its address", PASTA),
    Option("no-splice", "", "", _set("no_splice", True),
           "Forward loopback connections to the namespace through the\n"
           "tap interface, like all others", PASTA, ignored=True),
    Option("splice-only", "", "", _set("splice_only", True),
           "Forward loopback connections only: no tap interface", PASTA),
    Option("freebind", "", "", _set("freebind", True),
           "Let -t and -u listen on addresses that don't exist yet"),
    Option("socket", "s", "PATH", _socket,
           "Listen for the guest on UNIX domain socket PATH\n"
           "default: /tmp/passt_1.socket, or the next that is free", PASST, ignored=True),
    Option("socket-path", "", "PATH", _socket,
           "The same", PASST, ignored=True),
    Option("fd", "F", "FD", _fd,
           "The guest is connected already, to this open descriptor\n"
           "implies --one-off", PASST),
    Option("one-off", "1", "", _set("one_off", True),
           "Quit when the guest disconnects", PASST),
    Option("ns-ifname", "I", "NAME", _value("ns_ifname", values.interface),
           "Name of the interface in the namespace\n"
           "default: that of the interface with the default route", PASTA, ignored=True),
    Option("userns", "", "PATH", _userns,
           "Join this user namespace; default: that of the PID", PASTA),
    Option("netns", "", "PATH|NAME", _value("netns", values.path),
           "Join this network namespace; NAME is one of ip-netns(8)", PASTA),
    Option("netns-only", "", "", _netns_only,
           "Don't join or create a user namespace\n"
           "implied by --netns without --userns", PASTA),
    Option("no-netns-quit", "", "", _set("netns_quit", False),
           "Don't quit when the network namespace goes away", PASTA),
    Option("config-net", "", "", _config_net,
           "Configure the interface in the namespace", PASTA),
    Option("no-copy-routes", "", "", _deprecated_copy("no-copy-routes", "copy_routes"),
           "With --config-net: only set a default route (deprecated)", PASTA),
    Option("no-copy-addrs", "", "", _deprecated_copy("no-copy-addrs", "copy_addrs"),
           "With --config-net: only set one address (deprecated)", PASTA),
    Option("ns-mac-addr", "", "ADDR", _value("ns_mac", values.guest_mac),
           "Set MAC address of the interface in the namespace", PASTA),
    _absent("vhost-user", "the guest is served on a stream socket here (qemu -netdev stream)"),
    _absent("print-capabilities", "it is about vhost-user, and the guest is served on a stream socket here"),
    _absent("repair-path PATH", "connections do not migrate with the guest here"),
)  # fmt: skip

_COLUMN = 32


_HEADS = {
    PASTA: """\
Usage: pasta [OPTION]... [COMMAND] [ARGS]...
       pasta [OPTION]... PID
       pasta [OPTION]... --netns PATH|NAME

Without PID or --netns, run COMMAND or a login shell in new user and network
namespaces, and connect them. Otherwise connect an existing namespace.
""",
    PASST: """\
Usage: passt [OPTION]...

Listen on a UNIX domain socket, and connect the virtual machine that comes
there, by -netdev stream of qemu.
""",
}


def table(mode: str) -> tuple[Option, ...]:
    """The options as they are in a mode, PASTA or PASST."""
    return tuple(option if option.mode in (None, mode) else _elsewhere(option) for option in TABLE)


def listed(mode: str) -> tuple[Option, ...]:
    """The options that a mode has."""
    return tuple(option for option in TABLE if option.help and option.mode in (None, mode))


def usage(mode: str) -> str:
    """The text of --help."""
    lines = [_HEADS[mode], "Options:"]
    for option in listed(mode):
        short = f"-{option.short}, " if option.short else "    "
        head = f"  {short}--{option.name} {option.arg}".rstrip()
        first, *rest = option.help.format(guest=GUEST[mode]).split("\n")
        lines.append(f"{head:<{_COLUMN}}{first}" if len(head) < _COLUMN else f"{head}\n{'':<{_COLUMN}}{first}")
        lines += [f"{'':<{_COLUMN}}  {line}" for line in rest]
    return "\n".join(lines) + "\n"
