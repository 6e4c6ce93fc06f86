"""The service of the host's neighbours, with a table whose contents are scripted."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from typing import Any, cast

import pytest

from passt import log
from passt.addr import packed
from passt.daemon.lan import ANNOUNCED, ASK_AGAIN, PAUSE, LanNeighbours
from passt.flow.table import Flow
from passt.linux.routes import Link
from passt.linux.rtnl_messages import Neighbour
from passt.loop.reactor import EPOLLIN
from passt.policy.config import MTU_MIN
from tests.unit.support import GATEWAY4, GUEST4, IP4, OUR_MAC, T0, elapse, make_context, reactor, reconfigure, timers

FD = 78
NEIGHBOUR, NEIGHBOUR6 = packed("192.0.2.77"), packed("fe80::77")
MAC, OTHER = bytes.fromhex("525400000077"), bytes.fromhex("525400000078")
ETH0, WLAN0 = Link(3, "eth0", MAC, 1500), Link(4, "wlan0", MAC, 1500)


class Table:
    """A table whose readings are scripted; an exception is raised."""

    fd = FD

    def __init__(self) -> None:
        self.asked: list[list[tuple[int, int]]] = []
        self.arriving: list[list[Neighbour] | OSError] = []
        self.asking = self.more = False
        self.refuses = False

    def ask(self, tables: list[tuple[int, int]]) -> None:
        self.asked.append(tables)
        if self.refuses:
            raise OSError(errno.ENOBUFS, "No buffer space available")

    def read(self) -> list[Neighbour]:
        found = self.arriving.pop(0)
        if isinstance(found, OSError):
            raise found
        return found


class Header(Flow):
    """A flow that notes the peer's MAC addresses."""

    __slots__ = ("macs",)

    def __init__(self, peer: bytes) -> None:
        super().__init__(GUEST4 + peer + bytes(4))
        self.macs: list[bytes] = []

    def set_macs(self, guest: bytes, peer: bytes) -> None:
        self.macs.append(peer)


