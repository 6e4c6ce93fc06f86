"""Isolation: the process gives up root, inherited descriptors, capabilities, the file system and the view of other
processes. A hostile guest that has taken over the process gains access to nothing else.

1. inherited descriptors from 3 up are closed, after files that the command line names by /proc/self/fd/N are open
2. started as root: steps that need root are done (low ports, opening and configuring namespaces of other users), then
   the process changes to `nobody`, or to the user of --runas, for good. For a namespace that is not our own child's,
   three capabilities are kept until step 6:

       capability            needed until then for
       --------------------  ----------------------------------------------------------------
       CAP_SYS_ADMIN         entering it (setns), which a thread does for good (linux/netns.py)
       CAP_NET_ADMIN         creating and configuring the tap
       CAP_NET_BIND_SERVICE  ports below 1024 that programs have bound already (`auto`)

   Root of a user namespace changes as well, but not if `nobody` is unmapped there, and not for a namespace that it
   names: on the machine it is an ordinary user, such as podman's, who expects to see and to end the process as its own
3. started as any other user: nothing is dropped; rights come from the user namespace that is created or joined
4. all files are open and all modules imported: `leave_processes`, a PID namespace for the next child (the daemon in the
   background; in the foreground the process stays in the PID namespace of its parent), in a user namespace of our own
   if the right is missing otherwise
5. `leave_files`: mount, IPC and UTS namespaces, and an empty read-only root (pivot_root(2)). No file can be opened by
   a path any more
6. `lock_down`: no new privileges (execve(2) gives none), not dumpable (no attach, no read of our memory), ambient,
   bounding and all other sets of capabilities empty. Two stay, if they are rights over the guest's network and none
   over the host's: CAP_NET_ADMIN for a tap that was deleted, CAP_NET_BIND_SERVICE for ports below 1024 that appear at
   run time. They are rights over the host's network if its owner is our user namespace or one below it
   (`netns.rights_reach`): for root of the machine, and for root of a container with a network of its own
7. `seccomp.py`: the allowed system calls

Mustn't: change ids and lose access to /proc/self. A process that has changed its ids is marked not dumpable. Then its
own /proc files belong to root and writing uid_map fails; so the mark is removed again. Nor lose the parent-death signal
(PR_SET_PDEATHSIG) of the starting process: the kernel clears it with a change of ids or capabilities.
"""

from __future__ import annotations

import errno
import grp
import os
import pwd
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from .. import log
from ..lean.records import dataclass
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

KEPT_CAPABILITIES = CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_NET_BIND_SERVICE  # until the sandbox is entered
INNER_UID = 1  # uid in a user namespace of our own, if our uid is that of unmapped users (`nobody`)
MOUNT_POINTS = "/tmp", "/run", "/dev", "/proc"  # directories that an empty root may be mounted over, if they exist
ID_MAX = 2**32 - 2  # 2**32 - 1 means "no change" to setresuid(2)


@dataclass(frozen=True, slots=True)
class Identity:
    """A user and a group to run as, and a warning about the choice."""

    uid: int
    gid: int
    warning: str = ""


