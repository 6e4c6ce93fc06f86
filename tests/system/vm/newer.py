"""Programs of Debian 13 on an older Debian: a QEMU that serves vhost-user, one that starts passt itself, and libvirt.

    what                                                  since          Debian 12   here
    ----------------------------------------------------  -------------  ----------  ------------------------------
    vhost-user with an emulated processor                 QEMU 8.0       7.2: hangs  11, of the backports
    -netdev passt                                         QEMU 10.1      -           the same
    <interface type='vhostuser'> with passt               libvirt 11.1   9.0         11.3

Where the machine's own are older, the packages are downloaded, unpacked in the cache of the images, and never
installed: their /usr lies over that of the machine (overlayfs) in a mount namespace of its own. Everything else is as
it was, and the machine's programs run there too, with the newer C library.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

from .image import cache
from .machine import QEMU

RELEASE = "trixie"
PACKAGES = ("qemu-system-x86", "libvirt-clients", "libvirt-daemon", "libvirt-daemon-driver-qemu")
SOURCES = "".join(
    f"deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian {suite} main\n"
    for suite in (RELEASE, f"{RELEASE}-backports")
)
PREFERENCES = f"Package: src:qemu src:seabios\nPin: release n={RELEASE}-backports\nPin-Priority: 990\n"
APT = """
Acquire::Languages "none"; APT::Install-Recommends "false"; APT::Sandbox::User "root"; Debug::NoLocking "true";
Dir::State::lists "{0}/lists"; Dir::State::status "{0}/status"; Dir::Cache "{0}"; Dir::Cache::archives "{0}/archives";
Dir::Etc::sourcelist "{0}/sources"; Dir::Etc::sourceparts "/dev/null"; Dir::Etc::preferences "{0}/preferences";
Dir::Etc::preferencesparts "/dev/null";
"""
DOWNLOAD_TIMEOUT = 300.0
_ENTER = """
usr=$1; shift
mount -t overlay overlay -o "lowerdir=$usr:/usr" /usr
for d in $(cd "$usr" && echo lib/*/qemu share/qemu); do mount --bind "$usr/$d" "/usr/$d"; done # not an older one
exec "$@"
"""


def through(*version: int) -> list[str]:
    """The command that becomes QEMU of `version` or later; none if this machine's own is new enough."""
    said = subprocess.run([QEMU, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"version (\d+)\.(\d+)", said)
    if found and tuple(map(int, found.groups())) >= (version or (8, 0)):
        return []
    return over_usr("QEMU")


def over_usr(what: str) -> list[str]:
    """The command that becomes a program of Debian 13."""
    if os.geteuid() != 0:
        pytest.skip(f"{what} is older than the test needs, and to mount another one needs root")
    usr = cache() / f"{RELEASE}-usr"
    if not usr.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as name:
            try:
                _unpack(Path(name))
            except subprocess.CalledProcessError as e:
                said = e.stderr[-200:]
                pytest.skip(f"{what} is older than the test needs, and {RELEASE} cannot be downloaded: {said}")
            try:
                os.rename(f"{name}/root/usr", usr)
            except OSError:
                if not usr.exists():  # else another run was faster, with the same
                    raise
    return ["unshare", "--mount", "sh", "-c", _ENTER, "sh", str(usr)]


def _unpack(directory: Path) -> None:
    """Make `root` in `directory` of the packages, and of all that they depend on. Raises CalledProcessError."""
    for name in ("lists/partial", "archives/partial", "root"):
        Path(directory, name).mkdir(parents=True)
    directory.chmod(0o755)
    for name, text in (("sources", SOURCES), ("preferences", PREFERENCES), ("status", ""), ("apt", APT)):
        Path(directory, name).write_text(text.format(directory) if name == "apt" else text)
    for command in (["update"], ["install", "--yes", "--download-only", *PACKAGES]):
        _run("apt-get", "-q", *command, APT_CONFIG=f"{directory}/apt")
    for archive in Path(directory, "archives").glob("*.deb"):
        _run("dpkg-deb", "--extract", str(archive), f"{directory}/root")


def _run(*command: str, **env: str) -> None:
    subprocess.run(
        command, env=os.environ | env, stdin=subprocess.DEVNULL, capture_output=True, text=True,
        timeout=DOWNLOAD_TIMEOUT, check=True,
    )  # fmt: skip


def netdev(path: object, memory: int) -> list[str]:
    """QEMU's arguments for a machine of `memory` MiB at the vhost-user socket `path`."""
    line = f"-chardev socket,id=n,path={shlex.quote(str(path))} -netdev vhost-user,id=s,chardev=n"
    return [*shared_memory(memory), *shlex.split(line)]


def shared_memory(memory: int) -> list[str]:
    """QEMU's arguments for memory that it shares with a back end."""
    return f"-object memory-backend-memfd,id=m,size={memory}M,share=on -machine memory-backend=m".split()
