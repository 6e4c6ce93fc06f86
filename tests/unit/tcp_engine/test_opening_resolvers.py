"""TCP to an address that stands for the host's resolvers: the next one is tried before the guest hears anything."""

from __future__ import annotations

import errno
import socket

import pytest

from passt import addr, log
from passt.flow.idle import NO_DESCRIPTORS
from passt.loop.reactor import EPOLLERR, EPOLLHUP, EPOLLIN, EPOLLOUT, EPOLLRDHUP
from passt.wire.tcp import ACK, PSH, RST, SYN
from tests.unit.support import link, reactor
from tests.unit.tcp_support import FakeSocket, Talk, fake_sockets

__all__ = ["fake_sockets"]
FORWARDED = {False: addr.packed("169.254.1.1"), True: addr.packed("2001:db8::53")}
A, B, C = "192.0.2.10", "192.0.2.11", "2001:db8::10"
USER_TIMEOUT = socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT


def talk_to(*hosts: str, v6: bool = False, port: int = 53) -> Talk:
    names = {"dns_match": tuple(FORWARDED.values()), "dns_hosts": tuple(map(addr.packed, hosts))}
    talk = Talk(v6=v6, peer=FORWARDED[v6], config=names)
    talk.key = talk.key[:-2] + port.to_bytes(2, "big")
    return talk


def connected() -> list[str]:
    """Peers that sockets were connected to, in order."""
    return [s.peer[0] for s in FakeSocket.made]


@pytest.mark.parametrize("port", [53, 853])
@pytest.mark.parametrize("v6", [False, True])
def test_the_best_resolver_is_connected_to(v6: bool, port: int) -> None:
    talk = talk_to(A, B, C, v6=v6, port=port)
    talk.syn()
    talk.expect(SYN | ACK)
    assert connected() == [C if v6 else A]
    assert talk.sock.peer[1] == port
    talk.guest(ACK)
    talk.guest(ACK | PSH, b"query")
    assert talk.sock.sent == b"query"


def test_other_ports_are_no_affair_of_resolvers() -> None:
    talk = talk_to(A, port=80)
    talk.syn()
    assert connected() == ["169.254.1.1"]


@pytest.mark.parametrize("immediately", [True, False])
def test_the_next_one_is_tried_if_one_fails(immediately: bool) -> None:
    FakeSocket.connect_results = [errno.ECONNREFUSED if immediately else errno.EINPROGRESS]
    talk = talk_to(A, C)
    if immediately:
        made = FakeSocket.connect_ex

        def connect_ex(self: FakeSocket, peer: tuple[object, ...]) -> int:
            return 0 if made(self, peer) and peer[0] == C else errno.ECONNREFUSED

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeSocket, "connect_ex", connect_ex)
            talk.syn()
    else:
        talk.syn()
        first = talk.sock
        first.error = errno.ETIMEDOUT  # with which everything is reported that there is
        reactor(talk.ctx).fire(first.fd, EPOLLIN | EPOLLOUT | EPOLLERR | EPOLLHUP | EPOLLRDHUP, talk.now)
        talk.expect_nothing()
        reactor(talk.ctx).end_turn(talk.now)
        assert first.closed and list(reactor(talk.ctx).refs) == [talk.sock.fd]
        talk.writable()
    talk.expect(SYN | ACK)
    assert connected() == [A, C]
    assert talk.ctx.resolvers.hosts[0].held > talk.now
    assert not talk.ctx.resolvers.hosts[1].held
    conn = talk.tcp._conns[talk.key]
    assert conn.resolvers_tried == ()
    assert conn.endpoints().host == f"[{C}]:53"


def test_the_last_one_may_connect_at_once() -> None:
    """No other is left, and none is needed."""
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = talk_to(A, B)
    talk.syn()
    FakeSocket.connect_results = [0]
    talk.host(error=errno.ETIMEDOUT)
    talk.expect(SYN | ACK)
    assert connected() == [A, B]
    assert talk.ctx.drops == {"dns: resolver failed: ETIMEDOUT": 1}
    assert not talk.ctx.resolvers.hosts[1].held


