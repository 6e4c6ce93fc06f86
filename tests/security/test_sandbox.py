"""The remaining rights of a running daemon, read from /proc by another process, for every kind of start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import psutil
import pytest

from passt.linux.syscall import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE

from ..system.support import DEBIAN_PYTHON, Runner, User, new_host, wait_for

NOBODY = 65534
NAMESPACE_RIGHTS = 1 << CAP_NET_ADMIN | 1 << CAP_NET_BIND_SERVICE
KINDS = "user", "mnt", "pid", "ipc", "uts", "net"


@dataclass
class Inmate:
    """A process, seen from outside."""

    pid: int

    @property
    def status(self) -> dict[str, str]:
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}

    def capabilities(self, which: str) -> int:
        return int(self.status[f"Cap{which}"], 16)

    def own(self) -> set[str]:
        """Kinds of namespaces that are not those of the tests."""
        return {k for k in KINDS if os.readlink(f"/proc/{self.pid}/ns/{k}") != os.readlink(f"/proc/self/ns/{k}")}

    def descriptors(self) -> dict[int, str]:
        """Those that it keeps: a table of the kernel that it reads now is open for a moment."""
        before = self._descriptors_now()
        time.sleep(0.1)
        return dict(before.items() & self._descriptors_now().items())

    def _descriptors_now(self) -> dict[int, str]:
        directory, found = f"/proc/{self.pid}/fd", {}
        for fd in os.listdir(directory):
            with suppress(FileNotFoundError):
                found[int(fd)] = os.readlink(f"{directory}/{fd}")
        return found


class HalfRight(User):
    """With two of root's capabilities."""

    def command(self, argv: Sequence[str], host: object = None) -> list[str]:
        assert host is None
        rights = "-all,+sys_admin,+net_admin"
        return [*super().command([]), f"--inh-caps={rights}", f"--ambient-caps={rights}", *argv]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def attached(pasta: Runner, stack: ExitStack, *options: str, configured: bool = True) -> Inmate:
    """pasta in the background, for a namespace of another user."""
    options = ("--config-net", *options) if configured else options
    if pasta.user.is_root:
        target = stack.enter_context(new_host())
        return Inmate(pasta.daemon("-q", *options, "--netns", target.path))
    return Inmate(pasta.daemon("-q", *options, str(pasta.namespace())))


