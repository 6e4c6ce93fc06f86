"""The systemd units: systemd understands all of them, and what they execute is what they promise."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import pytest

from ..support import REPOSITORY, Host, addresses, by_name, new_host
from ..traffic.support import PEER, Lan, Namespace
from ..vm.client import Client as Machine
from .support import Client, Daemon, read_pid

UNITS = sorted((REPOSITORY / "contrib/systemd").glob("*/*.service"))


def settings(unit: Path, section: str) -> dict[str, str]:
    """The settings of a section."""
    lines = unit.read_text().partition(f"\n[{section}]\n")[2].partition("\n[")[0].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def test_there_are_units() -> None:
    assert [f"{unit.parent.name}/{unit.name}" for unit in UNITS] == [
        "system/netns@.service",
        "system/passt@.service",
        "system/pasta@.service",
        "user/passt@.service",
    ]


@pytest.mark.parametrize("unit", UNITS, ids=[f"{unit.parent.name}-{unit.stem}" for unit in UNITS])
def test_systemd_understands_it(unit: Path, tmp_path: Path) -> None:
    """It finds no unknown setting, no program that is missing, and nothing else to say."""
    for other in unit.parent.iterdir():  # beside it, so that what it requires is found
        (tmp_path / other.name).write_text(other.read_text())
    instance = tmp_path / unit.name.replace("@", "@name")
    instance.write_text(unit.read_text())
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path), "SYSTEMD_UNIT_PATH": f"{tmp_path}:"}
    command = ["systemd-analyze", f"--{unit.parent.name}", "--man=no", "verify", str(instance)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit.name.partition("@")[0] + "@" in line]
    assert (done.returncode, said) == (0, [])


def execute(client: Client, unit: Path, instance: str) -> Daemon:
    """As the manager does: the options' variable is empty, the directory there; then PIDFile= has the daemon's PID."""
    service = settings(unit, "Service")
    assert service["Type"] == "forking"

    def expand(text: str) -> str:
        return text.replace("%t", str(client.dir)).replace("%i", instance)

    (client.dir / service["RuntimeDirectory"]).mkdir(mode=int(service["RuntimeDirectoryMode"], 8))
    os.chown(client.dir / service["RuntimeDirectory"], client.user.uid, client.user.gid)
    words = [word for word in shlex.split(expand(service["ExecStart"])) if word != "$OPTIONS"]
    daemon = client.start(words)
    assert read_pid(Path(expand(service["PIDFile"]))) == daemon.pid
    return daemon


@pytest.mark.parametrize("kind", ["user", "system"])
def test_machine(kind: str, request: pytest.FixtureRequest, lan: Lan) -> None:
    client: Client = request.getfixturevalue("client" if kind == "user" else "root_client")
    daemon = execute(client, REPOSITORY / f"contrib/systemd/{kind}/passt@.service", "vm1")
    with Machine.at(str(client.dir / "passt/vm1.sock")) as machine:
        machine.configure().ping(PEER)
    daemon.end()


class Outside:
    """The machine itself, but for its network: where `ip netns` makes namespaces for all users."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def argv(self, command: Sequence[str]) -> list[str]:
        return ["nsenter", f"--net={self._host.path}", *command]


def test_namespace(root_client: Client, host: Host) -> None:
    """pasta and `ip netns` mean the same directory; the end of the namespace is that of pasta."""
    outside = cast(Namespace, Outside(host))
    client = Client(outside, root_client.user, root_client.bin, root_client.dir)
    with new_host() as target:
        daemon = execute(client, REPOSITORY / "contrib/systemd/system/pasta@.service", target.name)
        assert "198.51.100.7/24" in addresses(by_name(target.show("address"), "eth0"))
    daemon.expect_end("its namespace is gone")
