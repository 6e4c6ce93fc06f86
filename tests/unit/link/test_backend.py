"""Properties of all back ends, no link, and a back end made for this file, as an example of a new one."""

from __future__ import annotations

import inspect
from collections import Counter
from types import ModuleType
from typing import Any, cast

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.l2 import Ether

from passt import addr
from passt.daemon import wiring
from passt.link import backend, plain_tap, stream_socket, tap_device
from passt.link.backend import Link, NoLink, Receiver
from passt.link.packet import PacketPool
from passt.loop.reactor import Reactor
from passt.ports.sockets import NO_SOCKETS
from passt.tcp import Tcp
from passt.udp import Udp
from passt.wire.virtio import NO_OFFLOAD, VNET_LEN

from ..support import CONFIG, GATEWAY4, GUEST4, GUEST_MAC, OUR_MAC, T0, FakeLink

# The base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [tap_device, plain_tap, stream_socket, backend])
def test_every_back_end_is_one(module: ModuleType) -> None:
    """And does all that is asked of it at run time."""
    for kind in vars(module).values():
        if inspect.isclass(kind) and issubclass(kind, Link) and kind is not Link and kind.__module__ == module.__name__:
            for name in ("send", "send_payload", "send_frame", "sent_bytes"):
                assert getattr(kind, name) is not getattr(Link, name), f"{kind.__name__}.{name}"
            if kind is not NoLink:
                assert kind.start is not Link.start and kind.read is not Link.read


def test_the_base_does_nothing() -> None:
    link = Link(Counter(), tso=False, uso=False)
    pool = link.make_pool()
    calls: list[Any] = [
        lambda: link.sent_bytes,
        lambda: link.start(cast(Any, None), pool, Receiver()),
        lambda: link.read(T0),
        link.watch,
        link.unwatch,
        lambda: link.attach(None),
        lambda: link.send(bytearray()),
        lambda: link.send_payload(()),
        lambda: link.send_frame(b""),
        lambda: Receiver().received([0, 0], 0, T0),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError):
            call()


def test_gone_is_an_error_if_nobody_cares() -> None:
    link, told = FakeLink(), list[str]()
    with pytest.raises(ConnectionError, match="no more"):
        link.gone("It is no more")
    link.on_gone = told.append
    link.gone("It is no more")
    assert told == ["It is no more"]


def test_without_a_link_frames_are_counted() -> None:
    nowhere = NoLink(Counter())
    nowhere.send(bytearray())
    nowhere.send_payload((NO_OFFLOAD, b"x"))
    nowhere.send_frame(b"frame")
    assert nowhere.drops == {"no tap": 3}
    assert (nowhere.sent_frames, nowhere.sent_bytes) == (0, 0)


# The next one: payload in the memory of a machine --------------------------------------------------------------------


class Elsewhere:
    """The `mv` of a pool in which only headers are: payload is where the machine has it."""

    def __init__(self, buf: bytearray) -> None:
        self.headers = memoryview(buf)
        self.pieces: list[tuple[int, int, memoryview]] = []  # where a payload would be in the pool, and where it is

    def __getitem__(self, place: slice) -> memoryview:
        for start, end, memory in self.pieces:
            if start <= place.start and place.stop <= end and place.start < place.stop:
                return memory[place.start - start : place.stop - start]
        return self.headers[place]


class SharedPool(PacketPool):
    """Made by the back end."""

    def __init__(self) -> None:
        super().__init__(1 << 18)
        self.elsewhere = Elsewhere(self.buf)
        self.mv = cast(Any, self.elsewhere)


class SharedLink(FakeLink):
    """Frames in two pieces: headers that are copied, payload that is not. Offloads are agreed on late."""

    def __init__(self) -> None:
        super().__init__(tso=False, uso=False)
        self.pool = SharedPool()

    def make_pool(self) -> PacketPool:
        return self.pool

    def start(self, reactor: Reactor, pool: PacketPool, receiver: Receiver) -> None:
        self.receiver = receiver

    def receive(self, *pieces: tuple[bytes, memoryview]) -> None:
        """A batch of frames."""
        flat, at = [], 0
        for headers, payload in pieces:
            data = at + VNET_LEN + len(headers)
            self.pool.buf[at:data] = NO_OFFLOAD + headers
            self.pool.elsewhere.pieces.append((data, data + len(payload), payload))
            flat += [at, data + len(payload)]
            at = data + len(payload)
        self.receiver.received(flat, 0, T0)
        self.pool.elsewhere.pieces.clear()


def headers(packet: Any, payload: memoryview) -> bytes:
    """The headers before `payload`, with lengths that count it."""
    ether = Ether(src=addr.mac_text(GUEST_MAC), dst=addr.mac_text(OUR_MAC))
    whole = bytes(ether / IP(src=addr.text(GUEST4), dst=addr.text(GATEWAY4)) / packet / bytes(payload))
    return whole[: len(whole) - len(payload)]


def test_payload_that_lies_elsewhere_reaches_protocols_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the tap, nor TCP, nor UDP know of it."""

    class Decision:
        config = CONFIG

    link = SharedLink()
    _, _, tap = wiring.wire(cast(Any, Decision), link, GUEST_MAC, None, NO_SOCKETS, NO_SOCKETS)
    assert tap is not None
    seen: list[memoryview] = []

    def segments(tcp: Tcp, key: bytes, flat: list[int], now: float, hops: int) -> None:
        seen.extend(tcp._pool.mv[start + 20 : end] for start, end in zip(flat[::2], flat[1::2], strict=True))

    def datagrams(udp: Udp, key: bytes, flat: list[int], now: float, hops: int) -> None:
        seen.extend(udp._mv[start:end] for start, end in zip(flat[::3], flat[1::3], strict=True))

    monkeypatch.setattr(Tcp, "tap_handler", segments)
    monkeypatch.setattr(Udp, "tap_handler", datagrams)
    memory = memoryview(bytearray(range(200)))
    pieces = memory[:50], memory[50:150], memory[150:]
    protocols = TCP(sport=1, dport=2, flags="A"), TCP(sport=1, dport=2, flags="A", seq=50), UDP(sport=1, dport=2)
    link.receive(*((headers(p, payload), payload) for p, payload in zip(protocols, pieces, strict=True)))
    assert [bytes(view) for view in seen] == [bytes(piece) for piece in pieces]
    memory[0] = memory[150] = 255
    assert seen[0][0] == seen[2][0] == 255, "a copy"


def test_offloads_may_be_agreed_on_when_a_guest_has_connected() -> None:
    """Each connection asks what is possible now."""

    class Decision:
        config = CONFIG

    link = SharedLink()
    ctx, _, _ = wiring.wire(cast(Any, Decision), link, GUEST_MAC, None, NO_SOCKETS, NO_SOCKETS)
    assert ctx.link is link
    out = ctx.link
    chunks = []
    for tso in (False, True):
        out.tso = tso
        chunks.append(_chunk(ctx))
    assert chunks[0] < 2000 < 60000 < chunks[1]


def _chunk(ctx: Any) -> int:
    """The payload of the longest frame of a new connection."""
    from passt.linux.tcpinfo import Features
    from passt.tcp_engine.conn import TcpConn
    from passt.tcp_engine.output import TcpOut

    conn = TcpConn(GUEST4 + GATEWAY4 + bytes(4))
    out = TcpOut(ctx, Features())
    out.build_header(conn)
    out.limit_mss(conn)
    return conn.chunk
