"""The command line of slirp4netns: what each option means here, its errors, and what it prints."""

from __future__ import annotations

import os
from typing import Any

import pytest

from passt import __version__, addr, cli
from passt.conf import slirp4netns
from passt.conf.actions import Done, Pair
from passt.conf.options import Options
from passt.linux import stdio
from passt.log import WARNING, Fatal
from passt.policy.config import PASST, PASTA


def packed(*texts: str) -> tuple[bytes, ...]:
    return tuple(addr.packed(text) for text in texts)


BASE: dict[str, Any] = {
    "mode": PASTA,
    "slirp4netns": True,
    "level": WARNING,
    "foreground": True,
    "pid": 1234,
    "netns_quit": False,
    "ns_ifname": "tap0",
    "address": Pair(*packed("10.0.2.100", "fd00::100")),
    "gateway": Pair(*packed("10.0.2.2", "fd00::2")),
    "prefix_len": Pair(24, 64),
    "use": Pair(True, False),
    "mtu": 1500,
    "dns": packed("10.0.2.3"),
    "dns_forward": packed("10.0.2.3"),
    "dhcp_dns": True,
    "search_none": True,
}
CONFIGURED = {"config_net": True, "no_ra": True}
NO_DNS = {"dns": (), "dns_forward": (), "dns_none": True, "dhcp_dns": False}
BOTH = packed("10.0.2.3", "fd00::3")
BESS = {"mode": PASST, "pid": None, "netns_quit": True, "ns_ifname": None, "packets": True, "one_off": True}

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("1234", {}),
    ("1234 tap7", {"ns_ifname": "tap7"}),
    ("-c 1234 tap0", CONFIGURED),
    ("1234 tap0 --configure", CONFIGURED),
    ("1234 -m65520 tap0", {"mtu": 65520}),
    ("--mtu=65521 1234", {"mtu": 65521}),
    ("-6 1234", {"use": Pair(True, True), "dns": BOTH, "dns_forward": BOTH}),
    ("--disable-dns 1234", NO_DNS),
    ("--disable-host-loopback 1234", {"map_gw": False}),
    ("--enable-sandbox --enable-seccomp 1234", {}),
    ("-c --macaddress 02:00:00:00:00:01 1234", {**CONFIGURED, "ns_mac": bytes((2, 0, 0, 0, 0, 1))}),
    ("-a /tmp/api 1234", {"api_socket": "/tmp/api"}),
    ("-e 3 -r 4 1234", {"exit_fd": 3, "ready_fd": 4}),
    ("--userns-path=/proc/self/ns/user 1234", {"userns": "/proc/self/ns/user"}),
    ("--netns-type=path /proc/self/ns/net tap0", {"pid": None, "netns": "/proc/self/ns/net"}),
    ("--netns-type=pid 1234", {}),
    ("--target-type=netns 1234", {}),
    ("--outbound-addr=192.0.2.1 1234", {"outbound": Pair(addr.packed("192.0.2.1"), None)}),
    ("--outbound-addr=eth0 1234", {"outbound_if": Pair("eth0", None)}),
    ("--outbound-addr6=2001:db8::1 1234", {"outbound": Pair(None, addr.packed("2001:db8::1"))}),
    ("--outbound-addr6=eth0 1234", {"outbound_if": Pair(None, "eth0")}),
    (
        "--cidr=10.1.0.0/16 1234",
        {
            "address": Pair(*packed("10.1.0.100", "fd00::100")),
            "gateway": Pair(*packed("10.1.0.2", "fd00::2")),
            "prefix_len": Pair(16, 64),
            "dns": packed("10.1.0.3"),
            "dns_forward": packed("10.1.0.3"),
        },
    ),
    ("--target-type=bess /tmp/bess", {**BESS, "socket_path": "/tmp/bess"}),
]


@pytest.mark.parametrize(("line", "differs"), GOOD, ids=[line for line, _ in GOOD])
def test_means(line: str, differs: dict[str, Any]) -> None:
    assert slirp4netns.parse(line.split()) == Options(**{**BASE, **differs})


