"""The figures of a spliced TCP connection, as `pesto --flows` shows them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from passt import addr
from passt.flow.stats import Tally
from passt.flow.table import GUEST, HOST
from passt.linux import tcpinfo
from passt.linux.tcpinfo import Details
from passt.policy.rules import Listener, Rule
from passt.splice.conn import Half, SpliceConn
from passt.wire.checksum import PROTO_TCP

from ..support import T0

SERVER = addr.packed("127.0.0.2")


class Sock:
    """A socket with figures of its own, None if the kernel tells none."""

    def __init__(self, fd: int, details: Details | None) -> None:
        self.fd, self.details = fd, details

    def fileno(self) -> int:
        return self.fd

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 1000 + self.fd


CLIENT_FIGURES = Details(rtt=0.25, retransmits=3, received=1000, acked=400, idle=9.0)
SERVER_FIGURES = Details(rtt=0.5, retransmits=7, received=500, acked=900, idle=8.0)


@pytest.fixture(autouse=True)
def figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcpinfo, "details", lambda sock: sock.details)


def listener(outbound: bool) -> Listener:
    door: Any = SimpleNamespace(fileno=lambda: 9)
    return Listener(Rule("-t 80", PROTO_TCP, outbound, 80, 80, 8080), 80, door)


def connection(
    *, outbound: bool, client: Details | None = CLIENT_FIGURES, server: Details | None = SERVER_FIGURES
) -> SpliceConn:
    """Both halves are there: the client sent 100 bytes, of which the server has 60, and got 38 of its 50."""
    conn = SpliceConn(Sock(1, client), addr.LOOPBACK4, 40000, listener(outbound), [SERVER])
    conn.index, conn.opened = 5, T0
    conn.server_sock = Sock(2, server)
    conn.halves = (Half(conn.sock, conn.server_sock, Tally()), Half(conn.server_sock, conn.sock, Tally()))
    there, back = conn.halves
    there.moved, there.held, there.pending = 100, 30, bytes(10)
    back.moved, back.held, back.pending = 50, 12, b""
    return conn


@pytest.mark.parametrize("outbound", [False, True])
def test_figures_are_of_the_hosts_and_the_guests_side(outbound: bool) -> None:
    """An outbound rule's client is the guest."""
    info = connection(outbound=outbound).info(T0 + 20)
    assert (info.index, info.protocol, info.path, info.state) == (5, "tcp", "splice", "ESTABLISHED")
    assert (info.age, info.idle) == (20, 8.0)
    tcp = info.tcp
    assert tcp is not None and tcp.snd_wnd is tcp.rcv_wnd is None
    from_client, from_server = 1000 - 900, 500 - 400
    if outbound:
        assert (info.to_guest, info.to_host) == (38, 60)
        assert (tcp.rtt, tcp.resent_to_host, tcp.resent_to_guest) == (0.5, 7, 3)
        assert (tcp.queue_to_guest, tcp.queue_to_host) == (from_server, from_client)
    else:
        assert (info.to_guest, info.to_host) == (60, 38)
        assert (tcp.rtt, tcp.resent_to_host, tcp.resent_to_guest) == (0.25, 3, 7)
        assert (tcp.queue_to_guest, tcp.queue_to_host) == (from_client, from_server)


def test_queues_are_never_negative() -> None:
    """The kernel counts SYN and FIN among the bytes."""
    client = Details(rtt=0.1, retransmits=0, received=10, acked=12, idle=1.0)
    server = Details(rtt=0.1, retransmits=0, received=10, acked=11, idle=2.0)
    info = connection(outbound=False, client=client, server=server).info(T0 + 0.5)
    assert info.tcp is not None and (info.tcp.queue_to_guest, info.tcp.queue_to_host) == (0, 0)
    assert info.idle == 0.5, "no longer than it is there"


@pytest.mark.parametrize("outbound", [False, True])
@pytest.mark.parametrize("silent", ["client", "server"])
def test_a_socket_that_tells_nothing(outbound: bool, silent: str) -> None:
    figures: dict[str, Any] = {silent: None}
    info = connection(outbound=outbound, **figures).info(T0)
    tcp = info.tcp
    assert tcp is not None and info.idle is None
    assert tcp.queue_to_guest is tcp.queue_to_host is None
    host_tells = (silent == "client") == outbound
    assert (tcp.rtt is None, tcp.resent_to_host is None) == (not host_tells, not host_tells)
    assert (tcp.resent_to_guest is None) is host_tells


@pytest.mark.parametrize("missing", ["received", "acked"])
def test_a_kernel_without_counts_of_bytes(missing: str) -> None:
    figures = {"rtt": 0.1, "retransmits": 0, "received": 10, "acked": 10, "idle": 1.0}
    details = Details(**{**figures, missing: None})  # type: ignore[arg-type]
    tcp = connection(outbound=False, client=details).info(T0).tcp
    assert tcp is not None
    to_guest, to_host = tcp.queue_to_guest, tcp.queue_to_host
    assert (to_guest is None, to_host is None) == (missing == "received", missing == "acked")


def test_state_names_the_ends_that_were_passed_on() -> None:
    conn = connection(outbound=False)
    for half, state in zip(conn.halves, ("ESTABLISHED|CLIENT_FIN", "ESTABLISHED|CLIENT_FIN|SERVER_FIN"), strict=True):
        half.fin = True
        assert conn.info(T0).state == state


@pytest.mark.parametrize("outbound", [False, True])
def test_ends_before_and_after_the_server_is_connected(outbound: bool) -> None:
    conn = connection(outbound=outbound)
    client, server = "127.0.0.1:40000", "127.0.0.2:8080"
    ends = conn.endpoints()
    if outbound:
        assert (ends.began, ends.guest, ends.peer, ends.host) == (GUEST, client, "127.0.0.1:1001", server)
    else:
        assert (ends.began, ends.guest, ends.peer, ends.host) == (HOST, server, "127.0.0.1:1002", client)
    conn.server_sock, conn.halves = None, ()
    info = conn.info(T0)
    assert (info.state, info.to_guest, info.to_host, info.idle) == ("CONNECTING", 0, 0, None)
    if not outbound:
        assert info.endpoints.peer == ""
    ends = SpliceConn(Sock(1, None), addr.LOOPBACK4, 40000, listener(outbound), []).endpoints()
    assert (ends.host if outbound else ends.guest) == "", "there is no address to connect to"
