"""Information about flows, in all protocols: endpoints, bytes, state, and the reason of the end."""

from __future__ import annotations

import errno
import json
import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from passt import addr
from passt.flow.table import LABELS, RECENT, FlowInfo
from passt.linux.tcpinfo import BYTES_ACKED, BYTES_RECEIVED, LAST_DATA_RECV, LAST_DATA_SENT, RTT, TOTAL_RETRANS
from passt.wire.tcp import ACK, FIN, RST, SYN

from . import test_icmp, test_udp
from .splice import test_udp as test_udp_splice
from .splice.test_tcp import Lab, MakeLab, make_lab, reset
from .splice.test_udp import Start, start
from .support import T0, reactor
from .tcp_support import PEER_PORT, FakeSocket, Talk, accepted_connection, fake_sockets, open_connection
from .udp_engine import test_dns as test_dns_flows
from .udp_engine.test_dns import resolver_sockets
from .udp_support import port_of

__all__ = ["fake_sockets", "make_lab", "resolver_sockets", "start"]
AGE = 7.0


def info_of(ctx: Any, now: float) -> FlowInfo:
    """Of the only flow; it must be fit for JSON."""
    (flow,) = (f for f in ctx.flows.by_index if f is not None)
    assert flow.label in LABELS
    info: FlowInfo = flow.info(now)
    assert set(json.loads(json.dumps(info.row()))) >= {"index", "guest", "bytes_to_guest", "age"}
    return info


def ends_of(info: FlowInfo) -> tuple[str, str, str, str]:
    ends = info.endpoints
    return ends.began, ends.guest, ends.peer, ends.host


def closed(ctx: Any) -> dict[tuple[str, str], int]:
    assert ctx.flows.count == 0
    return dict(ctx.flows.closed)


# TCP -----------------------------------------------------------------------------------------------------------------


def test_tcp_of_the_guest() -> None:
    talk = open_connection()
    talk.guest(ACK, b"question")
    talk.host(b"answer")
    talk.taken()
    talk.guest(ACK, ack=1 + 4, window=1000)
    # The kernel: 8 bytes and SYN were sent, of which 3 are not acknowledged; 16 came, of which 4 reached the guest.
    talk.sock.info |= {BYTES_ACKED: 1 + 5, RTT: 12_500, TOTAL_RETRANS: 2, BYTES_RECEIVED: 16}
    (flow,) = (f for f in talk.ctx.flows.by_index if f is not None)
    flow.opened = T0
    info = info_of(talk.ctx, T0 + AGE)
    assert (info.protocol, info.path, info.age) == ("tcp", "tap", AGE)
    assert ends_of(info) == ("guest", "192.0.2.2:40000", "198.51.100.7:80", "198.51.100.7:80")
    assert info.state == "TAP_SYN_RCVD|TAP_SYN_ACK_SENT|ESTABLISHED"
    assert (info.to_guest, info.to_host) == (4, 8)
    tcp = info.tcp
    assert tcp is not None
    assert (tcp.rtt, tcp.resent_to_host, tcp.resent_to_guest) == (0.0125, 2, 0)
    assert tcp.snd_wnd == 1000 << 7
    assert tcp.rcv_wnd is not None and tcp.rcv_wnd > 100_000
    assert (tcp.queue_to_guest, tcp.queue_to_host) == (12, 3)
    assert info.row()["rtt"] == 0.0125


def test_tcp_queues_count_no_fin_and_no_syn() -> None:
    """The kernel counts FIN of the peer, FIN of ours and SYN of a socket that connected as a byte each."""
    talk = open_connection()
    talk.guest(ACK, b"question")
    talk.host(b"answer", end=True)
    talk.taken()
    talk.sock.info |= {BYTES_ACKED: 1 + 8, BYTES_RECEIVED: 6 + 1}
    tcp = info_of(talk.ctx, T0).tcp
    assert tcp is not None and (tcp.queue_to_guest, tcp.queue_to_host) == (6, 0)
    talk.sock.info |= {BYTES_ACKED: 1 + 9, BYTES_RECEIVED: 0}
    tcp = info_of(talk.ctx, T0).tcp
    assert tcp is not None and (tcp.queue_to_guest, tcp.queue_to_host) == (0, 0), "never negative"


