"""The outbound address and interface (-o, --outbound-if4/6), tried before the start.

All sockets towards other hosts are bound to them: TCP, UDP and ping of the guest, queries to resolvers, and connections
and datagrams that `-T` and `-U` lead to such a target. The host's loopback is reached from no other address
(`policy.forwarding`). An address that is on no interface, or an interface that sockets may not be bound to, is refused
at start. If it vanishes later, what would have been sent from it fails with the error of the host's kernel.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

from .. import addr
from ..log import Fatal
from ..policy.config import Config


def check(config: Config, new_socket: Callable[[int, int], Any] = socket.socket) -> None:
    """Raise Fatal if the host does not let sockets be bound so."""
    for v6, ip in ((False, config.ip4), (True, config.ip6)):
        if ip is None or (ip.addr_out is None and ip.if_out is None):
            continue
        with new_socket(socket.AF_INET6 if v6 else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            if ip.if_out is not None:
                _bind_to_interface(sock, ip.if_out, f"--outbound-if{6 if v6 else 4}")
            if ip.addr_out is not None:
                _bind_to_address(sock, ip.addr_out, config.scope_id)


def _bind_to_interface(sock: Any, name: str, option: str) -> None:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, name.encode() + b"\0")
    except OSError as e:
        advice = "it needs CAP_NET_RAW before Linux 5.7" if isinstance(e, PermissionError) else "see ip link"
        raise Fatal(f"Couldn't bind sockets to interface {name}: {e.strerror} ({option}; {advice})") from None


def _bind_to_address(sock: Any, address: bytes, scope_id: int) -> None:
    text = addr.text(address)
    scope = (0, scope_id if addr.is_link_local(address) else 0) if len(address) == 16 else ()
    try:
        sock.bind((text, 0, *scope))
    except OSError as e:
        advice = "it must be an address of this host: see ip address"
        raise Fatal(f"Couldn't bind sockets to outbound address {text}: {e.strerror} (--outbound; {advice})") from None
