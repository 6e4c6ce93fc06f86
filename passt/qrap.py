"""qrap: connect to passt, then execute QEMU, for a QEMU without `-netdev stream` (before 7.2).

    qrap FD QEMU ARGS...     the connection is descriptor FD, which the arguments name: -net socket,fd=FD
    qrap ARGS...             QEMU is searched, its network arguments are replaced by ones for descriptor 5

`-netdev socket` and `-netdev stream` have the same protocol, but the former cannot connect to a UNIX socket by itself.
qrap finds a free passt among the sockets /tmp/passt_N.socket with a probe: a passt with a guest closes the connection
at once; a free one answers an ARP request, or, without IPv4, a neighbour solicitation. Whole frames are read, because
QEMU continues on the same stream. A passt that has just lost its guest may still be busy, so the search is repeated as
long as a passt closes the connection.

Any user may listen at such a path, and would be the machine's network. So a socket counts only if the user who listens
there is ours, or root, as the kernel says (SO_PEERCRED). Nothing is sent to any other, which is named if none is left.

After execve(2) only the descriptor is left.
"""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from struct import Struct

from .addr import ANY4
from .linux import inherited, stdio
from .linux.unix import credentials
from .log import Fatal
from .wire import arp, ndp
from .wire.ether import HEADER, TYPE_ARP, icmp6_frame, multicast_mac

USAGE = """\
Usage: qrap FD QEMU [QEMU_ARG]...
       qrap QEMU_ARG...

Connect to the first passt at /tmp/passt_1.socket to /tmp/passt_99.socket that
has no guest, then become QEMU, for a QEMU before 7.2.

With FD and QEMU, the connection is descriptor FD, which the arguments name.
Without, QEMU is found, and its network arguments are replaced.

Example: qrap 5 kvm disk.img -m 1G -net socket,fd=5 -net nic,model=virtio"""
PATHS = tuple(f"/tmp/passt_{n}.socket" for n in range(1, 100))
DEFAULT_FD = 5
TIMEOUT = 0.5  # seconds for passt to answer
TRIES = 50
BUSY = ConnectionResetError, BrokenPipeError, BlockingIOError  # the last one: its backlog is full
INTERVAL = 0.05  # seconds between tries, while a passt is busy
LENGTH = Struct("!I")

# Source and targets of the probe. No host has 0.0.0.0 (RFC 1122, 3.2.1.3), so an answer for it does not make a guest
# believe that an address is taken. A solicitation with a source has an answer for every address.
MAC = bytes.fromhex("020000000001")
LINK_LOCAL = bytes.fromhex("fe8000000000000000000000000000ff")
TARGET4 = ANY4
TARGET6 = bytes.fromhex("fe8000000000000000000000000000fe")

CONFLICTING = ("virtio-net-pci", "virtio-net-ccw", "e1000", "e1000e", "rtl8139")


class NotTrusted(Exception):
    """A socket that another user listens at; its uid."""


class QrapError(Exception):
    """QEMU cannot be started; the reason."""


def probe() -> bytes:
    """An ARP request and a neighbour solicitation, in the format of the stream."""
    request = arp.Packet(arp.REQUEST, MAC, ANY4, bytes(6), TARGET4)
    group = bytes.fromhex("ff0200000000000000000001ff") + TARGET6[13:]  # solicited-node (RFC 4291, 2.7.1)
    solicitation = ndp.NeighbourSolicitation(TARGET6)
    frames = (
        HEADER.pack(b"\xff" * 6, MAC, TYPE_ARP) + request.emit(),
        icmp6_frame(multicast_mac(group), MAC, LINK_LOCAL, group, solicitation.emit()),
    )
    return b"".join(LENGTH.pack(len(frame)) + frame for frame in frames)


def _answers(sock: socket.socket) -> bool:
    """Whether passt sends a frame, which is read as a whole. ConnectionResetError if it closes the connection."""
    sock.sendall(probe())
    try:
        (length,) = LENGTH.unpack(_read(sock, LENGTH.size))
        _read(sock, length)
    except TimeoutError:
        return False
    return True


