"""The command line: what each option means, and what is said about those that mean nothing."""

from __future__ import annotations

import contextlib
import re
from string import ascii_lowercase
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr, log
from passt.conf import argv as conf_argv
from passt.conf.actions import Done, Pair
from passt.conf.options import Options
from passt.conf.row import GROUPS, MACHINE, NAMESPACE
from passt.conf.table import TABLE, listed, usage
from passt.log import Fatal
from passt.policy.config import PASST, PASTA
from passt.policy.rules import Rule
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

A4, B4, A6, B6 = map(addr.packed, ("192.0.2.7", "192.0.2.8", "2001:db8::7", "2001:db8::8"))

AUTO_TCP, AUTO_UDP, AUTO_TCP_NS, AUTO_UDP_NS = AUTO = tuple(
    Rule(f"-{letter} auto", proto, outbound, 1, 65535, 1, auto=True, weak=True)
    for letter, proto, outbound in (
        ("t", PROTO_TCP, False), ("u", PROTO_UDP, False), ("T", PROTO_TCP, True), ("U", PROTO_UDP, True)
    )
)  # fmt: skip

NO_NAMESPACE = {"fd": 5, "one_off": True, "forwards": ()}
NO_DNS = {"dns_forward": (), "dns_host": ()}
GOOD: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("-d", {"level": log.DEBUG}),
    ("--trace", {"level": log.TRACE}),
    ("-d -q", {"level": log.WARNING}),
    ("-q --debug", {"level": log.DEBUG}),
    ("--trace -d", {"level": log.TRACE}),
    ("--trace -q -e -d -l /tmp/log", {"level": log.DEBUG, "log_file": "/tmp/log"}),
    ("-d --trace -q", {"level": log.WARNING}),
    ("-f", {"foreground": True}),
    ("-fq4", {"foreground": True, "level": log.WARNING, "use": Pair(True, False)}),
    ("-4 -6", {"use": Pair(False, True)}),
    ("-6 -4", {"use": Pair(True, False)}),
    ("-e --stderr", {}),
    ("-l /tmp/log", {"log_file": "/tmp/log"}),
    ("--runas 5:6", {"runas": "5:6"}),
    ("-p f -P g", {"pcap": "f", "pid_file": "g"}),
    ("-m 1500", {"mtu": 1500}),
    ("-m1500", {"mtu": 1500}),
    ("--mtu=1500", {"mtu": 1500}),
    ("--mtu 1280 --mtu 1500", {"mtu": 1500}),
    ("-m 0", {"mtu": 0}),
    ("-m 0x5dc", {"mtu": 1500}),
    ("-m 02734", {"mtu": 1500}),
    ("-m 68", {"mtu": 68}),
    ("-m 65535", {"mtu": 65535}),
    ("-a 192.0.2.7", {"address": Pair(A4, None), "prefix_len": Pair(0, 0)}),
    ("-a 192.0.2.7/31", {"address": Pair(A4, None), "prefix_len": Pair(31, 0)}),
    ("-a 192.0.2.7 -a 2001:db8::7/80", {"address": Pair(A4, A6), "prefix_len": Pair(0, 80)}),
    ("-a 192.0.2.7/24 -a 192.0.2.8", {"address": Pair(B4, None), "prefix_len": Pair(0, 0)}),
    ("-n 24", {"netmask": 24}),
    ("-n 255.255.240.0", {"netmask": 20}),
    ("-n 0", {"netmask": 0}),
    ("-M 00:11:22:33:44:aa", {"our_mac": bytes.fromhex("0011223344aa")}),
    ("-g 192.0.2.7 -g 2001:db8::7", {"gateway": Pair(A4, A6)}),
    ("-i eth0 -I tap7", {"interface": "eth0", "ns_ifname": "tap7"}),
    ("-o 127.0.0.1", {"outbound": Pair(addr.LOOPBACK4, None)}),
    ("--outbound-if4 a --outbound-if6 b", {"outbound_if": Pair("a", "b")}),
    ("-D 192.0.2.7 -D 2001:db8::7", {"dns": (A4, A6), "dns_none": False}),
    ("-D 192.0.2.7 --dns-forward 192.0.2.8 -D none", NO_DNS | {"dns": (), "dns_none": True}),
    ("-D none -D 192.0.2.7", NO_DNS | {"dns": (A4,), "dns_none": False}),
    ("--dns-forward 192.0.2.7 --dns-host ::1", {"dns_forward": (A4,), "dns_host": (addr.LOOPBACK6,)}),
    ("--dns-forward 192.0.2.7 --dns-forward 2001:db8::7", {"dns_forward": (A4, A6)}),
    ("--dns-host 127.0.0.1 --dns-host ::1", {"dns_host": (addr.LOOPBACK4, addr.LOOPBACK6)}),
    ("-S a.example -S b.example.", {"search": ("a.example", "b.example."), "search_none": False}),
    ("-S a.example -S none", {"search": (), "search_none": True}),
    ("-H vm -H VM-2.example. --fqdn vm.example", {"hostname": "VM-2.example", "fqdn": "vm.example"}),
    ("-S none.", {"search": ("none.",), "search_none": False}),
    ("--dhcp-dns --dhcp-search", {"dhcp_dns": True, "dhcp_search": True}),
    ("--no-tcp --no-udp --no-icmp", {"no_tcp": True, "no_udp": True, "no_icmp": True, "forwards": ()}),
    ("--no-tcp", {"no_tcp": True, "forwards": (AUTO_UDP, AUTO_UDP_NS)}),
    ("--no-udp -u none", {"no_udp": True, "forwards": (AUTO_TCP, AUTO_TCP_NS)}),
    ("--no-dhcp --no-ndp", {"no_dhcp": True, "no_ndp": True}),
    ("--no-dhcpv6 --no-ra", {"no_dhcpv6": True, "no_ra": True}),
    ("--no-map-gw", {"map_gw": False}),
    ("--map-host-loopback 192.0.2.7", {"map_host_loopback": Pair(A4, None)}),
    ("--map-host-loopback none", {"map_host_loopback": Pair(False, False)}),
    ("--map-host-loopback none --map-host-loopback ::2", {"map_host_loopback": Pair(False, addr.packed("::2"))}),
    ("--map-guest-addr 192.0.2.7 --map-guest-addr 192.0.2.8", {"map_guest_addr": Pair(B4, None)}),
    ("--map-guest-addr none", {"map_guest_addr": Pair(False, False)}),
    ("-t none -u none -T none -U none", {"forwards": ()}),
    ("-t none --tcp-ns=none", {"forwards": (AUTO_UDP, AUTO_UDP_NS)}),
    ("-T 22 -t none --udp-ports 80:90 -U none",
     {"forwards": (Rule("-T 22", PROTO_TCP, True, 22, 22, 22), Rule("-u 80:90", PROTO_UDP, False, 80, 80, 90))}),
    ("-t22 --tcp-ports 23 -u none -T none -U none",
     {"forwards": (Rule("-t 22", PROTO_TCP, False, 22, 22, 22), Rule("-t 23", PROTO_TCP, False, 23, 23, 23))}),
    ("--no-splice", {"no_splice": True}),
    ("--splice-only --host-lo-to-ns-lo --freebind",
     {"splice_only": True, "host_lo_to_ns_lo": True, "freebind": True}),
    ("--splice-only --config-net -a 192.0.2.7",  # what the tap would have had
     {"splice_only": True, "config_net": True, "no_ra": True, "address": Pair(A4, None), "prefix_len": Pair(0, 0)}),
    ("-o 192.0.2.7 -o 192.0.2.8 -o 2001:db8::7", {"outbound": Pair(B4, A6)}),
    ("--outbound-if4 a --outbound-if4 b", {"outbound_if": Pair("b", None)}),
    ("--map-guest-addr none --map-guest-addr 2001:db8::7", {"map_guest_addr": Pair(False, A6)}),
    ("--no-map-gw --map-host-loopback 192.0.2.7", {"map_gw": False, "map_host_loopback": Pair(A4, None)}),
    ("--config-net", {"config_net": True, "no_ra": True}),
    ("--config-net --no-copy-routes", {"config_net": True, "no_ra": True, "copy_routes": False}),
    ("--config-net --no-copy-addrs", {"config_net": True, "no_ra": True, "copy_addrs": False}),
    ("--ns-mac-addr 02:11:22:33:44:aa", {"ns_mac": bytes.fromhex("0211223344aa")}),
    ("--follow routes --follow-link", {"follow": "routes", "follow_link": True}),
    ("--no-netns-quit", {"netns_quit": False}),
    ("--userns /a --netns /b", {"userns": "/a", "netns": "/b"}),
    ("--netns name", {"netns": "name"}),
    ("--nsrun-dir /a --netns name --nsrun-dir /b", {"netns": "name", "nsrun_dir": "/b"}),
    ("-a 192.0.2.7/0", {"address": Pair(A4, None), "prefix_len": Pair(0, 0)}),
    ("-a 2001:db8::7/0", {"address": Pair(None, A6), "prefix_len": Pair(0, 0)}),
    ("-a 192.0.2.7/0 -n 16", {"address": Pair(A4, None), "prefix_len": Pair(0, 0), "netmask": 16}),
    ("-a 192.0.2.7/24 -n 0", {"address": Pair(A4, None), "prefix_len": Pair(24, 0), "netmask": 0}),
    ("-n 16 -a 192.0.2.7/24 -a 192.0.2.7", {"address": Pair(A4, None), "prefix_len": Pair(0, 0), "netmask": 16}),
    ("-n 16 -a 192.0.2.7 -a 2001:db8::7/80",
     {"address": Pair(A4, A6), "prefix_len": Pair(0, 80), "netmask": 16}),
    ("--runas 0x3e8:010", {"runas": "1000:8"}),
    ("--runas nobody:nogroup", {"runas": "nobody:nogroup"}),
    ("-F 5", NO_NAMESPACE),
    ("--fd=0x5 -t 22 -T none",
     NO_NAMESPACE | {"forwards": (Rule("-t 22", PROTO_TCP, False, 22, 22, 22),)}),
    ("-F 5 7", {"fd": 5, "one_off": True, "pid": 7}),
    ("-F 5 --netns /a --config-net", {"fd": 5, "one_off": True, "netns": "/a", "config_net": True, "no_ra": True}),
    ("-F 5 --socket /tmp/s", NO_NAMESPACE),  # which does nothing
    ("--netns-only --userns /a", {"userns": "/a", "netns_only": False}),
    ("--userns /a --netns-only", {"userns": None, "netns_only": True}),
    ("1234", {"pid": 1234}),
    ("-- 1234", {"pid": 1234}),
    ("2147483647", {"pid": 2**31 - 1}),
    ("ls -l", {"command": ("ls", "-l")}),
    ("-f -- ls --no-such-option", {"foreground": True, "command": ("ls", "--no-such-option")}),
    ("1234 5", {"command": ("1234", "5")}),
    ("--", {}),
    ("-", {"command": ("-",)}),
    ("--fore", {"foreground": True}),  # abbreviated
    ("--no-map", {"map_gw": False}),
    ("--netns-o", {"netns_only": True}),
    ("--pid f", {"pid_file": "f"}),  # exact although --... others could begin so
]  # fmt: skip


