"""Processes in the sandbox that try to get out: `prisoner.py MODE` (pasta, passt, or passt --vhost-user), one for each
attempt below.

Each goes through the steps of the daemon (`daemon.detach`), in the foreground, with the modules of that mode
loaded, and then makes an attacker's system call, without Python's wrapper. For each a line of JSON is printed: [name,
exit status or minus the signal, output]. The output is "ready", and then the result ("error NAME" or "done"), unless
the process is killed before.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

from passt import PASTA, log, seccomp
from passt.conf.options import Options
from passt.daemon.detach import Sandbox, detach
from passt.sandbox import isolation

libc = ctypes.CDLL(None, use_errno=True)
ATTEMPTS: dict[str, Callable[[], int]] = {}
NUMBERS: dict[str, int] = {}
NAMES = (
    "execve", "execveat", "open", "openat", "openat2", "creat", "ptrace", "process_vm_readv", "mount",
    "umount2", "pivot_root", "chroot", "open_tree", "move_mount", "unshare", "setns", "clone", "clone3", "fork",
    "vfork", "socket", "socketpair", "kill", "tkill", "tgkill", "pidfd_open", "pidfd_send_signal", "mmap",
    "mprotect", "pkey_mprotect", "ioctl", "fcntl", "setsockopt", "prctl", "seccomp", "bpf", "io_uring_setup",
    "userfaultfd", "perf_event_open", "keyctl", "add_key", "memfd_create", "shmget", "msgget", "init_module",
    "reboot", "setuid", "setresuid", "capset", "prlimit64", "unlink", "unlinkat", "rename", "link", "linkat",
    "symlink", "mkdir", "readlinkat", "name_to_handle_at", "open_by_handle_at", "sendfile", "tee", "swapon",
    "sethostname", "syslog", "kexec_load", "getdents64", "statfs",
)  # fmt: skip
BUFFER = ctypes.create_string_buffer(4096)
HERE = -100  # AT_FDCWD


def call(name: str, *args: int | bytes | None) -> int:
    """A system call; returns what it returns, or minus the errno."""
    values = [ctypes.c_long(a) if isinstance(a, int) else a for a in args]
    result: int = libc.syscall(ctypes.c_long(NUMBERS[name]), *values)
    return -ctypes.get_errno() if result < 0 else result


def plain(name: str, *args: int | bytes | None, suffix: str = "") -> None:
    """Register an attempt that is one system call."""
    ATTEMPTS[name + suffix] = lambda: call(name, *args)


ETC = 200  # the descriptor of /etc, as following resolv.conf has it
HOSTILE_FLAGS = 0x10000000  # CLONE_NEWUSER

# Programs and processes
plain("execve", b"/bin/sh", None, None)
plain("execveat", ETC, b"passwd", None, None, 0)
plain("fork")
plain("vfork")
plain("clone", signal.SIGCHLD, 0, 0, 0, 0)
plain("clone", HOSTILE_FLAGS | signal.SIGCHLD, 0, 0, 0, 0, suffix=" with a user namespace")
plain("clone3", ctypes.addressof(BUFFER), 88)
plain("ptrace", 16, 1, 0, 0)  # PTRACE_ATTACH
plain("process_vm_readv", 1, 0, 0, 0, 0, 0)
plain("kill", 1, signal.SIGKILL, suffix=" another process")
plain("kill", -1, signal.SIGTERM, suffix=" everybody")
plain("tkill", 1, signal.SIGKILL)
plain("tgkill", 1, 1, signal.SIGKILL)
plain("pidfd_open", 1, 0)
plain("pidfd_send_signal", 0, signal.SIGKILL, None, 0)
# Files
plain("open", b"/etc/passwd", 0)
plain("creat", b"/tmp/escaped", 0o600)
plain("openat", HERE, b"/etc/passwd", 0, 0)
plain("openat", HERE, b"etc/passwd", 0, 0, suffix=" relative")
plain("openat", ETC, b"/etc/passwd", 0, 0, suffix=" absolute beside a directory that is kept")
plain("openat", ETC, b"../etc/passwd", 0, 0, suffix=" up from a directory that is kept, and down again")
plain("openat", ETC, b"../bin/sh", 0, 0, suffix=" up from a directory that is kept")
plain("openat", ETC, b"passwd", os.O_RDONLY, 0, suffix=" to read in a directory that is kept")
plain("openat", ETC, b"passwd", os.O_RDWR, 0, suffix=" for writing")
plain("openat", ETC, b"escaped", os.O_RDONLY | os.O_CREAT, 0o600, suffix=" a new file")
plain("openat", ETC, b"mtab", 0, 0, suffix=" through a link into /proc")
plain("openat2", ETC, b"passwd", ctypes.addressof(BUFFER), 24)
plain("readlinkat", HERE, b"/proc/self/exe", ctypes.addressof(BUFFER), 100)
plain("unlink", b"/etc/passwd")
plain("unlinkat", ETC, b"passwd", 0)
plain("rename", b"/a", b"/b")
plain("link", b"/a", b"/b")
plain("linkat", ETC, b"passwd", ETC, b"x", 0)
plain("symlink", b"/a", b"/b")
plain("mkdir", b"/a", 0o700)
plain("getdents64", ETC, ctypes.addressof(BUFFER), 4096)
plain("name_to_handle_at", ETC, b"", 0, 0, 0)
plain("open_by_handle_at", ETC, 0, 0)
plain("sendfile", 1, 0, 0, 1)
plain("memfd_create", b"x", 0)
# Namespaces, mounts
plain("mount", b"none", b"/", b"proc", 0, 0)
plain("umount2", b"/", 2)
plain("pivot_root", b".", b".")
plain("chroot", b".")
plain("open_tree", HERE, b"/", 1)
plain("move_mount", ETC, b"", HERE, b"/", 4)
plain("unshare", HOSTILE_FLAGS)
plain("unshare", 0x40000000, suffix=" a network namespace")
plain("setns", ETC, 0)
plain("sethostname", b"x", 1)
# Sockets
for family in ("AF_NETLINK", "AF_PACKET", "AF_UNIX", "AF_VSOCK", "AF_ALG"):
    plain("socket", int(getattr(socket, family)), socket.SOCK_RAW, 0, suffix=f" {family}")
plain("socket", socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP, suffix=" raw IPv4")
plain("socket", socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6, suffix=" raw IPv6")
plain("socketpair", socket.AF_UNIX, socket.SOCK_STREAM, 0, ctypes.addressof(BUFFER))
for suffix, kind, proto in ((" MPTCP", socket.SOCK_STREAM, 262), (" UDP-Lite", socket.SOCK_DGRAM, 136)):
    plain("socket", socket.AF_INET, kind, proto, suffix=suffix)
for suffix, level, option in (
    (" IP_TRANSPARENT", 0, 19),
    (" IPV6_TRANSPARENT", 41, 75),
    (" SO_ATTACH_FILTER", 1, 26),
    (" SO_ATTACH_BPF", 1, 50),
    (" SO_MARK", 1, 36),
    (" TCP_REPAIR", 6, 19),
    (" TCP_ULP", 6, 31),
    (" TCP_CONGESTION", 6, 13),
    (" IP_HDRINCL", 0, 3),
    (" IP_OPTIONS", 0, 4),
    (" of netfilter", 0, 64),
    (" of netfilter, IPv6", 41, 64),
):
    plain("setsockopt", 0, level, option, ctypes.addressof(BUFFER), 4, suffix=suffix)
plain("setsockopt", 0, 270, 1, ctypes.addressof(BUFFER), 4, suffix=" of netlink")
plain("setsockopt", 0, 263, 1, ctypes.addressof(BUFFER), 4, suffix=" of packet sockets")
# Memory
PROT_EXEC = 4
plain("mmap", 0, 4096, 1 | 2 | PROT_EXEC, 0x22, -1, 0, suffix=" executable memory")
plain("mprotect", ctypes.addressof(BUFFER) & ~4095, 4096, 1 | PROT_EXEC, suffix=" executable memory")
plain("pkey_mprotect", ctypes.addressof(BUFFER) & ~4095, 4096, 1 | PROT_EXEC, -1)
# The kernel
plain("ioctl", 0, 0x5412, b"x", suffix=" TIOCSTI")
plain("ioctl", 0, 0x89B0, 0, suffix=" of a network device")
plain("fcntl", 0, 8, 1, suffix=" F_SETOWN")
plain("prctl", 15, b"harmless", 0, 0, 0)
plain("seccomp", 1, 0, 0)
plain("bpf", 0, 0, 0)
plain("io_uring_setup", 1, ctypes.addressof(BUFFER))
plain("userfaultfd", 0)
plain("perf_event_open", ctypes.addressof(BUFFER), 0, -1, -1, 0)
plain("keyctl", 0, 0, 0, 0, 0)
plain("add_key", b"user", b"x", b"y", 1, -3)
plain("shmget", 1, 4096, 0o1600)
plain("msgget", 1, 0o1600)
plain("init_module", None, 0, b"")
plain("kexec_load", 0, 0, 0, 0)
plain("swapon", b"/dev/sda", 0)
plain("reboot", 0, 0, 0, 0)
plain("syslog", 3, ctypes.addressof(BUFFER), 10)
# Identity
plain("setuid", 0)
plain("setresuid", 0, 0, 0)
plain("capset", 0, 0)
plain("prlimit64", 1, 7, 0, ctypes.addressof(BUFFER))


def main() -> None:
    mode = sys.argv[1]
    log.setup(mode, log.ERR, syslog=False)
    if mode == PASTA:
        from passt import pasta  # noqa: F401
        from passt.daemon import pasta as daemon_pasta  # noqa: F401
        from passt.daemon import wiring
        from passt.namespace import terminal  # noqa: F401
    else:
        from passt import passt  # noqa: F401
        from passt.daemon import passt as daemon_passt  # noqa: F401
        from passt.daemon import wiring  # noqa: F401
        if "--vhost-user" in sys.argv:
            from passt.link import vhost_user  # noqa: F401
            from passt.migration import steps  # noqa: F401
        else:
            from passt.link import stream_socket  # noqa: F401
    from passt.conf import resolv_conf  # noqa: F401
    from passt.control import json_api  # noqa: F401
    from passt.control import slirp as control_slirp  # noqa: F401

    for name in NAMES:
        NUMBERS[name] = seccomp.number(name)
    os.dup2(os.open("/etc", os.O_PATH | os.O_DIRECTORY), ETC)
    isolation.become(isolation.choose_identity(None), *isolation.KEPT_CAPABILITIES)  # as for a namespace of root's
    for attempt in ATTEMPTS:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            _try(mode, ATTEMPTS[attempt], writer)
        os.close(writer)
        with open(reader) as f:
            said = f.read()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps([attempt, status, said]), flush=True)


def _try(mode: str, attempt: Callable[[], int], out: int) -> NoReturn:
    kept = isolation.running_capabilities(own_tap=True, over_host=False) if mode == PASTA else ()
    detach(Options(mode=mode, foreground=True), None, Sandbox(mode, False, kept, None, (ETC,)))
    os.write(out, b"ready ")
    result = attempt()
    os.write(out, (f"error {errno.errorcode[-result]}" if result < 0 else "done").encode())
    os._exit(0)


if __name__ == "__main__":
    main()
