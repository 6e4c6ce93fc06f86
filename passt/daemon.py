"""The composition root: from parsed options to a running loop, and back to an exit status.

    open      namespaces, PID, log and pcap files by path; then inherited descriptors are closed
    spawn     (no namespace given) one with a process in it that waits for us
    read      the host's links, addresses, routes, resolvers; decide what the guest gets
    listen    on the host, as who we were started by: it may be root, who has ports below 1024
    create    the tap, inside; listen there, too; become nobody if we were root
    wire      the services, around one Context; listen on automatic ports that are wanted already
    detach    PID file; to the background unless in the foreground: the parent exits when nothing is left to do
    run       let the command start, and turn the loop

Before `detach` every error ends the program with a message and status 1, and what was made goes with it. Imports that
take time come after `spawn`, while the other process prepares its namespace.

    end of the loop           when                                            exit status
    ------------------------  ----------------------------------------------  ----------------------------------------
    SIGTERM, SIGQUIT, SIGINT  no command was spawned; else they are for it    0
    command ended             spawned                                         its own, or 128 + signal number
    namespace gone            attached, without --no-netns-quit               0
    tap lost                  it was deleted and cannot be made anew          1
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from io import FileIO
from typing import TYPE_CHECKING

from . import addr, isolation, log
from .conf import Options
from .core.pcap import Pcap
from .core.reactor import EPOLLIN, TYPE_CHILD, TYPE_NETNS, ref_fd
from .isolation import Identity
from .linux import netns
from .log import Fatal
from .terminal import Terminal

if TYPE_CHECKING:
    from .conf_net import Decision, Resolvers
    from .core.context import Context
    from .core.link import Capture, TapLink
    from .linux.routes import NsPlan
    from .linux.tun import Tap as TapDevice
    from .pasta import Target, Watch
    from .tap import Tap

RESOLV_CONF = "/etc/resolv.conf"
IF_INET6 = "/proc/net/if_inet6"  # exists if the kernel has IPv6
FILE_MODE = 0o600
WATCH_INTERVAL = 1.0  # seconds between looks at a path that the kernel reports nothing about
FORWARDED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
FROM_TERMINAL = (signal.SIGINT, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Files:
    """What was opened by name while we still were who started us."""

    pid: FileIO | None
    pcap: FileIO | None


def run(options: Options, env: Mapping[str, str], inherited: Sequence[int]) -> int:
    """From options to exit status. `env` is that of the command. Raises Fatal, with everything undone, at start."""
    identity = isolation.choose_identity(options.runas)
    target, watch, files = open_all(options, env, identity, inherited)
    try:
        ctx, way, plan = build(options, target, identity)
        end = End(ctx, target)
        if way is not None:
            link, tap = way
            tap.on_gone = link.on_error = lambda e: reopen(ctx, link, tap, target, plan, end)
            _capture(ctx, link, tap, options, files.pcap)
        gc.collect()
        gc.freeze()
        if target.init is None and not options.foreground:
            netns.settle()
            go_background(files.pid)
        else:
            _write_pid(files.pid)
        end.attend(watch)
    except BaseException:
        if target.init is not None:
            target.init.abandon()
        raise
    if target.init is not None:
        if not log.debug_on:
            log.quiet_stderr()  # the terminal is the command's now
        target.init.start()
    ctx.reactor.run()
    return end.status


# Open and spawn ----------------------------------------------------------------------------------------------------


def open_all(
    options: Options, env: Mapping[str, str], identity: Identity, inherited: Sequence[int]
) -> tuple[Target, Watch | None, Files]:
    """Everything that the command line names, and then the namespace that it does not name."""
    from . import pasta, pasta_init

    target = watch = None
    if options.pid is not None or options.netns is not None:
        target = pasta.open_target(options.pid, options.netns, options.userns, options.netns_only)
        pasta.check_foreign(target)
        if target.path and options.netns_quit:
            watch = pasta.Watch(target.path)
    files = Files(_create("PID", options.pid_file), _create("capture", options.pcap))
    isolation.close_fds(inherited)
    if target is None:
        words = options.command
        command = pasta_init.Command(words[0], words, env) if words else pasta_init.login_shell(env)
        target = pasta.spawn(command, identity, options.userns, options.netns_only)
    return target, watch, files


def _create(what: str, path: str | None) -> FileIO | None:
    """An empty file. It may exist, and be a pipe: clients pass temporary files and /proc/self/fd/N."""
    if path is None:
        return None
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, FILE_MODE)
    except OSError as e:
        raise Fatal(f"Couldn't open {what} file {path}: {e.strerror}") from None
    return FileIO(fd, "w")


# Read, decide, create, wire ----------------------------------------------------------------------------------------


def build(options: Options, target: Target, identity: Identity) -> tuple[Context, tuple[TapLink, Tap] | None, NsPlan]:
    """From the host's configuration to wired services; no link and tap with --splice-only. We are `identity` then."""
    from . import conf_net, listen_sock, pasta, wiring  # who we become may not be able to read Python's files
    from .linux import netlink

    if log.trace_on:
        from . import trace  # noqa: F401
    decision = conf_net.decide(options, netlink.read_host(), _resolvers(), have_v6=os.path.exists(IF_INET6))
    config, plan = decision.config, decision.plan
    assert plan is not None  # there is one for every namespace
    _raise_descriptor_limit()
    listen_sock.check_limit(config)
    host = listen_sock.open_side(config, outbound=False)
    root = isolation.is_machine_root()
    if not root:
        isolation.become(identity)
        pasta.join_userns(target)
    device, mac, problems = _create_tap(target, plan, splice_only=config.splice_only)
    ns = listen_sock.NOTHING
    if any(rule.outbound or rule.auto for rule in config.forwards):
        ns = pasta.inside(target, partial(listen_sock.open_side, config, outbound=True))
    if root:
        isolation.become(identity, keep_capabilities=target.init is None and identity.uid != 0)
        if target.init is not None and identity.uid != 0:
            pasta.join_userns(target)  # which brings back the rights over our own child's namespace
    _report(identity, decision, problems, quiet=target.init is not None and not log.debug_on)
    return *wiring.wire(decision, device, mac, target.netns, host, ns), replace(plan, mac=mac)


