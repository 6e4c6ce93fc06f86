"""Namespaces that are opened before anything else, as a command line names them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt.linux import netns
from passt.linux.syscall import CLONE_NEWNET
from passt.namespace import pin


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture(autouse=True)
def pins() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    pin.release()
    assert len(os.listdir("/proc/self/fd")) == before, "a descriptor was left open"


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    "arguments",
    [
        *("{pid}", "-f -- {pid}", "--netns {pid}", "--netns={pid}", "--netns /proc/{pid}/ns/net", "--net={pid}"),
        "-c {pid} tap0",  # slirp4netns
    ],
)
def test_namespace_outlives_its_process(sleeper: subprocess.Popen[bytes], arguments: str) -> None:
    path = f"/proc/{sleeper.pid}/ns/net"
    pin.hold(["pasta", *arguments.format(pid=sleeper.pid).split()])
    end(sleeper)
    assert not os.path.exists(path)
    assert pin.has(path)
    fd = netns.open_ns(pin.open_path(path), CLONE_NEWNET)
    assert netns.same_ns(fd, "/proc/self/ns/net")
    os.close(fd)


def test_end_of_the_process_is_that_of_the_pinned_one(sleeper: subprocess.Popen[bytes]) -> None:
    pin.hold(["pasta", str(sleeper.pid)])
    end(sleeper)
    fd = pin.pidfd(sleeper.pid)
    os.close(fd)
    with pytest.raises(ProcessLookupError):
        os.pidfd_open(sleeper.pid)


def test_user_namespace_by_path(sleeper: subprocess.Popen[bytes]) -> None:
    pin.hold(["pasta", "--userns", f"/proc/{sleeper.pid}/ns/user", "--netns", "no-such"])
    end(sleeper)
    assert pin.has(f"/proc/{sleeper.pid}/ns/user") and not pin.has("/run/netns/no-such")


def test_what_is_not_pinned_is_what_is_there(sleeper: subprocess.Popen[bytes]) -> None:
    assert pin.open_path("/run/netns/blue") == "/run/netns/blue"
    os.close(pin.pidfd(sleeper.pid))


@pytest.mark.parametrize("number", ["0", "2147483647", "99999999999999999999", "-1", "1x", "", "\N{SUPERSCRIPT TWO}"])
def test_numbers_that_are_no_processes(number: str) -> None:
    pin.hold(["pasta", number])
    pin.hold(["pasta", "--netns", number])
    pin.hold(["pasta", "--netns"])
    pin.hold(["pasta"])
    pin.hold([])
    assert pin.held() == []


def test_pipe_does_not_notice(tmp_path: Path) -> None:
    """The command of another program's option with that name: who writes to it still waits for a reader."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    pin.hold(["pasta", "tool", "--netns", str(fifo)])
    with pytest.raises(OSError, match="No such device or address"):
        os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)


def test_twice_is_once(sleeper: subprocess.Popen[bytes]) -> None:
    path = f"/proc/{sleeper.pid}/ns/net"
    pin.hold(["pasta", "--netns", path, f"--netns={path}", str(sleeper.pid)])
    assert len(pin.held()) == 3


PINNED_FIRST = """
import os, sys
def audit(event, args):
    if event == "open" and args[0] in ("ns/net", "/proc/self/ns/net"):
        print(len([m for m in sys.modules if m.startswith("passt")]), min(pin.held(), default=3))
        os._exit(0)
sys.argv = ["pasta", *sys.argv[1:]]
import passt.__main__
from passt.namespace import pin
sys.addaudithook(audit)
passt.__main__.main()
"""


@pytest.mark.parametrize("arguments", ["{pid}", "--netns /proc/self/ns/net"])
def test_before_any_module_is_loaded(sleeper: subprocess.Popen[bytes], arguments: str) -> None:
    """Neither the command line nor the options are known then."""
    argv = [sys.executable, "-c", PINNED_FIRST, *arguments.format(pid=sleeper.pid).split()]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout.split()[:1] == ["4"], done.stderr  # the package, __main__, namespace, pin


def test_closed_standard_streams_stay_free(sleeper: subprocess.Popen[bytes]) -> None:
    script = (
        "import os; os.closerange(0, 3); from passt.namespace import pin; "
        f"pin.hold(['pasta', '{sleeper.pid}']); os._exit(len(pin.held()) == 3 and min(pin.held()) > 2)"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=30, check=False).returncode == 1