def choose_identity(runas: str | None, *, joins: bool = False) -> Identity:
    """The identity to run as: --runas, else `nobody` for root, else the current one. Raises Fatal.

    `joins`: the command line names a namespace.
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
    """Whether our user namespace has `user`, so that the process can change to it. Raises Fatal."""
    try:
        uid, gid = proc.is_mapped(user.pw_uid, "/proc/self/uid_map"), proc.is_mapped(user.pw_gid, "/proc/self/gid_map")
        return uid and gid and proc.may_set_groups()
    except OSError as e:
        reason = f"{e.strerror} (or give --runas)"
        raise Fatal(f"Couldn't read {e.filename}, which lists the users that root may change to: {reason}") from None


def opens_as_root(identity: Identity) -> bool:
    """Whether root opens all files and sockets before it becomes `identity`. Else rights come from user namespaces."""
    return os.geteuid() == 0 and (identity.uid != 0 or proc.in_init_userns())


def _parse_runas(text: str) -> Identity:
    """UID[:GID] or LOGIN[:GROUP]; a number alone is both ids, a login implies its group. A name must not mean root."""
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
    """Change to `identity` for good, without supplementary groups; no effect if it is the current one.

    The capabilities `kept` stay. The process must be single-threaded: capabilities, unlike ids, belong to threads.
    Raises Fatal.
    """
    if (os.geteuid(), os.getegid()) == (identity.uid, identity.gid):
        return
    try:
        with _keeping_death_signal():
            if kept:
                _empty_bounding_set()  # while the process has the right to
            prctl(PR_SET_KEEPCAPS, int(bool(kept)))
            os.setgroups([])
            os.setresgid(identity.gid, identity.gid, identity.gid)
            os.setresuid(identity.uid, identity.uid, identity.uid)
            if kept:
                prctl(PR_SET_KEEPCAPS, 0)
                set_capabilities(*kept)
    except OSError as e:
        ids = f"UID {identity.uid}, GID {identity.gid}"
        raise Fatal(f"Couldn't change to {ids}: {log.where(e)} (--runas needs root)") from None
    prctl(PR_SET_DUMPABLE, 1)


def running_capabilities(*, own_tap: bool, over_host: bool) -> tuple[int, ...]:
    """The capabilities that pasta keeps in the sandbox. `own_tap`: pasta creates the tap, again after a deletion.

    `over_host`: they would be rights over the host's network, where CAP_NET_ADMIN also means SO_MARK in control
    messages, and whatever an open netlink socket can say: the filter of system calls reads neither.
    """
    if over_host:
        return ()
    return (CAP_NET_ADMIN, CAP_NET_BIND_SERVICE) if own_tap else (CAP_NET_BIND_SERVICE,)


# The sandbox -------------------------------------------------------------------------------------------------------


def leave_processes(*, background: bool) -> None:
    """In the background, put the next child in a PID namespace of its own. Raises Fatal.

    The process must be single-threaded. Rights are as after `gain_rights`.
    """
    gain_rights()
    try:
        if background:
            unshare(CLONE_NEWPID)
    except OSError as e:
        raise Fatal(f"Couldn't leave the host's processes: {log.why(e)} ({namespace_hint(e)})") from None


def gain_rights() -> None:
    """Gain the right to create namespaces, and to give up rights for good (bounding set), by a user namespace of our
    own if the right is missing otherwise. Raises Fatal.

    The process must be single-threaded, and have its final identity.
    """
    if has_capability(CAP_SYS_ADMIN) and (has_capability(CAP_SETPCAP) or _bounding_set_is_empty()):
        return
    uid, gid = os.geteuid(), os.getegid()
    inside = uid if uid != proc.overflow_uid() else INNER_UID  # else unmapped users would have our uid inside
    try:
        with _keeping_death_signal():
            unshare(CLONE_NEWUSER)
        _write_maps(((inside, uid), (gid, gid)))
    except OSError as e:
        raise Fatal(f"Couldn't create user namespace: {log.why(e)} ({namespace_hint(e)})") from None


def leave_files(number: Callable[[str], int], directories: Iterable[int], *, chroot_fallback: bool) -> None:
    """Leave the file system, and IPC and UTS namespaces: root and current directory are empty. Raises Fatal.

    Descriptors of `directories` stay: they give access to files below them, but not above. number(name) is the number
    of a system call.
    """
    step = "leave the host's mount, IPC and UTS namespaces"
    try:
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
        step = "detach directories whose files are followed"
        for fd in directories:
            _detach_directory(number("open_tree"), fd)
        step = "detach mounts from the host's"
        mount("none", "/", "", MS_REC | MS_PRIVATE)
        step = "mount an empty file system"
        place = next(filter(os.path.isdir, MOUNT_POINTS), "/")
        flags = MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC
        mount("tmpfs", place, "tmpfs", flags, "nr_inodes=2,mode=0500")
        os.chdir(place)
        step = "make it the root"
        _change_root(number("pivot_root"), chroot_fallback=chroot_fallback)
    except OSError as e:
        hint = f" ({namespace_hint(e)})" if step.startswith("leave") else ""
        raise Fatal(f"Couldn't {step}: {log.where(e)}{hint}") from None


def _detach_directory(open_tree_number: int, fd: int) -> None:
    """Replace the directory `fd` by a mount of it alone: its `..` is itself. Raises OSError."""
    path = os.readlink(f"/proc/self/fd/{fd}")  # in our mount namespace, which is new
    try:
        alone = open_tree(open_tree_number, path, recursive=False)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        alone = open_tree(open_tree_number, path, recursive=True)  # mounts below it may not be removed
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
                "Couldn't make an empty file system the root: pivot_root(2) can't replace the current root file "
                "system, as in an initramfs or a chroot: give --chroot-fallback"
            ) from None
        mount(".", "/", "", MS_MOVE)
        os.chroot(".")
    else:
        umount(".", MNT_DETACH)  # the old root is mounted over the new one
    os.chdir("/")


def lock_down(*kept: int) -> None:
    """Give up all capabilities except `kept`, and all means of gaining more. Raises Fatal."""
    try:
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
        if has_capability(CAP_SETPCAP):
            _empty_bounding_set()
        set_capabilities(*kept)
        prctl(PR_SET_DUMPABLE, 0)
    except OSError as e:
        raise Fatal(f"Couldn't give up capabilities: {log.where(e)}") from None


def _empty_bounding_set() -> None:
    """Empty the bounding set, so that execve(2) gives no capability. A process without the right to do so sets
    PR_SET_NO_NEW_PRIVS, which has that effect. Raises OSError.
    """
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
    """In a new user namespace: map uid 0 and gid 0 to `identity` outside. A failure is a warning."""
    try:
        _write_maps(((0, identity.uid), (0, identity.gid)))
    except OSError as e:
        log.warn(f"Couldn't configure user mappings: {log.where(e)}: the command will not be root in its namespace")


def _write_maps(ids: tuple[tuple[int, int], tuple[int, int]]) -> None:
    """In a new user namespace: map one user and one group, (inside, outside) each. Raises OSError."""
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
    with _keeping_death_signal():
        setns(fd, CLONE_NEWUSER)


@contextmanager
def _keeping_death_signal() -> Iterator[None]:
    """Keep the parent-death signal, if one is set, over a change of ids or capabilities."""
    number, parent = parent_death_signal(), os.getppid()
    yield
    if number:
        prctl(PR_SET_PDEATHSIG, number)
        if os.getppid() != parent:
            os.kill(os.getpid(), number)  # the parent has died meanwhile


def close_fds(fds: Iterable[int]) -> None:
    """Close descriptors that were inherited."""
    for fd in fds:
        try:
            os.close(fd)
        except OSError as e:
            if e.errno != errno.EBADF:
                raise


def namespace_hint(e: OSError) -> str:
    """Advice for a failure of unshare(2), or of a call that needs the right to create namespaces."""
    if e.errno in (errno.ENOSPC, errno.EUSERS):
        return "user namespaces are forbidden or used up: raise sysctl user.max_user_namespaces, or other user.max_*"
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
    if e.errno == errno.EAGAIN:
        return "the user has as many processes as allowed: raise the limit, ulimit -u, or TasksMax= of the unit"
    return "the kernel refused"
