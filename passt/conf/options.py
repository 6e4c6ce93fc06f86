"""Options: the parsed command line, a field per setting, with the option that sets it.

This is the table of options of pasta and passt: `row.py` describes a row, `conf/table.py` adds the options that set no
field. Within a group, rows are in the order of --help and of the manual page.

A new option is a row here, and a paragraph in passt.1, which a test demands. If the data plane needs its value, a field
of the same name in `policy/config.py` gets it (`decide.py` copies by name). `make completions` brings it to the shells.
"""

from __future__ import annotations

from .. import log
from ..log_file import SIZE as LOG_SIZE
from ..policy.config import ALL, MTU_DEFAULT, OUR_MAC, PASST, PASTA
from ..policy.rules import Rule
from . import actions, values
from .actions import Pair
from .row import (
    ADDRESSES,
    BASIC,
    MACHINE,
    MESSAGES,
    NAMES,
    NAMESPACE,
    PORTS,
    RARE,
    RUNNING,
    SERVICES,
    Only,
    Record,
    field,
    file,
    flag,
    option,
    value,
)

NETNS_RUN_DIR = "/run/netns"  # where ip-netns(8) keeps its names

_PASTA, _PASST = Only(PASTA), Only(PASST)
_LOOPBACK = "a virtual machine reaches the host's loopback at the address of --map-host-loopback"


