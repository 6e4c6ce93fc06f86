"""/etc/resolv.conf: what it says, and that its changes are noticed, however they are made."""

from __future__ import annotations

import errno
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr, log
from passt.conf import resolv_conf
from passt.conf.resolv_conf import SETTLE, Follower, ResolvConf, parse
from passt.linux import inotify
from passt.loop.directories import Changes
from passt.loop.reactor import EPOLLIN
from passt.wire import domain

from ..support import T0, make_context, reactor, timers

REPOSITORY = Path(__file__).parents[2]
Start = Callable[..., "Watcher"]


def ip(text: str) -> bytes:
    return addr.packed(text)


def one(server: str) -> str:
    return f"nameserver {server}\n"


# Contents ----------------------------------------------------------------------------------------------------------


def test_parse() -> None:
    text = (
        "# nameserver 1.1.1.1\n;nameserver 1.1.1.2\n nameserver 9.9.9.9  \nnameserver\t9.9.9.10\t# ours\n"
        "nameserver fe80::1%eth0\nnameserver nonsense\nnameserver\nsearch a.example\tb.example \nsearch c.example\n"
        "domain d.example\noptions ndots:2\nnameserver 9.9.9.11"
    )
    servers = ip("9.9.9.9"), ip("9.9.9.10"), ip("fe80::1"), ip("9.9.9.11")
    assert parse(text) == ResolvConf(servers, ("a.example", "b.example"), ((ip("fe80::1"), "eth0"),))
    assert parse("nameserver 2001:db8::1%eth0").zones == ()  # an address of every link
    assert parse("") == ResolvConf()


@pytest.mark.parametrize(
    ("line", "names"),
    [
        ("search .", ()),
        ("search . a.example", ("a.example",)),
        ("search ü.example a..b b", ("b",)),
        ("search", ()),
    ],
)
def test_search_domains_that_no_packet_can_hold(line: str, names: tuple[str, ...]) -> None:
    assert parse(line).search == names


@given(st.text() | st.text("abü.- \t\x7f").map("search {}".format))
def test_any_text_is_read(text: str) -> None:
    found = parse(text)
    assert all(len(s) in (4, 16) for s in found.servers)
    assert domain.decode_list(domain.encode_list(found.search)) == tuple(n.removesuffix(".") for n in found.search)


# Changes -----------------------------------------------------------------------------------------------------------


class Watcher:
    """A follower in a loop of fakes. `told` is what it handed on."""

    def __init__(self, path: Path) -> None:
        self.changes = Changes()
        self.follower = Follower(str(path), self.changes)
        self.ctx = make_context()
        self.told: list[str] = []
        self.follower.start(self.ctx, lambda found, now: self.told.append(" ".join(map(addr.text, found.servers))))
        self.now = T0

    @property
    def armed(self) -> bool:
        return any(timers(self.ctx).services.deadlines)

    def events(self) -> None:
        """Handle the events of inotify."""
        fd = self.changes.fd
        if fd >= 0 and select.select([fd], [], [], 0)[0]:
            reactor(self.ctx).fire(fd, EPOLLIN, self.now)

    def settles(self) -> list[str]:
        """The events so far, and the time that a change takes to be believed; what was handed on."""
        self.events()
        self.now += SETTLE
        services = timers(self.ctx).services
        for timer, deadline in enumerate(services.deadlines):
            if deadline is not None and deadline <= self.now:
                services.fire(timer, self.now)
        told, self.told = self.told, []
        return told


