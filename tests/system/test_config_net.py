"""The configuration of the namespace, on hosts of every kind."""

from __future__ import annotations

import pytest

from .support import (
    Host,
    Runner,
    addresses,
    by_name,
    inside,
    new_host,
)


def test_config_net_copies_addresses_and_routes(hosted: Runner, host: Host) -> None:
    seen = inside(hosted, "--config-net")
    there, here = by_name(host.show("address"), "eth0"), by_name(seen["addresses"], "eth0")
    assert addresses(here) == addresses(there)
    for family, arguments in (("routes4", ["route"]), ("routes6", ["-6", "route"])):
        copied = {(r["dst"], r.get("gateway")) for r in seen[family]}
        assert {(r["dst"], r.get("gateway")) for r in host.show(*arguments)} <= copied
    assert not [a for a in here["addr_info"] if a.get("tentative")]
    assert here["mtu"] == 65520
    assert here["txqlen"] > (16 << 20) // 1448


def test_metrics_of_routes_are_copied(root_pasta: Runner) -> None:
    with new_host(
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "address add 2001:db8:1::7/64 dev eth0 nodad",
        "route add default via 198.51.100.1 dev eth0 mtu 1400 advmss 1300 initcwnd 20",
        "route add 203.0.113.0/24 via 198.51.100.1 dev eth0 mtu lock 1000",
        "-6 route add default via 2001:db8:1::1 dev eth0 mtu 1400 hoplimit 9",
    ) as host:  # fmt: skip
        root_pasta.host = host
        seen = inside(root_pasta, "--config-net")
        there = [*host.show("route"), *host.show("-6", "route")]
        text = root_pasta.run("--config-net", "--", "ip", "route").stdout
    metrics = {(r["dst"], str(r["metrics"])) for r in (*seen["routes4"], *seen["routes6"]) if r.get("metrics")}
    assert metrics == {(r["dst"], str(r["metrics"])) for r in there if r.get("metrics")} and len(metrics) == 3
    assert "mtu lock 1000" in text


ALTERNATIVE = "an-alternative-name-of-eth1"


@pytest.mark.parametrize("option", ["-i", "--outbound-if4", "--outbound-if6"])
def test_alternative_names_of_interfaces(root_pasta: Runner, option: str) -> None:
    with new_host(
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "veth eth1", "address add 203.0.113.7/24 dev eth1", "address add 2001:db8:1::7/64 dev eth1 nodad",
        "link set eth1 up", f"link property add dev eth1 altname {ALTERNATIVE}",
        "route add default via 198.51.100.1 dev eth0",
    ) as host:  # fmt: skip
        root_pasta.host = host
        seen = inside(root_pasta, "--config-net", option, ALTERNATIVE, "-t", f"%{ALTERNATIVE}/8080")
        expected = {"-i": "eth1", "--outbound-if4": "eth1", "--outbound-if6": "eth0"}[option]
        wanted = {"eth1": "203.0.113.7/24", "eth0": "2001:db8:1::7/64"}[expected]
        assert any(wanted in addresses(link) for link in seen["addresses"]), seen["addresses"]


def test_without_config_net_the_interface_is_left_alone(hosted: Runner) -> None:
    seen = inside(hosted)
    link = by_name(seen["addresses"], "eth0")
    assert link["operstate"] == "DOWN"
    assert link["addr_info"] == []


def test_options_replace_what_the_host_has(hosted: Runner) -> None:
    seen = inside(
        hosted, "--config-net", "-a", "10.1.2.3", "-n", "20", "-g", "10.1.0.1", "-a", "2001:db8:9::3", "-g", "fe80::9",
        "-m", "1500", "-I", "tap9", "--ns-mac-addr", "02:00:00:00:00:05",
    )  # fmt: skip
    link = by_name(seen["addresses"], "tap9")
    assert addresses(link) == ["10.1.2.3/20", "2001:db8:9::3/64"]
    assert (link["mtu"], link["address"]) == (1500, "02:00:00:00:00:05")
    assert [r["gateway"] for r in seen["routes4"] if r["dst"] == "default"] == ["10.1.0.1"]
    assert [r["gateway"] for r in seen["routes6"] if r["dst"] == "default"] == ["fe80::9"]
    assert len(seen["routes4"]) == 2


