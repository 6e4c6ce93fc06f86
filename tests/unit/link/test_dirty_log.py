"""The log of written pages: every page that was written has its bit, and no page outside of the known memory."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.drops import Drop
from passt.link import vhost_control as device
from passt.link.dirty_log import GROUP, DirtyLog
from passt.link.guest_memory import GuestMemory
from passt.wire import vhost
from passt.wire.vhost import Invalid, LogArea, Region

from ...front_end import BASE, RECEIVE, SEND_AREA, SIZE, TRANSMIT
from .vhost_desk import PLAIN, Desk, super_frame, tcp_frame

PAGE = 4096
LOG_SIZE = BASE + SIZE >> 15


def bits(data: bytes | mmap.mmap) -> set[int]:
    """The pages that are marked."""
    return {8 * i + bit for i, byte in enumerate(data[:]) if byte for bit in range(8) if byte >> bit & 1}


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create("log", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    yield fd
    os.close(fd)


REGIONS = st.lists(st.integers(0, 40), min_size=2, max_size=6, unique=True).map(sorted)


@given(REGIONS, st.integers(0, 40 * PAGE), st.integers(0, 12 * PAGE))
def test_what_was_written_is_marked(edges: list[int], address: int, length: int) -> None:
    fd = os.memfd_create("log")
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        log = DirtyLog(LogArea(64, 32), fd)
        runs = list(zip(edges[::2], edges[1::2], strict=False))
        regions = [Region(first * PAGE, (end - first) * PAGE, 0, 0) for first, end in runs]
        log.use(GuestMemory([(region, memoryview(b"")) for region in regions]))
        log.mark(address, length)
        marked = bits(os.pread(fd, mmap.PAGESIZE, 32))
    finally:
        os.close(fd)
    written = set(range(address // PAGE, (address + length - 1) // PAGE + 1)) if length else set()
    assert written <= marked
    memory = {page for first, end in runs for page in range(first, end)}
    groups = {page // 8 for page in written}
    assert {page // 8 for page in marked} == groups
    assert marked - written <= memory, "a page that is no memory, and was not written"


def test_bits_of_others_stay(file: int) -> None:
    """A byte that is stored is never less than what it was."""
    os.pwrite(file, b"\x81\x01", 0)
    log = DirtyLog(LogArea(16, 0), file)
    log.use(GuestMemory([(Region(0, GROUP + PAGE, 0, 0), memoryview(b""))]))
    log.mark(0, 1)
    log.mark(GROUP + 2 * PAGE, 1)
    assert os.pread(file, 2, 0) == b"\xff\x05"


def test_a_log_that_is_too_small(file: int) -> None:
    with pytest.raises(Invalid, match="a log up to 0x2001 of a file of 0x2000 bytes"):
        DirtyLog(LogArea(2 * mmap.PAGESIZE, 1), file)
    log = DirtyLog(LogArea(1, 0), file)
    log.mark(GROUP - 1, 1)
    with pytest.raises(OSError, match="without a bit for 0x8000") as caught:
        log.mark(GROUP - 1, 2)
    assert caught.value.errno == errno.EFAULT


def test_a_log_cannot_be_shortened(file: int) -> None:
    DirtyLog(LogArea(16, 0), file)
    with pytest.raises(PermissionError):
        os.ftruncate(file, 1)


def pages(address: int, length: int) -> set[int]:
    """Those of an address of the machine."""
    return set(range(address >> 12, (address + length - 1 >> 12) + 1))


def start_log(desk: Desk, *, size: int = LOG_SIZE, rings: bool = True) -> mmap.mmap:
    """The log of the machine, which runs."""
    desk.machine.tell_log(size)
    desk.run()
    return desk.machine.log(rings=rings)


def test_buffers_and_rings_of_a_machine_are_logged(desk: Desk) -> None:
    machine = desk.machine
    log = start_log(desk)
    desk.run()
    log[:] = bytes(len(log))
    desk.link.send_frame(tcp_frame(6000))
    desk.run()
    (_, length), (_, second) = machine.rings[RECEIVE].used()
    wanted = pages(BASE + machine._buffer_at(0), length) | pages(BASE + machine._buffer_at(1), second)
    ring = machine.rings[RECEIVE]
    assert wanted | pages(BASE + ring.used_at, 6 + 8 * ring.num) <= bits(log)
    others = {page // 8 for page in pages(BASE + machine.rings[TRANSMIT].used_at, 100)}
    log[:] = bytes(len(log))
    machine.send(tcp_frame(100))
    assert desk.frames() == [tcp_frame(100)]
    assert {page // 8 for page in bits(log)} == others, "frames of the machine are not written to"
    log.close()


def test_without_the_flag_a_ring_is_not_logged_and_without_the_feature_nothing_is(desk: Desk) -> None:
    machine = desk.machine
    log = start_log(desk, rings=False)
    desk.run()
    desk.link.send_frame(tcp_frame(1))
    desk.run()
    assert {page // 8 for page in bits(log)} == {page // 8 for page in pages(BASE + machine._buffer_at(0), 1)}
    machine.tell(vhost.SET_FEATURES, vhost.emit_u64(machine.features))
    desk.run()
    log[:] = bytes(len(log))
    desk.link.send_frame(tcp_frame(1))
    desk.run()
    assert not bits(log)
    assert len(machine.receive()) == 2
    log.close()


def test_super_frames_over_many_buffers(desk: Desk) -> None:
    machine = desk.machine
    log = start_log(desk)
    desk.run()
    log[:] = bytes(len(log))
    hdr, payload = super_frame(60000, 1400)
    desk.link.send_payload((hdr, payload))
    desk.run()
    wanted = set()
    for head, length in machine.rings[RECEIVE].used():
        wanted |= pages(BASE + machine._buffer_at(head), length)
    assert len(wanted) > 10
    assert wanted <= bits(log)
    log.close()


def test_a_log_without_room_breaks_the_ring(desk: Desk) -> None:
    log = start_log(desk, size=mmap.PAGESIZE)
    desk.run()
    desk.link.send_frame(tcp_frame(1))
    desk.run()
    assert desk.drops[Drop.VRING_BROKEN] >= 1
    assert not desk.gone
    log.close()


def test_an_eventfd_tells_of_new_bits(desk: Desk) -> None:
    machine = desk.machine
    log = start_log(desk)
    told = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    machine.tell(vhost.SET_LOG_FD, b"", [told])
    desk.run()
    machine.tell_log(LOG_SIZE)  # another log keeps it
    desk.run()
    machine.log().close()
    desk.run()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(told) and os.eventfd_read(told)
    desk.link.send_frame(tcp_frame(1))
    desk.run()
    assert os.eventfd_read(told)
    os.close(told)
    log.close()


def test_an_eventfd_without_a_log_ends_the_connection() -> None:
    desk = Desk(PLAIN)
    told = os.eventfd(0)
    desk.machine.tell(vhost.SET_LOG_FD, b"", [told])
    desk.run()
    assert desk.gone == [
        "The vhost-user connection failed: a descriptor for the log that is no eventfd, or that comes before the log"
    ]
    os.close(told)
    desk.close()


def test_a_log_needs_one_descriptor(desk: Desk) -> None:
    desk.machine.tell(vhost.SET_LOG_BASE, LogArea(1, 0).emit())
    desk.run()
    assert desk.gone == ["The vhost-user connection failed: a log with 0 descriptors"]


def test_offered() -> None:
    assert device.FEATURES & device.F_LOG_ALL
    assert device.PROTOCOL_FEATURES & vhost.P_LOG_SHMFD
    assert SEND_AREA < SIZE
