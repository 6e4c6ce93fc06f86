"""A vhost-user link with a real loop, and a front end at the other end of its socket."""

from __future__ import annotations

import random
import socket
from collections import Counter

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from passt.link import vhost_control as device
from passt.link.backend import Receiver
from passt.link.packet import PacketPool
from passt.link.vhost_user import VhostLink
from passt.loop.reactor import Reactor
from passt.wire.virtio import VNET

from ...front_end import FrontEnd

PLAIN = device.F_VERSION_1 | device.F_PROTOCOL_FEATURES | device.F_INDIRECT_DESC


class Keeper(Receiver):
    """Keeps frames as bytes; `parts` has how many pieces the payload of each TCP segment lay in."""

    def __init__(self, pool: PacketPool) -> None:
        self.pool = pool
        self.frames: list[bytes] = []
        self.parts: list[int] = []
        self.batches = self.octets = 0

    def received(self, frames: list[int], octets: int, now: float) -> None:
        self.batches += 1
        self.octets += octets
        for start, end in zip(frames[::2], frames[1::2], strict=True):
            self.frames.append(self.pool.copy(start + 10, end))
            parts: list[memoryview] = []
            self.pool.gather(parts, start + 10 + 54, end)
            assert b"".join(parts) == self.frames[-1][54:]
            self.parts.append(len(parts))


class Desk:
    """A link with a reactor, and a front end at the other end of its socket."""

    def __init__(self, features: int = PLAIN | device.F_MRG_RXBUF, *, num: int = 256, buffer: int = 4096) -> None:
        self.drops: Counter[str] = Counter()
        self.link = VhostLink(self.drops)
        self.reactor = Reactor()
        pool = self.link.make_pool()
        self.keeper = Keeper(pool)
        self.link.start(self.reactor, pool, self.keeper)
        self.gone: list[str] = []
        self.link.on_gone = self.gone.append
        self.machine = self.connect(features, num=num, buffer=buffer)

    def connect(self, features: int, *, num: int = 256, buffer: int = 4096) -> FrontEnd:
        """A new front end, which says nothing yet."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        ours.setblocking(False)
        self.link.attach(ours)
        self.machine = FrontEnd(theirs, features, num=num, buffer=buffer)
        return self.machine

    def run(self, turns: int = 4) -> None:
        for _ in range(turns):
            self.reactor.turn(0)

    def frames(self) -> list[bytes]:
        """The frames that were handed on since the last call."""
        self.run()
        taken, self.keeper.frames = self.keeper.frames, []
        return taken

    def close(self) -> None:
        self.link.attach(None)
        self.reactor.close_retired()
        self.machine.close()
        self.reactor.close()


def tcp_frame(length: int, *, v6: bool = False, seed: int = 0) -> bytes:
    """A TCP segment with `length` bytes of payload."""
    layer = IPv6(src="fd00::2", dst="fd00::1") if v6 else IP(src="192.0.2.2", dst="192.0.2.1")
    data = random.Random(seed).randbytes(length)
    return bytes(Ether(src="52:54:00:12:34:56", dst="9a:55:9a:55:9a:55") / layer / TCP(sport=1000, dport=80) / data)


def super_frame(length: int, size: int, *, v6: bool = False) -> tuple[bytearray, bytes]:
    """A TCP super-frame as the engine sends it: (virtio-net header and headers, payload)."""
    frame = tcp_frame(length, v6=v6)
    l4 = 54 if v6 else 34
    partial = bytearray(frame)
    pseudo = (
        (frame[22:38] + frame[38:54] if v6 else frame[26:34]) + bytes((0, 6)) + (len(frame) - l4).to_bytes(2, "big")
    )
    total = sum(int.from_bytes(pseudo[i : i + 2], "big") for i in range(0, len(pseudo), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    partial[l4 + 16 : l4 + 18] = total.to_bytes(2, "big")
    kind = VNET.pack(1, 4 if v6 else 1, l4 + 20, size, l4, 16)
    return bytearray(kind) + partial[: l4 + 20], bytes(frame[l4 + 20 :])