@pytest.fixture
def start() -> Iterator[Start]:
    made: list[Watcher] = []

    def make(path: Path) -> Watcher:
        made.append(Watcher(path))
        return made[-1]

    yield make
    for watcher in made:
        watcher.follower.close()
        watcher.changes.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A plain file, alone in its directory."""
    found = tmp_path / "etc" / "resolv.conf"
    found.parent.mkdir()
    found.write_text(one("192.0.2.1"))
    return found


def replace_by(path: Path, text: str) -> None:
    """As NetworkManager and systemd-resolved do it."""
    new = path.with_name(".new")
    new.write_text(text)
    new.rename(path)


def test_at_start(path: Path, start: Start) -> None:
    watcher = start(path)
    assert watcher.follower.current.servers == (ip("192.0.2.1"),)
    assert not watcher.armed
    assert watcher.settles() == []


def test_in_place(path: Path, start: Start) -> None:
    watcher = start(path)
    path.write_text(one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]
    assert not watcher.armed


def test_by_rename(path: Path, start: Start) -> None:
    watcher = start(path)
    for i in range(2, 5):
        replace_by(path, one(f"192.0.2.{i}"))
        assert watcher.settles() == [f"192.0.2.{i}"]


def test_removed_and_made_again(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    watcher = start(path)
    path.unlink()
    assert watcher.settles() == []
    assert said == [f"{path}: No such file or directory: keeping its previous contents"]
    path.write_text("")
    assert watcher.settles() == []
    assert said[1:] == [f"{path}: no nameserver in it: keeping its previous contents"]
    assert watcher.follower.current.servers == (ip("192.0.2.1"),)
    path.write_text(one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]


def test_half_written_files_are_not_read(path: Path, start: Start) -> None:
    watcher = start(path)
    with path.open("w") as f:
        f.flush()
        watcher.events()
        assert not watcher.armed, "nobody has closed it"
        f.write(one("192.0.2.2"))
    watcher.events()
    assert watcher.armed
    watcher.now += SETTLE / 2
    path.write_text(one("192.0.2.3"))
    watcher.events()
    watcher.now -= SETTLE / 4
    assert watcher.settles() == [], "the time begins anew"
    assert watcher.settles() == ["192.0.2.3"]


def test_the_same_again_is_no_change(path: Path, start: Start) -> None:
    watcher = start(path)
    replace_by(path, one("192.0.2.1"))
    assert watcher.settles() == []
    path.write_text(one("192.0.2.1") + "# by somebody\n")
    assert watcher.settles() == []


def test_other_files_are_no_affair_of_ours(path: Path, start: Start) -> None:
    watcher = start(path)
    replace_by(path.with_name("hosts"), "x")
    watcher.events()
    assert not watcher.armed


@pytest.fixture
def linked(path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """As systemd-resolved has it: the link, and the file."""
    stub = tmp_path / "run" / "systemd" / "stub-resolv.conf"
    stub.parent.mkdir(parents=True)
    stub.write_text(one("127.0.0.53"))
    path.unlink()
    path.symlink_to("../run/systemd/stub-resolv.conf")
    return path, stub


def test_behind_a_link(linked: tuple[Path, Path], start: Start) -> None:
    path, stub = linked
    watcher = start(path)
    assert watcher.follower.current.servers == (ip("127.0.0.53"),)
    replace_by(stub, one("127.0.0.54"))
    assert watcher.settles() == ["127.0.0.54"]
    stub.write_text(one("127.0.0.55"))
    assert watcher.settles() == ["127.0.0.55"]


def test_the_link_is_pointed_elsewhere(
    linked: tuple[Path, Path], start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn_ratelimited", lambda key, text, *_: said.append(text))
    path, stub = linked
    watcher = start(path)
    stub.with_name("resolv.conf").write_text(one("192.0.2.1"))
    new = path.with_name("new")
    new.symlink_to("../run/systemd/resolv.conf")
    new.rename(path)
    assert watcher.settles() == ["192.0.2.1"]
    path.unlink()
    path.write_text(one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]
    far = path.parents[1] / "far"
    far.write_text(one("192.0.2.3"))
    new.symlink_to(far)
    new.rename(path)
    assert watcher.settles() == []
    assert said == [f"{path}: {far} is in a directory that was not on the path at start: keeping its previous contents"]


def test_a_new_target_in_a_known_directory_is_watched_too(linked: tuple[Path, Path], start: Start) -> None:
    path, stub = linked
    watcher = start(path)
    other = stub.with_name("resolv.conf")
    other.write_text(one("192.0.2.1"))
    new = path.with_name("new")
    new.symlink_to("../run/systemd/resolv.conf")
    new.rename(path)
    assert watcher.settles() == ["192.0.2.1"]
    replace_by(other, one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]


def test_links_to_themselves(path: Path, start: Start) -> None:
    path.unlink()
    path.symlink_to("resolv.conf")
    watcher = start(path)
    assert watcher.follower.current == ResolvConf()


def test_a_file_that_is_not_there_yet(path: Path, start: Start) -> None:
    path.unlink()
    watcher = start(path)
    assert watcher.follower.current == ResolvConf()
    path.write_text(one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]


def test_something_is_mounted_on_the_file(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = path.with_name("mountinfo")
    mounts.write_text(f"36 35 98:0 / {path} rw - ext4 /dev/sda1 rw\n")
    monkeypatch.setattr(resolv_conf, "MOUNTS", str(mounts))
    watcher = start(path)
    assert watcher.follower.current.servers == (ip("192.0.2.1"),)
    with path.open("r+") as f:
        f.write(one("192.0.2.2"))
    assert watcher.settles() == ["192.0.2.2"]


def test_lost_events_are_taken_for_a_change(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = start(path)
    replace_by(path, one("192.0.2.2"))
    monkeypatch.setattr(inotify, "read", lambda fd: [inotify.Event(-1, inotify.Q_OVERFLOW, "")])
    assert watcher.settles() == ["192.0.2.2"]


def test_no_inotify_for_us(path: Path, start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)

    def refuse() -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(inotify, "new", refuse)
    watcher = start(path)
    assert watcher.follower.current.servers == (ip("192.0.2.1"),)
    hint = "Too many open files (raise sysctl fs.inotify.max_user_instances)"
    assert said == [f"Changes of {path} will not be noticed: {hint}"]
    assert not reactor(watcher.ctx).refs


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.EACCES, ""), (errno.ENOSPC, " (raise sysctl fs.inotify.max_user_watches)")]
)
def test_a_directory_on_the_way_that_cannot_be_watched(
    linked: tuple[Path, Path], start: Start, monkeypatch: pytest.MonkeyPatch, number: int, hint: str
) -> None:
    """The second one: what could be read without it is read."""
    path, stub = linked
    said: list[str] = []
    monkeypatch.setattr(log, "info", said.append)
    add = inotify.add

    def refuse(fd: int, name: str, mask: int) -> int:
        if name == str(stub.parent):
            raise OSError(number, os.strerror(number))
        return add(fd, name, mask)

    monkeypatch.setattr(inotify, "add", refuse)
    watcher = start(path)
    assert watcher.follower.current.servers == (ip("127.0.0.53"),)
    assert watcher.follower.directories == ()
    assert said == [f"Changes of {path} will not be noticed: {os.strerror(number)}{hint}"]


def test_nothing_to_watch(tmp_path: Path, start: Start) -> None:
    before = os.listdir("/proc/self/fd")
    watcher = start(tmp_path / "no" / "resolv.conf")
    assert watcher.follower.current == ResolvConf()
    assert os.listdir("/proc/self/fd") == before
    Follower(str(tmp_path / "resolv.conf"))
    assert os.listdir("/proc/self/fd") == before


NO_FILE_SYSTEM = """
import json, os, select, subprocess, sys
from passt.linux import inotify
from passt.loop.directories import Changes
from passt.conf.resolv_conf import Follower
root, path, commands = sys.argv[1], sys.argv[2], sys.argv[3:]
reader, writer = os.pipe()
outside = subprocess.Popen(["nsenter", "-t", str(os.getppid()), "-m", "sh", "-c", "echo; read x; " + commands[0]],
                           stdin=reader, stdout=subprocess.PIPE)
