"""The composition root of passt: from parsed options to a running loop, and back to an exit status.

    open      PID and pcap files, the guest's socket by path (or --fd); then inherited descriptors are closed
    read      the host's links, addresses, routes, resolvers; decide what the guest gets
    listen    on the host, as who we were started by: it may be root, who has ports below 1024; become nobody then
    wire      the services, around one Context
    detach    to the background unless in the foreground; into the sandbox (`isolation.py`, `seccomp.py`); PID file: the
              parent exits when nothing is left to do
    run       turn the loop: a guest may connect

Before `detach` every error ends the program with a message and status 1, and the socket's path goes with it. From when
the socket is there, signals that end us wait until the loop can take them: status 0, as at any later time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from . import daemon, daemon_control, isolation, log, seccomp
from .conf import Options
from .core.changes import Changes
from .daemon import End, Sandbox
from .daemon_report import Reports

if TYPE_CHECKING:
    from .core.context import Context
    from .core.stream_link import StreamLink
    from .isolation import Identity
    from .resolv_conf import Follower
    from .tap import Tap


def run(options: Options, inherited: Sequence[int]) -> NoReturn:
    """From options to the end. Raises Fatal, with everything undone, at start."""
    from . import passt

    identity = isolation.choose_identity(options.runas)
    files = daemon.open_files(options, Changes())
    isolation.close_fds(inherited)
    guest = listener = path = None
    with ExitStack() as undo:
        with daemon.signals_held():
            if options.fd is not None:
                guest = passt.inherited(options.fd)
            else:
                listener, path = passt.listen(options.socket_path)
                undo.callback(_remove, path)
            controls = daemon_control.Sockets(options)
            undo.callback(controls.remove)
            ctx, link, tap = build(options, identity, files.names, path)
            controls.serve(ctx)
            end = End(ctx, None)
            daemon.attach_capture(ctx, link, tap, options, files.pcap)
            clients = passt.Clients(ctx, link, tap, listener, end.done if options.one_off else None)
            end.attend()
            reports = Reports(ctx, options)
        gc.collect()
        gc.freeze()
        sandbox = Sandbox(options.mode, not options.foreground, directories=files.names.directories)
        daemon.detach(options, files.pid, sandbox, reports.begin, undo.close)
        undo.pop_all()
    if guest is not None:
        clients.serve(guest)
    daemon.run(ctx, end, reports.end)


def _remove(path: str) -> None:
    with suppress(OSError):  # it may be root's, and we somebody else by now
        os.unlink(path)


def build(options: Options, identity: Identity, names: Follower, path: str | None) -> tuple[Context, StreamLink, Tap]:
    """From the host's configuration to wired services. We are `identity` afterwards."""
    from . import conf_net, conf_summary, listen_sock, wiring  # who we become may not be able to read Python's files
    from .linux import netlink
    from .linux.syscall import CAP_SYS_ADMIN

    seccomp.binding()
    if log.trace_on:
        from . import trace  # noqa: F401
    have_v6 = os.path.exists(daemon.IF_INET6)
    decision = conf_net.decide(options, netlink.read_host(), names.current, have_v6=have_v6)
    daemon.raise_descriptor_limit()
    listen_sock.check_limit(decision.config)
    heir, changing = identity.uid if isolation.opens_as_root(identity) else None, daemon_control.wanted(options)
    host = listen_sock.open_side(decision.config, outbound=False, heir=heir, changing=changing)
    wired = wiring.wire_machine(decision, host)
    daemon.follow_names(wired[0], options, names)
    isolation.become(identity, CAP_SYS_ADMIN)  # not a user namespace, in which root and others would look the same
    isolation.gain_rights()  # before anybody is told that it works
    if path is not None:
        line = conf_summary.describe_socket(path)
        if options.socket_path is not None:
            log.info(line)
        else:
            log.report([line])  # nobody else knows which one it is
    daemon.report(identity, decision, [], background=not options.foreground)
    if path is not None:
        for line in conf_summary.describe_client(path):
            log.info(line)
    return wired
