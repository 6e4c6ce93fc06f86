"""UNIX domain sockets in the file system (unix(7)): listening at a path, and credentials of the peer.

A socket is created with mode 0700: a program that may connect has full control. A stale socket, at which no program
listens any more, is replaced. A path at which a program listens is an error, and so is a file that is not a socket.

The kernel records the credentials of a peer (SO_PEERCRED), and maps the ids to the user namespace of the reader, with
the same number for all unmapped ids. So both ids of a comparison come from sockets: that of a peer, and that of the
user who started the process, which a pair of sockets opened at start keeps (`Origin`).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from struct import Struct

from ..log import Fatal
from . import outputs

PATH_MAX = 107  # sizeof(sun_path) less the final NUL (unix(7))
MODE = 0o700
_UCRED = Struct("=iII")  # struct ucred: pid, uid, gid


class PathTakenError(Fatal):
    """Another program has the path, or a file is there. Another path in the same folder may be free."""


def listen_at(path: str, backlog: int = 1, type_: int = socket.SOCK_STREAM) -> socket.socket:
    """A listening socket at `path`, of streams or another `type_`. Raises PathTakenError, Fatal."""
    if len(os.fsencode(path)) > PATH_MAX:
        raise Fatal(f"Invalid socket path: {path} (at most {PATH_MAX} bytes)")
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, type_ | socket.SOCK_NONBLOCK)
    mask = os.umask(0o777 & ~MODE)
    try:
        sock.bind(path)
        sock.listen(backlog)
    except OSError as e:
        sock.close()
        kind = PathTakenError if e.errno == errno.EADDRINUSE else Fatal
        raise kind(f"Couldn't bind UNIX socket {path}: {e.strerror}") from None
    finally:
        os.umask(mask)
    return sock


def _clear(path: str) -> None:
    """Remove a stale socket. Raises Fatal for any other file at the path."""
    try:
        outputs.check_directories(path)
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            why = "there is a file of that name, which is not a socket"
            raise PathTakenError(f"Couldn't bind UNIX socket {path}: {why}")
            raise PathTakenError(f"Couldn't bind UNIX socket {path}: {why}")
    except FileNotFoundError:
        return
    except OSError as e:
        raise Fatal(f"Couldn't bind UNIX socket {path}: {e.strerror}") from None
    # A datagram socket is refused in both cases, with an error that depends on whether a program listens. A stream
    # socket would be accepted, and a passt with --one-off would take it for its guest, and end with it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        error = probe.connect_ex(path)
    if error in (0, errno.EPROTOTYPE):
        raise PathTakenError(f"Socket path {path} already in use")
    if error != errno.ECONNREFUSED:
        raise PathTakenError(f"Couldn't bind UNIX socket {path}: {os.strerror(error)}")
    try:
        os.unlink(path)
    except OSError as e:
        raise PathTakenError(f"Couldn't remove stale socket {path}: {e.strerror}") from None


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """PID, UID and GID of the peer, mapped to our namespaces. Raises OSError."""
    return _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


class Origin:
    """The user that the process runs as when this is created, as credentials of a socket."""

    def __init__(self) -> None:
        self._pair = socket.socketpair()

    def uid(self) -> int:
        """The uid, mapped to our current user namespace. Raises OSError."""
        return credentials(self._pair[0])[1]

    def close(self) -> None:
        for sock in self._pair:
            sock.close()
