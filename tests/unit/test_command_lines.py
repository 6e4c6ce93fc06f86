"""Command lines, valid and invalid, of users and of programs: exit status, standard output and error.

Everything is real up to where a daemon would begin, which only notes that it would.
"""

from __future__ import annotations

import shlex
import signal
from typing import NoReturn

import pytest

from passt import __version__, cli, log
from passt.conf.argv import Options
from passt.conf.table import usage
from passt.linux import stdio

PASTA_VERSION = f"pasta {__version__}\nIn pure Python. GPL-2.0-or-later; there is no warranty.\n"
PASST_VERSION = PASTA_VERSION.replace("pasta", "passt")
SLIRP4NETNS_VERSION = PASTA_VERSION.replace("pasta ", "slirp4netns version 1.2.0\npasta: ")
OPEN = [3, 5]  # inherited descriptors
IFNAME = "(1 to 15 characters, no blanks, '/', ':' or '%')"
ALTNAME = "(1 to 127 characters, no blanks, '/', ':' or '%')"
NETMASK = "(give 1 to 32 bits or a contiguous dotted mask)"
MTU = "(give 68 to 65535, or 0 to assign none)"
MAC = "(give six pairs of hexadecimal digits with colons between)"
TWICE = "give each a path of its own"
TAP = "needs the namespace of the tap device: give its PID or --netns beside --fd"
SOCKET = "pasta takes a PID, --netns or a command"
ONE_OFF = "pasta always ends with its command or namespace"
LOOPBACK = "a virtual machine reaches the host's loopback at the address of --map-host-loopback"

INFORMATION = [
    ("pasta --version", PASTA_VERSION),
    ("passt --version", PASST_VERSION),
    ("/usr/local/bin/passt --version", PASST_VERSION),
    ("passt.avx2 --version", PASST_VERSION),
    ("passt4netns --version", PASTA_VERSION),
    ("slirp4netns --version", SLIRP4NETNS_VERSION),
    ("/usr/bin/slirp4netns.python -v", SLIRP4NETNS_VERSION),
    ("pasta --help", usage("pasta")),
    ("passt -h", usage("passt")),
    ("pasta --host-lo-to-ns-lo --version", PASTA_VERSION),  # rootlesskit asks whether there is the option
    ("pasta --vers", PASTA_VERSION),
    ("pasta -t 80 -t none --version", PASTA_VERSION),  # what is wrong together is so at the end only
    ("pasta --version --no-such-option", PASTA_VERSION),
    ("passt --version extra", PASST_VERSION),
]

