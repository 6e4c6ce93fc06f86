from __future__ import annotations

import errno
import select
import socket
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.linux import sockopt
from passt.linux.sockopt import ORIGIN_ICMP, ORIGIN_ICMP6, ORIGIN_LOCAL, ExtendedError, read_errors
from passt.wire.cursor import Malformed


def native(value: int, size: int) -> bytes:
    return value.to_bytes(size, sys.byteorder)


def head(number: int, origin: int, kind: int, code: int, info: int) -> bytes:
    return native(number, 4) + bytes((origin, kind, code, 0)) + native(info, 4) + bytes(4)


FOUR = (
    head(111, 2, 3, 3, 0) + native(2, 2) + bytes.fromhex("0000 c0000201 0000000000000000"),
    ExtendedError(111, ORIGIN_ICMP, 3, 3, 0, addr.packed("192.0.2.1")),
)
SIX = (
    head(90, 3, 2, 0, 1280) + native(10, 2) + bytes.fromhex("0000 00000000 20010db8000000000000000000000001 00000000"),
    ExtendedError(90, ORIGIN_ICMP6, 2, 0, 1280, addr.packed("2001:db8::1")),
)
LOCAL = (head(90, 1, 0, 0, 1400) + bytes(16), ExtendedError(90, ORIGIN_LOCAL, 0, 0, 1400, None))


@pytest.mark.parametrize(("data", "error"), [FOUR, SIX, LOCAL], ids=["IPv4", "IPv6", "local"])
def test_extended_error_both_ways(data: bytes, error: ExtendedError) -> None:
    assert ExtendedError.parse(data) == error
    assert error.emit() == data


def test_extended_error_without_address() -> None:
    assert ExtendedError.parse(LOCAL[0][:16]) == LOCAL[1]


@given(st.binary(max_size=60))
def test_extended_error_parses_or_is_malformed(data: bytes) -> None:
    try:
        error = ExtendedError.parse(data)
    except Malformed:
        return
    assert ExtendedError.parse(error.emit()) == error


def test_extended_error_as_text() -> None:
    assert str(FOUR[1]) == "ECONNREFUSED (type 3, code 3)"
    assert str(ExtendedError(9999, 1, 0, 0, 0, None)) == "9999 (type 0, code 0)"


@pytest.fixture
def refused() -> Iterator[socket.socket]:
    """A socket whose peer, a port of the loopback, has just been closed."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setblocking(False)
        s.setsockopt(*sockopt.recverr(socket.AF_INET), 1)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            peer.bind(("127.0.0.1", 0))
            s.connect(peer.getsockname())
        yield s


def wait_for(s: socket.socket, event: int) -> bool:
    p = select.poll()
    p.register(s, event)
    return bool(p.poll(5000))


def test_read_errors_returns_the_quoted_payload_and_the_offender(refused: socket.socket) -> None:
    refused.send(b"hello")
    assert wait_for(refused, select.POLLERR)
    ((error, quoted),) = read_errors(refused)
    assert quoted == b"hello"
    assert error == ExtendedError(errno.ECONNREFUSED, ORIGIN_ICMP, 3, 3, 0, addr.LOOPBACK4)


def test_read_errors_leaves_nothing_pending(refused: socket.socket) -> None:
    refused.send(b"hello")
    assert wait_for(refused, select.POLLERR)
    read_errors(refused)
    assert refused.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
    assert read_errors(refused) == []
    refused.send(b"again")  # would raise what was pending


class Endless:
    """A socket whose error queue is never empty."""

    def __init__(self) -> None:
        self.calls = 0

    def recvmsg(self, *_: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        self.calls += 1
        other = (socket.SOL_SOCKET, 1, b"?")  # a control message of another kind is passed over
        return b"quoted", [other, (socket.IPPROTO_IP, sockopt.IP_RECVERR, FOUR[0])], 0, None

    def getsockopt(self, *_: int) -> int:
        return 0


def test_read_errors_is_bounded() -> None:
    s = Endless()
    found = read_errors(s)  # type: ignore[arg-type]
    assert s.calls == sockopt.ERRORS_PER_DRAIN
    assert found == [(FOUR[1], b"quoted")] * s.calls


def test_a_socket_that_was_destroyed() -> None:
    class Gone(Endless):
        def recvmsg(self, *_: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
            raise BlockingIOError

        def getsockopt(self, level: int, option: int, *_: int) -> int:
            assert (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR)
            return errno.ECONNABORTED

    with pytest.raises(sockopt.Destroyed):
        read_errors(Gone())  # type: ignore[arg-type]


def test_recverr_by_family() -> None:
    assert sockopt.recverr(socket.AF_INET) == (socket.IPPROTO_IP, 11)
    assert sockopt.recverr(socket.AF_INET6) == (socket.IPPROTO_IPV6, 25)


@pytest.mark.parametrize(
    ("dst", "option"),
    [
        ("192.0.2.1", (socket.IPPROTO_IP, socket.IP_TTL)),
        ("224.0.0.251", (socket.IPPROTO_IP, socket.IP_MULTICAST_TTL)),
        ("2001:db8::1", (socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS)),
        ("ff02::fb", (socket.IPPROTO_IPV6, socket.IPV6_MULTICAST_HOPS)),
    ],
)
def test_hops_option(dst: str, option: tuple[int, int]) -> None:
    assert sockopt.hops_option(addr.packed(dst)) == option


def test_default_hops_are_those_of_a_new_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        assert sockopt.default_hops()[4] == s.getsockopt(socket.IPPROTO_IP, socket.IP_TTL)


class OldKernel(socket.socket):
    """A socket that knows none of the options in `unknown`."""

    unknown: frozenset[int] = frozenset()

    def setsockopt(self, *args: int) -> None:  # type: ignore[override]
        if args[1] in self.unknown:
            raise OSError(errno.ENOPROTOOPT, "Protocol not available")
        super().setsockopt(*args)


def test_default_hops_of_a_host_without_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoIpv6(socket.socket):
        def __init__(self, family: int, kind: int) -> None:
            if family == socket.AF_INET6:
                raise OSError(errno.EAFNOSUPPORT, "no IPv6")
            super().__init__(family, kind)

    monkeypatch.setattr(socket, "socket", NoIpv6)
    hops = sockopt.default_hops()
    assert hops[16] == 0
    assert hops[4] > 0


def test_probes_ask_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", OldKernel)
    monkeypatch.setattr(OldKernel, "unknown", frozenset((sockopt.UDP_GRO,)))
    assert not sockopt.probe_udp_gro()
    monkeypatch.setattr(OldKernel, "unknown", frozenset((sockopt.UDP_SEGMENT,)))
    assert not sockopt.probe_udp_segment()
    monkeypatch.setattr(OldKernel, "unknown", frozenset())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.setsockopt(sockopt.SOL_UDP, sockopt.UDP_SEGMENT, 100)
        assert sockopt.probe_udp_segment() == (s.getsockopt(sockopt.SOL_UDP, sockopt.UDP_SEGMENT) == 100)
