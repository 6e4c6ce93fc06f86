"""The parts of a daemon besides forwarding: files, reports, the end.

`daemon/pasta.py` and `daemon/passt.py` compose the two modes, `daemon/detach.py` brings them into the background.

    end of the loop           when                                            exit status
    ------------------------  ----------------------------------------------  ----------------------------------------
    SIGTERM, SIGQUIT, SIGINT  no command was spawned; else it gets them, and  0
                              SIGTERM ends it (`namespace/supervisor.py`)
    command ended             pasta spawned one                               its own, or 128 + signal number
    namespace gone            pasta is attached, without --no-netns-quit      0
    tap lost                  it was deleted and cannot be created again      1
                              it was passed by --fd                           0
    guest gone                passt, with --one-off or --fd                   0
    the descriptor's event    slirp4netns, with --exit-fd                     0
"""

from __future__ import annotations

import os
import resource
import signal
import stat
import time
from collections.abc import Callable, Sequence
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING, NoReturn

from .. import log
from ..conf.argv import Options
from ..lean.records import dataclass
from ..link.pcap import Pcap
from ..linux.outputs import open_output
from ..log import Fatal
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN, TYPE_CHILD, TYPE_EXIT, TYPE_NETNS
from ..namespace.terminal import Terminal
from ..namespace.watch import POLL_INTERVAL
from ..sandbox.isolation import Identity
from . import signals
from .signals import FROM_TERMINAL

if TYPE_CHECKING:
    from ..conf.decide import Decision
    from ..conf.resolv_conf import Follower
    from ..flow.context import Context
    from ..link.backend import Capture
    from ..linux.inotify import Event
    from ..loop.directories import Changes
    from ..namespace.watch import Watch
    from ..pasta import Init

IF_INET6 = "/proc/self/net/if_inet6"  # exists if the kernel has IPv6, also where /proc has processes only
FILE_MODE = 0o600
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)  # `reports.py` handles USR1

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
    """Open and truncate a file. It may exist or be a pipe: clients pass temporary files and /proc/self/fd/N.

    Raises Fatal.
    """
    if path is None:
        return None
    try:
        fd = open_output(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, FILE_MODE)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.set_blocking(fd, False)  # a pipe that is not read must not hold us up
    except OSError as e:
        raise Fatal(f"Couldn't open {what} file {path}: {e.strerror}") from None
    return FileIO(path, "w", opener=lambda *_: fd)  # its name is in messages


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


# The end -----------------------------------------------------------------------------------------------------------


def run(ctx: Context, end: End, last: Callable[[], None] = lambda: None) -> NoReturn:
    """Run the loop, call last(), and end by _exit(2), also without memory for a message. The sandbox does not
    allow the system calls of the interpreter's own exit.
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

    def __init__(self, ctx: Context, init: Init | None, exit_fd: int | None = None) -> None:
        self.status = 0
        self._ctx = ctx
        self._init = init  # first process of a spawned namespace
        self._exit_fd = exit_fd
        self._terminal: Terminal | None = None  # used only when a command shares it
        self._watch: Watch | None = None
        self._timer = -1

    def start(self, watch: Watch | None = None) -> None:
        """Handle signals, the end of the command and of the namespace from now on."""
        reactor = self._ctx.reactor
        if self._exit_fd is not None:
            reactor.handle(TYPE_EXIT, self._exit_event)
            try:
                reactor.watch(self._exit_fd, TYPE_EXIT, 0, EPOLLIN)
            except OSError as e:  # a file on a disk is one that has no events
                raise Fatal(f"Invalid --exit-fd: {self._exit_fd} ({e.strerror})") from None
        if self._init is not None:
            self._terminal = Terminal()
            reactor.handle(TYPE_CHILD, self._command_ended)
            reactor.watch(self._init.pidfd, TYPE_CHILD, 0, EPOLLIN)
            for number in FORWARDED:
                self._on_signal(number, partial(self._forward, number), number == signal.SIGTERM)
            for number in FROM_TERMINAL:
                self._on_signal(number, partial(self._forward_unless_typed, number))
            return
        for number in signals.ENDING:
            self._on_signal(number, self._terminated, True)
        if watch is not None:
            self._watch = watch
            reactor.handle(TYPE_NETNS, self._namespace_event)
            for fd in watch.pidfds:
                reactor.watch(fd, TYPE_NETNS, 0, EPOLLIN)
            if watch.in_directory:
                watch.changes.tell(reactor, self._directory_changed)
            if watch.ended():
                self._namespace_gone(watch)
            elif watch.poll:
                self._timer = self._ctx.timers.services.new(self._poll)
                self._poll(time.monotonic())

    def _on_signal(self, number: int, callback: Callable[[float], None], ends: bool = False) -> None:
        """Handle a signal, unless it was ignored at start (nohup, a background job): all but SIGTERM may be.

        A signal that `ends` the process also ends a write that waits.
        """
        if number == signal.SIGTERM or signal.getsignal(number) != signal.SIG_IGN:
            self._ctx.reactor.on_signal(number, callback, log.give_up if ends else None)

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

    def _exit_event(self, ref: int, events: int, now: float) -> None:
        log.info("The descriptor of --exit-fd has an event, exiting")
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
        else:
            self._ctx.timers.services.arm(self._timer, now + POLL_INTERVAL)

    def _namespace_gone(self, watch: Watch) -> None:
        log.info(f"Namespace {watch.name} is gone, exiting")
        self._stop(0)