PODMAN = (
    "--dns-forward 169.254.1.1 -u none -T none -U none --no-map-gw --quiet --netns /run/n --map-guest-addr 169.254.1.2"
)
ROOTLESSKIT = (
    "--ns-ifname=tap0 --mtu=65520 --address=10.0.2.100 --netmask=24 --gateway=10.0.2.2 --dns-forward=10.0.2.3 "
    "--no-map-gw --ipv4-only --tcp-ports=auto --udp-ports=auto"
)
NSJAIL = "-f -q --no-dhcp --no-dhcpv6 --no-ra --config-net -t none -u none -T none -U none"
LIBGUESTFS = "--address 169.254.2.15 --netmask 16 --mac-addr 52:56:00:00:00:02 --gateway 169.254.2.2"
GOOD = [
    "pasta",
    "pasta 1234",
    "pasta -- 1234",  # nixpak
    "pasta -- -odd-command",
    "pasta --netns 1234",  # the script that stands for slirp4netns
    "pasta --netns blue --nsrun-dir /run/user/1000/netns",
    "pasta --config-net -- curl https://example.org --no-such-option-of-ours",
    "pasta ls --no-such-option-of-ours -m 1",
    f"pasta --config-net -t none {PODMAN}",
    f"pasta --config-net -t 80-80:80-80 {PODMAN}",
    f"pasta --config-net -t ::1/80-80:80-80 -t 127.0.0.1/81-83:81-83 {PODMAN}",
    f"pasta --config-net --ns-mac-addr 02:00:00:00:00:01 --ns-mac-addr 02:00:00:00:00:02 -t none {PODMAN}",
    f"pasta --config-net --pid /run/c.pid -c /run/pasta.sock -t none {PODMAN}",
    f"pasta --stderr --config-net {ROOTLESSKIT} --host-lo-to-ns-lo 1234",
    f"pasta --foreground --stderr --no-dhcp --no-ra {ROOTLESSKIT} --userns=/proc/1/ns/user --netns=/proc/1/root/run/n",
    f"pasta {NSJAIL} 1234",
    f"pasta {NSJAIL} --dhcp-dns --no-map-gw -a 10.1.1.2 -n 255.255.255.0 -g 10.1.1.1 -4 -I eth0 1234",
    f"pasta {NSJAIL} --splice-only 1234",
    "pasta -q --ipv4-only -a 10.0.2.0 -n 24 -g 10.0.2.2 --dns-forward 10.0.2.3 -m 1500 --no-ndp --no-dhcpv6 --no-dhcp "
    "-P /p --config-net --no-map-gw -I tap0 -t 8080:80 --netns 1234",
    "pasta --foreground --pid /proc/self/fd/1 --config-net --quiet --host-lo-to-ns-lo -T none -U none --netns /n "
    "--userns /u --no-map-gw -I app0 --map-host-loopback 10.0.0.1 --map-host-loopback fd00::1 -t 127.0.0.1/8080:80",
    "pasta --config-net --map-host-loopback none --map-guest-addr none true",
    "pasta -F 5",
    "pasta -F 5 --config-net --netns /run/n",
    "pasta -fqt22 -u%eth0/53-60,~54 -Tauto,~22 true",
    "pasta -t */80 -t [::1]/81 -t 127.0.0.1/auto,~80-81 -u auto,8000-9000 true",
    "pasta --no-splice true",
    "pasta -t6443:192.168.124.20/6443 true",
    "passt",
    "passt -f",
    "passt --one-off --socket /s --pid /p --interface eth42 --log-file /l --hostname h1 --fqdn h1.test --address "
    "172.17.2.0 --netmask 24 --address 2001:db8:ac10:fd01::feed --tcp-ports "
    "'2001:db8:ac10:fd01::1:10/22:2022,1000-1050,~1020,~1030-1040' --udp-ports "
    "'1.2.3.4%eth0/5000-5020:6000-6020,~5010-5015' --tcp-ports 80 --tcp-ports 443:344",
    "passt --socket /s --tcp-ports 192.0.2.1/all --udp-ports %eth0/all",
    f"passt --one-off --socket /s --pid /p {LIBGUESTFS}",
    "passt --quiet --pid /p --fd 3",
    "passt --quiet --search 'a.example b.example' --tcp-ports 22,8080:80 --pid /p --fd 3",
    "passt -t all -u all --no-dhcp-dns --no-map-gw --fd 3",
    "passt -4 -a 10.0.0.2 -g 10.0.0.1 -n 255.255.255.0 -m 1500 -t 22,8080 -H vm -M 02:00:00:00:00:01 --runas 0:0 "
    "-P /p -s /s -l /l -q",
    "passt --socket /s --repair-path none --foreground --no-map-gw --map-host-loopback none --map-guest-addr none "
    "-t none -u none --address 10.200.0.2/24 --gateway 10.200.0.1",
    "passt -s /s -D none -S none",
    "passt --log-size 0x100000 -l /l",
    "passt --stats 5,json",
]

