"""A virtual machine whose memory is shared, by vhost-user: frames lie in its rings.

    front end          vhost_control.Device: features, memory, rings           one message after the other
    machine -> host    ring 1 -> vring_in.FrameReader -> pool -> Receiver      payload of TCP is not copied
    host -> machine    vring_out.FrameWriter -> ring 0                         shown and called once, at the turn's end;
                                                                               much payload of TCP is not copied

Offloads are those that the machine's driver has acknowledged. A Linux guest sends and takes super-frames of 64 KiB with
unfinished checksums at any MTU, as over a tap. For other drivers `gso` cuts super-frames and completes checksums, as
for a stream socket, in a buffer from which the frames are copied into the ring. Short frames are padded, as there.

A driver without MRG_RXBUF and TSO gives buffers of a standard frame, and no packet may be longer then. `on_mtu` says
so, before the machine asks for its configuration.

A ring that breaks the rules is not looked at until the front end sets it up again: one line, and a counter. The rest
of the device goes on.
"""

from __future__ import annotations

import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence

from .. import PASST, log
from ..calls import calls
from ..drops import Drop, Reason
from ..loop.reactor import EPOLLET, EPOLLIN, TYPE_GUEST, TYPE_VRING, Reactor, ref_data
from ..wire.ip import MTU_MAX
from ..wire.vhost import Invalid
from ..wire.virtio import GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4, NO_OFFLOAD, VNET_LEN
from .backend import Buffer, Link, Receiver
from .device_state import DeviceState
from .gso import FRAME_MIN, LENGTH, PADDING, Gso
from .guest_memory import BadRing
from .packet import PacketPool
from .scattered import ScatteredPool
from .vhost_control import (
    F_GUEST_CSUM,
    F_GUEST_TSO4,
    F_GUEST_TSO6,
    F_GUEST_USO4,
    F_GUEST_USO6,
    F_MRG_RXBUF,
    F_VERSION_1,
    FROM_GUEST,
    TO_GUEST,
    Closed,
    Device,
)
from .vring import Vring
from .vring_in import FrameReader
from .vring_out import FrameWriter

MTU_SMALL = 1500  # of a driver whose receive buffers are small, and are not merged
SCRATCH = 1 << 19  # bytes: 64 KiB, cut to the shortest MSS, with headers
_TSO = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6

CALLS = calls("recvmsg", "sendto", "read", "write", "close", mode=PASST)


