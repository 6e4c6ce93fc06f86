"""The memory of a machine: look-ups stay in its regions, and files keep their size."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.link.guest_memory import BadRing, GuestMemory, mapped
from passt.wire.vhost import Invalid, Region

PAGE = mmap.PAGESIZE


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 4 * PAGE)
    yield fd
    os.close(fd)


def two_regions() -> tuple[GuestMemory, bytearray]:
    """Neighbours in the machine, in other order in the file, and a gap of the front end between them."""
    content = bytearray(os.urandom(300))
    view = memoryview(content)
    low, high = Region(1000, 100, 9000, 200), Region(1100, 150, 50_000, 20)
    return GuestMemory([(low, view), (high, view)]), content


@given(st.integers(900, 1300), st.integers(0, 400))
def test_a_buffer_is_found_or_refused(address: int, length: int) -> None:
    memory, content = two_regions()
    truth = bytes(content[200:300] + content[20:170])
    start = address - 1000
    if length and not (start >= 0 and start + length <= len(truth)):
        with pytest.raises(BadRing):
            memory.table(address, length)
    else:
        assert memory.table(address, length) == truth[start : start + length] if length else True


def test_a_buffer_in_one_region_is_one_view() -> None:
    memory, _ = two_regions()
    out: list[memoryview] = []
    memory.append(out, 1000, 100)
    memory.append(out, 1050, 100)
    assert [len(view) for view in out] == [100, 50, 50]


@pytest.mark.parametrize(("address", "length", "found"), [(9000, 100, True), (9001, 100, False), (8999, 1, False)])
def test_parts_of_rings_lie_in_one_region(address: int, length: int, *, found: bool) -> None:
    memory, content = two_regions()
    if found:
        assert memory.of_front_end(address, length, 4) == content[200:300]
    else:
        with pytest.raises(Invalid):
            memory.of_front_end(address, length, 1)


def test_parts_of_rings_are_aligned() -> None:
    memory, _ = two_regions()
    with pytest.raises(Invalid, match="a multiple of 16"):
        memory.of_front_end(9000, 16, 16)


def test_a_region_is_shared_with_the_file(file: int) -> None:
    _, view = mapped(Region(0, PAGE, 0, PAGE), file)
    view[PAGE] = 7
    assert os.pread(file, 1, PAGE) == b"\7"


def test_a_region_beyond_its_file_is_refused(file: int) -> None:
    with pytest.raises(Invalid, match="of a file of"):
        mapped(Region(0, 4 * PAGE, 0, 1), file)


def test_a_file_that_can_be_sealed_keeps_its_size(file: int) -> None:
    mapped(Region(0, PAGE, 0, 0), file)
    with pytest.raises(PermissionError):
        os.ftruncate(file, PAGE)
    os.ftruncate(file, 8 * PAGE)  # memory may be added
    mapped(Region(0, PAGE, 0, 0), file)


def test_a_file_without_seals_is_mapped_as_it_is(tmp_path: object) -> None:
    for flags in (0,):
        fd = os.memfd_create("memory", flags)
        os.ftruncate(fd, PAGE)
        mapped(Region(0, PAGE, 0, 0), fd)
        os.close(fd)
    path = os.path.join(str(tmp_path), "memory")
    with open(path, "w+b") as file:
        file.truncate(PAGE)
        mapped(Region(0, PAGE, 0, 0), file.fileno())
