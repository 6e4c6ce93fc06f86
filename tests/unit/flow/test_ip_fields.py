"""Options that are set for fields of IP headers."""

from __future__ import annotations

import pytest

from passt import addr
from passt.flow.ip_fields import DF, DF_PAYLOAD_MAX4, DF_PAYLOAD_MAX6, UNSET, apply
from passt.linux.sockopt import MTU_DISCOVER, TRAFFIC_CLASS, hops_option

HOSTS = [addr.packed("198.51.100.1"), addr.packed("2001:db8::1")]
Options = dict[tuple[int, int], int]


class Sock:
    def __init__(self) -> None:
        self.set: Options = {}

    def setsockopt(self, level: int, option: int, value: int) -> None:
        self.set[level, option] = value


def changes(host: bytes, former: int, fields: int) -> tuple[int, Options]:
    sock = Sock()
    return apply(sock, host, former, fields), sock.set


@pytest.mark.parametrize("host", HOSTS)
def test_only_what_changes_is_set(host: bytes) -> None:
    hops, tos, df = hops_option(host), TRAFFIC_CLASS[len(host) == 16], MTU_DISCOVER[len(host) == 16]
    for former, fields, options in (
        (UNSET | 64, DF | 64, {df: 2}),
        (UNSET | 64, 64, {df: 0}),
        (DF | 64, 64, {df: 0}),
        (DF | 64, DF | 1, {hops: 1}),
        (DF | 64, DF | 0xB900 | 64, {tos: 0xB9}),
        (DF | 0xB900 | 64, DF | 64, {tos: 0}),
        (DF | 64, DF | 64, {}),
    ):
        assert changes(host, former, fields) == (fields, options)


@pytest.mark.parametrize("host", HOSTS)
def test_what_is_not_known_stays(host: bytes) -> None:
    df = MTU_DISCOVER[len(host) == 16]
    assert changes(host, DF | 0xB900 | 64, 0) == (0xB900 | 64, {df: 0})
    assert changes(host, 0xB900 | 64, 0) == (0xB900 | 64, {})


@pytest.mark.parametrize("group", ["224.0.0.251", "255.255.255.255", "ff02::fb"])
def test_nothing_is_refused_that_goes_to_a_group(group: str) -> None:
    host = addr.packed(group)
    _, options = changes(host, UNSET | 1, DF | 1)
    assert options == {MTU_DISCOVER[len(host) == 16]: 0}


def test_the_longest_datagrams_with_dont_fragment_fill_an_ethernet_frame() -> None:
    assert (DF_PAYLOAD_MAX4, DF_PAYLOAD_MAX6) == (1472, 1452)
