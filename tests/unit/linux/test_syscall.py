"""System calls by ctypes: they work, and they raise OSError with the errno."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from passt.linux.syscall import (
    CLONE_NEWNET,
    PR_SET_DUMPABLE,
    ioctl_number,
    mount,
    prctl,
    setns,
    timerfd_create,
    timerfd_settime,
    unshare,
)


def test_timer_fires_at_its_deadline_and_not_when_disarmed() -> None:
    fd = timerfd_create()
    try:
        timerfd_settime(fd, time.monotonic() - 1)
        assert select.select([fd], [], [], 10)[0] == [fd]
        assert int.from_bytes(os.read(fd, 8), sys.byteorder) == 1
        timerfd_settime(fd, time.monotonic() + 1000)
        timerfd_settime(fd, 0)
        assert select.select([fd], [], [], 0)[0] == []
        assert not os.get_blocking(fd)
        assert not os.get_inheritable(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("machine", "plain", "write"),
    [
        ("x86_64", 0xB703, 0x400454CA),
        ("aarch64", 0xB703, 0x400454CA),
        ("ppc64le", 0x2000B703, 0x800454CA),
        ("mips64", 0x2000B703, 0x800454CA),
    ],
)
def test_ioctl_numbers(monkeypatch: pytest.MonkeyPatch, machine: str, plain: int, write: int) -> None:
    names = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((*names[:4], machine)))
    assert ioctl_number("\xb7", 3) == plain
    assert ioctl_number("T", 202, 4) == write


def test_errors_carry_the_errno() -> None:
    with open("/dev/null") as f:
        with pytest.raises(OSError, match="Invalid argument") as e:
            setns(f.fileno(), CLONE_NEWNET)
        assert e.value.errno == errno.EINVAL
    for call in (
        lambda: unshare(0x1),
        lambda: prctl(0x7FFFFFFF, 0),
        lambda: mount("none", "/no/such/directory", "tmpfs", 0),
    ):
        with pytest.raises(OSError, match=r".") as e:
            call()
        assert e.value.errno in (errno.EINVAL, errno.ENOENT, errno.EPERM)


def test_prctl_sets() -> None:
    prctl(PR_SET_DUMPABLE, 1)
    assert os.stat("/proc/self/status").st_uid == os.geteuid()


def test_capabilities_that_are_not_permitted_are_no_error() -> None:
    """In a process of its own: there is no way back."""
    code = (
        "from passt.linux.syscall import set_capabilities\n"
        "for kept in ((21, 40), (21, 10), ()):\n"
        "    set_capabilities(*kept)\n"
        "    print([int(l.split()[1], 16) for l in open('/proc/self/status') if l[:6] in ('CapPrm', 'CapEff')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    status = Path("/proc/self/status").read_text().splitlines()
    ours = next(int(line.split()[1], 16) for line in status if line.startswith("CapPrm"))
    left = [ours & bits for bits in (1 << 21 | 1 << 40, 1 << 21, 0)]
    assert done.stdout == "".join(f"{[bits, bits]}\n" for bits in left), done.stderr
