"""Starting pasta and passt as the programs do that use them, and what all of these programs rely on.

A client executes `pasta` or `passt` with pipes as standard output and error, waits for the end of the first process,
and reads the pipes to their end. `Client.start` does exactly this, and holds the contract that nearly all of them have
in common:

    the first process ends                  with status 0, when there is nothing left to do
    standard output and error               at their end then: the daemon has no descriptor of them
    other descriptors that were inherited   closed
    descriptors 0 to 2 of the daemon        /dev/null
    the PID file, if there is one           the daemon's PID and a newline, in the file that was there

A `Site` is where a client has its namespace. How it comes to one, and how it gets rid of it, differs: podman binds it
to a file, buildah and the sandboxes have a process in it, rootlesskit has it in a process's mount namespace.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import select
import shlex
import signal
import stat
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ..support import DEADLINE, REPOSITORY, User, alive, wait_for
from ..traffic.support import Namespace

STAYS = 1.2  # seconds, after which whatever looks once per second would have looked
MARK = "PASST_TEST_CLIENT"  # in the environment of what a client starts, by which it is found again
_numbers = itertools.count(1)
_PROGRAMS = {
    "pasta": "passt.cli",
    "passt": "passt.cli",
    "passt4netns": "passt.cli",
    "slirp4netns": "passt.cli",
    "qrap": "passt.qrap",
    "pesto": "passt.pesto.command",
}
_SCRIPT = """#!{python}
import sys
sys.path[:0] = {path!r}
from {module} import main
sys.exit(main())
"""


def install(directory: Path, python: str) -> None:
    """The commands as pip installs them, for a user who may execute `python`; they need no environment variable."""
    path = [str(REPOSITORY), str(Path(pytest.__file__).parents[1])]
    for name, module in _PROGRAMS.items():
        script = directory / name
        script.write_text(_SCRIPT.format(python=python, path=path, module=module))
        script.chmod(0o755)


class Within(Namespace):
    """The user and mount namespaces of an ordinary program on a host: what it runs is root in there."""

    def __init__(self, host: Namespace, user: User) -> None:
        self._host = host
        super().__init__(host.argv(user.command(["unshare", "--user", "--map-root-user", "--mount"])), user)

    def argv(self, command: Sequence[str]) -> list[str]:
        """The host's network is not theirs to enter: first that, as who may, and then the rest, as the owner."""
        enter = ["nsenter", "-t", str(self.pid), "-U", "-m", "--preserve-credentials", "--", *command]
        return self._host.argv(self.user.command(enter))


@dataclass
class Daemon:
    """A daemon that a client has started: its PID, and the output of the pipes."""

    pid: int
    output: str = ""
    process: subprocess.Popen[bytes] | None = None  # the first process, if that is it
    log: Any = None  # the file behind its standard error, then

    def alive(self) -> bool:
        return self.process.poll() is None if self.process else alive(self.pid)

    def said(self) -> str:
        """Its output on standard error so far."""
        return os.pread(self.log.fileno(), 1 << 20, 0).decode(errors="replace") if self.log else self.output

    def expect_end(self, why: str, deadline: float = DEADLINE) -> None:
        wait_for(lambda: not self.alive(), f"pasta or passt ends because {why}", deadline)

    def stays(self) -> None:
        """It goes on although it might be expected to end."""
        end = time.monotonic() + STAYS
        while time.monotonic() < end:
            assert self.alive(), self.said()
            time.sleep(0.05)

    def end(self, number: int = signal.SIGTERM) -> int | None:
        """Send it a signal, and wait for its end; the status, if it is to be had."""
        os.kill(self.pid, number)
        self.expect_end(f"it got signal {number}")
        return self.process.returncode if self.process else None


