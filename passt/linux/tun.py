"""The tap device: created in the network namespace of the calling thread, with every offload that the kernel gives.

`IFF_VNET_HDR` puts a 10-byte virtio-net header before each frame. With it the kernel hands us frames whose checksums
are not computed yet and whose payload is up to 64 KiB at any MTU, and takes such frames from us. TUNSETOFFLOAD says
what we are ready to *receive*; the namespace sees it as the features of its interface (`ethtool -k`):

    flag          meaning for us                                           kernel
    ------------  -------------------------------------------------------  ------
    TUN_F_CSUM    frames with partial checksums                            2.6.27
    TUN_F_TSO4/6  TCP super-frames                                         2.6.27
    TUN_F_USO4/6  UDP super-frames, each a run of equal-sized datagrams    6.2

The device lives as long as its descriptor: it vanishes with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

from .. import log
from .syscall import ioctl_number

TUN_DEVICE = "/dev/net/tun"
IFNAMSIZ = 16
VNET_HDR_LEN = 10

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
_TSO = TUN_F_TSO4 | TUN_F_TSO6
_USO = TUN_F_USO4 | TUN_F_USO6

# What is asked for, best first.
OFFLOAD_SETS = (
    ("checksum, TSO and USO", TUN_F_CSUM | _TSO | _USO),
    ("checksum and TSO", TUN_F_CSUM | _TSO),
    ("checksum", TUN_F_CSUM),
    ("no", 0),
)


TUNSETIFF = ioctl_number("T", 202, 4)
TUNSETOFFLOAD = ioctl_number("T", 208, 4)
TUNSETVNETHDRSZ = ioctl_number("T", 216, 4)

_IFREQ = Struct("=16sH22x")
_INT = Struct("=i")


@dataclass(frozen=True, slots=True)
class Tap:
    """An open tap device and what it may hand us."""

    fd: int
    ifname: str
    csum: bool
    tso: bool
    uso: bool


def open_tap(ifname: str) -> Tap:
    """Create `ifname` in the network namespace of the calling thread. Raises OSError naming the step that failed."""
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise OSError(e.errno, f"Failed to open {TUN_DEVICE}: {e.strerror}{_hint(e.errno)}") from None
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(ifname.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, _INT.pack(VNET_HDR_LEN))
        offloads = _set_offloads(lambda flags: fcntl.ioctl(fd, TUNSETOFFLOAD, flags))
    except OSError as e:
        os.close(fd)
        in_use = ": the name is taken there, choose another with -I" if e.errno in (errno.EBUSY, errno.EEXIST) else ""
        raise OSError(e.errno, f"Failed to create tap device {ifname}: {e.strerror}{in_use}") from None
    return Tap(fd, ifname, bool(offloads & TUN_F_CSUM), bool(offloads & _TSO), bool(offloads & _USO))


def _hint(e: int | None) -> str:
    if e in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return " (load the tun module, or give the container this device)"
    if e in (errno.EACCES, errno.EPERM):
        return " (its mode should be 0666: chmod 0666 /dev/net/tun as root, or allow the device in the container)"
    return ""


def _set_offloads(tunsetoffload: Callable[[int], object]) -> int:
    """Ask for the sets of offloads, best first; returns the flags of the first that the kernel takes."""
    for name, flags in OFFLOAD_SETS:
        try:
            tunsetoffload(flags)
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
            log.debug(f"Tap device: {name} offload refused by the kernel")
            continue
        log.debug(f"Tap device: {name} offload")
        return flags
    raise OSError(errno.EINVAL, "TUNSETOFFLOAD: not even an empty set of offloads is accepted")
