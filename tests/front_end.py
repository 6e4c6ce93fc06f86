"""A vhost-user front end for tests: a machine of one memfd, and both rings of a network device.

    with FrontEnd(sock, features=...) as machine:
        machine.set_up()
        machine.send(frame)                   made available, and kicked
        ...                                   the back end runs
        machine.receive()                     [(virtio-net header, frame), ...]

Memory, in addresses of the machine from BASE on: descriptors, available and used ring of each queue, then a buffer for
each entry of the receive ring, then buffers that `send` uses one after the other. Tests may write to `memory` wherever
they like, as a hostile driver would.
"""

from __future__ import annotations

import mmap
import os
import socket
from collections.abc import Sequence
from struct import Struct
from types import TracebackType

from passt.link import vhost_control as device
from passt.wire import vhost
from passt.wire.vhost import LogArea, Message, Region, RingAddresses, RingState, StateTransfer

BASE = 0x1000_0000  # of the machine's memory, as the machine sees it
USER = 0x7F00_0000_0000  # as the front end says it sees it
SIZE = 1 << 23
RECEIVE, TRANSMIT = device.TO_GUEST, device.FROM_GUEST
DESC = Struct("<QIHH")
USED = Struct("<II")
U16 = Struct("<H")
NEXT, WRITE, INDIRECT = 1, 2, 4
PARTS = 0x10000  # bytes for the parts of a ring
BUFFERS = 2 * PARTS  # where buffers of the receive ring begin
SEND_AREA = 1 << 22  # where buffers of `send` begin
VNET_12 = bytes(12)


