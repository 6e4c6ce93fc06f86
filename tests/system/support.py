"""Running the program for real: as root and as an ordinary user, in hosts made of network namespaces, on terminals.

Nothing of the machine's own network is touched. Everything that is waited for is waited for by condition, with a
deadline far beyond what it takes.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import re
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import termios
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .account import account

REPOSITORY = Path(__file__).resolve().parents[2]
TREE = os.environ.get("PASST_TREE", "")  # folder with another build of the program, which is run then (scripts/compile)
DEADLINE = 30.0  # seconds; for conditions, not an expectation
DEBIAN_PYTHON = "/usr/bin/python3"


@dataclass(frozen=True)
class User:
    """A user who runs pasta: ids, a Python that the user may execute, and its environment."""

    name: str
    uid: int
    gid: int
    python: str
    env: dict[str, str]

    @property
    def is_root(self) -> bool:
        return self.uid == 0

    def command(self, argv: Sequence[str], host: Host | None = None) -> list[str]:
        """`argv` as this user, in the network namespace of `host`."""
        enter = ["nsenter", f"--net={host.path}"] if host else []
        if self.uid == os.geteuid():
            return [*enter, *argv]
        return [*enter, "setpriv", f"--reuid={self.uid}", f"--regid={self.gid}", "--clear-groups", *argv]

    def pasta(self, *args: str, host: Host | None = None) -> list[str]:
        """The command line that runs pasta with `args`."""
        return self.command([self.python, "-m", "passt", *args], host)


def may_execute(python: str, uid: int, gid: int) -> bool:
    """Whether a user can start `python` with what the program needs; setpriv(1) still can, so it must start itself."""
    again = f"import os; os.execv({python!r}, [{python!r}, '-c', 'import passt, pyroute2'])"
    probe = ["setpriv", f"--reuid={uid}", f"--regid={gid}", "--clear-groups", python, "-c", again]
    return subprocess.run(probe, env=environment(), cwd="/", capture_output=True, check=False).returncode == 0


def environment(**extra: str) -> dict[str, str]:
    """A small environment that finds this source tree and the packages of the running Python."""
    packages = os.pathsep.join((*([TREE] if TREE else []), str(REPOSITORY), sysconfig.get_path("purelib")))
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    first = {"PYTHONSAFEPATH": "1"} if TREE else {}  # before the current directory
    return {"PATH": path, "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1", "LANG": "C.UTF-8", **first, **extra}


@contextlib.contextmanager
def made_user(name: str) -> Iterator[User]:
    """A user with an account for the tests."""
    with account(name) as entry:
        yield _user(entry)


def _user(entry: pwd.struct_passwd) -> User:
    python, name = sys.executable, entry.pw_name
    if not may_execute(python, entry.pw_uid, entry.pw_gid):
        python = DEBIAN_PYTHON  # ours lies in a directory of root's
        assert may_execute(python, entry.pw_uid, entry.pw_gid), f"{name} has no Python that finds pyroute2"
    return User(name, entry.pw_uid, entry.pw_gid, python, environment(HOME=entry.pw_dir, SHELL="/bin/sh"))


def current_user() -> User:
    entry = pwd.getpwuid(os.geteuid())
    env = environment(HOME=entry.pw_dir, SHELL="/bin/sh")
    return User(entry.pw_name, entry.pw_uid, entry.pw_gid, sys.executable, env)


def wait_for(condition: Callable[[], Any], what: str, deadline: float = DEADLINE) -> Any:
    """The first true value of condition(); fails when `deadline` seconds have passed."""
    end = time.monotonic() + deadline
    while not (value := condition()):
        assert time.monotonic() < end, f"waited {deadline} s in vain: {what}"
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Whether `pid` is a process that has not ended with all of its threads (a zombie has)."""
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        return not select.select([process], [], [], 0)[0]
    finally:
        os.close(process)


@dataclass
class Host:
    """A network namespace that plays the host."""

    name: str

    @property
    def path(self) -> str:
        return f"/run/netns/{self.name}"

    def ip(self, *args: str) -> None:
        """ip(8) in it."""
        subprocess.run(["ip", "-n", self.name, *args], check=True)

    def veth(self, name: str) -> None:
        """An interface whose link is up: its far end lies beside it, named after it."""
        self.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-far")
        self.ip("link", "set", f"{name}-far", "up")

    def show(self, *args: str) -> Any:
        """ip -j, decoded."""
        done = subprocess.run(["ip", "-n", self.name, "-j", *args], check=True, capture_output=True)
        return json.loads(done.stdout or b"[]")


@contextlib.contextmanager
def new_host(*commands: str) -> Iterator[Host]:
    """A namespace set up by ip(8) commands, and `veth NAME`."""
    host = Host(f"pasta-test-{os.getpid()}-{time.monotonic_ns()}")
    subprocess.run(["ip", "netns", "add", host.name], check=True)
    try:
        host.ip("link", "set", "lo", "up")
        for command in commands:
            words = command.split()
            if words[0] == "veth":
                host.veth(words[1])
            else:
                host.ip(*words)
        yield host
    finally:
        subprocess.run(["ip", "netns", "del", host.name], check=True)


