"""What the command line asks for: one field per fact, with its default.

While the command line is read it is a dictionary of those fields that were given, which actions change
(`conf_actions.py`); what it says about ports is kept apart until all of it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import log
from .core.config import MTU_DEFAULT, OUR_MAC, PASST, PASTA
from .core.rules import Rule

LOG_SIZE = 1 << 20  # bytes
NETNS_RUN_DIR = "/run/netns"  # where ip-netns(8) keeps its names
# Keys of the dictionary that are no fields of Options
PORT_SPECS = "port_specs"  # specifications of ports, (letter, argument)
DEPRECATED = "deprecated"  # names of options that were given and will be dropped

Fields = dict[str, Any]


class Done(Exception):
    """--help, --version, --completion: print the text on standard output, exit status 0."""


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
    print_seccomp: bool = False
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
    dns_forward: tuple[bytes, ...] = ()
    dns_host: tuple[bytes, ...] = ()
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
    nsrun_dir: str = NETNS_RUN_DIR
    netns_only: bool = False
    netns_quit: bool = True
    pid: int | None = None
    command: tuple[str, ...] = ()

    @property
    def no_namespace(self) -> bool:
        """Whether pasta serves a tap device without knowing where it is: there is no other side to enter."""
        return self.mode == PASTA and self.fd is not None and self.pid is None and self.netns is None


DEFAULTS: dict[str, Fields] = {PASTA: {}, PASST: {"dhcp_dns": True, "dhcp_search": True}}  # unlike those of Options