def test_tcp_queues_of_a_host_client() -> None:
    talk = accepted_connection()
    talk.guest(ACK, b"greeting")
    talk.sock.info |= {BYTES_ACKED: 3, BYTES_RECEIVED: 0}
    tcp = info_of(talk.ctx, T0).tcp
    assert tcp is not None and (tcp.queue_to_guest, tcp.queue_to_host) == (0, 5)


def test_tcp_window_and_idle_time() -> None:
    talk = open_connection()
    (flow,) = (f for f in talk.ctx.flows.by_index if f is not None)
    flow.opened = T0
    flow.rcv_edge = flow.rcv_nxt + 1000
    talk.sock.info |= {LAST_DATA_SENT: 3000, LAST_DATA_RECV: 2500}
    info = info_of(talk.ctx, T0 + AGE)
    assert info.tcp is not None and info.tcp.rcv_wnd == 1000
    assert (info.index, info.idle) == (flow.index, 2.5)
    assert info_of(talk.ctx, T0 + 1).idle == 1, "no longer than it is there"
    flow.rcv_edge = flow.rcv_nxt - 1
    shut = info_of(talk.ctx, T0).tcp
    assert shut is not None and shut.rcv_wnd == 0


def test_tcp_of_a_host_client() -> None:
    info = info_of(accepted_connection("127.0.0.1").ctx, T0)
    assert ends_of(info) == ("host", "192.0.2.2:80", f"192.0.2.1:{PEER_PORT}", f"127.0.0.1:{PEER_PORT}")
    assert str(info.endpoints) == f"127.0.0.1:{PEER_PORT} (seen as 192.0.2.1:{PEER_PORT}) -> 192.0.2.2:80"
    assert (info.to_guest, info.to_host) == (0, 0)


def test_tcp_before_anything_is_known() -> None:
    talk = Talk()
    talk.accept("198.51.100.9")
    talk.taken()
    info = info_of(talk.ctx, T0)
    assert (info.state, info.to_guest, info.to_host) == ("SOCK_ACCEPTED|TAP_SYN_SENT", 0, 0)
    talk.wait(talk.ctx.link.rto_min)
    talk.taken()
    after = info_of(talk.ctx, T0).tcp
    assert after is not None and after.resent_to_guest == 1


def test_tcp_whose_socket_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = open_connection()

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EINVAL, "no")

    monkeypatch.setattr(talk.sock, "getsockopt", refuse)
    info = info_of(talk.ctx, T0)
    assert info.idle is None
    assert info.tcp is not None
    assert (info.tcp.rtt, info.tcp.resent_to_host, info.tcp.queue_to_guest) == (None, None, None)


def test_tcp_without_a_socket() -> None:
    """Between two resolvers there is none."""
    talk = open_connection()
    (flow,) = (f for f in talk.ctx.flows.by_index if f is not None)
    flow.sock = None
    info = info_of(talk.ctx, T0)
    assert info.idle is None and info.tcp is not None and info.tcp.rtt is None


def test_resent_to_the_guest() -> None:
    talk = open_connection()
    talk.host(b"answer")
    talk.taken()
    talk.wait(talk.ctx.link.rto_min)
    talk.taken()
    tcp = info_of(talk.ctx, T0).tcp
    assert tcp is not None and tcp.resent_to_guest == 1


def bytes_stay_after_the_end(talk: Talk) -> None:
    talk.guest(ACK | FIN, b"abc")
    talk.host(b"defgh", end=True)
    talk.taken()
    talk.guest(ACK, ack=1 + 5 + 1)


def refused_by_peer(talk: Talk) -> None:
    talk.host(error=errno.ECONNRESET)


def timed_out(talk: Talk) -> None:
    talk.host(error=errno.ETIMEDOUT)


def silent(talk: Talk) -> None:
    talk.host(b"answer")
    talk.wait(300)


