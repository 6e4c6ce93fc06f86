"""The system calls allowed after the set-up: seccomp(2), by libseccomp.

Any other call ends the process at once (SECCOMP_RET_KILL_PROCESS); the kernel logs a line with the number of the call
(`dmesg`, type=1326). The list consists of the `CALLS` of all loaded modules and the needs of the interpreter (below);
`--print-seccomp` prints it. The filter is installed after initialisation, before the first byte of the guest is read,
for all threads.

    call                             allowed with                              denied
    -------------------------------  ----------------------------------------  -----------------------------------------
    mmap, mprotect                   no PROT_EXEC                              injected code
    socket                           TCP, UDP and ping, IPv4 or IPv6           netlink, packet and raw sockets
    setsockopt                       declared options                          filters, foreign addresses, marks
    ioctl                            declared requests                         TIOCSTI, requests of drivers
    fcntl                            declared commands                         locks, leases, signals to processes
    openat, readlinkat               reading, in directories with followed     all other files
                                     files (resolv.conf)
    kill                             signal 0                                  signals

There is no clone, execve, setns, unshare, mount, ptrace or prctl, and no open by path: the root is empty anyway.

The names are those of x86-64, where the filter allows exactly the calls of the table (docs/seccomp.md). If another
architecture has another call for the same purpose, that one is allowed there (`ALTERNATIVES`): in place of a call that
it lacks, or beside it if x86-64 does not have it, as with calls for 64-bit times. An argument that cannot be tested,
because it is in memory or behind socketcall(2), is not tested.

Python's binding of libseccomp is pyseccomp, or libseccomp's own, Debian's package python3-seccomp. Their interface is
the same, except that the latter takes C ints: `system_arch()` is too large for it, so it is `Arch.NATIVE` here.
"""

from __future__ import annotations

import atexit  # noqa: F401  # pyseccomp's finalizers would load it when files cannot be opened any more
import ctypes  # noqa: F401  # has its stand-in as an attribute
import mmap
import os
import sys
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

from . import PASTA
from .calls import ALL_BITS, Call, Calls, Condition, calls
from .lean.stand_ins import in_place, stand_in
from .log import Fatal

CALLS: Calls = (
    *calls("futex", "munmap", "mremap", "brk", "rt_sigreturn", "clock_gettime", "exit_group"),
    Call("mmap", (Condition(2, 0, mmap.PROT_EXEC),)),
    # The heap of a second thread; and restart_syscall(2), by which the kernel resumes a futex wait after SIGSTOP,
    # strace(1) or the freezing of a cgroup (podman pause, suspend)
    Call("mprotect", (Condition(2, 0, mmap.PROT_EXEC),), PASTA),
    *calls("madvise", "restart_syscall", mode=PASTA),
)

ALTERNATIVES = {
    "accept4": ("accept",),
    "clock_gettime": ("clock_gettime64",),
    "epoll_wait": ("epoll_pwait",),
    "fcntl": ("fcntl64",),
    "fstat": ("fstat64",),
    "ftruncate": ("ftruncate64",),
    "futex": ("futex_time64",),
    "lseek": ("_llseek",),
    "mmap": ("mmap2",),
    "newfstatat": ("fstatat64", "statx"),
    "recvfrom": ("recv",),
    "recvmmsg": ("recvmmsg_time64",),
    "rt_sigreturn": ("sigreturn",),
    "sendto": ("send",),
    "timerfd_settime": ("timerfd_settime64",),
    "wait4": ("waitpid", "waitid"),
}
SOCKETCALL_NUMBERS = range(-120, -99)  # by which libseccomp names calls behind socketcall(2)
SOCKET_CALLS = frozenset(("socket", "setsockopt"))
UNTESTABLE = {  # machine -> calls whose arguments are in memory there
    "i386": SOCKET_CALLS | {"mmap"},
    "i486": SOCKET_CALLS | {"mmap"},
    "i586": SOCKET_CALLS | {"mmap"},
    "i686": SOCKET_CALLS | {"mmap"},
    "ppc64le": SOCKET_CALLS,
    "s390x": SOCKET_CALLS | {"mmap"},
}


def binding() -> Any:
    """Python's binding of libseccomp. Raises Fatal."""
    try:
        with in_place(_libraries()):
            import pyseccomp
    except ImportError:
        pass  # Debian has the other binding
    except (OSError, RuntimeError) as e:
        raise Fatal(f"Couldn't load libseccomp: {e}: install it (Debian: libseccomp2)") from None
    else:
        return pyseccomp
    try:
        import seccomp
    except ImportError:
        raise Fatal(
            "The sandbox needs libseccomp's Python binding: pip install pyseccomp, or Debian's python3-seccomp"
        ) from None
    return seccomp


def _libraries() -> ModuleType:
    """A stand-in of ctypes.util, by which pyseccomp loads its libraries by name.

    Its find_library() would run ldconfig(8) or a compiler, and its import takes longer than all other imports.
    """

    def find_library(name: str) -> str | None:
        return "libseccomp.so.2" if name == "seccomp" else None  # None: libraries that the interpreter is linked with

    return stand_in("ctypes.util", find_library=find_library)


