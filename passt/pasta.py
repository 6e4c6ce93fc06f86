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
the new device (`Interface`). This needs CAP_NET_ADMIN there.

End of the namespace: one bound to a file is watched by inotify (deletion in its directory), one under /proc by a pidfd
of its process. If neither is possible, the path is checked once per second, from its directory.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from . import PASTA, log
from .calls import calls
from .linux import inotify, netlink, netns, proc, tun
from .linux.inotify import Event
from .linux.routes import NsPlan
from .linux.syscall import (
    CLONE_NEWNET,
    CLONE_NEWUSER,
    PR_SET_CHILD_SUBREAPER,
    prctl,
)
from .log import Fatal
from .loop.directories import Changes
from .namespace import init as namespace_init
from .namespace import supervisor
from .namespace.init import Command
from .sandbox import isolation
from .sandbox.isolation import Identity

T = TypeVar("T")

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
    if not proc.exists(int(name)):
        raise Fatal(f"Couldn't open network namespace {path}: there is none, and no process {name} either")
    return int(name), path


def open_target(pid: int | None, path: str, userns_path: str | None, *, netns_only: bool) -> Target:
    """Open the namespaces of a PID, or else those at two paths, of which the latter may not be needed. Raises Fatal."""
    if pid is not None:
        if not proc.exists(pid):
            raise Fatal(f"Couldn't find process {pid}: there is no such PID")
        path = f"/proc/{pid}/ns/net"
        if userns_path is None and not netns_only:
            userns_path = f"/proc/{pid}/ns/user"
    net = _open("network", path)
    user = _open("user", userns_path) if userns_path else None
    return Target(net, user, os.path.abspath(path))


def _open(kind: str, path: str) -> int:
    try:
        return netns.open_ns(path, CLONE_NEWNET if kind == "network" else CLONE_NEWUSER)
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
        raise Fatal(
            f"Couldn't join user namespace: {os.strerror(e.errno or 0)} (you must own it, or be root)"
        ) from None


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
        report.send(f"Couldn't create namespaces: {os.strerror(e.errno or 0)} ({isolation.namespace_hint(e)})".encode())
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
        raise Fatal(e.strerror) from None


@dataclass(slots=True)
class Interface:
    """The tap inside, and the means to create it again."""

    device: tun.Tap
    mac: bytes
    problems: list[str]  # failed steps of the set-up
    netlink: netlink.Rtnetlink | None  # None: the tap was inherited, and cannot be created again
    plan: NsPlan

    def recreate(self) -> None:
        """Create it again after a deletion, with the same descriptor. Raises OSError naming the step."""
        assert self.netlink is not None
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


def inherit_tap(target: Target, fd: int, plan: NsPlan) -> Interface:
    """The tap device that is open as `fd`, set up if its namespace is known. Raises Fatal."""
    try:
        tap, mac = tun.inherited_tap(fd)
    except OSError as e:
        raise Fatal(f"Invalid --fd: {fd} ({e.strerror})") from None
    interface = Interface(tap, mac, [], None, replace(plan, mac=mac, ifname=tap.ifname))
    if target.netns < 0:
        return interface

    def configure() -> Interface:
        if tap.ifname not in (name for _, name in socket.if_nameindex()):
            raise OSError(errno.ENODEV, f"Invalid --fd: {fd} (its interface {tap.ifname} is not in {target.path})")
        with netlink.Rtnetlink() as nl:
            mac, problems = netlink.configure(nl, replace(plan, ifname=tap.ifname))
        return replace(interface, mac=mac, problems=problems, plan=replace(interface.plan, mac=mac))

    return inside(target, configure)


# Watching ----------------------------------------------------------------------------------------------------------


class Watch:
    """Detects the deletion of a namespace's file. It is created before the sandbox; `gone` checks later.

    `pidfd` is readable at the end of the process. `changes` reports a deleted file, if `in_directory`. With `poll` the
    caller must call `gone` periodically as well, which uses `directories` (descriptors, none without `poll`), since
    paths cannot be opened in the sandbox.
    """

    def __init__(self, path: str, changes: Changes) -> None:
        self.path = path
        self.changes = changes
        self.pidfd = -1
        self.poll = False
        self._watch = self._directory = -1
        pid = proc.pid_of_path(path)
        if pid is not None:
            self._watch_process(pid)
        if pid is None or not self._below_ns(path):
            self._watch_directory()
        if self.poll:
            self._open_directory()

    @staticmethod
    def _below_ns(path: str) -> bool:
        """/proc/PID/ns/* ends with its process and not before."""
        return path.split("/")[3] == "ns"

    def _watch_process(self, pid: int) -> None:
        try:
            self.pidfd = os.pidfd_open(pid)
        except OSError as e:
            log.debug(f"Polling {self.path}: {e}")
            self.poll = True

    def _watch_directory(self) -> None:
        if stat.S_ISLNK(os.lstat(self.path).st_mode) and self.path.startswith("/proc/"):
            log.debug(f"{self.path} is a descriptor: it cannot be watched")
            return
        try:
            self._watch = self.changes.watch(os.path.dirname(self.path), inotify.DELETE)
        except OSError as e:
            log.debug(f"Polling {self.path}: {e}")
            self.poll = True

    def _open_directory(self) -> None:
        try:
            self._directory = os.open(os.path.dirname(self.path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as e:
            self.poll = False
            log.warn(f"The end of {self.path} will not be noticed: {e.strerror}")

    @property
    def directories(self) -> tuple[int, ...]:
        return (self._directory,) if self._directory >= 0 else ()

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.path if self.path.startswith("/proc/") else os.path.basename(self.path)

    @property
    def in_directory(self) -> bool:
        """Whether `changes` reports a deletion."""
        return self._watch >= 0

    def deleted(self, found: Sequence[Event]) -> bool:
        """Whether the file's deletion is among the events `found`."""
        name = os.path.basename(self.path)
        return any((e.watch, e.name) == (self._watch, name) and e.mask & inotify.DELETE for e in found)

    def gone(self) -> bool:
        """Whether the file does not exist any more."""
        path, directory = self.path, None
        if self._directory >= 0:
            path, directory = os.path.basename(path), self._directory
        try:
            os.close(os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=directory))
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError:
            return False  # it exists, but may not be opened
        return False
