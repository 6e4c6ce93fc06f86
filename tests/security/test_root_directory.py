"""A root file system that pivot_root(2) cannot let go of, as an initramfs is: here a mount in one that is shared."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ..system.support import REPOSITORY, Host, alive, environment, new_host, wait_for

# Directories of Python, the package and its libraries
TREES = ("/usr", "/etc", "/dev", "/proc", "/sys", "/root", "/home", "/tmp", "/var", "/opt", "/run")
TMP = f"/tmp/pasta-root-{os.getpid()}"
LINKS = ("/bin", "/lib", "/lib64", "/sbin")


def mount(undo: ExitStack, place: Path, *args: str) -> None:
    subprocess.run(["mount", *args, str(place)], check=True)
    undo.callback(subprocess.run, ["umount", "-lR", str(place)], check=True)


@pytest.fixture
def new_root(root: object, tmp_path: Path) -> Iterator[Path]:
    """A directory that has everything."""
    with ExitStack() as undo:
        os.mkdir(TMP)
        undo.callback(shutil.rmtree, TMP)
        mount(undo, tmp_path, "--bind", "--make-shared", str(tmp_path))
        inner = tmp_path / "root"
        inner.mkdir()
        mount(undo, inner, "--bind", str(inner))
        for tree in filter(os.path.isdir, (*TREES, *([] if str(REPOSITORY).startswith(TREES) else [str(REPOSITORY)]))):
            place = inner / tree[1:]
            place.mkdir(parents=True)
            mount(undo, place, "--rbind", "--make-rslave", tree)
        for link in filter(os.path.islink, LINKS):
            (inner / link[1:]).symlink_to(os.readlink(link))
        yield inner


def attach(new_root: Path, target: Host, *options: str) -> subprocess.CompletedProcess[str]:
    """pasta in the background. A chroot has no user namespaces, so it serves one that exists, as root."""
    words = ["-q", "--no-icmp", "--runas", "0", "--netns", target.path, "-P", f"{TMP}/pid", *options]
    command = ["chroot", str(new_root), sys.executable, "-m", "passt", *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60, check=False)


def test_is_an_error_that_says_what_to_do(new_root: Path) -> None:
    with new_host() as target:
        done = attach(new_root, target)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pivot_root(2) can't replace the current root file system" in done.stderr
    assert done.stderr.endswith("as in an initramfs or a chroot: give --chroot-fallback\n")


def test_fallback(new_root: Path) -> None:
    with new_host() as target:
        done = attach(new_root, target, "--chroot-fallback")
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        pid = int((Path(TMP) / "pid").read_text())
        assert os.listdir(f"/proc/{pid}/root/") == []
    wait_for(lambda: not alive(pid), "the end of pasta with its namespace")
