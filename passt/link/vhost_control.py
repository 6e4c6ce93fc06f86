"""The device that a front end sees over its vhost-user socket: features, memory, two rings.

    message                        effect
    -----------------------------  --------------------------------------------------------------------------------
    GET_FEATURES, SET_FEATURES     offered ones; those that the machine's driver has acknowledged
    GET_PROTOCOL_FEATURES, SET_    the same for the protocol
    SET_MEM_TABLE, ADD_MEM_REG,    other memory, at any time: rings are looked up again. Chains that were taken and
      REM_MEM_REG                    not filled are given back before
    SET_VRING_NUM, _ADDR, _BASE    where a ring is, and where it goes on
    SET_VRING_KICK, _CALL, _ERR    eventfds
    SET_VRING_ENABLE               a ring runs when all are there, in whatever order they came
    GET_VRING_BASE                 the ring stops; the reply tells where
    SET_LOG_BASE, SET_LOG_FD       where written pages are logged while F_LOG_ALL is acknowledged (`dirty_log.py`)
    SET_DEVICE_STATE_FD,           what is not in the machine's memory goes to the front end, or comes from it
      CHECK_DEVICE_STATE             (`device_state.py`)
    RESET_OWNER                    all rings stop
    GET_QUEUE_NUM, GET_MAX_MEM_    1 pair; slots of memory
      SLOTS
    SET_OWNER, NET_SET_MTU         nothing to do. The machine learns its MTU from us by DHCP and router advertisements

A message that cannot be granted is answered with an error if the front end waits for an answer; otherwise, and after
anything that is no message, the connection ends: the two sides would not agree on what the device is.

Source: docs/interop/vhost-user.rst of QEMU. Not offered: the back end's own channel, inflight buffers, several queue
pairs, packed rings.
"""

from __future__ import annotations

import array
import os
import socket
import stat
import time
from collections.abc import Callable

from .. import PASST, log
from ..calls import calls
from ..wire import vhost
from ..wire.vhost import Invalid, Message, Region, RingAddresses, RingState
from .device_state import DeviceState
from .dirty_log import DirtyLog
from .guest_memory import SLOTS_MAX, GuestMemory, mapped
from .vring import Vring

TO_GUEST, FROM_GUEST = range(2)  # the rings of a queue pair, receiveq and transmitq of virtio-net

# Feature bits (virtio 1.2, 5.1.3 and 6)
F_CSUM = 1 << 0  # the machine may leave checksums to us
F_GUEST_CSUM = 1 << 1  # we may leave them to the machine
F_GUEST_TSO4, F_GUEST_TSO6 = 1 << 7, 1 << 8  # we may send TCP super-frames
F_HOST_TSO4, F_HOST_TSO6 = 1 << 11, 1 << 12  # the machine may
F_MRG_RXBUF = 1 << 15  # a frame may fill several chains
F_LOG_ALL = 1 << 26  # what is written is logged; for the front end, not for the driver
F_INDIRECT_DESC = 1 << 28
F_EVENT_IDX = 1 << 29
F_PROTOCOL_FEATURES = 1 << 30
F_VERSION_1 = 1 << 32
F_GUEST_USO4, F_GUEST_USO6, F_HOST_USO = 1 << 54, 1 << 55, 1 << 56  # UDP super-frames
FEATURES = (
    F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6 | F_MRG_RXBUF | F_INDIRECT_DESC
    | F_LOG_ALL | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1 | F_GUEST_USO4 | F_GUEST_USO6 | F_HOST_USO
)  # fmt: skip
PROTOCOL_FEATURES = (
    vhost.P_MQ | vhost.P_LOG_SHMFD | vhost.P_REPLY_ACK | vhost.P_NET_MTU | vhost.P_CONFIGURE_MEM_SLOTS
    | vhost.P_DEVICE_STATE
)  # fmt: skip

_SUCCESS, _FAILURE = vhost.emit_u64(0), vhost.emit_u64(1)
MESSAGES_MAX = 64  # for one event
LATER = b"later"  # instead of an answer: it is sent when it is known

CALLS = calls("recvmsg", "sendto", "close", "fstat", "newfstatat", mode=PASST)


class Closed(Exception):
    """The front end has closed the connection."""