def _create_tap(target: Target, plan: NsPlan, *, splice_only: bool) -> tuple[TapDevice | None, bytes, list[str]]:
    """The tap, set up, its MAC address, and what could not be set up; with --splice-only the loopback interface."""
    from . import pasta
    from .linux import netlink

    if splice_only:
        pasta.inside(target, netlink.loopback_up)
        return None, addr.BROADCAST_MAC, []
    return pasta.create_tap(target, plan)


def _resolvers() -> Resolvers:
    from .conf_net import Resolvers, parse_resolv_conf

    try:
        with open(RESOLV_CONF, encoding="utf-8", errors="replace") as f:
            return parse_resolv_conf(f.read())
    except OSError as e:
        log.debug(f"{RESOLV_CONF}: {e.strerror}")
        return Resolvers()


def _report(identity: Identity, decision: Decision, problems: list[str], *, quiet: bool) -> None:
    """Say what was chosen, and what could not be done; `quiet` leaves the former out."""
    from .conf_net import describe

    if identity.warning:
        log.warn(identity.warning)
    decision.remarks.say()
    if not quiet:
        for line in describe(decision):
            log.info(line)
    for problem in problems:
        log.warn(problem)


def _raise_descriptor_limit() -> None:
    """A socket per flow: use what the hard limit allows. The command keeps what it inherited."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def reopen(ctx: Context, link: TapLink, tap: Tap, target: Target, plan: NsPlan, end: End) -> None:
    """Somebody deleted the tap: make it anew, as it was, under the same descriptor number; or end the program."""
    from . import pasta

    log.warn(f"Interface {plan.ifname} was deleted: making it anew")
    try:
        device, _, problems = pasta.create_tap(target, plan)
    except Fatal as e:
        end.failed(f"Interface {plan.ifname} was deleted and can't be made anew, exiting: {e}")
        return
    for problem in problems:
        log.warn(problem)
    ctx.reactor.forget(link.fd)
    os.dup2(device.fd, link.fd, inheritable=False)
    os.close(device.fd)
    tap.watch(link.fd)


def _capture(ctx: Context, link: TapLink, tap: Tap, options: Options, file: FileIO | None) -> None:
    """Attach the pcap file and --trace to both directions."""
    takers: list[Capture] = []
    if file is not None:
        pcap = Pcap(file)
        takers.append(pcap.capture)
        ctx.reactor.at_turn_end.append(pcap.at_turn_end)
        log.info(f"Saving packet capture to {options.pcap}")
    if log.trace_on:
        from . import trace

        takers.append(trace.capture)

    def capture(to_guest: bool, data: bytes) -> None:
        for take in takers:
            take(to_guest, data)

    if takers:
        link.capture = tap.capture = capture


# Detach ------------------------------------------------------------------------------------------------------------


def _write_pid(file: FileIO | None) -> None:
    if file is None:
        return
    try:
        with file:
            file.write(b"%d\n" % os.getpid())
    except OSError as e:
        raise Fatal(f"PID file write: {e.strerror}") from None


def go_background(pid_file: FileIO | None) -> None:
    """Fork. The parent exits with status 0 once the child has its PID file written and has let go of everything.

    Clients read our standard output and error to their end: nothing of them may stay open in the child.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(writer)
        os._exit(0 if os.read(reader, 1) else 1)
    os.close(reader)
    os.setsid()
    os.chdir("/")
    _write_pid(pid_file)
    log.stop_stderr()
    null = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(null, fd)
    os.close(null)
    os.write(writer, b"\0")
    os.close(writer)


# The end -----------------------------------------------------------------------------------------------------------


class End:
    """Everything that ends the loop, and the exit status that it gives."""

    def __init__(self, ctx: Context, target: Target) -> None:
        self.status = 0
        self._ctx = ctx
        self._init = target.init
        self._terminal: Terminal | None = None  # only looked at where a command shares it
        self._watch: Watch | None = None
        self._timer = -1

    def attend(self, watch: Watch | None) -> None:
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
            for fd in watch.fds:
                reactor.watch(fd, TYPE_NETNS, 0, EPOLLIN)
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
        if self._watch.gone(ref_fd(ref)):
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
