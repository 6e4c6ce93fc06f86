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
        "passt.passt.Clients.gone",  # by its link
        "passt.ports.scan.Scanner.start",  # by forwards
    )
)
# A datagram has to arrive between bind(2) and connect(2) of a socket for this one to be armed
ARMED_BY_CHANCE = "passt.ports.udp_in.UdpIn._deliver_misdelivered"

Function = Callable[..., Any]


class Staged(Exception):
    """The fault of a handler that has none."""


def name_of(function: Function) -> str:
    """Module and qualified name of what is called in the end."""
    while isinstance(function, partial):
        function = function.func
    return f"{function.__module__}.{function.__qualname__}"


class Informer:
    """Knows all handlers."""

    def __init__(self, way: str, victim: str) -> None:
        self._way, self._victim = way, victim
        self._locked = False
        self._told: set[str] = set()
        self._registered: set[str] = set()
        self._to_fail: set[str] = set()
        self._armed: list[tuple[Any, int]] = []

    def tell(self, line: str) -> None:
        """Once for each line."""
        if line not in self._told:
            self._told.add(line)
            os.write(OUTPUT, f"{line}\n".encode())

    def wrap(self, function: Function, *, registered: bool = True, fails: bool = False) -> Function:
        """`function`, which tells what it does."""
        name = getattr(function, "informs", None) or name_of(function)
        if registered:
            self._registered.add(name)
        if fails and self._way == "faulty":
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

        informing.informs = name  # type: ignore[attr-defined]
        return informing

    # Where handlers are made known -----------------------------------------------------------------------------------

    def listen(self) -> None:
        """Before the program begins."""
        self._intercept(reactor.Reactor, "handle", 1, fails=True)
        self._intercept(reactor.Reactor, "on_signal", 1)
        self._intercept(reactor.Reactor, "between_turns", 0, registered=False)
        self._intercept(directories.Changes, "tell", 1)
        self._intercept_timers()
        new_reactor = reactor.Reactor.__init__

        def make(loop: Any) -> None:
            self._wrap_methods()  # all modules are there, and none of their objects yet
            sys.modules["passt.ndp"].RA_INTERVAL = 20, 40  # type: ignore[attr-defined]  # s: or we would have to wait
            new_reactor(loop)
            self._loop = loop

        reactor.Reactor.__init__ = make  # type: ignore[method-assign, assignment]
        load = seccomp.load

        def lock(rules: Any) -> None:
            self._before_lock()
            load(rules)
            self._locked = True
            for services, timer in self._armed:
                services.arm(timer, time.monotonic())
            self.tell("*")

        seccomp.load = lock

    def _intercept(self, owner: type, method: str, which: int, **how: bool) -> None:
        """Wrap argument `which` of a method that registers."""
        original = getattr(owner, method)

        def register(this: Any, *args: Any) -> Any:
            wrapped = self.wrap(args[which], **how)
            return original(this, *args[:which], wrapped, *args[which + 1 :])

        setattr(owner, method, register)

    def _intercept_timers(self) -> None:
        new = timers.Timers.new

        def new_timer(services: Any, callback: Function) -> int:
            timer = new(services, self.wrap(callback, fails=True))
            if ARMED_BY_CHANCE in (name_of(callback), getattr(callback, "informs", "")):
                self._armed.append((services, timer))
            return timer

        timers.Timers.new = new_timer  # type: ignore[method-assign, assignment]

        def set_callback(pool: Any, callback: Function) -> None:
            stand_in = not hasattr(pool, "informing")  # the first one does nothing
            pool.informing = callback if stand_in else self.wrap(callback, fails=True)

        timers.TimerPool.callback = property(lambda pool: pool.informing, set_callback)  # type: ignore[assignment]

    def _wrap_methods(self) -> None:
        """Those that are known by their names."""
        for module in [module for name, module in sys.modules.items() if name.startswith("passt.")]:
            owners = [o for o in vars(module).values() if isinstance(o, type) and o.__module__ == module.__name__]
            for owner in (module, *owners):
                for name, function in list(vars(owner).items()):
                    known = name.endswith("_handler") or f"{module.__name__}.{_path(owner, name)}" in CALLED
                    if callable(function) and known and not getattr(owner, "_is_protocol", False):
                        setattr(owner, name, self.wrap(function, registered=False))

    def _before_lock(self) -> None:
        loop = self._loop
        loop.at_turn_end[:] = [self.wrap(callback, registered=False) for callback in loop.at_turn_end]
        faults = loop.on_fault.args[0]
        faults.update({kind: self.wrap(fault, registered=False) for kind, fault in faults.items()})
        if self._way == "starved":
            free = os.dup(0)
            os.close(free)
            resource.setrlimit(resource.RLIMIT_NOFILE, (free + DESCRIPTORS, free + DESCRIPTORS))


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