class Ring:
    """The driver's side of a queue."""

    def __init__(self, machine: FrontEnd, index: int, num: int) -> None:
        self.machine, self.index, self.num = machine, index, num
        self.at = index * PARTS
        self.avail_at = self.at + DESC.size * num
        self.used_at = (self.avail_at + 6 + 2 * num + 3) & ~3
        self.kick, self.call = (os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2))
        self.avail_idx = self.seen = 0

    def describe(self, slot: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Write a descriptor."""
        DESC.pack_into(self.machine.memory, self.at + DESC.size * slot, address, length, flags, following)

    def offer(self, head: int) -> None:
        """Make a chain available, without a kick. The index changes at once: `struct` would write zeros before it."""
        machine = self.machine
        U16.pack_into(machine.memory, self.avail_at + 4 + 2 * (self.avail_idx % self.num), head)
        self.avail_idx = self.avail_idx + 1 & 0xFFFF
        machine.halves[self.avail_at + 2 >> 1] = self.avail_idx

    def used(self) -> list[tuple[int, int]]:
        """(head, length) of the chains that came back since the last look."""
        memory = self.machine.memory
        idx = self.machine.halves[self.used_at + 2 >> 1]  # at once: `struct` reads bytes
        back = []
        while self.seen != idx:
            back.append(USED.unpack_from(memory, self.used_at + 4 + 8 * (self.seen % self.num)))
            self.seen = self.seen + 1 & 0xFFFF
        return back

    def called(self) -> int:
        """How often this side was called since the last look."""
        try:
            return os.eventfd_read(self.call)
        except BlockingIOError:
            return 0

    @property
    def event(self) -> int:
        """avail_event: the index from which on the back end wants a kick."""
        return int(U16.unpack_from(self.machine.memory, self.used_at + 4 + 8 * self.num)[0])

    @property
    def flags(self) -> int:
        """Flags of the used ring."""
        return int(U16.unpack_from(self.machine.memory, self.used_at)[0])

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)


class FrontEnd:
    """One machine. `features`: what its driver acknowledges; `buffer`: bytes of each receive buffer."""

    def __init__(
        self,
        sock: socket.socket,
        features: int = device.F_VERSION_1 | device.F_MRG_RXBUF | device.F_PROTOCOL_FEATURES,
        *,
        num: int = 256,
        buffer: int = 4096,
    ) -> None:
        self.sock, self.features, self.buffer = sock, features, buffer
        self.file = os.memfd_create("machine", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(self.file, SIZE)
        self.memory = mmap.mmap(self.file, SIZE)
        self.halves = memoryview(self.memory).cast("H")
        self.rings = [Ring(self, RECEIVE, num), Ring(self, TRANSMIT, num)]
        self.header = 12 if features & (device.F_VERSION_1 | device.F_MRG_RXBUF) else 10
        self._send_at, self._slot = SEND_AREA, 0
        self.back: list[tuple[int, int]] = []  # (head, length) of the last `receive`

    def __enter__(self) -> FrontEnd:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Disconnect."""
        self.sock.close()
        for ring in self.rings:
            ring.close()
        self.halves.release()
        self.memory.close()
        os.close(self.file)

    # Messages --------------------------------------------------------------------------------------------------------

    def tell(self, request: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = vhost.VERSION) -> None:
        """Send a message."""
        socket.send_fds(self.sock, [Message(request, flags, payload).emit()], fds)

    def answer(self) -> Message:
        """Read a reply."""
        request, flags, size = Message.parse_header(self.sock.recv(vhost.HEADER.size, socket.MSG_WAITALL))
        return Message(request, flags, self.sock.recv(size, socket.MSG_WAITALL) if size else b"")

    def region(self) -> Region:
        """All of the memory."""
        return Region(BASE, SIZE, USER, 0)

    def share_memory(self) -> None:
        """SET_MEM_TABLE"""
        self.tell(vhost.SET_MEM_TABLE, vhost.emit_regions([self.region()]), [self.file])

    def set_up(self, *, base: int = 0) -> None:
        """Everything until both rings run, in the order of QEMU, with all receive buffers available."""
        self.introduce()
        self.fill()
        for ring in self.rings:
            self.start_ring(ring, base)

    def start_ring(self, ring: Ring, base: int = 0) -> None:
        """Tell of one ring."""
        index = ring.index
        if self.features & device.F_PROTOCOL_FEATURES:
            self.tell(vhost.SET_VRING_ENABLE, RingState(index, 1).emit())
        self.tell(vhost.SET_VRING_NUM, RingState(index, ring.num).emit())
        self.tell(vhost.SET_VRING_BASE, RingState(index, base).emit())
        self.tell(vhost.SET_VRING_ADDR, self.addresses(ring).emit())
        self.tell(vhost.SET_VRING_KICK, vhost.emit_u64(index), [ring.kick])
        self.tell(vhost.SET_VRING_CALL, vhost.emit_u64(index), [ring.call])

    # Migration -------------------------------------------------------------------------------------------------------

    def stop_rings(self) -> list[int]:
        """GET_VRING_BASE of both rings: where they stopped."""
        bases = []
        for ring in self.rings:
            self.tell(vhost.GET_VRING_BASE, RingState(ring.index, 0).emit())
            bases.append(RingState.parse(self.answer().payload).number)
        return bases

    def ask_for_state(self, direction: int) -> int:
        """SET_DEVICE_STATE_FD: our end of the pipe, which the back end writes or reads."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        ours, theirs = (reader, writer) if direction == vhost.SAVE else (writer, reader)
        self.tell(vhost.SET_DEVICE_STATE_FD, StateTransfer(direction, vhost.STOPPED).emit(), [theirs])
        os.close(theirs)
        assert vhost.u64(self.answer().payload) == vhost.NO_DESCRIPTOR
        return ours

    def save_state(self) -> bytes:
        """The back end's state, to the end of the pipe."""
        with open(self.ask_for_state(vhost.SAVE), "rb") as pipe:
            return pipe.read()

    def load_state(self, data: bytes) -> None:
        """Give the back end a state."""
        with open(self.ask_for_state(vhost.LOAD), "wb") as pipe:
            pipe.write(data)

    def check_state(self) -> bool:
        """CHECK_DEVICE_STATE: whether the last transfer went well."""
        self.tell(vhost.CHECK_DEVICE_STATE)
        return vhost.u64(self.answer().payload) == 0

    def move_to(self, sock: socket.socket) -> FrontEnd:
        """The same machine, stopped, at another back end: with a copy of its memory, and nothing said yet."""
        other = FrontEnd(sock, self.features, num=self.rings[0].num, buffer=self.buffer)
        other.memory[:] = self.memory[:]
        other._send_at, other._slot = self._send_at, self._slot
        for new, old in zip(other.rings, self.rings, strict=True):
            new.avail_idx, new.seen = old.avail_idx, old.seen
        return other

    def introduce(self) -> None:
        """Everything before the rings."""
        self.tell(vhost.SET_OWNER)
        if self.features & device.F_PROTOCOL_FEATURES:
            self.tell(vhost.SET_PROTOCOL_FEATURES, vhost.emit_u64(device.PROTOCOL_FEATURES))
        self.tell(vhost.SET_FEATURES, vhost.emit_u64(self.features))
        self.share_memory()

    def tell_log(self, size: int) -> None:
        """SET_LOG_BASE, without the reply."""
        file = os.memfd_create("log", os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC)
        os.ftruncate(file, size)
        self._log = mmap.mmap(file, size)
        self.tell(vhost.SET_LOG_BASE, LogArea(size, 0).emit(), [file])
        os.close(file)

    def log(self, *, rings: bool = True) -> mmap.mmap:
        """Its reply, and log what is written, to the used rings as well; the log."""
        assert self.answer().request == vhost.SET_LOG_BASE
        self.tell(vhost.SET_FEATURES, vhost.emit_u64(self.features | device.F_LOG_ALL))
        for ring in self.rings if rings else ():
            self.tell(vhost.SET_VRING_ADDR, self.addresses(ring, vhost.RING_LOGGED).emit())
        return self._log

    def addresses(self, ring: Ring, flags: int = 0) -> RingAddresses:
        """Of a ring."""
        at = USER + ring.at, USER + ring.used_at, USER + ring.avail_at
        return RingAddresses(ring.index, flags, *at, BASE + ring.used_at)

    # Frames ----------------------------------------------------------------------------------------------------------

    def fill(self) -> None:
        """Make all receive buffers available, each a chain of one."""
        ring = self.rings[RECEIVE]
        for slot in range(ring.num):
            ring.describe(slot, self._buffer_at(slot) + BASE, self.buffer, WRITE)
            ring.offer(slot)

    def _buffer_at(self, slot: int) -> int:
        return BUFFERS + slot * self.buffer

    def send(
        self,
        frame: bytes,
        vnet: bytes | None = None,
        *,
        split: Sequence[int] = (),
        indirect: bool = False,
        kick: bool = True,
    ) -> None:
        """Give a frame to the transmit ring, in buffers that end after `split` bytes of header and frame."""
        data = (bytes(self.header) if vnet is None else vnet[: self.header].ljust(self.header, b"\0")) + frame
        ends = [*split, len(data)]
        ring, parts, start = self.rings[TRANSMIT], [], 0
        if self._send_at + len(data) + DESC.size * len(ends) + 64 > SIZE:
            self._send_at = SEND_AREA
        for end in ends:
            parts.append((self._place(data[start:end]), end - start))
            start = end
        if indirect:
            table = b"".join(
                DESC.pack(at, n, NEXT if i + 1 < len(parts) else 0, i + 1 if i + 1 < len(parts) else 0)
                for i, (at, n) in enumerate(parts)
            )
            self._send_at = (self._send_at + 15) & ~15
            parts = [(self._place(table), len(table))]
        slots = [(self._slot + i) % ring.num for i in range(len(parts))]
        self._slot = (self._slot + len(parts)) % ring.num
        for i, (at, n) in enumerate(parts):
            last = i + 1 == len(parts)
            ring.describe(slots[i], at, n, INDIRECT if indirect else 0 if last else NEXT, 0 if last else slots[i + 1])
        ring.offer(slots[0])
        if kick:
            os.eventfd_write(ring.kick, 1)

    def _place(self, data: bytes) -> int:
        at = self._send_at
        self.memory[at : at + len(data)] = data
        self._send_at += len(data)
        return BASE + at

    def receive(self, *, refill: bool = True) -> list[tuple[bytes, bytes]]:
        """Frames that came, as (virtio-net header, frame); buffers are given back with `refill`."""
        ring = self.rings[RECEIVE]
        chunks = []
        self.back = ring.used()
        for head, length in self.back:
            at = self._buffer_at(head)
            chunks.append(self.memory[at : at + length])
            if refill:
                ring.offer(head)
        if chunks and refill:
            os.eventfd_write(ring.kick, 1)
        frames = []
        while chunks:
            first = chunks.pop(0)
            count = U16.unpack_from(first, 10)[0] if self.header == 12 and self.features & device.F_MRG_RXBUF else 1
            data = first + b"".join(chunks.pop(0) for _ in range(count - 1))
            frames.append((data[: self.header], data[self.header :]))
        return frames
