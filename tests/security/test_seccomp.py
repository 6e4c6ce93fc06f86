"""The filter: what it allows, on every architecture, and that the documentation says the same."""

from __future__ import annotations

import platform
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pyseccomp
import pytest

from passt import PASST, PASTA, seccomp
from passt.calls import Call, Condition, calls, one_of
from passt.daemon import seccomp_table
from passt.log import Fatal

from ..system.support import DEBIAN_PYTHON, REPOSITORY, environment, wait_for

LIMITS = {PASTA: 46, PASST: 40}  # calls, on x86-64 with CPython 3.11
ARCHITECTURES = {  # libseccomp's name -> what uname(2) says
    "X86_64": "x86_64",
    "AARCH64": "aarch64",
    "PPC64LE": "ppc64le",
    "S390X": "s390x",
    "X86": "i686",
    "ARM": "armv7l",
}


def module(*declared: Call) -> ModuleType:
    made = ModuleType("made")
    made.CALLS = declared  # type: ignore[attr-defined]
    return made


@pytest.mark.parametrize("mode", LIMITS)
def test_few_calls_are_left(mode: str) -> None:
    assert seccomp_table.LOADED
    assert len(seccomp.table(mode)) <= LIMITS[mode], "a call was added: do without, or without another one"


NEVER = [
    "execve", "execveat", "fork", "clone", "clone3", "open", "openat2", "ptrace", "mount", "setns", "unshare", "prctl",
    "bpf", "io_uring_setup", "socketpair",
]  # fmt: skip


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("name", NEVER)
def test_what_is_never_left(mode: str, name: str) -> None:
    assert name not in seccomp.collect(mode)


def test_documentation_has_the_same_table() -> None:
    assert (REPOSITORY / "docs" / "seccomp.md").read_text() == seccomp_table.markdown(), "make docs-seccomp"


@pytest.mark.parametrize("mode", LIMITS)
def test_filter_allows_the_calls_of_the_table_and_no_other(mode: str, tmp_path: Path) -> None:
    """Read from the filter itself, on the machine whose names the table has."""
    if platform.machine() != "x86_64":
        pytest.skip("other architectures have other names")
    rules = seccomp.build(mode, "x86_64", seccomp.in_directories((8,)))
    with open(tmp_path / "filter", "w") as f:
        rules.export_pfc(f)
    allowed = re.findall(r'filter for syscall "(\w+)"', (tmp_path / "filter").read_text())
    assert sorted(allowed) == [name for name, _, _ in seccomp.table(mode)]


