"""What we give up: root, what others left open, capabilities, the file system, other processes. A hostile guest that
has taken us over should find itself in an empty room.

1. descriptors from 3 up that were open when we were started are closed, once what the command line names by
   /proc/self/fd/N was opened
2. started as root: what needs root is done (low ports, opening and configuring other people's namespaces), then we
   become `nobody`, or what --runas says, for good. In a namespace that is not our own child's three capabilities are
   kept, and nothing else:

       capability            needed later for
       --------------------  ----------------------------------------------------------------
       CAP_SYS_ADMIN         entering it (setns): dropped as soon as a thread of ours is inside (linux/netns.py)
       CAP_NET_ADMIN         creating and configuring a tap that somebody deleted
       CAP_NET_BIND_SERVICE  ports below 1024 that appear while we run (`auto`)

   Root of a user namespace does so, too, but not if nobody is not mapped there, and not for a namespace that it names:
   to the machine it is an ordinary user, podman's, say, who expects to see and to end the process as its own
3. started as anyone else: nothing is dropped; rights come from the user namespace that we make or join
4. everything is open and imported: `leave_processes`, a PID namespace for what is forked next (the daemon in the
   background; in the foreground we stay among the processes of whoever started us), in a user namespace of our own
   if nothing else gives the right to
5. in the background, or not: `leave_files`, mount, IPC and UTS namespaces, and an empty read-only root (pivot_root(2)).
   Nothing can be opened by a path any more
6. `lock_down`: no new privileges (execve(2) gives none), not dumpable (nobody may attach or read our memory), ambient,
   bounding and all other sets of capabilities empty, but for those that a namespace's tap and ports below 1024 need
7. `seccomp.py`: the system calls that are left

Mustn't: change ids and lose access to /proc/self. A process that changed its ids is marked not dumpable, whereupon
its own /proc files belong to root and writing uid_map fails; so the mark is taken away again. Nor lose the signal that
whoever started us wants us to get when it dies: a change of ids or of capabilities makes the kernel forget that.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from .. import log
from ..linux import proc
from ..linux.syscall import (
    CAP_NET_ADMIN,
    CAP_NET_BIND_SERVICE,
    CAP_SETPCAP,
    CAP_SYS_ADMIN,
    CLONE_NEWIPC,
    CLONE_NEWNS,
    CLONE_NEWPID,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    MNT_DETACH,
    MS_MOVE,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    PR_CAP_AMBIENT,
    PR_CAP_AMBIENT_CLEAR_ALL,
    PR_CAPBSET_DROP,
    PR_CAPBSET_READ,
    PR_SET_DUMPABLE,
    PR_SET_KEEPCAPS,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    has_capability,
    mount,
    open_tree,
    parent_death_signal,
    pivot_root,
    prctl,
    set_capabilities,
    setns,
    umount,
    unshare,
)
from ..log import Fatal

KEPT_CAPABILITIES = CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE  # until we are in the sandbox
NAMED = 1  # uid in a user namespace of our own, for who is called as unmapped users are (nobody)
PLACES = "/tmp", "/run", "/dev", "/proc"  # directories that an empty root may be mounted over, if they exist
ID_MAX = 2**32 - 2  # 2**32 - 1 means "no change" to setresuid(2)


@dataclass(frozen=True, slots=True)
class Identity:
    """A user and a group to run as, and a warning about the choice."""

    uid: int
    gid: int
    warning: str = ""


def choose_identity(runas: str | None, *, joins: bool = False) -> Identity:
    """Whom to run as: --runas, else `nobody` for root, else who we are. Raises Fatal.

    `joins`: a namespace was named that we are for.
    """
    if runas is not None:
        return _parse_runas(runas)
    ourselves = Identity(os.geteuid(), os.getegid())
    if ourselves.uid != 0:
        return ourselves
    on_machine = proc.in_init_userns()
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        if not on_machine:
            return ourselves
        raise Fatal("There is no user nobody to change to from root: give --runas UID") from None
    if not on_machine and (joins or not _exists(nobody)):
        return ourselves
    return Identity(nobody.pw_uid, nobody.pw_gid, "Started as root, will change to nobody.")


def _exists(user: pwd.struct_passwd) -> bool:
    """Whether one can become `user` in our user namespace. Raises Fatal."""
    try:
        uid, gid = proc.is_mapped(user.pw_uid, "/proc/self/uid_map"), proc.is_mapped(user.pw_gid, "/proc/self/gid_map")
        return uid and gid and proc.may_set_groups()
    except OSError as e:
        reason = f"{e.strerror} (or give --runas)"
        raise Fatal(f"Couldn't read {e.filename}, which tells who root may become: {reason}") from None


def opens_as_root(identity: Identity) -> bool:
    """Whether root opens everything, before it becomes `identity`. Else rights come from user namespaces."""
    return os.geteuid() == 0 and (identity.uid != 0 or proc.in_init_userns())


def _parse_runas(text: str) -> Identity:
    """UID[:GID] or LOGIN[:GROUP]; a number alone is both ids, a login brings its group. A name must not mean root."""
    user, colon, group = text.partition(":")
    try:
        if user.isascii() and user.isdecimal():
            uid = gid = int(user)
        else:
            entry = pwd.getpwnam(user)
            uid, gid = entry.pw_uid, entry.pw_gid
            if uid == 0:
                raise ValueError("a login name of root is refused, give the number 0")
        if colon:
            gid = int(group) if group.isascii() and group.isdecimal() else grp.getgrnam(group).gr_gid
        if max(uid, gid) > ID_MAX:
            raise ValueError("out of range")
    except (KeyError, ValueError) as e:
        raise Fatal(f"Invalid --runas option: {text} ({e.args[0]})") from None
    return Identity(uid, gid)


def become(identity: Identity, *kept: int) -> None:
    """Change to `identity` for good, without supplementary groups; nothing happens if we are that already.

    Of root's capabilities `kept` are. The process must be single-threaded: capabilities, unlike ids, belong to threads.
    Raises Fatal.
    """
    if (os.geteuid(), os.getegid()) == (identity.uid, identity.gid):
        return
    try:
        with _dying_with_parent():
            if kept:
                _empty_bounding_set()  # while we have the right to
            prctl(PR_SET_KEEPCAPS, int(bool(kept)))
            os.setgroups([])
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
            if kept:
                prctl(PR_SET_KEEPCAPS, 0)
                set_capabilities(*kept)
    except OSError as e:
        ids = f"UID {identity.uid}, GID {identity.gid}"
        raise Fatal(f"Couldn't change to {ids}: {e.strerror} (--runas needs root)") from None
    prctl(PR_SET_DUMPABLE, 1)


def running_capabilities(*, own_tap: bool) -> tuple[int, ...]:
    """What pasta keeps in the sandbox; `own_tap`: we made the tap, and will again."""
    return (CAP_NET_ADMIN, CAP_NET_BIND_SERVICE) if own_tap else (CAP_NET_BIND_SERVICE,)


# The empty room ----------------------------------------------------------------------------------------------------


def leave_processes(*, background: bool) -> None:
    """Have what is forked next, in the background, in a PID namespace of its own. Raises Fatal.

    The process must be single-threaded. Rights are as after `gain_rights`.
    """
    gain_rights()
    try:
        if background:
            unshare(CLONE_NEWPID)
    except OSError as e:
        raise Fatal(f"Couldn't leave the host's processes: {os.strerror(e.errno or 0)} ({namespace_hint(e)})") from None


def gain_rights() -> None:
    """Have the right to make namespaces, and to give up rights for good (bounding set), by a user namespace of our own
    if nothing else gives it. Raises Fatal.

    The process must be single-threaded, and be who it will remain.
    """
    if has_capability(CAP_SYS_ADMIN) and (has_capability(CAP_SETPCAP) or _bounding_set_is_empty()):
        return
    uid, gid = os.geteuid(), os.getegid()
    inside = uid if uid != proc.overflow_uid() else NAMED  # or everybody else would look like us in here
    try:
        with _dying_with_parent():
            unshare(CLONE_NEWUSER)
        _write_maps(((inside, uid), (gid, gid)))
    except OSError as e:
        raise Fatal(f"Couldn't create user namespace: {os.strerror(e.errno or 0)} ({namespace_hint(e)})") from None


def leave_files(number: Callable[[str], int], directories: Iterable[int], *, chroot_fallback: bool) -> None:
    """Leave the file system, and IPC and UTS namespaces: the root is empty, and the current directory. Raises Fatal.

    Descriptors of `directories` stay: they lead to what is below them, and no way up. number(name) is that of a system
    call.
    """
    step = "leave the host's mount, IPC and UTS namespaces"
    try:
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
        step = "detach directories whose files are followed"
        for fd in directories:
            _cut_off(number("open_tree"), fd)
        step = "detach mounts from the host's"
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        step = "mount an empty file system"
        place = next(filter(os.path.isdir, PLACES), "/")
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("tmpfs", place, "tmpfs", flags, "nr_inodes=2,mode=0500")
        os.chdir(place)
        step = "make it the root"
        _change_root(number("pivot_root"), chroot_fallback=chroot_fallback)
    except OSError as e:
        hint = f" ({namespace_hint(e)})" if step.startswith("leave") else ""
        raise Fatal(f"Couldn't {step}: {e.strerror}{hint}") from None


def _cut_off(open_tree_number: int, fd: int) -> None:
    """Make a mount of the directory `fd` alone, under the same number: its `..` is itself. Raises OSError."""
    path = os.readlink(f"/proc/self/fd/{fd}")  # in our mount namespace, which is new
    try:
        alone = open_tree(open_tree_number, path, recursive=False)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        alone = open_tree(open_tree_number, path, recursive=True)  # what is mounted below may not be uncovered
    os.dup2(alone, fd, inheritable=False)
    os.close(alone)


def _change_root(pivot_root_number: int, *, chroot_fallback: bool) -> None:
    """Make the current directory, where something is mounted, the root. Raises OSError or Fatal."""
    try:
        pivot_root(pivot_root_number, ".", ".")
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        if not chroot_fallback:
            raise Fatal(
                "Couldn't make an empty file system the root: pivot_root(2) can't let go of the root file system that "
                "is there, as in an initramfs or a chroot: give --chroot-fallback"
            ) from None
        mount(".", "/", "", MS_MOVE)
        os.chroot(".")
    else:
        umount(".", MNT_DETACH)  # the old root lies over the new one now
    os.chdir("/")


def lock_down(*kept: int) -> None:
    """Give up all capabilities but `kept`, and the possibility of ever getting more. Raises Fatal."""
    try:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        if has_capability(CAP_SETPCAP):
            _empty_bounding_set()
        set_capabilities(*kept)
        prctl(PR_SET_DUMPABLE, 0)
    except OSError as e:
        raise Fatal(f"Couldn't give up capabilities: {e.strerror}") from None


def _empty_bounding_set() -> None:
    """Without it execve(2) gives no capability; who may not empty it has no new privileges anyway. Raises OSError."""
    for cap in range(64):
        try:
            prctl(PR_CAPBSET_READ, cap)
        except OSError:
            return  # EINVAL: there is no such capability, and none after it
        prctl(PR_CAPBSET_DROP, cap)


def _bounding_set_is_empty() -> bool:
    for cap in range(64):
        try:
            if prctl(PR_CAPBSET_READ, cap):
                return False
        except OSError:
            break  # EINVAL, as above
    return True


def map_ids(identity: Identity) -> None:
    """In a new user namespace: make `identity` outside uid 0, gid 0 inside. A failure is only a warning."""
    try:
        _write_maps(((0, identity.uid), (0, identity.gid)))
    except OSError as e:
        log.warn(f"Couldn't configure user mappings: {e.strerror}: the command will not be root in its namespace")


def _write_maps(ids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """In a new user namespace: what one user and one group, (inside, outside) each, are called. Raises OSError."""
    (uid, outer_uid), (gid, outer_gid) = ids
    for name, text in (
        ("uid_map", f"{uid} {outer_uid} 1"),
        ("setgroups", "deny"),
        ("gid_map", f"{gid} {outer_gid} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def join_userns(fd: int) -> None:
    """Enter the user namespace `fd` with all rights there. The process must be single-threaded. Raises OSError."""
    with _dying_with_parent():
        setns(fd, CLONE_NEWUSER)


@contextmanager
def _dying_with_parent() -> Iterator[None]:
    """Keep the signal that the parent's death brings, if there is to be one, over a change of ids or capabilities."""
    number, parent = parent_death_signal(), os.getppid()
    yield
    if number:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)  # it died in between


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that were inherited."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise


def namespace_hint(e: OSError) -> str:
    """What to do when unshare(2) fails, or what only the right to namespaces allows."""
    if e.errno in (errno.ENOSPC, errno.EUSERS):
        return "user namespaces are forbidden or used up: raise sysctl user.max_user_namespaces, or those beside it"
    if e.errno == errno.ENOSYS:
        return "a seccomp profile hides the system call, as those of containers do: it has to allow unshare(2)"
    if e.errno == errno.EPERM:
        return (
            "user namespaces are forbidden to ordinary users, and in a chroot: see sysctl "
            "kernel.unprivileged_userns_clone and kernel.apparmor_restrict_unprivileged_userns, or the container's "
            "seccomp profile"
        )
    if e.errno == errno.EACCES:
        return (
            "AppArmor or SELinux forbids user namespaces: see contrib/README.md, and for AppArmor sysctl "
            "kernel.apparmor_restrict_unprivileged_userns"
        )
    if e.errno == errno.EINVAL:
        return "this kernel has no user namespaces (CONFIG_USER_NS)"
    return "the kernel refused"
