"""The first process of a new PID namespace: it prepares the namespace, then becomes the supervisor (`supervisor.py`).

    pasta                       helper                           init (PID 1)                    command
      | fork ------------------> |
      |                          | unshare, map ids, fork ------> |
      | <-- fds, PID of init --- | exit                           | /proc, host name, ping group
      |                                                           | exec: the supervisor
      | network ready                                             |
      | START on the pipe --------------------------------------> | fork, exec ------------------> |
      | a signal number ----------------------------------------> | kill ------------------------> |
      | <-- exit status ----------------------------------------- | <-- exit status -------------- |

Two forks are needed, because unshare(CLONE_NEWPID) applies to children only and forbids threads afterwards: the process
that calls it must not be pasta, which needs a thread to enter the network namespace, and cannot be PID 1 itself. pasta
is the subreaper meanwhile, so init becomes its child when the helper ends.

Root of the new user namespace has all rights over processes executed in it, and may take their descriptors
(pidfd_getfd(2)) and read their memory. Init is a copy of pasta, with its open descriptors, the keys of its tables and
its memory layout: none of that may be present when the command starts. So init closes the descriptors and executes
another program. If that fails, it goes on as a copy that is not dumpable: then only the user namespace in which pasta
was executed has rights over it (and its PID does not give access to the namespaces; the command's PID does).
"""

from __future__ import annotations

import marshal
import os
import select
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .. import log
from ..lean.records import dataclass
from ..linux.inherited import Inherited
from ..linux.syscall import (
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_REC,
    MS_SLAVE,
    PR_SET_DUMPABLE,
    PR_SET_PDEATHSIG,
    mount,
    prctl,
    unshare,
)
from . import supervisor

HOST_NAME_MAX = 64
FD_MAX = 1 << 20  # fs.nr_open: no descriptor is beyond
NAMESPACES = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWNS


@dataclass(frozen=True, slots=True)
class Command:
    """A program to execute: the file (searched in PATH), its argv, its environment and signals."""

    file: str
    argv: Sequence[str]
    caller: Inherited

    @property
    def words(self) -> list[Any]:
        """The arguments of `supervisor.supervise` and `execute`, of types that marshal knows."""
        caller = self.caller
        return [self.file, list(self.argv), dict(caller.env), [*map(int, caller.ignored)], [*map(int, caller.blocked)]]


def login_shell(caller: Inherited) -> Command:
    """$SHELL or /bin/sh as a login shell."""
    shell = caller.env.get("SHELL") or "/bin/sh"
    return Command(shell, ("-" + shell,), caller)


def helper(
    new_userns: bool, map_ids: Callable[[], None], command: Command, report: socket.socket, control: int
) -> None:
    """In the forked helper: create the namespaces and init; report PID and descriptors of user and network namespace.

    Raises OSError when a namespace cannot be created. Returns in the helper; init never returns.
    """
    unshare(NAMESPACES | (CLONE_NEWUSER if new_userns else 0))
    if new_userns:
        map_ids()
    # Before init, in the same mount namespace, mounts a /proc that does not show this process
    fds = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("user", "net")]
    alive = os.pidfd_open(os.getpid())
    pid = os.fork()
    if pid == 0:
        report.close()
        for fd in fds:
            os.close(fd)
        _init(command, control, alive)
    socket.send_fds(report, [b"%d" % pid], fds)


def _init(command: Command, control: int, helper: int) -> NoReturn:
    """The whole life of PID 1. `helper` is a descriptor of the helper process, its parent at first."""
    status = 1
    try:
        prctl(PR_SET_DUMPABLE, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _prepare()
        _end_with_pasta(helper)
        _close_all(control)
        _become_supervisor(command, control)
        if os.read(control, 1) == bytes((supervisor.START,)):
            status = supervisor.supervise(control, *command.words)
    except Exception as e:  # not only OSError: the current user may not be able to read Python's files
        log.err(f"Failed to set up the namespace of the command: {e}")
    finally:
        os._exit(status)


def _end_with_pasta(helper: int) -> None:
    """Let the kernel kill this process when pasta has ended: its parent once the helper is gone. The program that it
    executes keeps that, and need not load ctypes to ask for it.
    """
    waiting = select.poll()
    waiting.register(helper, select.POLLIN)
    waiting.poll()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _prepare() -> None:
    """Set up the new namespaces. A step that fails is a warning: most commands run without it."""
    hostname = f"pasta-{socket.gethostname()}"[:HOST_NAME_MAX]
    _attempt("detach mounts from the host's", lambda: mount("none", "/", "", MS_REC | MS_SLAVE))
    _attempt("mount /proc in the namespace", lambda: mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC))
    _attempt("allow ping sockets in the namespace", _allow_ping)
    _attempt("set host name in the namespace", lambda: socket.sethostname(hostname))


def _attempt(what: str, function: Callable[[], None]) -> None:
    try:
        function()
    except OSError as e:
        log.warn(f"Couldn't {what}: {log.why(e)}")


def _allow_ping() -> None:
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as f:
        f.write("0 0")


def _close_all(control: int) -> None:
    """Close all descriptors of pasta except standard input, output, error, and the pipe."""
    log.only_stderr()
    os.closerange(3, control)
    os.closerange(control + 1, FD_MAX)


def _program() -> str:
    """The file of the supervisor to execute: its bytecode, where there is any that is valid. The interpreter would
    compile the source each time.
    """
    spec = supervisor.__spec__
    source, bytecode = supervisor.__file__, spec.cached if spec is not None else None
    try:
        from ..lean import finder
    except ImportError:
        return source  # another interpreter, which may not execute bytecode
    return bytecode if bytecode and finder.valid(source, bytecode) else source


def _become_supervisor(command: Command, control: int) -> None:
    """Execute an interpreter that runs the supervisor alone. Returns if that fails: the user may not read or execute
    them, or a policy forbids it. The interpreter gets our UTF-8 mode as an option, so that it encodes argv in the same
    way: isolated mode ignores PYTHONUTF8.
    """
    program = _program()
    if not os.access(program, os.R_OK):
        return
    argv_file = -1
    try:
        argv_file = os.memfd_create("command", 0)
        with open(argv_file, "wb", closefd=False) as f:
            f.write(marshal.dumps(command.words))
        os.lseek(argv_file, 0, os.SEEK_SET)
        os.set_inheritable(control, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        options = "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"
        argv = [sys.executable, *options, program, str(control), str(argv_file)]
        os.execve(sys.executable, argv, dict(command.caller.env))
    except OSError as e:
        log.debug(f"Couldn't execute the supervisor, init goes on as a copy of pasta: {e}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        os.set_inheritable(control, False)
        if argv_file >= 0:
            os.close(argv_file)
