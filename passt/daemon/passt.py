"""The composition root of passt: from parsed options to a running loop, and to an exit status.

    open      PID and pcap files, the guest's socket by path (or --fd), that of passt-repair; then close inherited
              descriptors
    read      the host's links, addresses, routes, resolvers; decide the guest's configuration
    listen    on the host, with the identity at start: root may bind ports below 1024; then change to `nobody`
    wire      the services, around one Context
    detach    to the background unless --foreground; into the sandbox (`sandbox/isolation.py`, `seccomp.py`); PID file:
              the parent exits when the daemon is ready
    run       run the loop: a guest may connect

Before `detach` every error ends the program with a message and status 1, and removes the socket's path. So do signals
that end the process, with status 0 in the foreground, as at any later time (`signals.py`).
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, NoReturn

from .. import addr, log, seccomp
from ..conf.argv import Options
from ..control import sockets as control_sockets
from ..loop.directories import Changes
from ..migration import helper_socket
from ..sandbox import isolation
from . import common, signals
from .common import End, Files
from .detach import Sandbox, detach
from .reports import Reports
from .supervisor import Supervisor

if TYPE_CHECKING:
    from ..conf.resolv_conf import Follower
    from ..flow.context import Context
    from ..passt import Clients
    from ..sandbox.isolation import Identity
    from ..tcp import Tcp
    from .wiring import Wired


def run(options: Options, fds: Sequence[int]) -> NoReturn:
    """Run the daemon until its end; inherited descriptors `fds` are closed. Raises Fatal if the start fails, with
    everything undone.
    """
    log.step("choose the user to run as")
    identity = isolation.choose_identity(options.runas)
    log.step("open files")
    files = common.open_files(options, Changes())
    log.step("open the descriptor and the socket of the supervisor")
    supervisor = Supervisor(options, os.environ)
    log.step("close inherited descriptors")
    isolation.close_fds(fds)
    try:
        with ExitStack() as undo:
            with signals.raising():
                running = _start(options, identity, files, undo)
            ctx, end, reports, clients, guest = running
            gc.freeze()  # what the start has made stays, and no collection walks over it
            gc.enable()
            sandbox = Sandbox(options.mode, not options.foreground, directories=files.names.directories)
            detach(options, files.pid, sandbox, reports.begin, undo.close)
            undo.pop_all()
    except signals.Ended as e:
        if options.foreground:
            os._exit(0)
        signals.die(e.number)
    supervisor.begin(ctx, time.monotonic())
    if guest is not None:
        clients.serve(guest)
    common.run(ctx, end, partial(supervisor.end, reports.end))


def _start(
    options: Options, identity: Identity, files: Files, undo: ExitStack
) -> tuple[Context, End, Reports, Clients, socket.socket | None]:
    """Open the guest's socket and build everything behind it; `undo` gets what is to be removed after a failure."""
    from .. import passt

    guest = listener = path = None
    log.step("open the socket of the guest")
    with signals.held():
        if options.fd is not None:
            guest = passt.inherited(options.fd, options.fd_name)
        else:
            type_ = socket.SOCK_SEQPACKET if options.packets else socket.SOCK_STREAM
            listener, path = passt.listen(options.socket_path, type_)
            undo.callback(_remove, path)
        log.step("open the control sockets")
        controls = control_sockets.Sockets(options)
        undo.callback(controls.remove)
        log.step("open the socket of passt-repair")
        repair = helper_socket.listen(options, path)
        if repair is not None:
            undo.callback(_remove, repair.path)
    ctx, forwards, tap = build(options, identity, files.names, path)
    log.step("serve the control sockets")
    controls.serve(ctx, forwards)
    log.step("watch for the guest, signals and the end")
    end = End(ctx, None, options.exit_fd)
    assert tap is not None  # a machine has one
    _migrate(options, ctx, tap.tcp, repair, end)
    common.attach_capture(ctx, options, files.pcap)
    clients = passt.Clients(ctx, tap, listener, end.done if options.one_off else None)
    end.start()
    return ctx, end, Reports(ctx, options), clients, guest


def _migrate(options: Options, ctx: Context, tcp: Tcp, repair: helper_socket.Listening | None, end: End) -> None:
    """Let a machine that shares its memory come from another host, and leave for one."""
    if not options.vhost_user:
        return
    from ..link.vhost_user import VhostLink
    from ..migration.helper import Helper
    from ..migration.steps import Migration

    assert isinstance(ctx.link, VhostLink)
    helper = Helper(ctx, repair.sock if repair is not None else None)
    on_end = end.done if options.migrate_exit else None
    Migration(ctx, tcp, ctx.link, helper, linger=not options.migrate_no_linger, on_end=on_end)


def _remove(path: str) -> None:
    with suppress(OSError):  # it may belong to root, and our user may be another by now
        os.unlink(path)


def build(options: Options, identity: Identity, names: Follower, path: str | None) -> Wired:
    """Create the services from the host's configuration. The process runs as `identity` afterwards."""
    log.step("load the program")
    # The user that we become may not be able to read Python's files
    if options.vhost_user:
        from ..migration import steps  # noqa: F401
    from ..conf import summary as conf_summary
    from ..link import choose
    from ..linux import memory
    from ..linux.syscall import CAP_SYS_ADMIN
    from ..ports import sockets as port_sockets
    from . import configure, following, wiring

    if not options.vhost_user:  # which maps memory of a machine, perhaps in huge pages
        memory.no_huge_pages()
    seccomp.binding()
    if log.trace_on:
        from ..link import trace  # noqa: F401
    link = choose.for_machine(vhost_user=options.vhost_user, packets=options.packets)
    decision, tables = configure.decide(options, names)
    owner, changing = identity.uid if isolation.opens_as_root(identity) else None, control_sockets.wanted(options)
    host = port_sockets.open_side(decision.config, outbound=False, owner=owner, changing=changing)
    log.step("set up the services")
    wired = wiring.wire(decision, link, addr.BROADCAST_MAC, None, host, port_sockets.NO_SOCKETS)
    common.follow_names(wired.ctx, options, names)
    following.start(wired.ctx, options, decision, tables, names, wired.forwards)
    log.step("change to the user to run as")
    isolation.become(identity, CAP_SYS_ADMIN)  # without a user namespace, where root would look like any other user
    isolation.gain_rights()  # its errors come before the summary
    log.step("report the configuration")
    if path is not None:
        line = conf_summary.describe_socket(path)
        if options.socket_path is not None:
            log.info(line)
        else:
            log.report([line])  # at any level: the user does not know the default path
    common.report(identity, decision, [], background=not options.foreground)
    if path is not None:
        for line in conf_summary.describe_client(path, vhost_user=options.vhost_user):
            log.info(line)
    return wired
