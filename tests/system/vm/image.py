"""The test guest: Debian's cloud kernel with an initial RAM disk made of programs of this machine.

The kernel package is downloaded by apt-get(8) and unpacked, never installed. The RAM disk has busybox, the ISC DHCP
client and iperf3 with the libraries they need, the virtio modules with theirs, and guest/init, which takes commands. It
is not compressed: an emulated processor would spend a second on that.

Both are kept in `$PASST_IMAGES`, or else `$XDG_CACHE_HOME/passt-tests`, the kernel by its version, the RAM disk by a
digest of everything in it, so that a second run needs no network and no time.
"""

from __future__ import annotations

import hashlib
import lzma
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

META_PACKAGE = "linux-image-cloud-amd64"
PROGRAMS = ("busybox", "dhclient", "iperf3")
MODULES = ("virtio_pci", "virtio_net", "virtio_console")
KEPT = r"(virtio|(net_)?failover|tun\.|veth\.)"  # the begin of the names of modules that are kept
UNWINDER = "libgcc_s.so.1"  # libc loads it for pthread_cancel(3), which iperf3 of Debian 13 calls
BUILTIN = "modules.builtin"  # a file of the kernel package, kept beside the kernel
GUEST = Path(__file__).with_name("guest")
DOWNLOAD_TIMEOUT = 120.0


@dataclass(frozen=True)
class Image:
    """Kernel and RAM disk for QEMU."""

    kernel: Path
    initrd: Path


class File(NamedTuple):
    """A file of the guest."""

    content: bytes
    mode: int
    mtime: int = 0  # s; Python compares it with that in a .pyc file


Files = dict[str, File]  # by the name without the slash in front


def cache() -> Path:
    """Where images are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(os.environ.get("PASST_IMAGES") or Path(base, "passt-tests"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def image() -> Image:
    """The image, made if it is not there yet."""
    kernel = _kernel()
    files = dict(_guest_files(kernel, MODULES))
    digest = hashlib.sha256()
    for name, (content, mode, _) in sorted(files.items()):
        digest.update(f"{name} {mode:o} {len(content)}\n".encode())
        digest.update(content)
    initrd = cache() / f"initrd-{digest.hexdigest()[:16]}"
    if not initrd.exists():
        _put(initrd, b"".join(_cpio(files)))
    return Image(kernel / "vmlinuz", initrd)


def image_with(files: Files, modules: tuple[str, ...], directory: Path) -> Image:
    """One with more files, and with more modules that are loaded at the start; its RAM disk is put in `directory`."""
    kernel = _kernel()
    initrd = directory / "initrd"
    _put(initrd, b"".join(_cpio(files | dict(_guest_files(kernel, (*MODULES, *modules))))))
    return Image(kernel / "vmlinuz", initrd)


def _put(path: Path, content: bytes) -> None:
    """Create a file atomically, also if another process does so at the same time."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as f:
        f.write(content)
    os.rename(f.name, path)


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


# The kernel ---------------------------------------------------------------------------------------------------------


def _kernel() -> Path:
    """A directory with `vmlinuz` and `modules`: of the newest kernel that apt knows, or else that was kept."""
    found = re.search(r"Depends: (linux-image-\S+)", _run("apt-cache", "depends", META_PACKAGE))
    if not found:
        kept = sorted(cache().glob(f"linux-image-*{_variant()}"), key=lambda path: path.stat().st_mtime)
        if not kept:
            raise RuntimeError(f"apt knows no {META_PACKAGE}: run `apt-get update` first")
        return kept[-1]
    package = found[1]
    version = re.search(r"Candidate: (\S+)", _run("apt-cache", "policy", package))
    assert version, f"apt knows no version of {package}"
    path = cache() / f"{package}_{version[1].replace(':', '_')}{_variant()}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=cache()) as name:
            _unpack(package, Path(name))
            try:
                os.rename(Path(name, "kernel"), path)
            except FileExistsError:
                pass  # another run was faster, with the same
    return path


def _variant() -> str:
    """The end of the name of a kernel's directory: those with other modules stay apart."""
    return f"-{hashlib.sha256(KEPT.encode()).hexdigest()[:8]}"


