"""Names: from options and resolv.conf to what the guest is told, and where its queries go; at start and later."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt import addr, log
from passt.conf import argv as conf_argv
from passt.conf import names as conf_names
from passt.conf.resolv_conf import ResolvConf
from passt.policy.config import Config, Ip4, Ip6
from passt.policy.resolvers import Resolvers
from passt.policy.settings import Settings

from ..support import T0, make_context

ADDR4, GATEWAY4 = addr.packed("192.0.2.2"), addr.packed("192.0.2.1")
ADDR6, GATEWAY6 = addr.packed("2001:db8::2"), addr.packed("fe80::1")
Told = tuple[str, str, str]


def config_of(line: str) -> Config:
    """A host with both families; the gateway maps its loopback, unless options say otherwise."""
    map4, map6 = (None, None) if "--no-map-gw" in line else (GATEWAY4, GATEWAY6)
    ip4 = Ip4(ADDR4, 24, GATEWAY4, GATEWAY4, map_host_loopback=map4)
    ip6 = Ip6(ADDR6, 64, GATEWAY6, GATEWAY6, map_host_loopback=map6)
    return Config(ip4=None if "-6" in line.split() else ip4, ip6=None if "-4" in line.split() else ip6)


def options_of(line: str) -> conf_argv.Options:
    return conf_argv.parse([*line.split(), "true"])


def resolv_conf(servers: str, *search: str) -> ResolvConf:
    return ResolvConf(tuple(map(addr.packed, servers.split())), search)


def link_local_host(line: str, servers: str, zones: dict[str, str]) -> Config:
    """A host whose template interface, eth0, is number 2."""
    interfaces = ("eth0", 2), ("eth1", 3), ("an-alternative-name", 3)
    config = replace(config_of(line), scope_id=2, interfaces=interfaces)
    found = tuple((addr.packed(a), zone) for a, zone in zones.items())
    return conf_names.apply(options_of(line), config, replace(resolv_conf(servers), zones=found))


@pytest.mark.parametrize("zone", ["eth1", "an-alternative-name", "3"])
def test_a_link_local_resolver_on_another_link(zone: str) -> None:
    """The guest cannot reach it: at its own link, another host may have that address."""
    config = link_local_host("", "fe80::53", {"fe80::53": zone})
    assert config.dns_scopes == ((addr.packed("fe80::53"), 3),)
    assert config.ip6 and config.ip6.dns == (GATEWAY6,) and config.dns_match == (GATEWAY6,)


def test_a_link_local_resolver_on_the_guests_link() -> None:
    config = link_local_host("", "fe80::53", {"fe80::53": "eth0"})
    assert config.dns_scopes == ((addr.packed("fe80::53"), 2),)
    assert config.ip6 and config.ip6.dns == (addr.packed("fe80::53"),)


def test_an_interface_that_is_not_there_counts_for_nothing() -> None:
    assert link_local_host("", "fe80::53", {"fe80::53": "eth9"}).dns_scopes == ()


def test_the_interface_of_a_given_resolver() -> None:
    config = link_local_host("--dns-host fe80::99%eth1", "fe80::53", {"fe80::53": "eth0"})
    assert config.dns_hosts == (addr.packed("fe80::99"),) and config.dns_scopes == ((addr.packed("fe80::99"), 3),)


def names(line: str, servers: str) -> Told:
    """(given to the guest, forwarded addresses, resolvers)."""
    config = conf_names.apply(options_of(line), config_of(line), resolv_conf(servers))
    told = [s for ip in (config.ip4, config.ip6) if ip for s in ip.dns]
    one, two, three = (" ".join(map(addr.text, a)) for a in (told, config.dns_match, config.dns_hosts))
    return one, two, three


@pytest.mark.parametrize(
    ("line", "servers", "expected"),
    [
        ("", "", ("", "", "")),
        ("", "9.9.9.9 1.1.1.1", ("9.9.9.9 1.1.1.1", "", "9.9.9.9 1.1.1.1")),
        ("", "2620:fe::9 9.9.9.9", ("9.9.9.9 2620:fe::9", "", "2620:fe::9 9.9.9.9")),
        ("", "1.1.1.1 1.1.1.2 1.1.1.3 1.1.1.4", ("1.1.1.1 1.1.1.2 1.1.1.3", "", "1.1.1.1 1.1.1.2 1.1.1.3")),
        ("-D 8.8.8.8", "9.9.9.9", ("8.8.8.8", "", "9.9.9.9")),
        ("-D 2001:db8::8", "9.9.9.9", ("9.9.9.9 2001:db8::8", "", "9.9.9.9")),
        ("-D none", "9.9.9.9", ("", "", "9.9.9.9")),
        ("-D none", "127.0.0.53", ("", "", "127.0.0.53")),
        # On the host's loopback
        ("", "127.0.0.53", ("192.0.2.1", "192.0.2.1", "127.0.0.53")),
        ("", "::1 9.9.9.9", ("9.9.9.9 fe80::1", "fe80::1", "::1 9.9.9.9")),
        ("", "127.0.0.1 127.0.0.53", ("192.0.2.1", "192.0.2.1", "127.0.0.1 127.0.0.53")),
        ("--no-map-gw", "127.0.0.53 9.9.9.9", ("9.9.9.9", "", "127.0.0.53 9.9.9.9")),
        ("--no-map-gw", "127.0.0.53", ("", "", "127.0.0.53")),
        ("--no-map-gw --dns-forward 10.0.0.3", "127.0.0.53", ("10.0.0.3", "10.0.0.3", "127.0.0.53")),
        # The gateway is a resolver, too
        ("", "192.0.2.1", ("192.0.2.1", "192.0.2.1", "192.0.2.1")),
        ("--no-map-gw", "192.0.2.1", ("192.0.2.1", "", "192.0.2.1")),
        ("--dns-forward 10.0.0.3", "192.0.2.1", ("10.0.0.3", "10.0.0.3", "192.0.2.1")),
        # Forwarded as asked
        ("--dns-forward 10.0.0.3", "9.9.9.9", ("9.9.9.9", "10.0.0.3", "9.9.9.9")),
        ("--dns-forward 10.0.0.3 --dns-forward fd00::3 --dns-forward 10.0.0.4", "9.9.9.9",
         ("9.9.9.9", "10.0.0.3 fd00::3 10.0.0.4", "9.9.9.9")),
        ("-4 --dns-forward 10.0.0.3 --dns-forward fd00::3", "9.9.9.9", ("9.9.9.9", "10.0.0.3", "9.9.9.9")),
        ("--dns-forward 10.0.0.3 --dns-host 127.0.0.1 --dns-host ::1", "", ("", "10.0.0.3", "127.0.0.1 ::1")),
        ("--dns-host 127.0.0.1", "9.9.9.9", ("9.9.9.9", "", "127.0.0.1")),
        ("--dns-forward 10.0.0.3 -D 10.0.0.3", "9.9.9.9", ("10.0.0.3", "10.0.0.3", "9.9.9.9")),
        # Resolvers of a family only that the guest does not have
        ("-4", "2620:fe::9", ("192.0.2.1", "192.0.2.1", "2620:fe::9")),
        ("-6", "9.9.9.9", ("fe80::1", "fe80::1", "9.9.9.9")),
        ("-4 --dns-forward 10.0.0.3", "2620:fe::9", ("10.0.0.3", "10.0.0.3", "2620:fe::9")),
        ("-4 --no-map-gw", "2620:fe::9", ("", "", "2620:fe::9")),
        ("-4 -D 8.8.8.8", "2620:fe::9", ("8.8.8.8", "", "2620:fe::9")),
    ],
)  # fmt: skip
def test_names(line: str, servers: str, expected: Told) -> None:
    assert names(line, servers) == expected


def test_more_resolvers_than_a_guest_can_use() -> None:
    """As many as a caller has: the first ones count, of each family."""
    line = " ".join(f"-D 8.8.8.{i} -D 2001:db8::{i}" for i in range(1, 6))
    first = " ".join(f"8.8.8.{i}" for i in (1, 2, 3)), " ".join(f"2001:db8::{i}" for i in (1, 2, 3))
    assert names(line, "9.9.9.9") == (" ".join(first), "", "9.9.9.9")
    assert remarks(line, "9.9.9.9") == [
        "No use for resolvers after the first 3 of a family: 8.8.8.4, 8.8.8.5",
        "No use for resolvers after the first 3 of a family: 2001:db8::4, 2001:db8::5",
    ]


def test_search() -> None:
    found = resolv_conf("", "example.org", *"abcdef")
    for line, search in (("", ("example.org", *"abcde")), ("-S x -S y", ("x", "y")), ("-S none", ())):
        assert conf_names.apply(options_of(line), config_of(line), found).dns_search == search


def remarks(line: str, servers: str) -> list[str]:
    said: list[str] = []
    found = resolv_conf(servers)
    options = options_of(line)
    conf_names.remark(options, conf_names.apply(options, config_of(line), found), found, said.append, said.append)
    return said


def test_remarks() -> None:
    nothing = "Couldn't get any nameserver address"
    assert remarks("", "127.0.0.53") == remarks("-D none", "") == []
    assert remarks("--dhcp-dns", "") == [
        nothing,
        "No IPv4 nameserver available for DHCP",
        "No IPv6 nameserver available for NDP/DHCPv6",
    ]
    cure = "cannot be reached from the guest (give --dns-forward, or leave out --no-map-gw)"
    assert remarks("--no-map-gw", "127.0.0.53 ::1") == [f"{nothing}: 127.0.0.53, ::1 {cure}"]
    forward = "Nothing to forward queries to 10.0.0.3 to: no nameserver known (give --dns-host)"
    assert remarks("--dns-forward 10.0.0.3", "") == [forward, nothing]


@pytest.mark.parametrize(
    ("line", "follows"),
    [
        ("", True),
        ("-D 8.8.8.8 -S x", True),  # there are queries to be forwarded, perhaps
        ("-D 8.8.8.8 --dns-host ::1", True),
        ("-D 8.8.8.8 --dns-host ::1 -S x", False),
        ("-D none --dns-host ::1 -S none", False),
        ("--splice-only", False),
    ],
)
def test_who_depends_on_resolv_conf(line: str, follows: bool) -> None:
    assert conf_names.follows(options_of(line)) == follows


def test_the_host_gets_another_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    options = options_of("--dns-forward 10.0.0.3")
    start = conf_names.apply(options, config_of(""), resolv_conf("9.9.9.9 1.1.1.1", "example.org"))
    ctx = make_context(start)
    before = ctx.config
    seen: list[tuple[Config, float]] = []
    ctx.settings.react(lambda former, now: seen.append((former, now)))
    old = ctx.resolvers.hosts

    conf_names.follow(ctx, options, resolv_conf("9.9.9.9 1.1.1.1", "example.org"), T0)
    assert ctx.config is before
    assert not seen

    conf_names.follow(ctx, options, resolv_conf("1.1.1.1 127.0.0.53", "example.com"), T0 + 1)
    assert seen == [(start, T0 + 1)]
    assert ctx.config.ip4 and ctx.config.ip4.dns == (addr.packed("1.1.1.1"), addr.packed("10.0.0.3"))
    assert ctx.config.dns_search == ("example.com",)
    assert [addr.text(r.addr) for r in ctx.resolvers.hosts] == ["1.1.1.1", "127.0.0.53"]
    assert ctx.resolvers.hosts[0] is old[1]
    assert ctx.resolvers.match == {addr.packed("10.0.0.3")}
    assert said == ["/etc/resolv.conf has changed: resolvers 1.1.1.1, 127.0.0.53; search domains example.com"]


def test_an_address_that_stood_for_resolvers_goes_on_to_do_so() -> None:
    options = options_of("")
    ctx = make_context(conf_names.apply(options, config_of(""), resolv_conf("127.0.0.53")))
    for servers in ("9.9.9.9", "1.1.1.1"):
        conf_names.follow(ctx, options, resolv_conf(servers), T0)
        assert ctx.config.ip4 and ctx.config.ip4.dns == (addr.packed(servers),)
        assert ctx.resolvers.serve(GATEWAY4, 53)
        assert [r.addr for r in ctx.resolvers.hosts] == [addr.packed(servers)]


def test_nothing_but_names_depends_on_names() -> None:
    """A change has the same result as the same file at start."""
    options = options_of("--dns-forward 10.0.0.3")
    early, late = resolv_conf("9.9.9.9", "a"), resolv_conf("2620:fe::9 127.0.0.1", "b", "c")
    config = config_of("")
    twice = conf_names.apply(options, conf_names.apply(options, config, early), late)
    assert twice == conf_names.apply(options, config, late)
    assert replace(twice, ip4=None, ip6=None, dns_match=(), dns_hosts=(), dns_search=()) == replace(
        config, ip4=None, ip6=None
    )
    assert Resolvers(Settings(twice)).serve(addr.packed("10.0.0.3"), 53)
