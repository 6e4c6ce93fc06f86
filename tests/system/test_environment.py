"""Parts of the machine that are missing or read-only: one line with the cure, or a start without them."""

from __future__ import annotations

import subprocess
import sysconfig
import tempfile
from pathlib import Path

import pytest

from .support import DEADLINE, Runner, User

# In a mount namespace of its own
NO_DEV = "mount -t tmpfs none /dev"
NO_PROC = "mount -t tmpfs none /proc"
READ_ONLY_TMP = "mount -t tmpfs -o ro none /tmp"
CLOSED = "exec <&-"


def start(runner: Runner, module: str, *args: str, without: str) -> subprocess.CompletedProcess[str]:
    """`python -m module args` where commands of the shell have taken something away."""
    before = ["unshare", "--mount", "sh", "-c", f'{without} && exec "$@"', "sh"]
    return subprocess.run(
        [*before, runner.user.python, "-m", module, *args], cwd="/", env=runner.user.env,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("module", ["passt", "passt.vm"])
@pytest.mark.parametrize("without", [NO_DEV, NO_PROC, READ_ONLY_TMP])
def test_help_needs_nothing(root_pasta: Runner, module: str, without: str) -> None:
    for option in ("--help", "--version"):
        done = start(root_pasta, module, option, without=without)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(("Usage: ", "pasta ", "passt "))


@pytest.mark.parametrize("without", [NO_DEV, f"{NO_DEV} && {CLOSED}"])
@pytest.mark.parametrize(("module", "args"), [("passt", ["-q", "true"]), ("passt.vm", ["-q", "-f"])])
def test_no_null_device(root_pasta: Runner, module: str, args: list[str], without: str) -> None:
    """Closed standard input needs it at once, the sandbox later."""
    done = start(root_pasta, module, *args, "--runas", "0", without=without)
    if "Failed to open /dev/net/tun" in done.stderr:
        return  # the folder lacks that, too, and it is needed first
    assert (done.returncode, done.stdout) == (1, "")
    line = done.stderr.splitlines()[-1]
    assert line == (
        "Couldn't open /dev/null: No such file or directory (create it as root: mknod -m 666 /dev/null c 1 3; or give "
        "the container this device)"
    )


@pytest.mark.parametrize("name", ["pasta", "passt", "pesto", "qrap", "passt-repair"])
def test_no_null_device_of_an_installed_command(root: User, name: str) -> None:
    """A shell that redirects to it makes a file of it for root, and an error for others."""
    command = Path(sysconfig.get_path("scripts")) / name
    script = f'{NO_DEV} && "$@" --help && ls -A /dev >&2'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", command], capture_output=True, text=True, timeout=DEADLINE,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout[:7], done.stderr) == (0, "Usage: ", "")


@pytest.mark.parametrize(("module", "args"), [("passt", ["-q", "true"]), ("passt.vm", ["-q", "-f"])])
def test_no_proc(root_pasta: Runner, module: str, args: list[str]) -> None:
    done = start(root_pasta, module, *args, without=NO_PROC)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("Couldn't list the inherited descriptors: /proc/self/fd: No such file or directory")
    assert done.stderr.endswith("(mount it first: mount -t proc proc /proc)\n")


def test_proc_of_processes_only(root_pasta: Runner) -> None:
    """As systemd mounts it for ProcSubset=pid: there is no /proc/net, and no /proc/sys."""
    done = start(root_pasta, "passt", "--config-net", "true", without="mount -t proc -o subset=pid none /proc")
    assert done.returncode == 0, done.stderr
    assert ("IPv6 is not available" in done.stderr) != Path("/proc/net/if_inet6").exists(), done.stderr


def test_read_only_tmp(root_pasta: Runner) -> None:
    done = start(root_pasta, "passt.vm", "-f", without=READ_ONLY_TMP)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "Couldn't bind UNIX socket /tmp/passt_1.socket: Read-only file system (give another path with --socket)\n"
    )
    done = start(root_pasta, "passt", "-q", "--config-net", "true", without=READ_ONLY_TMP)
    assert done.returncode == 0, done.stderr


def test_files_in_a_read_only_folder(root_pasta: Runner) -> None:
    for option, what in (("-P", "PID file"), ("-p", "capture file"), ("-l", "log file")):
        done = start(root_pasta, "passt", option, "/tmp/file", "true", without=READ_ONLY_TMP)
        assert done.returncode == 1
        assert done.stderr == f"Couldn't open {what} /tmp/file: Read-only file system\n"
    for option in ("-c", "--api-socket"):
        done = start(root_pasta, "passt", option, "/tmp/socket", "true", without=READ_ONLY_TMP)
        assert done.returncode == 1
        assert done.stderr.endswith("Couldn't bind UNIX socket /tmp/socket: Read-only file system\n")


def test_full_devices(pasta: Runner) -> None:
    """A PID file and a log that take nothing are errors at start; a capture that ends is a warning."""
    done = pasta.run("-P", "/dev/full", "true")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "PID file write: No space left on device (/dev/full)"
    done = pasta.run("-l", "/dev/full", "true")
    assert (done.returncode, done.stderr) == (1, "Couldn't open log file /dev/full: No space left on device\n")
    done = pasta.run("-p", "/dev/full", "true")
    assert done.returncode == 0
    assert "Packet capture to /dev/full ends: No space left on device" in done.stderr


def test_lost_reader_of_messages(pasta: Runner) -> None:
    """Neither a closed pipe nor a full device as standard error keeps a command from its start."""
    for redirected in ("2>/dev/full", "2>&-", "2>&1 | true"):
        with tempfile.TemporaryDirectory(prefix="passt-lost-") as name:
            Path(name).chmod(0o777)
            command = pasta.user.pasta("--config-net", "--", "touch", f"{name}/ran")
            script = f'"$@" {redirected}'
            subprocess.run(
                ["sh", "-c", script, "sh", *command], cwd="/", env=pasta.user.env, check=False, timeout=DEADLINE
            )
            assert (Path(name) / "ran").exists(), redirected