def collect(mode: str, modules: Iterable[ModuleType] | None = None) -> dict[str, list[Call]]:
    """The calls of `mode` by name, in alphabetical order, declared in `modules` (default: all loaded ones)."""
    if modules is None:
        package = __package__ + "."
        modules = [module for name, module in sorted(sys.modules.items()) if name.startswith(package)]
    found: dict[str, list[Call]] = {}
    for module in modules:
        for call in getattr(module, "CALLS", ()):
            if call.mode in (None, mode):
                found.setdefault(call.name, []).append(call)
    for name, variants in found.items():
        free = [call for call in variants if not call.tests]
        found[name] = free[:1] or list({call.tests: call for call in variants}.values())
    return dict(sorted(found.items()))


def in_directories(descriptors: Iterable[int]) -> Calls:
    """Opening files for reading, and reading links, in these directories."""
    reading = Condition(2, os.O_RDONLY, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC)
    return tuple(
        call
        for fd in descriptors
        for call in (Call("openat", (Condition(0, fd), reading)), Call("readlinkat", (Condition(0, fd),)))
    )


def build(mode: str, machine: str, extra: Sequence[Call] = ()) -> Any:
    """The filter, not loaded yet, for the architecture `machine` of uname(2). Raises Fatal or OSError."""
    library = binding()
    rules = library.SyscallFilter(library.KILL_PROCESS)
    rules.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
    rules.set_attr(library.Attr.CTL_TSYNC, 1)
    if hasattr(library.Attr, "CTL_OPTIMIZE"):  # libseccomp 2.5
        rules.set_attr(library.Attr.CTL_OPTIMIZE, 2)  # a binary tree
    fill(rules, library, machine, [call for variants in collect(mode).values() for call in variants] + list(extra))
    return rules


def fill(rules: Any, library: Any, machine: str, allowed: Iterable[Call]) -> None:
    """Add a rule for each call and its alternatives on other architectures. Raises OSError."""
    untestable = UNTESTABLE.get(machine, frozenset())
    allowed = list(allowed)
    declared = {call.name for call in allowed}
    for call in allowed:
        tests = () if call.name in untestable else call.tests
        arguments = [library.Arg(t.arg, library.MASKED_EQ, t.mask, t.value) for t in tests]
        rules.add_rule(library.ALLOW, call.name, *arguments)
        for name in _alternatives(library, library.Arch.NATIVE, call.name):
            if name not in declared:
                rules.add_rule(library.ALLOW, name, *arguments)


def _alternatives(library: Any, architecture: Any, call: str) -> list[str]:
    """The names by which `architecture` has the call as well, or instead."""
    missing = not _exists(library, architecture, call)
    return [
        name
        for name in ALTERNATIVES.get(call, ())
        if _exists(library, architecture, name) and (missing or not _exists(library, library.Arch.X86_64, name))
    ]


def _exists(library: Any, architecture: Any, call: str) -> bool:
    """Whether an architecture has the call, by itself or behind socketcall(2)."""
    number: int = library.resolve_syscall(architecture, call)
    socketcall = library.resolve_syscall(architecture, "socketcall") >= 0
    return number >= 0 or (socketcall and number in SOCKETCALL_NUMBERS)


def load(rules: Any) -> None:
    """Install the filter for all threads, for good. Raises Fatal."""
    try:
        rules.load()
    except OSError as e:
        why = "the kernel needs CONFIG_SECCOMP_FILTER"
        raise Fatal(f"Couldn't install the seccomp filter: {e.strerror} ({why})") from None


def number(name: str) -> int:
    """The number of a system call on this machine. Raises Fatal if the binding is missing."""
    library = binding()
    value: int = library.resolve_syscall(library.Arch.NATIVE, name)
    return value


def table(mode: str) -> list[tuple[str, str, str]]:
    """The allowed calls of a mode, as text: (call, tests of arguments, modules that declare it)."""
    rows = []
    for name, variants in collect(mode).items():
        users = [module[len(__package__) + 1 :] for module in sorted(sys.modules) if _declares(module, name, mode)]
        rows.append((name, _tests_text(variants), " ".join(users)))
    rows += [(name, "in directories that are followed", "conf.resolv_conf") for name in ("openat", "readlinkat")]
    return sorted(rows)


def _declares(module: str, name: str, mode: str) -> bool:
    if not module.startswith(f"{__package__}."):
        return False
    return any(c.name == name and c.mode in (None, mode) for c in getattr(sys.modules[module], "CALLS", ()))


def _tests_text(variants: Sequence[Call]) -> str:
    """ "arg 1 = 0x5421", or with several variants "arg 0 = 0x2, arg 1 & 0xf = 0x1; arg 0 = ..."; empty for any."""
    return "; ".join(
        ", ".join(f"arg {t.arg}{'' if t.mask == ALL_BITS else f' & {t.mask:#x}'} = {t.value:#x}" for t in call.tests)
        for call in variants
        if call.tests
    )
