"""UNIX domain sockets in the file system (unix(7)): listening at a path, and who is at the other end.

A socket is made with mode 0700: whoever may connect to it may speak for us. A path at which nobody listens any more is
taken over, one at which somebody does is an error, and so is anything that is no socket.

The kernel notes who connected (SO_PEERCRED), and tells the ids as they are in the user namespace of who asks, with the
same number for all of those that are unknown there. So ids are compared that were both read from sockets: those of
a peer, and those of who started us, which a pair of sockets made at start keeps (`Origin`).
"""

from __future__ import annotations

import errno
import os
import socket
import stat
from struct import Struct

from ..log import Fatal

PATH_MAX = 107  # sizeof(sun_path) less the final NUL (unix(7))
MODE = 0o700
_UCRED = Struct("=iII")  # struct ucred: pid, uid, gid


def listen_at(path: str, backlog: int = 1) -> socket.socket:
    """A listening stream socket at `path`. Raises Fatal."""
    if len(os.fsencode(path)) > PATH_MAX:
        raise Fatal(f"Invalid socket path: {path} (at most {PATH_MAX} bytes)")
    _clear(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    mask = os.umask(0o777 & ~MODE)
    try:
        sock.bind(path)
        sock.listen(backlog)
    except OSError as e:
        sock.close()
        raise Fatal(f"Couldn't bind UNIX socket {path}: {e.strerror}") from None
    finally:
        os.umask(mask)
    return sock


def _clear(path: str) -> None:
    """Remove a socket that nobody listens at any more. Raises Fatal for anything else that is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Fatal(f"Couldn't bind UNIX socket {path}: there is a file of that name, which is no socket")
    except FileNotFoundError:
        return
    except OSError as e:
        raise Fatal(f"Couldn't bind UNIX socket {path}: {e.strerror}") from None
    # A socket of another kind is refused either way, but for a reason that depends on whether somebody is there. One of
    # the same kind would be accepted, and a passt with --one-off would take that for its guest, and end with it.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        error = probe.connect_ex(path)
    if error in (0, errno.EPROTOTYPE):
        raise Fatal(f"Socket path {path} already in use")
    if error != errno.ECONNREFUSED:
        raise Fatal(f"Couldn't bind UNIX socket {path}: {os.strerror(error)}")
    try:
        os.unlink(path)
    except OSError as e:
        raise Fatal(f"Couldn't remove stale socket {path}: {e.strerror}") from None


def credentials(sock: socket.socket) -> tuple[int, int, int]:
    """PID, UID and GID of the other end, as they are in our namespaces now. Raises OSError."""
    return _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))


class Origin:
    """Who made it, as a socket would show them."""

    def __init__(self) -> None:
        self._pair = socket.socketpair()

    def uid(self) -> int:
        """In the user namespace that we are in now. Raises OSError."""
        return credentials(self._pair[0])[1]

    def close(self) -> None:
        for sock in self._pair:
            sock.close()
