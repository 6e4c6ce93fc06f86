"""Root starts the program from a folder that no other user may read, as a checkout under /root is.

Root becomes nobody on the way. From then on not one module can be read, so each must have been imported before.
"""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support import DEADLINE, environment, wait_for

PACKAGE = Path(__file__).parent.parent.parent / "passt"


@pytest.fixture(scope="module")
def private() -> Iterator[Path]:
    """A folder with mode 0700 that holds a copy of the package."""
    with tempfile.TemporaryDirectory(prefix="passt-unreadable-") as name:
        folder = Path(name)
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.copytree(PACKAGE, folder / "passt", ignore=shutil.ignore_patterns("__pycache__"))
        yield folder


def command(private: Path, program: str, *args: str) -> list[str]:
    """Isolated, and without `site`: its hook for editable installations finds the modules in the readable checkout."""
    paths = [str(private), sysconfig.get_path("purelib")]
    start = f"import sys; sys.path += {paths}; sys.argv[0] = {program!r}; from passt.__main__ import main; main()"
    return [sys.executable, "-I", "-B", "-S", "-c", start, *args]


def run(private: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(private, "pasta", *args),
        check=False,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--trace",),
        ("-d", "--stats", "1"),
        ("-c", "{}/control.socket"),
        ("--api-socket", "{}/api.socket"),
        ("-p", "{}/capture.pcap", "-l", "{}/log"),
        ("-t", "auto", "-u", "auto", "-T", "auto", "-U", "auto"),
        ("--splice-only",),
        ("-D", "192.0.2.53", "--dns-forward", "192.0.2.99"),
    ],
)
def test_pasta_runs_a_command(private: Path, options: tuple[str, ...]) -> None:
    given = [option.format(private) for option in options]
    done = run(private, "--config-net", *given, "--", "sh", "-c", "ip link show lo >/dev/null && echo served")
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
    assert "Error" not in done.stderr


def test_pasta_serves_a_namespace(private: Path) -> None:
    holder = subprocess.Popen(["unshare", "--net", "sleep", str(DEADLINE)])
    try:
        wait_for(
            lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink(),
            "a network namespace",
        )
        pid_file = private / "pid"
        done = run(private, "--config-net", "-P", str(pid_file), str(holder.pid))
        assert done.returncode == 0, done.stderr
        assert int(pid_file.read_text())
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    "options", [(), ("--trace",), ("-c", "{}/control.vm"), ("-t", "20022:22"), ("-d", "--stats", "1")]
)
def test_passt_serves_a_machine(private: Path, options: tuple[str, ...]) -> None:
    path = private / "vm.socket"
    given = [option.format(private) for option in options]
    process = subprocess.Popen(
        command(private, "passt", "-f", "-s", str(path), *given),
        env=environment(),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if "You can now start qemu" in line:
                break
        else:
            pytest.fail("passt ended at start")
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0, rest
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()
