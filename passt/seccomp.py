"""The system calls that are left when everything is set up: seccomp(2), by libseccomp.

Whatever is not allowed here ends the process at once (SECCOMP_RET_KILL_PROCESS); the kernel writes a line with the
number of the call to its log (`dmesg`, type=1326). The list is made of the `CALLS` of all modules that are loaded, and
of what the interpreter itself needs (below); `--print-seccomp` prints it. Installed after initialisation and before
the first byte of the guest is read, and for all threads.

    call                             allowed with                              what that closes
    -------------------------------  ----------------------------------------  -----------------------------------------
    mmap, mprotect                   no PROT_EXEC                              code of one's own
    socket                           TCP, UDP and ping, IPv4 or IPv6           netlink, packet and raw sockets
    setsockopt                       each option by itself                     filters, others' addresses, marks
    ioctl                            the requests that are made                TIOCSTI, and drivers' own
    fcntl                            the commands that are made                locks, leases, signals to others
    openat, readlinkat               to read, in directories with files that   all other files
                                     are followed (resolv.conf)
    kill                             signal 0                                  signals

There is no clone, execve, setns, unshare, mount, ptrace or prctl, and no open by path: the root is empty anyway.

The names are those of x86-64. Where another architecture has another call for the same thing that one is allowed, too
(`ALTERNATIVES`); where an argument cannot be tested, because it lies in memory or behind socketcall(2), it is not.

Python's binding of libseccomp is pyseccomp, or Debian's package python3-seccomp, whose interface it has.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from . import PASTA
from .calls import ALL_BITS, Call, Calls, Condition, calls
from .log import Fatal

CALLS: Calls = (
    *calls("futex", "munmap", "mremap", "brk", "rt_sigreturn", "clock_gettime", "exit_group"),
    Call("mmap", (Condition(2, 0, mmap.PROT_EXEC),)),
    # The heap of a second thread; and waiting for each other goes on by restart_syscall(2), at the kernel's own
    # instance, when it was interrupted by SIGSTOP, strace(1) or the freezing of a cgroup (podman pause, suspend)
    Call("mprotect", (Condition(2, 0, mmap.PROT_EXEC),), PASTA),
    *calls("madvise", "restart_syscall", mode=PASTA),
)

ALTERNATIVES = {
    "accept4": ("accept",),
    "clock_gettime": ("clock_gettime64",),
    "epoll_wait": ("epoll_pwait",),
    "fcntl": ("fcntl64",),
    "ftruncate": ("ftruncate64",),
    "futex": ("futex_time64",),
    "lseek": ("_llseek",),
    "mmap": ("mmap2",),
    "recvfrom": ("recv",),
    "recvmmsg": ("recvmmsg_time64",),
    "rt_sigreturn": ("sigreturn",),
    "sendto": ("send",),
    "timerfd_settime": ("timerfd_settime64",),
    "wait4": ("waitpid", "waitid"),
}
UNKNOWN = -1  # the number of a name that libseccomp does not know (__NR_SCMP_ERROR)
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
        with _names_instead_of_a_search():
            import pyseccomp
    except ImportError:
        pass  # Debian has the other one
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


@contextmanager
def _names_instead_of_a_search() -> Iterator[None]:
    """Let pyseccomp load its libraries as all programs do, by their names.

    It asks ctypes.util.find_library(), which runs ldconfig(8), or a compiler, where it finds that they exist. That
    module takes longer to import than all the rest, so a stand-in has its place for that moment.
    """

    def find_library(name: str) -> str | None:
        return "libseccomp.so.2" if name == "seccomp" else None  # None: what the interpreter is linked with

    name = "ctypes.util"
    before, stand_in = sys.modules.get(name), ModuleType(name)
    stand_in.find_library = find_library  # type: ignore[attr-defined]
    sys.modules[name] = stand_in
    setattr(ctypes, "util", stand_in)  # noqa: B010  # whom type checkers take for a module
    try:
        yield
    finally:
        del sys.modules[name]
        delattr(ctypes, "util")
        if before is not None:
            sys.modules[name] = before
            setattr(ctypes, "util", before)  # noqa: B010


def collect(mode: str, modules: Iterable[ModuleType] | None = None) -> dict[str, list[Call]]:
    """The calls of `mode` by name, in alphabetical order, from what `modules` (all that are loaded) declare."""
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
        found[name] = free[:1] or list(dict.fromkeys(variants))
    return dict(sorted(found.items()))


def in_directories(descriptors: Iterable[int]) -> Calls:
    """Opening files to read them, and following links, in these directories."""
    reading = Condition(2, os.O_RDONLY, os.O_ACCMODE | os.O_CREAT | os.O_TRUNC)
    return tuple(
        call
        for fd in descriptors
        for call in (Call("openat", (Condition(0, fd), reading)), Call("readlinkat", (Condition(0, fd),)))
    )


def build(mode: str, machine: str, extra: Sequence[Call] = ()) -> Any:
    """The filter, not loaded yet, for architecture `machine` as uname(2) has it. Raises Fatal or OSError."""
    library = binding()
    rules = library.SyscallFilter(library.KILL_PROCESS)
    rules.set_attr(library.Attr.ACT_BADARCH, library.KILL_PROCESS)
    rules.set_attr(library.Attr.CTL_TSYNC, 1)
    if hasattr(library.Attr, "CTL_OPTIMIZE"):  # libseccomp 2.5
        rules.set_attr(library.Attr.CTL_OPTIMIZE, 2)  # a binary tree
    fill(rules, library, machine, [call for variants in collect(mode).values() for call in variants] + list(extra))
    return rules


def fill(rules: Any, library: Any, machine: str, allowed: Iterable[Call]) -> None:
    """Add a rule for each call, under all names that it has on some architecture. Raises OSError."""
    untestable = UNTESTABLE.get(machine, frozenset())
    for call in allowed:
        tests = () if call.name in untestable else call.tests
        arguments = [library.Arg(t.arg, library.MASKED_EQ, t.mask, t.value) for t in tests]
        rules.add_rule(library.ALLOW, call.name, *arguments)
        for name in ALTERNATIVES.get(call.name, ()):
            if library.resolve_syscall(library.system_arch(), name) != UNKNOWN:
                rules.add_rule(library.ALLOW, name, *arguments)


def load(rules: Any) -> None:
    """From here on nothing else is possible, for any thread. Raises Fatal."""
    try:
        rules.load()
    except OSError as e:
        why = "the kernel needs CONFIG_SECCOMP_FILTER"
        raise Fatal(f"Couldn't install the seccomp filter: {e.strerror} ({why})") from None


def number(name: str) -> int:
    """The number of a system call on this machine. Raises Fatal if the binding is missing."""
    library = binding()
    value: int = library.resolve_syscall(library.system_arch(), name)
    return value


def table(mode: str) -> list[tuple[str, str, str]]:
    """What is allowed in a mode, for people: (call, arguments that it is allowed with, modules that declare it)."""
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
