"""The account of an ordinary user, which root makes for tests, and which goes with the last of them.

Several test runs may need it at a time, and any of them may be killed. Each has a shared lock (flock(2)) on the home
directory, which the kernel releases with the process. The exclusive lock means that none needs the account any more:
each run tries to get it at its end, and a guard, which outlives the run, waits for it. An account of that name which
is not made here (it has another comment) stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

COMMENT = "tests of passt"
USER_EXISTS, IN_USE = 9, 8  # exit statuses of useradd(8) and userdel(8)
LOCKED = frozenset((1, 10))  # likewise: another program has the password file, or that of groups
PATIENCE = 5.0  # s until the last processes of the user have ended


@contextlib.contextmanager
def account(name: str) -> Iterator[pwd.struct_passwd]:
    """The account `name`, for as long as the context lasts."""
    entry, lock = _have(name)
    if lock is None:
        yield entry
        return
    nowhere = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in range(3)]
    guard = [sys.executable, "-I", __file__, name]
    os.posix_spawn(guard[0], guard, os.environ, file_actions=nowhere, setsid=True)
    try:
        yield entry
    finally:
        os.close(lock)
        remove(name, wait=False)


def _have(name: str) -> tuple[pwd.struct_passwd, int | None]:
    """The account, made if it is missing, and its shared lock; None if it is not ours."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        command = ["useradd", "--create-home", "--comment", COMMENT, name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode in LOCKED:
            continue  # it waited for the lock itself
        assert done.returncode in (0, USER_EXISTS), done.stderr
        with contextlib.suppress(KeyError, FileNotFoundError):  # it was removed meanwhile
            entry = pwd.getpwnam(name)
            if entry.pw_gecos != COMMENT:
                return entry, None
            lock = os.open(entry.pw_dir, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(lock, fcntl.LOCK_SH)
            if _is(entry.pw_dir, lock):
                os.fchown(lock, entry.pw_uid, entry.pw_gid)  # a run that was killed may have left it, of another number
                return entry, lock
            os.close(lock)
        time.sleep(0.05)
    raise AssertionError(f"the account {name} has no home directory: remove it (userdel {name})")


def _is(path: str, fd: int) -> bool:
    """Whether `path` is still the directory `fd`, and not a successor."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


def remove(name: str, *, wait: bool) -> bool:
    """Remove the account if it is ours and none needs it; `wait` until that is so. Whether it was removed."""
    try:
        entry = pwd.getpwnam(name)
        lock = os.open(entry.pw_dir, os.O_RDONLY | os.O_DIRECTORY)
    except (KeyError, FileNotFoundError):
        return False
    try:
        if not wait and not _try(lock, fcntl.LOCK_EX):
            if not _try(lock, fcntl.LOCK_SH):
                fcntl.flock(lock, fcntl.LOCK_SH)  # a guard is about to remove it
            return False
        fcntl.flock(lock, fcntl.LOCK_EX)
        return entry.pw_gecos == COMMENT and _is(entry.pw_dir, lock) and _delete(name)
    finally:
        os.close(lock)


def _try(lock: int, kind: int) -> bool:
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _delete(name: str) -> bool:
    end = time.monotonic() + PATIENCE
    while True:
        done = subprocess.run(["userdel", "--remove", name], capture_output=True, text=True, check=False)
        if done.returncode not in (IN_USE, *LOCKED) or time.monotonic() > end:
            break
        time.sleep(0.05)
    assert done.returncode == 0 and not Path("/home", name).exists(), done.stderr
    return True


if __name__ == "__main__":
    remove(sys.argv[1], wait=True)