@pytest.mark.parametrize(
    ("error", "name"), [(OSError(errno.EMFILE, "too many"), "EMFILE"), (OSError("no number"), "EIO")]
)
def test_the_next_one_cannot_be_tried_without_a_socket(
    error: OSError, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest hears of it, and nothing is left."""
    monkeypatch.setattr(log, "warn_ratelimited", lambda *_: None)
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = talk_to(A, B)
    talk.syn()

    def init(self: FakeSocket, family: int, kind: int) -> None:
        raise error

    monkeypatch.setattr(FakeSocket, "__init__", init)
    talk.host(error=errno.ETIMEDOUT)
    assert talk.ctx.drops == {
        "dns: resolver failed: ETIMEDOUT": 1,
        f"dns: resolver failed: {name}": 1,
        "dns: all resolvers failed": 1,
    }
    assert len(link(talk.ctx).take()) == 1  # an ICMP message
    assert talk.gone and not reactor(talk.ctx).refs


def test_connections_that_no_resolver_takes_are_counted_one_by_one() -> None:
    FakeSocket.connect_results = [errno.ECONNREFUSED]
    talk = talk_to(A)
    for n in 1, 2:
        talk.syn()
        assert talk.ctx.drops["dns: all resolvers failed"] == talk.ctx.drops["dns: resolver failed: ECONNREFUSED"] == n


def test_only_the_last_one_may_take_as_long_as_the_kernel_waits() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = talk_to(A, B)
    talk.syn()
    assert talk.sock.options[USER_TIMEOUT] == 1500
    talk.host(error=errno.ETIMEDOUT)
    assert USER_TIMEOUT not in talk.sock.options
    talk.writable()
    talk.expect(SYN | ACK)
    assert talk.sock.options[USER_TIMEOUT] == 0
    talk = talk_to(A)
    talk.syn()
    assert USER_TIMEOUT not in talk.sock.options


def test_the_guest_hears_when_all_have_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    FakeSocket.connect_results = [errno.ECONNREFUSED]
    talk = talk_to(A, B)
    talk.syn()
    talk.expect(RST | ACK, ack=1)
    assert talk.gone
    assert connected() == [A, B]
    assert dict(talk.ctx.drops) == {"dns: resolver failed: ECONNREFUSED": 2, "dns: all resolvers failed": 1}
    listed = f"{A} (Connection refused), {B} (Connection refused)"
    assert said == [f"No resolver of the host answers: {listed}; names cannot be looked up"]
    reactor(talk.ctx).end_turn(talk.now)
    assert all(s.closed for s in FakeSocket.made)


def test_a_resolver_that_failed_is_not_the_first_to_be_tried() -> None:
    talk = talk_to(A, B)
    talk.ctx.resolvers.failed(talk.ctx.resolvers.hosts[0], "no answer", talk.now)
    talk.syn()
    assert connected() == [B]


def test_a_host_without_the_family_of_a_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    made = FakeSocket.__init__

    def init(self: FakeSocket, family: int, kind: int) -> None:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, "no IPv6")
        made(self, family, kind)

    monkeypatch.setattr(FakeSocket, "__init__", init)
    talk = talk_to(C, A, v6=True)
    talk.syn()
    talk.expect(SYN | ACK)
    assert connected() == [A]
    talk = talk_to(C, v6=True)
    talk.syn()
    assert talk.ctx.flows.count == 0
    assert len(link(talk.ctx).take()) == 1  # an ICMP message


def test_no_descriptor_is_no_fault_of_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    def init(self: FakeSocket, family: int, kind: int) -> None:
        raise OSError(next(iter(NO_DESCRIPTORS)), "too many")

    monkeypatch.setattr(FakeSocket, "__init__", init)
    talk = talk_to(A, B)
    talk.syn()
    talk.expect(RST | ACK)
    assert talk.ctx.flows.count == 0
    assert not any(r.held for r in talk.ctx.resolvers.hosts)


def test_the_guest_gives_up_while_resolvers_are_tried() -> None:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    talk = talk_to(A, B)
    talk.syn()
    talk.host(error=errno.ETIMEDOUT)
    talk.guest(RST, seq=1)
    assert talk.gone
    reactor(talk.ctx).end_turn(talk.now)
    assert all(s.closed for s in FakeSocket.made)
