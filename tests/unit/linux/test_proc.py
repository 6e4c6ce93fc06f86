"""Facts from /proc."""

from __future__ import annotations

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from passt.linux import proc


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("         0          0 4294967295\n", True),
        ("         0       1000          1\n", False),
        ("         0          0          1\n", False),
        ("         0     100000      65536\n     65536 1000 1\n", False),
        ("", False),
    ],
)
def test_user_namespace_of_the_machine(tmp_path: Path, text: str, expected: bool) -> None:
    path = tmp_path / "uid_map"
    path.write_text(text)
    assert proc.in_init_userns(str(path)) == expected


@pytest.mark.parametrize(
    ("number", "expected"), [(0, True), (1, False), (99, False), (100, True), (65635, True), (65636, False)]
)
def test_who_is_mapped(tmp_path: Path, number: int, expected: bool) -> None:
    path = tmp_path / "uid_map"
    path.write_text("         0       1000          1\n       100     100000      65536\n")
    assert proc.is_mapped(number, str(path)) == expected


def test_who_is_mapped_here() -> None:
    assert proc.is_mapped(os.geteuid(), "/proc/self/uid_map")
    assert proc.may_set_groups() == (Path("/proc/self/setgroups").read_text() == "allow\n")


def test_kernel_without_user_namespaces(tmp_path: Path) -> None:
    assert proc.in_init_userns(str(tmp_path / "missing"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("32768\t60999\n", range(32768, 61000)), ("1024\t1024\n", range(1024, 1025)), ("", None), ("a\tb\n", None)],
)
def test_ephemeral_ports(tmp_path: Path, text: str, expected: range | None) -> None:
    path = tmp_path / "ip_local_port_range"
    path.write_text(text)
    assert proc.ephemeral_ports(str(path)) == expected


def test_ephemeral_ports_that_are_not_told(tmp_path: Path) -> None:
    assert proc.ephemeral_ports(str(tmp_path / "missing")) is None
    assert proc.ephemeral_ports()


def test_existence() -> None:
    assert proc.exists(os.getpid())
    assert not proc.exists(2**31 - 1)


def test_inherited_descriptors() -> None:
    before = proc.inherited_fds()
    with open("/dev/null") as f:
        assert proc.inherited_fds() == sorted([*before, f.fileno()])
    assert proc.inherited_fds() == before
    assert not {0, 1, 2} & set(before)


@pytest.mark.parametrize(
    ("path", "pid"),
    [
        ("/proc/12/ns/net", 12),
        ("/proc/12/root/run/netns/a", 12),
        ("/proc/self/ns/net", None),
        ("/proc/12", None),
        ("/proc", None),
        ("/run/netns/12/x", None),
        ("proc/12/ns/net", None),
    ],
)
def test_pid_of_path(path: str, pid: int | None) -> None:
    assert proc.pid_of_path(path) == pid


def test_processes_are_described_for_error_messages() -> None:
    user = pwd.getpwuid(os.getuid()).pw_name
    assert proc.describe(os.getpid()).startswith(f"process {os.getpid()} is ")
    assert proc.describe(os.getpid()).endswith(f" of {user}")
    assert proc.describe(2**22 + 1) == "process 4194305"


def test_file_of_a_standard_stream_gets_another_number() -> None:
    """Other streams of the same file lead nowhere then, and those of other files stay."""
    script = (
        "import os, socket; from passt.linux import proc; ours, theirs = socket.socketpair(); "
        "os.dup2(theirs.fileno(), 0); os.dup2(theirs.fileno(), 2); theirs.close(); fd = proc.moved_from_stdio(0); "
        "os.write(2, b'lost'); os.write(fd, b'said'); "
        "print(fd > 2, ours.recv(99), *(os.readlink(f'/proc/self/fd/{i}') == os.devnull for i in (0, 1, 2)), "
        "os.get_inheritable(0), os.get_inheritable(fd))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "True b'said' True False True True False\n"
