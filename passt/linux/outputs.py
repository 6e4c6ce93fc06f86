"""Opening files to write to, where other users may have been before.

In a directory where all users may create files and none may remove those of others (sticky, as /tmp), another user may
have made what lies at a path: a link to a file of ours, a file whose contents that user controls, another name (hard
link) of a file of ours, a pipe. The kernel refuses some of these if sysctl fs.protected_* say so; here they are refused
in any case, for every directory on the way, and with the reason. Anywhere else links are followed as usual.

    in a sticky directory                    refused unless it belongs to
    ---------------------------------------  ------------------------------------
    a symbolic link, also on the way         us, or the owner of the directory
    the file itself                          likewise; and if it has other names

Each step is taken from the descriptor of the last one, so that a path which changes meanwhile does not lead elsewhere.
Links in /proc (/dev/stdout, /proc/self/fd/N) are no paths: the kernel follows them.
"""

from __future__ import annotations

import errno
import os
import stat

LINKS_MAX = 40  # symbolic links on the way to a file, as in path_resolution(7)
PROC = "/proc"
_PATH = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH


def open_output(path: str, flags: int, mode: int = 0o600) -> int:
    """open(2) with O_CLOEXEC. Raises OSError with the reason."""
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    directory, name, follow = _find(path)
    try:
        # Truncated last: the file may turn out to be another one
        fd = os.open(
            name, flags & ~os.O_TRUNC | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW), mode, dir_fd=directory
        )
        try:
            if not follow:
                _check_file(os.fstat(directory), os.fstat(fd))
            if flags & os.O_TRUNC and stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
        except BaseException:
            os.close(fd)
            raise
    finally:
        os.close(directory)
    return fd


def check_directories(path: str) -> None:
    """Raise OSError if `path`, of a socket to be bound, leads through a link that another user made."""
    os.close(_find(path)[0])


def _find(path: str) -> tuple[int, str, bool]:
    """The directory of the file that `path` leads to, the file's name in it, and whether it is a link to follow."""
    at = _directory("/" if path.startswith("/") else ".")
    parts = _split(path)
    links = 0
    try:
        while True:
            name, last = parts[0], len(parts) == 1
            try:
                entry = os.open(name, _PATH, dir_fd=at)
            except FileNotFoundError:
                if last:
                    return at, name, False
                raise
            try:
                info = os.fstat(entry)
                if stat.S_ISLNK(info.st_mode) and not _is_proc(at):
                    links += 1
                    if links > LINKS_MAX:
                        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                    _check_link(os.fstat(at), info, name)
                    target = os.readlink("", dir_fd=entry)
                    parts = _split(target) + parts[1:]
                    if target.startswith("/"):
                        at = _replace(at, _directory("/"))
                    continue
                if last:
                    if not stat.S_ISLNK(info.st_mode) and not stat.S_ISSOCK(info.st_mode):
                        _check_file(os.fstat(at), info)  # also below, but a pipe is not waited for in vain
                    return at, name, stat.S_ISLNK(info.st_mode)
                at = _replace(at, _enter(at, name, entry, info))
                del parts[0]
            finally:
                os.close(entry)
    except BaseException:
        os.close(at)
        raise


def _enter(at: int, name: str, entry: int, info: os.stat_result) -> int:
    """A descriptor of the directory `entry`, which is `name` in `at`, or a link of /proc to one."""
    if stat.S_ISLNK(info.st_mode):
        return os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    if not stat.S_ISDIR(info.st_mode):
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
    return os.dup(entry)


def _split(path: str) -> list[str]:
    """Its components; "." for none, and at the end of a path that names a directory."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    return [*parts, "."] if not parts or path.endswith(("/", "/.")) else parts


def _directory(path: str) -> int:
    return os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def _replace(old: int, new: int) -> int:
    os.close(old)
    return new


def _is_proc(directory: int) -> bool:
    try:
        return os.fstat(directory).st_dev == os.stat(PROC).st_dev != os.stat("/").st_dev
    except OSError:
        return False


def _is_shared(directory: os.stat_result) -> bool:
    return bool(directory.st_mode & stat.S_ISVTX and directory.st_mode & _WRITABLE)


def _trusted(directory: os.stat_result, info: os.stat_result) -> bool:
    return info.st_uid in (os.geteuid(), directory.st_uid)


def _check_link(directory: os.stat_result, link: os.stat_result, name: str) -> None:
    if _is_shared(directory) and not _trusted(directory, link):
        raise PermissionError(
            errno.EACCES,
            f"'{name}' is a link of user {link.st_uid} in a directory where all users may create files: "
            "remove it, or choose another path",
        )


def _check_file(directory: os.stat_result, file: os.stat_result) -> None:
    if not _is_shared(directory) or stat.S_ISDIR(file.st_mode):
        return
    where = "in a directory where all users may create files: remove it, or choose another path"
    if not _trusted(directory, file):
        raise PermissionError(errno.EACCES, f"it belongs to user {file.st_uid}, {where}")
    if stat.S_ISREG(file.st_mode) and file.st_nlink > 1:
        raise PermissionError(errno.EACCES, f"it has other names (hard links), {where}")
