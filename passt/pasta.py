"""The namespace to connect: a new one with a command in it, that of a PID, or one given by path or name.

Each results in a `Target`: a descriptor of the network namespace, one of the user namespace that gives rights in it,
and the object whose end is the namespace's end. Spawning creates a child and then attaches to its namespace.

    process          rights to enter the network namespace                afterwards
    ---------------  ---------------------------------------------------  --------------------------------------------
    ordinary user    of the user namespace, which it joins first          stays in the user namespace
    root             of root                                              becomes `nobody` (--runas), joins the user
                                                                          namespace of its own child, if any

A thread that enters the namespace does all work inside: creating the tap, opening sockets (`linux/netns.py`).

A deleted tap is created again, with its configuration, when the process can neither enter a namespace nor open a file
any more: its descriptor stays in the namespace that it was opened in, and so does the netlink socket that configures
the new device (`Interface`). This needs CAP_NET_ADMIN there, which pasta keeps only if it is no right over the host's
network; otherwise the end of the tap is the end of the program.

The end of the namespace of others is noticed by `namespace/watch.py`.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from . import PASTA, log
from .calls import calls
from .lean.records import dataclass, replace
from .linux import netlink, netns, proc, tun
from .linux.routes import NsPlan
from .linux.syscall import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    PR_SET_CHILD_SUBREAPER,
    prctl,
)
from .log import Fatal, StepError
from .namespace import init as namespace_init
from .namespace import pin, supervisor
from .namespace.init import Command
from .sandbox import isolation
from .sandbox.isolation import Identity

if TYPE_CHECKING:
    from .linux.netlink import Rtnetlink

T = TypeVar("T")

RECREATE_TIME = 0.5  # s of processor time, in which the loop stands still

CALLS = (
    *calls("wait4", "write", mode=PASTA),  # of the command
)


class Init:
    """The interface of pasta to the first process of a spawned namespace (`namespace/init.py`)."""

    def __init__(self, pid: int, control: int) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self._control = control

    def start(self) -> None:
        """The network is ready: start the command."""
        self._write(supervisor.START)

    def signal(self, number: int) -> None:
        """Send the command a signal."""
        self._write(number)

    def _write(self, value: int) -> None:
        try:
            os.write(self._control, bytes((value,)))
        except BrokenPipeError:
            pass  # it has just ended, and its exit status follows

    def wait(self) -> int:
        """Wait for the end of the command; returns its status in shell convention."""
        _, status = os.waitpid(self.pid, 0)
        return supervisor.shell_status(status)

    def abandon(self) -> None:
        """The start failed: end the namespace and its processes, and wait for it."""
        os.close(self._control)
        os.waitpid(self.pid, 0)


@dataclass(slots=True)
class Target:
    """The namespaces to work in. They are unknown (`netns` is -1) for an inherited tap device (--fd alone)."""

    netns: int
    userns: int | None  # gives rights over `netns`; None: no other rights are needed or available
    path: str | None = None  # the file whose deletion is the end of the namespace
    init: Init | None = None  # first process of a spawned namespace


# Attaching ---------------------------------------------------------------------------------------------------------


def find(name: str, run_dir: str) -> tuple[int | None, str]:
    """The value of --netns NAME|PATH: a PID, or a path. Raises Fatal.

    A number that is not the name of a namespace is a PID, as in the script that replaces slirp4netns(1).
    """
    path = netns.path_of(name, run_dir)
    if not (name.isascii() and name.isdecimal()) or os.path.lexists(path):
        return None, path
    if not pin.has(f"/proc/{int(name)}/ns/net") and not proc.exists(int(name)):
        raise Fatal(f"Couldn't open network namespace {path}: there is none, and no process {name} either")
    return int(name), path


def open_target(pid: int | None, path: str, userns_path: str | None, *, netns_only: bool) -> Target:
    """Open the namespaces of a PID, or else those at two paths, of which the latter may not be needed. Raises Fatal."""
    if pid is not None:
        path = f"/proc/{pid}/ns/net"
        if not pin.has(path) and not proc.exists(pid):
            raise Fatal(f"Couldn't find process {pid}: there is no such PID")
        if userns_path is None and not netns_only:
            userns_path = f"/proc/{pid}/ns/user"
    net = _open("network", path)
    user = _open("user", userns_path) if userns_path else None
    return Target(net, user, os.path.abspath(path))


def _open(kind: str, path: str) -> int:
    try:
        return netns.open_ns(pin.open_path(path), CLONE_NEWNET if kind == "network" else CLONE_NEWUSER)
    except OSError as e:
        hint = f" ({_owner(path)}you must own it, or be root)" if e.errno in (errno.EACCES, errno.EPERM) else ""
        raise Fatal(f"Couldn't open {kind} namespace {path}: {e.strerror}{hint}") from None


def _owner(path: str) -> str:
    """The process of the namespace `path` under /proc, which reveals a mistyped PID."""
    pid = proc.pid_of_path(path)
    return "" if pid is None else f"{proc.describe(pid)}: "


def check_foreign(target: Target) -> None:
    """Raise Fatal for our own network namespace: its addresses and routes, copied into itself, would break it."""
    if netns.same_ns(target.netns, "/proc/self/ns/net"):
        raise Fatal(f"{target.path} is the network namespace that pasta runs in: give another one")


def join_userns(target: Target) -> None:
    """Enter the user namespace of `target`, unless it is the current one. Raises Fatal."""
    if target.userns is None or netns.same_ns(target.userns, "/proc/self/ns/user"):
        return
    try:
        isolation.join_userns(target.userns)
    except OSError as e:
        raise Fatal(f"Couldn't join user namespace: {log.why(e)} (you must own it, or be root)") from None


# Spawning ----------------------------------------------------------------------------------------------------------


def spawn(command: Command, identity: Identity, userns_path: str | None, netns_only: bool) -> Target:
    """Create namespaces with a process in them that waits to start `command`. Raises Fatal."""
    join = _open("user", userns_path) if userns_path else None
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    control_reader, control = os.pipe2(os.O_CLOEXEC)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        ours.close()
        os.close(control)
        _helper(command, identity, join, not netns_only and join is None, theirs, control_reader)
    theirs.close()
    os.close(control_reader)
    message, fds, _, _ = socket.recv_fds(ours, 4096, 2)
    ours.close()
    os.waitpid(pid, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 0)
    if not fds:
        raise Fatal(message.decode() or "Failed to create namespaces: the helper process died")
    user, net = fds
    if join is not None:
        os.close(join)
    return Target(net, None if netns_only else user, init=Init(int(message), control))


def _helper(
    command: Command, identity: Identity, join: int | None, new_userns: bool, report: socket.socket, control: int
) -> None:
    """The forked helper: report descriptors, or an error, and end."""
    try:
        isolation.become(identity)
        if join is not None:
            isolation.join_userns(join)
        namespace_init.helper(new_userns, lambda: isolation.map_ids(identity), command, report, control)
    except Fatal as e:
        report.send(str(e).encode())
    except OSError as e:
        report.send(f"Couldn't create namespaces: {log.why(e)} ({isolation.namespace_hint(e)})".encode())
    finally:
        os._exit(0)


# Inside ------------------------------------------------------------------------------------------------------------


def inside(target: Target, function: Callable[[], T]) -> T:
    """Run function() in the network namespace of `target`, by a thread. Raises Fatal."""
    try:
        return netns.run_in(target.netns, function)
    except netns.NoEntry as e:
        raise Fatal(f"Couldn't enter the network namespace: {e.strerror} (give its --userns, or be root)") from None
    except OSError as e:
        raise Fatal(log.failure(e)) from None


@dataclass(slots=True)
class Interface:
    """The tap inside, and the means to create it again."""

    device: tun.Tap
    mac: bytes
    problems: list[str]  # failed steps of the set-up
    netlink: Rtnetlink | None  # None: the tap was inherited, or may not be created again
    plan: NsPlan
    reader: Rtnetlink | None = None  # tells how the interface is, where we have no right to change it

    def keep_no_netlink(self, *, read: bool) -> None:
        """The interface is not going to be created again: close the socket that configures it, or only `read` by it."""
        if self.netlink is not None:
            if read:
                self.reader = self.netlink
            else:
                self.netlink.close()
            self.netlink = None

    def recreate(self) -> None:
        """Create it again after a deletion, with the same descriptor. Raises OSError naming the step."""
        assert self.netlink is not None
        self.netlink.limit(RECREATE_TIME)
        self.device = tun.attach(self.device.fd, self.plan.ifname)
        _, self.problems = netlink.configure(self.netlink, self.plan)


def create_tap(target: Target, plan: NsPlan) -> Interface:
    """Create and set up the tap inside. Raises Fatal."""

    def create() -> Interface:
        tap = tun.open_tap(plan.ifname)
        nl = None
        try:
            nl = netlink.Rtnetlink()
            mac, problems = netlink.configure(nl, plan)
        except BaseException:
            os.close(tap.fd)
            if nl is not None:
                nl.close()
            raise
        return Interface(tap, mac, problems, nl, replace(plan, mac=mac))

    return inside(target, create)


def inherit_tap(target: Target, fd: int, plan: NsPlan, name: int | None = None) -> Interface:
    """The tap device that is open as `fd`, for messages as `name`, set up if its namespace is known. Raises Fatal."""
    name = fd if name is None else name
    try:
        tap, mac = tun.inherited_tap(fd)
    except OSError as e:
        raise Fatal(f"Invalid --fd: {name} ({e.strerror})") from None
    interface = Interface(tap, mac, [], None, replace(plan, mac=mac, ifname=tap.ifname))
    if target.netns < 0:
        return interface

    def configure() -> Interface:
        if tap.ifname not in (name for _, name in socket.if_nameindex()):
            raise StepError(errno.ENODEV, f"Invalid --fd: {name} (its interface {tap.ifname} is not in {target.path})")
        with netlink.Rtnetlink() as nl:
            mac, problems = netlink.configure(nl, replace(plan, ifname=tap.ifname))
        return replace(interface, mac=mac, problems=problems, plan=replace(interface.plan, mac=mac))

    return inside(target, configure)