def _unpack(package: str, directory: Path) -> None:
    """Make `kernel` in `directory` from the package."""
    os.chmod(directory, 0o755)
    _run("apt-get", "download", "-q", "-o", "APT::Sandbox::User=", package, cwd=directory)
    (archive,) = directory.glob("*.deb")
    _run("dpkg-deb", "-x", str(archive), "tree", cwd=directory)
    kernel = directory / "kernel"
    (kernel / "modules").mkdir(parents=True)
    (vmlinuz,) = directory.glob("tree/boot/vmlinuz-*")
    vmlinuz.rename(kernel / "vmlinuz")
    (builtin,) = directory.glob("tree/**/modules.builtin")
    builtin.rename(kernel / BUILTIN)
    for module in directory.glob("tree/**/kernel/**/*.ko*"):
        if re.match(KEPT, module.name):
            content = module.read_bytes()
            unpacked = lzma.decompress(content) if module.suffix == ".xz" else content
            (kernel / "modules" / module.name.removesuffix(".xz")).write_bytes(unpacked)


def _depends(module: bytes) -> list[str]:
    """The modules that `module` needs, by the entry for that in its .modinfo section."""
    entry = re.search(rb"\0depends=([^\0]*)\0", module)
    assert entry, "a kernel module without a list of what it depends on"
    return [name.replace("-", "_") for name in entry[1].decode().split(",") if name]


def _builtin(kernel: Path) -> set[str]:
    """The modules that are part of the kernel itself: two of ours in Debian 13, none in Debian 12."""
    listed = kernel / BUILTIN
    return {Path(line).stem.replace("-", "_") for line in listed.read_text().split()} if listed.exists() else set()


def _in_order(directory: Path, names: tuple[str, ...], builtin: set[str]) -> dict[str, bytes]:
    """`names` and what they depend on, in the order of loading, without those of `builtin`."""
    order: dict[str, bytes] = {}
    for name in names:
        if name not in order and name not in builtin:
            content = (directory / f"{name}.ko").read_bytes()
            order |= _in_order(directory, tuple(_depends(content)), builtin)
            order[name] = content
    return order


# The RAM disk -------------------------------------------------------------------------------------------------------


def _guest_files(kernel: Path, names: tuple[str, ...]) -> Iterator[tuple[str, File]]:
    """All files of the guest, with the modules `names`. A name that is met twice is the same file."""
    for path in GUEST.iterdir():
        yield path.name, File(path.read_bytes(), 0o100755)
    modules = _in_order(kernel / "modules", names, _builtin(kernel))
    yield "modules/order", File("".join(f"{name}.ko\n" for name in modules).encode(), 0o100644)
    for name, content in modules.items():
        yield f"modules/{name}.ko", File(content, 0o100644)
    for name in PROGRAMS:
        program = shutil.which(name, path=f"{os.environ.get('PATH')}:/usr/sbin:/sbin")
        if not program:
            raise RuntimeError(f"{name} is not installed: run scripts/setup test")
        yield f"bin/{name}", File(Path(program).read_bytes(), 0o100755)
        yield from libraries(program)


def libraries(*programs: str) -> Iterator[tuple[str, File]]:
    """The shared libraries that programs, or other libraries, need."""
    for library in sorted(set(re.findall(r"(?:=> )?(/\S+) \(0x", _run("ldd", *programs)))):
        yield library[1:], File(Path(library).read_bytes(), 0o100755)
        unwinder = Path(library).with_name(UNWINDER)
        if Path(library).name == "libc.so.6" and unwinder.exists():
            yield str(unwinder)[1:], File(unwinder.read_bytes(), 0o100755)


def _cpio(files: Files) -> Iterator[bytes]:
    """A cpio archive of the "newc" format, as the kernel has it in Documentation/driver-api/early-userspace."""
    parents = {str(parent) for name in files for parent in Path(name).parents} - {"."}
    directories = dict.fromkeys(sorted(parents), File(b"", 16877))  # a parent comes before what is in it
    for inode, (name, file) in enumerate([*directories.items(), *files.items()], 1):
        yield _member(name, file, inode)
    yield _member("TRAILER!!!", File(b"", 0), 0)


def _member(name: str, file: File, inode: int) -> bytes:
    content, mode, mtime = file
    fields = (inode, mode, 0, 0, 1, mtime, len(content), 0, 0, 0, 0, len(name) + 1, 0)
    head = b"070701" + b"".join(b"%08X" % f for f in fields) + name.encode() + b"\0"
    return head + bytes(-len(head) % 4) + content + bytes(-len(content) % 4)
