"""A container of systemd-nspawn with users and a network of its own: pasta is its network."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support import DEADLINE, descendants, wait_for
from ..traffic.support import Lan, Namespace
from .checks import copied, forwards, listeners, outward
from .support import Client, Site

NSPAWN = "systemd-nspawn --quiet --register=no --keep-unit --pipe --private-users=pick --private-network --bind-ro=/usr"


def tree(root: Path) -> Path:
    """The least that systemd-nspawn takes for a system, with the programs of this one."""
    for name in ("usr", "etc", "proc", "sys", "dev", "run", "tmp", "var", "root"):
        (root / name).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    (root / "etc" / "os-release").write_text("ID=test\n")
    (root / "etc" / "localtime").write_bytes(b"")
    return root


@pytest.fixture
def container(root_client: Client) -> Iterator[Site]:
    assert shutil.which("systemd-nspawn"), "the Debian package systemd-container is missing"
    root = tree(root_client.dir / "machine")
    command = root_client.argv([*NSPAWN.split(), f"--directory={root}", "sh", "-c", "echo up; exec sleep 1000"])
    process = subprocess.Popen(
        command, env=root_client.environment(), cwd="/", stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    guest = None
    try:
        assert process.stdout.readline() == b"up\n", process.stderr.read()
        wait_for(lambda: any(_is_leader(pid) for pid in descendants(process.pid)), "the container has its command")
        (pid,) = (pid for pid in descendants(process.pid) if _is_leader(pid))
        guest = Namespace(root_client.argv(["nsenter", "-t", str(pid), "--net"]), root_client.user)
        yield Site(root_client, guest, {"pid": pid})
    finally:
        if guest is not None:
            guest.close()
        for pid in filter(_is_leader, descendants(process.pid)):
            os.kill(pid, signal.SIGKILL)
        process.communicate(timeout=DEADLINE)


def _is_leader(pid: int) -> bool:
    return Path(f"/proc/{pid}/cmdline").read_bytes() == b"sleep\x001000\x00"


def test_private_users(container: Site, lan: Lan) -> None:
    """root gives the container the network of the host, by its leader; ports are published; the end is that of both."""
    inside = Path(f"/proc/{container.names['pid']}/uid_map").read_text().split()
    assert inside[0] == "0" and inside[1] != "0"
    daemon = container.start("pasta --config-net --quiet -t 8080:80 -u none -T none -U none {pid}")
    for check in (copied, outward, forwards(8080, 80)):
        check(container, daemon, lan)
    container.guest.close()
    os.kill(container.names["pid"], signal.SIGKILL)
    daemon.expect_end("the container has ended")
    assert listeners(lan.host) == set()
