"""From options and the host's tables to what the guest gets: hosts of every kind, as values."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt import addr, log
from passt.conf import argv as conf_argv
from passt.conf.decide import Decision, decide, queue_length
from passt.conf.resolv_conf import ResolvConf
from passt.linux.routes import RT_SCOPE_LINK, Address, Hop, Host, Link, NsPlan, Route
from passt.log import Fatal
from passt.policy.config import PASST


def ip(text: str) -> bytes:
    return addr.packed(text)


LO = Link(1, "lo", bytes(6), 65536, loopback=True)
ETH0 = Link(2, "eth0", bytes.fromhex("020000000002"), 1500)
ETH1 = Link(3, "eth1", bytes.fromhex("020000000003"), 1500)
ANY4, ANY6 = bytes(4), bytes(16)

HOST = Host(
    links=(LO, ETH0, ETH1),
    addresses=(
        Address(1, ip("127.0.0.1"), 8, 254),
        Address(2, ip("192.0.2.2"), 24),
        Address(2, ip("192.0.2.3"), 24),
        Address(2, ip("2001:db8::2"), 64),
        Address(2, ip("fe80::2"), 64, RT_SCOPE_LINK),
        Address(3, ip("198.51.100.2"), 25),
    ),
    routes4=(
        Route(ANY4, 0, (Hop(2, ip("192.0.2.1")),)),
        Route(ip("192.0.2.0"), 24, (Hop(2),), scope=RT_SCOPE_LINK),
        Route(ip("198.51.100.0"), 25, (Hop(3),), scope=RT_SCOPE_LINK),
    ),
    routes6=(Route(ANY6, 0, (Hop(2, ip("2001:db8::1")),), metric=1024), Route(ip("2001:db8::"), 64, (Hop(2),))),
)
RESOLVERS = ResolvConf((ip("192.0.2.53"), ip("2001:db8::53")), ("example.org",))


def guest_of(line: str = "", host: Host = HOST, resolvers: ResolvConf = RESOLVERS, *, have_v6: bool = True) -> Decision:
    """The same for a virtual machine."""
    return decide(conf_argv.parse(line.split(), PASST), host, resolvers, have_v6=have_v6)


def plan_of(decision: Decision) -> NsPlan:
    assert decision.plan is not None
    return decision.plan


def given_host(
    line: str = "", host: Host = HOST, resolvers: ResolvConf = RESOLVERS, *, have_v6: bool = True
) -> Decision:
    return decide(conf_argv.parse([*line.split(), "true"]), host, resolvers, have_v6=have_v6)


def remarks(decision: Decision) -> list[str]:
    return [text for _, text in decision.remarks.lines]


# Choices ------------------------------------------------------------------------------------------------------------


def test_a_usual_host() -> None:
    d = given_host("--config-net")
    ip4, ip6 = d.config.ip4, d.config.ip6
    assert ip4
    assert ip6
    assert (ip4.addr, ip4.prefix_len, ip4.gateway, ip4.our_addr) == (
        ip("192.0.2.2"),
        24,
        ip("192.0.2.1"),
        ip("192.0.2.1"),
    )
    assert (ip6.addr, ip6.prefix_len, ip6.gateway, ip6.our_ll) == (
        ip("2001:db8::2"),
        64,
        ip("2001:db8::1"),
        ip("fe80::2"),
    )
    assert (ip4.map_host_loopback, ip6.map_host_loopback) == (ip("192.0.2.1"), ip("2001:db8::1"))
    assert (ip4.dns, ip6.dns) == ((ip("192.0.2.53"),), (ip("2001:db8::53"),))
    assert (d.config.dns_match, d.config.dns_hosts) == ((), (ip("192.0.2.53"), ip("2001:db8::53")))
    assert (d.config.dns_search, d.config.scope_id, d.config.mtu) == (("example.org",), 2, 65520)
    assert (plan_of(d).ifname, plan_of(d).mtu, plan_of(d).configure) == ("eth0", 65520, True)
    assert [a.addr for a in plan_of(d).addresses] == [ip("192.0.2.2"), ip("192.0.2.3"), ip("2001:db8::2")]
    assert [r.prefix_len for r in plan_of(d).routes] == [24, 0, 64, 0]
    assert remarks(d) == []


def test_options_take_the_place_of_what_was_found() -> None:
    d = given_host("-a 10.0.0.5/20 -g 10.0.0.1 -a fd00::5 -g fe80::9 -I x0 -m 1400 --ns-mac-addr 02:00:00:00:00:09")
    ip4, ip6 = d.config.ip4, d.config.ip6
    assert ip4
    assert ip6
    assert (ip4.addr, ip4.prefix_len, ip4.gateway, ip4.our_addr) == (ip("10.0.0.5"), 20, ip("10.0.0.1"), ip("10.0.0.1"))
    assert (ip6.addr, ip6.prefix_len, ip6.gateway, ip6.our_ll) == (ip("fd00::5"), 64, ip("fe80::9"), ip("fe80::9"))
    assert (plan_of(d).ifname, plan_of(d).mtu, plan_of(d).mac) == ("x0", 1400, bytes.fromhex("020000000009"))
    assert plan_of(d).addresses == (Address(0, ip("10.0.0.5"), 20), Address(0, ip("fd00::5"), 64))
    assert [str(r) for r in plan_of(d).routes] == ["default via 10.0.0.1", "default via fe80::9"]


@pytest.mark.parametrize(
    ("line", "prefix_len"),
    [
        ("-n 20", 20),
        ("-a 10.0.0.5", 8),
        ("-a 172.20.0.5", 16),
        ("-a 192.0.2.2", 24),  # the host's own address
        ("-a 198.51.100.5", 24),
        ("-a 240.0.0.5", 32),
        ("-a 10.0.0.5/0", 8),
        ("-a 10.0.0.5/29", 29),
        ("-a 10.0.0.5 -n 30", 30),
        ("-a 10.0.0.5/0 -n 30", 30),
        ("-a 10.0.0.5 -n 0", 8),
        ("-n 0", 24),
    ],
)
def test_prefix_length(line: str, prefix_len: int) -> None:
    d = given_host(line)
    assert d.config.ip4
    assert d.config.ip4.prefix_len == prefix_len
    assert plan_of(d).addresses[0].prefix_len == prefix_len


@pytest.mark.parametrize(
    ("address", "prefix_len"),
    [("10.1.1.1", 8), ("172.16.0.1", 16), ("192.168.0.1", 24), ("240.0.0.1", 32), ("169.254.9.9", 16)],
)
def test_prefix_length_of_an_address_without_a_host(address: str, prefix_len: int) -> None:
    ip4 = given_host(f"-a {address}", Host((LO,))).config.ip4
    assert ip4
    assert ip4.prefix_len == prefix_len


def test_deprecated_options_copy_less() -> None:
    d = given_host("--config-net --no-copy-addrs --no-copy-routes -4")
    assert plan_of(d).addresses == (Address(0, ip("192.0.2.2"), 24),)
    assert [str(r) for r in plan_of(d).routes] == ["default via 192.0.2.1"]


@pytest.mark.parametrize(("line", "v4", "v6"), [("-4", True, False), ("-6", False, True), ("", True, True)])
def test_families(line: str, v4: bool, v6: bool) -> None:
    d = given_host(line)
    assert ((d.config.ip4 is not None), (d.config.ip6 is not None)) == (v4, v6)
    assert (4 in {len(a.addr) for a in plan_of(d).addresses}, 16 in {len(r.dst) for r in plan_of(d).routes}) == (v4, v6)
    assert d.config.no_dhcp == (not v4)
    assert (d.config.no_ndp, d.config.no_ra, d.config.no_dhcpv6) == (not v6,) * 3


def test_small_mtu_is_too_small_for_ipv6() -> None:
    d = given_host("-m 1279")
    assert d.config.ip6 is None
    assert remarks(d) == ["MTU 1279 is too small for IPv6, which needs 1280: disabling IPv6"]
    assert given_host("-m 1280").config.ip6
    assert given_host("-m 0").config.ip6
    with pytest.raises(Fatal, match="No address family left"):
        given_host("-6 -m 1000")


def test_large_mtu_is_clamped_to_what_the_device_takes() -> None:
    d = given_host("-m 65535")
    assert (d.config.mtu, plan_of(d).mtu) == (65521, 65521)
    assert remarks(d) == ["A tap device takes at most 65521 bytes: using MTU 65521, not 65535"]


def test_kernel_without_ipv6() -> None:
    d = given_host("", have_v6=False)
    assert d.config.ip6 is None
    assert remarks(d) == ["IPv6 is not available on this host: disabled"]
    with pytest.raises(Fatal, match="No address family left"):
        given_host("-6", have_v6=False)


# Hosts that lack something -----------------------------------------------------------------------------------------


def test_local_mode() -> None:
    d = given_host("--config-net", Host((LO,)))
    ip4, ip6 = d.config.ip4, d.config.ip6
    assert ip4
    assert ip6
    assert (ip4.addr, ip4.prefix_len, ip4.gateway) == (ip("169.254.2.1"), 16, ip("169.254.2.2"))
    assert (ip6.addr, ip6.gateway, ip6.our_ll) == (None, ip("fe80::1"), ip("fe80::1"))
    assert d.config.no_dhcpv6
    assert plan_of(d).ifname == "tap0"
    assert [str(r) for r in plan_of(d).routes] == ["default via 169.254.2.2", "default via fe80::1"]
    assert remarks(d) == [
        "IPv4: no external interface as template (no interface has a usable route), using local mode",
        "IPv6: no external interface as template (no interface has a usable route), using local mode",
    ]


def test_local_mode_respects_options() -> None:
    d = given_host("-4 -a 10.0.0.5/24 -g 10.0.0.1", Host((LO,)))
    assert d.config.ip6 is None
    assert d.config.ip4
    assert (d.config.ip4.addr, d.config.ip4.gateway) == (ip("10.0.0.5"), ip("10.0.0.1"))
    assert remarks(d) == []


def test_one_family_local() -> None:
    d = given_host("", replace(HOST, routes6=(), addresses=HOST.addresses[:3]))
    assert d.config.ip4
    assert d.config.ip6
    assert (d.config.ip4.addr, d.config.ip6.addr) == (ip("192.0.2.2"), None)
    assert plan_of(d).ifname == "eth0"


def test_no_default_route() -> None:
    d = given_host("-4", replace(HOST, routes4=HOST.routes4[1:]))
    assert d.config.ip4
    assert (d.config.ip4.addr, d.config.ip4.gateway, d.config.ip4.map_host_loopback) == (ip("192.0.2.2"), None, None)
    assert d.config.no_dhcp
    assert d.why4 == "the first route of several interfaces, none of them default (eth1)"


def test_interface_by_name() -> None:
    d = given_host("-i eth1 -4")
    assert d.config.ip4
    assert (d.config.ip4.addr, d.config.ip4.prefix_len, d.config.ip4.gateway) == (ip("198.51.100.2"), 25, None)
    with pytest.raises(Fatal, match="Invalid interface name eth9: No such device"):
        given_host("-i eth9")
    with pytest.raises(Fatal, match="Interface eth1 is not usable: no address in the families wanted"):
        given_host("-i eth1 -6")
    assert given_host("-i eth1 -6 -a 2001:db8::9").config.ip6


def test_outbound_interface_is_the_template() -> None:
    d = given_host("--outbound-if4 eth1")
    assert d.config.ip4
    assert (d.config.ip4.addr, d.config.ip4.if_out) == (ip("198.51.100.2"), "eth1")
    with pytest.raises(Fatal, match="External interface not usable: eth7: No such device"):
        given_host("--outbound-if4 eth7")
    with pytest.raises(Fatal, match="External interface not usable: eth1 has no IPv6 address"):
        given_host("--outbound-if6 eth1")


WG0 = Link(4, "wg0", b"", 1420)
TUNNEL = replace(
    HOST,
    links=(*HOST.links, WG0),
    addresses=(*HOST.addresses, Address(4, ip("10.66.0.2"), 32), Address(4, ip("fd66::2"), 128)),
)
DEFAULT = Route(ANY4, 0, (Hop(4),), scope=RT_SCOPE_LINK)


def test_a_tunnel_that_outbound_sockets_are_bound_to() -> None:
    """The main table has no route through it (wg-quick has a table of its own), and the sockets need none."""
    d = given_host("--config-net --outbound-if4 wg0 --outbound-if6 wg0", TUNNEL)
    ip4, ip6 = d.config.ip4, d.config.ip6
    assert ip4 and ip6
    assert (ip4.addr, ip4.gateway, ip4.if_out) == (ip("10.66.0.2"), ip("169.254.2.2"), "wg0")
    assert (ip6.addr, ip6.gateway, ip6.our_ll) == (ip("fd66::2"), ip("fe80::1"), ip("fe80::1"))
    assert plan_of(d).routes == (
        Route(ANY4, 0, (Hop(0, ip("169.254.2.2"), onlink=True),)),
        Route(ANY6, 0, (Hop(0, ip("fe80::1")),)),
    )
    assert not guest_of("--outbound-if4 wg0", TUNNEL).config.no_dhcp


def test_a_tunnel_that_has_the_default_route() -> None:
    """It is copied. A machine needs a gateway all the same, for DHCP."""
    host = replace(TUNNEL, routes4=(DEFAULT,))
    d = given_host("--config-net --outbound-if4 wg0 -4", host)
    assert plan_of(d).routes == (DEFAULT,)
    assert d.config.ip4 and d.config.ip4.gateway == ip("169.254.2.2")


def test_a_machine_has_a_gateway_where_the_default_route_has_none() -> None:
    """No option names the tunnel. DHCP gives 169.254.2.2, and router advertisements come from fe80::1."""
    config = guest_of("", replace(TUNNEL, routes4=(DEFAULT,), routes6=(replace(DEFAULT, dst=ANY6),))).config
    assert config.ip4 and config.ip6
    assert (config.ip4.addr, config.ip4.prefix_len, config.ip4.gateway) == (ip("10.66.0.2"), 32, ip("169.254.2.2"))
    assert (config.ip6.addr, config.ip6.gateway, config.ip6.our_ll) == (ip("fd66::2"), ip("fe80::1"), ip("fe80::1"))
    assert (config.ip4.map_host_loopback, config.ip6.map_host_loopback) == (ip("169.254.2.2"), ip("fe80::1"))
    assert not config.no_dhcp and not config.no_dhcpv6


def test_the_gateway_of_a_default_route_without_one_can_be_given() -> None:
    config = given_host("-g 10.66.0.1 -4", replace(TUNNEL, routes4=(DEFAULT,))).config
    assert config.ip4 and config.ip4.gateway == ip("10.66.0.1")


@pytest.mark.parametrize("line", ["-i wg0 -4", "--outbound-if4 eth1 -4"])
def test_an_interface_without_a_default_route_stays_without(line: str) -> None:
    """Its guests are not led elsewhere."""
    d = given_host(f"--config-net {line}", TUNNEL)
    assert d.config.ip4 and d.config.ip4.gateway is None
    assert not any(route.default for route in plan_of(d).routes)


def test_where_outbound_sockets_are_bound() -> None:
    config = given_host("-o 192.0.2.3 -o 2001:db8::2 --outbound-if6 eth0").config
    assert config.ip4
    assert config.ip6
    assert (config.ip4.addr_out, config.ip4.if_out) == (ip("192.0.2.3"), None)
    assert (config.ip6.addr_out, config.ip6.if_out) == (ip("2001:db8::2"), "eth0")
    config = given_host("-o 127.0.0.1 -i eth0 --outbound-if4 eth1").config  # -i is the template, whatever is bound to
    assert config.ip4
    assert (config.ip4.addr, config.ip4.addr_out, config.ip4.if_out) == (ip("192.0.2.2"), ip("127.0.0.1"), "eth1")


# Addresses that stand for the host ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "v4", "v6"),
    [
        ("", "192.0.2.1", "2001:db8::1"),
        ("--no-map-gw", None, None),
        ("--map-host-loopback none", None, None),
        ("--map-host-loopback 10.9.9.9", "10.9.9.9", "2001:db8::1"),
        ("--no-map-gw --map-host-loopback 10.9.9.9", "10.9.9.9", None),
        ("--map-host-loopback 10.9.9.9 --no-map-gw", "10.9.9.9", None),
        ("--map-host-loopback 10.9.9.9 --map-host-loopback fd00::9", "10.9.9.9", "fd00::9"),
        ("--map-host-loopback none --map-host-loopback fd00::9", None, "fd00::9"),
        ("--map-host-loopback 10.9.9.9 --map-host-loopback none", None, None),
    ],
)
def test_map_host_loopback(line: str, v4: str | None, v6: str | None) -> None:
    config = given_host(line).config
    assert config.ip4
    assert config.ip6
    assert config.ip4.map_host_loopback == (ip(v4) if v4 else None)
    assert config.ip6.map_host_loopback == (ip(v6) if v6 else None)


def test_map_guest_addr() -> None:
    for line, value in (("--map-guest-addr 10.9.9.9", ip("10.9.9.9")), ("--map-guest-addr none", None), ("", None)):
        ip4 = given_host(line).config.ip4
        assert ip4
        assert ip4.map_guest_addr == value
    config = given_host("--map-guest-addr fd00::9 --no-map-gw").config
    assert config.ip4
    assert config.ip6
    assert (config.ip4.map_guest_addr, config.ip6.map_guest_addr) == (None, ip("fd00::9"))


# Forwarding ---------------------------------------------------------------------------------------------------------


def test_forwarding_reaches_the_configuration() -> None:
    config = given_host("-t 127.0.0.1/80 -u none -T none -U none").config
    assert [str(rule) for rule in config.forwards] == ["TCP [127.0.0.1] 80 -> 80"]
    assert (config.no_splice, config.splice_only, config.host_lo_to_ns_lo, config.freebind) == (False,) * 4
    config = given_host("--splice-only --host-lo-to-ns-lo --freebind").config
    assert (config.no_splice, config.splice_only, config.host_lo_to_ns_lo, config.freebind) == (False, True, True, True)
    assert given_host("--no-splice").config.no_splice


@pytest.mark.parametrize(
    ("line", "have_v6", "message"),
    [
        ("-4 -t ::1/80", True, "Invalid port specifier -t ::1/80: ::1, but IPv6 is off"),
        ("-6 -u 0.0.0.0/53", True, "Invalid port specifier -u 0.0.0.0/53: 0.0.0.0, but IPv4 is off"),
        ("-t ::/80", False, "Invalid port specifier -t ::/80: ::, but IPv6 is off"),
        ("-m 1000 -t ::/80", True, "Invalid port specifier -t ::/80: ::, but IPv6 is off"),
        ("-4 -t 80:[2001:db8::1]", True, "Invalid port specifier -t 80:[2001:db8::1]: 2001:db8::1, but IPv6 is off"),
    ],
)
def test_forwarding_of_a_family_that_is_off(line: str, have_v6: bool, message: str) -> None:
    with pytest.raises(Fatal) as e:
        given_host(line, have_v6=have_v6)
    assert str(e.value) == message


def test_the_host_may_connect_where_the_namespace_may_not() -> None:
    assert given_host("-4 -T 80:[2001:db8::1]").config.forwards


# Virtual machines --------------------------------------------------------------------------------------------------


def test_a_usual_host_of_a_virtual_machine() -> None:
    d, like = guest_of("-H vm --fqdn vm.example"), given_host("-t none -u none -T none -U none").config
    assert d.plan is None
    assert d.config == replace(
        like, mode=PASST, advertise_dns=True, advertise_search=True, hostname="vm", fqdn="vm.example"
    )
    assert (d.config.mtu, d.config.forwards, d.config.no_ra) == (65520, (), False)


def test_what_a_virtual_machine_is_not_told() -> None:
    config = guest_of("--no-dhcp-dns --no-dhcp-search --no-dhcp --no-ra").config
    assert (config.advertise_dns, config.advertise_search) == (False, False)
    assert (config.no_dhcp, config.no_ra, config.no_ndp, config.no_dhcpv6) == (True, True, False, False)
    config = guest_of("-D none -S none").config
    assert config.ip4 and config.ip6
    assert (config.ip4.dns, config.ip6.dns, config.dns_search) == ((), (), ())


def test_services_that_the_host_leaves_nothing_to_say() -> None:
    nothing = guest_of("", Host((LO,)))
    assert nothing.config.ip4 and nothing.config.ip6
    assert (nothing.config.no_dhcp, nothing.config.no_dhcpv6, nothing.config.no_ra) == (False, True, False)
    assert guest_of("-4").config.no_ndp
    assert guest_of("-6").config.no_dhcp
    assert guest_of("", replace(HOST, routes4=HOST.routes4[1:])).config.no_dhcp  # no gateway


def test_mtu_of_a_virtual_machine() -> None:
    d = guest_of("-m 65535")
    assert d.config.mtu == 65521
    assert "A frame on the socket takes at most 65521 bytes: using MTU 65521, not 65535" in remarks(d)
    assert guest_of("-m 1000").config.ip6 is None
    assert guest_of("-m 0").config.mtu == 0


def test_warnings_about_what_a_virtual_machine_is_told() -> None:
    lines = ["No IPv4 nameserver available for DHCP", "No IPv6 nameserver available for NDP/DHCPv6"]
    assert remarks(guest_of("", resolvers=ResolvConf())) == ["Couldn't get any nameserver address", *lines]
    assert remarks(guest_of("--no-dhcp-dns", resolvers=ResolvConf())) == ["Couldn't get any nameserver address"]
    for asked in ("-D none", "--no-dhcp --no-dhcpv6 --no-ra -D none"):
        assert remarks(guest_of(asked, resolvers=ResolvConf())) == []
    assert remarks(guest_of("--no-dhcp", resolvers=ResolvConf()))[1:] == lines[1:]
    assert remarks(guest_of("--no-dhcpv6 --no-ra", resolvers=ResolvConf()))[1:] == lines[:1]
    assert remarks(guest_of("--no-dhcpv6 --no-ndp", resolvers=ResolvConf()))[1:] == lines[:1]
    assert remarks(guest_of("--no-dhcpv6", resolvers=ResolvConf()))[1:] == lines


# The queue ---------------------------------------------------------------------------------------------------------


def test_routes_that_are_left_out_are_named() -> None:
    hop = Hop(0)
    table = replace(HOST, routes4=(*HOST.routes4, Route(ip("198.51.100.0"), 24, (hop,))))
    assert any("1 IPv4 routes name a next-hop object" in r for r in remarks(given_host("--config-net", table)))
    assert not any("next-hop" in r for r in remarks(given_host("", table)))
    many = tuple(Route(i.to_bytes(4, "big"), 32, (Hop(2),)) for i in range(1, 5000))
    decision = given_host("--config-net", replace(HOST, routes4=(*HOST.routes4, *many)))
    assert any("copying the 4096 widest" in r for r in remarks(decision))
    assert sum(len(r.dst) == 4 for r in plan_of(decision).routes) == 4096


def test_queue_holds_a_window() -> None:
    assert queue_length(0) == queue_length(1500) == queue_length(65520)
    assert queue_length(1500) * 1448 >= 1 << 24
    assert queue_length(68) == 16384
    assert 1000 < queue_length(1500) < queue_length(1300) <= 16384


def test_remarks_are_said_at_their_level(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[tuple[int, str]] = []
    monkeypatch.setattr(log, "say", lambda level, text: said.append((level, text)))
    given_host("-m 65535", Host((LO,))).remarks.say()
    assert said[0][0] == log.WARNING
    assert {level for level, _ in said[1:]} == {log.INFO}
