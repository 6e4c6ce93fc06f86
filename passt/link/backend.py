"""A back end of the link: one way to and from the guest. Each is one module, and `link.choose` makes it. Protocols do
not know which one there is; `daemon.passt` and `migration`, which move the state of a device, know vhost-user.

    protocols, tap                                     a back end
    -------------------------------------------------  --------------------------------------------------------------
    tap.Tap, a Receiver                                start: watches descriptors, keeps where frames go
                                                       reads a batch of frames into the pool and calls `received`
    tcp, udp, icmp, services: send, send_payload,      sends, or drops and counts. It completes checksums and cuts
      send_frame                                         super-frames where its other end does not
    tcp: stops while `full`, goes on at `on_room`      `full` while frames would be dropped
    udp, tcp: super-frames as far as `tso`, `uso`      may change them whenever no flow lives
    daemon: `on_gone`, `capture`                       says that the guest, or the device, is gone

Frames to the guest. A pre-cooked frame is a `bytearray` that starts with the virtio-net header (`wire/virtio.py`), then
Ethernet, IP and transport headers; the caller has written the fields that change. The payload is a view of wherever the
data lies, valid until the call returns. A back end that keeps frames copies them. TCP asks a back end where it wants
the payload of what comes next (`lay_out`): a machine that shares its memory has buffers for it, and nothing is copied.

Frames from the guest. A frame is a pair of offsets (start, end) into the pool, with the place of its virtio-net header
first; `reads_vnet` says whether anything is in that place. The pool is the back end's to make (`make_pool`): protocols
read headers from `buf`, and reach payload only by slices of `mv`. So a back end whose payload lies elsewhere, in memory
that is shared with a machine, copies the headers into `buf` and gives a pool whose `mv` answers a slice with a view of
that memory. All views are let go of when `received` returns: a receiver copies what must stay longer.

One guest after the other. `attach` gives a back end that guests connect to the socket of the next one; `tso` and `uso`
are read for each flow or batch, so that they may be those that this guest has agreed to.
"""

from __future__ import annotations

import errno
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

from ..drops import Drop, Reason
from ..loop.reactor import Reactor
from .packet import PacketPool
from .verify import Verifier

# The guest's side could not take a frame now: a drop, which the transport above repairs, as on any link.
TRANSIENT: Final = frozenset((errno.EAGAIN, errno.EINTR, errno.ENOBUFS, errno.ENOSPC, errno.EIO, errno.ENOMEM))

Buffer = bytes | bytearray | memoryview
Capture = Callable[[bool, bytes], None]


class Receiver:
    """The consumer of the guest's frames: `tap.Tap`."""

    def received(self, frames: list[int], octets: int, now: float) -> None:
        """Handle a batch, a flat list of (start, end) in the pool, at least one, with `octets` bytes of Ethernet."""
        raise NotImplementedError


