"""ICMP errors about SYN: what routers say about the guest's, with its TTL, and what the guest says about ours."""

from __future__ import annotations

import errno
import socket
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, IPerror, TCPerror
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt import addr
from passt.linux.sockopt import ORIGIN_ICMP, ORIGIN_ICMP6, ORIGIN_LOCAL, ExtendedError, hops_option, recverr
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLOUT
from passt.tcp_engine import syn_errors
from passt.wire.checksum import PROTO_TCP
from passt.wire.tcp import ACK, RST, SYN, SynOptions
from tests.unit.support import T0, link, reactor
from tests.unit.tcp_support import GUEST_ISN, MASK, FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]

ROUTER4, ROUTER6 = addr.packed("203.0.113.9"), addr.packed("2001:db8:aaaa::9")
DEFAULT = 64


@pytest.fixture(autouse=True)
def default(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's own TTL and hop limit."""
    monkeypatch.setattr(syn_errors, "default_hops", lambda: {4: DEFAULT, 16: DEFAULT})


@pytest.fixture(params=[True, False], ids=["ipv4", "ipv6"])
def v4(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


class Queue:
    """The error queue of a socket."""

    def __init__(self, *errors: ExtendedError) -> None:
        self.errors = list(errors)

    def recvmsg(self, size: int, control: int, flags: int) -> Any:
        assert flags & socket.MSG_ERRQUEUE
        if not self.errors:
            raise BlockingIOError
        error = self.errors.pop(0)
        option = recverr(socket.AF_INET if error.offender is None or len(error.offender) == 4 else socket.AF_INET6)
        return b"", [(*option, error.emit())], 0, None


def syn(talk: Talk, hops: int, seq: int = GUEST_ISN) -> None:
    """The guest's SYN with this TTL; connect(2) takes a while."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    put = talk.tcp.tap_handler
    talk.tcp.tap_handler = lambda key, flat, now: put(key, flat, now, hops)  # type: ignore[method-assign]
    talk.put((SYN, seq, 0, b"", 64240, SynOptions(1460, 7).emit()))
    talk.tcp.tap_handler = put  # type: ignore[method-assign]
    talk.seq = 1


def option(talk: Talk, v4: bool) -> Any:
    return talk.sock.options.get(hops_option(bytes(4 if v4 else 16)))


def queue_on(talk: Talk, v4: bool) -> Any:
    return talk.sock.options.get(recverr(socket.AF_INET if v4 else socket.AF_INET6))


def fail(talk: Talk, number: int, *errors: ExtendedError) -> None:
    talk.sock.recvmsg = Queue(*errors).recvmsg  # type: ignore[attr-defined]
    talk.sock.error = number
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLERR | EPOLLHUP | EPOLLOUT, talk.now)


def test_a_low_ttl_is_kept_and_the_router_is_told(v4: bool) -> None:
    talk = Talk(v6=not v4)
    syn(talk, 3)
    assert option(talk, v4) == 3 and queue_on(talk, v4) == 1
    origin, kind, router = (ORIGIN_ICMP, 11, ROUTER4) if v4 else (ORIGIN_ICMP6, 3, ROUTER6)
    fail(talk, errno.EHOSTUNREACH, ExtendedError(errno.EHOSTUNREACH, origin, kind, 0, 0, router))
    packet = Ether(link(talk.ctx).take_one())[IP if v4 else IPv6]
    assert (packet.src, packet.dst) == (addr.text(router), addr.text(talk.key[: 4 if v4 else 16]))
    assert bytes(packet.payload)[:2] == bytes((kind, 0))
    quoted = (IP if v4 else IPv6)(bytes(packet.payload)[8:])
    assert (quoted.src, quoted.dst) == (packet.dst, addr.text(talk.key[4:8] if v4 else talk.key[16:32]))
    assert (quoted[TCP].sport, quoted[TCP].dport, quoted[TCP].seq) == (40000, 80, GUEST_ISN)
    assert talk.gone


@pytest.mark.parametrize("hops", [0, DEFAULT])
def test_the_hosts_own_ttl_costs_nothing(v4: bool, hops: int) -> None:
    talk = Talk(v6=not v4)
    syn(talk, hops)
    assert option(talk, v4) is None and queue_on(talk, v4) is None
    fail(talk, errno.EHOSTUNREACH)
    packet = Ether(link(talk.ctx).take_one())[IP if v4 else IPv6]
    assert bytes(packet.payload)[:2] == (b"\3\1" if v4 else b"\1\3")
    assert packet.src == addr.text(talk.key[4:8] if v4 else talk.key[16:32])


def test_a_connected_socket_has_no_error_queue(v4: bool) -> None:
    """IP_RECVERR makes an ICMP error fatal that TCP has to survive (RFC 5461)."""
    talk = Talk(v6=not v4)
    syn(talk, 128)
    reactor(talk.ctx).fire(talk.sock.fd, EPOLLOUT, talk.now)
    talk.expect(SYN | ACK)
    assert option(talk, v4) == 128 and queue_on(talk, v4) == 0


def test_the_host_peer_has_the_address_that_the_guest_knows() -> None:
    """A resolver, for example, to which queries to another address are forwarded."""
    talk = Talk()
    syn(talk, 3)
    (conn,) = talk.tcp._conns.values()
    conn.host = ROUTER4, 80
    fail(talk, errno.EHOSTUNREACH, ExtendedError(errno.EHOSTUNREACH, ORIGIN_ICMP, 3, 10, 0, ROUTER4))
    packet = Ether(link(talk.ctx).take_one())[IP]
    assert packet.src == addr.text(talk.key[4:8]) and bytes(packet.payload)[:2] == b"\3\12"


def test_local_errors_are_told_by_their_errno() -> None:
    talk = Talk()
    syn(talk, 5)
    fail(talk, errno.ENETUNREACH, ExtendedError(errno.ENETUNREACH, ORIGIN_LOCAL, 0, 0, 0, None))
    packet = Ether(link(talk.ctx).take_one())[IP]
    assert bytes(packet.payload)[:2] == b"\3\0"
    assert IPerror(bytes(packet.payload)[8:])[TCPerror].seq == GUEST_ISN


def test_a_timeout_is_silence() -> None:
    talk = Talk()
    syn(talk, 5)
    fail(talk, errno.ETIMEDOUT)
    talk.expect_nothing()
    assert talk.gone


def test_syn_again_with_another_ttl() -> None:
    """As of tcptraceroute, which keeps its port: the kernel's next SYN has the new one."""
    talk = Talk()
    syn(talk, 1)
    assert option(talk, True) == 1
    syn(talk, 2)
    syn(talk, 0)  # a guest whose TTL is not known
    assert option(talk, True) == 2 and len(FakeSocket.made) == 1
    syn(talk, DEFAULT)
    assert option(talk, True) == DEFAULT
    syn(talk, 9, GUEST_ISN + 77)
    assert option(talk, True) == 9 and len(FakeSocket.made) == 2, "another attempt"


# The guest's errors about our SYN ------------------------------------------------------------------------------------


def upper(talk: Talk, seq: int | None = None) -> bytes:
    """The begin of our SYN as an error quotes it."""
    iss = next(iter(talk.tcp._conns.values())).iss if seq is None else seq
    return talk.key[-2:] + talk.key[-4:-2] + (iss & MASK).to_bytes(4, "big")


def asked(peer: str = "198.51.100.7") -> Talk:
    talk = Talk()
    talk.accept(peer)
    talk.expect(SYN)
    talk.key = next(iter(talk.tcp._conns))
    return talk


def error(talk: Talk, quoted: bytes) -> bool:
    return talk.ctx.services.errors[PROTO_TCP](talk.key, quoted, T0)


@pytest.mark.parametrize("more", [b"", bytes(12)], ids=["8 bytes", "the segment"])
def test_an_error_of_the_guest_refuses_the_client_at_once(more: bytes) -> None:
    """RFC 792 quotes 8 bytes, RFC 1812 more."""
    talk = asked()
    assert error(talk, upper(talk) + more)
    assert talk.sock.resets_on_close and talk.gone
    assert talk.ctx.flows.closed["tcp", "unreachable in the guest"] == 1
    assert not error(talk, upper(talk, 0)), "it is over"


def test_the_other_family_is_tried_first() -> None:
    talk = asked("127.0.0.1")
    assert error(talk, upper(talk))
    assert talk.expect(SYN)
    talk.key = next(iter(talk.tcp._conns))
    assert len(talk.key) == 36
    assert error(talk, upper(talk))
    assert talk.sock.resets_on_close and talk.gone


def test_a_forged_quote_does_nothing() -> None:
    talk = asked()
    assert not error(talk, upper(talk, 1))
    talk.key = talk.key[:-1] + b"\0"
    assert not error(talk, upper(talk))
    assert not talk.sock.closed and talk.ctx.flows.count == 1


def test_an_established_connection_stays() -> None:
    talk = asked()
    talk.answer()
    talk.expect(ACK)
    assert not error(talk, upper(talk))
    talk.guest(ACK)
    assert talk.ctx.flows.count == 1


def test_a_connection_of_the_guest_has_no_syn_of_ours() -> None:
    talk = Talk()
    syn(talk, DEFAULT)
    assert not error(talk, upper(talk))
    talk.guest(RST)


def test_the_error_about_a_syn_quotes_a_header_and_no_more() -> None:
    FakeSocket.connect_results = [errno.EHOSTUNREACH]
    talk = Talk()
    talk.syn()
    (frame,) = [f for f in link(talk.ctx).take() if Ether(f)[IP].proto == 1]
    quoted = IP(bytes(Ether(frame)[IP].payload)[8:])
    assert quoted.len == len(quoted) == 40