def spawning(pasta: Runner, stack: ExitStack, *options: str, configured: bool = True) -> Inmate:
    """pasta in the foreground, with a command."""
    process = pasta.start(
        "-q",
        *(["--config-net"] if configured else []),
        *options,
        "--",
        "sh",
        "-c",
        "echo ready; cat",
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    return Inmate(process.pid)


def machine(pasta: Runner, stack: ExitStack, *options: str) -> Inmate:
    """passt in the background."""
    directory = Path(f"/tmp/passt-security-{os.getpid()}")
    directory.mkdir(exist_ok=True)
    os.chmod(directory, 0o777)
    stack.callback(subprocess.run, ["rm", "-rf", str(directory)], check=True)
    command = pasta.user.command(
        [pasta.user.python, "-m", "passt.vm", "-q", "-P", f"{directory}/pid", "-s", f"{directory}/socket", *options]
    )
    done = subprocess.run(command, env=pasta.user.env, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    pid = int((directory / "pid").read_text())
    pasta.daemons.append(pid)
    return Inmate(pid)


Start = Callable[..., Inmate]
WAYS = [attached, spawning, machine]


@pytest.mark.parametrize("start", WAYS)
def test_no_rights_are_left(pasta: Runner, stack: ExitStack, start: Start) -> None:
    inmate = start(pasta, stack)
    status = inmate.status
    assert status["Seccomp"] == "2" and status["NoNewPrivs"] == "1"
    assert status["Uid"].split() == [str(NOBODY if pasta.user.is_root else pasta.user.uid)] * 4
    assert not status["Groups"] or not pasta.user.is_root
    over_host = pasta.user.is_root and start is attached  # they would be rights over the machine
    allowed = 0 if start is machine or over_host else NAMESPACE_RIGHTS
    assert inmate.capabilities("Eff") == inmate.capabilities("Prm") == allowed
    assert [inmate.capabilities(which) for which in ("Inh", "Bnd", "Amb")] == [0, 0, 0]
    for thread in os.listdir(f"/proc/{inmate.pid}/task"):
        own = Path(f"/proc/{inmate.pid}/task/{thread}/status").read_text()
        assert re.search(r"^Seccomp:\s2$", own, re.M) and int(re.findall(r"CapEff:\s(\w+)", own)[0], 16) == allowed
    assert os.stat(f"/proc/{inmate.pid}/environ").st_uid == 0  # not dumpable: no other process can read its memory


@pytest.mark.parametrize("start", [attached, spawning])
def test_without_an_interface_there_are_no_rights_over_any(pasta: Runner, stack: ExitStack, start: Start) -> None:
    inmate = start(pasta, stack, "--splice-only", configured=False)
    expected = 0 if pasta.user.is_root and start is attached else 1 << CAP_NET_BIND_SERVICE
    assert inmate.capabilities("Eff") == inmate.capabilities("Prm") == expected


def test_rights_that_only_seem_to_be_enough(root_pasta: Runner, ordinary_user: User, stack: ExitStack) -> None:
    """CAP_SYS_ADMIN makes namespaces, but empties no bounding set."""
    inmate = machine(Runner(HalfRight(**vars(ordinary_user)), daemons=root_pasta.daemons), stack)
    assert [inmate.capabilities(which) for which in ("Eff", "Prm", "Inh", "Bnd", "Amb")] == [0] * 5


@pytest.mark.parametrize("start", WAYS)
def test_nothing_is_in_sight(pasta: Runner, stack: ExitStack, start: Start) -> None:
    inmate = start(pasta, stack)
    assert os.listdir(f"/proc/{inmate.pid}/root/") == []
    assert os.readlink(f"/proc/{inmate.pid}/cwd") == "/"
    mounts = Path(f"/proc/{inmate.pid}/mountinfo").read_text().splitlines()
    assert len(mounts) == 1 and " / / ro,nosuid,nodev,noexec" in mounts[0]
    assert inmate.own() >= {"mnt", "ipc", "uts"}
    assert "net" not in inmate.own()
    assert ("pid" in inmate.own()) == (start is not spawning)
    if start is not spawning:
        assert inmate.status["NSpid"].split()[-1] == "1"


@pytest.mark.parametrize("start", WAYS)
def test_descriptors_are_those_that_are_used(pasta: Runner, stack: ExitStack, start: Start) -> None:
    descriptors = start(pasta, stack).descriptors()
    if start is not spawning:
        assert {descriptors.pop(fd) for fd in range(3)} == {"/dev/null"}
    else:
        for fd in range(3):
            descriptors.pop(fd)
    assert list(descriptors.values()).count("anon_inode:inotify") == 1, "a user has few of them"
    kept = [what for what in descriptors.values() if not re.match(r"socket:|pipe:|anon_inode:", what)]
    paths = [re.sub(r"/proc/\d+/", "/proc/PID/", what) for what in kept]
    assert set(paths) <= {
        "/dev/net/tun",
        "/proc/PID/stat",
        "/",
        "/etc",
        os.path.dirname(os.path.realpath("/etc/resolv.conf")),
    }
    assert len(paths) == len(set(paths))


TAKE = """
import os
process = os.pidfd_open(1)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
taken = [fd for fd in range(64) if libc.syscall(438, process, fd, 0) >= 0]  # pidfd_getfd
print(taken, ctypes.get_errno())
for what in "mem", "maps", "environ", "fd":
    try:
        os.listdir("/proc/1/fd") if what == "fd" else open(f"/proc/1/{what}").read(1)
        print(what)
    except OSError as e:
        print(e.strerror)
"""


def test_the_first_process_of_a_command_has_nothing_of_ours(pasta: Runner, stack: ExitStack) -> None:
    """It is a copy of pasta, under the control of root in the namespace."""
    directory = stack.enter_context(TemporaryDirectory())
    os.chmod(directory, 0o777)
    files = "-P", f"{directory}/pid", "-l", f"{directory}/log", "-p", f"{directory}/pcap"
    spawning(pasta, stack, *files, "-c", f"{directory}/control")
    (init,) = psutil.Process(pasta.processes[-1].pid).children()
    open_there = Inmate(init.pid).descriptors()
    assert [what for fd, what in open_there.items() if fd > 2 and not what.startswith("pipe:")] == []
    executed = b"/supervisor." in Path(f"/proc/{init.pid}/cmdline").read_bytes()
    assert executed or pasta.user.is_root, "nobody may not execute root's interpreter, but others may"
    if executed:
        assert libc(init.pid).isdisjoint(libc(pasta.processes[-1].pid)), "it is still a copy"
        return
    assert os.stat(f"/proc/{init.pid}/environ").st_uid == 0  # not dumpable
    done = pasta.run("-q", "--config-net", *files, "--", DEBIAN_PYTHON, "-c", TAKE)
    assert done.stdout.splitlines() == ["[] 1", *["Permission denied"] * 4], done.stderr


def libc(pid: int) -> set[str]:
    """Where it lies."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {line.split("-")[0] for line in lines if "/libc." in line}


ASK = """
import socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect(sys.argv[1])
try:
    s.send(b"{}\\n")
except BrokenPipeError:
    pass  # it was answered before it asked
print(s.recv(1000).decode())
"""


def ask(user: User, path: str) -> str:
    """The answer of the control socket at `path`."""
    command = user.command([DEBIAN_PYTHON, "-c", ASK, path])
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout


@pytest.mark.parametrize("start", [attached, machine])
def test_others_do_not_control_what_root_has_started(
    root_pasta: Runner, ordinary_user: User, stack: ExitStack, start: Start
) -> None:
    """Even if the socket's mode allows it."""
    directory = stack.enter_context(TemporaryDirectory())
    path = f"{directory}/control"
    start(root_pasta, stack, "-c", path)
    assert "is not allowed" not in ask(root_pasta.user, path)
    for opened in directory, path:
        os.chmod(opened, 0o777)
    for uid in (ordinary_user.uid, 2, NOBODY - 1):
        assert "is not allowed" in ask(replace(ordinary_user, uid=uid), path)


def test_root_that_asks_for_it_stays_root(root_pasta: Runner, stack: ExitStack) -> None:
    inmate = attached(root_pasta, stack, "--runas", "0")
    assert inmate.status["Uid"].split() == ["0"] * 4
    assert inmate.status["Seccomp"] == "2"
    assert inmate.capabilities("Eff") == 0
    assert os.listdir(f"/proc/{inmate.pid}/root/") == []


@pytest.mark.parametrize("start", WAYS)
def test_work_ends_as_usual(pasta: Runner, stack: ExitStack, start: Start) -> None:
    inmate = start(pasta, stack)
    if start is spawning:
        process = pasta.processes[-1]
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(30) == 0
    else:
        os.kill(inmate.pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{inmate.pid}"), "the end")
