"""The parts of a daemon besides forwarding: files, reports, the background, the end. `daemon/pasta.py` and
`daemon/passt.py` compose the two modes.

    end of the loop           when                                            exit status
    ------------------------  ----------------------------------------------  ----------------------------------------
    SIGTERM, SIGQUIT, SIGINT  no command was spawned; else it gets them       0
    command ended             pasta spawned one                               its own, or 128 + signal number
    namespace gone            pasta is attached, without --no-netns-quit      0
    tap lost                  it was deleted and cannot be created again      1
                              it was passed by --fd                           0
    guest gone                passt, with --one-off or --fd                   0
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING, NoReturn

from .. import log, seccomp
from ..conf.argv import Options
from ..link.pcap import Pcap
from ..linux import netns
from ..log import Fatal
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN, TYPE_CHILD, TYPE_NETNS
from ..namespace.terminal import Terminal
from ..sandbox import isolation
from ..sandbox.isolation import Identity

if TYPE_CHECKING:
    from ..conf.decide import Decision
    from ..conf.resolv_conf import Follower
    from ..flow.context import Context
    from ..link.backend import Capture
    from ..linux.inotify import Event
    from ..linux.netns import Namespace
    from ..loop.directories import Changes
    from ..pasta import Init, Watch

IF_INET6 = "/proc/net/if_inet6"  # exists if the kernel has IPv6
FILE_MODE = 0o600
WATCH_INTERVAL = 1.0  # seconds between checks of a path without kernel events
READY = b"\0"  # message of the daemon to the process that was started
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)  # `reports.py` handles USR1
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)

# Before there is a loop --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Files:
    """Files that were opened by name before the change of identity."""

    pid: FileIO | None
    pcap: FileIO | None
    names: Follower  # of resolv.conf


def open_files(options: Options, changes: Changes) -> Files:
    """Raises Fatal."""
    return Files(create("PID", options.pid_file), create("capture", options.pcap), _read_names(options, changes))


def create(what: str, path: str | None) -> FileIO | None:
    """Open and truncate a file. It may exist or be a pipe: clients pass temporary files and /proc/self/fd/N."""
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    except OSError as e:
        raise Fatal(f"Couldn't open {what} file {path}: {e.strerror}") from None
    return FileIO(fd, "w")


def _read_names(options: Options, changes: Changes) -> Follower:
    """The contents of resolv.conf, and a watch for changes if any setting depends on it."""
    from ..conf import names as conf_names
    from ..conf import resolv_conf

    return resolv_conf.Follower(resolv_conf.RESOLV_CONF, changes if conf_names.follows(options) else None)


def follow_names(ctx: Context, options: Options, names: Follower) -> None:
    """Follow changes of the host's resolvers from now on."""
    from ..conf import names as conf_names

    names.start(ctx, partial(conf_names.follow, ctx, options))


def report(
    identity: Identity, decision: Decision, problems: list[str], *, quiet: bool = False, background: bool = False
) -> None:
    """Log the configuration and the problems; `quiet` leaves the former out. The process runs as `identity` already.

    `background`: warnings that usually come at first use are logged now, while standard error is still open.
    """
    from .. import icmp
    from ..conf.summary import describe

    if identity.warning:
        log.warn(identity.warning)
    decision.remarks.say()
    if not quiet:
        for line in describe(decision):
            log.info(line)
    for problem in problems:
        log.warn(problem)
    if background and not decision.config.no_icmp and not decision.config.splice_only:
        icmp.probe()


def raise_descriptor_limit() -> None:
    """Raise the soft limit to the hard limit: each flow has a socket. A command keeps the inherited limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def attach_capture(ctx: Context, options: Options, file: FileIO | None) -> None:
    """Attach the pcap file and --trace to both directions. A capture that fails ends; the other one goes on."""
    captures: list[Capture] = []

    def capture(to_guest: bool, data: bytes) -> None:
        each(captures, _take, fault_at, to_guest, data)

    def fault_at(failed: Capture, e: Exception) -> None:
        record(ctx.drops, "a captured frame", e)
        end(failed)

    def end(ended: Capture) -> None:
        captures.remove(ended)
        if not captures:
            ctx.link.capture = None

    if log.trace_on:
        from ..link import trace

        captures.append(trace.capture)
    if file is not None:
        log.info(f"Saving packet capture to {options.pcap}")
        pcap = Pcap(file, str(options.pcap), ctx.drops)
        captures.append(pcap.capture)
        ctx.reactor.at_turn_end.append(pcap.at_turn_end)
        pcap.on_end = partial(end, pcap.capture)
        pcap.flush()
    if captures:
        ctx.link.capture = capture


def _take(take: Capture, to_guest: bool, data: bytes) -> None:
    take(to_guest, data)


# Detach ------------------------------------------------------------------------------------------------------------


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
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    netns.settle()
    isolation.leave_processes(background=sandbox.background)
    starter = go_background(pid_file, undo) if sandbox.background else Starter(pid_file)
    settled(time.monotonic())
    isolation.leave_files(seccomp.number, sandbox.directories, chroot_fallback=options.chroot_fallback)
    if sandbox.namespace is not None:
        sandbox.namespace.move_in(partial(isolation.lock_down, *sandbox.capabilities))
        os.close(sandbox.namespace.fd)
    isolation.lock_down(*sandbox.capabilities)
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
        os._exit(1)


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
        os.close(self._pipe)

    def failed(self, text: str) -> None:
        os.write(self._pipe, text.encode())


def write_pid(file: FileIO | None, pid: int) -> None:
    if file is None:
        return
    try:
        with file:
            file.write(b"%d\n" % pid)
    except OSError as e:
        raise Fatal(f"PID file write: {e.strerror}") from None


def go_background(pid_file: FileIO | None, undo: Callable[[], object]) -> Parent:
    """Fork, and return in the child. The parent writes the PID file once the child is ready, and ends with status 0.

    On failure it calls undo(), and ends with status 1.
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
        answer = os.read(reader, 4096)  # empty: the child has logged an error and ended
        if answer == READY:
            write_pid(pid_file, pid)
            status = 0
        elif answer:
            log.err(answer.decode())
    except Fatal as e:
        log.err(str(e))
        os.kill(pid, signal.SIGKILL)
    if status:
        undo()
    os._exit(status)