class Lab:
    """The service, what it says, and what the guest is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **config: Any) -> None:
        self.lines: list[str] = []
        monkeypatch.setattr(log, "_held", {})
        monkeypatch.setattr(log, "say", lambda level, text: self.lines.append(text))
        self.ctx = make_context(**config)
        self.announced: list[bytes] = []
        self.ctx.services.announce4 = self.ctx.services.announce6 = self._announce
        self.table = Table()
        self.service = LanNeighbours(self.ctx, cast(Any, self.table))
        self.service.follow(ETH0, ETH0, T0)
        self.flow = Header(NEIGHBOUR)
        self.ctx.flows.insert(self.flow)

    def _announce(self, a: bytes) -> None:
        self.announced.append(a)
        self.ctx.lan.tell(a)

    def arrive(self, *found: Neighbour | OSError, now: float = T0) -> None:
        """One reading finds these."""
        self.wait(*found)
        reactor(self.ctx).fire(FD, EPOLLIN, now)
        elapse(self.ctx, now, 0.01)

    def wait(self, *found: Neighbour | OSError) -> None:
        """The next reading is going to find these."""
        error = next((e for e in found if isinstance(e, OSError)), None)
        self.table.arriving.append(error or [n for n in found if isinstance(n, Neighbour)])

    @property
    def watching(self) -> bool:
        return FD in reactor(self.ctx).refs


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Lab:
    return Lab(monkeypatch)


def test_both_families_of_the_template_are_asked_for(lab: Lab) -> None:
    assert lab.table.asked == [[(socket.AF_INET, 3), (socket.AF_INET6, 3)]]
    lab.service.follow(ETH0, ETH0, T0)
    assert len(lab.table.asked) == 1, "nothing has changed"
    lab.service.follow(WLAN0, None, T0)
    assert lab.table.asked[1:] == [[(socket.AF_INET, 4)]]


def test_neighbours_of_the_template_are_known(lab: Lab) -> None:
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC), Neighbour(3, NEIGHBOUR6, MAC), Neighbour(9, GATEWAY4, MAC))
    assert lab.ctx.lan.knows(NEIGHBOUR) and lab.ctx.lan.knows(NEIGHBOUR6) and lab.ctx.lan.count == 2
    assert (lab.flow.macs, lab.announced) == ([MAC], []), "the guest had not asked"


def test_a_change_is_written_into_headers_and_announced(lab: Lab) -> None:
    lab.ctx.lan.tell(NEIGHBOUR)
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    assert (lab.flow.macs, lab.announced) == ([MAC], [NEIGHBOUR]), "once"
    lab.arrive(Neighbour(3, NEIGHBOUR, OTHER))
    assert (lab.flow.macs, lab.announced) == ([MAC, OTHER], [NEIGHBOUR, NEIGHBOUR])


def test_a_table_is_shown_when_it_is_there_as_a_whole(lab: Lab) -> None:
    lab.table.asking = True
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    assert lab.flow.macs == []
    lab.table.asking = False
    lab.arrive()
    assert lab.flow.macs == [MAC]


def test_another_template_has_other_neighbours(lab: Lab) -> None:
    """Those that are the same on the new one are no news for the guest."""
    lab.ctx.lan.tell(NEIGHBOUR)
    lab.ctx.lan.tell(NEIGHBOUR6)
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC), Neighbour(3, NEIGHBOUR6, MAC))
    lab.announced.clear()
    lab.service.follow(WLAN0, ETH0, T0)
    assert (lab.ctx.lan.mac_of(NEIGHBOUR), lab.ctx.lan.mac_of(NEIGHBOUR6)) == (OUR_MAC, MAC)
    assert lab.announced == []
    lab.arrive(Neighbour(4, NEIGHBOUR, MAC), Neighbour(3, GATEWAY4, MAC))
    assert (lab.announced, lab.ctx.lan.count) == ([], 2)
    lab.service.follow(None, None, T0)
    assert lab.ctx.lan.count == 0


def test_an_address_becomes_one_of_ours(lab: Lab) -> None:
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    lab.ctx.lan.tell(NEIGHBOUR)
    reconfigure(lab.ctx, mtu=MTU_MIN)
    assert len(lab.flow.macs) == 1, "that is none of its business"
    reconfigure(lab.ctx, ip4=replace(IP4, map_guest_addr=NEIGHBOUR))
    elapse(lab.ctx, T0, 1)
    assert (lab.flow.macs, lab.announced) == ([MAC, OUR_MAC], [NEIGHBOUR])


def test_the_next_guest_was_told_nothing(lab: Lab) -> None:
    lab.ctx.lan.tell(NEIGHBOUR)
    for forget in lab.ctx.services.on_forget:
        forget()
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    assert lab.announced == []


def test_a_flood_is_not_read_all_the_time(lab: Lab) -> None:
    lab.table.more = True
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    assert FD not in reactor(lab.ctx).refs and lab.ctx.lan.knows(NEIGHBOUR)
    elapse(lab.ctx, T0, PAUSE)
    assert FD in reactor(lab.ctx).refs
    lab.table.more = False
    lab.arrive(now=T0 + PAUSE)
    assert FD in reactor(lab.ctx).refs
    elapse(lab.ctx, T0 + PAUSE, 1)
    assert FD in reactor(lab.ctx).refs


def test_announcements_are_bounded(lab: Lab) -> None:
    many = [b"\xc0\0\1" + bytes((n,)) for n in range(2 * ANNOUNCED + 3)]
    for a in many:
        lab.ctx.lan.tell(a)
    lab.arrive(*(Neighbour(3, a, MAC) for a in many))
    assert lab.announced == many[:ANNOUNCED]
    now = elapse(lab.ctx, T0, PAUSE)
    assert lab.announced == many[: 2 * ANNOUNCED]
    elapse(lab.ctx, now, 1)
    assert lab.announced == many


def test_a_service_that_does_not_announce_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """--no-ndp, or no ARP service at all."""
    lab = Lab(monkeypatch)
    lab.ctx.services.announce4, lab.ctx.services.announce6 = None, lambda a: None
    lab.ctx.lan.tell(NEIGHBOUR)
    lab.ctx.lan.tell(NEIGHBOUR6)
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC), Neighbour(3, NEIGHBOUR6, MAC))
    assert lab.ctx.lan.outdated() == []


def test_a_table_that_cannot_be_read(lab: Lab) -> None:
    lab.arrive(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert lab.service.failures == 1
    (line,) = lab.lines
    assert line.startswith("Couldn't read the host's neighbours") and "Cannot allocate memory" in line
    assert len(lab.table.asked) == 1
    lab.table.refuses = True
    elapse(lab.ctx, T0, ASK_AGAIN)
    assert (len(lab.table.asked), lab.service.failures) == (2, 2)
    lab.table.refuses = False
    now = elapse(lab.ctx, T0 + ASK_AGAIN, ASK_AGAIN)
    assert (len(lab.table.asked), lab.service.failures) == (3, 2)
    assert lab.table.asked[2] == lab.table.asked[0]
    elapse(lab.ctx, now, 10 * ASK_AGAIN)
    assert len(lab.table.asked) == 3
    assert not any(d is not None for d in timers(lab.ctx).services.deadlines)


# Neighbours of no use -----------------------------------------------------------------------------------------------


@pytest.fixture
def idle(lab: Lab) -> Lab:
    """A guest whose last flow has ended."""
    lab.ctx.flows.free(lab.flow, "both ended")
    lab.arrive(Neighbour(3, NEIGHBOUR, MAC))
    assert not lab.watching, "the last change that costs a wake-up"
    return lab


def test_what_has_come_meanwhile_is_read_before_it_is_used(idle: Lab) -> None:
    idle.wait(Neighbour(3, NEIGHBOUR, OTHER))
    assert idle.ctx.lan.mac_of(NEIGHBOUR) == OTHER
    assert idle.watching and idle.table.arriving == []
    reactor(idle.ctx).end_turn(T0)
    elapse(idle.ctx, T0, 1)
    assert idle.announced == []
    idle.arrive()
    assert not idle.watching, "there is no flow yet, and the guest was told nothing"


def test_a_guest_that_was_told_is_told_of_changes(idle: Lab) -> None:
    idle.wait()
    idle.ctx.lan.tell(NEIGHBOUR)
    idle.arrive(Neighbour(3, NEIGHBOUR, OTHER))
    assert idle.watching and idle.announced == [NEIGHBOUR]


def test_what_the_kernel_has_discarded_is_asked_for(idle: Lab) -> None:
    """The answer comes later, when the flow has begun with what was known."""
    idle.wait(Neighbour(3, NEIGHBOUR6, OTHER))
    idle.table.asking = True
    idle.ctx.lan.mac_of(NEIGHBOUR)
    idle.ctx.flows.insert(idle.flow)
    reactor(idle.ctx).end_turn(T0)
    before = list(idle.flow.macs)
    idle.arrive(Neighbour(3, NEIGHBOUR, OTHER))
    assert idle.watching and idle.flow.macs == before
    idle.table.asking = False
    idle.arrive()
    assert idle.flow.macs == [*before, OTHER]


def test_a_table_that_cannot_be_read_is_no_obstacle(idle: Lab) -> None:
    idle.wait(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert idle.ctx.lan.mac_of(NEIGHBOUR) == MAC
    assert idle.service.failures == 1 and idle.watching


def test_a_map_that_goes_leaves_a_neighbour_that_the_guest_was_told(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(monkeypatch, ip4=replace(IP4, map_guest_addr=NEIGHBOUR))
    lab.ctx.flows.free(lab.flow, "both ended")
    lab.ctx.lan.tell(NEIGHBOUR)
    lab.arrive()
    assert not lab.watching
    lab.wait(Neighbour(3, NEIGHBOUR, MAC))
    reconfigure(lab.ctx, ip4=IP4)
    reactor(lab.ctx).end_turn(T0)
    elapse(lab.ctx, T0, 1)
    assert lab.watching and lab.announced == [NEIGHBOUR] and lab.ctx.lan.mac_of(NEIGHBOUR) == MAC


def test_another_template_is_read_once(idle: Lab) -> None:
    idle.service.follow(WLAN0, WLAN0, T0)
    assert idle.watching
    idle.arrive(Neighbour(4, NEIGHBOUR, OTHER))
    assert not idle.watching and idle.ctx.lan.count == 1
