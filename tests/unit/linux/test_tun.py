"""The tap device: what is asked of the kernel, each offload it may refuse, each way to fail."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from passt.linux import tun
from passt.linux.tun import (
    SIOCGIFHWADDR,
    TUNGETIFF,
    TUNSETIFF,
    TUNSETOFFLOAD,
    TUNSETVNETHDRSZ,
    Tap,
    inherited_tap,
    open_tap,
    set_carrier,
)

ALL, TSO, CSUM = 0x67, 0x07, 0x01


class Kernel:
    """Answers ioctls; takes offloads that are within `knows`."""

    def __init__(self, knows: int = ALL, **errors: int) -> None:
        self.knows = knows
        self.errors = errors
        self.calls: list[tuple[int, Any]] = []

    def ioctl(self, fd: int, request: int, argument: Any) -> int:
        self.calls.append((request, argument))
        names = {TUNSETIFF: "ifreq", TUNSETVNETHDRSZ: "size", TUNSETOFFLOAD: "offload"}
        if (number := self.errors.get(names[request])) is not None:
            raise OSError(number, os.strerror(number))
        if request == TUNSETOFFLOAD and argument & ~self.knows:
            raise OSError(errno.EINVAL, "Invalid argument")
        return 0


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in place of /dev/net/tun."""
    path = tmp_path / "tun"
    path.touch()
    monkeypatch.setattr(tun, "TUN_DEVICE", str(path))
    return path


def opened(monkeypatch: pytest.MonkeyPatch, kernel: Kernel, name: str = "tap0") -> Tap:
    monkeypatch.setattr(fcntl, "ioctl", kernel.ioctl)
    tap = open_tap(name)
    assert not os.get_blocking(tap.fd)
    assert not os.get_inheritable(tap.fd)
    os.close(tap.fd)
    return tap


@pytest.mark.usefixtures("device")
def test_everything_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel()
    tap = opened(monkeypatch, kernel, "fifteen-letters")
    assert (tap.ifname, tap.csum, tap.tso, tap.uso) == ("fifteen-letters", True, True, True)
    assert kernel.calls == [
        (TUNSETIFF, b"fifteen-letters\0" + struct.pack("=H", 0x5002) + bytes(22)),  # TAP, NO_PI, VNET_HDR
        (TUNSETVNETHDRSZ, struct.pack("=i", 10)),
        (TUNSETOFFLOAD, ALL),
    ]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("knows", "csum", "tso", "uso", "tries"),
    [(TSO, True, True, False, 2), (CSUM, True, False, False, 3), (0, False, False, False, 4)],
)
def test_older_kernels_know_less(
    monkeypatch: pytest.MonkeyPatch, knows: int, csum: bool, tso: bool, uso: bool, tries: int
) -> None:
    kernel = Kernel(knows)
    tap = opened(monkeypatch, kernel)
    assert (tap.csum, tap.tso, tap.uso) == (csum, tso, uso)
    assert [a for request, a in kernel.calls if request == TUNSETOFFLOAD] == [ALL, TSO, CSUM, 0][:tries]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(
    ("errors", "text"),
    [
        ({"ifreq": errno.EBUSY}, "Failed to create tap device tap0: Device or resource busy: the name is taken"),
        ({"ifreq": errno.EPERM}, "Failed to create tap device tap0: Operation not permitted"),
        ({"size": errno.EINVAL}, "Failed to create tap device tap0: Invalid argument"),
        ({"offload": errno.EPERM}, "Failed to create tap device tap0: Operation not permitted"),
        ({"offload": errno.EINVAL}, "not even an empty set of offloads is accepted"),
    ],
)
def test_failures_name_the_step_and_close_the_device(
    monkeypatch: pytest.MonkeyPatch, errors: dict[str, int], text: str
) -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Failed") as e:
        opened(monkeypatch, Kernel(**errors))
    assert text in str(e.value.strerror)
    assert os.listdir("/proc/self/fd") == before


def test_carrier(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, bytes]] = []
    monkeypatch.setattr(fcntl, "ioctl", lambda *args: calls.append(args))
    set_carrier(9, on=False)
    set_carrier(9, on=True)
    assert calls == [(9, 0x400454E2, struct.pack("=i", 0)), (9, 0x400454E2, struct.pack("=i", 1))]


def test_no_device(device: Path) -> None:
    device.unlink()
    with pytest.raises(OSError, match="Failed to open") as e:
        open_tap("tap0")
    assert e.value.strerror == f"Failed to open {device}: No such file or directory {tun._hint(errno.ENOENT).strip()}"


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOENT, "load the tun module"),
        (errno.ENODEV, "load the tun module"),
        (errno.EACCES, "chmod 0666"),
        (errno.EMFILE, ""),
    ],
)
def test_hints(number: int, hint: str) -> None:
    assert hint in tun._hint(number)
    assert bool(hint) == bool(tun._hint(number))


# Inherited ---------------------------------------------------------------------------------------------------------

MAC = bytes.fromhex("0211223344aa")
IFF_TUN, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0001, 0x0002, 0x1000, 0x4000, 0x0100


class Device(Kernel):
    """An open device with flags, or none (0)."""

    def __init__(self, flags: int, knows: int = ALL) -> None:
        super().__init__(knows)
        self.flags = flags

    def ioctl(self, fd: int, request: int, argument: Any) -> Any:
        if request == TUNGETIFF:
            if not self.flags:
                raise OSError(errno.EBADFD, "File descriptor in bad state")
            return b"tap7".ljust(16, b"\0") + struct.pack("=H", self.flags) + bytes(22)
        if request == SIOCGIFHWADDR:
            return b"tap7".ljust(16, b"\0") + struct.pack("=H", 1) + MAC + bytes(16)
        return super().ioctl(fd, request, argument)


@pytest.fixture
def fd() -> Iterator[int]:
    number = os.open("/dev/null", os.O_RDWR)
    os.set_inheritable(number, True)
    yield number
    os.close(number)


@pytest.mark.parametrize("more", [0, IFF_MULTI_QUEUE])
def test_inherited_device(monkeypatch: pytest.MonkeyPatch, fd: int, more: int) -> None:
    device = Device(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | more, TSO)
    monkeypatch.setattr(fcntl, "ioctl", device.ioctl)
    assert inherited_tap(fd) == (Tap(fd, "tap7", csum=True, tso=True, uso=False), MAC)
    assert device.calls[0] == (TUNSETVNETHDRSZ, struct.pack("=i", 10))
    assert not os.get_inheritable(fd)
    assert not os.get_blocking(fd)


def test_inherited_device_without_header(monkeypatch: pytest.MonkeyPatch, fd: int) -> None:
    device = Device(IFF_TAP | IFF_NO_PI)
    monkeypatch.setattr(fcntl, "ioctl", device.ioctl)
    assert inherited_tap(fd) == (Tap(fd, "tap7", csum=False, tso=False, uso=False, vnet=False), MAC)
    assert device.calls == []


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (IFF_TUN | IFF_NO_PI, "a tun device has no Ethernet frames: make it with IFF_TAP"),
        (0, "/dev/net/tun is open, but has no interface: make one with TUNSETIFF"),
    ],
)
def test_inherited_device_that_is_of_no_use(monkeypatch: pytest.MonkeyPatch, fd: int, flags: int, why: str) -> None:
    monkeypatch.setattr(fcntl, "ioctl", Device(flags).ioctl)
    with pytest.raises(OSError, match=re.escape(why)):
        inherited_tap(fd)


def test_inherited_descriptor_of_something_else(fd: int) -> None:
    with pytest.raises(OSError, match="it is not a tap device"):
        inherited_tap(fd)
