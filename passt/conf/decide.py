"""Options and the host's configuration -> the guest's configuration (Config) and the namespace's set-up (NsPlan).

Pure: the host's tables and the text of /etc/resolv.conf are input values; decisions and remarks are the output.
The state of the host never prevents the start. Each address family is decided separately:

    host has                                guest gets
    --------------------------------------  -----------------------------------------------------------------------
    an interface with an address            that address, the interface's routes, its gateway if there is one. Which of
                                            several addresses: `linux/routes.py`
    a default route without a gateway:      its address, and the gateway of local mode: DHCP needs one (IPv4), and
      a tunnel, a point-to-point link         router advertisements come from one
    a tunnel that --outbound-if names       likewise. The main table need not have a default route: sockets are bound
                                              to the tunnel (wg-quick(8))
    an address but no default route         the address; no gateway, hence no DHCP (IPv4) and no mapping of the host
    nothing usable                          local mode: 169.254.2.1/16 and 169.254.2.2; fe80::1 as IPv6 gateway
    a kernel without the family             the family is off

The plan is for pasta only: a virtual machine configures itself from DHCP, DHCPv6 and router advertisements.

The options -a, -g, -n, -I replace the values found on the host, in local mode too. An interface that the user named
(-i, --outbound-if4/6) and that has no address in any enabled family is an error.
"""

from __future__ import annotations

from .. import addr, log
from ..lean.records import dataclass, replace
from ..linux import routes
from ..linux.routes import Address, Host, Link, NsPlan, Route
from ..log import Fatal
from ..policy.config import FRAME_MTU_MAX, OFF, PASTA, WINDOW_MAX, Config, Ip4, Ip6
from ..policy.rules import with_names
from . import forwards, names
from .options import Options
from .resolv_conf import ResolvConf

LOCAL_ADDR4 = bytes((169, 254, 2, 1))
LOCAL_GATEWAY4 = bytes((169, 254, 2, 2))
LOCAL_PREFIX4 = 16
LOCAL_LL6 = addr.packed("fe80::1")
LOCAL_IFNAME = "tap0"
PREFIX6 = 64
MTU_MIN6 = 1280  # RFC 8200, 5

HEADERS = 52  # IPv4, TCP, timestamps
SEGMENT = 1500 - HEADERS
TXQLEN_MAX = 16384


class Remarks:
    """Log messages about decisions. They are logged after a successful start, so that an error is the only message."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    def info(self, text: str) -> None:
        self.lines.append((log.INFO, text))

    def warn(self, text: str) -> None:
        self.lines.append((log.WARNING, text))

    def say(self) -> None:
        """Log them."""
        for level, text in self.lines:
            log.say(level, text)


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome: for the data plane, for the namespace, and for the print-out."""

    config: Config
    plan: NsPlan | None  # None with a virtual machine
    template4: Link | None
    template6: Link | None
    why4: str  # reason for the choice of `template4`; empty without the family
    why6: str
    remarks: Remarks


def decide(
    options: Options, host: Host, resolv_conf: ResolvConf, *, have_v6: bool = True, former: Config | None = None
) -> Decision:
    """The configuration that follows from the command line and the host. Where the guest has a gateway of ours, it is
    that of `former`, if there is one. Raises Fatal.
    """
    remarks = Remarks()
    mtu = min(options.mtu, FRAME_MTU_MAX)
    if mtu != options.mtu:
        carrier = "A tap device" if options.mode == PASTA else "A frame on the socket"
        remarks.warn(f"{carrier} takes at most {mtu} bytes: using MTU {mtu}, not {options.mtu}")
    template4, why4 = _template(options, host, v6=False) if options.use.v4 else (None, "")
    template6, why6 = _template(options, host, v6=True) if options.use.v6 and have_v6 else (None, "")
    _check_named(options, host, template4, template6)
    ours4, ours6 = _our_gateways(former)
    ip4 = _ip4(options, host, template4, ours4) if options.use.v4 else None
    ip6 = _ip6(options, host, template6, ours6) if _want_v6(options, mtu, have_v6, remarks) else None
    _remark_local(options, template4, why4, remarks, v6=False)
    if ip6:
        _remark_local(options, template6, why6, remarks, v6=True)
    for template, v6 in ((template4, False), (template6, True)):
        _remark_deprecated(options, host, template, remarks, v6=v6)
    if ip4 is None and ip6 is None:
        raise Fatal("No address family left: IPv6 is not possible and IPv4 was not asked for (leave out -6)")
    forwards.check_families(options.forwards, ip4 is not None, ip6 is not None)
    used4, used6 = template4 if ip4 else None, template6 if ip6 else None
    config = _config(options, host, mtu, ip4, ip6, template6 or template4)
    config = names.apply(options, config, resolv_conf)
    plan = _plan(options, host, used4, used6, config, remarks) if options.mode == PASTA else None
    names.remark(options, config, resolv_conf, remarks.warn, remarks.info)
    _remark_off(options, config, remarks)
    return Decision(config, plan, used4, used6, why4, why6, remarks)


