"""A guest's link with faults: a tap for the guest, the daemon's end of the link, and a rule for each direction.

    python -m bench.faulty_link SOCKET|tap:NAME TAP MTU CONTROL

    guest's kernel --TAP-- this, a process for each direction --UNIX socket-- passt
    guest's kernel --TAP-- this, a process for each direction --tap NAME== bridge ==tap-- pasta

The bridge, and the move of TAP to another namespace, are the caller's. No tap of this program has offloads, so that the
kernel cuts and completes what comes from pasta's: a rule applies to packets as they are on a wire.

The rule of a direction is a JSON object that comes as a datagram to the UNIX socket CONTROL.up (from the guest) or
CONTROL.down (to the guest):

    seed       of the chances; each rule begins with it
    drop       chance of a frame to get lost
    burst      chance of a frame to get lost together with those of the next 10 ms, 7 at most
    duplicate  chance of a frame to come twice
    corrupt    chance of a bit beyond the Ethernet header to be inverted
    truncate   chance of a frame to be cut, at any place beyond the Ethernet header
    reorder    chance of a frame to be overtaken by the next one
    delay      seconds that a frame is on its way; order is kept
    jitter     seconds, up to which a frame is late beyond this; order is lost
    pause      [n, m]: nothing passes in the first n of each m seconds; order is kept
    lose       {"syn": n, "fin": n, "data": n}: the first n TCP segments of a kind get lost

ARP and ICMPv6 are spared, so that the guest's neighbours stay known. `{}` is a link without faults.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import heapq
import json
import os
import random
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from typing import Any

TUNSETIFF = 0x400454CA
IFF_TAP, IFF_NO_PI = 2, 0x1000
PR_SET_PDEATHSIG = 1
MAC = "52:54:00:12:34:56"
BATCH = 1 << 18  # bytes that are moved at once
BURST = 8  # frames
BURST_TIME = 0.010  # s: on a quiet link, a burst of frames would outlast the timers of TCP
ETHER_LEN = 14
LENGTH = struct.Struct("!I")
FIN, SYN = 1, 2


class Faults:
    """The rule of one direction, applied to one frame after the other."""

    def __init__(self) -> None:
        self.set({})

    def set(self, rule: dict[str, Any]) -> None:
        """Begin anew with `rule`."""
        self.rule = rule
        self.timed = bool({"delay", "jitter", "pause"} & rule.keys())
        self._chance = random.Random(rule.get("seed", 0))
        self._lose = dict(rule.get("lose", {}))
        self._burst_left, self._burst_end = 0, 0.0
        self._late: bytes | None = None
        self._begin = time.monotonic()

    def passed(self, frame: bytes) -> list[bytes]:
        """The frames that go on when `frame` has come."""
        if not self.rule or is_neighbour(frame):
            return [frame]
        chance, rule = self._chance.random, self.rule
        if self._is_lost(frame):
            return []
        if chance() < rule.get("corrupt", 0):
            changed = bytearray(frame)
            changed[self._chance.randrange(ETHER_LEN, len(frame))] ^= 1 << self._chance.randrange(8)
            frame = bytes(changed)
        if chance() < rule.get("truncate", 0):
            frame = frame[: self._chance.randrange(ETHER_LEN, len(frame))]
        if self._late is not None:
            late, self._late = self._late, None
            return [frame, late]
        if chance() < rule.get("reorder", 0):
            self._late = frame
            return []
        return [frame, frame] if chance() < rule.get("duplicate", 0) else [frame]

    def due(self, now: float) -> float:
        """The time at which a frame that came at `now` goes on."""
        rule = self.rule
        at = now + rule.get("delay", 0.0) + self._chance.random() * rule.get("jitter", 0.0)
        if "pause" in rule:
            pause, every = rule["pause"]
            within = (at - self._begin) % every
            at += max(pause - within, 0.0)
        return float(at)

    def _is_lost(self, frame: bytes) -> bool:
        if self._lose and self._lose.get(kind := kind_of(frame)):
            self._lose[kind] -= 1
            return True
        if self._burst_left and time.monotonic() < self._burst_end:
            self._burst_left -= 1
            return True
        if self._chance.random() < self.rule.get("burst", 0):
            self._burst_left, self._burst_end = BURST - 1, time.monotonic() + BURST_TIME
            return True
        return self._chance.random() < float(self.rule.get("drop", 0))


def is_neighbour(frame: bytes) -> bool:
    """Whether it is ARP, or ICMPv6 (neighbours are found by it), or no whole packet."""
    return (
        len(frame) < 2 * ETHER_LEN or frame[12:14] == b"\x08\x06" or (frame[12:14] == b"\x86\xdd" and frame[20] == 58)
    )


def kind_of(frame: bytes) -> str:
    """syn, fin, data, or nothing: a bare acknowledgement, or no TCP."""
    v4 = frame[12:14] == b"\x08\x00"
    if frame[23 if v4 else 20] != socket.IPPROTO_TCP:
        return ""
    tcp = 14 + (frame[14] & 15) * 4 if v4 else 54
    end = 14 + int.from_bytes(frame[16:18], "big") if v4 else 54 + int.from_bytes(frame[18:20], "big")
    flags = frame[tcp + 13]
    if flags & SYN:
        return "syn"
    if flags & FIN:
        return "fin"
    return "data" if end > tcp + (frame[tcp + 12] >> 4) * 4 else ""


class Direction:
    """Frames from one side to the other, each at its time."""

    def __init__(self, control: str) -> None:
        self.faults = Faults()
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._control.bind(control)
        self._waiting: list[tuple[float, int, bytes]] = []  # a heap; the count keeps the order of equal times
        self._count = 0

    def run(self, source: int) -> None:
        """Move frames until the daemon is gone."""
        poll = select.poll()
        poll.register(source, select.POLLIN)
        poll.register(self._control, select.POLLIN)
        while True:
            now, ready = time.monotonic(), []
            while self._waiting and self._waiting[0][0] <= now:
                ready.append(heapq.heappop(self._waiting)[2])
            if ready:
                self.write(ready)
            wait = max((self._waiting[0][0] - now) * 1e3, 0.0) if self._waiting else None
            for fd, _ in poll.poll(wait):
                if fd == source:
                    self.take(self.read())
                else:
                    self.faults.set(json.loads(self._control.recv(1000)))

    def take(self, frames: list[bytes]) -> None:
        """Frames came."""
        passed = [f for frame in frames for f in self.faults.passed(frame)]
        if self.faults.timed or self._waiting:
            now = time.monotonic()
            for frame in passed:
                heapq.heappush(self._waiting, (self.faults.due(now), self._count, frame))
                self._count += 1
        elif passed:
            self.write(passed)

    def read(self) -> list[bytes]:
        """Frames that are there, at least one."""
        raise NotImplementedError

    def write(self, frames: list[bytes]) -> None:
        """Send frames."""
        raise NotImplementedError


def read_tap(tap: int) -> list[bytes]:
    """All frames that it has, up to BATCH bytes."""
    frames, size = [], 0
    try:
        while size < BATCH:
            frames.append(os.read(tap, 70000))
            size += len(frames[-1])
    except BlockingIOError:
        pass
    return frames


def write_tap(tap: int, frames: list[bytes]) -> None:
    """One at a time, as a tap wants them. Frames to an interface that is down are lost, as on any cable."""
    for frame in frames:
        try:
            os.write(tap, frame)
        except OSError as e:
            if e.errno != errno.EIO:
                raise


class Between(Direction):
    """From one tap to another."""

    def __init__(self, control: str, source: int, target: int) -> None:
        super().__init__(control)
        self._source, self._target = source, target

    def read(self) -> list[bytes]:
        """As the tap has them."""
        return read_tap(self._source)

    def write(self, frames: list[bytes]) -> None:
        """As the tap wants them."""
        write_tap(self._target, frames)


class Up(Direction):
    """From the tap to passt."""

    def __init__(self, control: str, tap: int, link: socket.socket) -> None:
        super().__init__(control)
        self._tap, self._link = tap, link

    def read(self) -> list[bytes]:
        """As the tap has them."""
        return read_tap(self._tap)

    def write(self, frames: list[bytes]) -> None:
        """One in each call, as QEMU does: the original loses its place where a read ends within a frame's length."""
        for frame in frames:
            self._link.sendall(LENGTH.pack(len(frame)) + frame)


