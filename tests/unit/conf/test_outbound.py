"""The outbound address and interface are tried at the start."""

from __future__ import annotations

import errno
import os
import socket
from dataclasses import replace
from typing import Any

import pytest

from passt import addr
from passt.conf.outbound import check
from passt.log import Fatal
from tests.unit.support import CONFIG, IP4, IP6

OUT4, OUT6, LOCAL6 = addr.packed("203.0.113.5"), addr.packed("2001:db8:5::5"), addr.packed("fe80::5")


class Socket:
    """Notes what is asked of it, and fails where it is told to."""

    def __init__(self, fails: dict[str, int], calls: list[tuple[Any, ...]], family: int) -> None:
        self._fails, self._calls, self._family = fails, calls, family

    def _call(self, name: str, *args: Any) -> None:
        self._calls.append((name, self._family, *args))
        if number := self._fails.get(name):
            raise OSError(number, os.strerror(number))

    def setsockopt(self, level: int, option: int, value: bytes) -> None:
        assert (level, option) == (socket.SOL_SOCKET, socket.SO_BINDTODEVICE)
        self._call("interface", value)

    def bind(self, address: tuple[Any, ...]) -> None:
        self._call("bind", address)

    def __enter__(self) -> Socket:
        return self

    def __exit__(self, *exception: object) -> None:
        self._calls.append(("close", self._family))


def checked(ip4: dict[str, Any], ip6: dict[str, Any], **fails: int) -> list[tuple[Any, ...]]:
    """The calls that were made."""
    calls: list[tuple[Any, ...]] = []
    config = replace(CONFIG, ip4=replace(IP4, **ip4), ip6=replace(IP6, **ip6), scope_id=7)
    check(config, lambda family, kind: Socket(fails, calls, family))
    return calls


def test_nothing_to_try() -> None:
    assert checked({}, {}) == []
    check(replace(CONFIG, ip4=None, ip6=None))


def test_both_families() -> None:
    assert checked({"addr_out": OUT4, "if_out": "eth7"}, {"addr_out": OUT6, "if_out": "eth8"}) == [
        ("interface", socket.AF_INET, b"eth7\0"),
        ("bind", socket.AF_INET, ("203.0.113.5", 0)),
        ("close", socket.AF_INET),
        ("interface", socket.AF_INET6, b"eth8\0"),
        ("bind", socket.AF_INET6, ("2001:db8:5::5", 0, 0, 0)),
        ("close", socket.AF_INET6),
    ]
    assert ("bind", socket.AF_INET6, ("fe80::5", 0, 0, 7)) in checked({}, {"addr_out": LOCAL6})


@pytest.mark.parametrize(("number", "advice"), [(errno.EPERM, "it needs CAP_NET_RAW"), (errno.ENODEV, "see ip link")])
def test_an_interface_that_cannot_be_had(number: int, advice: str) -> None:
    text = os.strerror(number)
    for given, option in ((({"if_out": "eth7"}, {}), 4), (({}, {"if_out": "eth7"}), 6)):
        with pytest.raises(Fatal, match=rf"^Couldn't bind sockets to interface eth7: {text} \(--outbound-if{option}; "):
            checked(*given, interface=number)
        with pytest.raises(Fatal, match=advice):
            checked(*given, interface=number)


def test_an_address_that_is_no_own_one() -> None:
    message = r"^Couldn't bind sockets to outbound address 203\.0\.113\.5: .* \(--outbound; it must be an address of"
    with pytest.raises(Fatal, match=message):
        checked({"addr_out": OUT4}, {}, bind=errno.EADDRNOTAVAIL)


def test_with_the_kernel() -> None:
    check(replace(CONFIG, ip4=replace(IP4, addr_out=addr.LOOPBACK4, if_out="lo"), ip6=None))
    with pytest.raises(Fatal, match="outbound address 203"):
        check(replace(CONFIG, ip4=replace(IP4, addr_out=OUT4), ip6=None))
    with pytest.raises(Fatal, match="interface none-such"):
        check(replace(CONFIG, ip4=replace(IP4, if_out="none-such"), ip6=None))
