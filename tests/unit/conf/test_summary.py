"""Every line of the summary at start."""

from __future__ import annotations

from dataclasses import replace

import pytest

from passt.conf import argv as conf_argv
from passt.conf.resolv_conf import ResolvConf
from passt.conf.summary import describe, describe_client, describe_ports, describe_socket
from passt.linux.routes import Host
from passt.policy.config import PASST
from tests.unit.conf.test_decide import HOST, LO, given_host, guest_of, ip, remarks

NO_PORTS = "-t none -u none -T none -U none"
HOST4 = [
    "MAC:",
    "    host: 9a:55:9a:55:9a:55",
    "DHCP:",
    "    assign: 192.0.2.2",
    "    mask: 255.255.255.0",
    "    router: 192.0.2.1",
]


def test_virtual_machine() -> None:
    d = guest_of("-4 -t 2222:22 -S a.example")
    assert [describe_socket("/tmp/s"), *describe(d), *describe_client("/tmp/s")] == [
        "UNIX domain socket bound at /tmp/s",
        "Template interface: eth0 (IPv4)",
        "    IPv4: the default route",
        "Addresses in the guest:",
        "    192.0.2.2: the guest itself",
        "    192.0.2.1: 127.0.0.1 of the host",
        *HOST4,
        "DNS:",
        "    192.0.2.53",
        "DNS search list:",
        "    a.example",
        "Port forwarding:",
        "    host to guest, TCP: 2222 -> 22",
        "",
        "You can now start qemu (>= 7.2):",
        "    kvm ... -device virtio-net-pci,netdev=s -netdev stream,id=s,server=off,addr.type=unix,addr.path=/tmp/s",
    ]


def test_namespace() -> None:
    line = "-o 192.0.2.3 --outbound-if4 eth0 -S a.example -t 8080:80 --map-guest-addr 169.254.1.2"
    assert list(describe(given_host(line))) == [
        "Template interface: eth0 (IPv4), eth0 (IPv6)",
        "    IPv4: given by --outbound-if4",
        "    IPv6: the default route",
        "Outbound interface: eth0 (IPv4)",
        "Outbound address: 192.0.2.3",
        "Namespace interface: eth0",
        "Addresses in the namespace:",
        "    192.0.2.2: the namespace itself",
        "    169.254.1.2: 192.0.2.2 of the host",
        "    192.0.2.1: 127.0.0.1 of the host",
        "    2001:db8::2: the namespace itself",
        "    2001:db8::1: ::1 of the host",
        *HOST4,
        "NDP/DHCPv6:",
        "    assign: 2001:db8::2",
        "    router: 2001:db8::1",
        "    our link-local: fe80::2",
        "DNS (not told by DHCP and NDP: --dhcp-dns):",
        "    192.0.2.53",
        "    2001:db8::53",
        "DNS search list (not told: --dhcp-search):",
        "    a.example",
        "Port forwarding:",
        "    host to namespace, TCP: 8080 -> 80",
        "    host to namespace, UDP: auto (those bound in the namespace)",
        "    namespace to host, TCP: auto (those bound on the host)",
        "    namespace to host, UDP: auto (those bound on the host)",
    ]


def test_podman() -> None:
    """The addresses by which a container reaches the resolver and the host."""
    line = f"--dns-forward 169.254.1.1 --map-guest-addr 169.254.1.2 --no-map-gw {NO_PORTS} -4"
    lines = list(describe(given_host(line, resolvers=ResolvConf((ip("127.0.0.53"),), ()))))
    at = lines.index("Addresses in the namespace:")
    assert lines[at : at + 5] == [
        "Addresses in the namespace:",
        "    192.0.2.2: the namespace itself",
        "    169.254.1.2: 192.0.2.2 of the host",
        "    169.254.1.1, for queries (ports 53, 853): 127.0.0.53",
        "    none: 127.0.0.1 of the host (--map-host-loopback gives it one)",
    ]
    assert lines[-1] == "Port forwarding: none"


