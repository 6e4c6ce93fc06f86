"""Root starts the programs with paths in a directory like /tmp, where another user was before."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from ..system.support import User

REASON = "in a directory where all users may create files: remove it, or choose another path"


@pytest.fixture
def folder() -> Iterator[Path]:
    """Sticky, with a directory of root's beside it."""
    with TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        folder = Path(name) / "tmp"
        folder.mkdir()
        folder.chmod(0o1777)
        yield folder


def start(root: User, module: str, *args: str) -> str:
    """The messages of a failed start."""
    command = [root.python, "-m", module, "-q", *args]
    done = subprocess.run(command, env=root.env, cwd="/", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "option", ["--pid", "--log-file", "--pcap", "--socket", "-c", "--api-socket", "--vhost-user --repair-path"]
)
@pytest.mark.parametrize("module", ["passt", "passt.vm"])
def test_links(root: User, ordinary_user: User, folder: Path, module: str, option: str) -> None:
    if module == "passt" and option.endswith(("--socket", "--repair-path")):
        pytest.skip("an option of passt")
    victim = folder.parent / "precious"
    victim.mkdir()
    link = folder / "link"
    subprocess.run(ordinary_user.command(["ln", "-s", str(victim), str(link)]), check=True)
    base = ["--socket", f"{folder.parent}/socket"] if module == "passt.vm" and option != "--socket" else []
    said = start(root, module, *base, *option.split(), f"{link}/file", *(["--", "true"] if module == "passt" else []))
    assert f"'link' is a link of user {ordinary_user.uid} {REASON}" in said
    assert os.listdir(victim) == []


LISTENER = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as sock:
    sock.bind(sys.argv[1])
    os.chmod(sys.argv[1], 0o777)
    sock.listen()
    print("ready", flush=True)
    print(sock.accept()[0].recv(100), flush=True)
"""
QRAP = "import sys; from passt import qrap; qrap.PATHS = sys.argv.pop(1),; sys.exit(qrap.main())"


def test_qrap_says_nothing_to_the_socket_of_another_user(root: User, ordinary_user: User, folder: Path) -> None:
    path = str(folder / "passt_1.socket")
    listener = ordinary_user.command([ordinary_user.python, "-c", LISTENER, path])
    with subprocess.Popen(listener, env=ordinary_user.env, cwd="/", stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"ready\n"
        command = [root.python, "-c", QRAP, path, "5", "true"]
        done = subprocess.run(command, env=root.env, cwd="/", capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert f"not used, as neither yours nor root's: {path} of user {ordinary_user.uid}" in done.stderr
        assert other.stdout.readline() == b"b''\n"


@pytest.mark.parametrize("option", ["--pid", "--log-file", "--pcap"])
def test_files(root: User, ordinary_user: User, folder: Path, option: str) -> None:
    file = folder / "file"
    subprocess.run(ordinary_user.command(["sh", "-c", f"echo theirs > {file}"]), check=True)
    said = start(root, "passt", option, str(file), "--", "true")
    assert f"it belongs to user {ordinary_user.uid}, {REASON}" in said
    assert file.read_text() == "theirs\n"