BAD = [
    ("", "slirp4netns: PID or PATH is missing: see slirp4netns --help"),
    ("abc", "PID must be a positive integer, not abc"),
    ("0", "PID must be a positive integer, not 0"),
    ("99999999999999", "PID must be a positive integer, not 99999999999999"),
    ("1234 tap0 more", "too many arguments: more"),
    ("1234 much-too-long-name", "Invalid interface name: much-too-long-name "),
    ("--bogus 1234", "slirp4netns: unrecognized option '--bogus'"),
    ("--mtu 0 1234", "MTU must be a positive integer (< 65522)"),
    ("--mtu 65522 1234", "MTU must be a positive integer (< 65522)"),
    ("--mtu x 1234", "MTU must be a positive integer (< 65522)"),
    ("--mtu 10 1234", "Invalid MTU: 10 "),
    ("--cidr foo 1234", "invalid CIDR: foo"),
    ("--cidr 10.0.2.0 1234", "invalid CIDR: 10.0.2.0"),
    ("--cidr fd00::/64 1234", "invalid CIDR: fd00::/64"),
    ("--cidr 10.0.2.0/26 1234", "prefix length needs to be 1-25"),
    ("--cidr 10.0.2.0/0 1234", "prefix length needs to be 1-25"),
    ("--cidr 10.0.2.100/24 1234", "CIDR needs to be a network address like 10.0.2.0/24, not like 10.0.2.100/24"),
    ("-e x 1234", "Invalid --exit-fd: x "),
    ("-r -1 1234", "Invalid --ready-fd: -1 "),
    ("--macaddress=02:00:00:00:00:01 1234", "--macaddress cannot be specified when --configure"),
    ("-c --macaddress=zz 1234", "Invalid MAC address: zz "),
    ("-c --macaddress=03:00:00:00:00:01 1234", "Invalid MAC address: 03:00:00:00:00:01 "),
    ("--netns-type=foo 1234", "--netns-type must be either path or pid, not foo"),
    ("--netns-type=path /nowhere tap0", "existing path expected when --netns-type=path: there is no /nowhere"),
    ("--userns-path=/nowhere 1234", "userns path doesn't exist: /nowhere"),
    ("--outbound-addr=2001:db8::1 1234", "--outbound-addr has to be a valid IPv4 address or the name of an interface"),
    ("--outbound-addr6=192.0.2.1 1234", "--outbound-addr6 has to be a valid IPv6 address or the name of an interface"),
    ("--target-type=foo 1234", "--target-type must be either netns or bess, not foo"),
    ("--target-type=bess -c /tmp/b", "--configure conflicts with --target-type=bess"),
    ("--target-type=bess --netns-type=pid /tmp/b", "--netns-type conflicts with --target-type=bess"),
    ("--target-type=bess --userns-path=/x /tmp/b", "--userns-path conflicts with --target-type=bess"),
]


@pytest.mark.parametrize(("line", "said"), BAD, ids=[line for line, _ in BAD])
def test_refuses(line: str, said: str) -> None:
    with pytest.raises(Fatal) as e:
        slirp4netns.parse(line.split())
    assert str(e.value).startswith(said)


# podman, rootlesskit and the scripts of Docker and nerdctl look for these in --help
SOUGHT = [
    *("--disable-host-loopback", "--mtu", "--enable-sandbox", "--enable-seccomp", "--cidr", "--enable-ipv6"),
    *("--outbound-addr", "--outbound-addr6", "--netns-type", "--api-socket", "--userns-path", "--disable-dns"),
    *("--ready-fd", "--exit-fd", "--configure", "--macaddress", "--target-type"),
]


@pytest.mark.parametrize("option", SOUGHT)
def test_help_has_what_programs_look_for(option: str) -> None:
    with pytest.raises(Done) as e:
        slirp4netns.parse(["--help"])
    assert option in str(e.value).replace(",", " ").split() and e.value.status == 0


@pytest.mark.parametrize("option", ["-v", "--version"])
def test_version(option: str) -> None:
    with pytest.raises(Done) as e:
        slirp4netns.parse([option])
    first, second, _ = str(e.value).splitlines()
    assert (first, second) == ("slirp4netns version 1.2.0", f"pasta: {__version__}")


def test_what_it_prints_when_it_starts() -> None:
    assert slirp4netns.started(slirp4netns.parse(["-c", "-a", "/tmp/api", "1234"])) == (
        "Starting slirp\n"
        "* MTU:             1500\n"
        "* Network:         10.0.2.0\n"
        "* Netmask:         255.255.255.0\n"
        "* Gateway:         10.0.2.2\n"
        "* DNS:             10.0.2.3\n"
        "* Recommended IP:  10.0.2.100\n"
        "* API Socket:      /tmp/api\n"
        "WARNING: 127.0.0.1:* on the host is accessible as 10.0.2.2 "
        "(set --disable-host-loopback to prohibit connecting to 127.0.0.1:*)\n"
    )
    line = "--disable-dns --disable-host-loopback --cidr 192.168.0.0/25 1234"
    assert slirp4netns.started(slirp4netns.parse(line.split())) == (
        "Starting slirp\n"
        "* MTU:             1500\n"
        "* Network:         192.168.0.0\n"
        "* Netmask:         255.255.255.128\n"
        "* Gateway:         192.168.0.2\n"
        "* Recommended IP:  192.168.0.100\n"
    )


def test_it_starts_without_a_reader_of_its_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> None:
        raise stdio.ReaderGone

    monkeypatch.setattr(stdio, "write_out", gone)
    assert cli._parse("slirp4netns", ["--netns-type=path", f"/proc/{os.getpid()}/ns/net"]).slirp4netns
