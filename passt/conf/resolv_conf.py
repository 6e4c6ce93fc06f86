"""/etc/resolv.conf: its contents, and notice of changes, also after the process has left the file system.

The file may be rewritten in place (resolvconf, dhclient), replaced by rename (NetworkManager), or be a symbolic link
into a directory of a daemon, which replaces the target (systemd-resolved) or the link. So the watches are on the
directories along the path, from that of the link to that of the file, not on the file:

    /etc/resolv.conf -> ../run/systemd/resolve/stub-resolv.conf        inotify watches, and directory descriptors
                                                                       (O_PATH), of /etc and /run/systemd/resolve

A file that is a mount point, as in containers, is watched itself and read through its own descriptor: it is written in
place, and its directory has no event for that.

Directory descriptors stay valid in the sandbox, where no path can be opened (`sandbox/isolation.py`): the path is
resolved again by openat(2), and by readlinkat(2) at each link. A link out of the directories known at start cannot be
followed; a warning says so.

    event                                             consequence
    ------------------------------------------------  ---------------------------------------------------------------
    an entry on the path is written and closed,       the timer is set to SETTLE seconds, again if it runs
      moved here, created, removed
    timer                                             the file is read; changed contents are passed to the callback
    there is no file, or no resolver in it            the previous contents stay; a warning
    any other entry of these directories changes      nothing
    inotify lost events (its queue is full)           as if the file had changed
    at start: a directory cannot be watched           the file is read once; a message says so

The process is not woken up while these directories do not change.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .. import addr, log
from ..calls import calls
from ..lean.records import dataclass
from ..linux import inotify
from ..linux.inotify import Event
from ..loop.directories import Changes
from ..wire.domain import is_name

if TYPE_CHECKING:
    from ..flow.context import Context

RESOLV_CONF = "/etc/resolv.conf"
MOUNTS = "/proc/self/mountinfo"
SETTLE = 0.1  # s; longer than it takes to rewrite a file
LINKS_MAX = 8  # symbolic links on the path
SIZE_MAX = 65536  # bytes of the file that are read

_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
_LIMITS = {errno.EMFILE: "fs.inotify.max_user_instances", errno.ENOSPC: "fs.inotify.max_user_watches"}
_CHANGES = inotify.CLOSE_WRITE | inotify.MOVED_TO | inotify.CREATE | inotify.MOVED_FROM | inotify.DELETE


CALLS = calls("read", "pread64", "close")  # and openat, readlinkat in the directories


@dataclass(frozen=True, slots=True)
class ResolvConf:
    """The contents of the file."""

    servers: tuple[bytes, ...] = ()
    search: tuple[str, ...] = ()
    zones: tuple[tuple[bytes, str], ...] = ()  # interfaces of link-local servers (RFC 4007, 11), where they are given


def parse(text: str) -> ResolvConf:
    """Nameservers and the first search list. Invalid lines are ignored, as by resolver(3)."""
    servers: list[bytes] = []
    zones: list[tuple[bytes, str]] = []
    search: tuple[str, ...] = ()
    for line in text.splitlines():
        keyword, *values = line.split() or [""]
        if keyword == "nameserver" and values:
            text, _, zone = values[0].partition("%")
            try:
                servers.append(addr.packed(text))
                if zone and addr.is_link_local(servers[-1]):
                    zones.append((servers[-1], zone))
            except ValueError:
                log.debug(f"{RESOLV_CONF}: {line.strip()}: not an address, left out")
        elif keyword == "search" and not search:
            search = tuple(filter(is_name, values))  # a single "." usually means an empty list
    return ResolvConf(tuple(servers), search, tuple(zones))


class UnreadableError(Exception):
    """The file cannot be read, for the reason in the text."""


class Follower:
    """Reads the file at `path` at once and after each change. It is created before paths become unavailable. A path
    that cannot be watched is not an error. `current` holds the contents read last.
    """

    def __init__(self, path: str = RESOLV_CONF, changes: Changes | None = None) -> None:
        self._path = path
        self._changes = changes
        self._entries: set[tuple[int, str]] = set()  # directory entries on the path: (watch, name)
        self._directories: dict[str, int] = {}  # descriptors by path
        self._watches: dict[str, int] = {}  # watches by path
        self._mounted = -1
        self.current = ResolvConf()
        if changes is not None:
            self._watch(changes)
        try:
            self.current = parse(self._read())
        except UnreadableError as e:
            log.debug(f"{path}: {e}")

    @property
    def directories(self) -> tuple[int, ...]:
        """Descriptors of directories with files that are read later."""
        return tuple(self._directories.values())

    def close(self) -> None:
        """Close the descriptors that it reads from."""
        for fd in (*self._directories.values(), *([self._mounted] if self._mounted >= 0 else [])):
            os.close(fd)

    # At start --------------------------------------------------------------------------------------------------------

    def _watch(self, changes: Changes) -> None:
        try:
            if _is_mount_point(os.path.realpath(self._path)):
                self._entries.add((changes.watch(self._path, inotify.CLOSE_WRITE | inotify.MODIFY), ""))
                self._mounted = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            else:
                self._watch_directories(changes)
        except OSError as e:
            self._changes = None
            self.close()  # the file is read by its path
            self._directories.clear()
            hint = f" (raise sysctl {_LIMITS[e.errno]})" if e.errno in _LIMITS else ""
            log.info(f"Changes of {self._path} will not be noticed: {e.strerror}{hint}")

    def _watch_directories(self, changes: Changes) -> None:
        """Watch the directories from that of the path to that of the file. Raises OSError with some of them watched."""
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
                    return  # not a link: the file itself; or it does not exist yet
                raise

    # Reading ---------------------------------------------------------------------------------------------------------

    def _read(self) -> str:
        """The file's text. Sets the watched entries to those on the path. Raises UnreadableError."""
        if self._mounted >= 0:
            try:
                return _decoded(os.pread(self._mounted, SIZE_MAX, 0))
            except OSError as e:
                raise UnreadableError(e.strerror) from None
        path = self._path
        self._entries.clear()
        for _ in range(LINKS_MAX):
            directory, name = os.path.split(path)
            at = self._directories.get(directory)
            if at is not None:
                self._entries.add((self._watches[directory], name))
            elif self._directories:
                raise UnreadableError(f"{path} is in a directory that was not on the path at start")
            where = path if at is None else name
            try:
                return _contents(where, at)
            except OSError as e:
                if e.errno != errno.ELOOP:
                    raise UnreadableError(e.strerror) from None
            try:
                path = _join(directory, os.readlink(where, dir_fd=at))
            except OSError as e:
                raise UnreadableError(e.strerror) from None
        raise UnreadableError(os.strerror(errno.ELOOP))

    # Running ---------------------------------------------------------------------------------------------------------

    def start(self, ctx: Context, changed: Callable[[ResolvConf, float], None]) -> None:
        """Call changed(contents, now) from now on, when the contents have changed."""
        if self._changes is None:
            return
        self._timers = ctx.timers.services
        self._timer = self._timers.new(self._reread)
        self._changed = changed
        self._changes.tell(ctx.reactor, self._on_events)

    def _on_events(self, found: Sequence[Event], now: float) -> None:
        if any(e.mask & inotify.Q_OVERFLOW or (e.watch, e.name) in self._entries for e in found):
            self._timers.arm(self._timer, now + SETTLE)

    def _reread(self, now: float) -> None:
        """Read the file, SETTLE seconds after its last change."""
        try:
            found = parse(self._read())
            if not found.servers:
                raise UnreadableError("no nameserver in it")
        except UnreadableError as e:
            log.warn_ratelimited("resolv.conf", f"{self._path}: {e}: keeping its previous contents", now)
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
    """Whether `path` is a mount point: field 5 of a line (proc(5)), where blanks are octal escapes."""
    try:
        with open(MOUNTS, "rb") as f:
            return any(line.split()[4] == os.fsencode(path) for line in f)
    except OSError as e:
        log.debug(f"{MOUNTS}: {e.strerror}")
        return False
