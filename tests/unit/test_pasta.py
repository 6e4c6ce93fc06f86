"""Targets and their end; making namespaces for real is the system tests' part."""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from passt import pasta
from passt.linux import netlink, netns, tun
from passt.linux.inherited import Inherited
from passt.linux.routes import NsPlan
from passt.linux.tun import Tap
from passt.log import Fatal, StepError
from passt.namespace import init as namespace_init
from passt.namespace.init import Command
from passt.pasta import Init, Target, create_tap, find, open_target
from passt.sandbox import isolation
from passt.sandbox.isolation import Identity


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


# Targets -----------------------------------------------------------------------------------------------------------


def test_target_of_a_pid(sleeper: subprocess.Popen[bytes]) -> None:
    target = open_target(sleeper.pid, "", None, netns_only=False)
    assert target.userns is not None
    assert netns.same_ns(target.netns, "/proc/self/ns/net")
    assert netns.same_ns(target.userns, "/proc/self/ns/user")
    assert target.path == f"/proc/{sleeper.pid}/ns/net"
    os.close(target.netns)
    os.close(target.userns)
    target = open_target(sleeper.pid, "", None, netns_only=True)
    assert target.userns is None
    os.close(target.netns)


def test_target_by_path_is_absolute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/proc/self")
    target = open_target(None, "./ns/net", None, netns_only=True)
    os.close(target.netns)
    assert target.path == f"/proc/{os.getpid()}/ns/net"


def test_targets_that_are_none() -> None:
    with pytest.raises(Fatal, match="Couldn't find process 2147483647: there is no such PID"):
        open_target(2**31 - 1, "", None, netns_only=False)
    with pytest.raises(Fatal, match="Couldn't open network namespace /run/netns/no-such: No such file"):
        open_target(None, "/run/netns/no-such", None, netns_only=True)
    with pytest.raises(Fatal, match="Couldn't open user namespace /proc/self/ns/net: not a namespace of that kind"):
        open_target(None, "/proc/self/ns/net", "/proc/self/ns/net", netns_only=False)


def test_what_netns_names(tmp_path: Path) -> None:
    """A path, a name, or, as slirp4netns(1) has it, a PID that is no name."""
    here = str(os.getpid())
    assert find("blue", "/run/netns") == (None, "/run/netns/blue")
    assert find("/proc/1/ns/net", "/run/netns") == (None, "/proc/1/ns/net")
    assert find(here, str(tmp_path)) == (os.getpid(), f"{tmp_path}/{here}")
    (tmp_path / here).symlink_to("nowhere")
    assert find(here, str(tmp_path)) == (None, f"{tmp_path}/{here}")
    with pytest.raises(Fatal, match="namespace /run/netns/2147483647: there is none, and no process 2147483647 either"):
        find("2147483647", "/run/netns")


def test_own_network_namespace_is_refused(sleeper: subprocess.Popen[bytes]) -> None:
    target = open_target(sleeper.pid, "", None, netns_only=True)
    with pytest.raises(Fatal, match=f"^/proc/{sleeper.pid}/ns/net is the network namespace that pasta runs in"):
        pasta.check_foreign(target)
    os.close(target.netns)
    with open("/proc/self/ns/user") as other:
        pasta.check_foreign(Target(other.fileno(), None))


def test_own_user_namespace_is_not_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolation, "join_userns", lambda fd: pytest.fail("joined"))
    pasta.join_userns(Target(-1, None))
    fd = os.open("/proc/self/ns/user", os.O_RDONLY)
    pasta.join_userns(Target(-1, fd))
    os.close(fd)


def test_user_namespace_that_may_not_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> None:
        raise PermissionError(errno.EPERM, "setns: Operation not permitted")

    monkeypatch.setattr(isolation, "join_userns", refuse)
    with open("/proc/self/ns/net") as f, pytest.raises(Fatal) as e:
        pasta.join_userns(Target(-1, f.fileno()))
    assert str(e.value) == "Couldn't join user namespace: Operation not permitted (you must own it, or be root)"


# The first process -------------------------------------------------------------------------------------------------


