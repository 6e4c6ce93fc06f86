"""The first process of a new PID namespace: prepares it, starts the command, reaps, reports, dies with us.

    pasta                       helper                           init (PID 1)                    command
      | fork ------------------> |
      |                          | unshare, map ids, fork ------> |
      | <-- fds, PID of init --- | exit                           | /proc, host name, ping group
      | network ready                                             |
      | START on the pipe --------------------------------------> | fork, exec ------------------> |
      | a signal number ----------------------------------------> | kill ------------------------> |
      | <-- exit status ----------------------------------------- | <-- exit status -------------- |

Two forks, because unshare(CLONE_NEWPID) applies to children only and forbids threads afterwards: the process that
calls it must not be pasta, which needs a thread to enter the network namespace, and cannot be PID 1 itself. pasta is
the subreaper meanwhile, so init becomes its child when the helper ends.

When init ends, the kernel kills everything in its namespace. It ends when the command does, and when pasta does:
PDEATHSIG kills it, and the pipe, which pasta holds open, reads end of file even before that is set.

Root of the new user namespace has every right over what is executed in there, and may take descriptors out of it
(pidfd_getfd(2)) and read its memory. Init is a copy of pasta, with the keys of its tables and the layout of its memory.
So it is not dumpable, which leaves rights over it to the user namespace that pasta was executed in, and has let go of
all that was open when the command starts.

Signals: PID 1 is not touched by signals that it does not handle, and handles SIGCHLD only. What the terminal sends
(interrupt, quit, stop) reaches the command directly, because all are in one process group.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from . import log
from .linux.syscall import (
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

START = 0  # on the pipe: start the command; other values are signals for it
HOST_NAME_MAX = 64
FD_MAX = 1 << 20  # fs.nr_open: no descriptor is beyond
EXEC_FAILED = 1
NAMESPACES = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWNS
DEFAULT_PATH = "/bin:/usr/bin"


@dataclass(frozen=True, slots=True)
class Command:
    """What to execute: the file (searched in PATH), its argv, its environment."""

    file: str
    argv: Sequence[str]
    env: Mapping[str, str]


def login_shell(env: Mapping[str, str]) -> Command:
    """$SHELL or /bin/sh as a login shell."""
    shell = env.get("SHELL") or "/bin/sh"
    return Command(shell, ("-" + shell,), env)


def helper(
    new_userns: bool, map_ids: Callable[[], None], command: Command, report: socket.socket, control: int
) -> None:
    """In the forked helper: make the namespaces and init, report (PID, descriptors of user and network namespace).

    Raises OSError when a namespace cannot be made. Returns in the helper; init never returns.
    """
    unshare(NAMESPACES | (CLONE_NEWUSER if new_userns else 0))
    if new_userns:
        map_ids()
    # Before init, which lives in the same mount namespace, mounts a /proc that does not know us.
    fds = [os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC) for name in ("user", "net")]
    pid = os.fork()
    if pid == 0:
        report.close()
        for fd in fds:
            os.close(fd)
        _init(command, control)
    socket.send_fds(report, [b"%d" % pid], fds)


def _init(command: Command, control: int) -> NoReturn:
    """PID 1, from birth to death."""
    status = 1
    try:
        prctl(PR_SET_DUMPABLE, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _prepare()
        if os.read(control, 1) == bytes((START,)):
            _let_go(control)
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = _supervise(command, control)
    except OSError as e:
        log.err(f"Failed to set up the namespace of the command: {e}")
    finally:
        os._exit(status)


def _prepare() -> None:
    """What a new set of namespaces needs. A step that fails is a warning: most commands run without it."""
    hostname = f"pasta-{socket.gethostname()}"[:HOST_NAME_MAX]
    _attempt("detach mounts from the host's", lambda: mount("none", "/", "", MS_REC | MS_SLAVE))
    _attempt("mount /proc in the namespace", lambda: mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC))
    _attempt("allow ping sockets in the namespace", _allow_ping)
    _attempt("set host name in the namespace", lambda: socket.sethostname(hostname))


def _attempt(what: str, function: Callable[[], None]) -> None:
    try:
        function()
    except OSError as e:
        log.warn(f"Couldn't {what}: {os.strerror(e.errno or 0)}")


def _allow_ping() -> None:
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as f:
        f.write("0 0")


def _let_go(control: int) -> None:
    """Close what pasta had open, but for standard input, output, error, and the pipe."""
    log.only_stderr()
    os.closerange(3, control)
    os.closerange(control + 1, FD_MAX)


def _supervise(command: Command, control: int) -> int:
    """Start the command, pass signals on, reap whatever is orphaned; returns what pasta's exit status will be."""
    wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        _execute(command)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake:
                os.read(wake, 512)
                status = _reap(child)
                if status is not None:
                    return status
                continue
            numbers = os.read(control, 64)
            if not numbers:
                return 1  # pasta is gone
            for number in numbers:
                os.kill(child, number)


def _reap(child: int) -> int | None:
    """Collect everything that ended; the status of `child` as a shell gives it, once it is among them."""
    status = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == child:
            status = shell_status(wait_status)


def shell_status(wait_status: int) -> int:
    """0..255 as exited, or 128 + the number of the signal."""
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)


def _execute(command: Command) -> NoReturn:
    """Become the command. Never returns; a failure is one line on standard error and status 1."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # the latter two are ignored by Python itself
            signal.signal(number, signal.SIG_DFL)
        error = _exec(command)
        text = f"Failed to start command or shell: {command.file}: {error}\n"
        os.write(2, text.encode(errors="backslashreplace"))
    finally:
        os._exit(EXEC_FAILED)


def _exec(command: Command) -> str:
    """execvp(3): search PATH, and give a script without an interpreter line to the shell. Returns why it failed."""
    directories = [""] if "/" in command.file else command.env.get("PATH", DEFAULT_PATH).split(":")
    error = errno.ENOENT
    if not command.file:
        return os.strerror(error)
    for directory in directories:
        path = os.path.join(directory, command.file)
        try:
            os.execve(path, list(command.argv), dict(command.env))
        except OSError as e:
            if e.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", path, *command.argv[1:]], dict(command.env))
            if e.errno not in (errno.ENOENT, errno.ENOTDIR):
                error = e.errno or error
    return os.strerror(error)