def test_gateway_outside_every_prefix(hosted: Runner) -> None:
    seen = inside(hosted, "--config-net", "-4", "-a", "10.1.2.3/32", "-g", "192.0.2.99")
    assert [r["gateway"] for r in seen["routes4"] if r["dst"] == "default"] == ["192.0.2.99"]


@pytest.mark.parametrize(("option", "family"), [("-4", "inet"), ("-6", "inet6")])
def test_one_family_only(hosted: Runner, option: str, family: str) -> None:
    link = by_name(inside(hosted, "--config-net", option)["addresses"], "eth0")
    assert {a["family"] for a in link["addr_info"] if a["scope"] == "global"} == {family}


def test_small_mtu_turns_ipv6_off(hosted: Runner) -> None:
    done = hosted.run("--config-net", "-m", "1000", "--", "ip", "-br", "-6", "address", "show", "eth0")
    assert (done.returncode, done.stdout) == (0, "")
    assert "MTU 1000 is too small for IPv6" in done.stderr


HOSTS = {
    "nothing at all": (),
    "/32 with an on-link gateway": (
        "veth eth0", "address add 198.51.100.7/32 dev eth0", "link set eth0 up",
        "route add 172.31.1.1 dev eth0", "route add default via 172.31.1.1 dev eth0",
    ),
    "/32, gateway declared on-link": (
        "veth eth0", "address add 198.51.100.7/32 dev eth0", "link set eth0 up",
        "route add default via 172.31.1.1 dev eth0 onlink",
    ),
    "equal-cost paths": (
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "route add default nexthop via 198.51.100.1 dev eth0 weight 2 nexthop via 198.51.100.2 dev eth0",
    ),
    "equal-cost paths through two interfaces": (
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "veth eth1", "address add 203.0.113.7/24 dev eth1", "link set eth1 up",
        "route add default nexthop via 198.51.100.1 dev eth0 nexthop via 203.0.113.1 dev eth1",
    ),
    "next-hop objects": (
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "nexthop add id 1 via 198.51.100.1 dev eth0", "nexthop add id 2 via 198.51.100.2 dev eth0",
        "nexthop add id 10 group 1/2", "route add default nhid 10", "route add 203.0.113.0/24 nhid 1",
    ),
    "several defaults": (
        "veth eth1", "address add 203.0.113.7/24 dev eth1", "link set eth1 up",
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "route add default via 203.0.113.1 dev eth1 metric 200",
        "route add default via 198.51.100.1 dev eth0 metric 100",
    ),
    "a default route in the table of a rule": (
        "veth eth1", "address add 203.0.113.7/24 dev eth1", "link set eth1 up",
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
        "route add default via 203.0.113.1 dev eth1 table 300", "rule add from 203.0.113.7 priority 5 table 300",
        "route add default via 198.51.100.1 dev eth0 table 1000", "rule add priority 100 table 1000",
    ),
    "a tunnel without link layer": (
        "tuntap add eth0 mode tun", "address add 10.9.0.2 peer 10.9.0.1/32 dev eth0", "link set eth0 up",
        "route add default dev eth0",
    ),
    "an IPv4 gateway with an IPv6 address": (
        "veth eth0", "address add 198.51.100.7/32 dev eth0", "link set eth0 up",
        "-4 route add default via inet6 fe80::1 dev eth0",
    ),
    "IPv6 only": (
        "veth eth0", "address add 2001:db8:1::7/64 dev eth0 nodad", "link set eth0 up",
        "route add default via fe80::1 dev eth0",
    ),
    "addresses without any gateway": (
        "veth eth0", "address add 198.51.100.7/24 dev eth0", "link set eth0 up",
    ),
}  # fmt: skip
EXPECTED: dict[str, tuple[str, list[str], set[tuple[str, str | None]]]] = {
    "nothing at all": ("tap0", ["169.254.2.1/16"], {("default", "169.254.2.2")}),
    "/32 with an on-link gateway": ("eth0", ["198.51.100.7/32"], {("default", "172.31.1.1"), ("172.31.1.1", None)}),
    "/32, gateway declared on-link": ("eth0", ["198.51.100.7/32"], {("default", "172.31.1.1")}),
    "equal-cost paths": ("eth0", ["198.51.100.7/24"], {("default", None)}),
    "equal-cost paths through two interfaces": ("eth0", ["198.51.100.7/24"], {("default", "198.51.100.1")}),
    "next-hop objects": ("eth0", ["198.51.100.7/24"], {("default", None), ("203.0.113.0/24", "198.51.100.1")}),
    "several defaults": ("eth0", ["198.51.100.7/24"], {("default", "198.51.100.1")}),
    "a default route in the table of a rule": ("eth0", ["198.51.100.7/24"], {("default", "198.51.100.1")}),
    "a tunnel without link layer": ("eth0", ["10.9.0.2/32"], {("default", None)}),
    "an IPv4 gateway with an IPv6 address": ("eth0", ["198.51.100.7/32"], {("default", None)}),
    "IPv6 only": ("eth0", ["169.254.2.1/16", "2001:db8:1::7/64"], {("default", "169.254.2.2")}),
    "addresses without any gateway": ("eth0", ["198.51.100.7/24"], set()),
}


