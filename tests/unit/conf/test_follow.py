"""The policy of --follow, as tables: the host's networks one after the other, and the guest's view of each."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.conf import argv as conf_argv
from passt.conf.decide import decide
from passt.conf.follow import STAYS, TAKEN, WITHDRAWN, View, follow, moved, note_homes, settled, wanted
from passt.conf.options import Options
from passt.conf.resolv_conf import ResolvConf
from passt.linux.routes import RT_SCOPE_LINK, Address, Hop, Host, Link, Route
from passt.policy.config import PASST, Config
from passt.policy.rules import Rule
from passt.wire.checksum import PROTO_TCP

from .test_decide import ANY4, ANY6, ETH0, ETH1, LO, ip

LINKS = (LO, ETH0, ETH1)
TUN = Link(9, "tun0", b"", 1420)
NAMES = ResolvConf((ip("192.0.2.53"),), ("example.org",))


def net4(
    index: int, address: str, gateway: str | None, metric: int = 0, prefix_len: int = 24
) -> tuple[tuple[Address, ...], tuple[Route, ...]]:
    """An IPv4 address of an interface, and a default route through it; "" is one without a gateway."""
    own = Address(index, ip(address), prefix_len)
    network = Route(addr.packed(address)[:3] + b"\0", 24, (Hop(index),), metric, scope=RT_SCOPE_LINK)
    near = (network,) if prefix_len == 24 else ()
    if gateway is None:
        return (own,), near
    return (own,), (Route(ANY4, 0, (Hop(index, ip(gateway) if gateway else None),), metric), *near)


def net6(index: int, address: str, gateway: str | None) -> tuple[tuple[Address, ...], tuple[Route, ...]]:
    own = Address(index, ip(address), 64)
    network = Route(addr.packed(address)[:8] + bytes(8), 64, (Hop(index),), 256)
    if gateway is None:
        return (own,), (network,)
    return (own,), (network, Route(ANY6, 0, (Hop(index, ip(gateway) if gateway else None),), 1024))


def host(*nets: tuple[tuple[Address, ...], tuple[Route, ...]], links: tuple[Link, ...] = LINKS) -> Host:
    addresses = tuple(a for own, _ in nets for a in own)
    four, six = (tuple(r for _, through in nets for r in through if len(r.dst) == n) for n in (4, 16))
    return Host(links, (Address(1, ip("127.0.0.1"), 8, 254), *addresses), four, six)


OFFLINE = host()
HOME = host(net4(2, "192.168.7.20", "192.168.7.1"), net6(2, "2001:db8:7::20", "fe80::7"))
TRAIN = host(net4(2, "10.9.0.20", "10.9.0.1"), net6(2, "2001:db8:9::20", "fe80::9"))
WIFI = host(net4(3, "10.9.0.20", "10.9.0.1", 600), net6(3, "2001:db8:9::20", "fe80::9"))
HOME4 = host(net4(2, "192.168.7.20", "192.168.7.1"))
TRAIN4 = host(net4(2, "10.9.0.20", "10.9.0.1"))
TRAIN6 = host(net6(2, "2001:db8:9::20", "fe80::9"))
LINK6 = host(net6(2, "2001:db8:9::20", None))
RENEWED = host(net4(2, "192.168.7.99", "192.168.7.1"), net6(2, "2001:db8:7::20", "fe80::7"))
NO_DEFAULT = host(net4(2, "192.168.7.20", None), net6(2, "2001:db8:7::20", None))
DOCKER = host(net4(3, "172.17.0.1", None))  # the interface is gone, another one has a route that is no default one
TUNNEL = host(
    net4(2, "192.168.7.20", "192.168.7.1", 100), net4(9, "10.8.0.2", "", prefix_len=32),
    net6(2, "2001:db8:7::20", "fe80::7"), links=(*LINKS, TUN),
)  # fmt: skip
ONLY_TUNNEL = host(net4(9, "10.8.0.2", "", prefix_len=32), net6(9, "fd08::2", ""), links=(*LINKS, TUN))


class Guest:
    """A guest whose host goes from one network to the next."""

    def __init__(self, line: str = "", start: Host = HOME, mode: str = "") -> None:
        words = [*line.split(), *([] if mode else ["true"])]
        self.options: Options = conf_argv.parse(words, mode) if mode else conf_argv.parse(words)
        self.view = View(decide(self.options, start, NAMES))
        self.config: Config = self.view.decision.config

    def goes(self, *hosts: Host) -> Guest:
        for now in hosts:
            self.view = follow(self.options, self.view, self.config, now, NAMES)
            self.config = self.view.decision.config
        return self

    @property
    def has(self) -> tuple[str, str]:
        """ADDRESS via GATEWAY, of IPv4 and IPv6."""
        found = []
        for one in (self.config.ip4, self.config.ip6):
            assert one is not None
            address, gateway = (addr.text(a) if a else "-" for a in (one.addr, one.gateway))
            found.append(f"{address} via {gateway}")
        return found[0], found[1]

    def planned(self) -> tuple[list[str], list[str]]:
        plan = self.view.decision.plan
        assert plan is not None
        return [addr.text(a.addr) for a in plan.addresses], [str(r) for r in plan.routes if r.default]


AT_HOME = "192.168.7.20 via 192.168.7.1", "2001:db8:7::20 via fe80::7"
IN_TRAIN = "10.9.0.20 via 10.9.0.1", "2001:db8:9::20 via fe80::9"
LOCAL = "169.254.2.1 via 169.254.2.2", "- via fe80::1"


@pytest.mark.parametrize(
    ("options", "hosts", "expected", "verdicts"),
    [
        ("", [HOME], AT_HOME, (TAKEN, TAKEN)),
        ("", [TRAIN], IN_TRAIN, (TAKEN, TAKEN)),
        ("", [TRAIN, HOME], AT_HOME, (TAKEN, TAKEN)),
        ("", [WIFI], IN_TRAIN, (TAKEN, TAKEN)),  # from cable to Wi-Fi
        ("", [RENEWED], ("192.168.7.99 via 192.168.7.1", AT_HOME[1]), (TAKEN, TAKEN)),
        ("", [OFFLINE], AT_HOME, (STAYS, STAYS)),
        ("", [OFFLINE, TRAIN], IN_TRAIN, (TAKEN, TAKEN)),
        ("", [NO_DEFAULT], AT_HOME, (TAKEN, TAKEN)),
        ("", [DOCKER], AT_HOME, (STAYS, STAYS)),  # that is no network to be in
        ("", [TRAIN4], (IN_TRAIN[0], "- via -"), (TAKEN, WITHDRAWN)),
        ("", [TRAIN4, TRAIN], IN_TRAIN, (TAKEN, TAKEN)),
        ("", [TUNNEL], ("10.8.0.2 via 192.168.7.1", AT_HOME[1]), (TAKEN, TAKEN)),
        ("", [TUNNEL, HOME], AT_HOME, (TAKEN, TAKEN)),
        ("--follow routes", [TRAIN], ("192.168.7.20 via 10.9.0.1", "2001:db8:7::20 via fe80::9"), (TAKEN, TAKEN)),
        ("-a 172.16.0.5/24", [TRAIN], ("172.16.0.5 via 10.9.0.1", IN_TRAIN[1]), (TAKEN, TAKEN)),
        ("-g 192.168.7.9", [TRAIN], ("10.9.0.20 via 192.168.7.9", IN_TRAIN[1]), (TAKEN, TAKEN)),
        ("-i eth0", [WIFI], AT_HOME, (STAYS, STAYS)),
        ("-i eth0", [replace(WIFI, links=(LO, ETH1))], AT_HOME, (STAYS, STAYS)),  # it is gone
        ("-a 2001:db8:5::5", [TRAIN4], (IN_TRAIN[0], "2001:db8:5::5 via fe80::7"), (TAKEN, STAYS)),
        ("--outbound-if4 eth0", [WIFI], AT_HOME, (STAYS, STAYS)),
    ],
)  # fmt: skip
def test_from_home(options: str, hosts: list[Host], expected: tuple[str, str], verdicts: tuple[str, str]) -> None:
    guest = Guest(options).goes(*hosts)
    assert (guest.has, guest.view.verdicts) == (expected, verdicts)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ([OFFLINE], LOCAL),
        ([HOME], AT_HOME),
        ([HOME4], (AT_HOME[0], LOCAL[1])),
        ([HOME4, HOME], AT_HOME),
        ([NO_DEFAULT], ("192.168.7.20 via 169.254.2.2", "2001:db8:7::20 via fe80::1")),
        ([NO_DEFAULT, HOME], AT_HOME),
    ],
)
def test_from_local_mode(hosts: list[Host], expected: tuple[str, str]) -> None:
    assert Guest(start=OFFLINE).goes(*hosts).has == expected


@pytest.mark.parametrize(
    ("start", "hosts", "expected"),
    [
        (ONLY_TUNNEL, [], ("10.8.0.2 via 169.254.2.2", "fd08::2 via fe80::1")),
        (ONLY_TUNNEL, [HOME], AT_HOME),
        (ONLY_TUNNEL, [HOME, ONLY_TUNNEL], ("10.8.0.2 via 192.168.7.1", "fd08::2 via fe80::7")),
        (OFFLINE, [ONLY_TUNNEL], ("10.8.0.2 via 169.254.2.2", "fd08::2 via fe80::1")),
        (NO_DEFAULT, [ONLY_TUNNEL], ("10.8.0.2 via 169.254.2.2", "fd08::2 via fe80::1")),
        (HOME, [TRAIN4, ONLY_TUNNEL], ("10.8.0.2 via 10.9.0.1", "fd08::2 via fe80::1")),
    ],
)
def test_a_machine_always_has_a_gateway_in_a_tunnel(start: Host, hosts: list[Host], expected: tuple[str, str]) -> None:
    guest = Guest(start=start, mode=PASST).goes(*hosts)
    assert (guest.has, guest.config.no_dhcp) == (expected, False)
    assert guest.config.ip4 and guest.config.ip6
    mapped = guest.config.ip4.map_host_loopback, guest.config.ip6.map_host_loopback
    assert mapped == (guest.config.ip4.gateway, guest.config.ip6.gateway)
    assert guest.config.ip6.our_ll == guest.config.ip6.gateway


@pytest.mark.parametrize(
    ("options", "now", "has", "lost"),
    [
        ("", HOME, {False, True}, set()),
        ("", OFFLINE, set(), set()),
        ("", DOCKER, set(), set()),
        ("", TRAIN4, {False}, {True}),
        ("", TRAIN6, {True}, {False}),
        ("", LINK6, {True}, set()),  # without a default route, IPv6 does not tell that the host is online
        ("-a 2001:db8:5::5", TRAIN4, {False}, {True}),
        ("-i eth0", WIFI, set(), set()),
        ("-4", TRAIN4, {False, True}, set()),  # a family that is off has nothing to lose
    ],
)
def test_a_family_is_lost_where_the_host_is_online_without_it(
    options: str, now: Host, has: set[bool], lost: set[bool]
) -> None:
    assert settled(Guest(options).goes(now).view, now) == (has, lost)


def test_nothing_changes_while_nothing_changes() -> None:
    guest = Guest("--config-net")
    before = guest.view
    assert guest.goes(HOME, HOME).view == before
    guest.config = replace(guest.config, mtu=1400, forwards=())  # by a machine, and by pesto
    assert guest.goes(HOME).config == replace(before.decision.config, mtu=1400, forwards=())


def test_the_plan_of_the_namespace() -> None:
    guest = Guest("--config-net")
    assert guest.planned() == (["192.168.7.20", "2001:db8:7::20"], ["default via 192.168.7.1", "default via fe80::7"])
    guest.goes(OFFLINE)
    assert guest.planned() == (["192.168.7.20", "2001:db8:7::20"], ["default via 192.168.7.1", "default via fe80::7"])
    assert guest.goes(WIFI).planned()[0] == ["10.9.0.20", "2001:db8:9::20"]
    plan = guest.view.decision.plan
    assert plan is not None
    assert plan.ifname == "eth0", "the interface keeps its name"
    assert guest.goes(TRAIN4).planned() == (["10.9.0.20"], ["default via 10.9.0.1"])
    assert guest.goes(TUNNEL).planned()[1] == ["default", "default via fe80::7"]


def test_a_guest_keeps_a_default_route_to_the_gateway_that_it_keeps() -> None:
    assert Guest("--config-net", OFFLINE).goes(NO_DEFAULT).planned()[1] == [
        "default via 169.254.2.2",
        "default via fe80::1",
    ]


def test_routes_alone() -> None:
    guest = Guest("--config-net --follow routes").goes(TRAIN)
    assert guest.planned() == (["192.168.7.20", "2001:db8:7::20"], ["default via 10.9.0.1", "default via fe80::9"])
    assert guest.config.ip4 and guest.config.ip6
    assert (guest.config.ip4.host_addr, guest.config.ip6.host_addr) == (ip("10.9.0.20"), ip("2001:db8:9::20"))
    guest.goes(HOME)
    assert guest.config.ip4.host_addr is None


def test_a_machine_has_no_plan() -> None:
    guest = Guest(mode=PASST).goes(TRAIN)
    assert (guest.has, guest.view.decision.plan) == (IN_TRAIN, None)
    assert not guest.goes(TUNNEL).config.no_dhcp, "there is a gateway to be told"


def test_renamed_interface_is_known_by_its_index() -> None:
    wan = Link(2, "wan0", ETH0.mac, 1500)
    renamed = replace(TRAIN, links=(LO, wan, ETH1))
    for options in ("-i eth0", "--outbound-if4 eth0", ""):
        guest = Guest(options).goes(renamed)
        assert guest.has == IN_TRAIN, options
        assert guest.view.template(False) == wan
    assert Guest("--outbound-if4 eth0").goes(renamed).config.ip4.if_out == "wan0"  # type: ignore[union-attr]
    other = replace(TRAIN, links=(LO, replace(wan, mac=bytes.fromhex("020000000099")), ETH1))
    assert Guest("-i eth0").goes(other).has == AT_HOME, "another interface got the index"


def test_names_are_those_of_the_new_network_and_forwarded_addresses_stay() -> None:
    stub = ResolvConf((ip("127.0.0.53"),))
    options = conf_argv.parse(["true"])
    view = View(decide(options, HOME, stub))
    assert view.decision.config.ip4 and view.decision.config.ip4.dns == (ip("192.168.7.1"),)
    config = follow(options, view, view.decision.config, TRAIN, stub).decision.config
    assert config.ip4 and config.ip4.dns == (ip("10.9.0.1"),)
    assert {ip("10.9.0.1"), ip("192.168.7.1")} <= set(config.dns_match), "the guest may go on to ask there"


def test_mapped_loopback_moves_with_the_gateway_unless_it_is_fixed() -> None:
    config = Guest().goes(TRAIN).config
    assert config.ip4 and config.ip4.map_host_loopback == ip("10.9.0.1")
    config = Guest("--map-host-loopback 169.254.1.1").goes(TRAIN).config
    assert config.ip4 and config.ip4.map_host_loopback == ip("169.254.1.1")
    config = Guest("--map-host-loopback none").goes(TUNNEL).config
    assert config.ip4 and config.ip4.map_host_loopback is None


@pytest.mark.parametrize(
    ("hosts", "text"),
    [
        ([HOME], "IPv4 192.168.7.20/24 via 192.168.7.1 (eth0: the default route); "
                 "IPv6 2001:db8:7::20/64 via fe80::7 (eth0: the default route)"),
        ([OFFLINE], "IPv4 192.168.7.20/24 via 192.168.7.1 stays (no interface has a usable route); "
                    "IPv6 2001:db8:7::20/64 via fe80::7 stays (no interface has a usable route)"),
        ([TRAIN4], "IPv4 10.9.0.20/24 via 10.9.0.1 (eth0: the default route); "
                   "IPv6 is withdrawn (no interface has a usable route)"),
    ],
)  # fmt: skip
def test_description(hosts: list[Host], text: str) -> None:
    assert Guest().goes(*hosts).view.describe() == text


def test_description_of_local_mode() -> None:
    text = Guest(start=OFFLINE).view.describe()
    assert text == "IPv4 169.254.2.1/16 via 169.254.2.2 (local mode); IPv6 no address via fe80::1 (local mode)"


def test_wanted() -> None:
    assert wanted(Options())
    assert not wanted(Options(follow="off")) and not wanted(Options(splice_only=True))


NETWORKS = st.sampled_from([OFFLINE, HOME, TRAIN, WIFI, HOME4, TRAIN4, RENEWED, NO_DEFAULT, DOCKER, TUNNEL])
LINES = st.sampled_from(["", "--config-net", "--follow routes", "-i eth0", "-4", "-a 10.0.0.5 -g 10.0.0.1", "-6"])


@given(LINES, NETWORKS, st.lists(NETWORKS, max_size=6))
def test_any_journey(line: str, start: Host, journey: list[Host]) -> None:
    """A family stays a family, what the user fixed stays, and coming home is to have what one has at home."""
    if line == "-i eth0" and start in (OFFLINE, WIFI, DOCKER):
        return  # it cannot start so
    guest = Guest(line, start)
    on = guest.config.ip4 is not None, guest.config.ip6 is not None
    guest.goes(*journey)
    assert (guest.config.ip4 is not None, guest.config.ip6 is not None) == on
    guest.goes(HOME)
    assert guest.view.verdicts == (TAKEN, TAKEN)
    if "routes" not in line:
        at_home = Guest(line, HOME)
        assert replace(guest.config, dns_match=()) == replace(at_home.config, dns_match=())
        assert guest.view.decision.plan == replace(
            at_home.view.decision.plan,
            ifname=guest.view.decision.plan.ifname,  # type: ignore[type-var, union-attr]
        )


# Forwarded ports ---------------------------------------------------------------------------------------------------


def rule(address: str | None) -> Rule:
    return Rule("-t", PROTO_TCP, False, 80, 80, 80, None if address is None else ip(address))


def follows(rules: list[Rule], *hosts: Host) -> list[str | None]:
    """The addresses that rules listen on, from network to network."""
    homes: dict[bytes, tuple[int, bool]] = {}
    note_homes(rules, homes, hosts[0])
    for now in hosts[1:]:
        changed = moved(rules, homes, now)
        rules = [changed.get(one, one) for one in rules]
        note_homes(rules, homes, now)
    return [addr.text(one.addr) if one.addr else None for one in rules]


@pytest.mark.parametrize(
    ("address", "hosts", "expected"),
    [
        ("192.168.7.20", [HOME, TRAIN], "10.9.0.20"),
        ("192.168.7.20", [HOME, OFFLINE, TRAIN, OFFLINE, HOME], "192.168.7.20"),
        ("192.168.7.20", [HOME, WIFI], "10.9.0.20"),  # that of the interface that took its place
        ("192.168.7.20", [HOME, TUNNEL], "192.168.7.20"),  # it is there
        ("2001:db8:7::20", [HOME, TRAIN], "2001:db8:9::20"),
        ("2001:db8:7::20", [HOME, TRAIN4, TRAIN], "2001:db8:9::20"),
        ("203.0.113.9", [HOME, TRAIN], "203.0.113.9"),  # that of no interface (--freebind)
        ("172.17.0.1", [DOCKER, HOME], "172.17.0.1"),
        (None, [HOME, TRAIN], None),
    ],
)
def test_ports_follow_their_address(address: str | None, hosts: list[Host], expected: str | None) -> None:
    assert follows([rule(address)], *hosts) == [expected]


def test_an_address_of_no_rule_is_forgotten() -> None:
    homes: dict[bytes, tuple[int, bool]] = {}
    note_homes([rule("192.168.7.20")], homes, HOME)
    assert homes == {ip("192.168.7.20"): (2, True)}
    note_homes([], homes, HOME)
    assert homes == {}