BAD = [
    # the grammar: words of getopt_long, which podman looks for
    ("pasta --map-guest-address 1.2.3.4",
     "pasta: unrecognized option '--map-guest-address': did you mean --map-guest-addr? See pasta --help"),
    ("pasta --config-ent", "pasta: unrecognized option '--config-ent': did you mean --config-net? See pasta --help"),
    ("passt --no-such-option", "passt: unrecognized option '--no-such-option': see passt --help"),
    ("pasta --no-such=option", "pasta: unrecognized option '--no-such': see pasta --help"),
    ("pasta --no-such --version", "pasta: unrecognized option '--no-such': see pasta --help"),
    ("slirp4netns --no-such 1", "slirp4netns: unrecognized option '--no-such': see slirp4netns --help"),
    ("slirp4netns", "slirp4netns: PID or PATH is missing: see slirp4netns --help"),
    ("slirp4netns.python x", "PID must be a positive integer, not x"),
    ("pasta -x", "pasta: invalid option -- 'x': see pasta --help"),
    ("passt -qx", "passt: invalid option -- 'x': see passt --help"),
    ("pasta -q=5", "pasta: invalid option -- '=': see pasta --help"),
    ("pasta --no", "pasta: option '--no' is ambiguous; possibilities: '--no-splice' '--no-map-gw' '--no-dhcp-dns' "
     "'--no-dhcp-search' '--no-netns-quit' '--no-tcp' '--no-udp' '--no-multicast' '--no-icmp' '--no-dhcp' "
     "'--no-dhcpv6' '--no-ndp' '--no-ra' '--no-copy-routes' '--no-copy-addrs'"),
    ("pasta --mtu", "pasta: option '--mtu' requires an argument"),
    ("pasta -t", "pasta: option requires an argument -- 't'"),
    ("pasta --config-net=yes", "pasta: option '--config-net' doesn't allow an argument"),
    # the other mode's
    ("pasta -s /tmp/s", f"pasta: invalid option -- 's': -s (--socket) is for passt mode only: {SOCKET}"),
    ("pasta -1", f"pasta: invalid option -- '1': -1 (--one-off) is for passt mode only: {ONE_OFF}"),
    ("pasta --one-off", f"--one-off is for passt mode only: {ONE_OFF}"),
    ("pasta --no-dhcp-dns", "--no-dhcp-dns is for passt mode only: pasta tells none unless --dhcp-dns is given"),
    ("pasta --vhost-user", "--vhost-user is for passt mode only"),
    ("passt -T 22", f"passt: invalid option -- 'T': -T (--tcp-ns) is for pasta mode only: {LOOPBACK}"),
    ("passt --config-net", "--config-net is for pasta mode only: a virtual machine sets up its interface itself, by "
     "DHCP and router advertisements"),
    ("passt --netns /n", "--netns is for pasta mode only"),
    ("passt --splice-only", "--splice-only is for pasta mode only"),
    ("passt --dhcp-dns", "--dhcp-dns is for pasta mode only: passt tells them unless --no-dhcp-dns is given"),
    ("pasta --migrate-exit", "--migrate-exit is for passt mode only"),
    # operands
    ("passt extra", "Extra non-option argument: extra (passt takes options only)"),
    ("passt -f -- 1234", "Extra non-option argument: 1234 (passt takes options only)"),
    ("pasta 0", "Invalid PID 0 (1 to 2147483647)"),
    ("pasta 99999999999", "Invalid PID 99999999999 (1 to 2147483647)"),
    ("pasta --netns /n true", "Both --netns and PID or command given: leave one of them out"),
    ("pasta --nsrun-dir /n blue", "--nsrun-dir needs --netns NAME"),
    # values
    ("pasta -m 67 true", f"Invalid MTU: 67 {MTU}"),
    ("pasta -m 65536", f"Invalid MTU: 65536 {MTU}"),
    ("pasta -m 1500x", f"Invalid MTU: 1500x {MTU}"),
    ("pasta -m ''", f"Invalid MTU:  {MTU}"),
    ("passt -a 300.0.0.1", "Invalid address: 300.0.0.1 (not an IPv4 or IPv6 address)"),
    ("passt -a 127.0.0.1", "Invalid address: 127.0.0.1 (is loopback)"),
    ("passt -a ::ffff:192.0.2.1", "Invalid address: ::ffff:192.0.2.1 (is IPv4-mapped)"),
    ("passt -a 192.0.2.1/33", "Invalid address: 192.0.2.1/33 (the prefix length is 1 to 32, or 0 for the default)"),
    ("passt -n 255.0.255.0", f"Invalid netmask: 255.0.255.0 {NETMASK}"),
    ("passt -n 33", f"Invalid netmask: 33 {NETMASK}"),
    ("passt -M 52-54-00-12-34-56", f"Invalid MAC address: 52-54-00-12-34-56 {MAC}"),
    ("pasta --ns-mac-addr 33:00:00:00:00:01",
     "Invalid MAC address: 33:00:00:00:00:01 (an interface needs a unicast address)"),
    ("passt -g 0.0.0.0", "Invalid gateway address: 0.0.0.0 (is unspecified)"),
    (f"passt -i {'n' * 128}", f"Invalid interface name: {'n' * 128} {ALTNAME}"),
    ("pasta -I a-very-long-name", f"Invalid interface name: a-very-long-name {IFNAME}"),
    ("pasta -I ''", f"Invalid interface name:  {IFNAME}"),
    ("passt -o nowhere", "Invalid outbound address: nowhere (not an IPv4 or IPv6 address)"),
    ("passt -D localhost", "Cannot use DNS address localhost (not an IPv4 or IPv6 address)"),
    ("passt -S a -S b -S c -S d -S e -S f -S g", "Cannot use DNS search domain g (at most 6)"),
    ("passt --map-host-loopback 127.0.0.1", "Invalid address to remap to host: 127.0.0.1 (is loopback)"),
    ("passt --fqdn a..b",
     "Invalid FQDN: a..b (labels of 1 to 63 letters, digits and inner hyphens, 253 characters in all)"),
    ("passt --log-size 4096", "Invalid --log-size: 4096 (give 40960 to 2147483647 bytes)"),
    ("passt --stats 0", "Invalid --stats: 0 (give 0.1 to 86400 seconds, and ',json' if wanted)"),
    ("passt --runas a:b:c", "Invalid --runas option: a:b:c (give UID, UID:GID, LOGIN or LOGIN:GROUP)"),
    ("passt -P ''", "Invalid --pid: an empty file name (give a path)"),
    (f"passt -s {'s' * 108}", f"Invalid socket path: {'s' * 108} (1 to 107 bytes)"),
    ("passt --completion tcsh", "Invalid --completion: tcsh (give bash, zsh or fish)"),
    ("passt -F -1", "Invalid --fd: -1 (give the number of an open descriptor)"),
    ("passt -F 4", "Invalid --fd: 4 (it is not open)"),
    ("pasta -F 4 1234", "Invalid --fd: 4 (it is not open)"),
    # ports
    ("pasta -t 99999 true", "Invalid port specifier -t 99999: '99999' at character 1: the last port is 65535"),
    ("pasta -t 80-70 true", "Invalid port specifier -t 80-70: '70' at character 4: the range ends before it begins"),
    ("passt -t 80-90:100-105", "Invalid port specifier -t 80-90:100-105: '100-105' at character 7: the ranges have "
     "different lengths, 11 and 6 ports (did you mean 100-110?)"),
    ("pasta -T 127.0.0.1/80", "Invalid port specifier -T 127.0.0.1/80: '127.0.0.1' at character 1: -T and -U listen on "
     "the loopback of the namespace: leave out address and interface"),
    ("passt -t auto",
     "'auto' port forwarding is only allowed for pasta: -t auto: 'auto' at character 1: give ports, or 'all'"),
    ("pasta -t 22 -t none", "Port forwarding mode 'none' conflicts with previous mode: '-t 22' and '-t none': "
     "leave one out"),
    ("pasta -t8080 -t none", "Port forwarding mode 'none' conflicts with previous mode: '-t 8080' and '-t none': "
     "leave one out"),
    ("pasta -t all -t 80", "Specific ports cannot be specified together with all/none/auto: '-t all' and '-t 80': "
     "leave one out"),
    ("pasta -t ~1-10,~5", "Overlapping excluded ranges -t ~1-10,~5: '~5' at character 7: port 5 is in '~1-10', too: "
     "leave out one of them"),
    ("pasta --no-tcp -t 80", "TCP port forwarding requested but TCP is disabled: -t 80 (and --no-tcp)"),
    # together
    ("pasta --no-copy-routes", "--no-copy-routes needs --config-net"),
    ("pasta --no-splice --splice-only", "Both --splice-only and --no-splice given: leave one of them out"),
    ("passt -s /a -c /a", f"Both --socket and --conf-path are /a: {TWICE}"),
    ("passt -s /a --api-socket /b/../a", f"Both --socket and --api-socket are /a: {TWICE}"),
    ("pasta -c /a -P /a", f"Both --conf-path and --pid are /a: {TWICE}"),
    ("pasta -F 5 true",
     "Both --fd and a command given: the command would not be in the namespace of that tap device"),
    ("pasta -F 5 --config-net", f"--config-net {TAP}"),
    ("pasta -F 5 -T 22", f"-T 22 {TAP}"),
]  # fmt: skip


