"""The tap device: created in the network namespace of the calling thread, with all offloads that the kernel has.

`IFF_VNET_HDR` puts a 10-byte virtio-net header before each frame. With it, frames in both directions may have partial
checksums and up to 64 KiB of payload at any MTU. TUNSETOFFLOAD declares the offloads that we can *receive*; the
namespace sees them as the features of its interface (`ethtool -k`):

    flag          meaning for us                                           kernel
    ------------  -------------------------------------------------------  ------
    TUN_F_CSUM    frames with partial checksums                            2.6.27
    TUN_F_TSO4/6  TCP super-frames                                         2.6.27
    TUN_F_USO4/6  UDP super-frames, each a batch of equal-sized datagrams  6.2

The device exists as long as its descriptor: it vanishes with the process. An inherited descriptor of a device that
another program created may lack the vnet header, and with it all offloads.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from struct import Struct

from .. import PASTA, log
from ..calls import one_of
from ..lean.records import dataclass
from ..log import StepError
from ..wire.virtio import VNET_LEN
from .syscall import ioctl_number

TUN_DEVICE = "/dev/net/tun"
IFNAMSIZ = 16

IFF_TAP = 0x0002
IFF_NO_PI = 0x1000
IFF_VNET_HDR = 0x4000

TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x20, 0x40
_TSO = TUN_F_TSO4 | TUN_F_TSO6
_USO = TUN_F_USO4 | TUN_F_USO6

# Sets of offloads to request, best first
OFFLOAD_SETS = (
    ("checksum, TSO and USO", TUN_F_CSUM | _TSO | _USO),
    ("checksum and TSO", TUN_F_CSUM | _TSO),
    ("checksum", TUN_F_CSUM),
    ("no", 0),
)


TUNSETIFF = ioctl_number("T", 202, 4)
TUNSETOFFLOAD = ioctl_number("T", 208, 4)
TUNSETVNETHDRSZ = ioctl_number("T", 216, 4)
TUNSETCARRIER = ioctl_number("T", 226, 4)
TUNGETIFF = ioctl_number("T", 210, read_size=4)
SIOCGIFHWADDR = 0x8927

_IFREQ = Struct("=16sH22x")
_INT = Struct("=i")

CALLS = one_of("ioctl", 1, TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNSETCARRIER, mode=PASTA)


@dataclass(frozen=True, slots=True)
class Tap:
    """An open tap device and its offloads. Without `vnet`, frames have no vnet header and no offloads."""

    fd: int
    ifname: str
    csum: bool
    tso: bool
    uso: bool
    vnet: bool = True


def set_carrier(fd: int, *, on: bool) -> None:
    """Plug the cable of the tap device `fd` in, or pull it out: Linux 5.0. Raises OSError."""
    fcntl.ioctl(fd, TUNSETCARRIER, _INT.pack(on))


def open_tap(ifname: str) -> Tap:
    """Create `ifname` in the network namespace of the calling thread. Raises StepError."""
    try:
        fd = os.open(TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise StepError(e.errno, f"Failed to open {TUN_DEVICE}: {e.strerror}{_hint(e.errno)}") from None
    try:
        return attach(fd, ifname)
    except OSError:
        os.close(fd)
        raise


def attach(fd: int, ifname: str) -> Tap:
    """Create `ifname` in the namespace in which `fd` was opened, and attach `fd` to it. Raises StepError.

    This can be repeated after a deletion of the interface, from any namespace.
    """
    try:
        fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(ifname.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        return _with_offloads(fd, ifname)
    except OSError as e:
        in_use = ": the name is taken there, choose another with -I" if e.errno in (errno.EBUSY, errno.EEXIST) else ""
        raise StepError(e.errno, f"Failed to create tap device {ifname}: {e.strerror}{in_use}") from None


def inherited_tap(fd: int) -> tuple[Tap, bytes]:
    """The inherited tap device `fd`, and its MAC address. Raises OSError with the reason if it cannot be used.

    Its configuration stays, except the size of the vnet header and the offloads, which belong to the descriptor. It
    must have been created with IFF_NO_PI: that cannot be checked, since IFF_NOFILTER is reported in its place.
    """
    try:
        name, flags = _IFREQ.unpack(fcntl.ioctl(fd, TUNGETIFF, bytes(_IFREQ.size)))
        mac = fcntl.ioctl(fd, SIOCGIFHWADDR, bytes(_IFREQ.size))[18:24]
    except OSError as e:
        reasons = {
            errno.ENOTTY: "it is not a tap device",
            errno.EBADFD: f"{TUN_DEVICE} is open, but has no interface: make one with TUNSETIFF",
        }
        raise OSError(e.errno, reasons.get(e.errno or 0, e.strerror)) from None
    if not flags & IFF_TAP:
        raise OSError(errno.EINVAL, "a tun device has no Ethernet frames: make it with IFF_TAP")
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)
    ifname = name.rstrip(b"\0").decode()
    if not flags & IFF_VNET_HDR:
        return Tap(fd, ifname, csum=False, tso=False, uso=False, vnet=False), mac
    return _with_offloads(fd, ifname), mac


def _with_offloads(fd: int, ifname: str) -> Tap:
    fcntl.ioctl(fd, TUNSETVNETHDRSZ, _INT.pack(VNET_LEN))
    offloads = _set_offloads(lambda flags: fcntl.ioctl(fd, TUNSETOFFLOAD, flags))
    return Tap(fd, ifname, bool(offloads & TUN_F_CSUM), bool(offloads & _TSO), bool(offloads & _USO))


def _hint(e: int | None) -> str:
    if e in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return " (load the tun module, or give the container this device)"
    if e in (errno.EACCES, errno.EPERM):
        return " (its mode should be 0666: chmod 0666 /dev/net/tun as root, or allow the device in the container)"
    return ""


def _set_offloads(tunsetoffload: Callable[[int], object]) -> int:
    """Request sets of offloads, best first; returns the flags of the first that the kernel accepts."""
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
