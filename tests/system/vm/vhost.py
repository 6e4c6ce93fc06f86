"""A client of the vhost-user socket without QEMU: conversations as those of `client.Client`, through rings."""

from __future__ import annotations

import select
import socket
import time
from typing import Any

from scapy.packet import Packet

from ...front_end import RECEIVE, FrontEnd
from .client import DEADLINE, GUEST_MAC, Client


class VhostClient(Client):
    """A machine of its own memory, whose driver takes no offload."""

    def __init__(self, sock: socket.socket, mac: str = GUEST_MAC) -> None:
        super().__init__(sock, mac)
        self.machine = FrontEnd(sock)
        self.machine.set_up()
        self._frames: list[bytes] = []
        self.bases = [0, 0]  # where the rings stopped
        self.former = self.machine  # before the last move

    @classmethod
    def at(cls, path: str, mac: str = GUEST_MAC) -> VhostClient:
        """A client that is connected to `path`."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
            return cls(sock, mac)
        except OSError:
            sock.close()
            raise

    def __enter__(self) -> VhostClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.machine.close()

    def send(self, *frames: bytes | Packet) -> None:
        """Frames with one kick."""
        for i, frame in enumerate(frames):
            self.machine.send(bytes(frame), kick=i + 1 == len(frames))

    def frame(self, deadline: float = DEADLINE) -> bytes | None:
        """The next frame; None if there is none in time, EOFError when passt has closed the socket."""
        end = time.monotonic() + deadline
        call = self.machine.rings[RECEIVE].call
        while not self._frames:
            self._frames = [frame for _, frame in self.machine.receive()]
            left = end - time.monotonic()
            if self._frames:
                break
            if left <= 0:
                return None
            watched: list[Any] = [call, self.sock]
            ready, _, _ = select.select(watched, [], [], left)
            if call in ready:
                self.machine.rings[RECEIVE].called()
            elif ready and not self.sock.recv(1):
                raise EOFError("passt has closed the connection")
        return self._frames.pop(0)

    def stop(self) -> bytes:
        """Stop the machine, and ask for the state of passt; it may be incomplete, which `check_state` tells."""
        self._frames += [frame for _, frame in self.machine.receive()]
        self.bases = self.machine.stop_rings()
        self._frames += [frame for _, frame in self.machine.receive()]
        return self.machine.save_state()

    def go_on(self) -> None:
        """Start the rings where they stopped."""
        for ring, base in zip(self.machine.rings, self.bases, strict=True):
            self.machine.start_ring(ring, base)

    def move_to(self, path: str, state: bytes) -> bool:
        """Go to the passt at `path`, with the state of the other one; whether it was taken. The rings are stopped."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        self.former = self.machine
        self.sock, self.machine = sock, self.former.move_to(sock)
        self.machine.introduce()
        self.machine.load_state(state)
        return self.machine.check_state()
