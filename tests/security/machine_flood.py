"""The floods of `floods.py` from a virtual machine: through the socket of passt, in its protocol.

All frames of a machine go through one stream, so the flooding machine also serves the concurrent transfer: it reads the
bytes of one connection, in order, and acknowledges them between the frames of the flood. It ignores other frames.
"""

from __future__ import annotations

import hashlib
import select
import socket
import threading
import time
from struct import Struct

from ..system.support import User
from ..system.traffic.support import GATEWAY, GATEWAY6, HOST, HOST6, Lan
from ..system.vm.client import GUEST_MAC, LENGTH, Client, Connection
from ..system.vm.support import passt
from .flooder import ACK, IPV4, RST, TCP, Frames, Net, maker
from .floods import HASTE, PACE, PIECE, SETTLED, TIMEOUT, Result, Sample, Watch, block, settled

MACHINE_KINDS = "syn", "udp", "ping", "neighbour", "discover", "fragment", "stray", "aimed"
POOL = 1 << 13
CHUNK = 1 << 16  # bytes of frames in one write
DEADLINE = 120.0  # s for the transfer, when the flood is over
SCALE = 7

_SEGMENT = Struct("!HHIIH")  # ports, sequence number, acknowledgement, offset and flags
_TYPE = Struct("!H")


class Player:
    """A machine that floods, and takes what one connection brings."""

    def __init__(self, client: Client, connection: Connection, frames: list[bytes]) -> None:
        self._sock = client.sock
        self._sock.setblocking(False)
        self._connection = connection
        self._chunks = _chunks(frames)
        self._input = bytearray()
        self._output = memoryview(b"")
        self._acks = 0
        self.digest = hashlib.blake2b()
        self.received = self.sent = 0
        self.ended = False

    def play(self, seconds: float) -> None:
        """Flood for a while."""
        end = time.monotonic() + seconds
        at = 0
        while time.monotonic() < end:
            if not self._output:
                count, chunk = self._chunks[at]
                at = (at + 1) % len(self._chunks)
                self._output = memoryview(self._acknowledgements() + chunk)
                self.sent += count
            self._turn()

    def finish(self) -> None:
        """Take the rest of the transfer."""
        end = time.monotonic() + DEADLINE
        while not self.ended and time.monotonic() < end:
            if not self._output and self._acks:
                self._output = memoryview(self._acknowledgements())
            self._turn()

    def _turn(self) -> None:
        """Write and read what can be."""
        events = select.POLLIN | (select.POLLOUT if self._output else 0)
        poll = select.poll()
        poll.register(self._sock, events)
        for _, event in poll.poll(100):
            if event & select.POLLOUT:
                self._output = self._output[self._sock.send(self._output) :]
            if event & select.POLLIN:
                data = self._sock.recv(1 << 20)
                assert data, "passt has closed the connection"
                self._input += data
                self._frames()

    def _frames(self) -> None:
        data, at = self._input, 0
        while at + 4 <= len(data):
            (size,) = LENGTH.unpack_from(data, at)
            if at + 4 + size > len(data):
                break
            self._frame(data, at + 4, at + 4 + size)
            at += 4 + size
        del data[:at]

    def _frame(self, data: bytearray, start: int, end: int) -> None:
        """Of the connection: the next bytes are taken, anything else is answered as it must be."""
        if end - start < 54 or _TYPE.unpack_from(data, start + 12)[0] != IPV4 or data[start + 23] != TCP:
            return
        sport, dport, seq, _, bits = _SEGMENT.unpack_from(data, start + 34)
        mine = self._connection
        if (sport, dport) != (mine.ports["dport"], mine.ports["sport"]):
            return
        assert not bits & RST, "the connection beside the flood was reset"
        payload = data[start + 34 + (bits >> 12) * 4 : start + 14 + _TYPE.unpack_from(data, start + 16)[0]]
        if seq == mine.received:
            self.digest.update(payload)
            self.received += len(payload)
            fin = bits & 1
            mine.received = (mine.received + len(payload) + fin) % 2**32
            self.ended |= bool(fin)
            self._acks = max(self._acks, 1)
        elif payload:
            self._acks = min(self._acks + 1, 3)

    def _acknowledgements(self) -> bytes:
        """As many as are owed: one, or duplicates."""
        count, self._acks = self._acks, 0
        if not count:
            return b""
        segment = bytes(self._connection.segment(ACK))
        return (LENGTH.pack(len(segment)) + segment) * count


def _chunks(frames: list[bytes]) -> list[tuple[int, bytes]]:
    """(how many, they with their lengths), of about CHUNK bytes each."""
    chunks: list[tuple[int, bytes]] = []
    part: list[bytes] = []
    size = 0
    for frame in frames:
        part.append(LENGTH.pack(len(frame)) + frame)
        size += len(frame)
        if size >= CHUNK:
            chunks.append((len(part), b"".join(part)))
            part, size = [], 0
    return [*chunks, (len(part), b"".join(part))] if part else chunks


class Source(threading.Thread):
    """Sends to the machine at a pace, until it is told to end."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self._sock, self._over = sock, threading.Event()
        self.digest = hashlib.blake2b()
        self.sent = 0
        self.start()

    def run(self) -> None:
        while not self._over.wait(PACE):
            piece = block(self.sent)
            self._sock.sendall(piece)
            self.digest.update(piece)
            self.sent += PIECE
        self._sock.shutdown(socket.SHUT_WR)

    def end(self) -> None:
        self._over.set()


def run_machine(lan: Lan, user: User, kind: str, seconds: float, *, haste: bool) -> Result:
    """One flood of a machine, from before it to when nothing is left of it."""
    with passt(lan, user, "-q", before=HASTE if haste else "") as server, Client.at(str(server.path)) as client:
        client.configure()
        with lan.host.listen("127.0.0.1") as listener:
            port = listener.getsockname()[1]
            connection = client.connect(GATEWAY, port, SCALE)
            far, _ = listener.accept()
            net = Net.of(GUEST_MAC, HOST, HOST6, GATEWAY, GATEWAY6, port)
            make = maker(Frames(net), f"aimed:{connection.ports['sport']}" if kind == "aimed" else kind)
            frames = [make() for _ in range(POOL)]
            before, watch = Sample.of(server.daemon), Watch(server.daemon)
            source = Source(far)
            player = Player(client, connection, frames)
            player.play(seconds)
            carried = player.received / seconds
            source.end()
            player.finish()
            source.join(DEADLINE)
            whole = not source.is_alive() and source.sent == player.received > 0
            finished = player.ended and whole and source.digest.digest() == player.digest.digest()
            far.close()
            peak = watch.stop()
            assert server.alive(), server.said()
            after = settled(server.daemon, before, SETTLED if haste else TIMEOUT)
            sent, said = player.sent, server.said()
            return Result(kind, seconds, sent, sent, before, peak, after, finished, carried, said)
