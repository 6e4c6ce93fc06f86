"""A guest that means harm; see hostile.py for the invariant, and for how to look for more by hand."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.dhcp import DHCP
from scapy.layers.dhcp6 import DHCP6OptClientId
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import ICMPv6NDOptDstLLAddr, ICMPv6NDOptMTU
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from passt import addr
from passt.link.packet import PacketPool
from passt.tap import Tap
from passt.wire.virtio import VNET_LEN
from tests.unit import hostile
from tests.unit.hostile import CHANGES, FILLS, VOUCHED, Stack, build, check, harmless, random_frames, seeds
from tests.unit.support import GUEST4, GUEST_MAC, OUR_MAC, link
from tests.unit.tcp_support import FakeSocket
from tests.unit.test_tap import FakeTap

READV = os.readv  # the real one
FEW = settings(max_examples=150, deadline=None)


@pytest.fixture(scope="module", autouse=True)
def no_real_sockets() -> Iterator[None]:
    with harmless():
        yield


places = st.integers(0, 93) | st.integers(0, 400)
values = st.integers(0, 64) | st.integers(0, 0xFFFF) | st.integers(0xFFC0, 0xFFFF)
changes = st.tuples(st.integers(0, len(CHANGES) - 1), places, values)
specs = st.tuples(st.integers(0, len(seeds()) - 1), st.lists(changes, max_size=3))
headed = st.tuples(st.sampled_from([b"\x08\0", b"\x86\xdd", b"\x08\x06"]), st.binary(max_size=120)).map(
    lambda t: OUR_MAC + GUEST_MAC + t[0] + t[1]
)


# The whole stack -----------------------------------------------------------------------------------------------------


@FEW
@given(st.lists(st.binary(max_size=100) | headed, min_size=1, max_size=6), st.booleans())
def test_any_bytes(frames: list[bytes], together: bool) -> None:
    check([VOUCHED + f for f in frames], together=together)


@settings(FEW, max_examples=400)
@given(st.lists(specs, min_size=1, max_size=8), st.booleans(), st.sampled_from([1 << 30, 5, 0]))
def test_any_change_to_valid_frames(changed: list[hostile.Spec], together: bool, room: int) -> None:
    check([build(s) for s in changed], together=together, room=room)


@FEW
@given(st.integers(0, len(seeds()) - 1), st.integers(1, 30), st.lists(changes, max_size=2), st.integers(0, 29))
def test_any_change_to_one_of_neighbouring_frames(first: int, count: int, how: list[Any], which: int) -> None:
    """Fragments of one packet and segments of one connection are neighbours among the seeds."""
    frames = [(first + i, how if i == which % count else []) for i in range(count)]
    check([build(s) for s in frames], together=True)


@pytest.mark.parametrize("together", [True, False])
def test_valid_frames(together: bool) -> None:
    """All of them at once; and few are dropped, or else the tests above would test little."""
    drops = check(seeds(), together=together)
    groups = {"multicast: disabled", "group membership: ttl or hop limit"}  # there is no interface to follow them on
    assert drops.keys() <= {"icmp type", "fragment: protocol", "tcp reset out of window", *groups}, drops
    assert sum(drops.values()) < 12


def test_valid_frames_get_where_they_are_meant_to_go() -> None:
    stack = Stack(FILLS[0])
    link(stack.ctx).take()
    for frame in seeds():
        stack.batch([frame])
    sent = [b"abcdefghijklmnopend", b"220 readybye", b"250 hello", b"at last", b""]
    assert [bytes(s.sent) for s in FakeSocket.made] == [data for data in sent for _ in (4, 6)]
    payloads = [sent[-1] for sent in stack.datagrams if sent[-2] != "option"]
    for wanted in (b"datagram", b"", bytes(range(200)), b"behind headers", bytes(90), bytes(88)):
        assert wanted in payloads
    assert [p[0] for p in payloads if p[:1] in (b"\x08", b"\x80")] == [8, 128, 8, 128]
    kinds = {Ether(f).lastlayer().__class__ for f in link(stack.ctx).take()}
    assert {ARP, DHCP, DHCP6OptClientId, ICMPv6NDOptDstLLAddr, ICMPv6NDOptMTU, TCP} <= kinds
    stack.close()


@pytest.mark.parametrize("which", range(len(seeds())))
def test_each_valid_frame_at_any_length(which: int) -> None:
    """Cut by the link, and cut with lengths that agree; each by itself, so that behind it is nothing of the guest."""
    cut, shorten = (next(i for i, f in enumerate(CHANGES) if f.__name__ == name) for name in ("_cut", "_shorten"))
    size = min(len(seeds()[which]), 150)
    check([build((which, [(how, at, 0)])) for at in range(size) for how in (cut, shorten)], together=False)


def test_ping_of_death() -> None:
    """Fragments that make a packet which no total length can tell: the last one is not taken."""
    echo = b"\x08\0\0\0\0\x07\0\1" + bytes(65512)
    frames = []
    for at in range(0, len(echo), 16000):
        piece = echo[at : at + 16000]
        header = IP(src=addr.text(GUEST4), dst="198.51.100.7", proto=1, id=5, frag=at // 8)
        header.flags = "MF" if at + 16000 < len(echo) else ""
        frames.append(VOUCHED + bytes(Ether(src=addr.mac_text(GUEST_MAC)) / header / Raw(piece)))
    for room in (1 << 30, 0):
        assert check(frames, together=False, room=room) == {"fragment: bad": 1}


def test_some_of_what_is_done_by_hand() -> None:
    for seed in range(100):
        r = random.Random(seed)
        check(random_frames(r), together=bool(seed & 1), room=5, mtu=1500)


# The check itself ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("access", ["copy", "view"])
def test_check_sees_reads_behind_a_packet(access: str, monkeypatch: pytest.MonkeyPatch) -> None:
    original = getattr(PacketPool, access)
    monkeypatch.setattr(PacketPool, access, lambda pool, a, b: original(pool, a, b + 1))
    with pytest.raises((AssertionError, IndexError)):
        check([VOUCHED + frame[VNET_LEN:] for frame in seeds()], together=False)  # no checksum tells of it


def test_check_sees_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(Tap, "_key", fail)
    with pytest.raises(ZeroDivisionError):
        check(seeds()[2:4], together=True)


# Every frame is handed on, kept as a fragment, or counted: exactly one of them ---------------------------------------


def fates(tap: FakeTap, frame: bytes) -> int:
    """How many things became of one frame."""
    kept = sum(len(p.parts) for p in tap.tap._reassembly._packets.values())
    dropped = sum(tap.ctx.drops.values())
    tap.put(frame, vnet=b"")
    tap.calls.clear()
    tap.turn()
    handed = sum(not name.endswith((" mac", " class", " class forgotten")) for name, _ in tap.calls)
    more_kept = sum(len(p.parts) for p in tap.tap._reassembly._packets.values()) > kept
    return handed + (sum(tap.ctx.drops.values()) - dropped) + more_kept


@FEW
@given(st.lists(specs.map(build) | st.binary(max_size=60), max_size=20))
def test_every_frame_has_one_fate(frames: list[bytes]) -> None:
    with pytest.MonkeyPatch.context() as real:
        real.setattr("os.readv", READV)
        tap = FakeTap()
        try:
            assert [fates(tap, f) for f in [*seeds(), *frames]] == [1] * (len(seeds()) + len(frames))
        finally:
            tap.close()
