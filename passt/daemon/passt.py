"""The composition root of passt: from parsed options to a running loop, and to an exit status.

    open      PID and pcap files, the guest's socket by path (or --fd); then close inherited descriptors
    read      the host's links, addresses, routes, resolvers; decide the guest's configuration
    listen    on the host, with the identity at start: root may bind ports below 1024; then change to `nobody`
    wire      the services, around one Context
    detach    to the background unless --foreground; into the sandbox (`sandbox/isolation.py`, `seccomp.py`); PID file:
              the parent exits when the daemon is ready
    run       run the loop: a guest may connect

Before `detach` every error ends the program with a message and status 1, and removes the socket's path. Once the socket
exists, signals that end the process stay blocked until the loop handles them, with status 0 as at any later time.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, NoReturn

from .. import addr, log, seccomp
from ..conf.argv import Options
from ..control import sockets as control_sockets
from ..loop.directories import Changes
from ..sandbox import isolation
from . import common
from .common import End, Sandbox
from .reports import Reports

if TYPE_CHECKING:
    from ..conf.resolv_conf import Follower
    from ..sandbox.isolation import Identity
    from .wiring import Wired


def run(options: Options, inherited: Sequence[int]) -> NoReturn:
    """Run the daemon until its end. Raises Fatal if the start fails, with everything undone."""
    from .. import passt

    identity = isolation.choose_identity(options.runas)
    files = common.open_files(options, Changes())
    isolation.close_fds(inherited)
    guest = listener = path = None
    with ExitStack() as undo:
        with common.signals_held():
            if options.fd is not None:
                guest = passt.inherited(options.fd)
            else:
                listener, path = passt.listen(options.socket_path)
                undo.callback(_remove, path)
            controls = control_sockets.Sockets(options)
            undo.callback(controls.remove)
            ctx, forwards, tap = build(options, identity, files.names, path)
            controls.serve(ctx, forwards)
            end = End(ctx, None)
            assert tap is not None  # a machine has one
            common.attach_capture(ctx, options, files.pcap)
            clients = passt.Clients(ctx, tap, listener, end.done if options.one_off else None)
            end.start()
            reports = Reports(ctx, options)
        gc.collect()
        gc.freeze()
        sandbox = Sandbox(options.mode, not options.foreground, directories=files.names.directories)
        common.detach(options, files.pid, sandbox, reports.begin, undo.close)
        undo.pop_all()
    if guest is not None:
        clients.serve(guest)
    common.run(ctx, end, reports.end)


def _remove(path: str) -> None:
    with suppress(OSError):  # it may belong to root, and our user may be another by now
        os.unlink(path)


def build(options: Options, identity: Identity, names: Follower, path: str | None) -> Wired:
    """Create the services from the host's configuration. The process runs as `identity` afterwards."""
    # The user that we become may not be able to read Python's files
    from ..conf import decide as conf_decide
    from ..conf import summary as conf_summary
    from ..link import choose
    from ..linux import netlink
    from ..linux.syscall import CAP_SYS_ADMIN
    from ..ports import sockets as port_sockets
    from . import wiring

    seccomp.binding()
    if log.trace_on:
        from ..link import trace  # noqa: F401
    have_v6 = os.path.exists(common.IF_INET6)
    decision = conf_decide.decide(options, netlink.read_host(), names.current, have_v6=have_v6)
    common.raise_descriptor_limit()
    port_sockets.check_limit(decision.config)
    owner, changing = identity.uid if isolation.opens_as_root(identity) else None, control_sockets.wanted(options)
    host = port_sockets.open_side(decision.config, outbound=False, owner=owner, changing=changing)
    wired = wiring.wire(decision, choose.for_machine(), addr.BROADCAST_MAC, None, host, port_sockets.NO_SOCKETS)
    common.follow_names(wired.ctx, options, names)
    isolation.become(identity, CAP_SYS_ADMIN)  # without a user namespace, where root would look like any other user
    isolation.gain_rights()  # its errors come before the summary
    if path is not None:
        line = conf_summary.describe_socket(path)
        if options.socket_path is not None:
            log.info(line)
        else:
            log.report([line])  # at any level: the user does not know the default path
    common.report(identity, decision, [], background=not options.foreground)
    if path is not None:
        for line in conf_summary.describe_client(path):
            log.info(line)
    return wired