outside.stdout.readline()  # it has entered, before there is nothing to enter from
changes = Changes()
follower = Follower(path, changes)
before = [s.hex() for s in follower.current.servers]
subprocess.run(["mount", "-t", "tmpfs", "tmpfs", root], check=True)
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
os.chdir(root)
assert libc.syscall(155 if os.uname().machine == "x86_64" else 41, b".", b".") == 0, os.strerror(ctypes.get_errno())
assert libc.umount2(b".", 2) == 0
assert os.listdir("/") == []
os.write(writer, b"\\n")
select.select([changes.fd], [], [], 30)
seen = set()
while path.rpartition("/")[2] not in seen and "stub-resolv.conf" not in seen:
    select.select([changes.fd], [], [], 30)
    seen |= {e.name for e in inotify.read(changes.fd)}
outside.wait()
from passt.conf.resolv_conf import parse
print(json.dumps([before, [s.hex() for s in parse(follower._read()).servers]]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("how", ["echo {text} > {file}", "echo {text} > {file}.new; mv {file}.new {file}"])
@pytest.mark.parametrize("link", [False, True])
def test_without_a_file_system(linked: tuple[Path, Path], tmp_path: Path, how: str, link: bool) -> None:
    """pivot_root(2) into an empty directory, and everything else let go of: changes are still noticed and read."""
    path, stub = linked
    file = stub if link else path
    if not link:
        path.unlink()
        path.write_text(one("127.0.0.53"))
    empty = tmp_path / "empty"
    empty.mkdir()
    command = how.format(text="nameserver 192.0.2.2", file=file)
    run = ["unshare", "--mount", "--propagation", "private", sys.executable, "-c", NO_FILE_SYSTEM]
    done = subprocess.run(
        [*run, str(empty), str(path), command],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [["7f000035"], ["c0000202"]]
