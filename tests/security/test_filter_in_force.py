"""The filter of running daemons, read from the kernel: it allows the calls of docs/seccomp.md, and no other."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import pytest

from passt import PASST, PASTA, seccomp
from passt.daemon import seccomp_table

from ..system.support import User, wait_for
from . import filters

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="the kernel shows filters to root of the machine"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="other architectures have other names"),
]
I386, X32 = 0x40000003, 1 << 30  # an architecture; a bit of numbers
SHARING = {"fcntl", "fstat", "newfstatat"}  # calls that only passt --vhost-user makes
COMMANDS = {
    "pasta": (PASTA, ["-m", "passt", "-f", "-q", "--", "sleep", "60"], set()),
    "passt": (PASST, ["-m", "passt.vm", "-f", "-q"], SHARING),
    "passt --vhost-user": (PASST, ["-m", "passt.vm", "-f", "-q", "--vhost-user"], set()),
}
COUNTS = {"pasta": 46, "passt": 36, "passt --vhost-user": 39}  # as docs/security.md says


@pytest.mark.parametrize("name", COMMANDS)
def test_the_filter_in_force_is_the_table(root: User, tmp_path: Path, name: str) -> None:
    mode, arguments, left_out = COMMANDS[name]
    socket = ["-s", str(tmp_path / "socket")] if mode == PASST else []
    with subprocess.Popen([root.python, *arguments[:4], *socket, *arguments[4:]], cwd="/", env=root.env) as process:
        try:
            status = Path(f"/proc/{process.pid}/status")
            wait_for(lambda: "Seccomp:\t2" in status.read_text(), "the sandbox")
            programs = filters.of_process(process.pid)
        finally:
            process.terminate()
    assert seccomp_table.LOADED
    names = {seccomp.number(call): call for call, _, _ in seccomp.table(mode) if call not in left_out}
    found = filters.allowed(programs[0])
    assert {names.get(number, number) for number in found} == set(names.values())
    assert len(found) == COUNTS[name]
    assert filters.allowed(programs[0], I386) == set()
    assert not any(filters.RET_ALLOW in filters.results(programs[0], X32 | n, filters.AUDIT_ARCH_X86_64) for n in found)
