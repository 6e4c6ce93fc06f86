"""Identities: the initial one and changes."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import sys
from collections.abc import Callable

import pytest

from passt import log
from passt.linux import proc
from passt.log import Fatal
from passt.sandbox import isolation
from passt.sandbox.isolation import Identity, become, choose_identity, close_fds, namespace_hint

ROOT = pwd.getpwuid(0).pw_name
NOBODY = pwd.getpwnam("nobody")


@pytest.mark.parametrize(
    ("text", "uid", "gid"),
    [
        ("0", 0, 0),
        ("1234", 1234, 1234),
        ("1234:77", 1234, 77),
        ("0:0", 0, 0),
        ("nobody", NOBODY.pw_uid, NOBODY.pw_gid),
        ("nobody:root", NOBODY.pw_uid, 0),
        ("nobody:5", NOBODY.pw_uid, 5),
        ("4294967294", 2**32 - 2, 2**32 - 2),
    ],
)
def test_runas(text: str, uid: int, gid: int) -> None:
    assert choose_identity(text) == Identity(uid, gid)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "5:",
        "no such login",
        "nobody:no such group",
        ROOT,
        f"{ROOT}:5",
        "4294967295",
        "5:4294967295",
        "-1",
        "٣",
    ],
)
def test_bad_runas(text: str) -> None:
    with pytest.raises(Fatal, match=r"^Invalid --runas option: ") as e:
        choose_identity(text)
    assert str(e.value).startswith(f"Invalid --runas option: {text} (")


BECOMES_NOBODY = Identity(NOBODY.pw_uid, NOBODY.pw_gid, "Started as root, will change to nobody.")
STAYS = Identity(0, 0)


@pytest.fixture
def as_root(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """We are root, of the machine or of a user namespace."""

    def become_root(*, on_machine: bool, mapped: bool = True, groups: bool = True) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 0)
        monkeypatch.setattr(os, "getegid", lambda: 0)
        monkeypatch.setattr(proc, "in_init_userns", lambda: on_machine)
        monkeypatch.setattr(proc, "is_mapped", lambda number, id_map: mapped or "gid" in id_map)
        monkeypatch.setattr(proc, "may_set_groups", lambda: groups)

    return become_root


def test_an_ordinary_user_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "getegid", lambda: 100)
    assert choose_identity(None) == Identity(1000, 100)


@pytest.mark.parametrize("on_machine", [True, False])
def test_root_becomes_nobody(as_root: Callable[..., None], on_machine: bool) -> None:
    as_root(on_machine=on_machine)
    assert choose_identity(None) == BECOMES_NOBODY
    assert isolation.opens_as_root(BECOMES_NOBODY)
    assert isolation.opens_as_root(STAYS) == on_machine


def test_root_of_a_user_namespace_stays_where_nobody_cannot_be(as_root: Callable[..., None]) -> None:
    for how in ({"mapped": False}, {"groups": False}):
        as_root(on_machine=False, **how)
        assert choose_identity(None) == STAYS


def test_root_of_a_user_namespace_that_may_not_know(
    as_root: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_root(on_machine=False)

    def refuse(number: int, id_map: str) -> bool:
        raise PermissionError(13, "Permission denied", id_map)

    monkeypatch.setattr(proc, "is_mapped", refuse)
    with pytest.raises(Fatal) as e:
        choose_identity(None)
    reason = "Permission denied (or give --runas)"
    text = f"Couldn't read /proc/self/uid_map, which lists the users that root may change to: {reason}"
    assert str(e.value) == text
    assert choose_identity("65534") == Identity(65534, 65534)


def test_root_of_a_user_namespace_stays_for_one_that_it_names(as_root: Callable[..., None]) -> None:
    as_root(on_machine=False)
    assert choose_identity(None, joins=True) == STAYS
    as_root(on_machine=True)
    assert choose_identity(None, joins=True) == BECOMES_NOBODY


def test_root_without_nobody(as_root: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", missing)
    as_root(on_machine=True)
    with pytest.raises(Fatal, match="There is no user nobody"):
        choose_identity(None)
    as_root(on_machine=False)
    assert choose_identity(None) == STAYS


def test_become_who_we_are_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "setresuid", lambda *_: pytest.fail("changed"))
    become(Identity(os.geteuid(), os.getegid()))


def test_become_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setgroups", refuse)
    with pytest.raises(
        Fatal, match=r"^Couldn't change to UID 7, GID 8: Operation not permitted \(--runas needs root\)$"
    ):
        become(Identity(7, 8))


def test_becoming_keeps_nothing_and_keeps_access_to_own_files() -> None:
    """In a process of its own, in a user namespace if that is what it takes to be root."""
    code = (
        "import os; from passt.sandbox.isolation import become, Identity\n"
        "become(Identity(65534, 65534)); print(os.getresuid(), os.getresgid(), os.getgroups())\n"
        "open('/proc/self/oom_score_adj', 'r+').close(); print('writable')"
    )
    if os.geteuid() != 0:
        pytest.skip("needs root to change users")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == f"{(65534,) * 3} {(65534,) * 3} []\nwritable\n", done.stderr


def test_becoming_can_keep_three_capabilities() -> None:
    code = (
        "import os; from passt.sandbox.isolation import KEPT_CAPABILITIES, become, Identity\n"
        "become(Identity(65534, 65534), *KEPT_CAPABILITIES); print(os.getresuid())\n"
        "print([l.split()[1] for l in open('/proc/self/status') if l.startswith(('CapPrm', 'CapEff', 'CapInh'))])"
    )
    if os.geteuid() != 0:
        pytest.skip("needs root to change users")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    kept = f"{1 << 21 | 1 << 12 | 1 << 10:016x}"
    assert done.stdout == f"{(65534,) * 3}\n{['0' * 16, kept, kept]}\n", done.stderr


def test_id_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    written: dict[str, str] = {}

    class File:
        def __init__(self, path: str, mode: str) -> None:
            self.name = path.rpartition("/")[2]

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def write(self, text: str) -> None:
            written[self.name] = text

    monkeypatch.setattr("builtins.open", File)
    isolation.map_ids(Identity(1000, 100))
    assert list(written.items()) == [("uid_map", "0 1000 1"), ("setgroups", "deny"), ("gid_map", "0 100 1")]


def test_id_maps_that_cannot_be_written_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "warn", said.append)
    monkeypatch.setattr("builtins.open", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EPERM, "not so")))
    isolation.map_ids(Identity(1000, 100))
    assert said == ["Couldn't configure user mappings: not so: the command will not be root in its namespace"]


def test_close_fds() -> None:
    reader, writer = os.pipe()
    close_fds([reader, writer])
    close_fds([reader, writer])  # closed already
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(reader)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (errno.ENOSPC, "raise sysctl user.max_user_namespaces"),
        (errno.EUSERS, "raise sysctl user.max_user_namespaces"),
        (errno.EPERM, "kernel.unprivileged_userns_clone"),
        (errno.EACCES, "contrib/README.md"),
        (errno.EINVAL, "CONFIG_USER_NS"),
        (errno.ENOSYS, "seccomp profile"),
        (errno.EAGAIN, "ulimit -u"),
        (errno.ENOMEM, "the kernel refused"),
    ],
)
def test_hint(number: int, text: str) -> None:
    assert text in namespace_hint(OSError(number, ""))
