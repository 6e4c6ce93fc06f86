"""Address translation between guest and host: policy only, no sockets.

Guest to host (`outbound`), first match; the source is the kernel's choice, or the configured outbound address:

    1. port 53 or 853 of a forwarded address (TCP, UDP)  -> one of the host's resolvers (`resolvers.py` decides)
    2. the address that maps the host's loopback         -> 127.0.0.1 or ::1
    3. the address that maps the host itself             -> the host's own address: the guest's, unless it has another
                                                            (--follow routes)
    4. anything else                                     -> itself

Answers come back to the guest from the address that it sent to: a flow keeps its original destination.

Host to guest through the tap: the source that the guest sees (`inbound_source`), first match:

    1. 127.0.0.1, ::1                                    -> the address that maps the host's loopback, if there is one
    2. the address that the guest has too                -> the address that maps the host itself, if there is one
    3. other loopback, unspecified, an address of the    -> our own address on the link
       guest
    4. anything else                                     -> itself

The destination is the last known address of the guest (`inbound_target`), or the one that the rule names.

Loopback to loopback, without the tap (`splice_targets`): the namespace's address, or its loopback if so configured; the
host's loopback; or the address that the rule names. The client's family is tried first, then the other one.
"""

from __future__ import annotations

from .. import addr
from .config import PASTA, Config, Ip4, Ip6
from .guest import Guest
from .resolvers import DNS_PORTS
from .rules import Rule
from .settings import Settings

NO_SCOPE = 0
WAYS_MAX = 256  # addresses; all are forgotten then, and worked out again

SockAddr = tuple[str, int] | tuple[str, int, int, int]


class Way:
    """How sockets reach an address on the host's side: all that its flows would work out again, one by one."""

    __slots__ = ("_v4", "dns_scope", "interface", "own", "scope", "source", "text")

    def __init__(
        self, text: str, scope: int, dns_scope: int, source: bytes | None, interface: str | None, *, own: bool
    ) -> None:
        self.text = text  # of the address
        self.scope = scope  # index of the interface, for an address of link scope (RFC 4007, 4)
        self.dns_scope = dns_scope  # likewise, on a port of DNS: a resolver may be on another link
        self.source = source  # address that sockets are bound to, None: the kernel's choice
        self.interface = interface  # likewise
        self.own = own  # the address is one of the host itself
        self._v4 = ":" not in text

    def sockaddr(self, port: int) -> SockAddr:
        """For connect() and bind()."""
        if self._v4:
            return self.text, port
        return self.text, port, 0, self.dns_scope if port in DNS_PORTS else self.scope


class Forwarding:
    """The translation rules of the configuration in force."""

    __slots__ = ("_config", "_resolver_scopes", "_ways")

    def __init__(self, settings: Settings) -> None:
        settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._config = config
        self._resolver_scopes = dict(config.dns_scopes)
        self._ways: dict[bytes, Way] = {}

    def way(self, target: bytes) -> Way:
        """How sockets reach the host-side address `target`."""
        way = self._ways.get(target)
        if way is None:
            if len(self._ways) >= WAYS_MAX:
                self._ways.clear()
            way = self._ways[target] = self._find_way(target)
        return way

    def _find_way(self, target: bytes) -> Way:
        ip, scope = self.family(target), self.scope(target)
        own = addr.is_loopback(target) or (ip is not None and target in (ip.addr, ip.host_addr))
        dns_scope = self._resolver_scopes.get(target, scope)
        return Way(addr.text(target), scope, dns_scope, *self._source(target, ip), own=own)

    def family(self, a: bytes) -> Ip4 | Ip6 | None:
        """Settings of the address's family; None if it is off."""
        return self._config.ip4 if len(a) == 4 else self._config.ip6

    def outbound(self, dst: bytes) -> bytes:
        """The host-side address for a guest's destination, unless `resolvers.py` decides."""
        ip = self._config.ip4 if len(dst) == 4 else self._config.ip6
        if ip is None:
            return dst
        if dst == ip.map_host_loopback:
            return addr.LOOPBACK4 if len(dst) == 4 else addr.LOOPBACK6
        if dst == ip.map_guest_addr and ip.addr is not None:
            return ip.host_addr or ip.addr
        return dst

    def source(self, target: bytes) -> tuple[bytes | None, str | None]:
        """Address and interface that a socket to the host-side address `target` is bound to; None: the kernel's choice.

        The host itself is reached through its loopback interface alone, and its loopback addresses from no others. So
        the configured ones do not apply there.
        """
        way = self.way(target)
        return way.source, way.interface

    @staticmethod
    def _source(target: bytes, ip: Ip4 | Ip6 | None) -> tuple[bytes | None, str | None]:
        if ip is None or addr.is_loopback(target):
            return None, None
        return ip.addr_out, None if target in (ip.addr, ip.host_addr) else ip.if_out

    def sockaddr(self, a: bytes, port: int) -> SockAddr:
        """For connect() and bind(): addresses of link scope (RFC 4007, 4) get the index of the template interface.

        A resolver may be on another link.
        """
        return self.way(a).sockaddr(port)

    def scope(self, a: bytes) -> int:
        """The index of the interface of an address of link scope, 0 for other addresses."""
        link_scope = len(a) == 16 and (addr.is_link_local(a) or (a[0] == 0xFF and a[1] & 0xF in (1, 2)))
        return self._config.scope_id if link_scope else NO_SCOPE

    # Host to guest -----------------------------------------------------------------------------------------------

    def inbound_source(self, peer: bytes, guest: Guest) -> bytes | None:
        """The address that the guest sees for a host-side `peer`; None: there is none that it can answer to."""
        ip = self.family(peer)
        if ip is None:
            return None
        ours = ip.our_addr if isinstance(ip, Ip4) else ip.our_ll
        if addr.is_loopback(peer):
            mapped = ip.map_host_loopback if peer in (addr.LOOPBACK4, addr.LOOPBACK6) else None
            return mapped or ours
        if peer == (ip.host_addr or ip.addr) and ip.map_guest_addr is not None:
            return ip.map_guest_addr
        if addr.is_unspecified(peer) or peer in (ip.addr, guest.addr4, guest.addr6, guest.addr6_ll):
            return ours
        return peer

    def inbound_target(self, source: bytes, rule: Rule, guest: Guest) -> bytes | None:
        """The guest's address for a connection from the translated `source`; None: none is known."""
        if rule.target is not None:
            return rule.target if len(rule.target) == len(source) else None
        own6 = guest.addr6_ll if addr.is_link_local(source) else guest.addr6
        target = guest.addr4 if len(source) == 4 else own6
        return target if any(target) else None

    # Loopback to loopback ----------------------------------------------------------------------------------------

    def spliced(self, peer: bytes, rule: Rule) -> bool:
        """Whether a connection of `peer` to a port of `rule` goes from socket to socket, without the tap."""
        config = self._config
        return rule.outbound or (config.mode == PASTA and not config.no_splice and addr.is_loopback(peer))

    def splice_targets(self, v6: bool, rule: Rule, guest: Guest) -> list[bytes]:
        """Addresses to connect to, in this order, for a client of the family `v6`."""
        if rule.target is not None:
            return [rule.target]
        loopback = rule.outbound or self._config.host_lo_to_ns_lo or self._config.splice_only
        own = (addr.LOOPBACK4, addr.LOOPBACK6) if loopback else (guest.addr4, guest.addr6)
        on = (self._config.ip4, self._config.ip6)
        return [own[i] for i in ((1, 0) if v6 else (0, 1)) if any(own[i]) and (on[i] is not None or rule.outbound)]
