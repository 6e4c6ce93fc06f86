"""The helper, passt-repair(1): it sets TCP_REPAIR on our sockets, which needs CAP_NET_ADMIN, and has no other task.

    passt                                          helper
      |   <- connects to the socket PATH.repair      |
      |   command (1 byte), up to 253 sockets ->     |  setsockopt(TCP_REPAIR, command) on each
      |   <- the same byte                           |
      |   ... ->                                     |
      |   end of file: it is not needed any more ->  |  ends

    command   1: on   0: off   -1: off, without a window probe

A helper that fails closes the connection. The protocol is that of the original, so each helper serves either passt. The
helper may come before it is needed, or within WAIT. There is one at a time; another one that comes is disconnected.

    timer    value                        consequence
    -------  ---------------------------  ------------------------------------------------------------
    wait     WAIT, without a helper       what was asked for is not done
    answer   ANSWER, after each command   the helper is disconnected, and what was asked for is not done
"""

from __future__ import annotations

import array
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from .. import PASST, log
from ..calls import calls
from ..flow.context import Context
from ..flow.spare import Spare
from ..linux.accepting import ACCEPTED, accept
from ..linux.nspool import new_socket
from ..linux.tcp_repair import SOCKETS_MAX
from ..loop.reactor import EPOLLIN, TYPE_REPAIR, TYPE_REPAIR_LISTEN

WAIT = 0.5  # s; the machine stands still meanwhile
ANSWER = 10.0  # s

CALLS = calls("accept4", "sendmsg", "recvfrom", "close", mode=PASST)

Done = Callable[[int, float], None]
_RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS


class Helper:
    """The helper's socket, and the helper if there is one. `listener` None: there is none, and nothing is ever done."""

    def __init__(self, ctx: Context, listener: socket.socket | None) -> None:
        self._ctx = ctx
        self._listener = listener
        self._sock: Any = None
        self._command = 0
        self._left: list[Any] = []  # sockets that no message had yet
        self._asked = 0  # sockets in the message that waits for its answer
        self._done_count = 0
        self._done: Done | None = None
        self._queue: deque[tuple[int, list[Any], Done]] = deque()  # what is asked for next
        if listener is not None:
            self._timer = ctx.timers.services.new(self._late)
            self._spare = Spare(ctx)
            ctx.reactor.handle(TYPE_REPAIR_LISTEN, self._accept)
            ctx.reactor.handle(TYPE_REPAIR, self._answered)
            ctx.reactor.watch(listener.fileno(), TYPE_REPAIR_LISTEN, 0, EPOLLIN)

    def ask(self, command: int, sockets: Sequence[Any], done: Done, now: float) -> None:
        """Have `command` done for `sockets`. done(how many of them, from the first on, it was done for, now) follows,
        perhaps before this returns. Earlier requests come first.
        """
        if self._done is not None:
            self._queue.append((command, list(sockets), done))
            return
        self._command, self._left, self._done, self._done_count = command, list(sockets), done, 0
        if not sockets or self._listener is None:
            self._finish(now)
        elif self._sock is not None:
            self._send(now)
        else:
            self._ctx.timers.services.arm(self._timer, now + WAIT)

    def release(self) -> None:
        """The helper is not needed any more, and ends, unless there is more to do."""
        if self._done is not None:
            return
        self._disconnect()

    def _disconnect(self) -> None:
        sock, self._sock = self._sock, None
        if sock is not None:
            self._ctx.reactor.retire(sock.fileno(), sock)

    def _accept(self, ref: int, events: int, now: float) -> None:
        assert self._listener is not None
        try:
            fd, _, _ = accept(self._listener.fileno())
        except BlockingIOError:
            return  # it has disconnected
        except OSError as e:
            log.warn_ratelimited("repair accept", f"Couldn't accept a helper: {e.strerror}", now)
            self._spare.accept_failed(self._listener.fileno(), e, now, _turn_away)
            return
        if self._sock is not None:
            log.info_ratelimited("repair", "Another helper for migration connected: closed, there is one already", now)
            _turn_away(fd)
            return
        self._sock = new_socket(socket.AF_UNIX, ACCEPTED, 0, fd)
        self._ctx.reactor.watch(fd, TYPE_REPAIR, 0, EPOLLIN)
        log.info("A helper for migration (passt-repair) is connected")
        if self._done is not None:
            self._send(now)

    def _send(self, now: float) -> None:
        """Send the next sockets."""
        some = self._left[:SOCKETS_MAX]
        fds = array.array("i", (sock.fileno() for sock in some))
        try:
            self._sock.sendmsg([bytes([self._command & 0xFF])], [(*_RIGHTS, fds)])
        except OSError as e:
            self._failed(f"Couldn't ask it: {e.strerror}", now)
            return
        self._asked = len(some)
        self._ctx.timers.services.arm(self._timer, now + ANSWER)

    def _answered(self, ref: int, events: int, now: float) -> None:
        """The helper has answered, or is gone."""
        try:
            data = self._sock.recv(2)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if self._done is None or not self._asked or data != bytes([self._command & 0xFF]):
            self._failed("It has ended" if not data else "Its answer is none to what it was asked", now)
            return
        self._done_count += self._asked
        del self._left[: self._asked]
        self._asked = 0
        if self._left:
            self._send(now)
        else:
            self._finish(now)

    def _failed(self, why: str, now: float) -> None:
        """The helper is of no use."""
        self._disconnect()
        if self._done is not None:
            log.warn(f"The helper for migration has failed: {why}")
            self._finish(now)

    def _late(self, now: float) -> None:
        if self._sock is not None:
            self._failed("It does not answer", now)
            return
        log.warn("No helper for migration (passt-repair) is connected: TCP connections will not move")
        self._finish(now)

    def _finish(self, now: float) -> None:
        done, self._done = self._done, None
        self._left, self._asked = [], 0
        if self._listener is not None:
            self._ctx.timers.services.disarm(self._timer)
        if done is not None:
            done(self._done_count, now)
        if self._done is None and self._queue:
            self.ask(*self._queue.popleft(), now)


def _turn_away(fd: int) -> None:
    """Disconnect a client."""
    new_socket(socket.AF_UNIX, ACCEPTED, 0, fd).close()