@pytest.mark.parametrize(
    ("end", "why"),
    [
        (bytes_stay_after_the_end, "both ended"),
        (lambda talk: talk.guest(RST), "reset by guest"),
        (refused_by_peer, "reset by peer"),
        (timed_out, "timed out"),
        (silent, "no acknowledgement"),
        (lambda talk: talk.tcp._table.forget(), "guest gone"),
        (lambda talk: talk.tcp.fault_key(talk.key), "fault"),
    ],
)
def test_why_tcp_ended(end: Callable[[Talk], None], why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = open_connection()
    lines: list[str] = []
    monkeypatch.setattr("passt.log.debug_on", True)
    monkeypatch.setattr("passt.log.debug", lines.append)
    end(talk)
    assert closed(talk.ctx) == {("tcp", why): 1}
    assert lines[-1].startswith(f"Flow 0 (TCP connection): closed: {why}; ")
    if end is bytes_stay_after_the_end:
        assert "; 3 bytes out, 5 in, " in lines[-1]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.ECONNREFUSED, "refused"),
        (errno.ETIMEDOUT, "timed out"),
        (errno.ENETUNREACH, "no route"),
        (errno.EACCES, "permission denied"),
    ],
)
def test_why_tcp_never_began(error: int, why: str) -> None:
    FakeSocket.connect_results = [error]
    talk = Talk()
    talk.syn()
    assert closed(talk.ctx) == {("tcp", why): 1}
    assert talk.ctx.flows.opened == {"tcp": 1}


def test_why_a_host_client_was_not_served() -> None:
    talk = Talk()
    talk.accept("198.51.100.9")
    talk.expect(SYN)
    talk.guest(RST | ACK, seq=0, ack=1)
    assert closed(talk.ctx) == {("tcp", "refused by guest"): 1}
    talk.accept("198.51.100.9")
    talk.wait(30)
    assert closed(talk.ctx)["tcp", "no answer of the guest"] == 1


# Spliced TCP ---------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["inbound", "outbound"])
def lab(request: pytest.FixtureRequest, make_lab: MakeLab) -> Lab:
    return make_lab(outbound=request.param)


def test_spliced_tcp(lab: Lab) -> None:
    outbound = lab.listener.rule.outbound
    client, server = lab.pair()
    lab.write(client, b"q" * 300_000)
    assert len(lab.read(server, 300_000)) == 300_000
    lab.write(server, b"answer")
    assert lab.read(client, 6) == b"answer"
    info = info_of(lab.ctx, T0)
    c, s = (f"127.0.0.1:{sock.getsockname()[1]}" for sock in (client, lab.server))
    door = f"127.0.0.1:{lab.listener.port}"
    if outbound:
        assert ends_of(info) == ("guest", c, door, s)
        assert (info.to_guest, info.to_host) == (6, 300_000)
    else:
        assert ends_of(info) == ("host", s, f"127.0.0.1:{server.getpeername()[1]}", c)
        assert (info.to_guest, info.to_host) == (300_000, 6)
    to_guest, to_host = lab.ctx.stats.spliced["tcp"]
    assert (to_guest.bytes, to_host.bytes) == (info.to_guest, info.to_host)
    assert (info.path, info.state) == ("splice", "ESTABLISHED")
    assert info.idle is not None and info.tcp is not None and info.tcp.rtt is not None
    client.shutdown(socket.SHUT_WR)
    assert lab.outcome(server) == "end"
    assert info_of(lab.ctx, T0).state == "ESTABLISHED|CLIENT_FIN"
    server.close()
    lab.gone()
    assert closed(lab.ctx) == {("tcp_splice", "both ended"): 1}


@pytest.mark.parametrize("by_client", [False, True])
def test_who_reset_spliced_tcp(lab: Lab, by_client: bool) -> None:
    client, server = lab.pair()
    lab.write(client, b"x")
    lab.read(server, 1)
    reset(client if by_client else server)
    lab.gone()
    by_guest = by_client == lab.listener.rule.outbound
    assert closed(lab.ctx) == {("tcp_splice", "reset by guest" if by_guest else "reset by peer"): 1}


