"""A machine with an emulated processor as the host of `bench.scale`, where any limit may be raised.

A limit of descriptors is seldom as high as the number of connections that a program should stand, and one of the
machine's may not be in the user's hands. In a machine of QEMU's everything is. It starts from a RAM disk with this
Python, its packages, the programs of the laboratory and those that are compared.

Its clock counts instructions (`-icount`), one for each nanosecond. So figures do not depend on other work of the
machine outside, and a time without work takes none: an idle hour is over at once. Only caches are not emulated, and
what a miss costs is not in the figures.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from importlib.metadata import distribution
from pathlib import Path

from tests.system.vm.image import File, Files, image_with, libraries
from tests.system.vm.machine import VirtualMachine

from .contenders import Contender
from .lab import PROGRAMS, ROOT, LabError

DISTRIBUTIONS = ("pyroute2", "pyseccomp")  # what the program imports
MODULES = ("tun", "veth")
FOLDERS = ("passt", "bench", "tests/system")
LEFT_OUT = {"test", "idlelib", "ensurepip", "lib2to3", "pydoc_data", "dist-packages", "site-packages"}  # of the library
QEMU_OPTIONS = ("-netdev", "hubport,id=s,hubid=0", "-icount", "shift=0,sleep=off")
DESCRIPTORS = 400_000  # of a process: each connection has one at its client, its server, and one or two at the daemon
FILES = 4 * DESCRIPTORS  # of all
START = f"""
echo {FILES} >/proc/sys/fs/file-max
echo {DESCRIPTORS} >/proc/sys/fs/nr_open
ulimit -n {DESCRIPTORS}
mkdir -p /mnt /var/tmp
mount -o rbind / /mnt && cd /mnt && mount --move . / # pivot_root(2), of sandboxes, works on no RAM disk
export PATH=/usr/bin:/usr/sbin:/bin:/sbin
chroot . sh -c {{}} >/tmp/said 2>&1 &
"""
POLL = 2.0  # s
DEADLINE = 900.0  # s; an emulated processor at the end of a busy machine's queue takes its time
MEMORY = 6144  # MiB


def _modes(path: Path) -> File:
    status = path.stat()
    return File(path.read_bytes(), stat.S_IFREG | stat.S_IMODE(status.st_mode), int(status.st_mtime))


def _tree(folder: Path, left_out: set[str] = LEFT_OUT) -> Iterator[tuple[str, File]]:
    """All files below `folder`."""
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        for path in (Path(where, name) for name in names):
            if path.is_file():
                yield str(path)[1:], _modes(path)


def _python() -> Iterator[tuple[str, File]]:
    """The interpreter at its name in the environment that it is of, its library, and the packages."""
    for path in (Path(sys.executable), Path(sys.executable).resolve(), Path(sys.prefix, "pyvenv.cfg")):
        if path.exists():
            yield str(path)[1:], _modes(path)
    yield from _tree(Path(sysconfig.get_path("stdlib")))
    for name in DISTRIBUTIONS:
        for file in distribution(name).files or ():
            path = Path(str(file.locate())).absolute()
            if ".." not in file.parts and path.is_file():
                yield str(path)[1:], _modes(path)
    ctypes.CDLL("libseccomp.so.2")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/libseccomp.so" in line:
            path = Path(line.split()[-1])
            yield f"{path.parent}/libseccomp.so.2"[1:], _modes(path)
            break


def _contender(contender: Contender) -> Iterator[tuple[str, File]]:
    """The files of a program that is compared."""
    folder = contender.folder
    if folder is None:
        return
    source = (folder / "passt" / "__main__.py").is_file()
    yield from _tree(folder / ("passt" if source else "lib"), set())
    for pattern in ("*.so",) if source else ("pasta*", "passt*"):
        for path in folder.glob(pattern):
            yield str(path)[1:], _modes(path)


def files(contenders: Sequence[Contender]) -> Files:
    """All that is in the RAM disk beside what is in that of the tests."""
    found = dict(_python())
    for folder in FOLDERS:
        found |= _tree(ROOT / folder, set())
    found |= {f"{ROOT}/tests/__init__.py"[1:]: _modes(ROOT / "tests/__init__.py")}
    for contender in contenders:
        found |= _contender(contender)
    for program in PROGRAMS:
        path = Path(shutil.which(program) or "")
        found[f"usr/bin/{program}"] = _modes(path)
    programs = [name for name, file in found.items() if file.content.startswith(b"\x7fELF")]
    found |= dict(libraries(*(f"/{name}" for name in programs)))
    return found | {name: _modes(Path("/", name)) for name in ("etc/passwd", "etc/group")}


def run(argv: Sequence[str], contenders: Sequence[Contender]) -> int:
    """Print what `python -m bench.scale ARGV` says in the machine; returns its status."""
    with tempfile.TemporaryDirectory() as directory:
        try:
            made = image_with(files(contenders), MODULES, Path(directory))
        except (OSError, RuntimeError) as e:
            raise LabError(f"no image to boot: {e}") from e
        with closing(VirtualMachine(made, MEMORY)) as machine:
            machine.start(*QEMU_OPTIONS)
            command = shlex.join([sys.executable, "-u", "-m", "bench.scale", *argv])
            within = f"cd {shlex.quote(str(ROOT))}; {command}; echo $? >/tmp/status"
            machine.run(START.format(shlex.quote(within)))
            return _follow(machine)


def _follow(machine: VirtualMachine) -> int:
    """Print what is said until the end; returns the status."""
    size = 0
    while True:
        status = machine.run("cat /tmp/status", check=False, deadline=DEADLINE)
        said = machine.run(f"tail -c +{size + 1} /tmp/said", deadline=DEADLINE)
        size += len(said.encode())
        print(said, end="", flush=True)
        if status.strip().isdigit():
            return int(status)
        time.sleep(POLL)
