"""Listeners of spliced UDP that refuse for a moment."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from passt import addr
from passt.splice.refusal import REFUSE

from ..support import T0, reactor, timers
from ..udp_support import Lab, is_refused, labs, port_of

Start = Callable[..., Lab]
PATIENCE = 5.0  # s


@pytest.fixture
def start() -> Iterator[Start]:
    with labs() as made:
        yield made


def closed_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind((host, 0))
        return port_of(s)


def resume(lab: Lab, at: float) -> None:
    """The timer expires that is armed for this time."""
    services = timers(lab.ctx).services
    services.fire(services.deadlines.index(at), at)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("outbound", [True, False])
def test_a_client_is_refused_as_its_server_is_not_there(start: Start, host: str, outbound: bool) -> None:
    lab = start(host_lo_to_ns_lo=True)
    listener = lab.listen(host, closed_port(host), to=closed_port(host), outbound=outbound, addr=addr.packed(host))
    client, other = lab.client(listener, host), lab.client(listener, host)
    client.send(b"first")
    lab.until(lambda: bool(lab.ctx.flows.closed["udp_splice", "refused"]))
    assert is_refused(client) and is_refused(other) and is_refused(client)
    resume(lab, T0 + REFUSE)
    with lab.socket(host, host, listener.to) as server:
        client.send(b"later")
        assert lab.recv(server) == b"later"
    assert lab.flow.state


@pytest.mark.parametrize("target", [None, addr.LOOPBACK4])
def test_all_targets_have_to_refuse(start: Start, target: bytes | None) -> None:
    """Without an address in the rule, the server may be there in the other family."""
    lab = start()
    port, to = closed_port("127.0.0.1"), closed_port("127.0.0.1")
    listener = lab.listen(port=port, to=to, outbound=True, target=target)
    client, server = lab.client(listener), lab.socket("::1", "::1", to)
    client.send(b"first")
    if target is None:
        assert lab.recv(server) == b"first"
        assert not lab.ctx.flows.closed and not is_refused(client)
    else:
        lab.until(lambda: bool(lab.ctx.flows.closed["udp_splice", "refused"]))
        assert is_refused(client)


def test_a_server_that_stops_is_looked_for_in_the_other_family_first(start: Start) -> None:
    lab = start()
    with lab.socket() as server:
        listener = lab.listen(port=closed_port("127.0.0.1"), to=port_of(server), outbound=True)
        client = lab.client(listener)
        client.send(b"first")
        lab.turn()
        server.sendto(b"answer", server.recvfrom(9)[1])
        assert lab.recv(client) == b"answer"
    for count in (1, 3):  # refused by IPv4, to which nothing is kept; then by both
        assert not lab.ctx.flows.closed
        client.send(b"again")
        lab.until(lambda: lab.ctx.drops["udp splice: ECONNREFUSED"] >= count)  # noqa: B023 (called at once)
        reactor(lab.ctx).end_turn(T0)
    assert lab.ctx.flows.closed["udp_splice", "refused"] == 1


@pytest.mark.parametrize("address", [None, "192.0.2.5"])
def test_a_listener_of_remote_clients_is_not_given_up(start: Start, address: str | None) -> None:
    """Other programs could have its port, and remote clients are served by it. Its flows go on."""
    lab = start(host_lo_to_ns_lo=True)
    at = addr.packed(address) if address else None
    listener = lab.listen("::", closed_port("127.0.0.1"), to=closed_port("127.0.0.1"), addr=at)
    client = lab.client(listener)
    client.send(b"first")
    lab.until(lambda: lab.ctx.drops["udp splice: ECONNREFUSED"] == 2)
    reactor(lab.ctx).end_turn(T0)
    assert not is_refused(client) and lab.flow.state and not lab.ctx.flows.closed


def test_a_listener_that_closes_meanwhile_is_forgotten(start: Start) -> None:
    lab = start()
    listener = lab.listen(port=closed_port("127.0.0.1"), to=closed_port("127.0.0.1"), outbound=True)
    lab.client(listener).send(b"first")
    lab.until(lambda: bool(lab.ctx.flows.closed["udp_splice", "refused"]))
    lab.stop(listener)
    resume(lab, T0 + REFUSE)
    assert not lab.ctx.drops["fault"]


def test_each_listener_refuses_for_its_own_second(start: Start) -> None:
    """One that begins later also ends later, by the same timer."""
    lab = start()
    early, late = (
        lab.listen(port=closed_port("127.0.0.1"), to=closed_port("127.0.0.1"), outbound=True) for _ in range(2)
    )
    clients = [lab.client(early), lab.client(late)]

    def refusals_are(count: int) -> bool:
        return lab.ctx.flows.closed["udp_splice", "refused"] == count

    for number, client in enumerate(clients):
        lab.now = T0 + number * REFUSE / 4
        client.send(b"first")
        lab.until(partial(refusals_are, number + 1))
    resume(lab, T0 + REFUSE)
    lab.now = T0 + REFUSE
    assert is_refused(clients[1]) and not is_refused(clients[0])
    lab.until(partial(refusals_are, 3))
    assert is_refused(clients[0])
    resume(lab, T0 + REFUSE * 5 / 4)
    assert not is_refused(clients[1]) and is_refused(clients[0])
    assert not lab.ctx.drops["fault"]


def test_all_flows_of_a_listener_end_when_their_server_refuses(start: Start) -> None:
    """Several clients had written to a server that is gone: none of their flows stays."""
    lab = start()
    with lab.socket() as server:
        listener = lab.listen(port=closed_port("127.0.0.1"), to=port_of(server), outbound=True)
        clients = [lab.client(listener) for _ in range(2)]
        for client in clients:
            client.send(b"first")
            assert lab.recv(server) == b"first"
    for client in clients:
        client.send(b"again")
    lab.until(lambda: not lab.flows)
    assert lab.ctx.flows.closed["udp_splice", "refused"] == 2


def test_a_listener_that_leads_elsewhere_meanwhile_asks_the_other_server(start: Start) -> None:
    """The server is not there, so a request changes the target of the rule: the listener stays the same."""
    lab = start()
    port = closed_port("127.0.0.1")
    listener = lab.listen(port=port, to=closed_port("127.0.0.1"), outbound=True)
    client = lab.client(listener)
    client.send(b"first")
    lab.until(lambda: bool(lab.ctx.flows.closed["udp_splice", "refused"]))
    with lab.socket() as server:
        lab.udp_in.end([listener])  # as `Listeners.hand_over` does
        listener.to = port_of(server)
        lab.udp_in.begin(listener)
        client.send(b"again")
        assert lab.recv(server) == b"again"
    assert port_of(listener.sock) == port
