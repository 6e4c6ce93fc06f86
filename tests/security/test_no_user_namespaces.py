"""Hosts that forbid user namespaces: a program that needs one ends with advice, and leaves nothing behind.

The limit (user.max_user_namespaces) is one of each user namespace, so it is set in one that is made for the test. In
there passt is an ordinary user without any right, as on a host.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ..system.support import DEADLINE, User, alive, wait_for

FORBID = "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --inh-caps=-all --ambient-caps=-all -- "
HINT = "user namespaces are forbidden or used up: raise sysctl user.max_user_namespaces, or other user.max_*"


def run_forbidden(user: User, *command: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run `command` to its end, after `before` (lines of sh), where no user namespace can be created."""
    script = f'{before}\n{FORBID}"$@"'
    enter = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-ec", script, "sh"]
    command = (*user.command([*enter, *command]),)
    return subprocess.run(command, cwd="/", env=user.env, capture_output=True, text=True, timeout=DEADLINE, check=False)


@pytest.fixture
def directory(ordinary_user: User) -> Iterator[Path]:
    with TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        yield Path(name)


def fails(done: subprocess.CompletedProcess[str], message: str, directory: Path) -> None:
    """One line with `message`, status 1; no socket is left, and a PID file, made first, has no PID in it."""
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"{message}: No space left on device ({HINT})\n")
    assert [path.name for path in directory.iterdir() if path.stat().st_size or not path.is_file()] == []


@pytest.mark.parametrize("where", [[], ["-f"], ["-f", "-1"]], ids=lambda words: " ".join(words) or "background")
def test_passt(ordinary_user: User, directory: Path, where: list[str]) -> None:
    files = "-s", f"{directory}/socket", "-P", f"{directory}/pid", "-c", f"{directory}/control"
    done = run_forbidden(ordinary_user, ordinary_user.python, "-m", "passt.vm", *where, *files)
    fails(done, "Couldn't create user namespace", directory)


def test_passt_with_a_given_socket(ordinary_user: User, directory: Path) -> None:
    script = (
        "import os, socket, sys\n"
        "ours, theirs = socket.socketpair()\n"
        "os.set_inheritable(theirs.fileno(), True)\n"
        "os.execv(sys.executable, [sys.executable, '-m', 'passt.vm', '-f', '-F', str(theirs.fileno())])"
    )
    done = run_forbidden(ordinary_user, ordinary_user.python, "-c", script)
    fails(done, "Couldn't create user namespace", directory)


def test_pasta_that_starts_a_command(ordinary_user: User, directory: Path) -> None:
    files = "-P", f"{directory}/pid", "-c", f"{directory}/control"
    words = "-m", "passt", "--config-net", *files, "--", "touch", f"{directory}/ran"
    fails(run_forbidden(ordinary_user, ordinary_user.python, *words), "Couldn't create namespaces", directory)


def attach(user: User, directory: Path, limits: str = "") -> subprocess.CompletedProcess[str]:
    """pasta for a namespace that was there before `limits` (lines of sh) were set, and then ends."""
    target = directory / "target"
    sleep = f"sh -c 'echo $$ >{target}; exec sleep 1000'"
    before = (
        f"unshare --user --map-root-user --net {sleep} >/dev/null 2>&1 &\n"
        f"while [ ! -s {target} ]; do sleep 0.01; done\n{limits}"
    )
    words = f'-m passt -q --no-icmp --config-net -P {directory}/pid "$(cat {target})"'
    done = run_forbidden(user, "sh", "-c", f"exec {user.python} {words}", before=before)
    os.kill(int(target.read_text()), signal.SIGKILL)
    target.unlink()
    return done


def test_pasta_that_attaches(ordinary_user: User, directory: Path) -> None:
    """The user namespace that is there brings the rights with it: this works."""
    done = attach(ordinary_user, directory)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    pid = int((directory / "pid").read_text())
    wait_for(lambda: not alive(pid), "pasta's end with its namespace")


def test_pasta_that_attaches_where_no_pid_namespace_may_be_made(ordinary_user: User, directory: Path) -> None:
    done = attach(ordinary_user, directory, "echo 0 >/proc/sys/user/max_pid_namespaces")
    fails(done, "Couldn't leave the host's processes", directory)