class Down(Direction):
    """From passt to the tap."""

    def __init__(self, control: str, tap: int, link: socket.socket) -> None:
        super().__init__(control)
        self._tap, self._link = tap, link
        self._held = bytearray()

    def read(self) -> list[bytes]:
        """The frames that are complete."""
        data = self._link.recv(BATCH)
        if not data:
            sys.exit(0)
        held = self._held
        held += data
        frames, at = [], 0
        while len(held) - at >= LENGTH.size:
            end = at + LENGTH.size + LENGTH.unpack_from(held, at)[0]
            if end > len(held):
                break
            frames.append(bytes(held[at + LENGTH.size : end]))
            at = end
        del held[:at]
        return frames

    def write(self, frames: list[bytes]) -> None:
        """As the tap wants them."""
        write_tap(self._tap, frames)


def control(path: str, way: str, rule: dict[str, Any]) -> None:
    """Set the rule of direction `way`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.sendto(json.dumps(rule).encode(), f"{path}.{way}")


def new_tap(name: str, mtu: str, *address: str) -> int:
    """A descriptor of a new tap that is up."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI))
    subprocess.run(["ip", "link", "set", name, *address, "mtu", mtu, "txqueuelen", "10000", "up"], check=True)
    return tap


def directions(daemon: str, name: str, mtu: str, where: str) -> tuple[Direction, int, Direction, int]:
    """From the guest and to it, each with the descriptor that it reads."""
    tap = new_tap(name, mtu, "address", MAC)
    kind, _, other = daemon.partition(":")
    if kind == "tap":
        far = new_tap(other, mtu)
        return Between(f"{where}.up", tap, far), tap, Between(f"{where}.down", far, tap), far
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(daemon)
    return Up(f"{where}.up", tap, link), tap, Down(f"{where}.down", tap, link), link.fileno()


def main(argv: list[str]) -> None:
    """The two directions: a child has the one to the guest, and ends when the daemon does, or its parent."""
    up, tap, down, far = directions(*argv)
    if not os.fork():
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)  # a process that waits for the end of the output waits for the parent only
        down.run(far)
    print("ready", flush=True)
    try:
        up.run(tap)
    except (BrokenPipeError, ConnectionResetError):
        sys.exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
