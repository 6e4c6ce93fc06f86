"""A root file system that pivot_root(2) cannot let go of, as an initramfs is: here a mount in one that is shared."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..system.support import REPOSITORY, Host, alive, environment, new_host, wait_for

# Directories of Python, the package and its libraries
TREES = ("/usr", "/etc", "/dev", "/proc", "/sys", "/root", "/home", "/tmp", "/var", "/opt", "/run")
TMP = f"/tmp/pasta-root-{os.getpid()}"
LINKS = ("/bin", "/lib", "/lib64", "/sbin")


# Everything is mounted in a namespace of its own, with which all of it goes. Copies of shared mounts, as systemd makes
# them, take their originals with them when they are unmounted, unless they are slaves.
SET_UP = """
import os, subprocess, sys
place, *trees = sys.argv[1:]
mount = lambda *args: subprocess.run(["mount", *args], check=True)
mount("--bind", "--make-shared", place, place)
inner = f"{place}/root"
os.mkdir(inner)
mount("--bind", inner, inner)
for tree in trees:
    os.makedirs(inner + tree)
    mount("--rbind", tree, inner + tree)
print("ready", flush=True)
sys.stdin.read()
"""
APART = ["unshare", "--mount", "--propagation"]


@dataclass(frozen=True)
class Root:
    """A root directory in the mount namespace of a process."""

    pid: int
    path: Path

    def command(self, *argv: str) -> list[str]:
        """`argv` in it."""
        return ["nsenter", f"--mount=/proc/{self.pid}/ns/mnt", "--", "chroot", str(self.path), *argv]


@contextlib.contextmanager
def made_root(place: Path) -> Iterator[Root]:
    """A directory that has everything, in `place`."""
    trees = filter(os.path.isdir, (*TREES, *([] if str(REPOSITORY).startswith(TREES) else [str(REPOSITORY)])))
    command = [*APART, "slave", sys.executable, "-c", SET_UP, str(place), *trees]  # sees later mounts of ip-netns(8)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield Root(process.pid, place / "root")
        process.communicate()


@pytest.fixture
def new_root(root: object, tmp_path: Path) -> Iterator[Root]:
    """The same, with a directory for the daemon's files."""
    os.mkdir(TMP)
    try:
        with made_root(tmp_path) as made:
            for link in filter(os.path.islink, LINKS):
                (made.path / link[1:]).symlink_to(os.readlink(link))
            yield made
    finally:
        shutil.rmtree(TMP)


def attach(new_root: Root, target: Host, *options: str) -> subprocess.CompletedProcess[str]:
    """pasta in the background. A chroot has no user namespaces, so it serves one that exists, as root."""
    words = ["-q", "--no-icmp", "--runas", "0", "--netns", target.path, "-P", f"{TMP}/pid", *options]
    command = new_root.command(sys.executable, "-m", "passt", *words)
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def test_is_an_error_that_says_what_to_do(new_root: Root) -> None:
    with new_host() as target:
        done = attach(new_root, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pivot_root(2) can't replace the current root file system" in done.stderr
    assert done.stderr.endswith("as in an initramfs or a chroot: give --chroot-fallback\n")


def test_fallback(new_root: Root) -> None:
    with new_host() as target:
        done = attach(new_root, target, "--chroot-fallback")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = int((Path(TMP) / "pid").read_text())
        assert os.listdir(f"/proc/{pid}/root/") == []
    wait_for(lambda: not alive(pid), "the end of pasta with its namespace")


SHARED = """
import os, sys
from pathlib import Path
from tests.security.test_root_directory import made_root, subprocess
subprocess.run(["mount", "--make-rshared", "/"], check=True)
mounts = lambda: Path("/proc/self/mountinfo").read_text()
before = mounts()
with made_root(Path(sys.argv[1])) as made:
    assert mounts() == before, "while it is there"
    if sys.argv[2] == "killed":
        os.kill(made.pid, 9)
assert mounts() == before, "when it is gone"
"""


@pytest.mark.parametrize("end", ["ended", "killed"])
def test_mounts_of_the_machine_stay(root: object, tmp_path: Path, end: str) -> None:
    """Shared ones, as those of systemd's machines are: /dev/pts and /dev/shm were unmounted with their copies."""
    command = [*APART, "private", sys.executable, "-c", SHARED, str(tmp_path), end]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
