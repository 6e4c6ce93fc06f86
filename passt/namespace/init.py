"""The first process of a new PID namespace: prepares it, and becomes the supervisor of the command (`supervisor.py`).

    pasta                       helper                           init (PID 1)                    command
      | fork ------------------> |
      |                          | unshare, map ids, fork ------> |
      | <-- fds, PID of init --- | exit                           | /proc, host name, ping group
      |                                                           | exec: the supervisor
      | network ready                                             |
      | START on the pipe --------------------------------------> | fork, exec ------------------> |
      | a signal number ----------------------------------------> | kill ------------------------> |
      | <-- exit status ----------------------------------------- | <-- exit status -------------- |

Two forks, because unshare(CLONE_NEWPID) applies to children only and forbids threads afterwards: the process that
calls it must not be pasta, which needs a thread to enter the network namespace, and cannot be PID 1 itself. pasta is
the subreaper meanwhile, so init becomes its child when the helper ends.

Root of the new user namespace has every right over what is executed in there, and may take descriptors out of it
(pidfd_getfd(2)) and read its memory. Init is a copy of pasta, with all that it has open, the keys of its tables and the
layout of its memory: none of that may be there when the command starts. So it lets go of what is open, and becomes
another program. Where that cannot be it remains what it is, but not dumpable, which leaves rights over it to the user
namespace that pasta was executed in (nor can its user enter the namespaces by its PID then; by the command's they can).
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from .. import log
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
        _let_go(control)
        _become_supervisor(command, control)
        if os.read(control, 1) == bytes((supervisor.START,)):
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            status = supervisor.supervise(command.file, command.argv, command.env, control)
    except Exception as e:  # not only OSError: who we have become may not be able to read Python's files
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


def _become_supervisor(command: Command, control: int) -> None:
    """Execute an interpreter that runs supervisor.py, and nothing else. Returns if that cannot be: who we are may not
    read or execute them, or a policy forbids it. Its words become bytes again as ours became text: in isolated mode
    it would not know of PYTHONUTF8.
    """
    if not os.access(supervisor.__file__, os.R_OK):
        return
    words = -1
    try:
        words = os.memfd_create("command", 0)
        with open(words, "wb", closefd=False) as f:
            f.write(json.dumps([command.file, command.argv, dict(command.env)]).encode())
        os.lseek(words, 0, os.SEEK_SET)
        os.set_inheritable(control, True)
        signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT,))
        options = "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"
        argv = [sys.executable, *options, supervisor.__file__, str(control), str(words)]
        os.execve(sys.executable, argv, dict(command.env))
    except OSError as e:
        log.debug(f"The first process of the command stays a copy: {e}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
        os.set_inheritable(control, False)
        if words >= 0:
            os.close(words)
