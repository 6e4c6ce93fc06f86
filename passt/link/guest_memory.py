"""The memory of a machine, as its front end shares it: files that are mapped, and addresses that are looked up in them.

    address of the machine  -> view              descriptors of a ring name buffers so
    address of the front end -> view             SET_VRING_ADDR names the parts of a ring so

Everything in this memory is hostile, and may change while it is read: a value is copied once, the copy is checked, and
the copy is used. An address is checked against the regions at each look-up, so that no view reaches beyond them.

A region is a file of which the front end has a descriptor, too. If it shortened the file, an access behind its new end
would be SIGBUS, the end of this process. So the file is sealed against that (F_SEAL_SHRINK) where it can be sealed,
which every memfd of QEMU can. A file in the file system (hugetlbfs, memory-backend-file) cannot.

The whole file up to the region's end is mapped, since an offset would have to be a multiple of its page size, which
is not known for huge pages.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

from .. import PASST
from ..calls import calls, one_of
from ..wire.vhost import Invalid, Region

_CAN_SEAL = fcntl.F_SEAL_SEAL  # without this one, seals can be added
SLOTS_MAX = 64  # regions that a front end may add one by one

CALLS = (
    *calls("fstat", "newfstatat", mode=PASST),  # mmap of Python looks at the size of the file
    *one_of("fcntl", 1, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GET_SEALS, fcntl.F_ADD_SEALS, mode=PASST),
)


_NOWHERE = (0, 0, 0, memoryview(b""))


class BadRing(Exception):
    """A ring that breaks the rules of virtio; the text says which."""


class GuestMemory:
    """The regions of a machine. An instance does not change: another table makes another one."""

    def __init__(self, mapped: Sequence[tuple[Region, memoryview]] = ()) -> None:
        self.mapped = tuple(mapped)
        # (first address, address behind, what makes an address an index of the view, view)
        self._guest = [(r.guest, r.guest + r.size, r.offset - r.guest, view) for r, view in mapped]

    @property
    def regions(self) -> list[Region]:
        """The regions alone."""
        return [region for region, _ in self.mapped]

    def append(self, out: list[memoryview], address: int, length: int) -> None:
        """Add views of a buffer of the machine to `out`: one, or one for each region it lies in. Raises BadRing."""
        end = address + length
        for first, behind, shift, view in self._guest:
            if first <= address and end <= behind:
                out.append(view[address + shift : end + shift])
                return
        self._append_parts(out, address, length)

    def region_of(self, address: int) -> tuple[int, int, int, memoryview]:
        """The region of an address of the machine: first address, address behind, what makes an address an index of the
        view, and the view; an empty region if there is none.
        """
        for region in self._guest:
            if region[0] <= address < region[1]:
                return region
        return _NOWHERE

    def _append_parts(self, out: list[memoryview], address: int, length: int) -> None:
        """The same for a buffer that no region has whole."""
        while length:
            for first, behind, shift, view in self._guest:
                if first <= address < behind:
                    end = min(address + length, behind)
                    out.append(view[address + shift : end + shift])
                    length -= end - address
                    address = end
                    break
            else:
                raise BadRing(f"no memory at {address:#x}")

    def table(self, address: int, length: int) -> bytes:
        """A copy of `length` bytes at an address of the machine. Raises BadRing."""
        parts: list[memoryview] = []
        self.append(parts, address, length)
        return b"".join(parts)

    def of_front_end(self, address: int, length: int, alignment: int) -> memoryview:
        """A view of `length` bytes at an address of the front end. Raises Invalid."""
        if address % alignment:
            raise Invalid(f"a part of a ring at {address:#x} (a multiple of {alignment} is needed)")
        for region, view in self.mapped:
            if region.user <= address and address + length <= region.user + region.size:
                at = address - region.user + region.offset
                return view[at : at + length]
        raise Invalid(f"a part of a ring at {address:#x}, where no memory is")


def mapped(region: Region, fd: int) -> tuple[Region, memoryview]:
    """Map a region of the file at `fd`, which stays the caller's. Raises Invalid or OSError."""
    end = region.offset + region.size
    if end > (size := os.fstat(fd).st_size):
        raise Invalid(f"a memory region up to {end:#x} of a file of {size:#x} bytes")
    keep_size(fd)
    return region, memoryview(mmap.mmap(fd, end, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE))


def keep_size(fd: int) -> None:
    """Seal the file against being shortened, where that is possible. Raises OSError."""
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return  # EINVAL: a file system without seals
    if not seals & (fcntl.F_SEAL_SHRINK | _CAN_SEAL):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
