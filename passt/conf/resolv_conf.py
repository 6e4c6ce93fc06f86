"""/etc/resolv.conf: what it says, and that it has changed, also when the file system is gone.

The file may be rewritten in place (resolvconf, dhclient), replaced by another of its name (NetworkManager), or a
symbolic link into a directory of a daemon, which replaces what lies there (systemd-resolved), or points it elsewhere.
So not the file is watched but the directories on the way to it, from the link's own to the one with the file:

    /etc/resolv.conf -> ../run/systemd/resolve/stub-resolv.conf        inotify watches, and directory descriptors
                                                                       (O_PATH), of /etc and /run/systemd/resolve

A file that something else is mounted on, as in containers, is watched itself and read through a descriptor of its own:
whoever writes it, writes it in place, and its directory hears nothing of that.

Directory descriptors keep what they stand for, though the process lets go of every path (`sandbox/isolation.py`): the
way is gone again by openat(2), and readlinkat(2) where it comes to a link. A link that leads out of the directories
that were there at start cannot be followed, and is said to be so.

    event                                             consequence
    ------------------------------------------------  ---------------------------------------------------------------
    an entry of the way is written and closed,        the timer is set to SETTLE seconds, again if it runs
      moved here, made, removed
    timer                                             the file is read; if it says something else, that is handed on
    there is no file, or no resolver in it            what was read before stays; a warning
    any other entry of these directories changes      nothing
    inotify lost events (its queue is full)           as if the file had changed
    at start: a directory cannot be watched           the file is read once, and that is said

Nothing wakes the process up as long as nothing changes there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .. import addr, log
from ..calls import calls
from ..linux import inotify
from ..linux.inotify import Event
from ..loop.changes import Changes
from ..wire.domain import is_name

if TYPE_CHECKING:
    from ..flow.context import Context

RESOLV_CONF = "/etc/resolv.conf"
MOUNTS = "/proc/self/mountinfo"
SETTLE = 0.1  # s; longer than it takes to rewrite a file
LINKS_MAX = 8  # on the way
SIZE_MAX = 65536  # bytes of the file that are read

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_LIMITS = {errno.EMFILE: "fs.inotify.max_user_instances", errno.ENOSPC: "fs.inotify.max_user_watches"}
_CHANGES = inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.CREATE | inotify.MOVED_FROM | inotify.DELETE


CALLS = calls("read", "pread64", "close")  # and openat, readlinkat in the directories


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """What the file says."""

    servers: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()


def parse(text: str) -> ResolvConf:
    """Nameservers and the first search list; lines that make no sense are left out, as the resolver does."""
    servers: list[bytes] = []
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        keyword, *words = line.split() or [""]
        if keyword == "nameserver" and words:
            try:
                servers.append(addr.packed(words[0].partition("%")[0]))
            except ValueError:
                log.debug(f"{RESOLV_CONF}: {line.strip()}: not an address, left out")
        elif keyword == "search" and not search:
            search = tuple(filter(is_name, words))  # "." is a usual way to say that there is none
    return ResolvConf(tuple(servers), search)


class Lost(Exception):
    """The file cannot be read, for the reason in its text."""


class Follower:
    """Reads the file at `path`, now and, by `changes`, later. Made while there are paths; raises nothing for what it
    cannot watch. `current` is what was read last.
    """

    def __init__(self, path: str = RESOLV_CONF, changes: Changes | None = None) -> None:
        self._path = path
        self._changes = changes
        self._way: set[tuple[int, str]] = set()  # entries that matter: (watch, name)
        self._directories: dict[str, int] = {}  # descriptors by path
        self._watches: dict[str, int] = {}  # likewise
        self._mounted = -1
        self.current = ResolvConf()
        if changes is not None:
            self._watch(changes)
        try:
            self.current = parse(self._read())
        except Lost as e:
            log.debug(f"{path}: {e}")

    @property
    def directories(self) -> tuple[int, ...]:
        """Descriptors of directories with files that will be read."""
        return tuple(self._directories.values())

    def close(self) -> None:
        """Close what it reads from."""
        for fd in (*self._directories.values(), *([self._mounted] if self._mounted >= 0 else [])):
            os.close(fd)

    # At start --------------------------------------------------------------------------------------------------------

    def _watch(self, changes: Changes) -> None:
        try:
            if _is_mount_point(os.path.realpath(self._path)):
                self._way.add((changes.watch(self._path, inotify.CLOSE_WRITE | inotify.MODIFY), ""))
                self._mounted = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                self._watch_way(changes)
        except OSError as e:
            self._changes = None
            self.close()  # the file is read by its path
            self._directories.clear()
            hint = f" (raise sysctl {_LIMITS[e.errno]})" if e.errno in _LIMITS else ""
            log.info(f"Changes of {self._path} will not be noticed: {e.strerror}{hint}")

    def _watch_way(self, changes: Changes) -> None:
        """All directories from that of the path to that of the file. Raises OSError, with some of them watched."""
        path = self._path
        for _ in range(LINKS_MAX):
            directory = os.path.dirname(path)
            try:
                self._watches[directory] = changes.watch(directory, _CHANGES)
                if directory not in self._directories:
                    self._directories[directory] = os.open(directory, _DIRECTORY)
                path = _join(directory, os.readlink(path))
            except OSError as e:
                if self._directories and e.errno in (errno.EINVAL, errno.ENOENT):
                    return  # no link: that was the file; or nothing is there, yet
                raise

    # Reading ---------------------------------------------------------------------------------------------------------

    def _read(self) -> str:
        """The file's text; and from now on the entries on the way to it are what matters. Raises Lost."""
        if self._mounted >= 0:
            try:
                return _decoded(os.pread(self._mounted, SIZE_MAX, 0))
            except OSError as e:
                raise Lost(e.strerror) from None
        path = self._path
        self._way.clear()
        for _ in range(LINKS_MAX):
            directory, name = os.path.split(path)
            at = self._directories.get(directory)
            if at is not None:
                self._way.add((self._watches[directory], name))
            elif self._directories:
                raise Lost(f"{path} lies in a directory that was no part of it at start")
            where = path if at is None else name
            try:
                return _contents(where, at)
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise Lost(e.strerror) from None
            try:
                path = _join(directory, os.readlink(where, dir_fd=at))
            except OSError as e:
                raise Lost(e.strerror) from None
        raise Lost(os.strerror(errno.ELOOP))

    # Running ---------------------------------------------------------------------------------------------------------

    def attend(self, ctx: Context, changed: Callable[[ResolvConf, float], None]) -> None:
        """From now on call changed(what it says, now) when it says something else."""
        if self._changes is None:
            return
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._look)
        self._changed = changed
        self._changes.tell(ctx.reactor, self._told)

    def _told(self, found: Sequence[Event], now: float) -> None:
        if any(e.mask & inotify.Q_OVERFLOW or (e.watch, e.name) in self._way for e in found):
            self._timers.arm(self._timer, now + SETTLE)

    def _look(self, now: float) -> None:
        """The file has changed and come to rest."""
        try:
            found = parse(self._read())
            if not found.servers:
                raise Lost("no nameserver in it")
        except Lost as e:
            log.warn_ratelimited("resolv.conf", f"{self._path}: {e}: going on with what it said before", now)
            return
        if found != self.current:
            self.current = found
            self._changed(found, now)


def _join(directory: str, target: str) -> str:
    return os.path.normpath(os.path.join(directory, target))


def _contents(path: str, directory: int | None) -> str:
    """Raises OSError: ELOOP for a link."""
    fd = os.open(path, _FILE, dir_fd=directory)
    try:
        data = b""
        while len(data) < SIZE_MAX and (part := os.read(fd, SIZE_MAX)):
            data += part
    finally:
        os.close(fd)
    return _decoded(data)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _is_mount_point(path: str) -> bool:
    """Whether something is mounted at `path`: field 5 of a line (proc(5)), where blanks are octal escapes."""
    try:
        with open(MOUNTS, "rb") as f:
            return any(line.split()[4] == os.fsencode(path) for line in f)
    except OSError as e:
        log.debug(f"{MOUNTS}: {e.strerror}")
        return False
