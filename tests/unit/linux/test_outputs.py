"""Files to write to: another user's links and files are refused where all users may create files, and nowhere else."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from passt.daemon.common import create
from passt.linux import outputs, unix
from passt.linux.outputs import check_directories, open_output
from passt.log import Fatal
from passt.log_file import LogFile

NEW = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
OTHER = 4711  # another uid than ours


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A directory like /tmp."""
    directory = tmp_path / "shared"
    directory.mkdir()
    directory.chmod(0o1777)
    return directory


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("precious")
    return path


@pytest.fixture
def as_other(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a path another user's: really, as root; else in the eyes of the module."""
    others: set[tuple[int, int]] = set()

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER, follow_symlinks=False)
        info = path.lstat()
        others.add((info.st_dev, info.st_ino))

    if os.geteuid() != 0:
        monkeypatch.setattr(outputs, "_trusted", lambda directory, info: (info.st_dev, info.st_ino) not in others)
    return give


def write(path: Path | str) -> None:
    fd = open_output(str(path), NEW)
    os.write(fd, b"written")
    os.close(fd)


def test_a_new_file_and_one_that_is_there(tmp_path: Path, shared: Path) -> None:
    for directory in (tmp_path, shared):
        path = directory / "file"
        write(path)
        assert path.read_text() == "written" and stat.S_IMODE(path.stat().st_mode) == 0o600
        path.write_text("longer than before")
        before = path.stat().st_ino
        write(path)
        assert path.read_text() == "written" and path.stat().st_ino == before


def test_relative_paths(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shared)
    (shared / "below").mkdir()
    for path in ("file", "./file2", "below/../file3", "below//./file4"):
        write(path)
        assert (shared / path).read_text() == "written"


def test_our_own_links_are_followed(tmp_path: Path, shared: Path) -> None:
    (shared / "direct").symlink_to(tmp_path / "target")
    (tmp_path / "folder").mkdir()
    (shared / "through").symlink_to("../folder")
    write(shared / "direct")
    write(shared / "through" / "file")
    assert (tmp_path / "target").read_text() == (tmp_path / "folder" / "file").read_text() == "written"


@pytest.mark.parametrize("way", ["directly", "by a directory", "by a link of ours"])
def test_links_of_others(way: str, shared: Path, victim: Path, as_other: Callable[[Path], None]) -> None:
    link = shared / "link"
    link.symlink_to(victim.parent if way == "by a directory" else victim)
    as_other(link)
    path = link / "victim" if way == "by a directory" else link
    if way == "by a link of ours":
        path = victim.parent / "ours"
        path.symlink_to(link)
    with pytest.raises(PermissionError, match=r"'link' is a link of user .* remove it, or choose another path"):
        open_output(str(path), NEW)
    assert victim.read_text() == "precious"


def test_links_of_others_elsewhere_are_theirs_to_make(tmp_path: Path, as_other: Callable[[Path], None]) -> None:
    """As the kernel has it: only a sticky directory is for all users."""
    link = tmp_path / "link"
    link.symlink_to("target")
    as_other(link)
    write(link)
    assert (tmp_path / "target").read_text() == "written"


def test_files_of_others(shared: Path, as_other: Callable[[Path], None]) -> None:
    path = shared / "file"
    path.write_text("theirs")
    path.chmod(0o666)
    as_other(path)
    with pytest.raises(PermissionError, match="it belongs to user "):
        open_output(str(path), NEW)
    assert path.read_text() == "theirs"


def test_pipes_of_others_are_not_waited_for(shared: Path, as_other: Callable[[Path], None]) -> None:
    path = shared / "pipe"
    os.mkfifo(path)
    as_other(path)
    with pytest.raises(PermissionError, match="it belongs to user "):
        open_output(str(path), NEW)


def test_another_name_of_a_file_of_ours(shared: Path, victim: Path) -> None:
    (shared / "other name").hardlink_to(victim)
    with pytest.raises(PermissionError, match="other names"):
        open_output(str(shared / "other name"), NEW)
    assert victim.read_text() == "precious"
    write(victim)


def test_links_of_proc_are_no_paths(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    for path in (f"/proc/self/fd/{writer}", f"/dev/fd/{writer}"):
        write(path)
        assert os.read(reader, 100) == b"written"
    os.close(reader)
    os.close(writer)
    with open(tmp_path / "file", "wb") as f:
        os.unlink(f.name)
        write(f"/proc/self/fd/{f.fileno()}")
        assert os.fstat(f.fileno()).st_size == len(b"written")


@pytest.mark.parametrize(
    ("path", "error"),
    [
        ("none/file", FileNotFoundError),
        ("", FileNotFoundError),
        (".", IsADirectoryError),
        ("file/below", NotADirectoryError),
    ],
)
def test_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, error: type[OSError]) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(error):
        open_output(path, NEW)


def test_endless_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="Too many levels"):
        open_output(str(tmp_path / "a"), NEW)
    assert len(os.listdir("/proc/self/fd")) == before


def test_all_outputs_use_it(shared: Path, victim: Path, as_other: Callable[[Path], None]) -> None:
    link = shared / "link"
    link.symlink_to(victim)
    as_other(link)
    folder = shared / "folder"
    folder.symlink_to(victim.parent)
    as_other(folder)
    with pytest.raises(Fatal, match=r"Couldn't open PID file .*'link' is a link of user"):
        create("PID", str(link))
    with pytest.raises(PermissionError, match="link of user"):
        LogFile(str(link), "header", 1 << 20)
    with pytest.raises(PermissionError, match="link of user"):
        check_directories(str(folder / "socket"))
    with pytest.raises(Fatal, match=r"Couldn't bind UNIX socket .*'folder' is a link of user"):
        unix.listen_at(str(folder / "socket"))
    assert victim.read_text() == "precious"
    assert sorted(os.listdir(victim.parent)) == ["shared", "victim"]
