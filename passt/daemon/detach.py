"""From a process that is ready to serve to a daemon: the background, the sandbox, and the word to those that wait.

    process                        what it does
    -----------------------------  -------------------------------------------------------------------------------------
    started, in the foreground     enters the sandbox, writes its PID file: a reader of the file waits for that
    started, otherwise             forks, and waits on a pipe. READY: writes the PID file, ends with status 0. A text,
                                   or the end of the pipe: undoes what has a path, ends with status 1, and says why
                                   unless the child has
    its child                      enters the sandbox, and sends READY once the filter of system calls is in force

Clients take the end of the started process, or the PID file, for readiness. So either comes last, when nothing of a
start can fail any more.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING

from .. import log, seccomp
from ..conf.argv import Options
from ..lean.records import dataclass
from ..linux import netns, stdio
from ..log import Fatal
from ..sandbox import interpreter, isolation
from . import signals

if TYPE_CHECKING:
    from ..linux.netns import Namespace

READY = b"\0"  # message of the daemon to the process that was started
UNREPORTED = 2  # its exit status, if it could not send it


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Parameters of the sandbox, and the rights kept in it."""

    mode: str
    background: bool
    capabilities: tuple[int, ...] = ()
    namespace: Namespace | None = None  # a thread stays in it
    directories: tuple[int, ...] = ()  # descriptors of directories whose files may be opened


def detach(
    options: Options,
    pid_file: FileIO | None,
    sandbox: Sandbox,
    settled: Callable[[float], None] = lambda _: None,
    undo: Callable[[], object] = lambda: None,
) -> None:
    """Go to the background if required, enter the sandbox, and notify the starting process; on failure, end.

    settled(now) is called in the process that stays, while files can still be opened. The process must be
    single-threaded. Raises Fatal; in the background, the child raises it, which may not reach paths any more, and the
    parent calls undo() and ends with status 1 without a message.
    """
    null = stdio.null(os.O_CLOEXEC)
    log.step("wait for threads to end")
    netns.settle()
    log.step("go to the background")
    isolation.leave_processes(background=sandbox.background)
    starter = go_background(pid_file, undo) if sandbox.background else Starter(pid_file)
    log.step("start the reports")
    settled(time.monotonic())
    log.step("enter the sandbox")
    isolation.leave_files(seccomp.number, sandbox.directories, chroot_fallback=options.chroot_fallback)
    if sandbox.namespace is not None:
        sandbox.namespace.move_in(partial(isolation.lock_down, *sandbox.capabilities))
        os.close(sandbox.namespace.fd)
    isolation.lock_down(*sandbox.capabilities)
    interpreter.prepare()
    rules = seccomp.build(sandbox.mode, os.uname().machine, seccomp.in_directories(sandbox.directories))
    starter.release(null)
    try:
        seccomp.load(rules)
    except Fatal as e:
        starter.failed(str(e))
        raise
    try:
        starter.ready()
    except Fatal as e:  # paths cannot be removed from inside the sandbox; everything else ends with the process
        log.err(str(e))
        os._exit(UNREPORTED if sandbox.background else 1)


class Starter:
    """The process that waits for readiness: in the foreground, a reader of the PID file."""

    def __init__(self, pid_file: FileIO | None) -> None:
        self._pid_file, self._pid = pid_file, os.getpid()

    def release(self, null: int) -> None:
        """Close the descriptors shared with it; `null` is /dev/null."""
        os.close(null)

    def ready(self) -> None:
        """Report readiness. Raises Fatal if that fails."""
        write_pid(self._pid_file, self._pid)

    def failed(self, text: str) -> None:
        """Report a failed start; `text` is the reason. In the foreground the caller logs it."""


class Parent(Starter):
    """The process that was started; readiness is a byte on `pipe`.

    Clients read our standard output and error until end of file: no copy of either may stay open.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def release(self, null: int) -> None:
        log.stop_stderr()
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)

    def ready(self) -> None:
        try:
            os.write(self._pipe, READY)
        except BrokenPipeError:
            raise Fatal("The starting process has not waited for the daemon, exiting") from None
        except OSError as e:
            raise Fatal(f"Couldn't tell the starting process of the daemon, exiting: {e.strerror}") from None
        os.close(self._pipe)

    def failed(self, text: str) -> None:
        os.write(self._pipe, text.encode())


def write_pid(file: FileIO | None, pid: int) -> None:
    if file is None:
        return
    try:
        with file:
            if file.write(b"%d\n" % pid) is None:
                raise OSError(errno.EAGAIN, "nothing reads it")
    except OSError as e:
        raise Fatal(f"PID file write: {e.strerror} ({file.name})") from None


def go_background(pid_file: FileIO | None, undo: Callable[[], object]) -> Parent:
    """Fork, and return in the child. The parent writes the PID file once the child is ready, and ends with status 0.

    On failure it calls undo(), and ends with status 1; by a signal likewise, with the child (`signals.py`).
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        if pid_file is not None:
            pid_file.close()
        os.setsid()
        return Parent(writer)
    os.close(writer)
    status = 1
    try:
        signal.set_wakeup_fd(-1)  # its other end is the child's
        with signals.raising():
            answer = os.read(reader, 4096)  # empty: the child has ended, usually with an error that it has logged
            if answer == READY:
                write_pid(pid_file, pid)
                status = 0
            elif answer:
                log.err(answer.decode())
            elif (ended := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) != 1:
                log.err(f"Couldn't start the daemon: it ended before it was ready ({_end(ended)})")
    except Fatal as e:
        log.err(str(e))
        os.kill(pid, signal.SIGKILL)
    except signals.Ended as e:
        os.kill(pid, signal.SIGKILL)
        undo()
        signals.die(e.number)
    if status:
        undo()
    os._exit(status)


def _end(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"status {code}"