@dataclass
class Runner:
    """Runs pasta for a user, and leaves nothing behind."""

    user: User
    host: Host | None = None
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    daemons: list[int] = field(default_factory=list)
    said: str = ""  # what the last daemon wrote to standard error before it went to the background

    def run(self, *args: str, timeout: float = DEADLINE, **kw: Any) -> subprocess.CompletedProcess[str]:
        """pasta ARGS, to its end."""
        kw.setdefault("env", self.user.env)
        kw.setdefault("stdin", subprocess.DEVNULL)
        command = self.user.pasta(*args, host=kw.pop("host", self.host))
        return subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=timeout, check=False, **kw)

    def start(self, *args: str, **kw: Any) -> subprocess.Popen[bytes]:
        """pasta ARGS, running."""
        kw.setdefault("env", self.user.env)
        kw.setdefault("stdin", subprocess.DEVNULL)
        process = subprocess.Popen(self.user.pasta(*args, host=kw.pop("host", self.host)), cwd="/", **kw)
        self.processes.append(process)
        return process

    def daemon(self, *args: str, **kw: Any) -> int:
        """pasta ARGS that goes to the background; its PID."""
        with tempfile.TemporaryDirectory() as directory:
            os.chmod(directory, 0o777)
            path = f"{directory}/pid"
            done = self.run("--pid", path, *args, **kw)
            assert done.returncode == 0, done.stderr
            self.said = done.stderr
            text = Path(path).read_text()
        assert re.fullmatch(r"[1-9]\d*\n", text)
        self.daemons.append(int(text))
        return int(text)

    def namespace(self, *, userns: bool = True) -> int:
        """PID of a process in new namespaces that waits."""
        unshare = ["unshare", *(["--user", "--map-root-user"] if userns else []), "--net", "sleep", "1000"]
        process = subprocess.Popen(self.user.command(unshare), cwd="/", env=self.user.env)
        self.processes.append(process)

        def inside() -> bool:
            with contextlib.suppress(OSError):
                comm = Path(f"/proc/{process.pid}/comm").read_text()
                return comm == "sleep\n"
            return False

        wait_for(inside, "unshare(1)")
        return process.pid

    def close(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream:
                    stream.close()
        for pid in self.daemons:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)


class Pty:
    """A session on a terminal of its own, as a user's shell has it: type, and expect what appears."""

    def __init__(self, argv: Sequence[str], env: dict[str, str]) -> None:
        self.output = ""
        self.pid, self._fd = os.forkpty()
        if self.pid == 0:
            try:
                os.execvpe(argv[0], list(argv), env)
            finally:
                os._exit(127)

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, deadline: float = DEADLINE) -> re.Match[str]:
        """Wait until `pattern` appears in what was not matched yet."""
        end = time.monotonic() + deadline
        while True:
            match = re.search(pattern, self.output)
            if match:
                self.output = self.output[match.end() :]
                return match
            left = end - time.monotonic()
            ready, _, _ = select.select([self._fd], [], [], max(0.0, left))
            assert ready, f"{pattern!r} did not appear; there is {self.output!r}"
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                data = b""  # EIO: the last process has closed the terminal
            assert data, f"{pattern!r} did not appear before the end; there is {self.output!r}"
            self.output += data.decode(errors="replace")

    def attributes(self) -> list[Any]:
        """Those of the terminal (termios(3))."""
        return termios.tcgetattr(self._fd)

    def wait(self) -> int:
        """The session leader's exit code."""
        self.expect_end()
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return os.waitstatus_to_exitcode(status)

    def expect_end(self) -> None:
        with contextlib.suppress(AssertionError):
            self.expect(r"\Z(?!)")  # never matches: reads up to the end

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self._fd)


# State of namespaces and processes ----------------------------------------------------------------------------------

INSIDE = """
import json, os, socket, subprocess
def ip(*a): return json.loads(subprocess.run(["ip", "-j", *a], capture_output=True, check=True).stdout or b"[]")
print(json.dumps({
    "links": ip("link"), "addresses": ip("address"), "routes4": ip("route"), "routes6": ip("-6", "route"),
    "uid": os.getuid(), "pid": os.getpid(), "host": socket.gethostname(),
    "ping": open("/proc/sys/net/ipv4/ping_group_range").read().split(),
    "caps": [l.split()[1] for l in open("/proc/self/status") if l.startswith("CapEff")][0],
}))
"""


def inside(pasta: Runner, *args: str) -> Any:
    """The network of a command."""
    done = pasta.run(*args, "--", "/usr/bin/python3", "-c", INSIDE)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def addresses(link: dict[str, Any]) -> list[str]:
    """Those of global scope."""
    return [f"{a['local']}/{a['prefixlen']}" for a in link["addr_info"] if a["scope"] == "global"]


def by_name(links: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(link for link in links if link["ifname"] == name)


def command_lines() -> Iterator[bytes]:
    """Those of all processes; others may end meanwhile."""
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                yield (directory / "cmdline").read_bytes()


def descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *descendants(int(child))]
    return found


def enter(pid: int, *command: str) -> bytes:
    """The output of `command` in the user and network namespaces of `pid`."""
    nsenter = ["nsenter", f"--target={pid}", "--user", "--preserve-credentials", "--net", "--", *command]
    return subprocess.run(nsenter, check=True, capture_output=True).stdout


def handles(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def leftovers(text: str) -> list[bytes]:
    """Command lines that have `text`, and our PID."""
    return [line for line in command_lines() if text.encode() in line and f"{os.getpid()}".encode() in line]
