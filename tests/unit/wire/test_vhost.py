"""Messages of vhost-user: emit and parse are each other's reverse; nothing that is too short, long or wrong passes."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt.wire import vhost
from passt.wire.vhost import Invalid, LogArea, Message, Region, RingAddresses, RingState, StateTransfer

U32 = st.integers(0, (1 << 32) - 1)
U64 = st.integers(0, (1 << 64) - 1)
REGIONS = st.builds(Region, *[st.integers(0, 1 << 62)] * 1, st.integers(1, 1 << 62), *[st.integers(0, 1 << 62)] * 2)


@given(U32, st.integers(0, 15), st.binary(max_size=100))
def test_headers(request: int, bits: int, payload: bytes) -> None:
    message = Message(request, bits << 2 | vhost.VERSION, payload)
    data = message.emit()
    assert Message.parse_header(data[:12]) == (request, message.flags, len(payload))
    assert data[12:] == payload
    assert message.needs_reply == bool(bits & 2)


@given(st.builds(RingState, U32, U32), st.builds(RingAddresses, U32, U32, U64, U64, U64, U64), U64)
def test_payloads(state: RingState, addresses: RingAddresses, number: int) -> None:
    assert RingState.parse(state.emit()) == state
    assert RingAddresses.parse(addresses.emit()) == addresses
    assert vhost.u64(vhost.emit_u64(number)) == number


@given(st.lists(REGIONS, max_size=8))
def test_regions(table: list[Region]) -> None:
    assert vhost.regions(vhost.emit_regions(table)) == table
    for region in table:
        assert vhost.single_region(vhost.emit_single_region(region)) == region


@pytest.mark.parametrize(
    "parse",
    [
        *(RingState.parse, RingAddresses.parse, Region.parse, LogArea.parse, StateTransfer.parse),
        *(vhost.regions, vhost.single_region, vhost.u64),
    ],
)
@given(data=st.binary(max_size=300))
def test_any_bytes_are_a_payload_or_invalid(parse: Callable[[bytes], object], data: bytes) -> None:
    with suppress(Invalid):
        parse(data)


@pytest.mark.parametrize("region", [Region(0, 0, 0, 0), Region((1 << 64) - 1, 2, 0, 0), Region(0, 2, 0, (1 << 64) - 1)])
def test_regions_that_cannot_be(region: Region) -> None:
    with pytest.raises(Invalid, match="a memory region of"):
        Region.parse(region.emit())


def test_too_many_regions() -> None:
    with pytest.raises(Invalid, match="9 memory regions"):
        vhost.regions(vhost.emit_regions([Region(0, 1, 0, 0)] * 9))


@pytest.mark.parametrize(("flags", "size"), [(0, 0), (2, 0), (3, 0), (1, vhost.SIZE_MAX + 1)])
def test_headers_that_cannot_be(flags: int, size: int) -> None:
    with pytest.raises(Invalid):
        Message.parse_header(vhost.HEADER.pack(1, flags, size))


@given(st.integers(1, 1 << 62), st.integers(0, 1 << 62), st.sampled_from([vhost.SAVE, vhost.LOAD]))
def test_payloads_of_a_migration(size: int, offset: int, direction: int) -> None:
    area, transfer = LogArea(size, offset), StateTransfer(direction, vhost.STOPPED)
    assert LogArea.parse(area.emit()) == area
    assert StateTransfer.parse(transfer.emit()) == transfer


@pytest.mark.parametrize("area", [LogArea(0, 0), LogArea(1 << 63, 1), LogArea((1 << 64) - 1, (1 << 64) - 1)])
def test_logs_that_cannot_be(area: LogArea) -> None:
    with pytest.raises(Invalid, match="a log of"):
        LogArea.parse(area.emit())


@pytest.mark.parametrize("transfer", [StateTransfer(2, 0), StateTransfer(vhost.SAVE, 1)])
def test_transfers_that_cannot_be(transfer: StateTransfer) -> None:
    with pytest.raises(Invalid, match="a transfer of state in direction"):
        StateTransfer.parse(transfer.emit())
