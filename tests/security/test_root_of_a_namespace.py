"""Root of a user namespace, as in a container: the identity that it changes to, and the features that work then."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ..system.support import Runner, User, wait_for

NOBODY = 65534


@dataclass(frozen=True)
class NamespaceRoot(User):
    """Uid 0 of the user namespace of process `holder`."""

    holder: int = 0

    def command(self, argv: object, host: object = None) -> list[str]:
        assert host is None and isinstance(argv, list)
        enter = f"--user=/proc/{self.holder}/ns/user"
        return ["nsenter", enter, "--setuid=0", "--setgid=0", "setpriv", "--clear-groups", *argv]


def hold(user: User, *ids: int) -> Iterator[Runner]:
    """Root of a new user namespace, who is `user` outside. Of all others, `ids` exist there."""
    sleep = subprocess.Popen(["unshare", "--user", "sleep", "1000"])
    try:
        files = Path(f"/proc/{sleep.pid}")
        wait_for(lambda: (files / "comm").read_text() == "sleep\n", "unshare(1)")
        for name, outside in (("uid_map", user.uid), ("gid_map", user.gid)):
            (files / name).write_text("".join((f"0 {outside} 1\n", *(f"{i} {i} 1\n" for i in ids))))
        runner = Runner(replace(NamespaceRoot(**vars(user)), holder=sleep.pid))
        yield runner
        runner.close()
    finally:
        sleep.kill()
        sleep.wait()


@pytest.fixture
def container(root: User, ordinary_user: User) -> Iterator[Runner]:
    """Root of a user namespace that has the user `nobody` as well."""
    yield from hold(ordinary_user, NOBODY)


@pytest.fixture
def alone(root: User, ordinary_user: User) -> Iterator[Runner]:
    """Root where there is no other user."""
    yield from hold(ordinary_user)


@pytest.fixture
def directory() -> Iterator[Path]:
    with TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def uids(pid: int) -> list[int]:
    """As the machine calls them."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("Uid:"))
    return [int(word) for word in line.split()[1:]]


def passt(runner: Runner, directory: Path, *options: str) -> tuple[int, str]:
    """passt in the background; its PID, and what it said."""
    words = [runner.user.python, "-m", "passt.vm", "-P", f"{directory}/pid", "-s", f"{directory}/socket", *options]
    command = runner.user.command(words)
    done = subprocess.run(
        command, env=runner.user.env, cwd="/", capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    runner.daemons.append(int((directory / "pid").read_text()))
    return runner.daemons[-1], done.stderr


def spawned(runner: Runner, *options: str) -> tuple[int, str]:
    """pasta with a command that asks its tap for everything; its PID, and what the command wrote."""
    script = "ip -o addr show scope global; id -u; echo ready; cat"
    process = runner.start(
        *("-q", "--config-net", *options, "--", "sh", "-c", script), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    said = ""
    while not said.endswith("ready\n"):
        line = process.stdout.readline().decode()
        assert line, said
        said += line
    return process.pid, said


def test_it_becomes_nobody(container: Runner, directory: Path) -> None:
    pid, said = passt(container, directory)
    assert uids(pid) == [NOBODY] * 4
    assert "\nStarted as root, will change to nobody.\n" in said


def test_it_becomes_nobody_with_a_command(container: Runner) -> None:
    pid, said = spawned(container)
    assert uids(pid) == [NOBODY] * 4
    assert " inet " in said and said.endswith("\n0\nready\n"), "the namespace is set up, and the command its root"


def test_runas(container: Runner, directory: Path, ordinary_user: User) -> None:
    assert uids(passt(container, directory, "--runas", "0")[0]) == [ordinary_user.uid] * 4
    assert uids(spawned(container, "--runas", "0")[0]) == [ordinary_user.uid] * 4


def test_it_stays_where_there_is_nobody_else(alone: Runner, directory: Path, ordinary_user: User) -> None:
    """It is an ordinary user to the machine."""
    pid, said = passt(alone, directory)
    assert uids(pid) == [ordinary_user.uid] * 4
    assert "Started as root" not in said
    assert uids(spawned(alone)[0]) == [ordinary_user.uid] * 4


@pytest.mark.parametrize(("options", "becomes"), [((), None), (("--runas", str(NOBODY)), NOBODY)])
def test_a_namespace_that_it_names(
    container: Runner, ordinary_user: User, options: tuple[str, ...], becomes: int | None
) -> None:
    """As podman does: the user who started podman must be able to end it. With --runas it changes there, too."""
    target = container.namespace(userns=False)
    pid = container.daemon("-q", "--config-net", *options, str(target))
    assert uids(pid) == [ordinary_user.uid if becomes is None else becomes] * 4
    show = ["nsenter", f"--net=/proc/{target}/ns/net", "ip", "-o", "addr", "show", "scope", "global"]
    assert " inet " in subprocess.run(show, capture_output=True, text=True, check=True).stdout
