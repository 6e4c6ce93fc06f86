"""Datagrams that meet a closed port of the guest: what the host's kernel tells their sender."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

import pytest

from passt import addr
from passt.splice.refusal import REFUSE
from passt.wire.checksum import PROTO_UDP
from tests.unit.support import GATEWAY4, GUEST4, T0, link, reactor, timers

from ..splice.test_refusal import closed_port
from ..udp_support import Lab, is_refused, labs, port_of

Start = Callable[..., Lab]


@pytest.fixture
def start() -> Iterator[Start]:
    with labs() as made:
        yield made


def guest_refuses(lab: Lab) -> bool:
    """The guest answers the last datagram that it was sent by Port Unreachable."""
    key = lab.flow.key
    known = lab.ctx.services.errors[PROTO_UDP](key, key[-2:] + key[-4:-2] + bytes(4), T0)
    reactor(lab.ctx).end_turn(T0)
    return known


def test_a_client_of_a_loopback_listener_is_told_for_a_while(start: Start) -> None:
    lab = start(no_splice=True)
    listener = lab.listen(port=closed_port("127.0.0.1"), addr=addr.LOOPBACK4)
    client, other = lab.client(listener), lab.client(listener)
    client.send(b"first")
    lab.turn()
    assert len(link(lab.ctx).take()) == 1 and guest_refuses(lab)
    assert lab.ctx.flows.closed == {("udp", "refused by guest"): 1}
    assert is_refused(client) and is_refused(other)
    timers(lab.ctx).services.fire(timers(lab.ctx).services.deadlines.index(T0 + REFUSE), T0 + REFUSE)
    client.send(b"later")
    lab.turn()
    assert len(link(lab.ctx).take()) == 1, "the guest is asked again"


def test_a_client_of_another_listener_is_not_told(start: Start) -> None:
    """Nor is its flow ended: others may have the port, and it would take its place."""
    lab = start(no_splice=True)
    listener = lab.listen("127.0.0.1")  # by its rule, one at any address
    client = lab.client(listener)
    client.send(b"first")
    lab.turn()
    flow = lab.flow
    assert guest_refuses(lab) and lab.flow is flow
    assert not is_refused(client)


def test_the_peer_of_a_program_that_has_ended_is_told(start: Start) -> None:
    """The guest began the flow; answers come when it is gone."""
    lab = start()
    assert lab.udp is not None
    server = lab.socket()
    key = GUEST4 + GATEWAY4 + (40000).to_bytes(2, "big") + port_of(server).to_bytes(2, "big")
    lab.ctx.pool.buf[64:65] = b"?"
    lab.udp.tap_handler(key, [64, 65, 0], T0)
    question, flow_at = server.recvfrom(10)
    server.connect(flow_at)
    server.send(b"!")
    lab.turn()
    assert question == b"?" and link(lab.ctx).take()[0][14 + 28 :] == b"!" and guest_refuses(lab)
    assert is_refused(server) and not lab.flows


def test_an_error_about_nothing(start: Start) -> None:
    lab = start()
    assert not lab.ctx.services.errors[PROTO_UDP](bytes(12), bytes(8), T0)


def test_two_errors_about_one_flow(start: Start) -> None:
    lab = start(no_splice=True)
    listener = lab.listen(port=closed_port("127.0.0.1"), addr=addr.LOOPBACK4)
    lab.client(listener).send(b"first")
    lab.turn()
    key = lab.flow.key
    for _ in range(2):
        assert lab.ctx.services.errors[PROTO_UDP](key, bytes(8), T0)
    reactor(lab.ctx).end_turn(T0)
    assert lab.ctx.flows.closed == {("udp", "refused by guest"): 1}


def test_a_listener_that_cannot_refuse(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault is that of one callback; the flow stays."""
    lab = start(no_splice=True)
    listener = lab.listen(port=closed_port("127.0.0.1"), addr=addr.LOOPBACK4)
    lab.client(listener).send(b"first")
    lab.turn()

    def fail(*_: object) -> bool:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(lab.udp_in.splice.refusals, "refuse", fail)
    with pytest.raises(OSError, match="no memory"):
        guest_refuses(lab)
    assert lab.flow.state