class VhostLink(Link):
    """The machine at a vhost-user socket, while there is one."""

    rto_min = 0.050  # the machine's processors are threads of the host, and may have to wait

    _reactor: Reactor
    _receiver: Receiver

    def __init__(self, drops: Counter[Reason]) -> None:
        super().__init__(drops, tso=True, uso=True)
        self._pool = ScatteredPool()
        self._scratch = memoryview(bytearray(SCRATCH))
        self._gso = Gso(self._scratch)
        self._octets = 0
        self.state = DeviceState()
        self.on_start: Callable[[float], bool] | None = None  # the machine is about to run: True: not before `proceed`
        self._held = False
        self._device: Device | None = None
        self._reader: FrameReader | None = None
        self._writer: FrameWriter | None = None
        self._takes: frozenset[int] = frozenset()  # gso_type of frames that the driver takes
        self._csum = self._whole = False  # `_whole`: TCP needs nothing done by us
        self._waits = False  # whether `on_room` is due when `full` ends
        self._goes_on = False  # whether `_next_turn` is going to be called

    def make_pool(self) -> PacketPool:
        """The pool that finds payload in the machine's memory."""
        return self._pool

    def start(self, reactor: Reactor, pool: PacketPool, receiver: Receiver) -> None:
        """Serve front ends from now on."""
        self._reactor, self._receiver = reactor, receiver
        reactor.handle(TYPE_GUEST, self._handle)
        reactor.handle(TYPE_VRING, self._kicked)
        self.state.start(reactor)
        reactor.at_turn_end.append(self.at_turn_end)

    # The front end ---------------------------------------------------------------------------------------------------

    def attach(self, sock: socket.socket | None) -> None:
        """Serve the front end at `sock` from now on, or none."""
        former, self._device = self._device, None
        if former is not None:
            self._release(former)
        if sock is not None:
            self._device = Device(sock, self._stopping, self._changed, self.state)
            self._reactor.watch(sock.fileno(), TYPE_GUEST, 0, EPOLLIN)

    def _release(self, device: Device) -> None:
        """Forget a front end, and close all that came from it.

        It has read for itself where its rings stand, and another device may use them already: frames that were filled
        and not shown are lost.
        """
        for ring in device.rings:
            ring.broken = True  # and so it is not written
            self._stopping(ring)
            for fd in (ring.kick, ring.call):
                if fd >= 0:
                    os.close(fd)
            ring.kick = ring.call = -1
        device.close()
        self.state.abandon()
        self.full = self._waits = self._held = False
        self._reactor.retire(device.sock.fileno(), device.sock)

    def _handle(self, ref: int, events: int, now: float) -> None:
        """The front end says something, or is gone."""
        self.read(now)

    def read(self, now: float) -> None:
        """Handle what the front end has said."""
        device = self._device
        if device is None:
            return
        try:
            device.readable()
        except Closed:
            self._end("The guest closed the connection")
        except Invalid as e:
            self._end(f"The vhost-user connection failed: {e}")
        except OSError as e:
            self._end(f"The vhost-user connection failed: {e.strerror}")

    def _end(self, why: str) -> None:
        self.attach(None)
        self.gone(why)

    # Rings that start and stop ---------------------------------------------------------------------------------------

    def _changed(self, ring: Vring) -> None:
        """Serve a ring if it runs."""
        device = self._device
        if device is None or not ring.runs or (ring.index == FROM_GUEST and self._must_wait()):
            return
        header = VNET_LEN + (2 if device.features & (F_MRG_RXBUF | F_VERSION_1) else 0)
        try:
            if ring.index == FROM_GUEST:
                self._reader = FrameReader(ring, header, self._pool, self._receiver, self.drops)
                self._go_on()  # with what was made available before
            else:
                self._adopt(device.features)
                mergeable, cut = bool(device.features & F_MRG_RXBUF), device.features & _TSO != _TSO
                self._writer = FrameWriter(ring, header, mergeable=mergeable, cut=cut)
                self._writer.start()
                self._measure(self._writer)
                if self.on_mtu is not None:
                    whole = mergeable or device.features & _TSO == _TSO
                    self.on_mtu(MTU_MAX if whole else MTU_SMALL)
            self._reactor.watch(ring.kick, TYPE_VRING, ring.index, EPOLLIN | EPOLLET)
            ring.watched = True
        except (BadRing, OSError) as e:
            self._broken(ring, e)

    def _must_wait(self) -> bool:
        """Whether the machine's frames cannot be read yet."""
        if not self._held and self.on_start is not None:
            self._held = self.on_start(time.monotonic())
        return self._held

    def proceed(self, now: float) -> None:
        """The machine's frames can be read: the reverse of True from `on_start`."""
        self._held = False
        if self._device is not None:
            self._changed(self._device.rings[FROM_GUEST])

    def _adopt(self, features: int) -> None:
        """Use the offloads that the driver has acknowledged."""
        self._csum = bool(features & F_GUEST_CSUM)
        takes = {GSO_NONE}
        if self._csum:
            takes |= {GSO_TCPV4} if features & F_GUEST_TSO4 else set()
            takes |= {GSO_TCPV6} if features & F_GUEST_TSO6 else set()
            takes |= {GSO_UDP_L4} if features & F_GUEST_USO4 and features & F_GUEST_USO6 else set()
        self._takes = frozenset(takes)
        self._whole = takes >= {GSO_TCPV4, GSO_TCPV6}

    def _stopping(self, ring: Vring) -> None:
        """A ring is about to stop or to change: give back what was taken of it."""
        if ring.watched:
            ring.watched = False
            self._reactor.forget(ring.kick)
        if ring.index == FROM_GUEST:
            self._reader = None
            return
        writer, self._writer = self._writer, None
        self.full = self._waits = True  # until it runs again, or the front end is gone
        if writer is not None:
            try:
                writer.stop()
            except OSError as e:
                self._say_broken(ring, e)

    def _broken(self, ring: Vring, e: Exception) -> None:
        """Look at a ring no more."""
        ring.broken = True
        self._stopping(ring)
        self._say_broken(ring, e)

    def _say_broken(self, ring: Vring, e: Exception) -> None:
        self.drops[Drop.VRING_BROKEN] += 1
        name = "receive" if ring.index == TO_GUEST else "transmit"
        text = f"The guest's {name} ring is broken, frames do not get through: {e}"
        log.warn_ratelimited(f"{name} ring", text, time.monotonic())

    def _kicked(self, ref: int, events: int, now: float) -> None:
        """The machine has made buffers available."""
        device = self._device
        if device is None:
            return
        writer = self._writer
        if ref_data(ref) == FROM_GUEST:
            self.catch_up(now)
        elif writer is not None:
            try:
                writer.kicked()
                self._measure(writer)
            except (BadRing, OSError) as e:
                self._broken(writer.ring, e)

    def catch_up(self, now: float) -> None:
        """Read the machine's frames. The rest of many is read in the next turn, and so is what a fault has left."""
        reader = self._reader
        if reader is None:
            return
        more = True
        try:
            more = reader.run(now)
        except (BadRing, OSError) as e:
            more = False
            self._broken(reader.ring, e)
        finally:
            if more:
                self._go_on()

    def _go_on(self) -> None:
        """Read the machine's frames in the next turn, once. No kick has to tell of them."""
        if not self._goes_on:
            self._goes_on = True
            self._reactor.next_turn(self._next_turn)

    def _next_turn(self, now: float) -> None:
        self._goes_on = False
        self.catch_up(now)

    # To the machine --------------------------------------------------------------------------------------------------

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, virtio-net header first."""
        self.send_payload((hdr,))

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`, the first of which starts with the virtio-net header."""
        hdr = parts[0]
        if hdr[1] not in self._takes or (hdr[0] and not self._csum):
            self._in_software(parts)
        else:
            self._put(hdr[:VNET_LEN], hdr[VNET_LEN:], parts[1:], parts)

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no virtio-net header, no offload."""
        self._put(NO_OFFLOAD, frame, ())

    def lay_out(self, header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        """In the machine's buffers, if it takes frames as they are."""
        writer = self._writer
        if writer is None or not self._whole or self.capture is not None:
            return [], 0
        try:
            return writer.lay_out(header - VNET_LEN, chunk, want)
        except (BadRing, OSError) as e:
            self._broken(writer.ring, e)
            return [], 0

    def send_laid_out(self, hdr: bytearray, length: int) -> None:
        """Its payload is there: write the headers."""
        writer = self._writer
        if writer is None:  # the frame before it has found the ring broken
            self.drops[Drop.NO_GUEST] += 1
            return
        front = memoryview(hdr)
        try:
            writer.fill(front[:VNET_LEN], front[VNET_LEN:], length)
        except (BadRing, OSError) as e:
            self._broken(writer.ring, e)
            return
        self._measure(writer)
        self.sent_frames += 1
        self._octets += max(len(hdr) - VNET_LEN + length, FRAME_MIN)

    @property
    def sent_bytes(self) -> int:
        """Bytes of the frames that were put into the ring."""
        return self._octets

    def at_turn_end(self, now: float) -> None:
        """Let those go on that waited, and show the machine the frames of this turn."""
        if self._waits and not self.full:
            self._waits = False
            if self.on_room is not None:
                self.on_room(now)
        writer = self._writer
        if writer is not None and writer.filled:
            try:
                writer.publish()
            except OSError as e:
                self._broken(writer.ring, e)

    def _in_software(self, parts: Sequence[Buffer]) -> None:
        """Cut a super-frame, and complete checksums: the driver does not."""
        if self._writer is None:
            self.drops[Drop.NO_GUEST] += 1
            return
        hdr, out = parts[0], self._scratch
        if hdr[1]:
            end = self._gso.cut(0, hdr, parts[1] if len(parts) == 2 else b"".join(parts[1:]))
        else:
            end = self._gso.frame(0, sum(map(len, parts)) - VNET_LEN, parts)
        at = 0
        while at < end:
            frame = at + LENGTH.size
            at = frame + LENGTH.unpack_from(out, at)[0]
            self._put(NO_OFFLOAD, out[frame:at], ())

    def _put(self, vnet: Buffer, front: Buffer, rest: Sequence[Buffer], whole: Sequence[Buffer] = ()) -> None:
        """Write a frame into the ring, or drop it. `whole` is a frame that could be cut."""
        writer = self._writer
        if writer is None:
            self.drops[Drop.NO_GUEST] += 1
            return
        length = len(front) + sum(map(len, rest))
        if length < FRAME_MIN:
            rest, length = (*rest, PADDING[length:]), FRAME_MIN
        try:
            fits = writer.put(vnet, front, rest, length)
        except (BadRing, OSError) as e:
            self._broken(writer.ring, e)
            return
        self._measure(writer)
        if fits:
            self.sent_frames += 1
            self._octets += length
            if self.capture is not None:
                self.capture(True, b"".join((vnet, front, *rest)))
        elif whole and vnet[1] and not writer.could_fit(length):
            self._in_software(whole)
        else:
            self.drops[Drop.VRING_FULL] += 1

    def _measure(self, writer: FrameWriter) -> None:
        self.full, self.room = writer.full, writer.room
        if writer.full:
            self._waits = True