@pytest.mark.parametrize(("line", "fields"), GOOD)
def test_options(line: str, fields: dict[str, Any]) -> None:
    expected = {"forwards": AUTO, **fields}
    if not {"pid", "netns"} & fields.keys():
        expected = {"command": (), **expected}
    assert conf_argv.parse(line.split()) == Options(**expected)


NAME_RULE = "(labels of 1 to 63 letters, digits and inner hyphens, 253 characters in all)"
BAD = [
    ("--nonsense", "pasta: unrecognized option '--nonsense': see pasta --help"),
    ("--map-guest-address 1.2.3.4", "pasta: unrecognized option '--map-guest-address': did you mean --map-guest-addr? "
     "See pasta --help"),
    ("--config-ent", "pasta: unrecognized option '--config-ent': did you mean --config-net? See pasta --help"),
    ("--nests=/a", "pasta: unrecognized option '--nests': did you mean --netns? See pasta --help"),
    ("--onenoff", "pasta: unrecognized option '--onenoff': see pasta --help"),  # passt's is not suggested
    ("--migrate", "pasta: option '--migrate' is ambiguous; possibilities: '--migrate-exit' '--migrate-no-linger'"),
    ("--" + "config-ent" * 10, f"pasta: unrecognized option '--{'config-ent' * 10}': see pasta --help"),
    ("-x", "pasta: invalid option -- 'x': see pasta --help"),
    ("-fx", "pasta: invalid option -- 'x': see pasta --help"),
    ("--mtu", "pasta: option '--mtu' requires an argument"),
    ("-m", "pasta: option requires an argument -- 'm'"),
    ("-fm", "pasta: option requires an argument -- 'm'"),
    ("--quiet=1", "pasta: option '--quiet' doesn't allow an argument"),
    ("--dhcp", "pasta: option '--dhcp' is ambiguous; possibilities: '--dhcp-dns' '--dhcp-search'"),
    ("-m 67", "Invalid MTU: 67 (give 68 to 65535, or 0 to assign none)"),
    ("-m 65536", "Invalid MTU: 65536 (give 68 to 65535, or 0 to assign none)"),
    ("-m 1500x", "Invalid MTU: 1500x (give 68 to 65535, or 0 to assign none)"),
    ("-m -1", "Invalid MTU: -1 (give 68 to 65535, or 0 to assign none)"),
    ("-m 08", "Invalid MTU: 08 (give 68 to 65535, or 0 to assign none)"),
    ("-a 192.0.2", "Invalid address: 192.0.2 (not an IPv4 or IPv6 address)"),
    ("-a 0.0.0.0", "Invalid address: 0.0.0.0 (is unspecified)"),
    ("-a 127.0.0.2", "Invalid address: 127.0.0.2 (is loopback)"),
    ("-a 224.0.0.1", "Invalid address: 224.0.0.1 (is multicast)"),
    ("-a 255.255.255.255", "Invalid address: 255.255.255.255 (is broadcast)"),
    ("-a ::1", "Invalid address: ::1 (is loopback)"),
    ("-a ::ffff:1.2.3.4", "Invalid address: ::ffff:1.2.3.4 (is IPv4-mapped)"),
    ("-a ::1.2.3.4", "Invalid address: ::1.2.3.4 (is IPv4-compatible)"),
    ("-a ff02::1", "Invalid address: ff02::1 (is multicast)"),
    ("-a 192.0.2.7/33", "Invalid address: 192.0.2.7/33 (the prefix length is 1 to 32, or 0 for the default)"),
    ("-a 192.0.2.7/-1", "Invalid address: 192.0.2.7/-1 (the prefix length is 1 to 32, or 0 for the default)"),
    ("-a 192.0.2.7/\u0662", "Invalid address: 192.0.2.7/\u0662 (the prefix length is 1 to 32, or 0 for the default)"),
    ("-a 192.0.2.7/24 -n 16",
     "Redundant prefix length specification: --netmask and /24 of --address: leave one out"),
    ("-n 255.255.0.0 -a 192.0.2.7/24",
     "Redundant prefix length specification: --netmask and /24 of --address: leave one out"),
    ("-a 192.0.2.7/", "Invalid address: 192.0.2.7/ (the prefix length is 1 to 32, or 0 for the default)"),
    ("-a 2001:db8::7/129", "Invalid address: 2001:db8::7/129 (the prefix length is 1 to 128, or 0 for the default)"),
    ("-n 33", "Invalid netmask: 33 (give 1 to 32 bits or a contiguous dotted mask)"),
    ("-n 255.0.255.0", "Invalid netmask: 255.0.255.0 (give 1 to 32 bits or a contiguous dotted mask)"),
    ("-n ffff::", "Invalid netmask: ffff:: (give 1 to 32 bits or a contiguous dotted mask)"),
    ("-M 00:11:22:33", "Invalid MAC address: 00:11:22:33 (give six pairs of hexadecimal digits with colons between)"),
    ("-M 01:11:22:33:44:55", "Invalid MAC address: 01:11:22:33:44:55 (an interface needs a unicast address)"),
    ("-M 00:00:00:00:00:00", "Invalid MAC address: 00:00:00:00:00:00 (an interface needs a unicast address)"),
    ("-g ::", "Invalid gateway address: :: (is unspecified)"),
    (f"-i {'n' * 128}", f"Invalid interface name: {'n' * 128} (1 to 127 characters, no blanks, '/', ':' or '%')"),
    ("-I sixteen-letters-",
     "Invalid interface name: sixteen-letters- (1 to 15 characters, no blanks, '/', ':' or '%')"),
    ("-I a/b", "Invalid interface name: a/b (1 to 15 characters, no blanks, '/', ':' or '%')"),
    ("-o 224.0.0.1", "Invalid outbound address: 224.0.0.1 (is multicast)"),
    ("-D nonsense", "Cannot use DNS address nonsense (not an IPv4 or IPv6 address)"),
    ("-S a -S b -S c -S d -S e -S f -S g", "Cannot use DNS search domain g (at most 6)"),
    ("-S a..b", "Cannot use DNS search domain a..b (ASCII, labels of 1 to 63 characters, 253 in all)"),
    ("-S .", "Cannot use DNS search domain . (ASCII, labels of 1 to 63 characters, 253 in all)"),
    ("-S ü.example", "Cannot use DNS search domain ü.example (ASCII, labels of 1 to 63 characters, 253 in all)"),
    ("-H -x", f"Invalid hostname: -x {NAME_RULE}"),
    ("-H $(reboot)", f"Invalid hostname: $(reboot) {NAME_RULE}"),
    ("--fqdn a..b", f"Invalid FQDN: a..b {NAME_RULE}"),
    ("--fqdn .", f"Invalid FQDN: . {NAME_RULE}"),
    ("-s /tmp/s", "pasta: invalid option -- 's': -s (--socket) is for passt mode only: pasta takes a PID, --netns or a "
     "command"),
    ("-F -1", "Invalid --fd: -1 (give the number of an open descriptor)"),
    ("-F 5 true", "Both --fd and a command given: the command would not be in the namespace of that tap device"),
    ("-F 5 -I tap7", "Both --fd and --ns-ifname given: leave one of them out"),
    ("-F 5 --splice-only 7", "Both --fd and --splice-only given: leave one of them out"),
    ("-F 5 --config-net", "--config-net needs the namespace of the tap device: give its PID or --netns beside --fd"),
    ("-F 5 -T 22", "-T 22 needs the namespace of the tap device: give its PID or --netns beside --fd"),
    ("-F 5 -t auto", "-t auto needs the namespace of the tap device: give its PID or --netns beside --fd"),
    ("-F 5 -t 80:127.0.0.1", "Invalid port specifier -t 80:127.0.0.1: '127.0.0.1' is a loopback address, which cannot "
     "be reached"),
    ("--nsrun-dir /a", "--nsrun-dir needs --netns NAME"),
    ("--busy-poll 1001", "Invalid --busy-poll: 1001 (give 0 to 1000 microseconds; 0 turns it off)"),
    ("--busy-poll -1", "Invalid --busy-poll: -1 (give 0 to 1000 microseconds; 0 turns it off)"),
    ("--busy-poll soon", "Invalid --busy-poll: soon (give 0 to 1000 microseconds; 0 turns it off)"),
    ("--nsrun-dir /a blue", "--nsrun-dir needs --netns NAME"),
    ("--runas a:b:c", "Invalid --runas option: a:b:c (give UID, UID:GID, LOGIN or LOGIN:GROUP)"),
    ("--runas :7", "Invalid --runas option: :7 (give UID, UID:GID, LOGIN or LOGIN:GROUP)"),
    ("-c /a --api-socket /b/../a", "Both --conf-path and --api-socket are /a: give each a path of its own"),
    ("-c /a -P /./a", "Both --conf-path and --pid are /a: give each a path of its own"),
    ("--repair-path none", "--repair-path is for passt mode only"),
    ("--one-off", "--one-off is for passt mode only: pasta always ends with its command or namespace"),
    ("-1", "pasta: invalid option -- '1': -1 (--one-off) is for passt mode only: pasta always ends with its command or "
     "namespace"),
    ("--no-dhcp-dns", "--no-dhcp-dns is for passt mode only: pasta tells none unless --dhcp-dns is given"),
    ("--no-dhcp-search", "--no-dhcp-search is for passt mode only: pasta tells none unless --dhcp-search is given"),
    ("--vhost-user", "--vhost-user is for passt mode only"),
    ("--dns-forward 127.0.0.53", "Invalid DNS forwarding address: 127.0.0.53 (is loopback)"),
    ("--dns-host 0.0.0.0", "Invalid host nameserver address: 0.0.0.0 (is unspecified)"),
    ("--map-host-loopback 127.0.0.1", "Invalid address to remap to host: 127.0.0.1 (is loopback)"),
    ("--map-guest-addr ::", "Invalid address to remap to host: :: (is unspecified)"),
    ("--map-host-loopback ff02::1", "Invalid address to remap to host: ff02::1 (is multicast)"),
    ("-o 0.0.0.0", "Invalid outbound address: 0.0.0.0 (is unspecified)"),
    ("-o eth0", "Invalid outbound address: eth0 (not an IPv4 or IPv6 address)"),
    ("--outbound-if6 a/b", "Invalid interface name: a/b (1 to 127 characters, no blanks, '/', ':' or '%')"),
    ("-t 0", "Invalid port specifier -t 0: '0' at character 1: port 0 can't be forwarded (give 1 to 65535)"),
    ("-t 22 --no-tcp", "TCP port forwarding requested but TCP is disabled: -t 22 (and --no-tcp)"),
    ("--no-udp -U auto", "UDP port forwarding requested but UDP is disabled: -U auto (and --no-udp)"),
    ("--no-splice --splice-only", "Both --splice-only and --no-splice given: leave one of them out"),
    ("--host-lo-to-ns-lo --no-splice", "Both --host-lo-to-ns-lo and --no-splice given: leave one of them out"),
    ("--no-copy-routes", "--no-copy-routes needs --config-net"),
    ("--no-copy-addrs 7", "--no-copy-addrs needs --config-net"),
    ("--netns a 7", "Both --netns and PID or command given: leave one of them out"),
    ("--netns a -- true", "Both --netns and PID or command given: leave one of them out"),
    ("0", "Invalid PID 0 (1 to 2147483647)"),
    ("2147483648", "Invalid PID 2147483648 (1 to 2147483647)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD)
def test_errors(line: str, message: str) -> None:
    with pytest.raises(Fatal) as e:
        conf_argv.parse(line.split())
    assert str(e.value) == message


def test_empty_arguments() -> None:
    for words, message in (
        (["-P", ""], "Invalid --pid: an empty file name (give a path)"),
        (["--netns", ""], "Invalid --netns: an empty file name (give a path)"),
        (["--userns="], "Invalid --userns: an empty file name (give a path)"),
        (["-l", "a\0b"], "Invalid --log-file: a zero byte in the file name (give a path)"),
    ):
        with pytest.raises(Fatal, match=f"^{re.escape(message)}$"):
            conf_argv.parse(words)
    with pytest.raises(Fatal, match="Invalid interface name"):
        conf_argv.parse(["-i", ""])
    with pytest.raises(Fatal, match="Invalid hostname"):
        conf_argv.parse(["-H", ""])
    with pytest.raises(Fatal, match="Cannot use DNS search domain"):
        conf_argv.parse(["-S", ""])
    with pytest.raises(Fatal, match="Invalid socket path"):
        conf_argv.parse(["-s", ""], PASST)


@pytest.mark.parametrize(("line", "microseconds"), [("", 100), ("--busy-poll 0", 0), ("--busy-poll 1000", 1000)])
def test_busy_poll(line: str, microseconds: int) -> None:
    assert conf_argv.parse(line.split()).busy_poll == microseconds


def test_search_domains_in_one_argument() -> None:
    """As QEMU gives them."""
    assert conf_argv.parse(["--search", "a.example b.example", "-S", "c"]).search == ("a.example", "b.example", "c")
    with pytest.raises(Fatal, match=r"domain g \(at most 6"):
        conf_argv.parse(["-S", "a b c d e f g"])
    for text in ("a  b", "a\tb", "a\nb", "a\x1bb"):
        with pytest.raises(Fatal, match="Cannot use DNS search domain"):
            conf_argv.parse(["-S", text])


# For virtual machines ----------------------------------------------------------------------------------------------

PASST_DEFAULTS = {"mode": PASST, "dhcp_dns": True, "dhcp_search": True, "forwards": ()}
GOOD_PASST: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("-s /tmp/s", {"socket_path": "/tmp/s"}),
    ("--socket-path=/tmp/s --socket /tmp/t", {"socket_path": "/tmp/t"}),
    ("--sock /tmp/s", {"socket_path": "/tmp/s"}),  # two names of one option are not ambiguous
    ("-F 5", {"fd": 5, "one_off": True}),
    ("--fd 0x5", {"fd": 5, "one_off": True}),
    ("--fd 0", {"fd": 0, "one_off": True}),
    ("-s /tmp/s -F 5", {"fd": 5, "one_off": True}),
    ("-F 5 -s /tmp/s", {"socket_path": "/tmp/s", "one_off": True}),
    ("-1fq", {"one_off": True, "foreground": True, "level": log.WARNING}),
    ("--repair-path none -f", {"repair_path": "none", "foreground": True}),
    ("--repair-path /r --migrate-exit", {"repair_path": "/r", "migrate_exit": True}),
    ("--migrate-no-linger", {"migrate_no_linger": True}),
    ("-P /dev/null -l /dev/null", {"pid_file": "/dev/null", "log_file": "/dev/null"}),
    ("--no-dhcp-dns --no-dhcp-search", {"dhcp_dns": False, "dhcp_search": False}),
    ("-t 22", {"forwards": (Rule("-t 22", PROTO_TCP, False, 22, 22, 22),)}),
    ("-H vm --fqdn vm.example", {"hostname": "vm", "fqdn": "vm.example"}),
    # long options of pasta that do nothing
    ("--ns-ifname eth0 --tcp-ns=22 --udp-ns none --no-splice", {}),
    ("--", {}),
    # libvirt, libguestfs, QEMU
    ("--one-off --socket /run/s --pid /run/p --interface eth42 --hostname h --fqdn h.test.local --address 192.0.2.7 "
     "--netmask 24 --address 2001:db8::7",
     {"one_off": True, "socket_path": "/run/s", "pid_file": "/run/p", "interface": "eth42", "hostname": "h",
      "fqdn": "h.test.local", "address": Pair(A4, A6), "prefix_len": Pair(0, 0), "netmask": 24}),
    ("--one-off --socket /tmp/s --pid /tmp/p --address 192.0.2.7 --netmask 16 --mac-addr 52:56:00:00:00:02 "
     "--gateway 192.0.2.8",
     {"one_off": True, "socket_path": "/tmp/s", "pid_file": "/tmp/p", "address": Pair(A4, None),
      "prefix_len": Pair(0, 0), "netmask": 16, "our_mac": bytes.fromhex("525600000002"), "gateway": Pair(B4, None)}),
    ("--quiet --no-dhcp-dns --freebind --ipv4-only --pid /tmp/p --fd 3",
     {"level": log.WARNING, "dhcp_dns": False, "freebind": True, "use": Pair(True, False), "pid_file": "/tmp/p",
      "fd": 3, "one_off": True}),
]  # fmt: skip


@pytest.mark.parametrize(("line", "fields"), GOOD_PASST)
def test_passt(line: str, fields: dict[str, Any]) -> None:
    assert conf_argv.parse(line.split(), PASST) == Options(**{**PASST_DEFAULTS, **fields})


def test_passt_forwards_libvirt_specification() -> None:
    spec = "2001:db8:ac10:fd01::1:10/22:2022,1000-1050,~1020,~1030-1040"
    rules = conf_argv.parse(["--tcp-ports", spec, "-u", "all"], PASST).forwards
    inbound = [(r.first, r.last, r.to) for r in rules if r.proto == PROTO_TCP]
    assert inbound == [(22, 22, 2022), (1000, 1019, 1000), (1021, 1029, 1021), (1041, 1050, 1041)]
    assert {r.proto for r in rules} == {PROTO_TCP, PROTO_UDP}
    assert not any(r.outbound or r.auto for r in rules)


LOOPBACK = "a virtual machine reaches the host's loopback at the address of --map-host-loopback"
BAD_PASST = [
    ("true", "Extra non-option argument: true (passt takes options only)"),
    ("-f 1234", "Extra non-option argument: 1234 (passt takes options only)"),
    ("-- -f", "Extra non-option argument: -f (passt takes options only)"),
    ("-", "Extra non-option argument: - (passt takes options only)"),
    ("--nonsense", "passt: unrecognized option '--nonsense': see passt --help"),
    ("-T 22", f"passt: invalid option -- 'T': -T (--tcp-ns) is for pasta mode only: {LOOPBACK}"),
    ("-T", f"passt: invalid option -- 'T': -T (--tcp-ns) is for pasta mode only: {LOOPBACK}"),
    ("-fU22", f"passt: invalid option -- 'U': -U (--udp-ns) is for pasta mode only: {LOOPBACK}"),
    ("-I eth0", "passt: invalid option -- 'I': -I (--ns-ifname) is for pasta mode only: a virtual machine names its "
     "interface itself"),
    ("--config-net", "--config-net is for pasta mode only: a virtual machine sets up its interface itself, by DHCP and "
     "router advertisements"),
    ("--dhcp-dns", "--dhcp-dns is for pasta mode only: passt tells them unless --no-dhcp-dns is given"),
    ("--dhcp-search", "--dhcp-search is for pasta mode only: passt tells them unless --no-dhcp-search is given"),
    ("--ns-mac-addr x", "--ns-mac-addr is for pasta mode only: give QEMU the address, as in -device "
     "virtio-net-pci,mac=ADDR"),
    *((f"--{name}", f"--{name} is for pasta mode only") for name in (
        "no-copy-routes", "no-copy-addrs", "netns-only", "no-netns-quit", "host-lo-to-ns-lo", "splice-only")),
    *((f"--{name} x", f"--{name} is for pasta mode only") for name in ("netns", "userns")),
    ("--netns", "passt: option '--netns' requires an argument"),
    ("-s " + "s" * 108, f"Invalid socket path: {'s' * 108} (1 to 107 bytes)"),
    ("-F -1", "Invalid --fd: -1 (give the number of an open descriptor)"),
    ("-F x", "Invalid --fd: x (give the number of an open descriptor)"),
    ("-F 2147483648", "Invalid --fd: 2147483648 (give the number of an open descriptor)"),
    ("-t auto", "'auto' port forwarding is only allowed for pasta: -t auto: 'auto' at character 1: give ports, or "
     "'all'"),
    ("-t 80 --no-tcp", "TCP port forwarding requested but TCP is disabled: -t 80 (and --no-tcp)"),
    ("-s /a -c /a", "Both --socket and --conf-path are /a: give each a path of its own"),
    ("-s a -l ./a", "Both --socket and --log-file are a: give each a path of its own"),
    ("--repair-path", "passt: option '--repair-path' requires an argument"),
    ("--repair-path " + 108 * "r", f"Invalid socket path: {108 * 'r'} (1 to 107 bytes)"),
    ("-s /a --repair-path /a", "Both --socket and --repair-path are /a: give each a path of its own"),
    ("--nsrun-dir /a", "--nsrun-dir is for pasta mode only"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_PASST)
def test_passt_errors(line: str, message: str) -> None:
    with pytest.raises(Fatal) as e:
        conf_argv.parse(line.split(), PASST)
    assert str(e.value) == message


def test_longest_socket_path() -> None:
    assert conf_argv.parse(["-s", "s" * 107], PASST).socket_path == "s" * 107
    with pytest.raises(Fatal, match="Invalid socket path"):
        conf_argv.parse(["-s", "ü" * 54], PASST)  # 108 bytes


def test_version_and_help_stop_at_once() -> None:
    with pytest.raises(Done, match=r"^pasta \d"):
        conf_argv.parse(["--version", "--nonsense"])
    with pytest.raises(Done, match=r"^Usage: pasta"):
        conf_argv.parse(["-h", "-m", "7"])
    with pytest.raises(Done, match=r"^passt \d"):
        conf_argv.parse(["--version"], PASST)
    with pytest.raises(Done, match=r"^Usage: passt"):
        conf_argv.parse(["-h"], PASST)
    with pytest.raises(Fatal, match="unrecognized"):
        conf_argv.parse(["--nonsense", "--version"])


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_help_names_every_option_once_between_blanks(mode: str) -> None:
    words = usage(mode).replace(",", " ").split()
    for option in listed(mode):
        assert words.count(f"--{option.name}") >= 1
        if option.short:
            assert f"-{option.short}" in words
    for name in {option.name for option in TABLE} - {option.name for option in listed(mode)}:
        assert f"--{name}" not in words
    assert "{" not in usage(mode)


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_help_fits_a_terminal(mode: str) -> None:
    assert max(map(len, usage(mode).splitlines())) <= 80


@pytest.mark.parametrize(
    ("mode", "first"),
    [(PASTA, "--config-net --help --version --tcp-ports --udp-ports"), (PASST, "--help --version --tcp-ports")],
)
def test_help_is_in_the_order_of_use(mode: str, first: str) -> None:
    text = usage(mode)
    headings = re.findall(r"^(\w.*):$", text, re.M)
    other = MACHINE if mode == PASTA else NAMESPACE
    assert headings == [group for group in GROUPS if group != other]
    options = re.findall(r"^  (?:-\w, |    )(--\S+)", text, re.M)
    assert options == [f"--{option.name}" for option in listed(mode)]
    assert options[: len(first.split())] == first.split()


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_first_line_of_help_is_short(mode: str) -> None:
    """Completions show it alone, and one line of a terminal has to do."""
    for option in listed(mode):
        first = option.help.split("\n")[0]
        assert first[0].isupper() and not first.endswith(".") and len(first) <= 100, option.name


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_every_option_of_the_other_mode_says_so(mode: str) -> None:
    other = PASST if mode == PASTA else PASTA
    rows = [row for row in TABLE if row.help and not row.is_in(mode)]
    assert len(rows) > 3
    for row in rows:
        if row.short:
            with pytest.raises(Fatal, match=rf"^{mode}: invalid option -- '{row.short}': .*is for {other} mode only"):
                conf_argv.parse([f"-{row.short}", "1"], mode)
        if not row.only.inert:
            with pytest.raises(Fatal, match=rf"^--{row.name} is for {other} mode only"):
                conf_argv.parse([f"--{row.name}", *(["1"] if row.arg else [])], mode)


def test_options_of_the_other_mode_without_effect_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    assert conf_argv.parse(["--socket", "/tmp/s", "--sock", "/tmp/t"]) == conf_argv.parse([])
    assert conf_argv.parse(["--tcp-ns", "22"], PASST) == conf_argv.parse([], PASST)
    socket = "is for passt mode only, it has no effect: pasta takes a PID, --netns or a command"
    assert said == [f"--socket {socket}"] * 2 + [f"--tcp-ns is for pasta mode only, it has no effect: {LOOPBACK}"]


@pytest.mark.parametrize(
    ("mode", "name"), [(mode, row.name) for mode in (PASTA, PASST) for row in listed(mode) if len(row.name) >= 5]
)
def test_a_letter_too_many_names_the_option(mode: str, name: str) -> None:
    with pytest.raises(Fatal, match=rf"did you mean --{name}\? See {mode} --help$"):
        conf_argv.parse([f"--{name[:3]}x{name[3:]}"], mode)


@pytest.mark.parametrize(
    ("line", "end"),
    [
        ("--completion bsh", "(give bash, zsh or fish): did you mean 'bash'?"),
        ("-t atuo", ": did you mean 'auto'?"),
        ("-U non", ": did you mean 'none'?"),
        ("-D nnone", "(not an IPv4 or IPv6 address): did you mean 'none'?"),
        ("--map-host-loopback non", "(not an IPv4 or IPv6 address): did you mean 'none'?"),
        ("-a non", "(not an IPv4 or IPv6 address)"),
        ("-t http", "not a port (a decimal number, 1 to 65535)"),
    ],
)
def test_misspelt_words_name_the_nearest(line: str, end: str) -> None:
    with pytest.raises(Fatal) as e:
        conf_argv.parse(line.split())
    assert str(e.value).endswith(end)


def test_names_are_unique() -> None:
    assert len({option.name for option in TABLE}) == len(TABLE)
    shorts = [option.short for option in TABLE if option.short]
    assert len(set(shorts)) == len(shorts)


def test_ephemeral_ports_that_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    conf_argv.parse(["-t", "80"], ephemeral=None)
    assert said == []
    rules = conf_argv.parse(["-t", "~80"], ephemeral=None).forwards
    assert [(r.first, r.last) for r in rules if not r.outbound and r.proto == PROTO_TCP] == [(1, 79), (81, 49151)]
    assert said == ["Couldn't read the range of ephemeral ports, which are not forwarded: taking 49152-65535"]


def test_deprecated_options_warn(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    conf_argv.parse(["--config-net", "--no-copy-addrs"])
    assert said == ["--no-copy-addrs will be dropped soon"]


WORDS = st.one_of(
    st.sampled_from([f"--{option.name}" for option in TABLE]),
    st.sampled_from([f"-{option.short}" for option in TABLE if option.short]),
    st.sampled_from(["auto", "all", "~1", "2-3:4-5"]),
    st.sampled_from(["none", "1", "192.0.2.1", "fe80::1/64", "eth0", "--", "a=b", "00:11:22:33:44:55", "65536"]),
    st.text(st.characters(), max_size=12),  # with the surrogates that stand for bytes that are not UTF-8
)


@given(st.lists(WORDS, max_size=8), st.sampled_from([PASTA, PASST]))
def test_any_command_line_gives_options_or_one_line(words: list[str], mode: str) -> None:
    with contextlib.suppress(Fatal, Done):
        assert conf_argv.parse(words, mode).mode == mode


@given(st.sampled_from([PASTA, PASST]), st.data())
def test_unknown_options_are_told_in_one_way(mode: str, data: st.DataObject) -> None:
    """Any word that begins no option: getopt_long's words first, then the nearest option of this mode, or none."""
    names = [row.name for row in TABLE]
    name = data.draw(
        st.one_of(st.text(ascii_lowercase + "-", min_size=1, max_size=50), st.sampled_from(names).map(_disturbed))
    )
    if any(other.startswith(name) for other in names):
        return
    with pytest.raises(Fatal) as e:
        conf_argv.parse([f"--{name}"], mode)
    start = f"{mode}: unrecognized option '--{name}': "
    message = str(e.value)
    assert message.startswith(start)
    near = re.fullmatch(rf"did you mean --(\S+)\? See {mode} --help", message.removeprefix(start))
    assert near[1] in {row.name for row in listed(mode)} if near else message == f"{start}see {mode} --help"


def _disturbed(name: str) -> str:
    """Two letters swapped."""
    return name[:1] + name[2:3] + name[1:2] + name[3:]
