"""Every end of a TCP connection, in every state and from either side: what the other side is told.

`cells` walks all states and events by conversations with fakes, and `make docs-ends` writes what it has seen into
docs/ends.md. A change of an end shows as a difference of that document; that data is never overtaken, no reset looks
like an end and no end like a reset is asserted here for all of them.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from passt.linux.tcpinfo import BYTES_ACKED
from passt.tcp_engine import sock as tcp_sock
from passt.tcp_engine.conn import ESTABLISHED, SOCK_FAILED, SOCK_FIN_RCVD, TAP_SYN_RCVD, TAP_SYN_SENT, TcpConn
from passt.wire.checksum import PROTO_TCP
from passt.wire.tcp import ACK, FIN, PSH, RST, SYN
from tests.unit.support import link
from tests.unit.tcp_support import GUEST_ISN, MASK, FakeSocket, Segment, Talk

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "ends.md"
LONG = 3 * 3600.0  # s: whatever has a timeout has reached it

# States ---------------------------------------------------------------------------------------------------------------


class Walk:
    """A conversation, and what both sides were told since the last `forget`."""

    def __init__(self) -> None:
        self.talk = Talk()
        self.told: list[str] = []  # to the guest
        self.written = 0  # bytes to the host peer before
        self.shut = self.unanswered = False
        self.sock: FakeSocket

    def frames(self) -> list[Segment | str]:
        """Frames to the guest: segments, and "ICMP" for an error."""
        fake = link(self.talk.ctx)
        pairs = list(zip(list(fake.vnet), list(fake.frames), strict=True))
        fake.take()
        return ["ICMP" if frame[23] == 1 else self.talk._parse(frame, vnet) for vnet, frame in pairs]

    def hear(self, *, answer: bool = True) -> None:
        """The guest takes everything, acknowledges it, and answers SYN, until nothing more comes."""
        talk = self.talk
        for _ in range(20):
            frames = self.frames()
            for s in frames:
                if isinstance(s, str):
                    self.told.append(s)
                    continue
                names = [("SYN", s.flags & SYN), ("data", s.payload), ("FIN", s.flags & FIN), ("RST", s.flags & RST)]
                self.told += [name for name, there in names if there]
                talk.ack = max(talk.ack, s.seq + len(s.payload) + (1 if s.flags & (FIN | SYN) else 0))
            segments = [s for s in frames if isinstance(s, Segment)]
            if not frames or not answer or any(s.flags & RST for s in segments):
                return
            if any(s.flags & SYN and not s.flags & ACK for s in segments):
                talk.answer()
            elif any(s.flags & (SYN | FIN) or s.payload for s in segments):
                talk.guest(ACK, window=65535)

    def forget(self) -> None:
        self.told.clear()
        self.sock = self.talk.sock
        self.written = len(self.talk.sock.sent)
        self.shut = self.talk.sock.shut

    def host_told(self) -> list[str]:
        """The messages to the host peer: the kernel sends FIN for shutdown(2), and RST for close(2) after SO_LINGER,
        unless it has no answer to its SYN.
        """
        sock = self.sock
        told = ["data"] if len(sock.sent) > self.written else []
        told += ["FIN"] if sock.shut and not self.shut else []
        if sock.closed and sock.resets_on_close and not self.unanswered:
            told.append("RST")
        return told


def connecting() -> Walk:
    FakeSocket.connect_results = [errno.EINPROGRESS]
    walk = Walk()
    walk.talk.syn()
    return walk


def syn_ack_sent() -> Walk:
    walk = Walk()
    walk.talk.syn()
    return walk


def syn_sent() -> Walk:
    walk = Walk()
    walk.talk.accept("198.51.100.7")
    return walk


def established() -> Walk:
    walk = syn_ack_sent()
    walk.hear()
    return walk


def accepted() -> Walk:
    walk = syn_sent()
    walk.hear()
    return walk


def host_has_ended() -> Walk:
    walk = established()
    walk.talk.host(end=True)
    walk.hear()
    return walk


def guest_has_ended() -> Walk:
    walk = established()
    walk.talk.guest(FIN | ACK)
    walk.hear()
    return walk


def fin_in_flight() -> Walk:
    walk = established()
    walk.talk.host(end=True)
    walk.hear(answer=False)
    walk.talk.ack = 1
    return walk


def window_closed() -> Walk:
    walk = established()
    walk.talk.guest(ACK, window=0)
    walk.talk.host(b"waits")
    return walk


def reset_waits() -> Walk:
    walk = window_closed()
    walk.talk.host(error=errno.ECONNRESET)
    return walk


STATES: dict[str, Callable[[], Walk]] = {
    "the guest has sent SYN, connect(2) is in progress": connecting,
    "SYN,ACK is sent to the guest": syn_ack_sent,
    "a host client was accepted, SYN is sent to the guest": syn_sent,
    "established by the guest": established,
    "established by a host client": accepted,
    "established, data waits for the guest's window": window_closed,
    "the host peer has ended, FIN is in flight to the guest": fin_in_flight,
    "the host peer has ended": host_has_ended,
    "the guest has ended": guest_has_ended,
    "the host peer has reset, data waits for the guest's window": reset_waits,
}

# Events ---------------------------------------------------------------------------------------------------------------


def _connected(walk: Walk) -> None:
    """The host peer has taken the connection before it sends anything."""
    conns = walk.talk.tcp._conns.values()
    if FakeSocket.connect_results == [errno.EINPROGRESS] and any(c.events == TAP_SYN_RCVD for c in conns):
        FakeSocket.connect_results = [0]
        walk.talk.writable()


def host_fin(walk: Walk) -> None:
    _connected(walk)
    walk.talk.host(b"last", end=True)


def host_reset(walk: Walk) -> None:
    """Data and RST, found in one event; of a socket that was connecting, this is all that is seen of the connection."""
    walk.talk.host(b"last", error=errno.ECONNRESET)


def host_fin_and_reset(walk: Walk) -> None:
    walk.talk.host(b"last", error=errno.EPIPE)


def host_refuses(walk: Walk) -> None:
    walk.talk.host(error=errno.ECONNREFUSED)


def host_unreachable(walk: Walk) -> None:
    _unacknowledged(walk)
    walk.talk.host(error=errno.EHOSTUNREACH)


def host_silent(walk: Walk) -> None:
    """The host's kernel gives up: on connect(2), on data of the guest, or on its FIN."""
    _unacknowledged(walk)
    walk.talk.host(error=errno.ETIMEDOUT)


