"""passt-repair: set TCP_REPAIR on sockets of passt, for the migration of a virtual machine.

    passt-repair PATH     connect to the socket that passt listens at (--repair-path of passt(1))
    passt-repair DIR      wait until there is one in DIR, a file that ends in .repair

The kernel asks for CAP_NET_ADMIN in the user namespace of the sockets' network, which passt does not have, and this
program does as little as possible with it:

    passt                                          here
      |   command (1 byte), up to 253 sockets ->     |  setsockopt(TCP_REPAIR, command) on each, and room for what
      |                                              |    was sent in new ones (`make_room`); they are closed
      |   <- the same byte                           |
      |   end of file ->                             |  end, with status 0

    command   1: on   0: off   -1: off, without a window probe

Anything else, and a socket for which it fails, ends the program with status 1, and passt sees the connection close. The
protocol is that of the original: either helper serves either passt.
"""

from __future__ import annotations

import array
import os
import select
import socket
import stat
import sys
from collections.abc import Sequence

from .linux import inotify, stdio
from .linux.tcp_repair import OFF, OFF_WITHOUT_PROBE, ON, SOCKETS_MAX, SUFFIX, TCP_REPAIR, make_room
from .log import Fatal

USAGE = """\
Usage: passt-repair PATH|DIR

Set TCP_REPAIR on the sockets that passt sends to its helper, so that TCP
connections can migrate with a virtual machine. This needs CAP_NET_ADMIN.

PATH is the socket of --repair-path of passt, by default that of the guest with
.repair behind it. In DIR, the first such socket is taken, when there is one.

Example: passt-repair /tmp/passt_1.socket.repair"""
COMMANDS = ON, OFF, OFF_WITHOUT_PROBE


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one passt until it needs no more; returns the exit status. `argv` is sys.argv by default."""
    args = list((sys.argv if argv is None else argv)[1:])
    try:
        stdio.fill()
        if len(args) != 1 or (args[0].startswith("-") and args[0] not in ("-h", "--help")):
            stdio.write_error(USAGE)
        elif args[0] in ("-h", "--help"):
            stdio.write_out(f"{USAGE}\n")
            return 0
        else:
            with _connect(_find(args[0])) as sock:
                serve(sock)
            return 0
    except Fatal as e:
        stdio.write_error(f"passt-repair: {e}")
    except stdio.ReaderGone:
        pass
    return 1


def _find(name: str) -> str:
    """The path of the socket: `name`, or the first that there is in the directory of that name. Raises Fatal."""
    try:
        if not stat.S_ISDIR(os.stat(name).st_mode):
            return name
        changes = inotify.new()
        try:
            inotify.add(changes, name, inotify.CREATE | inotify.MOVED_TO)
            while not (found := _sockets_in(name)):
                select.select([changes], [], [])
                inotify.read(changes)
        finally:
            os.close(changes)
    except OSError as e:
        raise Fatal(f"Couldn't look for the socket of passt at {name}: {e.strerror}") from None
    return found[0]


def _sockets_in(directory: str) -> list[str]:
    """Raises OSError."""
    with os.scandir(directory) as entries:
        return sorted(e.path for e in entries if e.name.endswith(SUFFIX) and stat.S_ISSOCK(os.lstat(e.path).st_mode))


def _connect(path: str) -> socket.socket:
    """Raises Fatal."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError as e:
        sock.close()
        raise Fatal(f"Couldn't connect to {path}: {e.strerror or e}") from None
    return sock


def serve(sock: socket.socket) -> None:
    """Do what is asked for, until the end of file. Raises Fatal."""
    while True:
        try:
            data, control, flags, _ = sock.recvmsg(1, socket.CMSG_SPACE(4 * SOCKETS_MAX))
        except OSError as e:
            raise Fatal(f"Couldn't read from passt: {e.strerror}") from None
        fds = array.array("i")
        for level, kind, value in control:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(value[: len(value) & ~3])
        try:
            if not data and not fds:
                return
            _do(data, fds, whole=not flags & socket.MSG_CTRUNC)
            sock.sendall(data)
        except OSError as e:
            raise Fatal(f"Couldn't answer passt: {e.strerror}") from None
        finally:
            for fd in fds:
                os.close(fd)


def _do(data: bytes, fds: Sequence[int], *, whole: bool) -> None:
    """Carry out one command. Raises Fatal."""
    command = int.from_bytes(data, "big", signed=True)
    if len(data) != 1 or command not in COMMANDS or not fds or not whole:
        raise Fatal(f"passt sent {data.hex() or 'nothing'} with {len(fds)} sockets: no command that is known")
    for fd in fds:
        try:
            one = socket.socket(fileno=fd)
            try:
                one.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, command)
                if command == ON:
                    make_room(one)
            finally:
                one.detach()
        except OSError as e:
            raise Fatal(f"Couldn't set TCP_REPAIR to {command}: {e.strerror}") from None