def test_refused_spliced_tcp(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr("passt.log.debug_on", True)
    monkeypatch.setattr("passt.log.debug", lines.append)
    port = lab.server.getsockname()[1]
    lab.server.close()
    client = lab.client()
    assert lab.outcome(client) == "reset"
    assert closed(lab.ctx) == {("tcp_splice", "refused"): 1}
    opened, ended = lines
    assert f"127.0.0.1:{port}" in opened and opened.endswith(" opened")
    assert ended.startswith("Flow 0 (spliced TCP connection): closed: refused; 0 bytes out, 0 in, ")


# UDP and pings -------------------------------------------------------------------------------------------------------


@pytest.fixture
def udp_talk() -> Iterator[test_udp.Talk]:
    talk = test_udp.Talk()
    yield talk
    talk.close()


def test_udp_of_the_guest(udp_talk: test_udp.Talk) -> None:
    talk = udp_talk
    talk.sends(b"question", b"question", b"more")
    talk.arrived(3)
    talk.answers(b"answer")
    talk.event()
    info = info_of(talk.ctx, T0 + RECENT)
    guest, peer = f"192.0.2.2:{talk.sport}", f"192.0.2.1:{talk.port}"
    assert ends_of(info) == ("guest", guest, peer, f"127.0.0.1:{talk.port}")
    assert str(info.endpoints) == f"{guest} -> {peer} (host 127.0.0.1:{talk.port})"
    assert (info.protocol, info.path, info.tcp) == ("udp", "tap", None)
    assert (info.to_guest, info.to_host, info.idle, info.state) == (6, 20, RECENT, "idle")
    assert info_of(talk.ctx, T0).state == "active"
    talk.answers(*[b"a" * 100] * 20)
    for _ in range(20):
        if talk.flow.to_guest < 2006:
            talk.event()
    assert talk.flow.to_guest == 2006
    talk.udp.forget()
    assert closed(talk.ctx) == {("udp", "guest gone"): 1}


@pytest.mark.parametrize("outbound", [False, True])
def test_spliced_udp(start: Start, outbound: bool) -> None:
    talk = test_udp_splice.Talk(start(ip6=None) if not outbound else start(), outbound=outbound)
    where = talk.begin(b"question")
    talk.server.sendto(b"answer", where)
    talk.lab.turn()
    info = info_of(talk.lab.ctx, T0)
    client, server = f"127.0.0.1:{port_of(talk.client)}", f"127.0.0.1:{port_of(talk.server)}"
    if outbound:
        assert ends_of(info) == ("guest", client, f"127.0.0.1:{talk.listener.port}", server)
        assert (info.to_guest, info.to_host) == (6, 8)
    else:
        assert ends_of(info) == ("host", server, f"127.0.0.1:{where[1]}", client)
        assert (info.to_guest, info.to_host) == (8, 6)
    tallies = talk.lab.ctx.stats.spliced["udp"]
    assert tuple(tally.bytes for tally in tallies) == (info.to_guest, info.to_host)
    assert (info.path, info.state) == ("splice", "active")
    talk.lab.stop(talk.listener)
    assert closed(talk.lab.ctx) == {("udp_splice", "listener gone"): 1}


def test_pings(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = test_icmp.Talk()
    monkeypatch.setattr("passt.icmp.open_socket", talk.open_socket)
    talk.asks(1, b"x" * 56)
    talk.answered(1, b"x" * 56)
    info = info_of(talk.ctx, T0)
    far = addr.text(test_icmp.FAR4)
    assert ends_of(info) == ("guest", f"192.0.2.2:{test_icmp.IDENT}", far, far)
    assert (info.protocol, info.to_guest, info.to_host, info.state) == ("icmp", 64, 64, "active")
    talk.icmp.forget()
    assert closed(talk.ctx) == {("ping", "guest gone"): 1}
    reactor(talk.ctx).end_turn(T0)


# DNS ---------------------------------------------------------------------------------------------------------------


def test_dns() -> None:
    """The host's end is the resolver that was asked last."""
    talk = test_dns_flows.Talk(test_dns_flows.A, test_dns_flows.C)
    query, answer = test_dns_flows.query(7), test_dns_flows.answer(7)
    talk.asks(query)
    talk.fails(test_dns_flows.A)
    talk.answers(test_dns_flows.C, answer)
    info = info_of(talk.ctx, T0)
    assert (info.protocol, info.path) == ("udp", "tap")
    assert ends_of(info) == ("guest", "192.0.2.2:40000", "169.254.1.1:53", f"[{test_dns_flows.C}]:53")
    assert (info.to_guest, info.to_host) == (len(answer), 2 * len(query))
    talk.udp.forget()
    assert closed(talk.ctx) == {("dns", "guest gone"): 1}


def test_all_labels_were_met() -> None:
    from passt.icmp import PingFlow
    from passt.splice.conn import SpliceConn
    from passt.splice.udp import SpliceFlow
    from passt.tcp_engine.conn import TcpConn
    from passt.udp_engine.dns import DnsFlow
    from passt.udp_engine.flow import UdpFlow

    assert tuple(kind.label for kind in (TcpConn, SpliceConn, UdpFlow, SpliceFlow, DnsFlow, PingFlow)) == LABELS