@pytest.mark.parametrize("kind", HOSTS)
def test_no_host_keeps_us_from_starting(root_pasta: Runner, kind: str) -> None:
    name, expected, routes = EXPECTED[kind]
    with new_host(*HOSTS[kind]) as host:
        root_pasta.host = host
        seen = inside(root_pasta, "--config-net")
    assert addresses(by_name(seen["addresses"], name)) == expected
    present = {(r["dst"], r.get("gateway")) for r in seen["routes4"]}
    assert routes <= present
    assert ("default" in {dst for dst, _ in present}) == any(dst == "default" for dst, _ in routes)


def test_an_ipv6_default_route_in_the_table_of_a_rule(root_pasta: Runner) -> None:
    """As of a VPN with a table of its own; the other one is for one source only."""
    with new_host(
        "veth eth1", "address add 2001:db8:2::7/64 dev eth1 nodad", "link set eth1 up",
        "veth eth0", "address add 2001:db8:1::7/64 dev eth0 nodad", "link set eth0 up",
        "-6 route add default via 2001:db8:2::1 dev eth1 table 300",
        "-6 rule add from 2001:db8:2::7 priority 5 table 300",
        "-6 route add default via 2001:db8:1::1 dev eth0 table 1000", "-6 rule add priority 100 table 1000",
    ) as host:  # fmt: skip
        root_pasta.host = host
        seen = inside(root_pasta, "--config-net")
    assert addresses(by_name(seen["addresses"], "eth0"))[-1] == "2001:db8:1::7/64"
    assert [r["gateway"] for r in seen["routes6"] if r["dst"] == "default"] == ["2001:db8:1::1"]


@pytest.mark.usefixtures("root")
def test_host_with_deprecated_addresses_only(root_pasta: Runner) -> None:
    """As after a renumbering whose new prefix has not come yet: the host reaches others, and so must the namespace."""
    commands = (
        "veth eth0", "link set eth0 up", "address add 2001:db8:1::7/64 dev eth0 nodad preferred_lft 0",
        "address add 198.51.100.7/24 dev eth0 preferred_lft 0", "route add default via 198.51.100.1 dev eth0",
        "route add default via 2001:db8:1::1 dev eth0",
    )  # fmt: skip
    with new_host(*commands) as host:
        done = root_pasta.run("--config-net", "-d", "--", "ip", "-br", "address", "show", "eth0", host=host)
    assert (done.returncode, done.stdout.split()[2:4]) == (0, ["198.51.100.7/24", "2001:db8:1::7/64"])
    for family in ("IPv4", "IPv6"):
        assert f"eth0 has deprecated {family} addresses only: using them" in done.stderr
