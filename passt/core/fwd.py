"""Address translation: which host endpoint does a guest's destination stand for? Policy only, no sockets.

Guest to host, first match (the source is the kernel's choice, or the configured outbound address):

    1. port 53 or 853 of the DNS address (TCP and UDP)   -> the host's resolver
    2. the address that maps the host's loopback         -> 127.0.0.1 or ::1
    3. the address that maps the host itself             -> the host's own address, the one the guest has too
    4. anything else                                     -> itself

Answers come back to the guest from the address that it wrote to: a flow keeps its original destination.
"""

from __future__ import annotations

from .. import addr
from .config import Config, Ip4, Ip6

DNS_PORTS = frozenset((53, 853))
NO_SCOPE = 0

SockAddr = tuple[str, int] | tuple[str, int, int, int]


class Forwarding:
    """The translation rules of one configuration."""

    __slots__ = ("_config",)

    def __init__(self, config: Config) -> None:
        self._config = config

    def family(self, a: bytes) -> Ip4 | Ip6 | None:
        """Settings of the address's family; None when it is off."""
        return self._config.ip4 if len(a) == 4 else self._config.ip6

    def outbound(self, dst: bytes, port: int, *, dns: bool = True) -> bytes:
        """The host-side address for a guest's destination; `dns` is false for protocols without ports."""
        ip = self.family(dst)
        if ip is None:
            return dst
        if dns and port in DNS_PORTS and dst == ip.dns_match and ip.dns_host is not None:
            return ip.dns_host
        if dst == ip.map_host_loopback:
            return addr.LOOPBACK4 if len(dst) == 4 else addr.LOOPBACK6
        if dst == ip.map_guest_addr and ip.addr is not None:
            return ip.addr
        return dst

    def source(self, target: bytes) -> tuple[bytes | None, str | None]:
        """Address and interface that a socket to the host-side address `target` is bound to; None: the kernel's choice.

        The host's loopback is reached from no other interface, so there the configured ones do not apply.
        """
        ip = self.family(target)
        if ip is None or addr.is_loopback(target):
            return None, None
        return ip.addr_out, ip.if_out

    def sockaddr(self, a: bytes, port: int) -> SockAddr:
        """For connect() and bind(): what has the scope of a link (RFC 4007, 4) goes through the template interface."""
        if len(a) == 4:
            return addr.text(a), port
        link_scope = addr.is_link_local(a) or (a[0] == 0xFF and a[1] & 0xF in (1, 2))
        return addr.text(a), port, 0, self._config.scope_id if link_scope else NO_SCOPE
