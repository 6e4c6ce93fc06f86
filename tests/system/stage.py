"""Staged errors: a program of its own that starts pasta or passt many times. Another system call fails each time.

    argv    mode | words of the command line, with {} for a folder that is new each time

All modules are loaded first. Then each start is a fork, in which the functions of Python that make system calls are
replaced: call number N of each process fails with EIO, all others succeed. The walk ends with a start that makes fewer
than N calls.

Output: a line of JSON for each start: [functions that failed, file or "", exit status, standard error].
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from typing import IO, Any, NoReturn

from passt import cli
from passt.daemon import common, seccomp_table
from passt.linux import syscall

LIMIT = 20  # seconds for a start
LOADED = seccomp_table.LOADED
IN_OS = (
    "open", "pipe2", "fork", "memfd_create", "pidfd_open", "fstat", "stat", "lstat", "readlink", "listdir", "dup2",
    "set_inheritable", "set_blocking", "setgroups", "setresgid", "setresuid", "setsid", "chdir", "chroot", "fchown",
    "waitpid", "read", "write", "pread", "umask", "execve",
)  # fmt: skip
IN_SYSCALL = (
    "timerfd_create", "timerfd_settime", "setns", "unshare", "mount", "umount", "pivot_root", "open_tree", "prctl",
    "parent_death_signal", "has_capability", "set_capabilities", "inotify_init", "inotify_add_watch",
)  # fmt: skip
OF_SOCKETS = ("__init__", "bind", "listen", "connect", "setsockopt", "getsockopt", "send", "sendto", "recv", "recvmsg")
STDERR, NOTES = 2, 3
WITH_A_PATH = {"builtins.open", *(f"os.{name}" for name in ("open", "stat", "lstat", "readlink", "listdir", "chdir"))}
# Messages, and the walk over all capabilities
LEFT_OUT = {("os.write", STDERR), ("passt.linux.syscall.prctl", 23), ("passt.linux.syscall.prctl", 24)}


class Stage:
    """Counts calls, and lets one of them fail."""

    def __init__(self, number: int) -> None:
        self._left = number

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        write = os.write

        def staged(*args: Any, **kwargs: Any) -> Any:
            first = args[0] if args else None
            if self._left and not (isinstance(first, int) and (name, first) in LEFT_OUT):
                self._left -= 1
                if not self._left:
                    path = first if name in WITH_A_PATH and isinstance(first, str) else ""
                    write(NOTES, f"{name} {path}\n".encode())
                    raise OSError(errno.EIO, os.strerror(errno.EIO), *((path,) if path else ()))
            return function(*args, **kwargs)

        return staged

    def install(self) -> None:
        """Replace the functions, also where modules have imported them by name."""
        replaced: dict[int, Callable[..., Any]] = {}
        for module, names in ((os, IN_OS), (syscall, IN_SYSCALL), (fcntl, ("ioctl", "fcntl"))):
            for name in names:
                function = getattr(module, name)
                replaced[id(function)] = self.wrap(f"{module.__name__}.{name}", function)
                setattr(module, name, replaced[id(function)])
        for module, name in ((socket, "socketpair"), (resource, "setrlimit"), (select, "epoll"), (builtins, "open")):
            function = getattr(module, name)
            replaced[id(function)] = self.wrap(f"{module.__name__}.{name}", function)
            setattr(module, name, replaced[id(function)])
        for name in OF_SOCKETS:
            method = getattr(socket.socket, name)
            setattr(socket.socket, name, self.wrap(f"socket.{name}", method))
        for name, module in list(sys.modules.items()):
            if name.startswith("passt."):
                for key, value in list(vars(module).items()):
                    if id(value) in replaced:
                        setattr(module, key, replaced[id(value)])


def served(*_: object) -> NoReturn:
    """In place of the loop: the start has succeeded."""
    os._exit(0)


def start(number: int, argv: list[str]) -> tuple[list[str], str, int, str]:
    """A start in which the call `number` fails: the functions, the file, the exit status, standard error."""
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as named:
        return _started(number, argv, said, named)


def _started(number: int, argv: list[str], said: IO[str], named: IO[str]) -> tuple[list[str], str, int, str]:
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.alarm(LIMIT)
            os.dup2(said.fileno(), STDERR)
            os.dup2(named.fileno(), NOTES)
            os.closerange(4, 64)
            common.run = served
            Stage(number).install()
            cli.inherited_fds = list  # none of ours
            status = cli.main(argv)
        except BaseException as e:
            os.write(STDERR, f"escaped: {e!r}\n".encode())
        finally:
            os._exit(status)
    _, wait_status = os.waitpid(pid, 0)
    texts = []
    for file in (named, said):
        file.seek(0)
        texts.append(file.read())
    notes = [line.split(" ") for line in texts[0].splitlines()]
    path = next((path for _, path in notes if path), "")
    return [name for name, _ in notes], path, os.waitstatus_to_exitcode(wait_status), texts[1]


def main() -> None:
    mode, *words = sys.argv[1:]
    number = 0
    while True:
        number += 1
        folder = tempfile.mkdtemp(prefix="passt-stage-")
        os.chmod(folder, 0o777)
        try:
            result = start(number, [mode, *(word.format(folder) for word in words)])
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        print(json.dumps(result), flush=True)
        if not result[0]:
            break


if __name__ == "__main__":
    main()
