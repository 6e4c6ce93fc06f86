"""inotify(7): what happens to the entries of directories.

    struct inotify_event     watch i32 | mask u32 | cookie u32 | length u32 | name, NUL-padded to `length` bytes

A watch stays with what its path led to, also when the process lets go of the path. Watching the same thing twice gives
the same watch, for both masks. An instance is one descriptor; fs.inotify.max_user_instances limits how many a user has.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import NamedTuple

from .syscall import inotify_add_watch, inotify_init

MODIFY = 0x2
CLOSE_WRITE = 0x8
MOVED_FROM, MOVED_TO = 0x40, 0x80
CREATE, DELETE = 0x100, 0x200
Q_OVERFLOW = 0x4000  # events were lost; its watch is -1
_MASK_ADD = 1 << 29  # keep what a watch was for before

_SIZE = 65536
_EVENT = Struct("=iIII")


class Event(NamedTuple):
    """What happened: to the entry `name` of a watched directory, or to what is watched itself (no name)."""

    watch: int
    mask: int
    name: str


def new() -> int:
    """A non-blocking descriptor without watches. Raises OSError: EMFILE when the user has too many."""
    return inotify_init()


def add(fd: int, path: str, mask: int) -> int:
    """Watch what `path` leads to; returns the watch. Raises OSError."""
    return inotify_add_watch(fd, path, mask | _MASK_ADD)


def read(fd: int) -> list[Event]:
    """What happened since the last call."""
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