def _unacknowledged(walk: Walk) -> None:
    """The guest has sent something that the host peer does not acknowledge, where it can send."""
    talk = walk.talk
    conn = next(iter(talk.tcp._conns.values()), None)
    if conn is None or not conn.events & ESTABLISHED:
        return
    talk.sock.info[BYTES_ACKED] = talk.sock.syn + len(talk.sock.sent)
    if not talk.sock.shut:
        talk.guest(ACK | PSH, b"lost", window=0 if not conn.snd_wnd else 65535)
        walk.written = len(talk.sock.sent)
    else:
        conn.rcv_acked = conn.rcv_nxt - 1  # its FIN is what was lost
    walk.frames()


def guest_fin(walk: Walk) -> None:
    walk.talk.guest(FIN | ACK, b"last")


def guest_reset(walk: Walk) -> None:
    """Data and RST in one batch."""
    talk = walk.talk
    if any(c.events & (TAP_SYN_SENT | ESTABLISHED) == TAP_SYN_SENT for c in talk.tcp._conns.values()):
        talk.put((RST | ACK, 0, talk.isn + 1, b"", 0, b""))  # it has no connection yet: it refuses
        return
    talk.put(talk.segment(ACK | PSH, b"last"), talk.segment(RST | ACK))


def guest_unreachable(walk: Walk) -> None:
    """An ICMP error about the oldest segment that the guest has not acknowledged."""
    talk = walk.talk
    conn = next(iter(talk.tcp._conns.values()))
    n = (len(conn.key) - 4) // 2
    ports = conn.key[2 * n + 2 :] + conn.key[2 * n : 2 * n + 2]
    upper = ports + (conn.snd_una & MASK).to_bytes(4, "big")
    if not talk.ctx.services.errors[PROTO_TCP](conn.key, upper, talk.now):
        walk.told.append("(ignored)")


