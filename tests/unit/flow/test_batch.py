"""The fast path of a plain frame does what the whole classification does, whatever the frame.

Two taps read the same batches. In one of them `Batch.plain` always says that the frame is not plain. Both must make the
same calls, with the same groups and fields, and count the same.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passt.flow.batch import Batch
from passt.wire.virtio import F_DATA_VALID, F_NEEDS_CSUM, NO_OFFLOAD, VNET, VNET_LEN

from ..hostile import CHANGES, build, seeds
from ..test_tap import FakeTap, ip4, ip6, tagged, tcp, udp

VOUCHED = VNET.pack(F_NEEDS_CSUM, 0, 0, 0, 0, 0)
SIZED = VNET.pack(F_DATA_VALID, 0, 0, 100, 0, 0)
HEADERS = (VOUCHED, VOUCHED, VNET.pack(F_DATA_VALID, 0, 0, 0, 0, 0), SIZED, NO_OFFLOAD)
PLAIN = {
    "TCP": ip4(tcp()),
    "TCP, nothing in it": ip4(tcp(b"")),
    "TCP, ECN": ip4(tcp(), tos=3),
    "UDP": ip4(udp()),
    "UDP, nothing in it": ip4(udp(b"")),
    "UDP, DF": ip4(udp(), flags="DF"),
    "UDP, class and TTL": ip4(udp(), tos=0xB8, ttl=7),
    "UDP, longest with DF": ip4(udp(bytes(1472)), flags="DF"),
    "TCP over IPv6": ip6(tcp()),
    "UDP over IPv6": ip6(udp(), tc=0xB8, hlim=3),
    "padded": ip4(udp()) + bytes(20),
}
UNUSUAL = {
    "TCP, class": ip4(tcp(), tos=0xB8),
    "DHCP": ip4(udp(dport=67)),
    "DHCPv6": ip6(udp(dport=547)),
    "fragment": ip4(udp(), frag=1),
    "tag": tagged(ip4(tcp())),
    "UDP, long": ip4(udp(bytes(1473)), flags="DF"),
    "TCP, short": ip4(tcp(b""))[:53],
    "UDP, short": ip4(udp(b""))[:41],
    "UDP over IPv6, short": ip6(udp(b""))[:61],
}

IGNORED6 = 15, 16, 17, 21  # flow label and hop limit: no checksum has them
SUMMED = ip4(tcp(b"")), ip6(tcp(b""))  # acknowledgements of TIME-WAIT look so

frames = st.sampled_from([*PLAIN.values(), *UNUSUAL.values()]).map(lambda f: VOUCHED + f)
places = st.integers(0, 93) | st.integers(0, 400)
values = st.integers(0, 64) | st.integers(0, 0xFFFF)
changes = st.lists(st.tuples(st.integers(0, len(CHANGES) - 1), places, values), max_size=2)
specs = st.tuples(st.integers(0, len(seeds()) - 1), changes).map(build)
headed = st.tuples(st.sampled_from(HEADERS), frames | specs, changes)


def altered(header: bytes, frame: bytes, how: list[tuple[int, int, int]]) -> bytes:
    """`frame`, which has a virtio-net header, with another one, and with changes."""
    inner = bytearray(frame[VNET_LEN:])
    for what, where, value in how:
        if inner:
            CHANGES[what](inner, where % len(inner), value)
    return header + inner


def outcome(batches: list[list[bytes]], *, plain: bool, vnet: bool, **config: Any) -> tuple[list[Any], dict[str, int]]:
    """The calls that a tap makes for `batches`, with TTLs, and what it counts."""
    tap = FakeTap(vnet=vnet, **config)
    calls = []
    with mock.patch.object(Batch, "plain", Batch.plain if plain else lambda *_: False):
        for batch in batches:
            read = tap.batch(*(f if vnet else f[VNET_LEN:] or b"\0" for f in batch), vnet=b"")
            calls.append((read, getattr(tap, "hops", None)))
    tap.close()
    return calls, tap.drops


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(headed, min_size=1, max_size=6), min_size=1, max_size=3), st.booleans())
def test_the_fast_path_does_the_same(drawn: list[list[tuple[bytes, bytes, Any]]], vnet: bool) -> None:
    batches = [[altered(*one) for one in batch] for batch in drawn]
    assert outcome(batches, plain=True, vnet=vnet) == outcome(batches, plain=False, vnet=vnet)


@pytest.mark.parametrize("family", ["ip4", "ip6"])
def test_a_family_that_is_off_has_no_plain_frames(family: str) -> None:
    batches = [[VOUCHED + f for f in PLAIN.values()]]
    fast, slow = (outcome(batches, plain=plain, vnet=True, **{family: None}) for plain in (True, False))
    assert fast == slow and fast[1]


def plain(frame: bytes, header: bytes = VOUCHED) -> bool:
    """Whether `frame` is plain to a tap that knows its sender."""
    tap = FakeTap()
    tap.batch(ip4(tcp()))
    tap.ctx.pool.buf[: len(header + frame)] = header + frame
    found = tap.tap._batch.plain(0, len(header + frame))
    tap.close()
    return found


@pytest.mark.parametrize("frame", SUMMED, ids=["IPv4", "IPv6"])
def test_a_segment_without_payload_is_verified_here(frame: bytes) -> None:
    assert plain(frame, NO_OFFLOAD)
    for at in range(14, len(frame)):
        wrong = bytearray(frame)
        wrong[at] ^= 0x10
        assert not plain(bytes(wrong), NO_OFFLOAD) or (len(frame) > 60 and at in IGNORED6)


@pytest.mark.parametrize("frame", PLAIN.values(), ids=PLAIN)
def test_what_is_plain(frame: bytes) -> None:
    assert plain(frame)
    if frame not in SUMMED:
        assert not plain(frame, NO_OFFLOAD), "no kernel has verified it"
    assert not plain(frame[:6] + bytes(6) + frame[12:]), "another sender"


@pytest.mark.parametrize("frame", UNUSUAL.values(), ids=UNUSUAL)
def test_what_is_not(frame: bytes) -> None:
    assert not plain(frame)


def test_super_frames_of_udp_are_not() -> None:
    assert not plain(PLAIN["UDP"], SIZED) and plain(PLAIN["TCP"], SIZED)


def test_no_segment_is_while_connections_have_a_class() -> None:
    tap = FakeTap()
    tap.batch(ip4(tcp()))
    tap.ctx.classes[bytes(12)] = 0xB8
    size = len(VOUCHED + PLAIN["TCP"])
    tap.ctx.pool.buf[:size] = VOUCHED + PLAIN["TCP"]
    assert not tap.tap._batch.plain(0, size)
    tap.close()
