"""TCP: options of a SYN both ways, flags, the layouts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP

from passt.wire import tcp
from passt.wire.cursor import Malformed
from passt.wire.tcp import ACK, FIN, FLAG_MASK, PSH, RST, SYN, URG, SynOptions, flag_names, syn_options

MSS_WS = bytes.fromhex("020405b4 01 030308")
MSS = bytes.fromhex("020405b4")
AS_LINUX = bytes.fromhex("020405b4 0402 080a")  # and 8 bytes of a timestamp


@pytest.mark.parametrize(
    ("data", "options"), [(MSS_WS, SynOptions(1460, 8)), (MSS, SynOptions(1460)), (b"", SynOptions())]
)
def test_parse(data: bytes, options: SynOptions) -> None:
    assert SynOptions.parse(data) == options


@given(st.binary(max_size=40) | st.binary(max_size=32).map(lambda rest: AS_LINUX + rest))
def test_options_of_syn_are_those_that_are_parsed(data: bytes) -> None:
    """Whether or not timestamps are left out of what is kept."""
    try:
        expected = SynOptions.parse(data)
    except Malformed:
        with pytest.raises(Malformed):
            syn_options(data)
    else:
        assert syn_options(data) == expected


def test_timestamps_are_no_other_options() -> None:
    first, second = (AS_LINUX + bytes((n,)) * 8 + bytes.fromhex("01030307") for n in (1, 2))
    assert syn_options(first) is syn_options(second)
    assert syn_options(first) == SynOptions(1460, 7, sack=True)


@pytest.mark.parametrize(("options", "data"), [(SynOptions(1460, 8), MSS_WS), (SynOptions(1460), MSS)])
def test_emit(options: SynOptions, data: bytes) -> None:
    assert options.emit() == data


def test_nothing_is_sent_without_mss() -> None:
    with pytest.raises(ValueError, match="MSS"):
        SynOptions(None, 8).emit()


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("0101010102041000", SynOptions(4096)),  # NOP in front
        ("0204100000020405", SynOptions(4096)),  # what is behind the end does not count
        ("020405b40402080a000000010000000001030307", SynOptions(1460, 7, sack=True)),  # as Linux sends them
        ("03030f", SynOptions(None, 14)),  # RFC 7323, 2.3
        ("02040000", SynOptions()),  # an MSS of 0 is none
        ("0203ff", SynOptions()),  # of another length: not the option we know
        ("030408ff", SynOptions()),
        ("02040100020405b4", SynOptions(1460)),  # the last one counts
        ("fe0a0000000000000000020405b4", SynOptions(1460)),  # unknown: skipped
        ("01", SynOptions()),
        ("00", SynOptions()),
    ],
)
def test_parse_what_guests_send(data: str, options: SynOptions) -> None:
    assert SynOptions.parse(bytes.fromhex(data)) == options


@pytest.mark.parametrize("data", ["02", "0200", "0201", "020405", "0205ff", "010102", "03ff08", "020405b4030308"[:-2]])
def test_lying_length(data: str) -> None:
    with pytest.raises(Malformed, match=r"^tcp option length$"):
        SynOptions.parse(bytes.fromhex(data))


@given(st.binary(max_size=40))
def test_parses_or_is_malformed(data: bytes) -> None:
    try:
        options = SynOptions.parse(data)
    except Malformed:
        return
    assert options.mss is None or 0 < options.mss <= 0xFFFF
    assert options.ws is None or 0 <= options.ws <= tcp.WS_MAX


@given(st.integers(1, 0xFFFF), st.none() | st.integers(0, tcp.WS_MAX))
def test_round_trip_and_scapy(mss: int, ws: int | None) -> None:
    data = SynOptions(mss, ws).emit()
    assert len(data) % 4 == 0
    assert SynOptions.parse(data) == SynOptions(mss, ws)
    header = tcp.HEADER.pack(1, 2, 3, 4, (5 + len(data) // 4) << 12 | SYN, 5, 0, 0)
    wanted = [("MSS", mss)] if ws is None else [("MSS", mss), ("NOP", None), ("WScale", ws)]
    assert TCP(header + data).options == wanted


def test_header() -> None:
    header = bytes.fromhex("9c40 0050 ffffff00 00000001 5018 ffff abcd 0007")
    assert tcp.HEADER.unpack(header) == (40000, 80, 0xFFFFFF00, 1, 5 << 12 | PSH | ACK, 0xFFFF, 0xABCD, 7)
    assert tcp.SEQ_TO_WINDOW.unpack_from(header, 4) == (0xFFFFFF00, 1, 5 << 12 | PSH | ACK, 0xFFFF)
    assert len(header) == tcp.HEADER_LEN == tcp.HEADER.size


def test_flag_names() -> None:
    assert flag_names(SYN | ACK) == "SA"
    assert flag_names(FIN | SYN | RST | PSH | ACK | URG) == flag_names(FLAG_MASK) == "FSRPAU"
    assert flag_names(0) == ""
    assert str(TCP(flags=FIN | PSH | ACK).flags) == flag_names(FIN | PSH | ACK)