def test_local_mode() -> None:
    d = given_host(f"-4 {NO_PORTS}", Host((LO,)), ResolvConf())
    assert not any(line.startswith("Template") for line in describe(d))
    assert "    169.254.2.2: 127.0.0.1 of the host" in list(describe(d))
    assert remarks(d)[0] == (
        "IPv4: no external interface as template (no interface has a usable route), using local mode"
    )


def test_queries_that_nobody_answers() -> None:
    lines = describe(given_host("-4 --dns-forward 192.0.2.9", resolvers=ResolvConf()))
    assert "    192.0.2.9, for queries (ports 53, 853): no resolver, as none is known" in list(lines)


def test_splice_only() -> None:
    """There is no interface, hence no address and no service."""
    assert list(describe(given_host("--splice-only -t none -u none -T 5432 -U none"))) == [
        "Port forwarding:",
        "    namespace to host, TCP: 5432",
    ]


def test_names_of_the_services_that_are_on() -> None:
    def heads(line: str) -> list[str]:
        decision = given_host(f"{line} {NO_PORTS}", resolvers=ResolvConf())
        return [text for text in describe(decision) if text.endswith(":")][1:]

    assert heads("--no-dhcp --no-ndp") == ["MAC:", "DHCPv6:"]
    assert heads("--no-dhcpv6 -6") == ["MAC:", "NDP:"]
    assert heads("--no-dhcp --no-ndp --no-dhcpv6") == ["MAC:"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("-i eth1", "given by --interface"),
        ("--outbound-if4 eth1", "given by --outbound-if4"),
        ("", "the default route"),
    ],
)
def test_why_that_interface(line: str, why: str) -> None:
    assert given_host(f"-4 {line}").why4 == why


def test_interface_without_address() -> None:
    d = given_host("", replace(HOST, addresses=HOST.addresses[:3]))
    assert (d.template6, d.why6) == (None, "eth0 has no usable address")


@pytest.mark.parametrize(
    ("line", "remark"),
    [
        ("-4 -a 2001:db8::9 -g fe80::1", "IPv6 is off: no use for 2001:db8::9, fe80::1"),
        ("-6 --outbound-if4 eth0 -D 192.0.2.9", "IPv4 is off: no use for eth0, 192.0.2.9"),
        ("-6 --map-host-loopback none", None),
        ("-4 -a 192.0.2.9", None),
    ],
)
def test_what_is_said_for_nothing(line: str, remark: str | None) -> None:
    assert [text for text in remarks(given_host(line)) if "no use" in text] == ([remark] if remark else [])


# Ports -------------------------------------------------------------------------------------------------------------


def ports(line: str, mode: str = "pasta") -> list[str]:
    guest = "guest" if mode == PASST else "namespace"
    return list(describe_ports(conf_argv.parse(line.split(), mode).forwards, guest))


def test_ports() -> None:
    line = "-t 127.0.0.1/80,81-82:91-92 -t %eth0/90 -t */95:[2001:db8::1]/96 -u auto,~53 -T 6443:192.0.2.1/6443 -U none"
    assert ports(line) == [
        "Port forwarding:",
        "    host to namespace, TCP: 127.0.0.1/80, 127.0.0.1/81-82 -> 91-92, *%eth0/90, 95 -> 2001:db8::1 96",
        "    host to namespace, UDP: auto 1-52, auto 54-65535 (those bound in the namespace)",
        "    namespace to host, TCP: 6443 -> 192.0.2.1",
    ]
    assert ports("-t 22", PASST) == ["Port forwarding:", "    host to guest, TCP: 22"]
    assert ports("", PASST) == ["Port forwarding: none"]


def test_many_ports_are_cut_short() -> None:
    lines = ports(f"-t {','.join(map(str, range(1000, 3000, 2)))} -u none -T none -U none")
    assert lines[1:] == ["    host to namespace, TCP: 1000, 1002, 1004, 1006, 1008, 1010, 1012, 1014, and 992 more"]
