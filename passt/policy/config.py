"""The configuration: the frozen result of the command line and of the host's configuration.

`conf/decide.py` builds it at start. Addresses are packed bytes. A later change is another `Config`; only `settings.py`
holds the one in force, and says how a module reads it.
"""

from __future__ import annotations

from typing import Final

from .. import PASST as PASST
from .. import PASTA as PASTA
from ..lean.records import dataclass
from ..wire import ether
from ..wire.ip import MTU_MAX
from .rules import Rule

MTU_DEFAULT = 65520  # 65535 - 14 (Ethernet header), rounded down to a multiple of 4
MTU_MIN = 68  # RFC 791, 3.2
WINDOW_MAX: Final = 1 << 24  # bytes that a TCP sender in the guest may have in flight
FRAME_MTU_MAX = MTU_MAX - ether.HEADER_LEN  # limit of a tap device, and of a frame on a stream socket
OUR_MAC = bytes.fromhex("9a559a559a55")
OFF, ROUTES, ALL = "off", "routes", "all"  # how far the host's network is followed


@dataclass(frozen=True, slots=True)
class Ip4:
    """IPv4 as the guest sees it. None instead of an `Ip4` means that the family is off."""

    addr: bytes  # assigned to the guest
    prefix_len: int
    gateway: bytes | None  # the guest's default gateway; None: no default route, no DHCP
    our_addr: bytes | None  # source of packets that we originate: the gateway where there is one
    map_host_loopback: bytes | None = None  # this address, seen from the guest, is the host's 127.0.0.1
    map_guest_addr: bytes | None = None  # this address, seen from the guest, is the host's own `addr`
    dns: tuple[bytes, ...] = ()  # resolvers to advertise
    addr_out: bytes | None = None  # source address of outbound sockets
    if_out: str | None = None  # outbound sockets are bound to this interface
    group_index: int = 0  # index of the host's interface that multicast groups are joined on; 0: none
    fixed: bool = False  # host clients reach the guest at `addr`, whatever it sends from
    host_addr: bytes | None = None  # the host's own address, if that is not `addr`


@dataclass(frozen=True, slots=True)
class Ip6:
    """IPv6 as the guest sees it. None instead of an `Ip6` means that the family is off."""

    addr: bytes | None  # global address assigned to the guest, by DHCPv6 and (its /64) by router advertisement
    prefix_len: int
    gateway: bytes | None
    our_ll: bytes  # our link-local address: source of NA, RA, DHCPv6, and of packets of a global gateway
    map_host_loopback: bytes | None = None
    map_guest_addr: bytes | None = None
    dns: tuple[bytes, ...] = ()
    addr_out: bytes | None = None
    if_out: str | None = None
    group_index: int = 0
    fixed: bool = False
    host_addr: bytes | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """The configuration of the data plane and the services.

    A field with the name of a field of `Options` takes its value from the command line.
    """

    mode: str = PASTA
    ip4: Ip4 | None = None
    ip6: Ip6 | None = None
    our_mac: bytes = OUR_MAC
    mtu: int = MTU_DEFAULT  # 0: none is assigned or advertised
    scope_id: int = 0  # index of the host interface that link-local destinations are reached through
    dns_search: tuple[str, ...] = ()
    dns_match: tuple[bytes, ...] = ()  # queries to these addresses (port 53 or 853) go to `dns_hosts`
    dns_hosts: tuple[bytes, ...] = ()  # the host's resolvers, of either family
    dns_scopes: tuple[tuple[bytes, int], ...] = ()  # link-local resolvers, and the host interface each is reached by
    hostname: str = ""  # host name for the guest; empty: none is sent
    fqdn: str = ""
    advertise_dns: bool = False
    advertise_search: bool = False
    no_tcp: bool = False
    no_udp: bool = False
    no_multicast: bool = False
    no_icmp: bool = False
    no_dhcp: bool = False
    no_dhcpv6: bool = False
    no_ndp: bool = False
    no_ra: bool = False
    config_net: bool = False  # the namespace has its addresses from us
    forwards: tuple[Rule, ...] = ()
    interfaces: tuple[tuple[str, int], ...] = ()  # indices of the host's interfaces, by all of their names
    altnames: tuple[tuple[str, str], ...] = ()  # alternative names of the host's interfaces, with the name of each
    no_splice: bool = False  # connections from the host's loopback go through the tap like all others
    splice_only: bool = False  # there is no tap, only connections between loopbacks
    host_lo_to_ns_lo: bool = False  # these reach the namespace's loopback instead of its own address
    freebind: bool = False  # listen on addresses that the host does not have (yet)
    busy_poll: int = 100  # us that the loop may poll without sleeping
    followed: bool = False  # the host's network is followed: leases are short while it moves

    def ours(self, a: bytes) -> bool:
        """Whether the guest was told to find us, a resolver or the host at `a`, so that it must not take the address.

        All other addresses are free for the guest to choose, although we answer for them on behalf of the network.
        """
        ip = self.ip4 if len(a) == 4 else self.ip6
        if ip is None or a == ip.addr:
            return False
        own = ip.our_addr if isinstance(ip, Ip4) else ip.our_ll
        return a in (ip.gateway, own, ip.map_host_loopback, ip.map_guest_addr, *ip.dns, *self.dns_match)
