"""The composition root of pasta: from parsed options to a running loop, and to an exit status.

    open      namespaces, PID, log and pcap files by path; then close inherited descriptors
    spawn     (no namespace given) a namespace with a process in it that waits
    read      the host's links, addresses, routes, resolvers; decide the guest's configuration
    listen    on the host, with the identity at start: root may bind ports below 1024
    create    the tap, inside; listen there, too; change from root to `nobody`
    wire      the services, around one Context; listen on automatic ports that are bound already
    detach    to the background unless --foreground; into the sandbox (`sandbox/isolation.py`, `seccomp.py`); PID file:
              the parent exits when the daemon is ready
    run       let the command start, and run the loop

Before `detach` every error ends the program with a message and status 1, and undoes the set-up. Slow imports come after
`spawn`, while the other process prepares its namespace.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from .. import addr, log, seccomp
from ..conf.argv import Options
from ..control import sockets as control_sockets
from ..lean.records import replace
from ..linux import netns
from ..linux.netns import Namespace
from ..loop.directories import Changes
from ..sandbox import isolation
from ..sandbox.isolation import Identity
from . import common
from .common import End, Files
from .detach import Sandbox, detach
from .reports import Reports
from .supervisor import Supervisor

if TYPE_CHECKING:
    from ..conf.resolv_conf import Follower
    from ..flow.context import Context
    from ..linux.inherited import Inherited
    from ..linux.routes import NsPlan
    from ..namespace.watch import Watch
    from ..pasta import Interface, Target
    from .wiring import Wired


def run(options: Options, caller: Inherited, fds: Sequence[int]) -> NoReturn:
    """Run the daemon until its end. The command gets what `caller` has; inherited descriptors `fds` are closed. Raises
    Fatal if the start fails, with everything undone.
    """
    joins = options.pid is not None or options.netns is not None
    log.step("choose the user to run as")
    identity = isolation.choose_identity(options.runas, joins=joins)
    log.step("open the descriptor and the socket of the supervisor")
    supervisor = Supervisor(options, os.environ, command=not joins and not options.no_namespace)
    target, watch, files = open_all(options, caller, identity, fds)
    controls = None
    try:
        log.step("open the control sockets")
        controls = control_sockets.Sockets(options)
        (ctx, forwards, _), interface = build(options, target, identity, files.names)
        log.step("serve the control sockets")
        controls.serve(ctx, forwards)
        log.step("watch for the end")
        end = End(ctx, target.init, options.exit_fd)
        over_host = netns.rights_reach()
        if interface is not None:
            ctx.link.on_gone = partial(_when_gone(options, over_host), ctx, interface, end)
            if over_host:
                interface.keep_no_netlink(read=options.follow_link)
            log.step("start the capture")
            common.attach_capture(ctx, options, files.pcap)
        log.step("handle signals, and watch for the end")
        end.start(watch)  # a reader of the PID file may send a signal at once
        reports = Reports(ctx, options)
        gc.freeze()  # what the start has made stays, and no collection walks over it
        gc.enable()
        sandbox = Sandbox(
            options.mode,
            background=target.init is None and not options.foreground,
            capabilities=isolation.running_capabilities(
                own_tap=interface is not None and options.fd is None, over_host=over_host
            ),
            namespace=ctx.ns.namespace if ctx.ns is not None else None,
            directories=(*files.names.directories, *(watch.directories if watch is not None else ())),
        )
        detach(options, files.pid, sandbox, reports.begin, controls.remove)
    except BaseException:
        if controls is not None:
            controls.remove()
        if target.init is not None:
            target.init.abandon()
        raise
    supervisor.begin(ctx, time.monotonic())
    if target.init is not None:
        if not log.debug_on:
            log.quiet_stderr()  # the terminal is the command's now
        target.init.start()
    common.run(ctx, end, partial(supervisor.end, reports.end))


def open_all(
    options: Options, caller: Inherited, identity: Identity, fds: Sequence[int]
) -> tuple[Target, Watch | None, Files]:
    """Open all files that the command line names, and the namespace, or spawn a namespace."""
    from .. import pasta
    from ..linux import memory
    from ..namespace import init as namespace_init
    from ..namespace import pin
    from ..namespace.watch import Watch

    log.step("open the namespace")
    target = watch = None
    changes = Changes()
    if options.pid is not None or options.netns is not None:
        pid, path = options.pid, ""
        if options.netns is not None:
            pid, path = pasta.find(options.netns, options.nsrun_dir)
        target = pasta.open_target(pid, path, options.userns, netns_only=options.netns_only)
        pasta.check_foreign(target)
        if target.path and options.netns_quit:
            watch = Watch(target.path, changes)
    log.step("open files")
    files = common.open_files(options, changes)
    log.step("close inherited descriptors")
    isolation.close_fds(fds)
    log.step("create namespaces")
    if target is None and options.no_namespace:
        target = pasta.Target(-1, None)
    elif target is None:
        argv = options.command
        command = namespace_init.Command(argv[0], argv, caller) if argv else namespace_init.login_shell(caller)
        target = pasta.spawn(command, identity, options.userns, options.netns_only)
    pin.release()
    memory.no_huge_pages()  # the command, which was started before, has them
    return target, watch, files


def build(options: Options, target: Target, identity: Identity, names: Follower) -> tuple[Wired, Interface | None]:
    """Create the services from the host's configuration; no interface with --splice-only. The process runs as
    `identity` afterwards.
    """
    log.step("load the program")
    # Includes the imports of `report` and `wire`: the user that we become may not be able to read Python's files
    from .. import pasta
    from ..conf import summary as conf_summary  # noqa: F401
    from ..link import choose
    from ..ports import sockets as port_sockets
    from . import configure, following, wiring

    seccomp.binding()
    if log.trace_on:
        from ..link import trace  # noqa: F401
    decision, tables = configure.decide(options, names)
    config, plan = decision.config, decision.plan
    assert plan is not None, "pasta has a plan for every namespace"
    changing = control_sockets.wanted(options)
    root = isolation.opens_as_root(identity)
    owner = identity.uid if root else None
    host = port_sockets.open_side(config, outbound=False, owner=owner, changing=changing)
    log.step("change to the user to run as")
    if not root:
        isolation.become(identity)
        pasta.join_userns(target)
    log.step("create the tap device")
    interface = _open_tap(options, target, plan)
    link = None
    if interface:
        link = choose.for_device(interface.device)
        decision = replace(decision, plan=interface.plan)
    log.step("open sockets in the namespace")
    ns = port_sockets.NO_SOCKETS
    if (changing and target.netns >= 0) or any(rule.outbound or rule.auto for rule in config.forwards):
        open_side = partial(port_sockets.open_side, config, outbound=True, owner=owner, changing=changing)
        ns = pasta.inside(target, open_side)
    log.step("change to the user to run as")
    if root:
        entered_later = target.netns >= 0 and target.init is None
        isolation.become(identity, *(isolation.KEPT_CAPABILITIES if entered_later else ()))
        if target.init is not None and identity.uid != 0:
            pasta.join_userns(target)  # regains the rights over our own child's namespace
    log.step("set up the services")
    problems = interface.problems if interface else []
    spawned = target.init is not None
    quiet, background = spawned and not log.debug_on, not spawned and not options.foreground
    common.report(identity, decision, problems, quiet=quiet, background=background)
    namespace = Namespace(target.netns) if target.netns >= 0 else None
    wired = wiring.wire(decision, link, interface.mac if interface else addr.BROADCAST_MAC, namespace, host, ns)
    common.follow_names(wired.ctx, options, names)
    following.start(wired.ctx, options, decision, tables, names, wired.forwards, interface)
    if target.userns is not None:
        os.close(target.userns)
    return wired, interface


def _open_tap(options: Options, target: Target, plan: NsPlan) -> Interface | None:
    """Create and configure the tap; with --splice-only, only bring up the loopback interface."""
    from .. import pasta
    from ..linux import netlink

    if options.fd is not None:
        return pasta.inherit_tap(target, options.fd, plan, options.fd_name)
    if options.splice_only:
        pasta.inside(target, netlink.loopback_up)
        return None
    return pasta.create_tap(target, plan)


def _when_gone(options: Options, over_host: bool) -> Callable[[Context, Interface, End, str], None]:
    """The consequence of a deletion of the tap."""
    if options.fd is not None:
        return tap_gone
    return tap_lost if over_host else reopen


def tap_gone(ctx: Context, interface: Interface, end: End, why: str) -> None:
    """The tap passed by --fd was deleted: end, since there is no guest any more."""
    log.info(f"Interface {interface.plan.ifname} was deleted, exiting")
    end.done()


def tap_lost(ctx: Context, interface: Interface, end: End, why: str) -> None:
    """The tap was deleted, and the right to create another was given up, as it was one over the host's network."""
    ctx.link.unwatch()
    reason = "pasta that root starts for a namespace keeps no right to do so"
    end.failed(f"Interface {interface.plan.ifname} was deleted and can't be created again, exiting: {reason}")


def reopen(ctx: Context, interface: Interface, end: End, why: str) -> None:
    """The tap was deleted: create it again under the same descriptor; if that fails, end the program."""
    name = interface.plan.ifname
    log.warn_ratelimited("tap", f"Interface {name} was deleted: creating it again", time.monotonic())
    ctx.link.unwatch()
    try:
        interface.recreate()
    except OSError as e:
        end.failed(f"Interface {name} was deleted and can't be created again, exiting: {e.strerror}")
        return
    for problem in interface.problems:
        log.warn_ratelimited(problem, problem, time.monotonic())
    ctx.link.watch()
    ctx.neighbours.link_up(time.monotonic())
