"""The first process of a new PID namespace, once it is prepared: it starts the command, forwards signals, reaps
processes, reports the exit status, and ends with pasta.

`init.py` executes this file as a program, before the command starts. The file imports no other module of the package
and no installed package, and of the standard library only what loads quickly, so that the program is ready while pasta
still sets up the network. If it cannot be executed (Python is readable by root only, and the command runs as `nobody`),
init calls the functions here instead.

    argv    this file | descriptor of the pipe from pasta | descriptor of a file, by marshal:
            [file, argv, environment, signals that the command ignores, signals that are blocked for it]

When it ends, the kernel kills everything in the namespace. It ends when the command does, and when pasta does:
PDEATHSIG, which init has set, kills it, and the pipe, which pasta holds open, reads end of file even before that.

Signals: PID 1 is immune to signals that it does not handle, and handles SIGCHLD only. Signals of the terminal
(interrupt, quit, stop) reach the command directly, because all are in one process group. Those from pasta are given to
the command, which may have handlers for them, as a shell gives them to its script. SIGTERM means more: it ends the
command in any case, or pasta could not be ended by it.

    the command                                          after SIGTERM it gets
    ---------------------------------------------------  -----------------------------------------------------------
    is stopped                                           SIGCONT, or the signal would stay pending
    has a process group of its own in our session        SIGHUP: a shell with job control, which ignores SIGTERM, takes
                                                         that as the end of its terminal
    ignores all of these                                 SIGKILL at once: nothing can be waited for
    is there still after GRACE                           SIGKILL, and so does everything in the namespace
"""

from __future__ import annotations

import errno
import os
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Mapping, Sequence
    from typing import NoReturn
else:
    import _signal as signal  # `signal` loads enumerations, which take longer than the interpreter's own start

START = 0  # on the pipe: start the command; other values are signals for it
EXEC_FAILED = 1
KILLED = 128 + signal.SIGTERM
DEFAULT_PATH = "/bin:/usr/bin"
GRACE = 10.0  # s for an orderly end, as in docker-stop(1)
HANGUP_DELAY = 0.05  # s; a shell that gets both signals at once may see only one of them (readline has one slot)
HANGUP_INTERVAL = 1.0  # s
CHANGED = signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ  # here, and the latter two by Python itself


def main() -> NoReturn:
    """The program. SIGINT is blocked at its start, since the interpreter would print a traceback."""
    import marshal

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT,))
    control, argv_file = map(int, sys.argv[1:])
    os.set_inheritable(control, False)
    with open(argv_file, "rb") as f:
        command = marshal.load(f)
    status = 1
    try:
        if os.read(control, 1) == bytes((START,)):
            status = supervise(control, *command)
    except OSError as e:
        _say(f"Failed to supervise the command: {e}")
    finally:
        os._exit(status)


def supervise(
    control: int,
    file: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    ignored: Sequence[int] = (),
    blocked: Sequence[int] = (),
) -> int:
    """Start the command, forward signals, reap orphans; returns the exit status for pasta."""
    wake, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wakeup)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    try:
        child = os.fork()
    except OSError as e:
        _not_started(file, e)
        return EXEC_FAILED
    if child == 0:
        execute(file, argv, env, ignored, blocked)
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake, select.POLLIN)
    ending: Ending | None = None
    while True:
        ready = poll.poll(ending.wait() if ending else None)
        if ending and ending.over():
            return KILLED
        for fd, _ in ready:
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
            if signal.SIGTERM in numbers and ending is None:
                ending = Ending(child)


class Ending:
    """The time after SIGTERM."""

    def __init__(self, child: int) -> None:
        self._child = child
        self._deadline = self._hangup = time.monotonic()
        os.kill(child, signal.SIGCONT)
        self._is_shell = os.getpgid(child) != os.getpgrp() and os.getsid(child) == os.getsid(0)
        if not {signal.SIGTERM, signal.SIGHUP if self._is_shell else signal.SIGTERM} <= ignored(child):
            self._deadline += GRACE
            self._hangup += HANGUP_DELAY

    def wait(self) -> float:
        """Milliseconds until the next step."""
        following = min(self._deadline, self._hangup) if self._is_shell else self._deadline
        return max(0.0, following - time.monotonic()) * 1000

    def over(self) -> bool:
        """Whether it is time for SIGKILL; gives a shell its SIGHUP before."""
        now = time.monotonic()
        if self._is_shell and now >= self._hangup:
            os.kill(self._child, signal.SIGHUP)
            self._hangup = now + HANGUP_INTERVAL
        return now >= self._deadline


def ignored(pid: int) -> set[int]:
    """The signals that `pid` ignores, as far as is known."""
    try:
        if os.readlink("/proc/self") != str(os.getpid()):
            return set()  # of another PID namespace: this one could not be mounted
        with open(f"/proc/{pid}/status") as f:
            mask = next(int(line.split()[1], 16) for line in f if line.startswith("SigIgn:"))
    except (OSError, StopIteration):
        return set()
    return {number for number in range(1, mask.bit_length() + 1) if mask >> number - 1 & 1}


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


def execute(
    file: str, argv: Sequence[str], env: Mapping[str, str], ignored: Sequence[int] = (), blocked: Sequence[int] = ()
) -> NoReturn:
    """Execute the command with its signals. Never returns; a failure is one line on standard error and status 1."""
    try:
        signal.set_wakeup_fd(-1)
        for number in {*CHANGED, *ignored}:
            signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        _exec(file, argv, env)
    except OSError as e:
        _not_started(file, e)
    finally:
        os._exit(EXEC_FAILED)


def _not_started(file: str, e: OSError) -> None:
    _say(f"Failed to start command or shell: {file}: {e.strerror}")


def _say(line: str) -> None:
    """Write an error to standard error; there is no other place, should that fail."""
    try:
        os.write(2, f"{line}\n".encode(errors="backslashreplace"))
    except OSError:
        pass


def _exec(file: str, argv: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """execvp(3): search PATH, and give a script without an interpreter line to the shell. Raises OSError."""
    directories = [] if not file else [""] if "/" in file else env.get("PATH", DEFAULT_PATH).split(":")
    error = errno.ENOENT
    for directory in directories:
        path = os.path.join(directory, file)
        try:
            os.execve(path, list(argv), dict(env))
        except OSError as e:
            if e.errno == errno.ENOEXEC:
                os.execve("/bin/sh", ["sh", path, *argv[1:]], dict(env))
            if e.errno not in (errno.ENOENT, errno.ENOTDIR):
                error = e.errno or error
    raise OSError(error, os.strerror(error))


if __name__ == "__main__":
    main()