class Device:
    """A device as its front end describes it. Each connection has a new one.

    `stopping(ring)` is called before anything about a ring changes, `changed(ring)` after it. `state` transfers what
    else there is.
    """

    def __init__(
        self,
        sock: socket.socket,
        stopping: Callable[[Vring], None],
        changed: Callable[[Vring], None],
        state: DeviceState,
    ) -> None:
        self.sock = sock
        self._state = state
        self._log: DirtyLog | None = None
        self.features = 0
        self.protocol_features = 0
        self.rings = Vring(TO_GUEST), Vring(FROM_GUEST)
        self._memory = GuestMemory()
        self._stopping, self._changed = stopping, changed
        self._header: tuple[int, int, int] | None = None
        self._got = b""
        self._fds: list[int] = []
        self._requests: dict[int, Callable[[bytes], bytes | None]] = {
            vhost.GET_FEATURES: lambda _: vhost.emit_u64(FEATURES),
            vhost.SET_FEATURES: self._set_features,
            vhost.SET_OWNER: _accept,
            vhost.RESET_OWNER: self._reset_owner,
            vhost.SET_MEM_TABLE: self._set_mem_table,
            vhost.SET_LOG_BASE: self._set_log_base,
            vhost.SET_LOG_FD: self._set_log_fd,
            vhost.SET_VRING_NUM: self._set_vring_num,
            vhost.SET_VRING_ADDR: self._set_vring_addr,
            vhost.SET_VRING_BASE: self._set_vring_base,
            vhost.GET_VRING_BASE: self._get_vring_base,
            vhost.SET_VRING_KICK: self._set_vring_kick,
            vhost.SET_VRING_CALL: self._set_vring_call,
            vhost.SET_VRING_ERR: _accept,
            vhost.GET_PROTOCOL_FEATURES: lambda _: vhost.emit_u64(PROTOCOL_FEATURES),
            vhost.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            vhost.GET_QUEUE_NUM: lambda _: vhost.emit_u64(1),
            vhost.SET_VRING_ENABLE: self._set_vring_enable,
            vhost.NET_SET_MTU: _accept,
            vhost.GET_MAX_MEM_SLOTS: lambda _: vhost.emit_u64(SLOTS_MAX),
            vhost.ADD_MEM_REG: self._add_mem_reg,
            vhost.REM_MEM_REG: self._rem_mem_reg,
            vhost.SET_DEVICE_STATE_FD: self._set_device_state_fd,
            vhost.CHECK_DEVICE_STATE: self._check_device_state,
        }

    # The socket ------------------------------------------------------------------------------------------------------

    def readable(self) -> None:
        """Handle messages that are there. Raises Closed, Invalid or OSError: the connection is over."""
        for _ in range(MESSAGES_MAX):
            if self._header is None:
                if not self._receive(vhost.HEADER.size):
                    return
                self._header = Message.parse_header(self._got)
                self._got = b""
            request, flags, size = self._header
            if not self._receive(size):
                return
            message = Message(request, flags, self._got)
            self._header, self._got = None, b""
            try:
                self._handle(message)
            finally:
                self._close_fds()

    def _receive(self, wanted: int) -> bool:
        """Add to what was received of a message, until there are `wanted` bytes; whether there are."""
        while len(self._got) < wanted:
            room = socket.CMSG_SPACE(4 * vhost.DESCRIPTORS_MAX)
            try:
                data, control, flags, _ = self.sock.recvmsg(wanted - len(self._got), room)
            except BlockingIOError:
                return False
            for level, kind, value in control:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._fds += array.array("i", value[: len(value) & ~3])
            if flags & socket.MSG_CTRUNC or len(self._fds) > vhost.DESCRIPTORS_MAX:
                raise Invalid(f"more than {vhost.DESCRIPTORS_MAX} descriptors")
            if not data:
                raise Closed
            self._got += data
        return True

    def _handle(self, message: Message) -> None:
        handler = self._requests.get(message.request)
        asked = message.needs_reply and self.protocol_features & vhost.P_REPLY_ACK
        try:
            if handler is None:
                raise Invalid(f"request {message.request}, which was not offered")
            answer = handler(message.payload)
        except (Invalid, OSError) as e:
            if not asked:
                raise
            text = f"vhost-user: request {message.request} of the front end is refused: {e}"
            log.warn_ratelimited("vhost-user request", text, time.monotonic())
            answer = _FAILURE
        if answer is None and asked:
            answer = _SUCCESS
        if answer is not None and answer is not LATER:
            self._reply(message.request, answer)

    def _reply(self, request: int, answer: bytes) -> None:
        data = vhost.reply(request, answer).emit()
        if self.sock.send(data, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT) < len(data):
            raise Invalid("no room for a reply: the front end does not read")

    def _close_fds(self) -> None:
        """Close the descriptors of the last message that no ring has taken."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def close(self) -> None:
        """Let go of everything but the socket. The rings' descriptors are the caller's."""
        self._close_fds()
        for ring in self.rings:
            ring.clear()
        self._memory = GuestMemory()
        if self._log is not None:
            self._log.close()
            self._log = None

    # Features --------------------------------------------------------------------------------------------------------

    def _set_features(self, payload: bytes) -> None:
        features = vhost.u64(payload)
        if features & ~FEATURES:
            raise Invalid(f"features {features & ~FEATURES:#x}, which were not offered")
        self.features = features
        for ring in self.rings:
            self._stopping(ring)
            ring.event_idx = bool(features & F_EVENT_IDX)
            ring.use_log(self._log if features & F_LOG_ALL else None)
            if not features & F_PROTOCOL_FEATURES:
                ring.enabled = True  # without the bit, rings begin enabled
            self._changed(ring)

    def _set_protocol_features(self, payload: bytes) -> None:
        self.protocol_features = vhost.u64(payload) & PROTOCOL_FEATURES

    def _reset_owner(self, payload: bytes) -> None:
        for ring in self.rings:
            self._stopping(ring)
            ring.enabled = False
            self._changed(ring)

    # Memory ----------------------------------------------------------------------------------------------------------

    def _set_mem_table(self, payload: bytes) -> None:
        regions = vhost.regions(payload)
        if len(regions) != len(self._fds):
            raise Invalid(f"{len(regions)} memory regions with {len(self._fds)} descriptors")
        self._replace([mapped(region, fd) for region, fd in zip(regions, self._fds, strict=True)])

    def _add_mem_reg(self, payload: bytes) -> None:
        region = vhost.single_region(payload)
        if len(self._fds) != 1:
            raise Invalid(f"a memory region with {len(self._fds)} descriptors")
        if len(self._memory.mapped) >= SLOTS_MAX:
            raise Invalid(f"more than {SLOTS_MAX} memory regions")
        self._replace([*self._memory.mapped, mapped(region, self._fds[0])])

    def _rem_mem_reg(self, payload: bytes) -> None:
        gone = vhost.single_region(payload)
        left = [(r, view) for r, view in self._memory.mapped if not _same_place(r, gone)]
        if len(left) == len(self._memory.mapped):
            raise Invalid(f"no memory region at {gone.guest:#x} to remove")
        self._replace(left)

    def _replace(self, regions: list[tuple[Region, memoryview]]) -> None:
        """Use other memory. A ring whose parts are not in it stops until its addresses are set again."""
        for ring in self.rings:
            self._stopping(ring)
            ring.unbind()
        self._memory = GuestMemory(regions)
        if self._log is not None:
            self._log.use(self._memory)
        for ring in self.rings:
            try:
                ring.bind(self._memory)
            except Invalid:
                ring.addresses = None
            self._changed(ring)

    # Migration -------------------------------------------------------------------------------------------------------

    def _set_log_base(self, payload: bytes) -> bytes:
        area = vhost.LogArea.parse(payload)
        if len(self._fds) != 1:
            raise Invalid(f"a log with {len(self._fds)} descriptors")
        log = DirtyLog(area, self._fds[0])
        log.use(self._memory)
        if self._log is not None:
            log.fd, self._log.fd = self._log.fd, -1
        self._log = log
        for ring in self.rings:
            self._stopping(ring)
            ring.use_log(log if self.features & F_LOG_ALL else None)
            self._changed(ring)
        return _SUCCESS

    def _set_log_fd(self, payload: bytes) -> None:
        if self._log is None or len(self._fds) != 1 or stat.S_IFMT(os.fstat(self._fds[0]).st_mode):
            raise Invalid("a descriptor for the log that is no eventfd, or that comes before the log")
        self._log.close()
        self._log.fd = self._fds.pop()

    def _set_device_state_fd(self, payload: bytes) -> bytes:
        transfer = vhost.StateTransfer.parse(payload)
        if len(self._fds) != 1:
            raise Invalid(f"a transfer of state with {len(self._fds)} descriptors")
        if any(ring.runs for ring in self.rings):
            raise Invalid("a transfer of state while a ring runs")
        self._state.begin(transfer, self._fds.pop())
        return vhost.emit_u64(vhost.NO_DESCRIPTOR)

    def _check_device_state(self, payload: bytes) -> bytes:
        return LATER if self._state.check(self._checked) else _FAILURE

    def _checked(self, done: bool) -> None:
        """The transfer is over. Raises Invalid or OSError."""
        self._reply(vhost.CHECK_DEVICE_STATE, _SUCCESS if done else _FAILURE)

    # Rings -----------------------------------------------------------------------------------------------------------

    def _ring(self, index: int) -> Vring:
        if index >= len(self.rings):
            raise Invalid(f"ring {index} of {len(self.rings)}")
        return self.rings[index]

    def _set_vring_num(self, payload: bytes) -> None:
        state = RingState.parse(payload)
        ring = self._ring(state.index)
        self._stopping(ring)
        ring.unbind()
        ring.addresses = None  # their size has changed
        ring.resize(state.number)
        self._changed(ring)

    def _set_vring_addr(self, payload: bytes) -> None:
        addresses = RingAddresses.parse(payload)
        ring = self._ring(addresses.index)
        if not ring.num:
            raise Invalid(f"the place of ring {ring.index} before its size")
        self._stopping(ring)
        ring.unbind()
        ring.addresses = addresses
        ring.broken = False
        ring.bind(self._memory)
        self._changed(ring)

    def _set_vring_base(self, payload: bytes) -> None:
        state = RingState.parse(payload)
        ring = self._ring(state.index)
        self._stopping(ring)
        ring.base = state.number & 0xFFFF
        self._changed(ring)

    def _get_vring_base(self, payload: bytes) -> bytes:
        ring = self._ring(RingState.parse(payload).index)
        self._stopping(ring)
        ring.unbind()
        ring.addresses = None
        self._take_kick(ring, -1)
        return RingState(ring.index, ring.base).emit()

    def _set_vring_enable(self, payload: bytes) -> None:
        state = RingState.parse(payload)
        ring = self._ring(state.index)
        self._stopping(ring)
        ring.enabled = bool(state.number)
        self._changed(ring)

    def _set_vring_kick(self, payload: bytes) -> None:
        ring, fd = self._eventfd(payload)
        if fd < 0:
            raise Invalid("a ring without a kick: polling was not offered")
        self._take_kick(ring, fd)

    def _take_kick(self, ring: Vring, fd: int) -> None:
        self._stopping(ring)
        ring.kick, former = fd, ring.kick
        self._changed(ring)
        if former >= 0:
            os.close(former)

    def _set_vring_call(self, payload: bytes) -> None:
        ring, fd = self._eventfd(payload)
        ring.call, former = fd, ring.call
        if former >= 0:
            os.close(former)

    def _eventfd(self, payload: bytes) -> tuple[Vring, int]:
        """The ring, and the descriptor that came with the message, or -1: it is the ring's from now on."""
        value = vhost.u64(payload)
        ring = self._ring(value & vhost.RING_INDEX)
        if value & vhost.NO_DESCRIPTOR:
            return ring, -1
        if len(self._fds) != 1:
            raise Invalid(f"{len(self._fds)} descriptors for ring {ring.index}")
        if stat.S_IFMT(os.fstat(self._fds[0]).st_mode):
            raise Invalid(f"a descriptor for ring {ring.index} that is no eventfd")
        return ring, self._fds.pop()


def _accept(payload: bytes) -> None:
    """Nothing to do."""


def _same_place(one: Region, other: Region) -> bool:
    return (one.guest, one.size, one.user) == (other.guest, other.size, other.user)