# The end -----------------------------------------------------------------------------------------------------------


@contextmanager
def signals_held() -> Iterator[None]:
    """Block signals that end the process until the loop handles them, so that no partial set-up is left behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *FROM_TERMINAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(ctx: Context, end: End, last: Callable[[], None] = lambda: None) -> NoReturn:
    """Run the loop, call last(), and end by _exit(2), also without memory for a message. The sandbox does not allow the
    system calls of the interpreter's own exit.
    """
    status = 1
    try:
        try:
            ctx.reactor.run()
        except Exception as e:  # a traceback would need source files, which cannot be read
            end.status = 1
            log.err(f"The loop failed, exiting: {e!r}")
        last()
        ctx.reactor.abandon()  # ports are free before the end of the process is visible
        status = end.status
    finally:
        os._exit(status)


class End:
    """The events that end the loop, and the exit status."""

    def __init__(self, ctx: Context, init: Init | None) -> None:
        self.status = 0
        self._ctx = ctx
        self._init = init  # first process of a spawned namespace
        self._terminal: Terminal | None = None  # used only when a command shares it
        self._watch: Watch | None = None
        self._timer = -1

    def start(self, watch: Watch | None = None) -> None:
        """Handle signals, the end of the command and of the namespace from now on."""
        reactor = self._ctx.reactor
        if self._init is not None:
            self._terminal = Terminal()
            reactor.handle(TYPE_CHILD, self._command_ended)
            reactor.watch(self._init.pidfd, TYPE_CHILD, 0, EPOLLIN)
            for number in FORWARDED:
                self._on_signal(number, partial(self._forward, number))
            for number in FROM_TERMINAL:
                self._on_signal(number, partial(self._forward_unless_typed, number))
            return
        for number in (signal.SIGTERM, *FROM_TERMINAL):
            self._on_signal(number, self._terminated)
        if watch is not None:
            self._watch = watch
            reactor.handle(TYPE_NETNS, self._namespace_event)
            if watch.pidfd >= 0:
                reactor.watch(watch.pidfd, TYPE_NETNS, 0, EPOLLIN)
            if watch.in_directory:
                watch.changes.tell(reactor, self._directory_changed)
            self._timer = self._ctx.timers.services.new(self._poll)
            self._poll(time.monotonic())

    def _on_signal(self, number: int, callback: Callable[[float], None]) -> None:
        """Handle a signal, unless it was ignored at start (nohup, a background job)."""
        if signal.getsignal(number) != signal.SIG_IGN:
            self._ctx.reactor.on_signal(number, callback)

    def failed(self, text: str) -> None:
        """End the loop after this turn, with status 1."""
        log.err(text)
        self._stop(1)

    def done(self) -> None:
        """End the loop after this turn, with status 0."""
        self._stop(0)

    def _stop(self, status: int) -> None:
        self.status = status
        self._ctx.reactor.stop()

    def _terminated(self, now: float) -> None:
        self._stop(0)

    # The command -------------------------------------------------------------------------------------------------

    def _command_ended(self, ref: int, events: int, now: float) -> None:
        assert self._init is not None
        assert self._terminal is not None
        status = self._init.wait()
        self._terminal.restore()
        self._stop(status)

    def _forward(self, number: int, now: float) -> None:
        assert self._init is not None
        self._init.signal(number)

    def _forward_unless_typed(self, number: int, now: float) -> None:
        """Forward a signal that came from kill(1). One from the terminal has reached the command already."""
        assert self._terminal is not None
        if not self._terminal.is_ours():
            self._forward(number, now)

    # The namespace -----------------------------------------------------------------------------------------------

    def _namespace_event(self, ref: int, events: int, now: float) -> None:
        assert self._watch is not None
        self._namespace_gone(self._watch)

    def _directory_changed(self, found: Sequence[Event], now: float) -> None:
        assert self._watch is not None
        if self._watch.deleted(found):
            self._namespace_gone(self._watch)

    def _poll(self, now: float) -> None:
        assert self._watch is not None
        if self._watch.gone():
            self._namespace_gone(self._watch)
        elif self._watch.poll:
            self._ctx.timers.services.arm(self._timer, now + WATCH_INTERVAL)

    def _namespace_gone(self, watch: Watch) -> None:
        log.info(f"Namespace {watch.name} is gone, exiting")
        self._stop(0)
