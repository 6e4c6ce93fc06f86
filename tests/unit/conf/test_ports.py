"""Specifications of ports: what each means, and what is said about those that mean nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.conf.ports import PORT_MAX, parse_spec
from passt.log import Fatal
from passt.policy.rules import Rule
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

EPHEMERAL = range(32768, 61000)
PROTOCOLS = {"t": (PROTO_TCP, False), "u": (PROTO_UDP, False), "T": (PROTO_TCP, True), "U": (PROTO_UDP, True)}


def parsed(option: str) -> tuple[Rule, ...]:
    return parse_spec(option[1], option[3:], ephemeral=EPHEMERAL)


# Valid -------------------------------------------------------------------------------------------------------------

# Each rule as first-last>to address%interface @target, where what is the usual is left out; "?" is auto, "~" is weak
GOOD: list[tuple[str, list[str]]] = [
    ("-t none", []),
    ("-T none", []),
    # ports and ranges
    ("-t 22", ["22"]),
    ("-u 53", ["53"]),
    ("-T 22", ["22"]),
    ("-U 53", ["53"]),
    ("-t 1", ["1"]),
    ("-t 65535", ["65535"]),
    ("-t 0022", ["22"]),
    ("-t 22-80", ["22-80"]),
    ("-t 22-22", ["22"]),
    ("-t 1-65535", ["1-65535"]),
    ("-t 22,80", ["22", "80"]),
    ("-t 80,22", ["80", "22"]),
    ("-t 22,80-90,443", ["22", "80-90", "443"]),
    # mapping
    ("-t 22:2022", ["22>2022"]),
    ("-t 22:22", ["22"]),
    ("-u 80-82:90-92", ["80-82>90-92"]),
    ("-t 80-80:60-60", ["80>60"]),
    ("-t 80:60-60", ["80>60"]),
    ("-t 22-80:32-90", ["22-80>32-90"]),
    ("-t 65534-65535:1-2", ["65534-65535>1-2"]),
    ("-t 1-2:65534-65535", ["1-2>65534-65535"]),
    ("-T 8080:80,9090:90", ["8080>80", "9090>90"]),
    # exclusions
    ("-t 2000-5000,~3000-3010", ["2000-2999", "3011-5000"]),
    ("-t ~3000-3010,2000-5000", ["2000-2999", "3011-5000"]),
    ("-t 20-30,~25", ["20-24", "26-30"]),
    ("-t 20-30,~20", ["21-30"]),
    ("-t 20-30,~30", ["20-29"]),
    ("-t 20-30,~10-20,~30-40", ["21-29"]),
    ("-t 20-30,~22,~24,~26-40", ["20-21", "23", "25"]),
    ("-t 20-30,~40", ["20-30"]),
    ("-t 22,80,~80", ["22"]),
    ("-t 20-30,40-50,~28-42", ["20-27", "43-50"]),
    ("-t 20-30:120-130,~25", ["20-24>120-124", "26-30>126-130"]),
    ("-t 22:2022,1000-1050,~1020,~1030-1040", ["22>2022", "1000-1019", "1021-1029", "1041-1050"]),
    ("-u 5000-5020:6000-6020,~5010-5015", ["5000-5009>6000-6009", "5016-5020>6016-6020"]),
    # all
    ("-t all", ["~1-32767", "~61000-65535"]),
    ("-U all", ["~1-32767", "~61000-65535"]),
    ("-t all,~22", ["~1-21", "~23-32767", "~61000-65535"]),
    ("-t ~22,all", ["~1-21", "~23-32767", "~61000-65535"]),
    ("-t ~15001,~15006", ["~1-15000", "~15002-15005", "~15007-32767", "~61000-65535"]),
    ("-t ~20000-20010", ["~1-19999", "~20011-32767", "~61000-65535"]),
    ("-t ~30000-62000", ["~1-29999", "~62001-65535"]),
    ("-t ~40000", ["~1-32767", "~61000-65535"]),
    ("-t ~1-32767", ["~61000-65535"]),
    ("-t all:192.0.2.6", ["~1-32767 @192.0.2.6", "~61000-65535 @192.0.2.6"]),
    ("-t 127.0.0.6/all:192.0.2.6", ["~1-32767 127.0.0.6 @192.0.2.6", "~61000-65535 127.0.0.6 @192.0.2.6"]),
    ("-T all:[2001:db8::1]", ["~1-32767 @2001:db8::1", "~61000-65535 @2001:db8::1"]),
    ("-t all,all", ["~1-32767", "~61000-65535"]),
    ("-t all,22", ["22", "~1-21", "~23-32767", "~61000-65535"]),
    ("-t 22:2022,all", ["22>2022", "~1-21", "~23-32767", "~61000-65535"]),
    ("-t all,40000", ["40000", "~1-32767", "~61000-65535"]),
    ("-t all,20-30,~25,~80", ["20-24", "26-30", "~1-19", "~31-79", "~81-32767", "~61000-65535"]),
    ("-t 127.0.0.6/all:192.0.2.6,22:2022",
     ["22>2022 127.0.0.6", "~1-21 127.0.0.6 @192.0.2.6", "~23-32767 127.0.0.6 @192.0.2.6",
      "~61000-65535 127.0.0.6 @192.0.2.6"]),
    # auto
    ("-t auto", ["?1-65535"]),
    ("-t auto,auto", ["?1-65535"]),
    ("-t auto,all", ["?1-32767", "?61000-65535"]),
    ("-T all,auto", ["?1-32767", "?61000-65535"]),
    ("-t auto,all,~22", ["?1-21", "?23-32767", "?61000-65535"]),
    ("-t auto,all,22:2022", ["?22>2022", "?1-21", "?23-32767", "?61000-65535"]),
    ("-T auto", ["?1-65535"]),
    ("-t auto,12345", ["?12345"]),
    ("-T 12345,auto", ["?12345"]),
    ("-t auto,8000-9000", ["?8000-9000"]),
    ("-t auto,8000-9000:9000-10000", ["?8000-9000>9000-10000"]),
    ("-t auto,~8080", ["?1-8079", "?8081-65535"]),
    ("-t auto,8000-9000,~8080", ["?8000-8079", "?8081-9000"]),
    ("-t 127.0.0.1/auto", ["?1-65535 127.0.0.1"]),
    ("-t 127.0.0.1/auto,12345", ["?12345 127.0.0.1"]),
    ("-u ::1/auto", ["?1-65535 ::1"]),
    # where to listen
    ("-t 127.0.0.1/80", ["80 127.0.0.1"]),
    ("-t 192.0.2.1/20-30,~25", ["20-24 192.0.2.1", "26-30 192.0.2.1"]),
    ("-t 127.0.0.1/80-80:60-60", ["80>60 127.0.0.1"]),
    ("-t [127.0.0.1]/80", ["80 127.0.0.1"]),
    ("-t [::1]/80", ["80 ::1"]),
    ("-t ::1/80", ["80 ::1"]),
    ("-t ::1/80-80:80-80", ["80 ::1"]),
    ("-t [2001:db8::1]/8000-8010:9000-9010", ["8000-8010>9000-9010 2001:db8::1"]),
    ("-t 2001:db8::1/22:2022,1000-1050,~1020",
     ["22>2022 2001:db8::1", "1000-1019 2001:db8::1", "1021-1050 2001:db8::1"]),
    ("-t 2001:db8:ac10:fd01::1:10/22", ["22 2001:db8:ac10:fd01::1:10"]),
    ("-t 0.0.0.0/8080:80", ["8080>80 0.0.0.0"]),
    ("-t ::/8080:80", ["8080>80 ::"]),
    ("-t 80:90::1/22", ["22 80:90::1"]),  # an address, not a target
    ("-t %eth0/22", ["22 %eth0"]),
    ("-t */80", ["80"]),
    ("-t *%eth0/80", ["80 %eth0"]),
    ("-t %eth0/all", ["~1-32767 %eth0", "~61000-65535 %eth0"]),
    ("-t 192.0.2.1%eth0/22", ["22 192.0.2.1%eth0"]),
    ("-u 1.2.3.4%eth0/5000-5020:6000-6020", ["5000-5020>6000-6020 1.2.3.4%eth0"]),
    ("-t [fe80::1]%eth0/22", ["22 fe80::1%eth0"]),
    ("-t fe80::1%eth0/22", ["22 fe80::1%eth0"]),
    ("-t 192.0.2.1/all", ["~1-32767 192.0.2.1", "~61000-65535 192.0.2.1"]),
    ("-t ::1/~80", ["~1-79 ::1", "~81-32767 ::1", "~61000-65535 ::1"]),
    ("-t %abcdefghijklmno/22", ["22 %abcdefghijklmno"]),
    # where to
    ("-t 6443:192.0.2.20/6443", ["6443 @192.0.2.20"]),
    ("-t 6443:192.0.2.20/80", ["6443>80 @192.0.2.20"]),
    ("-t 6443:192.0.2.20", ["6443 @192.0.2.20"]),
    ("-t 6443:[2001:db8::1]/6443", ["6443 @2001:db8::1"]),
    ("-t 6443:[2001:db8::1]", ["6443 @2001:db8::1"]),
    ("-t 6443:[192.0.2.20]/6443", ["6443 @192.0.2.20"]),
    ("-t 80-82:192.0.2.20/90-92", ["80-82>90-92 @192.0.2.20"]),
    ("-t 80-82:192.0.2.20", ["80-82 @192.0.2.20"]),
    ("-t 22,80:192.0.2.20/8080", ["22", "80>8080 @192.0.2.20"]),
    ("-t 80:192.0.2.20/8080,22", ["80>8080 @192.0.2.20", "22"]),
    ("-t 0.0.0.0/5000:192.0.2.5/6000", ["5000>6000 0.0.0.0 @192.0.2.5"]),
    ("-t ::1/5000:[2001:db8::5]/6000", ["5000>6000 ::1 @2001:db8::5"]),
    ("-t %eth0/5000:[2001:db8::5]/6000", ["5000>6000 %eth0 @2001:db8::5"]),
    ("-t ~81,80-82:192.0.2.20/90-92", ["80>90 @192.0.2.20", "82>92 @192.0.2.20"]),
    ("-T 6443:192.0.2.20/6443", ["6443 @192.0.2.20"]),
    ("-T 5432:127.0.0.5/5433", ["5432>5433 @127.0.0.5"]),
    ("-U 53:[2001:db8::53]/5353", ["53>5353 @2001:db8::53"]),
    ("-t auto,6443:192.0.2.20/6443", ["?6443 @192.0.2.20"]),
]  # fmt: skip


def short(rule: Rule) -> str:
    """A rule as in the table."""

    def span(first: int, last: int) -> str:
        return str(first) if first == last else f"{first}-{last}"

    text = ("?" if rule.auto else "~" if rule.weak else "") + span(rule.first, rule.last)
    if rule.to != rule.first:
        text += ">" + span(rule.to, rule.target_port(rule.last))
    if rule.addr is not None or rule.ifname is not None:
        text += " " + (addr.text(rule.addr) if rule.addr is not None else "")
        text += f"%{rule.ifname}" if rule.ifname else ""
    return f"{text} @{addr.text(rule.target)}" if rule.target else text


@pytest.mark.parametrize(("option", "expected"), GOOD)
def test_good(option: str, expected: list[str]) -> None:
    rules = parsed(option)
    assert [short(rule) for rule in rules] == expected
    for rule in rules:
        assert (rule.proto, rule.outbound) == PROTOCOLS[option[1]]
        assert rule.option == option
        assert rule.weak or not rule.auto


def test_a_rule_in_full() -> None:
    assert parsed("-u [fe80::1]%eth0/80-82:[2001:db8::1]/90-92,~81") == (
        Rule("-u [fe80::1]%eth0/80-82:[2001:db8::1]/90-92,~81", PROTO_UDP, False, 80, 80, 90,
             addr.packed("fe80::1"), "eth0", addr.packed("2001:db8::1")),
        Rule("-u [fe80::1]%eth0/80-82:[2001:db8::1]/90-92,~81", PROTO_UDP, False, 82, 82, 92,
             addr.packed("fe80::1"), "eth0", addr.packed("2001:db8::1")),
    )  # fmt: skip


# Invalid -----------------------------------------------------------------------------------------------------------

INVALID = "Invalid port specifier "
MISSING = "a port is missing (give ports, ranges or exclusions like ~22, separated by commas)"
NUMBER = "not a port (a decimal number, 1 to 65535)"
ZERO = "port 0 can't be forwarded (give 1 to 65535)"
IFNAME = "not an interface name (1 to 127 characters, no blanks, '/', ':' or '%')"
NO_BIND = "-T and -U listen on the loopback of the namespace: leave out address and interface"
GROUP = "a group of hosts can't be listened on: give an address of this host, or '*' for any"
NO_HOST = "nothing can be connected to there: give the address of one host"
ADDRESS = "not an IPv4 or IPv6 address"
NOTHING_LEFT = "every port is excluded ('none' forwards nothing)"

BAD: list[tuple[str, str]] = [
    # missing pieces
    ("-t ", f"{INVALID}-t : '' at character 1: {MISSING}"),
    ("-t 22,", f"{INVALID}-t 22,: '' at character 4: {MISSING}"),
    ("-t ,22", f"{INVALID}-t ,22: '' at character 1: {MISSING}"),
    ("-t 22,,80", f"{INVALID}-t 22,,80: '' at character 4: {MISSING}"),
    ("-t 127.0.0.1/", f"{INVALID}-t 127.0.0.1/: '' at character 11: {MISSING}"),
    ("-t /80", f"{INVALID}-t /80: '' at character 1: an address to listen on is missing before '/' ('*' is any)"),
    ("-t ~", f"{INVALID}-t ~: '' at character 2: a port is missing"),
    ("-t 22-", f"{INVALID}-t 22-: '' at character 4: a port is missing"),
    ("-t -22", f"{INVALID}-t -22: '' at character 1: a port is missing"),
    ("-t 22:", f"{INVALID}-t 22:: '' at character 4: a port is missing"),
    ("-t :22", f"{INVALID}-t :22: '' at character 1: a port is missing"),
    ("-t 22:192.0.2.1/", f"{INVALID}-t 22:192.0.2.1/: '' at character 14: a port is missing"),
    # numbers
    ("-t 0", f"{INVALID}-t 0: '0' at character 1: {ZERO}"),
    ("-t 0-80", f"{INVALID}-t 0-80: '0' at character 1: {ZERO}"),
    ("-t 22:0", f"{INVALID}-t 22:0: '0' at character 4: {ZERO}"),
    ("-t ~0", f"{INVALID}-t ~0: '0' at character 2: {ZERO}"),
    ("-t 000", f"{INVALID}-t 000: '000' at character 1: {ZERO}"),
    ("-t 65536", f"{INVALID}-t 65536: '65536' at character 1: the last port is 65535"),
    ("-t 99999", f"{INVALID}-t 99999: '99999' at character 1: the last port is 65535"),
    ("-t 22,80-70000", f"{INVALID}-t 22,80-70000: '70000' at character 7: the last port is 65535"),
    ("-t 22:65536", f"{INVALID}-t 22:65536: '65536' at character 4: the last port is 65535"),
    ("-t 4294967318", f"{INVALID}-t 4294967318: '4294967318' at character 1: the last port is 65535"),
    ("-t abc", f"{INVALID}-t abc: 'abc' at character 1: {NUMBER}"),
    ("-t 22x", f"{INVALID}-t 22x: '22x' at character 1: {NUMBER}"),
    ("-t +80", f"{INVALID}-t +80: '+80' at character 1: {NUMBER}"),
    ("-t  80", f"{INVALID}-t  80: ' 80' at character 1: {NUMBER}"),
    ("-t 80 ", f"{INVALID}-t 80 : '80 ' at character 1: {NUMBER}"),
    ("-t 0x50", f"{INVALID}-t 0x50: '0x50' at character 1: {NUMBER}"),
    ("-t 8_0", f"{INVALID}-t 8_0: '8_0' at character 1: {NUMBER}"),
    ("-t \u0662\u0662", f"{INVALID}-t \u0662\u0662: '\u0662\u0662' at character 1: {NUMBER}"),  # Arabic digits
    ("-t 8\u00b2", f"{INVALID}-t 8\u00b2: '8\u00b2' at character 1: {NUMBER}"),
    ("-t 80\n", f"{INVALID}-t 80\\n: '80\\n' at character 1: {NUMBER}"),
    ("-t 80\0", f"{INVALID}-t 80\\x00: '80\\x00' at character 1: {NUMBER}"),
    ("-t 22;80", f"{INVALID}-t 22;80: '22;80' at character 1: {NUMBER}"),
    ("-t All", f"{INVALID}-t All: 'All' at character 1: {NUMBER}"),
    # ranges
    ("-t 80-70", f"{INVALID}-t 80-70: '70' at character 4: the range ends before it begins"),
    ("-t 22,~80-70", f"{INVALID}-t 22,~80-70: '70' at character 8: the range ends before it begins"),
    ("-t 22:92-90", f"{INVALID}-t 22:92-90: '90' at character 7: the range ends before it begins"),
    ("-t 80-90-100", f"{INVALID}-t 80-90-100: '90-100' at character 4: {NUMBER}"),
    ("-t 80-82:90-93", f"{INVALID}-t 80-82:90-93: '90-93' at character 7: "
     "the ranges have different lengths, 3 and 4 ports (did you mean 90-92?)"),
    ("-t 80-82:90", f"{INVALID}-t 80-82:90: '90' at character 7: "
     "the ranges have different lengths, 3 and 1 ports (did you mean 90-92?)"),
    ("-t 80:90-92", f"{INVALID}-t 80:90-92: '90-92' at character 4: "
     "the ranges have different lengths, 1 and 3 ports (did you mean 90?)"),
    ("-t 80-82:65534", f"{INVALID}-t 80-82:65534: '65534' at character 7: 3 ports from 65534 on go beyond 65535"),
    ("-t 80-82:192.0.2.1/90-91", f"{INVALID}-t 80-82:192.0.2.1/90-91: '90-91' at character 17: "
     "the ranges have different lengths, 3 and 2 ports (did you mean 90-92?)"),
    ("-t 20-30,25", f"{INVALID}-t 20-30,25: '25' at character 7: port 25 is in '20-30', too: leave out one of them"),
    ("-t 25,20-30", f"{INVALID}-t 25,20-30: '20-30' at character 4: port 25 is in '25', too: leave out one of them"),
    ("-t 80,22,80:8080",
     f"{INVALID}-t 80,22,80:8080: '80:8080' at character 7: port 80 is in '80', too: leave out one of them"),
    # exclusions
    ("-t ~20-30,~25-40", "Overlapping excluded ranges -t ~20-30,~25-40: '~25-40' at character 8: "
     "ports 25-30 are in '~20-30', too: leave out one of them"),
    ("-t ~20,~20", "Overlapping excluded ranges -t ~20,~20: '~20' at character 5: "
     "port 20 is in '~20', too: leave out one of them"),
    ("-t 80,~80", f"{INVALID}-t 80,~80: '80,~80' at character 1: {NOTHING_LEFT}"),
    ("-t ~1-65535", f"{INVALID}-t ~1-65535: '~1-65535' at character 1: {NOTHING_LEFT}"),
    ("-t ~1-32767,~61000-65535",
     f"{INVALID}-t ~1-32767,~61000-65535: '~1-32767,~61000-65535' at character 1: {NOTHING_LEFT}"),
    ("-t auto,~1-65535", f"{INVALID}-t auto,~1-65535: 'auto,~1-65535' at character 1: {NOTHING_LEFT}"),
    ("-t ::1/80,~80", f"{INVALID}-t ::1/80,~80: '80,~80' at character 5: {NOTHING_LEFT}"),
    ("-t ~22:2022",
     f"{INVALID}-t ~22:2022: '~22:2022' at character 1: "
     "ports that are excluded lead nowhere: leave out what follows ':'"),
    ("-t ~all", f"{INVALID}-t ~all: 'all' at character 2: {NUMBER}"),
    ("-t ~~22", f"{INVALID}-t ~~22: '~22' at character 2: {NUMBER}"),
    # words
    ("-t none,22", f"{INVALID}-t none,22: 'none' at character 1: 'none' stands alone"),
    ("-t 22,none", f"{INVALID}-t 22,none: 'none' at character 4: 'none' stands alone"),
    ("-t 127.0.0.1/none", f"{INVALID}-t 127.0.0.1/none: 'none' at character 11: 'none' stands alone"),
    ("-t all:192.0.2.1,all", "Port forwarding mode 'all' conflicts with previous mode: -t all:192.0.2.1,all: "
     "'all' at character 15: 'all:192.0.2.1' was given before: leave one out"),
    ("-t auto:80",
     f"{INVALID}-t auto:80: '80' at character 6: 'auto' has no target: give the ports that have one (auto,8080:80)"),
    ("-t all:80", f"{INVALID}-t all:80: '80' at character 5: {ADDRESS}"),
    # where to listen
    ("-T 127.0.0.1/80", f"{INVALID}-T 127.0.0.1/80: '127.0.0.1' at character 1: {NO_BIND}"),
    ("-U ::1/80", f"{INVALID}-U ::1/80: '::1' at character 1: {NO_BIND}"),
    ("-T %lo/80", f"{INVALID}-T %lo/80: '%lo' at character 1: {NO_BIND}"),
    ("-T */80", f"{INVALID}-T */80: '*' at character 1: {NO_BIND}"),
    ("-T 127.0.0.1/auto", f"{INVALID}-T 127.0.0.1/auto: '127.0.0.1' at character 1: {NO_BIND}"),
    ("-t 300.0.0.1/80", f"{INVALID}-t 300.0.0.1/80: '300.0.0.1' at character 1: {ADDRESS}"),
    ("-t 127.1/80", f"{INVALID}-t 127.1/80: '127.1' at character 1: {ADDRESS}"),
    ("-t localhost/80", f"{INVALID}-t localhost/80: 'localhost' at character 1: {ADDRESS}"),
    ("-t []/80", f"{INVALID}-t []/80: '[]' at character 1: {ADDRESS}"),
    ("-t [::1/80", f"{INVALID}-t [::1/80: '[::1' at character 1: ']' is missing at the end of the address"),
    ("-t [::1]x/80", f"{INVALID}-t [::1]x/80: '[::1]x' at character 1: ']' is missing at the end of the address"),
    ("-t ::1]/80", f"{INVALID}-t ::1]/80: '::1]' at character 1: {ADDRESS}"),
    ("-t 80:90/80", f"{INVALID}-t 80:90/80: '90' at character 4: {ADDRESS}"),
    ("-t 224.0.0.1/80", f"{INVALID}-t 224.0.0.1/80: '224.0.0.1' at character 1: {GROUP}"),
    ("-u ff02::1/80", f"{INVALID}-u ff02::1/80: 'ff02::1' at character 1: {GROUP}"),
    ("-u 255.255.255.255/80", f"{INVALID}-u 255.255.255.255/80: '255.255.255.255' at character 1: {GROUP}"),
    ("-t ::ffff:192.0.2.1/80", f"{INVALID}-t ::ffff:192.0.2.1/80: '::ffff:192.0.2.1' at character 1: "
     "an IPv4 address in IPv6 notation: give 192.0.2.1"),
    ("-t fe80::1/80",
     f"{INVALID}-t fe80::1/80: 'fe80::1' at character 1: a link-local address needs its interface: fe80::1%eth0/..."),
    ("-t %/80", f"{INVALID}-t %/80: '' at character 2: {IFNAME}"),
    ("-t 127.0.0.1%/80", f"{INVALID}-t 127.0.0.1%/80: '' at character 11: {IFNAME}"),
    (f"-t %{'n' * 128}/80", f"{INVALID}-t %{'n' * 128}/80: '{'n' * 128}' at character 2: {IFNAME}"),
    ("-t %a b/80", f"{INVALID}-t %a b/80: 'a b' at character 2: {IFNAME}"),
    ("-t %eth0%eth1/80", f"{INVALID}-t %eth0%eth1/80: 'eth0%eth1' at character 2: {IFNAME}"),
    ("-t 127.0.0.1/80/90", f"{INVALID}-t 127.0.0.1/80/90: '80/90' at character 11: {NUMBER}"),
    ("-t 127.0.0.1", f"{INVALID}-t 127.0.0.1: '127.0.0.1' at character 1: {NUMBER}"),
    # where to
    ("-t 80:0.0.0.0/80", f"{INVALID}-t 80:0.0.0.0/80: '0.0.0.0' at character 4: {NO_HOST}"),
    ("-t 80:[::]/80", f"{INVALID}-t 80:[::]/80: '[::]' at character 4: {NO_HOST}"),
    ("-u 80:224.0.0.1/80", f"{INVALID}-u 80:224.0.0.1/80: '224.0.0.1' at character 4: {NO_HOST}"),
    ("-U 80:255.255.255.255", f"{INVALID}-U 80:255.255.255.255: '255.255.255.255' at character 4: {NO_HOST}"),
    ("-t 80:[::ffff:1.2.3.4]/80", f"{INVALID}-t 80:[::ffff:1.2.3.4]/80: '[::ffff:1.2.3.4]' at character 4: "
     "an IPv4 address in IPv6 notation: give 1.2.3.4"),
    ("-t 80-82:2001:db8::1/80-82", f"{INVALID}-t 80-82:2001:db8::1/80-82: '2001:db8::1' at character 7: "
     "an IPv6 address needs brackets here: [2001:db8::1]"),
    ("-t 22,80:2001:db8::1", f"{INVALID}-t 22,80:2001:db8::1: '2001:db8::1' at character 7: "
     "an IPv6 address needs brackets here: [2001:db8::1]"),
    ("-t 22:2022:3", f"{INVALID}-t 22:2022:3: '2022:3' at character 4: {ADDRESS}"),
    ("-t 80:192.0.2.300/80", f"{INVALID}-t 80:192.0.2.300/80: '192.0.2.300' at character 4: {ADDRESS}"),
    ("-t 80:example.org/80", f"{INVALID}-t 80:example.org/80: '80:example.org' at character 1: {ADDRESS}"),
]  # fmt: skip


@pytest.mark.parametrize(("option", "message"), BAD)
def test_bad(option: str, message: str) -> None:
    with pytest.raises(Fatal) as e:
        parsed(option)
    assert str(e.value) == message


def test_long_specifications_are_not_repeated_whole() -> None:
    with pytest.raises(Fatal) as e:
        parse_spec("t", "1," * 50000 + "x" * 5000)
    assert len(str(e.value)) < 700
    with pytest.raises(Fatal, match="at character 100001: not a port"):
        parse_spec("t", "".join("1," for _ in range(50000)) + "x")


# Any text, any amount ----------------------------------------------------------------------------------------------

PIECES = st.sampled_from([
    "none", "all", "auto", "0", "1", "22", "80-90", "70-60", "65535", "65536", "~", "~22", "~80-85", ":", ",", ",", "-",
    "/", "%", "*", "[", "]", "eth0", "127.0.0.1", "::1", "fe80::1", "[2001:db8::1]", "224.0.0.1", "0.0.0.0", "\0", "\n",
])  # fmt: skip
TEXT = st.text(st.characters(), max_size=30) | st.lists(PIECES, max_size=12).map("".join)


@given(st.sampled_from("tuTU"), TEXT, st.sampled_from([range(0), range(1, 65536), EPHEMERAL]))
def test_any_text_gives_rules_or_one_line(letter: str, text: str, ephemeral: range) -> None:
    rules: tuple[Rule, ...] = ()
    message = ""
    try:
        rules = parse_spec(letter, text, ephemeral=ephemeral)
    except Fatal as e:
        message = str(e)
    assert message.isprintable()
    taken: set[int] = set()
    for rule in rules:
        assert 1 <= rule.first <= rule.last <= PORT_MAX
        assert 1 <= rule.to <= rule.target_port(rule.last) <= PORT_MAX
        assert not taken.intersection(rule.ports)
        taken.update(rule.ports)


NUMBERS = st.integers(1, 12)
RANGES = st.tuples(NUMBERS, NUMBERS).map(lambda r: (min(r), max(r)))


@given(st.lists(RANGES, max_size=4), st.lists(RANGES, max_size=4))
def test_exclusions_take_out_exactly_their_ports(
    included: list[tuple[int, int]], excluded: list[tuple[int, int]]
) -> None:
    def items(prefix: str, ranges: list[tuple[int, int]]) -> list[str]:
        return [f"{prefix}{first}-{last}" for first, last in ranges]

    text = ",".join(items("", included) + items("~", excluded))
    wanted = [port for first, last in included for port in range(first, last + 1)]
    unwanted = [port for first, last in excluded for port in range(first, last + 1)]
    left = set(wanted or range(1, PORT_MAX + 1)) - set(unwanted)
    if text and left and len(set(wanted)) == len(wanted) and len(set(unwanted)) == len(unwanted):
        assert {port for rule in parse_spec("t", text, ephemeral=range(0)) for port in rule.ports} == left
    else:
        with pytest.raises(Fatal):
            parse_spec("t", text, ephemeral=range(0))


def test_many_ports() -> None:
    """As many items and exclusions as there can be: no step may be quadratic, which would take minutes."""
    every = range(1, PORT_MAX + 1)
    assert len(parse_spec("t", ",".join(map(str, every)))) == PORT_MAX
    assert len(parse_spec("t", "1-65535," + ",".join(f"~{port}" for port in every if port % 2))) == PORT_MAX // 2
    with pytest.raises(Fatal, match="the last port is 65535"):
        parse_spec("t", "9" * 100000)
    with pytest.raises(Fatal, match="not an IPv4 or IPv6 address"):
        parse_spec("t", ":" * 100000 + "/80")
