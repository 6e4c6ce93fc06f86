"""Facts from /proc: id mappings, existence of a PID, open descriptors, ephemeral ports."""

from __future__ import annotations

import fcntl
import os

INIT_USERNS_MAP = ["0", "0", "4294967295"]  # the identity over all 32-bit ids


def in_init_userns(uid_map: str = "/proc/self/uid_map") -> bool:
    """Whether the process is in the initial user namespace."""
    try:
        with open(uid_map) as f:
            return f.read().split() == INIT_USERNS_MAP
    except FileNotFoundError:
        return True  # a kernel without user namespaces


def is_mapped(number: int, id_map: str) -> bool:
    """Whether a user (/proc/self/uid_map) or a group (gid_map) exists in our user namespace."""
    with open(id_map) as f:
        ranges = [tuple(map(int, line.split())) for line in f]
    return any(first <= number < first + count for first, _, count in ranges)


def may_set_groups() -> bool:
    """Whether our user namespace lets a process give up its groups (user_namespaces(7))."""
    with open("/proc/self/setgroups") as f:
        return f.read().strip() == "allow"


def overflow_uid(path: str = "/proc/sys/kernel/overflowuid") -> int:
    """The uid that stands for users who do not exist in a user namespace."""
    try:
        with open(path) as f:
            return int(f.read())
    except (OSError, ValueError):
        return 65534


def ephemeral_ports(path: str = "/proc/sys/net/ipv4/ip_local_port_range") -> range | None:
    """Ports that the kernel assigns to sockets without a port; None if the range cannot be read."""
    try:
        with open(path) as f:
            first, last = map(int, f.read().split())
    except (OSError, ValueError):
        return None
    return range(first, last + 1)


def exists(pid: int) -> bool:
    """Whether there is a process `pid`."""
    return os.path.isdir(f"/proc/{pid}")


def describe(pid: int) -> str:
    """'process 1 is systemd of root', or 'process 1'. For error messages only: psutil is slow to import."""
    try:
        import psutil
    except ImportError:
        return f"process {pid}"  # the message says more than that there is no psutil
    try:
        process = psutil.Process(pid)
        return f"process {pid} is {process.name()} of {process.username()}"
    except psutil.Error:
        return f"process {pid}"


def inherited_fds() -> list[int]:
    """Descriptors from 3 up that are open now: the inherited ones, if called before any other is opened."""
    # The directory itself is open during the listing, under a number that is free again afterwards
    return [fd for fd in map(int, os.listdir("/proc/self/fd")) if fd > 2 and _is_open(fd)]


def moved_from_stdio(fd: int) -> int:
    """A new descriptor for the file of standard stream `fd`; /dev/null takes its place there, and in all other standard
    streams of that file: what a program says must not get into a socket that carries something else.
    """
    new, null = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3), os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    for stream in range(3):
        if os.path.sameopenfile(stream, new):
            os.dup2(null, stream)
    os.close(null)
    return new


def _is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def pid_of_path(path: str) -> int | None:
    """PID in a path under /proc/PID/, else None: such a path goes away with the process."""
    parts = path.split("/")
    return int(parts[2]) if len(parts) > 3 and parts[:2] == ["", "proc"] and parts[2].isdecimal() else None
