"""Namespaces that the command line names, opened before the program loads its modules.

A namespace under /proc/PID goes away with its process, and one under /run/netns with its name; both may be short-lived
(a container that fails at once). The modules that parse the command line take ten times as long to load as an
interpreter takes to start, so this is the first step of `__main__`. It may import nothing but `os`.

    pinned                                    by                                      keeps
    ----------------------------------------  --------------------------------------  --------------------------------
    /proc/PID/ns/net and user, and a pidfd    the last argument, or the last but one  the namespaces, and the end of
                                              (slirp4netns), if it is a number        that process as an event
    the values of --netns and --userns        an option that begins like these        the namespaces

The command line is not understood yet: a number may be the argument of a command or of an option. So files are opened
without any other effect (O_PATH: no device and no pipe notices), and nothing is said. The steps of the start ask for a
path or a PID (`open_path`, `pidfd`), and get what is pinned, or else what is there then. A file that cannot be opened
here is opened there, which reports the error. `release` ends all of it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

RUN_DIR = "/run/netns"
_FLAGS = os.O_PATH | os.O_CLOEXEC
_NAMED = ("--netns", "--userns")
_SHORTEST = len("--net")  # of an abbreviation that is tried
_DIGITS = 10  # of a PID

_files: dict[str, int] = {}  # by path
_processes: dict[str, int] = {}  # pidfd by PID


def hold(argv: Sequence[str]) -> None:
    """Pin what `argv`, with the program's name, may mean. Never fails. A second call leaves it at that."""
    if _files or _processes:
        return
    arguments = argv[1:]
    for argument in arguments[-2:]:
        _hold_process(argument)
    for i, argument in enumerate(arguments):
        name, equals, text = argument.partition("=")
        if len(name) >= _SHORTEST and any(option.startswith(name) for option in _NAMED):
            text = text if equals else "".join(arguments[i + 1 : i + 2])
            _hold_process(text)
            if text:
                _hold_file(text if "/" in text else f"{RUN_DIR}/{text}")


def open_path(path: str) -> str:
    """A path that leads to what was `path` when it was pinned; `path` itself if it was not."""
    fd = _files.get(path)
    return path if fd is None else f"/proc/self/fd/{fd}"


def has(path: str) -> bool:
    """Whether `path` is pinned."""
    return path in _files


def pidfd(pid: int) -> int:
    """A pidfd, which belongs to the caller, of the process that had the number `pid` when it was pinned, or else that
    has it. Raises OSError.
    """
    fd = _processes.get(str(pid))
    return os.pidfd_open(pid) if fd is None else os.dup(fd)


def held() -> list[int]:
    """The descriptors of all pins."""
    return [*_files.values(), *_processes.values()]


def release() -> None:
    """Close all pins."""
    for fd in held():
        os.close(fd)
    _files.clear()
    _processes.clear()


def _hold_process(text: str) -> None:
    """Pin the namespaces of the PID `text`, if it is one, through its directory: they belong to one process also if
    the number is used again meanwhile.
    """
    if not (text.isascii() and text.isdecimal()) or len(text) > _DIGITS:
        return
    pid = int(text)
    try:
        directory = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        for kind in ("user", "net"):
            _put(_files, f"/proc/{pid}/ns/{kind}", os.open(f"ns/{kind}", _FLAGS, dir_fd=directory))
        process = os.pidfd_open(pid)
        try:
            os.close(os.open("ns", _FLAGS, dir_fd=directory))
        except OSError:
            os.close(process)  # of another process
        else:
            _put(_processes, str(pid), process)
    except OSError:
        pass  # it has ended, or may not be looked at, or the kernel has no pidfds
    finally:
        os.close(directory)


def _hold_file(path: str) -> None:
    try:
        _put(_files, path, os.open(path, _FLAGS))
    except (OSError, ValueError):
        pass  # ValueError: a zero byte


def _put(pins: dict[str, int], key: str, fd: int) -> None:
    if key in pins:
        os.close(fd)  # given twice: the older one counts
    else:
        pins[key] = _beyond_stdio(fd)


def _beyond_stdio(fd: int) -> int:
    """`fd` under a number that is not that of a standard stream, which may be closed at this time."""
    if fd > 2:
        return fd
    try:
        return _beyond_stdio(os.dup(fd))
    finally:
        os.close(fd)
