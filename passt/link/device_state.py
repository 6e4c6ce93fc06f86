"""The transfer of a device's state over a pipe: all that moves with a machine and is not in its memory.

    SET_DEVICE_STATE_FD, SAVE    the pipe is written: `on_save` collects the state, then it goes out, then end of file
    SET_DEVICE_STATE_FD, LOAD    the pipe is read to its end, and `on_load` gets what came
    CHECK_DEVICE_STATE           the answer says whether it went well; it waits until that is known

The front end gives the descriptor, and waits in read(2) or write(2) at the other end, with the machine stopped. Nothing
here waits: the pipe is watched like any descriptor, read once for an event, and written by PIPE_BUF bytes, which a pipe
takes that can be written (pipe(7)). A front end that kept our end, and fills or empties the pipe after the event, makes
its own device wait, up to a signal that ends the process (`Reactor.write`). One that closes its end, or goes, ends the
transfer.

    limit       value
    ----------  ---------------------------------------------------------------------
    state       STATE_MAX bytes, in both directions
    transfers   one at a time; a new one replaces one that was not asked about

Source: docs/interop/vhost-user.rst of QEMU, "Migrating back-end state".
"""

from __future__ import annotations

import os
import select
import stat
from collections.abc import Callable

from .. import PASST, log
from ..calls import calls
from ..loop.reactor import EPOLLIN, EPOLLOUT, TYPE_DEVICE_STATE, Reactor
from ..wire.migration import STATE_MAX
from ..wire.vhost import SAVE, Invalid, StateTransfer

READ_MAX = 1 << 16  # bytes at once: a pipe has no more

CALLS = calls("read", "write", "close", "fstat", "newfstatat", mode=PASST)

Sent = Callable[[bytes | None], None]
Done = Callable[[bool], None]


class _Pipe:
    """A descriptor that the reactor closes."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        os.close(self.fd)


class DeviceState:
    """One per process. `on_save(send)` answers by send(state), or send(None): there is none to be had; `on_load(state,
    done)` by done(whether it was taken over). Both may answer later, and must answer once. `on_sent(ok)` is called when
    the state was sent, or could not be.
    """

    def __init__(self) -> None:
        self.on_save: Callable[[Sent], None] | None = None
        self.on_load: Callable[[bytes, Done], None] | None = None
        self.on_sent: Done | None = None
        self._pipe: _Pipe | None = None
        self._number = 0  # of the transfer: answers to an earlier one are ignored
        self._out = memoryview(b"")
        self._in = bytearray()
        self._saving = False
        self._result: bool | None = None
        self._running = False
        self._answer: Done | None = None

    def start(self, reactor: Reactor) -> None:
        """Serve from now on."""
        self._reactor = reactor
        reactor.handle(TYPE_DEVICE_STATE, self._handle)

    def begin(self, transfer: StateTransfer, fd: int) -> None:
        """Start a transfer over the pipe `fd`, which is ours from now on. Raises Invalid or OSError."""
        try:
            if not stat.S_ISFIFO(os.fstat(fd).st_mode):
                raise Invalid("a transfer of state that is not over a pipe")
        except (Invalid, OSError):
            os.close(fd)
            raise
        self.abandon()
        self._number += 1
        number = self._number
        self._pipe, self._running, self._result = _Pipe(fd), True, None
        self._saving = transfer.direction == SAVE
        if not self._saving:
            self._reactor.watch(fd, TYPE_DEVICE_STATE, 0, EPOLLIN)
        elif self.on_save is None:
            self._finish(False)
        else:
            self.on_save(lambda state: self._send(number, state))

    def check(self, answer: Done) -> bool:
        """Call answer(whether the transfer went well) when that is known; False if there was no transfer."""
        if not self._running and self._result is None:
            return False
        self._answer = answer
        self._tell()
        return True

    def abandon(self) -> None:
        """The front end is gone, or begins another transfer: end the one that there is."""
        self._answer = None
        if self._running:
            self._finish(False)
        self._result = None

    def _send(self, number: int, state: bytes | None) -> None:
        """The state of the transfer `number` is there."""
        if number != self._number or self._pipe is None:
            return
        if state is None:
            self._finish(False)
            return
        self._out = memoryview(state)
        self._reactor.watch(self._pipe.fd, TYPE_DEVICE_STATE, 0, EPOLLOUT)

    def _handle(self, ref: int, events: int, now: float) -> None:
        """The pipe can be written or read, or its other end is closed."""
        pipe = self._pipe
        if pipe is None:
            return
        try:
            if self._saving:
                self._out = self._out[self._reactor.write(pipe.fd, self._out[: select.PIPE_BUF]) :]
                if not self._out:
                    self._finish(True)
            else:
                self._read(pipe)
        except OSError as e:
            log.warn(f"The transfer of the machine's state failed: {e.strerror}")
            self._finish(False)

    def _read(self, pipe: _Pipe) -> None:
        data = self._reactor.read(pipe.fd, READ_MAX)
        self._in += data
        if data and len(self._in) <= STATE_MAX:
            return
        self._close()
        state, self._in = bytes(self._in), bytearray()
        if data or self.on_load is None:
            self._finish(False)
            return
        number = self._number
        self.on_load(state, lambda done: self._loaded(number, done))

    def _loaded(self, number: int, done: bool) -> None:
        if number == self._number and self._running:
            self._finish(done)

    def _finish(self, done: bool) -> None:
        """The transfer is over."""
        self._close()
        self._out, self._in = memoryview(b""), bytearray()
        self._running, self._result = False, done
        if self._saving and self.on_sent is not None:
            self.on_sent(done)
        self._tell()

    def _close(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._reactor.retire(pipe.fd, pipe)

    def _tell(self) -> None:
        if self._answer is not None and self._result is not None:
            answer, self._answer = self._answer, None
            result, self._result = self._result, None
            answer(result)