def guest_silent(walk: Walk) -> None:
    """It answers nothing any more, while there is something to answer."""
    conn = next(iter(walk.talk.tcp._conns.values()))
    if conn.events & (ESTABLISHED | SOCK_FAILED | SOCK_FIN_RCVD) == ESTABLISHED and conn.snd_wnd:
        walk.talk.host(b"more")
    walk.talk.wait(LONG)
    walk.frames()


def guest_connects_again(walk: Walk) -> None:
    """SYN from the same port, of a guest that has forgotten the connection."""
    walk.talk.put((SYN, GUEST_ISN + 100_000, 0, b"", 64240, b""))
    walk.frames()


def guest_gone(walk: Walk) -> None:
    """A machine has disconnected."""
    for forget in walk.talk.ctx.services.on_forget:
        forget()


FROM_HOST: dict[str, Callable[[Walk], None]] = {
    "data, FIN": host_fin,
    "data, RST": host_reset,
    "data, FIN, RST": host_fin_and_reset,
    "RST to our SYN": host_refuses,
    "silence, and a router has told why": host_unreachable,
    "silence": host_silent,
}
FROM_GUEST: dict[str, Callable[[Walk], None]] = {
    "data, FIN": guest_fin,
    "data, RST": guest_reset,
    "ICMP error": guest_unreachable,
    "silence": guest_silent,
    "SYN once more": guest_connects_again,
    "its link is gone": guest_gone,
}


def impossible(state: str, event: str, *, by_guest: bool) -> bool:
    """The side has said already that nothing follows, or cannot say it in this state."""
    make = STATES[state]
    if by_guest:
        act = FROM_GUEST[event]
        return (
            (act is guest_fin and make in (connecting, syn_sent, guest_has_ended))
            or (act is guest_reset and make is guest_has_ended)
            or (act is guest_connects_again and make is syn_sent)
            or (act is guest_unreachable and make is connecting)
        )
    act = FROM_HOST[event]
    over = make is reset_waits
    return (
        over
        or (act is host_refuses and make is not connecting)
        or (act is host_fin and make in (fin_in_flight, host_has_ended))
        or (make is syn_sent and act in (host_unreachable, host_silent))
    )


# The walk -------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """The message to the other side about an event in a state; `over`: nothing of the connection is left."""

    state: str
    event: str
    told: tuple[str, ...]
    over: bool
    by_guest: bool


def seen(state: str, event: str, *, by_guest: bool) -> Cell:
    """One conversation up to this state, then the event, and then an honest other side."""
    FakeSocket.made.clear()
    FakeSocket.connect_results = [0]
    walk = STATES[state]()
    walk.hear(answer=False)
    walk.forget()
    walk.talk.sock.ended &= STATES[state] is not syn_sent
    conn = next(iter(walk.talk.tcp._conns.values()))
    walk.unanswered = conn.events == TAP_SYN_RCVD
    (FROM_GUEST if by_guest else FROM_HOST)[event](walk)
    if by_guest:
        told = [*walk.told, *_to_host(walk)]
    else:
        if STATES[state] in (syn_ack_sent, syn_sent, window_closed, reset_waits, fin_in_flight):
            _go_on(walk)
        walk.hear()
        told = list(dict.fromkeys(walk.told))
    walk.talk.end_turn()
    return Cell(state, event, tuple(told), _is_over(walk, conn), by_guest)