class Begun(Exception):
    """A daemon would begin."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """The arguments that a daemon would have started with."""
    begun: list[Options] = []

    def begin(options: Options, *_: object) -> NoReturn:
        begun.append(options)
        raise Begun

    monkeypatch.setattr(stdio, "fill", lambda: None)
    monkeypatch.setattr(cli, "inherited_fds", lambda: OPEN)
    monkeypatch.setattr(cli, "_want_random_hashes", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(log, "setup", lambda *_, **__: None)
    monkeypatch.setattr(log, "_stderr", None)  # and whatever it was afterwards
    monkeypatch.setattr("passt.daemon.pasta.run", begin)
    monkeypatch.setattr("passt.daemon.passt.run", begin)
    return begun


def run(line: str) -> int:
    """Its exit status; 0 for a daemon, too."""
    log.start_stderr()
    try:
        return cli.main(shlex.split(line))
    except Begun:
        return 0


def test_they_are_many_and_each_is_another() -> None:
    lines = [line for line, _ in INFORMATION] + GOOD + [line for line, _ in BAD]
    assert len(set(lines)) == len(lines) >= 80


@pytest.mark.parametrize(("line", "text"), INFORMATION)
def test_information(line: str, text: str, started: list[Options], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    assert capfd.readouterr() == (text, "")
    assert not started


@pytest.mark.parametrize("line", GOOD)
def test_good(line: str, started: list[Options], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 0
    assert capfd.readouterr() == ("", "")
    assert [options.mode for options in started] == [line[:5]]


@pytest.mark.parametrize(("line", "message"), BAD)
def test_bad(line: str, message: str, started: list[Options], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(line) == 1
    assert capfd.readouterr() == ("", f"{message}\n")
    assert not started


WITHOUT_EFFECT = "mode only, it has no effect"


@pytest.mark.parametrize(
    ("line", "warnings"),
    [
        ("pasta --no-splice --socket /tmp/s true", [f"--socket is for passt {WITHOUT_EFFECT}: {SOCKET}"]),
        ("passt --ns-ifname eth0 --tcp-ns 22 -q",
         [f"--ns-ifname is for pasta {WITHOUT_EFFECT}: a virtual machine names its interface itself",
          f"--tcp-ns is for pasta {WITHOUT_EFFECT}: {LOOPBACK}"]),
    ],
)  # fmt: skip
def test_without_effect(
    line: str, warnings: list[str], started: list[Options], capfd: pytest.CaptureFixture[str]
) -> None:
    """An option that the original accepts in both modes is a warning, not an error."""
    assert run(line) == 0
    assert capfd.readouterr() == ("", "".join(f"{warning}\n" for warning in warnings))
    assert len(started) == 1


def test_deprecated(started: list[Options], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A word of warning, and it works."""
    assert run("pasta --config-net --no-copy-routes --no-copy-addrs 1234") == 0
    warnings = "--no-copy-routes will be dropped soon\n--no-copy-addrs will be dropped soon\n"
    assert capfd.readouterr() == ("", warnings)
    assert not started[0].copy_routes


def test_help_is_for_programs_too() -> None:
    """kakoi and devsandbox look for options between blanks and commas."""
    for mode, options in (("pasta", ["--map-host-loopback", "--splice-only"]), ("passt", ["--one-off", "--socket"])):
        words = usage(mode).replace(",", " ").split()
        assert set(options) <= set(words)
    assert PASTA_VERSION.split()[:2] == ["pasta", __version__]