@dataclass
class Client:
    """A program that starts ours: who it is, and where it runs."""

    place: Namespace
    user: User
    bin: Path
    dir: Path  # its own, as the client and the test name it
    made: list[Daemon] = field(default_factory=list)
    marks: list[str] = field(default_factory=list)

    def argv(self, line: str | Sequence[str], **names: Any) -> list[str]:
        """A command line of the table, to be executed by the test: names filled in, as the client, where it runs."""
        words = shlex.split(line) if isinstance(line, str) else list(line)
        filled = [word.format(dir=self.dir, **names) for word in words]
        at = next((i for i, word in enumerate(filled) if word in _PROGRAMS), None)
        if at is not None:
            filled[at] = str(self.bin / filled[at])
        return self.place.argv(filled if isinstance(self.place, Within) else self.user.command(filled))

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """That of what is started now, with a mark of its own."""
        mark = f"{os.getpid()}-{next(_numbers)}"
        self.marks.append(mark)
        return {**self.user.env, "XDG_RUNTIME_DIR": f"/run/user/{self.user.uid}", **(extra or {}), MARK: mark}

    def run(self, line: str | Sequence[str], **names: Any) -> subprocess.CompletedProcess[str]:
        """A command line to its end, both outputs apart; nothing may be left of it."""
        env = self.environment()
        done = subprocess.run(
            self.argv(line, **names), cwd="/", env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        assert marked(env[MARK]) == []
        return done

    def start(self, line: str | Sequence[str], *, pass_fds: Sequence[int] = (), **names: Any) -> Daemon:
        """A command line that goes to the background: the contract above holds, or the test fails."""
        env = self.environment()
        reader, writer = os.pipe()
        spare_reader, spare_writer = os.pipe()
        with open(reader, "rb") as output, open(spare_reader, "rb") as spare:
            ours = {_identity(os.fstat(fd)) for fd in (reader, spare_reader)}
            process = subprocess.Popen(
                self.argv(line, **names), cwd="/", env=env, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer,
                pass_fds=(spare_writer, spare_reader, *pass_fds),
            )  # fmt: skip
            os.close(writer)
            os.close(spare_writer)
            try:
                said = _read_to_end(output).decode()
                status = process.wait(DEADLINE)
                assert _read_to_end(spare) == b""
            except BaseException:
                process.kill()
                process.wait()
                raise
        assert status == 0, f"status {status}: {said}"
        assert "Traceback" not in said, said
        pids = marked(env[MARK])
        assert len(pids) == 1, f"daemons: {pids}"
        daemon = Daemon(pids[0], said)
        self.made.append(daemon)
        _check_descriptors(daemon.pid, ours)
        return daemon

    def stay(self, line: str | Sequence[str], **kw: Any) -> Daemon:
        """A command line with --foreground. Arguments of subprocess.Popen, and names, are in `kw`."""
        defaults: dict[str, Any] = {
            "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "pass_fds": (), "preexec_fn": None, "cwd": "/",
        }  # fmt: skip
        options: dict[str, Any] = {name: kw.pop(name, default) for name, default in defaults.items()}
        log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the client
        env = self.environment(kw.pop("env", None))
        process = subprocess.Popen(self.argv(line, **kw), env=env, stderr=log, **options)
        daemon = Daemon(process.pid, process=process, log=log)
        self.made.append(daemon)
        return daemon

    def fails(self, line: str | Sequence[str], **names: Any) -> str:
        """A command line that ends with status 1, a reason, and nothing left; returns the reason."""
        done = self.run(line, **names)
        assert (done.returncode, done.stdout) == (1, ""), (done.returncode, done.stdout, done.stderr)
        assert done.stderr
        return done.stderr

    def close(self) -> None:
        for daemon in self.made:
            if daemon.process:
                daemon.process.kill()
                daemon.process.wait()
                daemon.log.close()
        for mark in self.marks:
            for pid in marked(mark):
                os.kill(pid, signal.SIGKILL)


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _read_to_end(file: Any) -> bytes:
    """Everything that comes; fails if the other end stays open, as a client would hang for ever then."""
    data = b""
    end = time.monotonic() + DEADLINE
    while True:
        ready, _, _ = select.select([file], [], [], max(0.0, end - time.monotonic()))
        assert ready, f"somebody still holds the pipe, out of which came {data!r}"
        piece = os.read(file.fileno(), 65536)
        if not piece:
            return data
        data += piece


def marked(mark: str) -> list[int]:
    """PIDs of what was started with this mark, and has not ended."""
    wanted = f"{MARK}={mark}\0".encode()
    found = []
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                if wanted in (directory / "environ").read_bytes() and alive(int(directory.name)):
                    found.append(int(directory.name))
    return found


def _check_descriptors(pid: int, inherited: set[tuple[int, int]]) -> None:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            status = entry.stat()
            assert _identity(status) not in inherited, f"descriptor {entry.name} was inherited"
            if int(entry.name) < 3:
                null = stat.S_ISCHR(status.st_mode) and status.st_rdev == os.makedev(1, 3)
                assert null, f"descriptor {entry.name} is {os.readlink(entry)}"


def read_pid(path: Path) -> int:
    """The PID in a PID file, which is complete."""
    text = path.read_text()
    assert re.fullmatch(r"[1-9]\d*\n", text), repr(text)
    return int(text)


# Where the namespace of a client is ------------------------------------------------------------------------------


@dataclass
class Site:
    """A network namespace of a client."""

    client: Client
    guest: Namespace  # what runs in it
    names: dict[str, Any]  # for the command line

    def start(self, line: str, **names: Any) -> Daemon:
        return self.client.start(line, **self.names, **names)

    def stay(self, line: str, **kw: Any) -> Daemon:
        return self.client.stay(line, **self.names, **kw)

    def fails(self, line: str) -> str:
        return self.client.fails(line, **self.names)

    def addresses(self) -> list[str]:
        """As net.InterfaceAddrs() of Go lists them for podman: no loopback, no link-local IPv6, nothing tentative."""
        found = []
        for link in self.guest.show("address"):
            if link["ifname"] != "lo":
                found += [
                    f"{a['local']}/{a['prefixlen']}"
                    for a in link["addr_info"]
                    if not a.get("tentative") and not (a["family"] == "inet6" and a["scope"] == "link")
                ]
        return found

    def address(self, *, v6: bool = False) -> str:
        """One of them, without its prefix length."""
        return next(a for a in self.addresses() if (":" in a) == v6).partition("/")[0]

    def link(self) -> dict[str, Any]:
        """The interface that is not the loopback interface."""
        (found,) = [link for link in self.guest.show("link") if link["ifname"] != "lo"]
        return dict(found)

    def close(self) -> None:
        self.guest.close()


def sandbox(client: Client, *flags: str, owner: User | None = None) -> Site:
    """Namespaces with a process in them: those of nsjail, nixpak, buildah, of rootlesskit's child."""
    flags = flags or ("--user", "--map-root-user", "--mount")
    made = Namespace(client.argv(["unshare", "--net", *flags]), owner or client.user)
    made.run("ip", "link", "set", "lo", "up")
    pid = made.pid
    names = {"pid": pid, "netns": f"/proc/{pid}/ns/net", "userns": f"/proc/{pid}/ns/user"}
    return Site(client, made, names)


class Bound(Site):
    """A namespace bound to a file, as podman and rootlesskit have it; it may have no process."""

    def __init__(self, client: Client, path: str, where: Namespace | None = None, root: str = "") -> None:
        """`path` as seen from `where` (None: the client's place), whose root directory is `root` for pasta."""
        self.path = path
        self.where = where or client.place
        make = 'mkdir -p "$(dirname "$1")" && : > "$1" && unshare --net="$1" ip link set lo up'
        self.where.run("sh", "-c", make, "sh", path)
        self._bound = True
        guest = Namespace(self.where.argv(["nsenter", f"--net={path}"]), client.user)
        super().__init__(client, guest, {"netns": root + path})

    def leave(self) -> None:
        """End what runs in the namespace: the file is all that keeps it."""
        self.guest.close()

    def unbind(self) -> None:
        """As podman tears a network down: umount2(MNT_DETACH), unlink, and no signal."""
        if self._bound:
            self.where.run("sh", "-c", 'umount -l "$1" && rm "$1"', "sh", self.path)
            self._bound = False

    def close(self) -> None:
        self.leave()
        self.unbind()
