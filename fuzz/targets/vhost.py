"""A vhost-user front end and a driver, both hostile. A step is a message with any descriptors, a descriptor of a ring,
an index, a kick, a frame to the machine, or memory that changes while a frame is looked at.

Invariants: nothing but drops and a broken ring comes of it; frames lie in the pool, and no view reaches beyond the
machine's memory; a connection that ends leaves no descriptor open; the next front end, which behaves, is served.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import Any, cast

from fuzz.steps import Steps
from passt.drops import Drop
from passt.link import vhost_control as device
from passt.link.backend import Receiver
from passt.link.vhost_user import VhostLink
from passt.loop.reactor import TYPE_VRING, make_ref
from passt.wire import vhost
from passt.wire.vhost import LogArea, Message, RingState
from passt.wire.virtio import VNET, VNET_LEN
from tests.front_end import BASE, RECEIVE, SEND_AREA, SIZE, TRANSMIT, U16, USER, FrontEnd
from tests.unit.support import T0, FakeReactor, StrictDrops

FRAME = bytes(12) + b"\x08\x00\x45" + bytes(60)
SUPER = bytearray(VNET.pack(1, 1, 54, 1400, 34, 16) + bytes(12) + b"\x08\x00\x45" + bytes(39))
SUPER[VNET_LEN + 16 : VNET_LEN + 18] = (5000 + 40).to_bytes(2, "big")
PAYLOAD = bytes(5000)
NOISE = random.Random(1).randbytes(128)
ADDRESSES = (0, BASE, BASE + SEND_AREA, BASE + SIZE - 64, BASE + SIZE, (1 << 64) - 1, USER, BASE + 0x10000)
LENGTHS = (0, 1, 11, 12, 16, 48, 128, 2048, 4096, 65536, 1 << 17, (1 << 32) - 1)
REQUESTS = (2, 3, 4, 5, 8, 9, 10, 11, 12, 13, 14, 16, 17, 18, 20, 36, 37, 38, 1, 15, 6, 7, 42, 43)
ALLOWED = {Drop.VRING_BROKEN, Drop.VRING_FULL, Drop.NO_GUEST, Drop.TRUNCATED, Drop.OVERSIZED_FRAME}


class Sock:
    """A front end that says anything, with descriptors, and reads no answers."""

    def __init__(self) -> None:
        self.waiting = bytearray()
        self.fds: list[int] = []
        self.ended = False

    def fileno(self) -> int:
        return 1000

    def recvmsg(self, size: int, room: int) -> tuple[bytes, list[tuple[int, int, bytes]], int, None]:
        if not self.waiting:
            if self.ended:
                return b"", [], 0, None
            raise BlockingIOError
        data = bytes(self.waiting[:size])
        del self.waiting[:size]
        control = b"".join(fd.to_bytes(4, "little") for fd in self.fds)
        self.fds = []
        return data, [(1, 1, control)] if control else [], 0, None

    def send(self, data: bytes, flags: int) -> int:
        return len(data)

    def sendmsg(self, parts: list[bytes], control: Any = (), flags: int = 0) -> int:
        """As the front end of the tests calls it, to say something."""
        self.waiting += b"".join(parts)
        for _, _, fds in control:
            self.fds += [os.dup(fd) for fd in fds]
        LINK.read(T0)
        return 0

    def close(self) -> None:
        """Nothing is open."""


class Way(Receiver):
    """Stands for the tap: looks at all bytes of frames, while the machine changes them."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.change = False

    def received(self, frames: list[int], octets: int, now: float) -> None:
        for start, end in zip(frames[::2], frames[1::2], strict=True):
            assert 0 <= start < end <= POOL.size
            if self.change:
                MACHINE.memory[SEND_AREA : SEND_AREA + 128] = NOISE
            parts: list[memoryview] = []
            POOL.gather(parts, start + VNET_LEN, end)
            assert sum(map(len, parts)) == end - start - VNET_LEN
            self.frames.append(b"".join(parts))
            octets -= end - start - VNET_LEN
        assert not octets


DROPS = StrictDrops()
LINK = VhostLink(DROPS)
POOL = LINK.make_pool()
LOOP = FakeReactor()
WAY = Way()
ENDS: list[str] = []
LINK.on_gone = ENDS.append
LINK.on_room = lambda now: None
LINK.start(cast(Any, LOOP), POOL, WAY)
MACHINE = FrontEnd(cast(Any, Sock()), num=8, buffer=2048)
FEATURES = MACHINE.features
PIPE = os.pipe()[1]
LINK.state.on_save = lambda send: send(b"state")


