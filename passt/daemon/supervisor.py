"""Messages to a supervisor: --ready-fd, and the datagrams of sd_notify(3) to the socket in $NOTIFY_SOCKET.

    event                                           --ready-fd       $NOTIFY_SOCKET
    ----------------------------------------------  ---------------  ----------------------------------
    in the sandbox, ports listen                    "1\\n", closed    READY=1, STATUS=
    another Config is in force (rules, network)     -                RELOADING=1, then READY=1
    each half of $WATCHDOG_USEC, while turns end    -                WATCHDOG=1
    the loop has ended                              closed           STOPPING=1

A unit of Type=notify has --foreground: a daemon in the background is another process than the manager knows, and would
be for Type=forking. A watchdog is for the process of $WATCHDOG_PID only. With a command, the variables are left to it:
it is what the unit runs, and it may be ready later than its network.

The descriptor and the socket are opened while paths can be reached. A supervisor that does not listen any more is no
reason to end.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from .. import log
from ..calls import calls
from ..log import Fatal

if TYPE_CHECKING:
    from ..conf.options import Options
    from ..flow.context import Context
    from ..policy.config import Config

READY = b"1\n"  # slirp4netns(1) writes the digit alone, s6 waits for the newline
RUNNING = "READY=1\nSTATUS=Forwarding"
CALLS = calls("write", "sendto", "close")


class Supervisor:
    """Opened with the options and the environment of the start; `begin` is called in the process that stays."""

    def __init__(self, options: Options, environ: Mapping[str, str], *, command: bool = False) -> None:
        """Raises Fatal if the descriptor is not open."""
        self._ready_fd = _own(options.ready_fd)
        self._ready = READY[:1] if options.slirp4netns else READY
        self._socket = None if command else _connected(environ.get("NOTIFY_SOCKET", ""))
        self._watchdog = _interval(environ) / 2  # s, 0: none
        self._timer = -1

    def begin(self, ctx: Context, now: float) -> None:
        """Everything is ready."""
        if self._ready_fd >= 0:
            try:
                ctx.reactor.write(self._ready_fd, self._ready)
            except OSError as e:
                log.warn(f"Couldn't write to the descriptor of --ready-fd: {e.strerror}")
            os.close(self._ready_fd)
        self._send(RUNNING)
        if self._socket is not None:
            ctx.settings.react(self._changed)
        if self._socket is not None and self._watchdog:
            services = ctx.timers.services
            self._timer = services.new(partial(self._alive, ctx))
            services.arm(self._timer, now + self._watchdog)

    def _changed(self, former: Config, now: float) -> None:
        """The change is made: the manager counts a reload, and orders its jobs by the time of it."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={int(now * 1e6)}")
        self._send(RUNNING)

    def _alive(self, ctx: Context, now: float) -> None:
        self._send("WATCHDOG=1")
        ctx.timers.services.arm(self._timer, now + self._watchdog)

    def end(self, then: Callable[[], None] = lambda: None) -> None:
        """The loop has ended; then() follows."""
        self._send("STOPPING=1")
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        then()

    def _send(self, text: str) -> None:
        if self._socket is None:
            return
        try:
            self._socket.send(text.encode())
        except OSError as e:
            log.debug(f"Couldn't tell the supervisor {text.partition('=')[0]}: {e.strerror}")


def _own(fd: int | None) -> int:
    """A descriptor of ours for an inherited one, -1 for none. A standard stream stays open beside it. Raises Fatal."""
    if fd is None:
        return -1
    try:
        own = os.dup(fd)
        if fd > 2:
            os.close(fd)
    except OSError:
        raise Fatal(f"Invalid --ready-fd: {fd} (it is not open)") from None
    return own


def _connected(path: str) -> socket.socket | None:
    """The socket that sd_notify(3) would use, None without one, or with an address of another kind."""
    if not path.startswith(("/", "@")):
        return None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        sock.connect("\0" + path[1:] if path[0] == "@" else path)
    except OSError as e:
        sock.close()
        log.warn(f"Couldn't connect to $NOTIFY_SOCKET: {path}: {e.strerror}")
        return None
    return sock


def _interval(environ: Mapping[str, str]) -> float:
    """Seconds within which the supervisor wants a sign of life of this process, 0 for none (sd_watchdog_enabled(3))."""
    microseconds, pid = environ.get("WATCHDOG_USEC", ""), environ.get("WATCHDOG_PID", "")
    if not microseconds.isdecimal() or (pid and pid != str(os.getpid())):
        return 0.0
    return int(microseconds) / 1e6