@pytest.mark.parametrize(
    ("architecture", "call", "names"),
    [
        ("X86_64", "accept4", []),
        ("X86_64", "wait4", []),
        ("AARCH64", "epoll_wait", ["epoll_pwait"]),
        ("AARCH64", "accept4", []),
        ("ARM", "futex", ["futex_time64"]),
        ("ARM", "fcntl", ["fcntl64"]),
        ("X86", "mmap", ["mmap2"]),
        ("X86", "sendto", ["send"]),
        ("S390X", "wait4", []),
    ],
)
def test_other_names_are_for_other_architectures(architecture: str, call: str, names: list[str]) -> None:
    assert seccomp._alternatives(pyseccomp, getattr(pyseccomp.Arch, architecture), call) == names


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_print_seccomp(mode: str) -> None:
    program = "passt" if mode == PASTA else "passt.vm"
    command = [sys.executable, "-m", program, "--print-seccomp"]
    done = subprocess.run(command, env=environment(), cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(f"{line}\n" for line in seccomp_table.lines(mode))


def test_declarations_are_joined() -> None:
    one = module(*calls("read", "write"), *one_of("ioctl", 1, 5, 6), *one_of("fcntl", 1, 7))
    other = module(*calls("fcntl"), *one_of("ioctl", 1, 6, 8), *calls("poll", mode=PASST))
    found = seccomp.collect(PASTA, [one, other, ModuleType("without")])
    assert list(found) == ["fcntl", "ioctl", "read", "write"]
    assert found["fcntl"] == [Call("fcntl")], "any argument includes a certain one"
    assert [call.tests[0] for call in found["ioctl"]] == [Condition(1, 5), Condition(1, 6), Condition(1, 8)]
    assert "poll" in seccomp.collect(PASST, [one, other])


@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_no_alternative_stands_twice(mode: str) -> None:
    """Modules declare the same call for one mode and for both."""
    for name, tests, _ in seccomp.table(mode):
        alternatives = tests.split("; ")
        assert len(alternatives) == len(set(alternatives)), name


# Architectures -----------------------------------------------------------------------------------------------------


def names(call: str) -> tuple[str, ...]:
    return (call, *seccomp.ALTERNATIVES.get(call, ()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", LIMITS)
def test_each_call_exists_there_by_some_name(architecture: str, mode: str) -> None:
    token = getattr(pyseccomp.Arch, architecture)
    multiplexed = pyseccomp.resolve_syscall(token, "socketcall") >= 0  # pseudo numbers from -100 to -120 stand for it
    for call, _, _ in seccomp.table(mode):
        numbers = [pyseccomp.resolve_syscall(token, name) for name in names(call)]
        assert any(n >= 0 or (multiplexed and -120 <= n <= -100) for n in numbers), call


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", LIMITS)
def test_filter_can_be_made_there(architecture: str, mode: str, tmp_path: Path) -> None:
    rules = pyseccomp.SyscallFilter(pyseccomp.KILL_PROCESS)
    token = getattr(pyseccomp.Arch, architecture)
    if token != pyseccomp.system_arch():
        rules.remove_arch(pyseccomp.system_arch())
        rules.add_arch(token)
    rules.set_attr(pyseccomp.Attr.CTL_OPTIMIZE, 2)
    allowed = [call for variants in seccomp.collect(mode).values() for call in variants]
    seccomp.fill(rules, pyseccomp, ARCHITECTURES[architecture], [*allowed, *seccomp.in_directories((8, 9))])
    with open(tmp_path / "filter", "wb") as f:
        rules.export_bpf(f)
    # Variants of setsockopt(2) are one call on x86-32, where socketcall(2) hides the arguments
    assert (tmp_path / "filter").stat().st_size > 8 * len({call.name for call in allowed})


# Without it --------------------------------------------------------------------------------------------------------


def test_no_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pyseccomp", "seccomp"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Fatal, match="pip install pyseccomp, or Debian's python3-seccomp"):
        seccomp.binding()


def test_debians_binding_does_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyseccomp", None)
    monkeypatch.setitem(sys.modules, "seccomp", pyseccomp)
    assert seccomp.binding() is pyseccomp


DEBIANS = """
import os, sys
sys.modules["pyseccomp"] = None
sys.path.append("/usr/lib/python3/dist-packages")
from passt import seccomp; from passt.daemon import seccomp_table
assert seccomp.binding().__file__.startswith("/usr/lib/python3/dist-packages/seccomp."), seccomp.binding()
numbers = [seccomp.number(name) for name in ("read", "open_tree", "pivot_root")]
os.write(1, f"{numbers}\\n".encode())
rules = seccomp.build("pasta", os.uname().machine, seccomp.in_directories((8, 9)))
seccomp.load(rules); os.write(1, b"still here"); os.getpid()
"""


def test_filter_holds_with_the_binding_of_debian() -> None:
    """It takes C ints: the token of most machines is none."""
    if not list(Path("/usr/lib/python3/dist-packages").glob("seccomp.*.so")):
        pytest.skip("needs Debian's python3-seccomp")
    command = [DEBIAN_PYTHON, "-c", DEBIANS]
    done = subprocess.run(command, env=environment(), capture_output=True, timeout=60, check=False)
    numbers = [seccomp.number(name) for name in ("read", "open_tree", "pivot_root")]
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGSYS, f"{numbers}\nstill here".encode(), b"")


def test_kernel_without_filters() -> None:
    class Refuses:
        def load(self) -> None:
            raise OSError(22, "Invalid argument")

    with pytest.raises(Fatal, match="Couldn't install the seccomp filter: Invalid argument"):
        seccomp.load(Refuses())


def test_filter_holds(tmp_path: Path) -> None:
    """In a process of its own: what is allowed is possible, then one call more is the end."""
    code = (
        "import os; from passt import seccomp; from passt.daemon import seccomp_table\n"
        "rules = seccomp.build('passt', os.uname().machine)\n"
        "seccomp.load(rules); os.write(1, b'still here'); os.getpid()"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGSYS, b"still here")


def test_who_waits_may_be_stopped_and_go_on() -> None:
    """A wait with a time limit, as of a thread for the interpreter's lock, is gone on with by restart_syscall(2)."""
    code = (
        "import os, threading; from passt import seccomp; from passt.daemon import seccomp_table\n"
        "rules, lock = seccomp.build('pasta', os.uname().machine), threading.Lock()\n"
        "lock.acquire(); seccomp.load(rules); os.write(1, b'.'); lock.acquire(timeout=60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], env=environment(), stdout=subprocess.PIPE) as waiting:
        assert waiting.stdout is not None and waiting.stdout.read(1) == b"."
        for number, state in ((0, "S"), (signal.SIGSTOP, "T"), (signal.SIGCONT, "SZ")):
            waiting.send_signal(number)
            wait_for(lambda states=state: _state(waiting.pid) in states, f"state {state}")  # type: ignore[misc]
        waiting.terminate()
    assert waiting.returncode == -signal.SIGTERM


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_machine_of_the_tests_is_known() -> None:
    assert platform.machine() in ARCHITECTURES.values()
    library: Any = seccomp.binding()
    assert seccomp.number("read") == library.resolve_syscall(library.Arch.NATIVE, "read")