def child(code: int) -> tuple[int, int, int]:
    """A process that ends with `code` at the end of file on its pipe: (PID, reading end, writing end)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(writer)
        while os.read(reader, 1):
            pass
        os._exit(code)
    return pid, reader, writer


def test_init_is_told_by_its_pipe_and_waited_for() -> None:
    reader, writer = os.pipe()
    pid, other, release = child(7)
    init = Init(pid, writer)
    init.start()
    init.signal(15)
    assert os.read(reader, 10) == bytes((0, 15))
    os.close(reader)
    init.signal(15)  # it has just ended
    os.close(release)
    assert select.select([init.pidfd], [], [], 30)[0]
    assert init.wait() == 7
    for fd in (writer, init.pidfd, other):
        os.close(fd)


def test_abandoned_init_is_gone() -> None:
    pid, reader, writer = child(0)
    init = Init(pid, writer)
    init.abandon()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    os.close(init.pidfd)
    os.close(reader)


# The tap -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Entering the namespace and creating the tap are recorded."""
    steps: list[str] = []
    reader, writer = os.pipe()
    os.close(writer)

    def open_tap(name: str) -> Tap:
        steps.append(f"open {name}")
        return Tap(reader, name, True, True, True)

    def run_in(fd: int, function: Callable[[], Any]) -> Any:
        steps.append(f"enter {fd}")
        return function()

    monkeypatch.setattr(netns, "run_in", run_in)
    monkeypatch.setattr(tun, "open_tap", open_tap)
    return steps


def test_tap_is_created_and_configured_inside(inside: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "configure", lambda nl, plan: (b"\2" * 6, ["a problem"]))
    made = create_tap(Target(9, None), NsPlan("tap5"))
    assert made.netlink is not None
    made.netlink.close()
    os.close(made.device.fd)
    assert (inside, made.mac, made.problems) == (["enter 9", "open tap5"], b"\2" * 6, ["a problem"])
    assert made.plan == NsPlan("tap5", mac=b"\2" * 6)


def test_tap_is_created_again_on_the_same_descriptor(inside: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[NsPlan] = []

    def configure(nl: object, plan: NsPlan) -> tuple[bytes, list[str]]:
        plans.append(plan)
        return b"\2" * 6, [f"problem {len(plans)}"]

    monkeypatch.setattr(netlink, "configure", configure)
    made = create_tap(Target(9, None), NsPlan("tap5"))
    attached: list[tuple[int, str]] = []
    monkeypatch.setattr(tun, "attach", lambda fd, name: attached.append((fd, name)) or made.device)
    made.recreate()
    assert attached == [(made.device.fd, "tap5")]
    assert inside == ["enter 9", "open tap5"]
    assert plans == [NsPlan("tap5"), NsPlan("tap5", mac=b"\2" * 6)]  # which was the kernel's choice
    assert made.problems == ["problem 2"]
    assert made.netlink is not None
    made.netlink.close()
    os.close(made.device.fd)


@pytest.mark.usefixtures("inside")
def test_tap_that_cannot_be_configured_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(nl: object, plan: NsPlan) -> None:
        raise StepError(errno.EPERM, "Couldn't do this: Operation not permitted")

    monkeypatch.setattr(netlink, "configure", fail)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(Fatal, match=r"^Couldn't do this: Operation not permitted$"):
        create_tap(Target(9, None), NsPlan("tap5"))
    assert len(os.listdir("/proc/self/fd")) == before - 1


def test_namespace_that_may_not_be_entered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, function: object) -> None:
        raise netns.NoEntry(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(netns, "run_in", refuse)
    with pytest.raises(Fatal, match="Couldn't enter the network namespace: Operation not permitted"):
        create_tap(Target(9, None), NsPlan("tap5"))


# Spawning -----------------------------------------------------------------------------------------------------------


def test_helper_that_dies_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pasta, "_helper", lambda *_: os._exit(3))
    monkeypatch.setattr(pasta, "prctl", lambda *_: None)
    command = Command("true", ("true",), Inherited())
    with pytest.raises(Fatal, match="Failed to create namespaces: the helper process died"):
        pasta.spawn(command, Identity(os.geteuid(), os.getegid()), None, False)


def test_helper_reports_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "unshare: No space left on device")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    monkeypatch.setattr(namespace_init, "helper", fail)
    pid = os.fork()
    if pid == 0:
        command, identity = Command("true", ("true",), Inherited()), Identity(os.geteuid(), os.getegid())
        pasta._helper(command, identity, None, True, theirs, -1)
    theirs.close()
    text = ours.recv(4096).decode()
    ours.close()
    os.waitpid(pid, 0)
    assert text.startswith("Couldn't create namespaces: No space left on device (user namespaces are forbidden")
