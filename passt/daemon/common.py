"""What a daemon does besides forwarding: files, reports, the background, the end. The two modes are put together in
`daemon/pasta.py` and `daemon/passt.py`.

    end of the loop           when                                            exit status
    ------------------------  ----------------------------------------------  ----------------------------------------
    SIGTERM, SIGQUIT, SIGINT  no command was spawned; else they are for it    0
    command ended             pasta spawned one                               its own, or 128 + signal number
    namespace gone            pasta is attached, without --no-netns-quit      0
    tap lost                  it was deleted and cannot be made anew          1
                              it was given by --fd                            0
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
    from ..link.plain_tap import PlainLink
    from ..link.stream_socket import StreamLink
    from ..link.tap_device import Capture, TapLink
    from ..linux.inotify import Event
    from ..linux.netns import Namespace
    from ..loop.changes import Changes
    from ..pasta import Init, Watch
    from ..tap import Tap

IF_INET6 = "/proc/net/if_inet6"  # exists if the kernel has IPv6
FILE_MODE = 0o600
WATCH_INTERVAL = 1.0  # seconds between looks at a path that the kernel reports nothing about
READY = b"\0"  # what the daemon tells the process that was started
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)  # USR1 is for us: `reports.py`
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)

# Before there is a loop --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Files:
    """What was opened by name while we still were who started us."""

    pid: FileIO | None
    pcap: FileIO | None
    names: Follower  # of resolv.conf


def open_files(options: Options, changes: Changes) -> Files:
    """Raises Fatal."""
    return Files(create("PID", options.pid_file), create("capture", options.pcap), _read_names(options, changes))


def create(what: str, path: str | None) -> FileIO | None:
    """An empty file. It may exist, and be a pipe: clients pass temporary files and /proc/self/fd/N."""
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    except OSError as e:
        raise Fatal(f"Couldn't open {what} file {path}: {e.strerror}") from None
    return FileIO(fd, "w")


def _read_names(options: Options, changes: Changes) -> Follower:
    """What resolv.conf says, and how to notice that it says something else, as far as that matters."""
    from ..conf import names as conf_names
    from ..conf import resolv_conf

    return resolv_conf.Follower(resolv_conf.RESOLV_CONF, changes if conf_names.follows(options) else None)


def follow_names(ctx: Context, options: Options, names: Follower) -> None:
    """From now on the guest has the resolvers that the host has."""
    from ..conf import names as conf_names

    names.start(ctx, partial(conf_names.follow, ctx, options))


def report(
    identity: Identity, decision: Decision, problems: list[str], *, quiet: bool = False, background: bool = False
) -> None:
    """Say what was chosen, and what could not be done; `quiet` leaves the former out. We are `identity` already.

    `background`: what would be said when it first matters is said now, as long as somebody hears.
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
    """A socket per flow: use what the hard limit allows. The command keeps what it inherited."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def attach_capture(
    ctx: Context, link: TapLink | PlainLink | StreamLink, tap: Tap, options: Options, file: FileIO | None
) -> None:
    """Attach the pcap file and --trace to both directions. One that fails ends, and nothing else does."""
    takers: list[Capture] = []

    def capture(to_guest: bool, data: bytes) -> None:
        each(takers, _take, fault_at, to_guest, data)

    def fault_at(take: Capture, e: Exception) -> None:
        record(ctx.drops, "a captured frame", e)
        end(take)

    def end(take: Capture) -> None:
        takers.remove(take)
        if not takers:
            link.capture = tap.capture = None

    if log.trace_on:
        from ..link import trace

        takers.append(trace.capture)
    if file is not None:
        log.info(f"Saving packet capture to {options.pcap}")
        pcap = Pcap(file, str(options.pcap), ctx.drops)
        takers.append(pcap.capture)
        ctx.reactor.at_turn_end.append(pcap.at_turn_end)
        pcap.on_end = partial(end, pcap.capture)
        pcap.flush()
    if takers:
        link.capture = tap.capture = capture


def _take(take: Capture, to_guest: bool, data: bytes) -> None:
    take(to_guest, data)


# Detach ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sandbox:
    """Where we go, and what is kept there."""

    mode: str
    background: bool
    capabilities: tuple[int, ...] = ()
    namespace: Namespace | None = None  # that a thread is to stay in
    directories: tuple[int, ...] = ()  # descriptors: files in them may be opened


def detach(
    options: Options,
    pid_file: FileIO | None,
    sandbox: Sandbox,
    settled: Callable[[float], None] = lambda _: None,
    undo: Callable[[], object] = lambda: None,
) -> None:
    """To the background if asked for, and locked up; then whoever started us is told that all is ready, or else we end.

    settled(now) is called in the process that stays, as long as files can still be opened. The process must be
    single-threaded. Raises Fatal; in the background, that is raised in the child, which may have lost sight of what is
    to be undone, and the parent calls undo() and ends with status 1 in silence.
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
    starter.let_go(null)
    try:
        seccomp.load(rules)
    except Fatal as e:
        starter.failed(str(e))
        raise
    try:
        starter.ready()
    except Fatal as e:  # nothing can be undone from in here: what was made ends with us, but for paths
        log.err(str(e))
        os._exit(1)