def _read(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def attach(path: str) -> socket.socket | None:
    """A connection to the free passt at `path`, or None. Raises one of BUSY, or NotTrusted."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(TIMEOUT)
    try:
        sock.connect(path)
        _, uid, _ = credentials(sock)
        if uid not in (os.geteuid(), 0):
            raise NotTrusted(uid)
        if _answers(sock):
            return sock
    except (*BUSY, NotTrusted):
        sock.close()
        raise
    except OSError:
        pass  # no socket there, no listener, or no permission
    sock.close()
    return None


def search(paths: Sequence[str]) -> tuple[str, socket.socket]:
    """Path and connection of the first free passt; QrapError if there is none."""
    for _ in range(TRIES):
        busy, others = 0, []
        for path in paths:
            try:
                if sock := attach(path):
                    return path, sock
            except BUSY:
                busy += 1
            except NotTrusted as e:
                others.append(f"{path} of user {e}")
        not_used = f" (not used, as neither yours nor root's: {', '.join(others)})" if others else ""
        if not busy:
            raise QrapError(f"No passt found at /tmp/passt_N.socket: start passt first{not_used}")
        time.sleep(INTERVAL)
    raise QrapError(f"No free passt found at /tmp/passt_N.socket: {busy} with a guest already{not_used}")


def find_qemu() -> str:
    """The QEMU of this machine."""
    names = ("kvm", "qemu-kvm", f"qemu-system-{platform.machine()}", "/usr/libexec/qemu-kvm")
    for name in names:
        if path := shutil.which(name):
            return path
    raise QrapError(f"Couldn't find QEMU: none of {', '.join(names)}")


def patched(args: Sequence[str]) -> list[str]:
    """`args` without network devices and back-ends, and then with one of each for descriptor 5."""
    kept: list[str] = []
    i = 0
    while i < len(args):
        option = args[i].removeprefix("-") if args[i].startswith("--") else args[i]
        value = args[i + 1] if i + 1 < len(args) else ""
        if option in ("-net", "-netdev") or (option == "-device" and value.split(",")[0] in CONFLICTING):
            i += 2
            continue
        kept.append(args[i])
        i += 1
    device = "virtio-net-ccw" if platform.machine() == "s390x" else "virtio-net-pci"
    return [*kept, "-netdev", f"socket,fd={DEFAULT_FD},id=hostnet0", "-device", f"{device},netdev=hostnet0"]


def command(args: Sequence[str]) -> tuple[int, list[str]]:
    """Descriptor and command line of QEMU from `args`. QrapError: an invalid descriptor."""
    if len(args) >= 2 and args[0].isascii() and args[0].isdigit():
        fd = int(args[0])
        if not 2 < fd < os.sysconf("SC_OPEN_MAX"):
            raise QrapError(f"Invalid file descriptor: {args[0]}")
        return fd, list(args[1:])
    return DEFAULT_FD, [find_qemu(), *patched(args)]


def run(args: Sequence[str]) -> None:
    """Execute QEMU, with the environment and signals of the caller; QrapError if that fails."""
    caller = inherited.take()
    fd, argv = command(args)
    path, sock = search(PATHS)
    sock.settimeout(None)
    stdio.write_error(f"Connected to {path}")
    if sock.fileno() == fd:
        os.set_inheritable(fd, True)
    else:
        os.dup2(sock.fileno(), fd)
    try:
        caller.restore()
        os.execvpe(argv[0], argv, caller.env)
    except OSError as e:
        raise QrapError(f"Couldn't run {argv[0]}: {e.strerror}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """Execute QEMU, or return the exit status: 0 for --help, 1 for an error. `argv` is sys.argv by default."""
    args = list((sys.argv if argv is None else argv)[1:])
    try:
        stdio.fill()
        if not args:
            stdio.write_error(USAGE)
        elif args[0] in ("-h", "--help"):
            stdio.write_out(f"{USAGE}\n")
            return 0
        else:
            run(args)
    except (QrapError, Fatal) as e:
        stdio.write_error(f"qrap: {e}")
    except stdio.ReaderGone:
        pass
    return 1
