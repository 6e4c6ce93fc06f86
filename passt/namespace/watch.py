"""The end of a namespace that pasta did not make.

A namespace does not end as long as pasta is in it, and the kernel has no event for the end of its last process. So its
end is that of the file by which it was given (network_namespaces(7), ip-netns(8)), as in the original:

    given by                        its end is                          noticed by
    ------------------------------  ----------------------------------  ------------------------------------------------
    PID, /proc/PID/ns/net           the end of the process              its pidfd (`pin.py`)
    /proc/PID/task/TID/ns/net       the end of the thread, or of the    pidfds of both (Linux 6.9), else polling
                                    process
    a file, a mount point           its deletion or its renaming        inotify of its directory
    a symbolic link to one of       its deletion, or the end of what    both of these
    these (/run/netns/NAME for a    it leads to
    container's)
    /proc/PID/root/PATH             that of PATH, or of the process     inotify, pidfd
    /proc/PID/fd/N                  the end of the process              its pidfd
    /proc/self/fd/N                 not defined: pasta's own            -

Where the kernel refuses a watch (the user's limit of watches, a directory that may be passed but not read, no pidfds),
the path is polled every POLL_INTERVAL, in the directory that was opened at start: one system call of 2 us each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from .. import log
from ..linux import inotify, proc
from ..linux.inotify import Event
from ..linux.outputs import LINKS_MAX
from ..loop.directories import Changes
from . import pin

POLL_INTERVAL = 0.1  # s
_PIDFD_THREAD = os.O_EXCL  # pidfd_open(2)
_TREES = ("root", "cwd")  # entries of /proc/PID that have files of other file systems below
_GONE = inotify.DELETE | inotify.MOVED_FROM


class Watch:
    """Detects the end. It is created before the sandbox; `gone` checks later.

    `pidfds` are readable at the end of a process. `changes` reports a deleted file, if `in_directory`. With `poll` the
    caller must call `gone` periodically as well, which uses `directories` (descriptors, none without `poll`), since
    paths cannot be opened in the sandbox.
    """

    def __init__(self, path: str, changes: Changes) -> None:
        self.path = path
        self.changes = changes
        self.pidfds: list[int] = []
        self._files: set[tuple[int, str]] = set()  # a watch of a directory, the name in it
        self._polled: dict[str, int] = {}  # paths, with descriptors of their directories
        self._paths = _chain(path)
        for each in self._paths:
            pid = proc.pid_of_path(each)
            if pid is not None:
                self._watch_process(pid, each)
            if not each.startswith("/proc/") or each.split("/")[3] in _TREES:
                self._watch_directory(each)
            elif pid is None:
                log.debug(f"{each} is a descriptor of pasta: it cannot be watched")

    def _watch_process(self, pid: int, path: str) -> None:
        parts = path.split("/")
        try:
            self.pidfds.append(pin.pidfd(pid))
            if parts[3] == "task" and parts[4] != parts[2]:
                self.pidfds.append(os.pidfd_open(int(parts[4]), _PIDFD_THREAD))
        except ProcessLookupError:
            pass  # it has ended: `gone`
        except (OSError, ValueError) as e:
            self._poll(path, e)

    def _watch_directory(self, path: str) -> None:
        try:
            self._files.add((self.changes.watch(os.path.dirname(path), _GONE), os.path.basename(path)))
        except OSError as e:
            self._poll(path, e)

    def _poll(self, path: str, why: Exception) -> None:
        log.debug(f"Polling {path}: {why}")
        try:
            self._polled[path] = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            pass  # it has ended: `gone`
        except OSError as e:
            log.warn(f"The end of {path} will not be noticed: {e.strerror}")

    @property
    def poll(self) -> bool:
        """Whether `gone` must be called periodically."""
        return bool(self._polled)

    @property
    def directories(self) -> tuple[int, ...]:
        """The descriptors that `gone` uses."""
        return tuple(self._polled.values())

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.path if self.path.startswith("/proc/") else os.path.basename(self.path)

    @property
    def in_directory(self) -> bool:
        """Whether `changes` reports a deletion."""
        return bool(self._files)

    def deleted(self, found: Sequence[Event]) -> bool:
        """Whether the file's deletion is among the events `found`."""
        return any((e.watch, e.name) in self._files and e.mask & _GONE for e in found)

    def ended(self) -> bool:
        """Whether the file does not exist, or a process has ended; before the sandbox."""
        return any(_is_gone(path) for path in self._paths)

    def gone(self) -> bool:
        """Whether a polled file does not exist any more."""
        return any(_is_gone(os.path.basename(path), directory) for path, directory in self._polled.items())


def _chain(path: str) -> list[str]:
    """`path`, and the paths that it leads to through symbolic links. Those of procfs lead to no path: they stand for
    open files.
    """
    paths = [path]
    while not path.startswith("/proc/") and len(paths) <= LINKS_MAX:
        try:
            target = os.readlink(path)
        except OSError:
            break  # EINVAL: it is no link
        path = os.path.abspath(os.path.join(os.path.realpath(os.path.dirname(path)), target))
        paths.append(path)
    return paths


def _is_gone(path: str, directory: int | None = None) -> bool:
    try:
        os.close(os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=directory))
    except (FileNotFoundError, ProcessLookupError):
        return True
    except OSError:
        pass  # it exists, but may not be opened
    return False