class Starter:
    """Who waits for us to be ready: in the foreground, whoever reads the PID file."""

    def __init__(self, pid_file: FileIO | None) -> None:
        self._pid_file, self._pid = pid_file, os.getpid()

    def let_go(self, null: int) -> None:
        """Give up what is shared with it; `null` is /dev/null."""
        os.close(null)

    def ready(self) -> None:
        """Everything is. Raises Fatal if it cannot be told."""
        write_pid(self._pid_file, self._pid)

    def failed(self, text: str) -> None:
        """It will never be, and `text` says why. Somebody else says it where we still can."""


class Parent(Starter):
    """The process that was started; `pipe` is written to when we are ready.

    Clients read our standard output and error to their end: nothing of them may stay open.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    def let_go(self, null: int) -> None:
        log.stop_stderr()
        for fd in range(3):
            os.dup2(null, fd)
        os.close(null)

    def ready(self) -> None:
        try:
            os.write(self._pipe, READY)
        except BrokenPipeError:
            raise Fatal("Who started this has not waited for it, exiting") from None
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
    """Fork, and return in the child. The parent ends with status 0 once the child is ready and the PID file written.

    If that does not come to be, it calls undo(), and ends with status 1.
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
        answer = os.read(reader, 4096)  # nothing: the child has ended, and said why itself
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
    """Let signals that end us wait until the loop's handlers are there: what is half made would stay behind."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, *FROM_TERMINAL})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def run(ctx: Context, end: End, last: Callable[[], None] = lambda: None) -> NoReturn:
    """Turn the loop, call last(), and end: by _exit(2), since the interpreter's own end is not allowed any more, also
    when there is no memory for a message.
    """
    status = 1
    try:
        try:
            ctx.reactor.run()
        except Exception as e:  # what is printed of it otherwise comes from files
            end.status = 1
            log.err(f"The loop failed, exiting: {e!r}")
        last()
        ctx.reactor.abandon()  # ports are free before anybody can see that we are gone
        status = end.status
    finally:
        os._exit(status)


class End:
    """Everything that ends the loop, and the exit status that it gives."""

    def __init__(self, ctx: Context, init: Init | None) -> None:
        self.status = 0
        self._ctx = ctx
        self._init = init  # of a namespace that was spawned
        self._terminal: Terminal | None = None  # only looked at where a command shares it
        self._watch: Watch | None = None
        self._timer = -1

    def attend(self, watch: Watch | None = None) -> None:
        """Begin to listen to signals, the command, the namespace's end."""
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
            self._on_signal(number, self._asked)
        if watch is not None:
            self._watch = watch
            reactor.handle(TYPE_NETNS, self._namespace_event)
            if watch.pidfd >= 0:
                reactor.watch(watch.pidfd, TYPE_NETNS, 0, EPOLLIN)
            if watch.in_directory:
                watch.changes.tell(reactor, self._directory_changed)
            self._timer = self._ctx.timers.services.new(self._look)
            self._look(time.monotonic())

    def _on_signal(self, number: int, callback: Callable[[float], None]) -> None:
        """Handle a signal, unless whoever started us wants it ignored (nohup, a background job)."""
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

    def _asked(self, now: float) -> None:
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
        """Ctrl-C reached the command already; kill(1) aimed at us alone did not."""
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

    def _look(self, now: float) -> None:
        assert self._watch is not None
        if self._watch.gone():
            self._namespace_gone(self._watch)
        elif self._watch.poll:
            self._ctx.timers.services.arm(self._timer, now + WATCH_INTERVAL)

    def _namespace_gone(self, watch: Watch) -> None:
        log.info(f"Namespace {watch.name} is gone, exiting")
        self._stop(0)
