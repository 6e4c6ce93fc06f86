"""The socket that passt-repair(1) connects to: --repair-path, or the guest's socket with `.repair` behind it.

    --repair-path PATH         there; an error if that is not possible
    --repair-path none         nowhere
    neither, and --socket      behind the guest's path; a warning if that is not possible
    neither, and --fd          nowhere: no path is known
    without --vhost-user       nowhere
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from .. import log
from ..conf.values import NONE
from ..lean.tuples import NamedTuple
from ..linux import unix
from ..linux.tcp_repair import SUFFIX
from ..log import Fatal

if TYPE_CHECKING:
    from ..conf.argv import Options


class Listening(NamedTuple):
    """A socket that was opened at start. Its path is removed if the start fails."""

    sock: socket.socket
    path: str


def listen(options: Options, guest: str | None) -> Listening | None:
    """Open the socket; `guest` is the path of the guest's. Raises Fatal."""
    path = options.repair_path
    if not options.vhost_user or path == NONE or (path is None and guest is None):
        return None
    if path is not None:
        return Listening(unix.listen_at(path), path)
    path = f"{guest}{SUFFIX}"
    try:
        return Listening(unix.listen_at(path), path)
    except Fatal as e:
        log.warn(f"{e}: TCP connections will not move with the guest (see --repair-path)")
        return None
