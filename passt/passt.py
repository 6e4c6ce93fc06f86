"""The interface to a virtual machine: the UNIX socket that QEMU connects to, and the one guest behind it.

    state       event                                   consequence
    ----------  --------------------------------------  -------------------------------------------------------------
    waiting     a client connects                       it is the guest; our addresses are announced: it may not have
                                                        noticed that another passt is here
    serving     another client connects                 accepted and closed at once. If the guest has disconnected
                                                        already, its data is read first, then the client is the guest
    any         a client connects, no descriptor left   accepted with a spare one, and closed at once (`flow/spare.py`)
    serving     the guest's socket closes, fails,       its flows end, its observed state is reset; waiting again, or
                or its framing is invalid               the end with --one-off and --fd
    serving     another client connects, and the guest  what the guest has sent is read, as far as it is there, and then
                takes no more frames (SHUT_RD)          the same

`linux/unix.py` creates the socket in the file system, with mode 0700, in place of a stale one.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from . import PASST, log
from .calls import calls
from .drops import Drop
from .flow.context import Context
from .flow.spare import Spare
from .lean.records import replace
from .linux import unix
from .linux.accepting import accept
from .log import Fatal
from .loop.reactor import EPOLLIN, TYPE_GUEST_LISTEN

if TYPE_CHECKING:
    from .tap import Tap

DEFAULT_PATH = "/tmp/passt_{}.socket"
DEFAULT_MAX = 99
LINES = 256  # log lines about connections: this many at once, then LINES_PER_SECOND
LINES_PER_SECOND = 10
READS_MAX = 16  # of the last data of a guest that takes no more frames: it may go on sending for ever

CALLS = (
    *calls("accept4", "sendto", "recvfrom", "close", mode=PASST),
)


# The socket in the file system -------------------------------------------------------------------------------------


def listen(path: str | None, type_: int = socket.SOCK_STREAM) -> tuple[socket.socket, str]:
    """A listening socket at `path`, or at the first free default one; returns it and its path. Raises Fatal."""
    if path is not None:
        return unix.listen_at(path, type_=type_), path
    for number in range(1, DEFAULT_MAX + 1):
        path = DEFAULT_PATH.format(number)
        try:
            return unix.listen_at(path), path
        except unix.PathTakenError as e:
            log.debug(str(e))
        except Fatal as e:  # of the folder, and the same for all paths
            raise Fatal(f"{e} (give another path with --socket)") from None
    raise Fatal(f"No free socket path from {DEFAULT_PATH.format(1)} to {path}: give one with --socket")


def inherited(fd: int, name: int | None = None) -> socket.socket:
    """The connected stream socket that --fd names, for messages as `name`. Raises Fatal."""
    name = fd if name is None else name
    try:
        sock = socket.socket(fileno=fd)
        connected = sock.type == socket.SOCK_STREAM and not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as e:
        raise Fatal(f"Invalid --fd: {name} ({e.strerror})") from None
    if not connected:
        sock.close()
        raise Fatal(f"Invalid --fd: {name} (not a connected stream socket)")
    sock.setblocking(False)
    return sock


# The guest ---------------------------------------------------------------------------------------------------------


class Clients:
    """The connected guest, one at a time. `listener` is None if there can be no other.

    `on_end()` is called when the guest has disconnected and the program is to end; None: another may connect.
    """

    def __init__(
        self, ctx: Context, tap: Tap, listener: socket.socket | None, on_end: Callable[[], None] | None
    ) -> None:
        self._ctx, self._link, self._tap = ctx, ctx.link, tap
        self._listener = listener
        self._on_end = on_end
        self._sock: socket.socket | None = None
        self._lines, self._said = float(LINES), 0.0  # tokens for log lines, time of the last one
        ctx.stats.gauges["guests"] = lambda: int(self._sock is not None)
        self._link.on_gone = self.gone
        self._link.on_mtu = self._limit_mtu
        self._mtu = ctx.config.mtu
        if listener is not None:
            self._spare = Spare(ctx)
            ctx.reactor.handle(TYPE_GUEST_LISTEN, self._accept)
            ctx.reactor.watch(listener.fileno(), TYPE_GUEST_LISTEN, 0, EPOLLIN)

    def _accept(self, ref: int, events: int, now: float) -> None:
        assert self._listener is not None
        guest = self._sock
        if guest is not None and _hung_up(guest):
            self._read_last(guest, now)
        try:
            fd, _, _ = accept(self._listener.fileno())
        except BlockingIOError:
            return  # the client has disconnected
        except OSError as e:
            if self._sock is guest:  # else the end of this turn frees descriptors
                log.warn_ratelimited("guest accept", f"Couldn't accept a guest: {e.strerror}", now)
                self._spare.accept_failed(self._listener.fileno(), e, now, self._refuse)
            return
        sock = socket.socket(socket.AF_UNIX, self._listener.type, 0, fd)
        if self._sock is not None:
            log.info_ratelimited("guest", "Another client connected: closed, there is a guest already", now)
            sock.close()
            return
        pid = unix.credentials(sock)[0]
        self._say(f"Accepted connection{f' from PID {pid}' if pid else ''}", now)  # 0: in a foreign PID namespace
        self.serve(sock)

    def _read_last(self, guest: socket.socket, now: float) -> None:
        """Read what a guest has sent that has disconnected before another client came, and end it."""
        for _ in range(READS_MAX):
            if not _readable(guest):
                break
            self._link.read(now)
            if self._sock is not guest:
                return
        self.gone("The guest takes no more frames")

    def _refuse(self, fd: int) -> None:
        """Close a client on the spare descriptor `fd`."""
        self._ctx.drops[Drop.GUEST_NO_DESCRIPTOR] += 1
        os.close(fd)

    def serve(self, sock: socket.socket) -> None:
        """Make `sock` the guest."""
        self._sock = sock
        self._link.attach(sock)
        self._ctx.neighbours.link_up(time.monotonic())

    def _limit_mtu(self, longest: int) -> None:
        """Tell this machine of a smaller MTU if it cannot take packets as long as the configured one."""
        config = replace(self._ctx.config, mtu=min(self._mtu, longest))
        self._ctx.settings.replace(config, time.monotonic())
        self._ctx.neighbours.link_up(time.monotonic())  # frames reach it only from this moment on

    def gone(self, what: str) -> None:
        """The guest has disconnected; `what` is a sentence with the event."""
        sock, self._sock = self._sock, None
        if sock is None:
            return
        self._say(f"{what}, {'exiting' if self._on_end else 'waiting for another'}", time.monotonic())
        self._link.attach(None)
        if self._on_end is not None:
            self._on_end()
        else:
            self._tap.forget()

    def _say(self, text: str, now: float) -> None:
        """Log a line about a connection, within a rate limit."""
        self._lines = min(self._lines + (now - self._said) * LINES_PER_SECOND, LINES)
        self._said = now
        if self._lines >= 1:
            self._lines -= 1
            log.info(text)
        else:
            log.info_ratelimited("guest lines", text, now)


def _readable(sock: socket.socket) -> bool:
    """Whether a read finds something: data, the end, or an error."""
    try:
        sock.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _hung_up(sock: socket.socket) -> bool:
    """Whether the peer takes no more data: it has closed its end, or shut it for reading. Unread data may be left."""
    if sock.type != socket.SOCK_STREAM:
        return False  # an empty packet would be sent
    try:
        sock.send(b"")  # sends nothing, and fails if the peer is closed
    except BlockingIOError:
        return False
    except OSError:
        return True
    return False