def queue_length(mtu: int) -> int:
    """Length of the tap's queue, in packets, that holds a full TCP window (at MTU 1500 or less) without drops."""
    payload = min(mtu - HEADERS, SEGMENT) if mtu else SEGMENT
    return min(WINDOW_MAX // payload + 1, TXQLEN_MAX)


def _config(options: Options, host: Host, mtu: int, ip4: Ip4 | None, ip6: Ip6 | None, scope: Link | None) -> Config:
    """A field of Config with the name of a field of Options takes its value, unless it is set here."""
    same = {name: getattr(options, name) for name in Config.__match_args__ if name in Options.FIELDS}
    return replace(
        Config(**same),
        ip4=ip4,
        ip6=ip6,
        mtu=mtu,
        scope_id=scope.index if scope else 0,
        forwards=with_names(options.forwards, host.altnames),
        altnames=tuple(host.altnames.items()),
        interfaces=tuple(host.indices.items()),
        advertise_dns=options.dhcp_dns,
        advertise_search=options.dhcp_search,
        no_dhcp=options.no_dhcp or ip4 is None or ip4.gateway is None,
        no_dhcpv6=options.no_dhcpv6 or ip6 is None or ip6.addr is None,
        no_ndp=options.no_ndp or ip6 is None,
        no_ra=options.no_ra or ip6 is None,
        no_splice=options.no_splice or options.no_namespace,
        followed=options.follow != OFF and not options.splice_only,
    )


# Template interface ------------------------------------------------------------------------------------------------


def _template(options: Options, host: Host, v6: bool) -> tuple[Link | None, str]:
    """The template interface of a family, None if no interface has a usable address; and the reason."""
    outbound = options.outbound_if.get(v6)
    if options.interface is not None:
        link = host.named(options.interface)
        if link is None:
            raise Fatal(f"Invalid interface name {options.interface}: No such device")
        why = "given by --interface"
    elif outbound and (named := host.named(outbound)):
        link, why = named, f"given by --outbound-if{6 if v6 else 4}"
    else:
        index, why = routes.pick_interface(host, v6)
        link = host.link(index)
    if link and routes.pick_address(host, link.index, v6) is None and options.address.get(v6) is None:
        return None, f"{link.name} has no usable address"
    return link, why


def _check_named(options: Options, host: Host, template4: Link | None, template6: Link | None) -> None:
    """An interface that the user named must be usable. Raises Fatal."""
    if options.interface is not None and template4 is None and template6 is None:
        raise Fatal(f"Interface {options.interface} is not usable: no address in the families wanted (see -i, -a)")
    for v6, template in ((False, template4), (True, template6)):
        name = options.outbound_if.get(v6)
        if name and host.named(name) is None:
            raise Fatal(f"External interface not usable: {name}: No such device (--outbound-if{6 if v6 else 4})")
        if name and template is None and options.use.get(v6):
            raise Fatal(f"External interface not usable: {name} has no {'IPv6' if v6 else 'IPv4'} address")


def _plain_name(host: Host, name: str | None) -> str | None:
    """The name of an interface that is given by that, or by an alternative name."""
    return host.altnames.get(name, name) if name else name


def _group_index(options: Options, host: Host, template: Link | None, v6: bool) -> int:
    """The index of the interface that multicast groups are joined on: the outbound one, or the template."""
    link = host.named(options.outbound_if.get(v6) or "") or template
    return link.index if link is not None else 0


def _bound_to_tunnel(options: Options, template: Link, v6: bool) -> bool:
    """Whether outbound sockets are bound to the template, and that has no link-layer addresses."""
    name = options.outbound_if.get(v6)
    return not template.mac and name is not None and name in (template.name, *template.altnames)


def _lacks_gateway(options: Options, host: Host, template: Link, v6: bool) -> bool:
    """Whether packets to anywhere leave through the template although it has no gateway."""
    return _bound_to_tunnel(options, template, v6) or routes.has_default(host, template.index, v6)


def _our_gateways(former: Config | None) -> tuple[bytes, bytes]:
    """The gateways, of IPv4 and IPv6, of a guest whose host has none. The guest keeps the one that it knows."""
    four, six = (former.ip4, former.ip6) if former is not None else (None, None)
    return (four and four.gateway) or LOCAL_GATEWAY4, (six and six.gateway) or LOCAL_LL6


def _want_v6(options: Options, mtu: int, have_v6: bool, remarks: Remarks) -> bool:
    if not options.use.v6:
        return False
    if not have_v6:
        remarks.info("IPv6 is not available on this host: disabled")
        return False
    if 0 < mtu < MTU_MIN6:
        remarks.warn(f"MTU {mtu} is too small for IPv6, which needs {MTU_MIN6}: disabling IPv6")
        return False
    return True


# One family --------------------------------------------------------------------------------------------------------


def _ip4(options: Options, host: Host, template: Link | None, ours: bytes) -> Ip4:
    found = routes.pick_address(host, template.index, v6=False) if template else None
    address, gateway = options.address.v4, options.gateway.v4
    if found:
        address = address or found.addr
    if template:
        gateway = gateway or routes.pick_gateway(host, template.index, v6=False)
        gateway = gateway or (ours if _lacks_gateway(options, host, template, v6=False) else None)
    else:
        address, gateway = address or LOCAL_ADDR4, gateway or LOCAL_GATEWAY4
    usual = found.prefix_len if found and not options.address.v4 else _usual_prefix(address)
    prefix_len = options.prefix_len.v4 or options.netmask or usual
    return Ip4(
        addr=address,
        prefix_len=prefix_len,
        gateway=gateway,
        our_addr=gateway,
        map_host_loopback=_mapped(options, gateway, v6=False),
        map_guest_addr=options.map_guest_addr.v4 or None,
        addr_out=options.outbound.v4,
        if_out=_plain_name(host, options.outbound_if.v4),
        group_index=_group_index(options, host, template, v6=False),
        fixed=options.address.v4 is not None,
    )


def _ip6(options: Options, host: Host, template: Link | None, ours: bytes) -> Ip6:
    found = routes.pick_address(host, template.index, v6=True) if template else None
    address, gateway = options.address.v6, options.gateway.v6
    our_ll = None
    if found:
        address = address or found.addr
    if template:
        gateway = gateway or routes.pick_gateway(host, template.index, v6=True)
        gateway = gateway or (ours if _lacks_gateway(options, host, template, v6=True) else None)
        our_ll = routes.pick_link_local(host, template.index)
    else:
        gateway = gateway or LOCAL_LL6
    if gateway and addr.is_link_local(gateway):
        our_ll = gateway
    prefix_len = options.prefix_len.v6 or (found.prefix_len if found and not options.address.v6 else PREFIX6)
    return Ip6(
        addr=address,
        prefix_len=prefix_len,
        gateway=gateway,
        our_ll=our_ll or LOCAL_LL6,
        map_host_loopback=_mapped(options, gateway, v6=True),
        map_guest_addr=options.map_guest_addr.v6 or None,
        addr_out=options.outbound.v6,
        if_out=_plain_name(host, options.outbound_if.v6),
        group_index=_group_index(options, host, template, v6=True),
        fixed=options.address.v6 is not None,
    )


def _remark_local(options: Options, template: Link | None, why: str, remarks: Remarks, v6: bool) -> None:
    given = options.address.get(v6) is not None and options.gateway.get(v6) is not None
    if template is None and options.use.get(v6) and not given:
        family = "IPv6" if v6 else "IPv4"
        remarks.info(f"{family}: no external interface as template ({why}), using local mode")


def _remark_deprecated(options: Options, host: Host, template: Link | None, remarks: Remarks, v6: bool) -> None:
    found = routes.pick_address(host, template.index, v6) if template else None
    if template and found and found.deprecated and options.address.get(v6) is None:
        remarks.info(f"{template.name} has deprecated {'IPv6' if v6 else 'IPv4'} addresses only: using them")


def _remark_off(options: Options, config: Config, remarks: Remarks) -> None:
    """Log options for a family that is off."""
    for v6, ip in ((False, config.ip4), (True, config.ip6)):
        if ip is None:
            pairs = ("address", "gateway", "outbound", "outbound_if", "map_host_loopback", "map_guest_addr")
            given = [getattr(options, field).get(v6) for field in pairs]
            given += [a for a in (*options.dns, *options.dns_forward) if (len(a) == 16) == v6]
            texts = [value if isinstance(value, str) else addr.text(value) for value in given if value]
            if texts:
                remarks.info(f"{'IPv6' if v6 else 'IPv4'} is off: no use for {', '.join(texts)}")


def _usual_prefix(address: bytes) -> int:
    """The default prefix length of an address: that of its class (RFC 791, 3.2)."""
    if address[:2] == LOCAL_ADDR4[:2]:
        return LOCAL_PREFIX4
    return 8 if address[0] < 128 else 16 if address[0] < 192 else 24 if address[0] < 224 else 32


def _mapped(options: Options, gateway: bytes | None, v6: bool) -> bytes | None:
    """The address that maps to the host's loopback: that of the option, or the gateway's."""
    asked: bytes | bool | None = options.map_host_loopback.get(v6)
    if asked is None:
        return gateway if options.map_gw else None
    return asked or None  # type: ignore[return-value]  # False is `none`, True does not occur


# The namespace -----------------------------------------------------------------------------------------------------


def _plan(
    options: Options, host: Host, template4: Link | None, template6: Link | None, config: Config, remarks: Remarks
) -> NsPlan:
    template = template4 or template6
    ip4, ip6 = config.ip4, config.ip6
    return NsPlan(
        ifname=options.ns_ifname or (template.name if template else LOCAL_IFNAME),
        mac=options.ns_mac,
        mtu=config.mtu,
        txqlen=queue_length(config.mtu),
        configure=options.config_net,
        addresses=(*_addresses(options, host, template4, ip4), *_addresses(options, host, template6, ip6)),
        routes=(
            *_routes(options, host, template4, ip4, remarks),
            *_routes(options, host, template6, ip6, remarks),
        ),
    )


def _addresses(options: Options, host: Host, template: Link | None, ip: Ip4 | Ip6 | None) -> tuple[Address, ...]:
    if ip is None or ip.addr is None:
        return ()
    v6 = isinstance(ip, Ip6)
    if template is None or options.address.get(v6) is not None or not options.copy_addrs:
        return (Address(0, ip.addr, ip.prefix_len),)
    copied = routes.addresses_to_copy(host, template.index, v6)
    if v6 or not options.netmask:
        return copied
    return tuple(replace(a, prefix_len=ip.prefix_len, peer=None) if a.addr == ip.addr else a for a in copied)


def _routes(
    options: Options, host: Host, template: Link | None, ip: Ip4 | Ip6 | None, remarks: Remarks
) -> tuple[Route, ...]:
    if ip is None:
        return ()
    v6 = isinstance(ip, Ip6)
    if template is not None and options.gateway.get(v6) is None and options.copy_routes:
        found = routes.routes_to_copy(host, template.index, v6)
        if ip.gateway and _bound_to_tunnel(options, template, v6) and not any(route.default for route in found):
            found += routes.single_routes(ip.gateway, ip.addr, ip.prefix_len)
        if options.config_net:
            _remark_routes(host, template, len(found), remarks, v6=v6)
        return routes.cut(found)
    return routes.single_routes(ip.gateway, ip.addr, ip.prefix_len) if ip.gateway else ()


def _remark_routes(host: Host, template: Link, count: int, remarks: Remarks, v6: bool) -> None:
    family = "IPv6" if v6 else "IPv4"
    if count > routes.COPY_LIMIT:
        remarks.warn(f"{count} {family} routes on {template.name}: copying the {routes.COPY_LIMIT} widest")
    unresolved = routes.unresolved(host, v6)
    if unresolved:
        remarks.warn(
            f"{unresolved} {family} routes name a next-hop object instead of an interface and are not copied: "
            f"sysctl -w net.ipv4.nexthop_compat_mode=1 makes them readable"
        )
