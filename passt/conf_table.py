"""The options: one table, from which the parser, --help and the completions of shells are made, for pasta and passt.

An entry says how an option is written and what it does to the fields of `Options`, a dictionary while the command line
is read. Its action is a function of the dictionary and the argument (`conf_actions.py`).

An option that exists in one mode only is known in the other, too, by its long name: that says where it belongs, or
does nothing where it always did nothing. The letter is free for others there. Entries without help are options of the
original that do not exist here; they say so, in the words of getopt_long(3), by which clients know what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING

from . import conf_actions as actions
from . import conf_values as values
from . import log
from .conf_actions import Action
from .conf_options import LOG_SIZE, NETNS_RUN_DIR, Done, Fields, Pair
from .core.config import MTU_DEFAULT, PASST, PASTA

if TYPE_CHECKING:
    from .conf_completion import Program


@dataclass(frozen=True, slots=True)
class Option:
    """One entry. `short` and `arg` are empty when there is none; `help` lines are separated by newlines.

    In `help`, {guest} and {link} stand for what these are called in a mode.
    """

    name: str
    short: str
    arg: str
    action: Action
    help: str
    mode: str | None = None  # the only mode that has it
    ignored: bool = False  # in the other mode, as a long option


GUEST = {PASTA: "namespace", PASST: "guest"}
_LINK = {PASTA: "a tap device", PASST: "a socket"}


def _absent(name: str, why: str, none: bool = False) -> Option:
    """An option that clients may know from the original."""
    text, _, arg = name.partition(" ")
    return Option(text, "", arg, actions.absent(text, why, none), "", PASST)


def _elsewhere(option: Option) -> Option:
    """The entry in the mode that does not have it."""
    action = actions.nothing if option.ignored else actions.elsewhere(option.name, option.mode or "")
    return replace(option, short="", action=action)


def _help(fields: Fields, _: str) -> None:
    raise Done(usage(fields["mode"]))


def _version(fields: Fields, _: str) -> None:
    from . import __version__

    raise Done(f"{fields['mode']} {__version__}\nIn pure Python. GPL-2.0-or-later; there is no warranty.\n")


def _completion(fields: Fields, text: str) -> None:
    from . import conf_completion

    raise Done(conf_completion.script(text, completed(fields["mode"])))


# Name, short name, argument, action, help ---------------------------------------------------------------------------

TABLE = (
    Option("debug", "d", "", actions.debug,
           "Be verbose, log to standard error only"),
    Option("trace", "", "", actions.setting("level", log.TRACE),
           "Be extra verbose: one line for each packet; implies --debug"),
    Option("quiet", "q", "", actions.setting("level", log.WARNING),
           "Print warnings and errors only"),
    Option("foreground", "f", "", actions.setting("foreground", True),
           "Don't run in background"),
    Option("stderr", "e", "", actions.nothing,
           "No effect: kept for compatibility"),
    Option("log-file", "l", "PATH", actions.parsed("log_file", values.path),
           "Log to file PATH, not to syslog"),
    Option("log-size", "", "BYTES", actions.parsed("log_size", values.log_size),
           f"Let the log file grow to BYTES; default: {LOG_SIZE}"),
    Option("stats", "", "SECONDS[,json]", actions.stats,
           "Log a table of traffic, flows and drops so often;\n"
           "signal USR1 does it once"),
    Option("conf-path", "c", "PATH", actions.parsed("conf_path", values.socket_path),
           "Listen for pesto(1) on UNIX domain socket PATH"),
    Option("api-socket", "", "PATH", actions.parsed("api_socket", values.socket_path),
           "Listen on PATH for requests as slirp4netns(1) has them"),
    Option("chroot-fallback", "", "", actions.setting("chroot_fallback", True),
           "Where the root file system forbids pivot_root(2), as an\n"
           "initramfs does, use chroot(2) to let go of it"),
    Option("runas", "", "UID[:GID]|LOGIN[:GROUP]", actions.parsed("runas", values.runas),
           "Run as this user and group\n"
           "default: as who started it, user nobody if that is root"),
    Option("help", "h", "", _help,
           "Display this help and exit"),
    Option("print-seccomp", "", "", actions.setting("print_seccomp", True),
           "Print which system calls the running program may make,\n"
           "and exit"),
    Option("version", "", "", _version,
           "Show version and exit"),
    Option("completion", "", "SHELL", _completion,
           "Print completions for SHELL: bash, zsh or fish; and exit"),
    Option("pcap", "p", "FILE", actions.parsed("pcap", values.path),
           "Save all packets to pcap file"),
    Option("pid", "P", "FILE", actions.parsed("pid_file", values.path),
           "Write own PID to FILE once ready"),
    Option("mtu", "m", "MTU", actions.parsed("mtu", values.mtu),
           f"Assign MTU, 0: don't assign any; default: {MTU_DEFAULT}"),
    Option("address", "a", "ADDR[/PREFIX]", actions.address,
           "Assign IPv4 or IPv6 address; once for IPv4, once for IPv6\n"
           "default: from the interface with the default route"),
    Option("netmask", "n", "MASK", actions.netmask,
           "Assign IPv4 netmask, dotted or number of bits\n"
           "default: that of the interface with the default route"),
    Option("mac-addr", "M", "ADDR", actions.parsed("our_mac", values.guest_mac),
           "Use ADDR as our MAC address; default: 9a:55:9a:55:9a:55"),
    Option("gateway", "g", "ADDR", actions.per_family("gateway", values.gateway),
           "Use ADDR as gateway; once for IPv4, once for IPv6\n"
           "default: that of the default route"),
    Option("interface", "i", "NAME", actions.parsed("interface", values.interface),
           "Take addresses and routes from interface NAME\n"
           "default: the one with the default route"),
    Option("outbound", "o", "ADDR", actions.per_family("outbound", values.outbound),
           "Bind outbound sockets to ADDR; once for IPv4, once for IPv6"),
    Option("outbound-if4", "", "NAME", actions.outbound_if(False),
           "Bind outbound IPv4 sockets to interface NAME"),
    Option("outbound-if6", "", "NAME", actions.outbound_if(True),
           "Bind outbound IPv6 sockets to interface NAME"),
    Option("dns", "D", "ADDR", actions.dns,
           "Tell the {guest} this resolver, up to three per family\n"
           "'none': tell none; default: from /etc/resolv.conf"),
    Option("dns-forward", "", "ADDR", actions.dns_forward,
           "Forward queries sent to ADDR to the host's resolvers;\n"
           "can be given several times; default: none"),
    Option("dns-host", "", "ADDR", actions.dns_host,
           "Forward queries to this resolver of the host, up to three\n"
           "per family; default: those in /etc/resolv.conf"),
    Option("search", "S", "DOMAIN", actions.search,
           "Tell the {guest} this search domain, up to six\n"
           "'none': tell none; default: from /etc/resolv.conf"),
    Option("dhcp-dns", "", "", actions.setting("dhcp_dns", True),
           "Pass resolvers by DHCP, DHCPv6 and NDP", PASTA),
    Option("dhcp-search", "", "", actions.setting("dhcp_search", True),
           "Pass search domains by DHCP, DHCPv6 and NDP", PASTA),
    Option("no-dhcp-dns", "", "", actions.setting("dhcp_dns", False),
           "Don't pass resolvers by DHCP, DHCPv6 and NDP", PASST),
    Option("no-dhcp-search", "", "", actions.setting("dhcp_search", False),
           "Don't pass search domains by DHCP, DHCPv6 and NDP", PASST),
    Option("hostname", "H", "HOST", actions.parsed("hostname", values.hostname),
           "Tell the {guest} by DHCP that this is its name"),
    Option("fqdn", "", "FQDN", actions.parsed("fqdn", values.fqdn),
           "Tell the {guest} by DHCP and DHCPv6 its name with domain"),
    Option("no-tcp", "", "", actions.setting("no_tcp", True),
           "Disable TCP"),
    Option("no-udp", "", "", actions.setting("no_udp", True),
           "Disable UDP"),
    Option("no-icmp", "", "", actions.setting("no_icmp", True),
           "Disable ICMP and ICMPv6 echo"),
    Option("no-dhcp", "", "", actions.setting("no_dhcp", True),
           "Disable the DHCP server"),
    Option("no-ndp", "", "", actions.setting("no_ndp", True),
           "Disable NDP responses"),
    Option("no-dhcpv6", "", "", actions.setting("no_dhcpv6", True),
           "Disable the DHCPv6 server"),
    Option("no-ra", "", "", actions.setting("no_ra", True),
           "Disable router advertisements"),
    Option("map-host-loopback", "", "ADDR", actions.mapping("map_host_loopback"),
           "Translate ADDR to the host's loopback address\n"
           "once for IPv4, once for IPv6; 'none': neither\n"
           "default: the gateway's address"),
    Option("no-map-gw", "", "", actions.setting("map_gw", False),
           "Don't map the gateway's address to the host"),
    Option("map-guest-addr", "", "ADDR", actions.mapping("map_guest_addr"),
           "Translate ADDR to the host's own address\n"
           "once for IPv4, once for IPv6; 'none': neither; default: none"),
    Option("ipv4-only", "4", "", actions.setting("use", Pair(True, False)),
           "Enable IPv4 operation only"),
    Option("ipv6-only", "6", "", actions.setting("use", Pair(False, True)),
           "Enable IPv6 operation only"),
    Option("tcp-ports", "t", "SPEC", actions.ports("t"),
           "Forward TCP ports of the host to the {guest}, repeatable\n"
           "SPEC is 'none', the default of passt, 'auto', that of pasta\n"
           "(those bound in the namespace; not for passt), 'all', or a\n"
           "list: 22, 8080:80, 5000-5010:6000-6010, ~5003,\n"
           "127.0.0.1/22, %eth0/22, 6443:192.0.2.20/6443: see passt(1)"),
    Option("udp-ports", "u", "SPEC", actions.ports("u"),
           "The same for UDP"),
    Option("tcp-ns", "T", "SPEC", actions.ports("T"),
           "Forward TCP ports of the namespace's loopback to the host's\n"
           "SPEC as for -t, without address and interface", PASTA, ignored=True),
    Option("udp-ns", "U", "SPEC", actions.ports("U"),
           "The same for UDP", PASTA, ignored=True),
    Option("host-lo-to-ns-lo", "", "", actions.setting("host_lo_to_ns_lo", True),
           "Connect the host's loopback to that of the namespace,\n"
           "not to its address", PASTA),
    Option("no-splice", "", "", actions.setting("no_splice", True),
           "Forward loopback connections to the namespace through the\n"
           "tap interface, like all others", PASTA, ignored=True),
    Option("splice-only", "", "", actions.setting("splice_only", True),
           "Forward loopback connections only: no tap interface", PASTA),
    Option("freebind", "", "", actions.setting("freebind", True),
           "Let -t and -u listen on addresses that don't exist yet"),
    Option("socket", "s", "PATH", actions.socket,
           "Listen for the guest on UNIX domain socket PATH\n"
           "default: /tmp/passt_1.socket, or the next that is free", PASST, ignored=True),
    Option("socket-path", "", "PATH", actions.socket,
           "The same", PASST, ignored=True),
    Option("fd", "F", "FD", actions.fd,
           "Serve the guest at this open descriptor of {link},\n"
           "and quit with it"),
    Option("one-off", "1", "", actions.setting("one_off", True),
           "Quit when the guest disconnects", PASST),
    Option("ns-ifname", "I", "NAME", actions.parsed("ns_ifname", values.interface),
           "Name of the interface in the namespace\n"
           "default: that of the interface with the default route", PASTA, ignored=True),
    Option("userns", "", "PATH", actions.userns,
           "Join this user namespace; default: that of the PID", PASTA),
    Option("netns", "", "PATH|NAME", actions.parsed("netns", values.path),
           "Join this network namespace; NAME is one of ip-netns(8)", PASTA),
    Option("nsrun-dir", "", "PATH", actions.parsed("nsrun_dir", values.path),
           f"Look up NAME of --netns in directory PATH\n"
           f"default: {NETNS_RUN_DIR}", PASTA),
    Option("netns-only", "", "", actions.netns_only,
           "Don't join or create a user namespace\n"
           "implied by --netns without --userns", PASTA),
    Option("no-netns-quit", "", "", actions.setting("netns_quit", False),
           "Don't quit when the network namespace goes away", PASTA),
    Option("config-net", "", "", actions.config_net,
           "Configure the interface in the namespace", PASTA),
    Option("no-copy-routes", "", "", actions.deprecated_copy("no-copy-routes", "copy_routes"),
           "With --config-net: only set a default route (deprecated)", PASTA),
    Option("no-copy-addrs", "", "", actions.deprecated_copy("no-copy-addrs", "copy_addrs"),
           "With --config-net: only set one address (deprecated)", PASTA),
    Option("ns-mac-addr", "", "ADDR", actions.parsed("ns_mac", values.guest_mac),
           "Set MAC address of the interface in the namespace", PASTA),
    _absent("vhost-user", "the guest is served on a stream socket here (qemu -netdev stream)"),
    _absent("print-capabilities", "it is about vhost-user, and the guest is served on a stream socket here"),
    _absent("repair-path PATH", "connections do not migrate with the guest here", none=True),
    _absent("migrate-exit", "connections do not migrate with the guest here"),
    _absent("migrate-no-linger", "connections do not migrate with the guest here"),
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


@cache
def table(mode: str) -> tuple[Option, ...]:
    """The options as they are in a mode, PASTA or PASST."""
    return tuple(option if option.mode in (None, mode) else _elsewhere(option) for option in TABLE)


def listed(mode: str) -> tuple[Option, ...]:
    """The options that a mode has."""
    return tuple(option for option in TABLE if option.help and option.mode in (None, mode))


def completed(mode: str) -> Program:
    """What shells complete."""
    from .conf_completion import Program

    options = [replace(option, help=_text(option, mode)) for option in listed(mode)]
    if mode == PASTA:
        return Program(("pasta", "passt4netns"), options, operands="command", spec=("none", "auto", "all"))
    return Program(("passt",), options)


def _text(option: Option, mode: str) -> str:
    return option.help.format(guest=GUEST[mode], link=_LINK[mode])


def usage(mode: str) -> str:
    """The text of --help."""
    lines = [_HEADS[mode], "Options:"]
    for option in listed(mode):
        short = f"-{option.short}, " if option.short else "    "
        head = f"  {short}--{option.name} {option.arg}".rstrip()
        first, *rest = _text(option, mode).split("\n")
        lines.append(f"{head:<{_COLUMN}}{first}" if len(head) < _COLUMN else f"{head}\n{'':<{_COLUMN}}{first}")
        lines += [f"{'':<{_COLUMN}}  {line}" for line in rest]
    return "\n".join(lines) + "\n"