def seeds() -> Iterable[bytes]:
    yield bytes((0, 5, 3, 0, 1, 4, 1, 2, 6, 2))
    yield bytes((1, 3, 5, 1, 0, 3, 5, 1, 2, 0, 4, 1))
    yield bytes((2, 1, 0, 2, 6, 0, 0, 3, 1, 0, 4, 1, 5, 5, 5, 4, 0))
    yield bytes((0, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 4, 1))


def attach(features: int) -> Sock:
    """A front end that has set up its rings."""
    sock = Sock()
    ENDS.clear()
    LINK.attach(cast(Any, sock))
    MACHINE.sock, MACHINE.features = cast(Any, sock), features
    for ring in MACHINE.rings:
        MACHINE.memory[ring.at : ring.at + 1024] = bytes(1024)
        ring.avail_idx = ring.seen = 0
    MACHINE._slot, MACHINE._send_at = 0, SEND_AREA
    MACHINE.set_up()
    return sock


def kick(index: int) -> None:
    LINK._kicked(make_ref(TYPE_VRING, 0, index), 1, T0)


def receive(length: int) -> None:
    """Payload that is received in the machine's buffers, where they are for that."""
    views, total = LINK.lay_out(len(SUPER), 5000, 12_000)
    assert sum(map(len, views)) == total
    for view in views:
        view[:] = bytes(len(view))
    for start in range(0, min(length, total), 5000):
        LINK.send_laid_out(SUPER, min(5000, length - start, total - start))


def step(steps: Steps, sock: Sock) -> None:
    kind = steps.byte() % 7
    ring = MACHINE.rings[steps.byte() & 1]
    if kind == 0:
        request = REQUESTS[steps.byte() % len(REQUESTS)]
        fds = (PIPE if request == vhost.SET_DEVICE_STATE_FD else MACHINE.file, ring.kick, ring.call)[: steps.byte() & 3]
        payload = steps.take(steps.byte() % 48)
        if steps.byte() & 1:
            payload = {
                2: vhost.emit_u64(FEATURES | device.F_LOG_ALL),
                5: vhost.emit_regions([MACHINE.region()]),
                6: LogArea((BASE + SIZE >> 15) - 1, 0).emit(),
                9: MACHINE.addresses(ring, vhost.RING_LOGGED).emit(),
                11: RingState(ring.index, 0).emit(),
            }.get(request, ring.index.to_bytes(8, "little") + payload)
        sock.waiting += Message(request, 1 | (steps.byte() & 1) << 3, payload).emit()
        sock.fds += [os.dup(fd) for fd in fds]
        LINK.read(T0)
    elif kind == 1:
        slot, address = steps.byte() & 7, ADDRESSES[steps.byte() % len(ADDRESSES)]
        length = LENGTHS[steps.byte() % len(LENGTHS)]
        ring.describe(slot, address, length, steps.byte() & 7, steps.byte() % 10)
    elif kind == 2:
        ring.offer(steps.byte() % 10)
    elif kind == 3:
        U16.pack_into(MACHINE.memory, (ring.avail_at, ring.avail_at + 2, ring.used_at)[steps.byte() % 3], steps.word())
    elif kind == 4:
        kick(ring.index)
    elif kind == 5:
        LINK.send_payload((SUPER, PAYLOAD))
        receive(steps.byte() << 6)
        LINK.send_frame(FRAME)
        LINK.at_turn_end(T0)
    else:
        WAY.change = not WAY.change


def one(data: bytes) -> None:
    before = free()
    steps = Steps(data)
    DROPS.clear()
    WAY.change = False
    offered = sum(1 << bit for bit in (0, 1, 7, 8, 15, 29) if steps.byte() & 1)
    sock = attach(FEATURES & ~device.F_MRG_RXBUF | offered)
    while steps.left > 0 and not ENDS:
        step(steps, sock)
        LOOP.go_on(T0)
    assert set(DROPS) <= ALLOWED, DROPS
    sock.ended, sock.waiting = True, bytearray()
    LINK.read(T0)
    LOOP.close_retired()
    assert len(ENDS) == 1
    assert free() == before, "a descriptor is left open"
    well_behaved()


def free() -> int:
    """The lowest number that no descriptor has."""
    number = os.dup(MACHINE.file)
    os.close(number)
    return number


def well_behaved() -> None:
    """A front end after the hostile one."""
    attach(FEATURES)
    WAY.frames.clear()
    WAY.change = False
    MACHINE.send(FRAME)
    kick(TRANSMIT)
    LINK.send_frame(FRAME)
    LINK.at_turn_end(T0)
    assert WAY.frames == [FRAME]
    assert [frame for _, frame in MACHINE.receive()] == [FRAME]
    assert MACHINE.rings[RECEIVE].called()
    LINK.attach(None)
    LOOP.go_on(T0)