def _to_host(walk: Walk) -> list[str]:
    walk.talk.end_turn()
    return walk.host_told()


def _go_on(walk: Walk) -> None:
    """The guest answers, or opens its window."""
    talk = walk.talk
    (conn,) = talk.tcp._conns.values() or [None]
    if conn is None:
        return
    if conn.events & (TAP_SYN_SENT | ESTABLISHED) == TAP_SYN_SENT:
        talk.answer()
    elif not conn.events & ESTABLISHED:
        talk.guest(ACK, ack=1)
    else:
        talk.guest(ACK, window=65535)


def _is_over(walk: Walk, conn: TcpConn) -> bool:
    return walk.talk.tcp._conns.get(conn.key) is not conn


def cells(*, by_guest: bool) -> Iterator[Cell]:
    """All that are possible."""
    for state in STATES:
        for event in FROM_GUEST if by_guest else FROM_HOST:
            if not impossible(state, event, by_guest=by_guest):
                yield seen(state, event, by_guest=by_guest)


# The document ---------------------------------------------------------------------------------------------------------


def table(*, by_guest: bool) -> list[str]:
    """Rows are states, columns events."""
    events = FROM_GUEST if by_guest else FROM_HOST
    found = {(c.state, c.event): c for c in cells(by_guest=by_guest)}
    lines = [f"| state | {' | '.join(events)} |", "|---" * (len(events) + 1) + "|"]
    for state in STATES:
        row = []
        for event in events:
            c = found.get((state, event))
            text = "" if c is None else ", ".join(c.told) or "-"
            row.append(text if c is None or c.over else f"{text} …")
        lines.append(f"| {state} | {' | '.join(row)} |")
    return lines


HEAD = """\
# How the ends of connections are told

A connection through this program is two connections: the guest's, and one of the host. An end at one side is told to
the other one as what it is, and after the data that came before it. The tables are made by the unit test that walks all
of them (`make docs-ends`, `tests/unit/test_tcp_ends.py`), and compared with it. With real programs, in both modes and
both directions, `tests/system/vm/test_tcp_ends.py` compares bytes and errnos with those on the bare kernel, while the
daemon is stopped so that it finds data, FIN and RST at once.

| told by | a program reads | and writes |
|---|---|---|
| FIN | the end | what it likes |
| RST | what came before, then ECONNRESET | ECONNRESET, EPIPE |
| FIN, RST | what came before, then the end | EPIPE |
| RST to SYN | ECONNREFUSED from connect(2) | |
| ICMP error to SYN | EHOSTUNREACH, ENETUNREACH, EACCES, ... from connect(2) | |
| nothing | ETIMEDOUT, when its own kernel gives up; EHOSTUNREACH after an ICMP error | |

In the cells: what the other side gets; `-`: nothing; `…`: the connection is not over; empty: this cannot happen.

## The host peer ends it: what the guest gets

"Silence" is what the host's kernel takes for the end of the peer: no answer to SYN, to data of the guest, or to its
FIN. The guest's own kernel finds that out by itself, at the time that its program has asked for, and RST would tell it
a different reason (`passt/tcp_engine/timed_out.py`). Where it has nothing to wait for, it would never know, and gets
RST.
"""

BETWEEN = """
RST waits until the guest has taken the data before it. If its window stays closed, that is for 13 s; a guest that sends
meanwhile is told at once. Before the guest has answered SYN, the handshake comes first: the kernel has accepted the
client's connection, data, and end already. A guest that has connected and ended first gets RST when both directions are
done, which releases it from TIME-WAIT (`passt/tcp_engine/table.py`).

## The guest ends it: what the host peer gets
"""

