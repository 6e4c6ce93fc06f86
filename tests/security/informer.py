"""The program itself, in its own sandbox, with handlers that report each call.

Each line of standard input asks for a run, to its end: WAY, VICTIM, path of resolv.conf, pasta or passt, OPTION...,
between tabs. The filter is unchanged: reports go to standard output by write(2), a line each.

    @ PID          it begins
    + NAME         a handler is known: registered with the loop or a timer, or recognised by its name
    *              the filter is in force
    - NAME         a handler came back, in the sandbox
    ! NAME: WHY    it raised what no handler may
    = STATUS       it has ended, as os.waitstatus_to_exitcode() has it

A handler is a function that the program registers, or a method with the name of one (`*_handler`), or one in CALLED.
VICTIM is a handler that is made to call getppid(2), which no module declares: if it is empty, no module is imported
before the program does so. WAY changes the circumstances:

    "faulty"    each handler of events and each timer's callback fails the first time, in the sandbox
    "starved"   there are no descriptors left but a few, from when the filter is in force
    "polling"   the kernel has no pidfd_open(2), so the end of a namespace is looked for
    "given"     there is a tap device of another program, without a vnet header, in the namespace of process OPTION, the
                last one, as descriptor GIVEN_TAP

Time runs SPEED times as fast, so that minutes of idleness are over in the middle of a test.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import socket
import sys
import threading  # noqa: F401  # keeps the clock that it was imported with
import time
from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, NoReturn

from passt import __main__, seccomp
from passt.conf import resolv_conf
from passt.linux import netns, syscall, tun
from passt.loop import directories, reactor, timers

SPEED = 50
DESCRIPTORS = 3  # left in a "starved" run
OUTPUT = 1
GIVEN_TAP = 100
CALLED = frozenset(
    (
        "passt.conf.names.follow",  # by resolv_conf.Follower
        "passt.link.plain_tap.PlainLink.send_payload",  # in the place of the link that all other ways have
        "passt.daemon.pasta.reopen",  # by the link
        "passt.daemon.pasta.tap_gone",  # likewise
        "passt.daemon.pasta.tap_lost",  # likewise
        "passt.passt.Clients.gone",  # by its link
        "passt.ports.scan.Scanner.start",  # by forwards
    )
)
# A datagram has to arrive between bind(2) and connect(2) of a socket for this one to be armed
ARMED_BY_CHANCE = "passt.ports.udp_in.UdpIn._deliver_misdelivered"

FAULTY = "faulty", "sharing, faulty"

Function = Callable[..., Any]


class Staged(Exception):
    """The fault of a handler that has none."""


def name_of(function: Function) -> str:
    """Module and qualified name of what is called in the end."""
    while isinstance(function, partial):
        function = function.func
    if hasattr(function, "informs"):
        return str(function.informs)
    module = function.__module__ or type(getattr(function, "__self__", None)).__module__  # of a compiled method
    return f"{module}.{function.__qualname__}"


class Informer:
    """Knows all handlers: those that are registered, which it takes out of the tables of the loop and puts back
    wrapped, and methods that others call, in modules that Python interprets.
    """

    def __init__(self, way: str, victim: str) -> None:
        self._way, self._victim = way, victim
        self._locked = False
        self._told: set[str] = set()
        self._registered: set[str] = set()
        self._to_fail: set[str] = set()

    def tell(self, line: str) -> None:
        """Once for each line."""
        if line not in self._told:
            self._told.add(line)
            os.write(OUTPUT, f"{line}\n".encode())

    def wrap(self, function: Function, *, registered: bool = True, fails: bool = False) -> Function:
        """`function`, which tells what it does."""
        name = name_of(function)
        if registered:
            self._registered.add(name)
        if fails and self._way in FAULTY:
            self._to_fail.add(name)
        if hasattr(function, "informs"):
            return function
        self.tell(f"+ {name}")

        def informing(*args: Any) -> Any:
            if not self._locked:
                return function(*args)
            if name == self._victim:
                os.getppid()
            if name in self._to_fail:
                self._to_fail.remove(name)
                raise Staged(name)
            try:
                return function(*args)
            except Exception as e:
                if name in self._registered and not isinstance(e, Staged):
                    self.tell(f"! {name}: {e!r}")
                raise
            finally:
                self.tell(f"- {name}")
                self._look_again()

        informing.informs = name  # type: ignore[attr-defined]
        return informing

    # Where handlers are made known -----------------------------------------------------------------------------------

    def listen(self) -> None:
        """Before the program begins."""
        tell, binding, load = directories.Changes.tell, seccomp.binding, seccomp.load

        def subscribe(changes: Any, loop: Any, taker: Function) -> None:
            tell(changes, loop, self.wrap(taker))

        def bind() -> Any:
            seccomp.binding = binding
            self._before_services()
            return binding()

        def lock(rules: Any) -> None:
            self._before_lock()
            load(rules)
            self._locked = True
            self._arm_by_chance()
            self.tell("*")

        directories.Changes.tell = subscribe  # type: ignore[method-assign, assignment]
        seccomp.binding, seccomp.load = bind, lock

    def _before_services(self) -> None:
        """The program is loaded."""
        wiring: Any = sys.modules["passt.daemon.wiring"]
        wire = wiring.wire

        def wire_and_keep(*args: Any) -> Any:
            self._wrap_methods()
            sys.modules["passt.ndp"].RA_INTERVAL = 20, 40  # type: ignore[attr-defined]  # s: or we would have to wait
            wired = wire(*args)
            self._loop, self._pool = wired.ctx.reactor, wired.ctx.timers
            return wired

        wiring.wire = wire_and_keep

    def _wrap_methods(self) -> None:
        """Those that are known by their names, where a caller finds what replaces them: compiled ones are called
        without a look at their class.
        """
        for module in [module for name, module in sys.modules.items() if name.startswith("passt.")]:
            owners = [o for o in vars(module).values() if isinstance(o, type) and o.__module__ == module.__name__]
            for owner in (module, *owners):
                for name, function in list(vars(owner).items()):
                    known = name.endswith("_handler") or f"{module.__name__}.{_path(owner, name)}" in CALLED
                    if isinstance(function, FunctionType) and known and not getattr(owner, "_is_protocol", False):
                        setattr(owner, name, self.wrap(function, registered=False))

    def _before_lock(self) -> None:
        loop, pool = self._loop, self._pool
        self._look_again()
        loop._signals.update({number: self.wrap(callback) for number, callback in loop._signals.items()})
        pool.callback = self.wrap(pool.callback, fails=True)
        faults = loop.on_fault.args[0]
        faults.update({kind: self.wrap(fault, registered=False) for kind, fault in faults.items()})
        if self._way == "starved":
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + DESCRIPTORS, free + DESCRIPTORS))

    def _look_again(self) -> None:
        """Take what was registered since the last time: all that registers is started by a handler."""
        loop = self._loop
        self._take(loop._handlers, fails=True)
        self._take(self._pool.services._callbacks, fails=True)
        for callbacks in (loop.at_turn_end, loop._put_off, loop._next_turn):
            self._take(callbacks, registered=False)

    def _take(self, table: list[Function], *, registered: bool = True, fails: bool = False) -> None:
        for i, function in enumerate(table):
            known = hasattr(function, "informs") and (not registered or name_of(function) in self._registered)
            if not known and function is not reactor._unhandled:
                table[i] = self.wrap(function, registered=registered, fails=fails)

    def _arm_by_chance(self) -> None:
        services = self._pool.services
        for fd, ref in enumerate(self._loop._refs):
            if ref >> 56 == reactor.TYPE_TIMER and name_of(services._callbacks[ref & 0xFFFFFFFF]) == ARMED_BY_CHANCE:
                services.arm(fd, time.monotonic())


def _path(owner: Any, name: str) -> str:
    return f"{owner.__qualname__}.{name}" if isinstance(owner, type) else name


def hurry() -> None:
    """Let time run faster from now on."""
    real, settime, begin = time.monotonic, syscall.timerfd_settime, time.monotonic()

    def fast_settime(fd: int, deadline: float) -> None:
        settime(fd, begin + (deadline - begin) / SPEED if deadline else 0)

    time.monotonic = lambda: begin + (real() - begin) * SPEED
    timers.timerfd_settime = fast_settime  # type: ignore[attr-defined]
    netns._GONE_TIMEOUT *= SPEED  # in seconds of that clock


def no_pidfd(pid: int, flags: int = 0) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def give_tap(pid: str) -> None:
    """Make a tap device in the namespaces of process `pid`, by a child that goes there."""
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        for kind in ("user", "net"):
            syscall.setns(os.open(f"/proc/{pid}/ns/{kind}", os.O_RDONLY))
        fd = os.open(tun.TUN_DEVICE, os.O_RDWR)
        fcntl.ioctl(fd, tun.TUNSETIFF, tun._IFREQ.pack(b"tap0", tun.IFF_TAP | tun.IFF_NO_PI))
        socket.send_fds(theirs, [b"."], [fd])
        os._exit(0)
    theirs.close()
    fd = socket.recv_fds(ours, 1, 1)[1][0]
    os.wait()
    os.dup2(fd, GIVEN_TAP)
    ours.close()
    os.close(fd)


def run(way: str, victim: str, names: str, argv: list[str]) -> NoReturn:
    """Does not come back."""
    if way == "polling":
        os.pidfd_open = no_pidfd
    if way == "given":
        give_tap(argv[-1])
    resolv_conf.RESOLV_CONF = names
    hurry()
    Informer(way, victim).listen()
    sys.exit(__main__.main(argv))


def main() -> None:
    for request in sys.stdin:
        way, victim, names, *argv = request.rstrip("\n").split("\t")
        if victim:
            from passt.daemon import seccomp_table  # noqa: F401  # for them it need not be found out what is imported when
        pid = os.fork()
        if pid == 0:
            run(way, victim, names, argv)
        os.write(OUTPUT, b"@ %d\n" % pid)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.write(OUTPUT, b"= %d\n" % status)


if __name__ == "__main__":
    main()