class Options(Record):
    """The parsed command line, before it is combined with the host's configuration."""

    mode: str = PASTA
    pid: int | None = None
    command: tuple[str, ...] = ()

    slirp4netns: bool = False  # by its command line (`slirp4netns.py`), which alone sets these two:
    packets: bool = False  # the machine's socket is one of packets
    exit_fd: int | None = None  # descriptor whose event is the end
    # Basic options
    config_net: bool = field(
        False,
        option("--config-net", BASIC, "Set up the interface: addresses, routes, MTU", actions.config_net,
               only=Only(PASTA, "a virtual machine sets up its interface itself, by DHCP and router advertisements")),
    )  # fmt: skip

    # Ports
    forwards: tuple[Rule, ...] = field(
        (),
        option("-t, --tcp-ports SPEC", PORTS,
               "Forward TCP ports of the host to the {guest}\n"
               "SPEC: 'none', 'all', {auto}or a list, as in 22,8080:80 or 127.0.0.1/8000-8010,~8003; see passt(1)\n"
               "default: {ports}; can be repeated",
               actions.ports("t")),
        option("-u, --udp-ports SPEC", PORTS,
               "Forward UDP ports of the host to the {guest}\n"
               "SPEC as for -t",
               actions.ports("u")),
        option("-T, --tcp-ns SPEC", PORTS,
               "Forward TCP ports of localhost in the namespace to localhost of the host\n"
               "SPEC as for -t, without address and interface",
               actions.ports("T"), only=Only(PASTA, _LOOPBACK, inert=True)),
        option("-U, --udp-ns SPEC", PORTS,
               "Forward UDP ports of localhost in the namespace to localhost of the host\n"
               "SPEC as for -T",
               actions.ports("U"), only=Only(PASTA, _LOOPBACK, inert=True)),
    )  # fmt: skip
    host_lo_to_ns_lo: bool = flag(
        "--host-lo-to-ns-lo", PORTS,
        "Lead connections from the host's loopback to localhost of the namespace, not to its address",
        only=_PASTA,
    )  # fmt: skip
    no_splice: bool = flag(
        "--no-splice", PORTS,
        "Send connections from the host's loopback through the tap interface, like all others",
        only=Only(PASTA, "passt sends all connections through the socket of the guest anyway", inert=True),
    )  # fmt: skip
    splice_only: bool = flag(
        "--splice-only", PORTS,
        "Forward between the two loopbacks only: no interface",
        only=_PASTA,
    )  # fmt: skip
    freebind: bool = flag("--freebind", PORTS, "Let -t and -u listen on addresses not assigned yet")

    # Addresses and routes
    address: Pair = field(
        Pair(),
        option("-a, --address ADDR[/PREFIX]", ADDRESSES,
               "Assign this address to the {guest}\n"
               "default: that of the host's interface",
               actions.address),
    )  # fmt: skip
    prefix_len: Pair = Pair(0, 0)
    netmask: int = field(
        0,
        option("-n, --netmask MASK", ADDRESSES,
               "Assign this IPv4 netmask, dotted or in bits\n"
               "default: that of the host's interface",
               actions.parsed(values.netmask)),
    )  # fmt: skip
    gateway: Pair = field(
        Pair(),
        option("-g, --gateway ADDR", ADDRESSES,
               "Use this default gateway\n"
               "default: that of the host",
               actions.per_family(values.gateway)),
    )  # fmt: skip
    interface: str | None = value(
        "-i, --interface NAME", ADDRESSES,
        "Copy addresses and routes of this host interface\n"
        "default: the one with the default route",
        values.interface, default=None,
    )  # fmt: skip
    mtu: int = value(
        "-m, --mtu MTU", ADDRESSES,
        f"Set the MTU of the link; 0 leaves it unset\n"
        f"default: {MTU_DEFAULT}",
        values.mtu, default=MTU_DEFAULT,
    )  # fmt: skip
    follow: str = value(
        "--follow MODE", ADDRESSES,
        "Follow changes of the host's network: 'off', 'routes', or 'all'\n"
        "'routes' leaves addresses alone; default: 'all'",
        values.follow, default=ALL,
    )  # fmt: skip
    follow_link: bool = flag("--follow-link", ADDRESSES, "Take the link down and up when addresses change",
                             only=Only(PASTA, "let QEMU do it: set_link NAME off, set_link NAME on"))  # fmt: skip
    use: Pair = field(
        Pair(True, True),
        option("-4, --ipv4-only", ADDRESSES, "Use IPv4 only", actions.setting(Pair(True, False))),
        option("-6, --ipv6-only", ADDRESSES, "Use IPv6 only", actions.setting(Pair(False, True))),
    )
    map_host_loopback: Pair = field(  # False: mapped to nothing
        Pair(),
        option("--map-host-loopback ADDR", ADDRESSES,
               "Map ADDR to the host's loopback address\n"
               "'none': map nothing; default: the gateway's address",
               actions.mapping),
    )  # fmt: skip
    map_gw: bool = flag(
        "--no-map-gw", ADDRESSES,
        "Don't map the gateway's address to the host's loopback",
        to=False,
    )  # fmt: skip
    map_guest_addr: Pair = field(  # False: mapped to nothing
        Pair(),
        option("--map-guest-addr ADDR", ADDRESSES,
               "Map ADDR to the host's own address\n"
               "default: 'none'",
               actions.mapping),
    )  # fmt: skip
    outbound: Pair = field(
        Pair(),
        option("-o, --outbound ADDR", ADDRESSES,
               "Send from this address of the host",
               actions.per_family(values.outbound)),
    )  # fmt: skip
    outbound_if: Pair = field(
        Pair(),
        option("--outbound-if4 NAME", ADDRESSES,
               "Send IPv4 through this interface of the host only",
               actions.outbound_if(v6=False)),
        option("--outbound-if6 NAME", ADDRESSES,
               "Send IPv6 through this interface of the host only",
               actions.outbound_if(v6=True)),
    )  # fmt: skip
    our_mac: bytes = value(
        "-M, --mac-addr ADDR", ADDRESSES,
        "Use this MAC address at our end of the link\n"
        "default: 9a:55:9a:55:9a:55",
        values.guest_mac, default=OUR_MAC,
    )  # fmt: skip

    # DNS and names
    dns: tuple[bytes, ...] = field(
        (),
        option("-D, --dns ADDR", NAMES,
               "Tell the {guest} this resolver; the first 3 per family count\n"
               "'none': none; default: those in /etc/resolv.conf",
               actions.dns),
    )  # fmt: skip
    dns_none: bool = False
    search: tuple[str, ...] = field(
        (),
        option("-S, --search DOMAIN", NAMES,
               "Tell the {guest} this search domain, up to 6\n"
               "'none': none; default: those in /etc/resolv.conf",
               actions.search),
    )  # fmt: skip
    search_none: bool = False
    dns_forward: tuple[bytes, ...] = field(
        (),
        option("--dns-forward ADDR", NAMES,
               "Forward queries sent to ADDR to the host's resolvers\n"
               "can be repeated",
               actions.adding(values.dns_forward)),
    )  # fmt: skip
    dns_host: tuple[bytes, ...] = field(
        (),
        option("--dns-host ADDR", NAMES,
               "Forward queries to this resolver, up to 3 per family\n"
               "default: those in /etc/resolv.conf",
               actions.dns_host),
    )  # fmt: skip
    dns_zones: tuple[tuple[bytes, str], ...] = ()  # interfaces of link-local ones
    dhcp_dns: bool = field(
        False,
        option("--dhcp-dns", NAMES,
               "Tell resolvers by DHCP, DHCPv6 and NDP",
               actions.setting(True), only=Only(PASTA, "passt tells them unless --no-dhcp-dns is given")),
        option("--no-dhcp-dns", NAMES,
               "Don't tell resolvers by DHCP, DHCPv6 and NDP",
               actions.setting(False), only=Only(PASST, "pasta tells none unless --dhcp-dns is given")),
        passt=True,
    )  # fmt: skip
    dhcp_search: bool = field(
        False,
        option("--dhcp-search", NAMES,
               "Tell search domains by DHCP, DHCPv6 and NDP",
               actions.setting(True), only=Only(PASTA, "passt tells them unless --no-dhcp-search is given")),
        option("--no-dhcp-search", NAMES,
               "Don't tell search domains by DHCP, DHCPv6 and NDP",
               actions.setting(False), only=Only(PASST, "pasta tells none unless --dhcp-search is given")),
        passt=True,
    )  # fmt: skip
    hostname: str = value(
        "-H, --hostname HOST", NAMES,
        "Tell the {guest} its host name, by DHCP",
        values.hostname, default="",
    )  # fmt: skip
    fqdn: str = value(
        "--fqdn FQDN", NAMES,
        "Tell the {guest} its full name, by DHCP and DHCPv6",
        values.fqdn, default="",
    )  # fmt: skip

    # How it runs
    foreground: bool = flag("-f, --foreground", RUNNING, "Stay in the foreground")
    pid_file: str | None = file("-P, --pid FILE", RUNNING, "Write the process ID to FILE once ready", default=None)
    conf_path: str | None = value(
        "-c, --conf-path PATH", RUNNING,
        "Listen on UNIX domain socket PATH for pesto(1)\n"
        "which shows and changes the forwarded ports",
        values.socket_path, default=None,
    )  # fmt: skip
    api_socket: str | None = value(
        "--api-socket PATH", RUNNING,
        "Listen on UNIX domain socket PATH for requests in the API of slirp4netns(1)",
        values.socket_path, default=None,
    )  # fmt: skip
    busy_poll: int = value(
        "--busy-poll USEC", RUNNING,
        "While packets are expected at once, poll for USEC microseconds before sleeping\n"
        "default: 100; 0: always sleep",
        values.busy_poll, default=100,
    )  # fmt: skip
    fd: int | None = field(
        None,
        option("-F, --fd FD", RUNNING,
               "Serve the guest at open descriptor FD, {link}\n"
               "and end with it",
               actions.fd),
    )  # fmt: skip
    given_fd: int | None = None  # its number on the command line, if it was that of a standard stream (`cli.py`)
    ready_fd: int | None = value(
        "--ready-fd FD", RUNNING,
        "Write a line to open descriptor FD when everything is ready, and close it",
        values.ready_fd, default=None,
    )  # fmt: skip
    runas: str | None = value(
        "--runas UID[:GID]|LOGIN[:GROUP]", RUNNING,
        "Run as this user and group\n"
        "default: the current user; user nobody for root",
        values.runas, default=None,
    )  # fmt: skip

    # Namespace
    netns: str | None = file(
        "--netns PATH|NAME", NAMESPACE,
        "Join this network namespace; for NAME see ip-netns(8)",
        default=None, only=_PASTA,
    )  # fmt: skip
    userns: str | None = field(
        None,
        option("--userns PATH", NAMESPACE,
               "Join this user namespace\n"
               "default: that of PID",
               actions.userns, only=_PASTA),
    )  # fmt: skip
    netns_only: bool = field(
        False,
        option("--netns-only", NAMESPACE,
               "Don't join or create a user namespace\n"
               "implied by --netns without --userns",
               actions.netns_only, only=_PASTA),
    )  # fmt: skip
    nsrun_dir: str = file(
        "--nsrun-dir PATH", NAMESPACE,
        f"Look up NAME of --netns in this directory\n"
        f"default: {NETNS_RUN_DIR}",
        default=NETNS_RUN_DIR, only=_PASTA,
    )  # fmt: skip
    netns_quit: bool = flag(
        "--no-netns-quit", NAMESPACE,
        "Don't end when the network namespace goes away",
        to=False, only=_PASTA,
    )  # fmt: skip
    ns_ifname: str | None = value(
        "-I, --ns-ifname NAME", NAMESPACE,
        "Set the name of the interface in the namespace\n"
        "default: that of the host's interface",
        values.new_interface, default=None,
        only=Only(PASTA, "a virtual machine names its interface itself", inert=True),
    )  # fmt: skip
    ns_mac: bytes | None = value(
        "--ns-mac-addr ADDR", NAMESPACE,
        "Set the MAC address of the interface in the namespace\n"
        "default: a random one",
        values.guest_mac, default=None,
        only=Only(PASTA, "give QEMU the address, as in -device virtio-net-pci,mac=ADDR"),
    )  # fmt: skip

    # Virtual machine
    socket_path: str | None = field(  # None: the first default path that is free
        None,
        option("-s, --socket PATH", MACHINE,
               "Listen for the guest on UNIX domain socket PATH\n"
               "default: /tmp/passt_1.socket, or the next free one",
               actions.socket, only=Only(PASST, "pasta takes a PID, --netns or a command", inert=True)),
        option("--socket-path PATH", MACHINE,
               "The same as --socket",
               actions.socket, only=Only(PASST, "pasta takes a PID, --netns or a command", inert=True)),
    )  # fmt: skip
    vhost_user: bool = flag(
        "--vhost-user", MACHINE,
        "Be a vhost-user back end at that socket: the guest shares its memory",
        only=_PASST,
    )  # fmt: skip
    repair_path: str | None = value(
        "--repair-path PATH", MACHINE,
        "Listen on UNIX domain socket PATH for passt-repair(1)\n"
        "'none': nowhere; default: the path of --socket with .repair behind it",
        values.socket_path, default=None, only=_PASST,
    )  # fmt: skip
    one_off: bool = flag(
        "-1, --one-off", MACHINE,
        "End when the guest disconnects",
        only=Only(PASST, "pasta always ends with its command or namespace"),
    )  # fmt: skip

    # Protocols and services
    no_tcp: bool = flag("--no-tcp", SERVICES, "Turn off TCP")
    no_udp: bool = flag("--no-udp", SERVICES, "Turn off UDP")
    no_multicast: bool = flag("--no-multicast", SERVICES, "Turn off multicast: UDP to and from groups")
    no_icmp: bool = flag("--no-icmp", SERVICES, "Turn off ICMP and ICMPv6 echo (ping)")
    no_dhcp: bool = flag("--no-dhcp", SERVICES, "Turn off the DHCP server")
    no_dhcpv6: bool = flag("--no-dhcpv6", SERVICES, "Turn off the DHCPv6 server")
    no_ndp: bool = flag("--no-ndp", SERVICES, "Turn off NDP")
    no_ra: bool = flag("--no-ra", SERVICES, "Turn off router advertisements")

    # Messages and debugging
    level: int = field(
        log.INFO,
        option("-q, --quiet", MESSAGES, "Print warnings and errors only", actions.setting(log.WARNING)),
        option("-d, --debug", MESSAGES, "Print more, to standard error only", actions.debug),
        option("--trace", MESSAGES, "Print a line for each packet, too; implies --debug", actions.setting(log.TRACE)),
    )
    log_file: str | None = file("-l, --log-file PATH", MESSAGES, "Log to file PATH, not to syslog", default=None)
    log_size: int = value(
        "--log-size BYTES", MESSAGES,
        f"Limit the size of the log file\n"
        f"default: {LOG_SIZE}",
        values.log_size, default=LOG_SIZE,
    )  # fmt: skip
    log_json: bool = value(
        "--log-format FORMAT", MESSAGES,
        "Write messages to standard error and the log file as 'text' or 'json'\n"
        "default: 'text'",
        values.log_format, default=False,
    )  # fmt: skip
    pcap: str | None = file("-p, --pcap FILE", MESSAGES, "Save all packets to FILE, for tcpdump(8)", default=None)
    stats: float = field(  # seconds between tables of statistics, 0: none
        0.0,
        option("--stats SECONDS[,json]", MESSAGES,
               "Log counters every SECONDS, as a table or JSON\n"
               "signal USR1 logs them once",
               actions.stats),
    )  # fmt: skip
    stats_json: bool = False

    # Less used options
    doctor: bool = flag("--doctor", RARE, "Check this machine, print what is missing and how to mend it, and exit")
    print_seccomp: bool = flag("--print-seccomp", RARE, "Print which system calls are allowed, and exit")
    chroot_fallback: bool = flag(
        "--chroot-fallback", RARE,
        "Use chroot(2) where the root file system forbids pivot_root(2), as an initramfs does",
    )  # fmt: skip
    migrate_exit: bool = flag(
        "--migrate-exit", RARE,
        "End when a guest that has migrated to another host disconnects (deprecated)",
        only=_PASST, deprecated=True,
    )  # fmt: skip
    migrate_no_linger: bool = flag(
        "--migrate-no-linger", RARE,
        "Close TCP sockets as soon as their state is with another host (deprecated)",
        only=_PASST, deprecated=True,
    )  # fmt: skip
    copy_routes: bool = flag(
        "--no-copy-routes", RARE,
        "With --config-net: only a default route (deprecated)",
        to=False, only=_PASTA, deprecated=True,
    )  # fmt: skip
    copy_addrs: bool = flag(
        "--no-copy-addrs", RARE,
        "With --config-net: only one address (deprecated)",
        to=False, only=_PASTA, deprecated=True,
    )  # fmt: skip

    @property
    def fd_name(self) -> int | None:
        """The number of `fd` for messages."""
        return self.fd if self.given_fd is None else self.given_fd

    @property
    def no_namespace(self) -> bool:
        """Whether pasta serves a tap device of an unknown namespace, which it cannot enter."""
        return self.mode == PASTA and self.fd is not None and self.pid is None and self.netns is None