class Link:
    """The base of all back ends, and what the others know of them."""

    reads_vnet = True  # whether a virtio-net header is before each frame that is read
    rto_min = 0.010  # s that a lost frame is waited for at least (`tcp_engine.rtt`)
    cuts = False  # whether super-frames are cut here, in software: `send_segments` is for those of TCP
    full = False  # whether frames would be dropped now: a sender that can wait does
    room = 1 << 30  # bytes of TCP payload that can be sent now

    def __init__(self, drops: Counter[Reason], *, tso: bool, uso: bool) -> None:
        self.drops = drops
        self.tso = tso  # whether TCP super-frames may be sent
        self.uso = uso  # whether UDP super-frames may be sent
        self.sent_frames = 0  # a super-frame of a back end that does not cut them is one
        self.capture: Capture | None = None  # capture(to_guest, virtio-net header + frame), in both directions
        self.on_room: Callable[[float], None] | None = None  # called when `full` ends
        self.on_mtu: Callable[[int], None] | None = None  # on_mtu(bytes): longer packets do not get through
        self.on_gone: Callable[[str], None] | None = None  # on_gone(why), a sentence: no frame gets through any more

    @property
    def sent_bytes(self) -> int:
        """Bytes in the frames that were sent, from the Ethernet header on."""
        raise NotImplementedError

    def gone(self, why: str) -> None:
        """Tell that no frame gets through any more."""
        if self.on_gone is None:
            raise ConnectionError(why)
        self.on_gone(why)

    # From the guest --------------------------------------------------------------------------------------------------

    def make_pool(self) -> PacketPool:
        """The memory that frames are read into."""
        return PacketPool()

    def verifier(self, pool: PacketPool) -> Verifier:
        """The verifier of checksums of frames in the pool, for those that no kernel has verified."""
        return Verifier(pool, self.drops)

    def start(self, reactor: Reactor, pool: PacketPool, receiver: Receiver) -> None:
        """Begin, when all else is wired: what is called at the end of a turn is called behind all that send."""
        raise NotImplementedError

    def read(self, now: float) -> None:
        """Read what is there, and hand it on."""
        raise NotImplementedError

    def catch_up(self, now: float) -> None:
        """Hand on frames of the guest that wait here, if any do: there may be one that a timer is about to miss."""

    def watch(self) -> None:
        """Look at a device for frames."""
        raise NotImplementedError

    def unwatch(self) -> None:
        """Cease to, until `watch`."""
        raise NotImplementedError

    def queue_little(self, little: bool) -> None:
        """Let few bytes wait behind this link, or as many as usual: bulk is slower then, and messages are faster."""

    def attach(self, sock: socket.socket | None) -> None:
        """Serve the guest that has connected by `sock`, or none. The socket of the one before is closed."""
        raise NotImplementedError

    # To the guest ----------------------------------------------------------------------------------------------------

    def send_segments(self, hdr: bytearray, payload: memoryview, size: int) -> None:
        """Send as many TCP segments as `payload` has pieces of `size` bytes, for a back end that `cuts`.

        `hdr` is complete for the first of them, and is none of a super-frame. So they may be more than one IP packet
        can be long.
        """
        raise NotImplementedError

    def send(self, hdr: bytearray) -> None:
        """Send a frame that is complete in `hdr`, virtio-net header first."""
        raise NotImplementedError

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Send one frame made of `parts`: the first has the virtio-net header and, of a super-frame, all headers."""
        raise NotImplementedError

    def send_frame(self, frame: bytes) -> None:
        """Send a finished Ethernet frame, checksums and all: no virtio-net header, no offload."""
        raise NotImplementedError

    def lay_out(self, header: int, chunk: int, want: int) -> tuple[list[memoryview], int]:
        """Where up to `want` bytes of TCP payload may be received, instead of in memory that `send_payload` is given.

        They are frames of `chunk` bytes, each behind `header` bytes from the virtio-net header on; returns views, and
        how many bytes these are. None: nowhere. `send_laid_out` sends it at once. They are no super-frames for a back
        end that `cuts` them: a segment lies behind a header of its own.
        """
        return [], 0

    def send_laid_out(self, hdr: bytearray, length: int) -> None:
        """Send the next frame that was laid out, with `length` bytes of payload."""
        raise NotImplementedError


class NoLink(Link):
    """No tap at all (--splice-only): there is no guest to send a frame to."""

    def __init__(self, drops: Counter[Reason]) -> None:
        super().__init__(drops, tso=False, uso=False)

    @property
    def sent_bytes(self) -> int:
        """None."""
        return 0

    def send(self, hdr: bytearray) -> None:
        """Count a drop."""
        self.drops[Drop.NO_TAP] += 1

    def send_payload(self, parts: Sequence[Buffer]) -> None:
        """Count a drop."""
        self.drops[Drop.NO_TAP] += 1

    def send_frame(self, frame: bytes) -> None:
        """Count a drop."""
        self.drops[Drop.NO_TAP] += 1