TAIL = """
SYN on an established connection is answered by an acknowledgement (RFC 5961, 4.2); the guest's RST follows, if it has
forgotten the connection. `(ignored)`: an ICMP error is a hint at most, and easy to forge, once the guest has answered
SYN (RFC 5461, RFC 5927). A refusal of a host client, by RST or by an ICMP error, is tried once more in the other family
where the client is on loopback.

These cannot be told as what they are:

| end | told as | reason |
|---|---|---|
| the guest refuses a host client | RST behind a connect(2) that has succeeded | the kernel accepts a client \
before the guest is asked; automatic ports (`-t auto`) are not listened on unless the guest does |
| the guest becomes silent | RST, after 10 s for SYN, 180 s for data, 2 h 11 min when idle | a socket can send \
FIN or RST; its peer has all data that was sent |
| data that the host's kernel has not sent when the guest resets | RST without it | a kernel discards its send \
queue on RST, too. The guest has no acknowledgement of the last 4 to 8 segments, 64 KiB at most \
(`passt/tcp_engine/window.py`) |

## Loopback to loopback

Spliced connections (`passt/splice/tcp.py`) follow the same rules between two kernels: RST waits until the socket of the
other side has sent the data before it, for 10 s without progress at most (`passt/splice/lingering.py`). A silent peer
ends them by RST. Both ends are on one host, unless a rule leads elsewhere.

## UDP and pings

| end | told | where |
|---|---|---|
| the host, or a router, has no way for a datagram or a ping of the guest | the ICMP error itself, from the \
router that sent it | everywhere (`passt/flow/errors.py`) |
| a port of the guest is closed, where the guest began | Port Unreachable, to the peer's next datagram: the host's \
socket is closed, and its kernel answers | by the tap (`passt/ports/udp_refused.py`) |
| a forwarded port is closed in the guest | Port Unreachable, to the client's next datagram | at a loopback address, \
by the tap and spliced (`passt/splice/refusal.py`) |
| the same | nothing, as from a host that drops | at other addresses: a UDP socket can receive an ICMP error, \
and send none |
"""


def document() -> str:
    """All of docs/ends.md."""
    host, guest = "\n".join(table(by_guest=False)), "\n".join(table(by_guest=True))
    return f"{HEAD}\n{host}\n{BETWEEN}\n{guest}\n{TAIL}"


# Tests ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp_sock, "new_socket", FakeSocket)


ALL = [
    pytest.param(state, event, by_guest, id=f"{'guest' if by_guest else 'host'}: {event}: {state}")
    for by_guest in (False, True)
    for state in STATES
    for event in (FROM_GUEST if by_guest else FROM_HOST)
    if not impossible(state, event, by_guest=by_guest)
]


@pytest.mark.parametrize(("state", "event", "by_guest"), ALL)
def test_an_end_is_told_as_what_it_is(state: str, event: str, by_guest: bool) -> None:
    """Data comes first, an end is no reset, and a reset no end."""
    cell = seen(state, event, by_guest=by_guest)
    told = [word for word in cell.told if word in ("data", "FIN", "RST")]
    assert told == sorted(told, key=["data", "FIN", "RST"].index), f"data, FIN, RST is the only order: {cell.told}"
    if event.startswith("data"):
        wanted = event.split(", ")
        make = STATES[state]
        done = {"data", "FIN"} if not by_guest and make in (fin_in_flight, host_has_ended) else set()
        if not by_guest or make not in (reset_waits, connecting, syn_sent):
            assert set(wanted) - set(told) <= done, f"{cell.told} instead of {wanted}"
        released = {"RST"} if make is guest_has_ended else set()  # from TIME-WAIT
        assert set(told) - set(wanted) <= released or make is syn_sent, f"{cell.told} instead of {wanted}"
    if event == "silence" and by_guest:
        assert cell.over or STATES[state] is connecting, "it stays for ever"
    elif "RST" in event or event == "its link is gone":
        assert cell.over


def test_document() -> None:
    assert DOCUMENT.read_text() == document(), "run `make docs-ends`"


if __name__ == "__main__":
    tcp_sock.new_socket = FakeSocket  # type: ignore[assignment]
    sys.stdout.write(document())
