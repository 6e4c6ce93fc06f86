"""The first process of a new PID namespace, once it is prepared: it starts the command, forwards signals, reaps
processes, reports the exit status, and ends with pasta.

`init.py` executes this file as a program, before the command starts. The file imports no other module of the package
and no installed package, so that an interpreter is ready in 20 ms, while pasta still sets up the network. If it cannot
be executed (Python is readable by root only, and the command runs as `nobody`), init calls the functions here instead.

    argv    this file | descriptor of the pipe from pasta | descriptor of a file with [file, argv, environment] in JSON

When it ends, the kernel kills everything in the namespace. It ends when the command does, and when pasta does:
PDEATHSIG kills it, and the pipe, which pasta holds open, reads end of file even before that is set.

Signals: PID 1 is immune to signals that it does not handle, and handles SIGCHLD only. Signals of the terminal
(interrupt, quit, stop) reach the command directly, because all are in one process group.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

START = 0  # on the pipe: start the command; other values are signals for it
EXEC_FAILED = 1
DEFAULT_PATH = "/bin:/usr/bin"
_PR_SET_PDEATHSIG = 1


def main() -> NoReturn:
    """The program. SIGINT is blocked at its start, since the interpreter would print a traceback."""
    import ctypes
    import json

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    control, argv_file = map(int, sys.argv[1:])
    os.set_inheritable(control, False)
    with open(argv_file, "rb") as f:
        file, argv, env = json.load(f)
    status = 1
    try:
        if os.read(control, 1) == bytes((START,)):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            status = supervise(file, argv, env, control)
    finally:
        os._exit(status)


def supervise(file: str, argv: Sequence[str], env: Mapping[str, str], control: int) -> int:
    """Start the command, forward signals, reap orphans; returns the exit status for pasta."""
    wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    child = os.fork()
    if child == 0:
        execute(file, argv, env)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake:
                os.read(wake, 512)
                status = reap(child)
                if status is not None:
                    return status
                continue
            numbers = os.read(control, 64)
            if not numbers:
                return 1  # pasta is gone
            for number in numbers:
                os.kill(child, number)


def reap(child: int) -> int | None:
    """Reap all processes that have ended; returns the status of `child` in shell convention, if it is among them."""
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


def execute(file: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Execute the command. Never returns; a failure is one line on standard error and status 1."""
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ):  # the latter two are ignored by Python itself
            signal.signal(number, signal.SIG_DFL)
        error = _exec(file, argv, env)
        text = f"Failed to start command or shell: {file}: {error}\n"
        os.write(2, text.encode(errors="backslashreplace"))
    finally:
        os._exit(EXEC_FAILED)


def _exec(file: str, argv: Sequence[str], env: Mapping[str, str]) -> str:
    """execvp(3): search PATH, and give a script without an interpreter line to the shell. Returns why it failed."""
    directories = [""] if "/" in file else env.get("PATH", DEFAULT_PATH).split(":")
    error = errno.ENOENT
    if not file:
        return os.strerror(error)
    for directory in directories:
        path = os.path.join(directory, file)
        try:
            os.execve(path, list(argv), dict(env))
        except OSError as e:
            if e.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", path, *argv[1:]], dict(env))
            if e.errno not in (errno.ENOENT, errno.ENOTDIR):
                error = e.errno or error
    return os.strerror(error)


if __name__ == "__main__":
    main()
