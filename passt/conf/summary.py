"""Summary of the configuration, logged at start.

    Template interface     the host interface that each family is modelled on, and the reason
    Addresses              translation of addresses inside to addresses outside
    DHCP, NDP/DHCPv6, DNS  settings that the guest is given; programs parse the lines below DHCP
    Port forwarding        forwarded ports and their targets, in both directions

For a virtual machine, instructions to connect it follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from .. import addr
from ..policy.config import PASTA, Config, Ip4, Ip6
from ..policy.rules import PORT_MAX, Rule
from ..wire.checksum import PROTO_TCP, PROTO_UDP
from .table import GUEST

if TYPE_CHECKING:
    from .decide import Decision

_LISTED_MAX = 8  # ranges in a line
_LOOPBACK = {False: "127.0.0.1", True: "::1"}


def describe_socket(path: str) -> str:
    """The first line: the path that a virtual machine connects to. Clients parse it."""
    return f"UNIX domain socket bound at {path}"


def describe_client(path: str, *, vhost_user: bool = False) -> Iterator[str]:
    """The last lines: how to connect a virtual machine."""
    yield ""
    if vhost_user:
        yield "You can now start qemu (>= 8.0), with the same SIZE twice:"
        yield "    kvm ... -m SIZE -object memory-backend-memfd,id=m,size=SIZE,share=on -machine memory-backend=m"
        yield f"        -chardev socket,id=s,path={path} -netdev vhost-user,id=n,chardev=s"
        yield "        -device virtio-net-pci,netdev=n"
        return
    yield "You can now start qemu (>= 7.2):"
    netdev = f"stream,id=s,server=off,addr.type=unix,addr.path={path}"
    yield f"    kvm ... -device virtio-net-pci,netdev=s -netdev {netdev}"


def describe(decision: Decision) -> Iterator[str]:
    """The lines that describe the configuration."""
    c = decision.config
    if not c.splice_only:
        yield from _describe_interfaces(decision)
        yield from _describe_addresses(c)
        yield "MAC:"
        yield f"    host: {addr.mac_text(c.our_mac)}"
        if c.ip4:
            yield from _describe_dhcp(c, c.ip4)
        if c.ip6:
            yield from _describe_ndp(c, c.ip6)
        yield from _describe_dns(c)
    yield from describe_ports(c.forwards, GUEST[c.mode])


# Interfaces --------------------------------------------------------------------------------------------------------


def _describe_interfaces(decision: Decision) -> Iterator[str]:
    ip4, ip6 = decision.config.ip4, decision.config.ip6
    links = ((decision.template4, "IPv4", decision.why4), (decision.template6, "IPv6", decision.why6))
    names = [f"{link.name} ({family})" for link, family, _ in links if link]
    if names:
        yield f"Template interface: {', '.join(names)}"
        yield from (f"    {family}: {why}" for link, family, why in links if link)
    out = [f"{ip.if_out} ({family})" for ip, family in ((ip4, "IPv4"), (ip6, "IPv6")) if ip and ip.if_out]
    if out:
        yield f"Outbound interface: {', '.join(out)}"
    out = [addr.text(ip.addr_out) for ip in (ip4, ip6) if ip and ip.addr_out]
    if out:
        yield f"Outbound address: {', '.join(out)}"
    if decision.plan:
        yield f"Namespace interface: {decision.plan.ifname}"


# Addresses ---------------------------------------------------------------------------------------------------------


def _describe_addresses(c: Config) -> Iterator[str]:
    guest = GUEST[c.mode]
    yield f"Addresses in the {guest}:"
    for ip in (c.ip4, c.ip6):
        if ip is not None:
            yield from _describe_family(c, ip, guest)


def _describe_family(c: Config, ip: Ip4 | Ip6, guest: str) -> Iterator[str]:
    v6 = isinstance(ip, Ip6)
    if ip.addr:
        yield f"    {addr.text(ip.addr)}: the {guest} itself"
    if ip.map_guest_addr and ip.addr:
        yield f"    {addr.text(ip.map_guest_addr)}: {addr.text(ip.addr)} of the host"
    forwarded = [a for a in c.dns_match if (len(a) == 16) == v6]
    if forwarded:
        hosts = ", ".join(map(addr.text, c.dns_hosts)) or "no resolver, as none is known"
        yield f"    {', '.join(map(addr.text, forwarded))}, for queries (ports 53, 853): {hosts}"
    if ip.map_host_loopback:
        yield f"    {addr.text(ip.map_host_loopback)}: {_LOOPBACK[v6]} of the host"
    else:
        yield f"    none: {_LOOPBACK[v6]} of the host (--map-host-loopback gives it one)"


# Services ----------------------------------------------------------------------------------------------------------


def _describe_dhcp(c: Config, ip: Ip4) -> Iterator[str]:
    if not c.no_dhcp and ip.gateway:
        yield "DHCP:"
        yield f"    assign: {addr.text(ip.addr)}"
        yield f"    mask: {addr.text(addr.netmask(ip.prefix_len))}"
        yield f"    router: {addr.text(ip.gateway)}"


def _describe_ndp(c: Config, ip: Ip6) -> Iterator[str]:
    services = [name for name, off in (("NDP", c.no_ndp), ("DHCPv6", c.no_dhcpv6)) if not off]
    if services:
        yield f"{'/'.join(services)}:"
        if ip.addr:
            yield f"    assign: {addr.text(ip.addr)}"
        if ip.gateway:
            yield f"    router: {addr.text(ip.gateway)}"
        yield f"    our link-local: {addr.text(ip.our_ll)}"


def _describe_dns(c: Config) -> Iterator[str]:
    servers = [server for ip in (c.ip4, c.ip6) if ip for server in ip.dns]
    if servers:
        yield "DNS:" if c.advertise_dns else "DNS (not told by DHCP and NDP: --dhcp-dns):"
        yield from (f"    {addr.text(server)}" for server in servers)
    if c.dns_search:
        yield "DNS search list:" if c.advertise_search else "DNS search list (not told: --dhcp-search):"
        yield from (f"    {name}" for name in c.dns_search)


# Ports -------------------------------------------------------------------------------------------------------------


def describe_ports(rules: Sequence[Rule], guest: str = GUEST[PASTA]) -> Iterator[str]:
    """One line per protocol and direction: forwarded ports and their targets. `guest` names the end of the link."""
    lines = []
    for outbound, direction in ((False, f"host to {guest}"), (True, f"{guest} to host")):
        for proto, name in ((PROTO_TCP, "TCP"), (PROTO_UDP, "UDP")):
            some = [rule for rule in rules if (rule.proto, rule.outbound) == (proto, outbound)]
            if some:
                texts = [_describe_rule(rule) for rule in some[:_LISTED_MAX]]
                more = f", and {len(some) - len(texts)} more" if len(some) > len(texts) else ""
                bound = f" (those bound {'on the host' if outbound else f'in the {guest}'})"
                auto = bound if any(rule.auto for rule in some) else ""
                lines.append(f"    {direction}, {name}: {', '.join(texts)}{more}{auto}")
    yield "Port forwarding:" if lines else "Port forwarding: none"
    yield from lines


def _describe_rule(rule: Rule) -> str:
    """'127.0.0.1%eth0/80-82 -> 192.0.2.20 8080-8082'"""
    bind = f"{'*' if rule.addr is None else addr.text(rule.addr)}" if rule.addr or rule.ifname else ""
    bind += f"%{rule.ifname}" if rule.ifname else ""
    ports = _span(rule.first, rule.last)
    if rule.auto:
        ports = "auto" if (rule.first, rule.last) == (1, PORT_MAX) else f"auto {ports}"
    text = f"{bind}/{ports}" if bind else ports
    to = [] if rule.target is None else [addr.text(rule.target)]
    if rule.to != rule.first:
        to.append(_span(rule.to, rule.target_port(rule.last)))
    return f"{text} -> {' '.join(to)}" if to else text


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"
