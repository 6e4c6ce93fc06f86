"""inotify(7): changes of files and directory entries.

    struct inotify_event     watch i32 | mask u32 | cookie u32 | length u32 | name, NUL-padded to `length` bytes

A watch is bound to the inode, also after the process has lost access to the path. A second watch of the same inode is
the same watch, for both masks. An instance is one descriptor; fs.inotify.max_user_instances is the limit per user.
"""

from __future__ import annotations

import os
from struct import Struct

from ..lean.tuples import NamedTuple
from .syscall import inotify_add_watch, inotify_init

MODIFY = 0x2
CLOSE_WRITE = 0x8
MOVED_FROM, MOVED_TO = 0x40, 0x80
CREATE, DELETE = 0x100, 0x200
Q_OVERFLOW = 0x4000  # events were lost; its watch is -1
_MASK_ADD = 1 << 29  # add to the mask of an existing watch

_SIZE = 65536
_EVENT = Struct("=iIII")


class Event(NamedTuple):
    """An event: of the entry `name` of a watched directory, or of the watched file or directory itself (no name)."""

    watch: int
    mask: int
    name: str


def new() -> int:
    """A non-blocking descriptor without watches. Raises OSError: EMFILE at the user's limit."""
    return inotify_init()


def add(fd: int, path: str, mask: int) -> int:
    """Watch the file at `path`; returns the watch. Raises OSError."""
    return inotify_add_watch(fd, path, mask | _MASK_ADD)


def read(fd: int) -> list[Event]:
    """Events since the last call."""
    try:
        return parse(os.read(fd, _SIZE))
    except BlockingIOError:
        return []


def parse(data: bytes) -> list[Event]:
    """The whole events at the beginning of `data`."""
    events = []
    at = 0
    while at + _EVENT.size <= len(data):
        watch, mask, _, length = _EVENT.unpack_from(data, at)
        at += _EVENT.size
        events.append(Event(watch, mask, os.fsdecode(data[at : at + length].rstrip(b"\0"))))
        at += length
    return events
