"""Sockets of the guest's flows, beside the listeners that lead to its port. tests/unit/ports/test_udp_in.py has them
with real sockets.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import Any, cast

import pytest

from passt import addr
from passt.policy.rules import Listener, Rule
from passt.udp_engine import outbound
from passt.udp_engine.outbound import Outbound
from passt.udp_engine.sock import Client, SharedSocket
from passt.wire.checksum import PROTO_UDP

from ..support import IP4, T0, make_context, timers
from ..udp_support import PlainSockets

HOST = addr.packed("192.0.2.9")


def listener(port: int, at: str | None = None) -> Listener:
    """One of `port` of the host, to port 7 of the guest."""
    rule = Rule("-u x", PROTO_UDP, False, port, port, 7, addr=None if at is None else addr.packed(at))
    return Listener(rule, port, Sock())


class Sock:
    """Is at `name`."""

    def __init__(self, name: tuple[str, int] = ("192.0.2.2", 7000)) -> None:
        self.name = name
        self.closed = False

    def fileno(self) -> int:
        return -1

    def getsockname(self) -> tuple[str, int]:
        return self.name

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> dict[int, Any]:
    """By port of the listener: what opening beside it brings, or raises; by 0, of an ordinary one."""
    found: dict[int, Any] = {0: Sock()}

    def open_client(make: object, client: Client, misdelivered: list[Any]) -> Any:
        what = found[client.listener.port]
        if isinstance(what, OSError):
            raise what
        return what

    monkeypatch.setattr(outbound, "open_client", open_client)
    monkeypatch.setattr(outbound, "open_socket", lambda fwd, host, sport, dport, beside: found[0])
    return found


def open_from(sockets: Outbound, port: int = 7) -> Any:
    return sockets.open(HOST, port, 9, T0)


def test_a_port_that_no_listener_leads_to(sockets: dict[int, Any]) -> None:
    made = Outbound(make_context())
    made.lead(listener(70))
    assert open_from(made, 8) is sockets[0]


def test_beside_a_listener_while_it_leads(sockets: dict[int, Any]) -> None:
    made, leads = Outbound(make_context()), listener(70)
    sockets[70] = Sock()
    made.lead(leads)
    assert open_from(made) is sockets[70]
    made.lead_no_more(listener(71))
    assert open_from(made) is sockets[70], "that was another"
    made.lead_no_more(leads)
    assert open_from(made) is sockets[0]


def test_listeners_of_all_addresses_come_first(sockets: dict[int, Any]) -> None:
    made = Outbound(make_context())
    for leads in (listener(70, "127.0.0.5"), listener(71), listener(72, "0.0.0.0")):
        sockets[leads.port] = Sock()
        made.lead(leads)
    assert [leads.port for leads in made.leading[7]] == [71, 72, 70]
    assert open_from(made) is sockets[71]
    sockets[71] = OSError(errno.EADDRINUSE, "in use")
    assert open_from(made) is sockets[72]


def test_sockets_that_will_not_do_are_closed(sockets: dict[int, Any]) -> None:
    """One that receives what it sends, and one that reports no errors."""
    made = Outbound(make_context())
    shared = SharedSocket.__new__(SharedSocket)
    closed: list[object] = []
    cast(Any, shared).close = lambda: closed.append(shared)
    sockets |= {70: Sock((addr.text(HOST), 9)), 71: shared}
    for port in (70, 71):
        made.lead(listener(port))
    assert open_from(made) is sockets[0]
    assert sockets[70].closed and closed == [shared]


def test_what_came_to_another_socket_is_delivered_soon(sockets: dict[int, Any]) -> None:
    ctx = make_context()
    made = Outbound(ctx)
    made.timer = timers(ctx).services.new(lambda now: None)
    sockets[70] = Sock()
    made.lead(listener(70))
    open_from(made)
    assert timers(ctx).services.deadlines == [None]
    made.misdelivered.append((Client(listener(70), HOST, 9, bytes(4)), b"data"))
    open_from(made)
    assert timers(ctx).services.deadlines == [T0]


def test_with_an_interface_configured_no_listener_leads(sockets: dict[int, Any]) -> None:
    """The listener's socket is not bound to it."""
    made = Outbound(make_context(ip4=replace(IP4, if_out="eth7")))
    sockets[70] = Sock()
    made.lead(listener(70))
    assert open_from(made) is sockets[0]


@pytest.mark.parametrize(("host", "scope"), [("fe80::9", 3), ("2001:db8::9", 0)])
def test_a_link_local_host_has_its_scope(host: str, scope: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Client] = []

    def open_client(make: object, client: Client, misdelivered: list[Any]) -> Any:
        asked.append(client)
        return Sock()

    monkeypatch.setattr(outbound, "open_client", open_client)
    made, leads = Outbound(make_context(scope_id=3)), listener(70)
    made.lead(leads)
    made.open(addr.packed(host), 7, 9, T0)
    assert asked == [Client(leads, addr.packed(host), 9, bytes(16), scope)]


@pytest.mark.parametrize("outward", [False, True])
def test_a_clients_socket_is_opened_on_the_side_of_its_listener(outward: bool) -> None:
    ctx, ns = make_context(), PlainSockets()
    ctx.ns = cast(Any, ns)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        rule = Rule("-u x", PROTO_UDP, outward, s.getsockname()[1], s.getsockname()[1], 7)
        client = Client(Listener(rule, rule.first, s), addr.packed("127.0.0.9"), 9, addr.LOOPBACK4)
        Outbound(ctx).open_client(client).close()
    assert ns.taken == outward
