"""Messages of IGMP and MLD, both ways, against literals and against scapy."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP
from scapy.layers.inet6 import (
    ICMPv6MLDMultAddrRec,
    ICMPv6MLQuery2,
    ICMPv6MLReport2,
    IPv6,
    IPv6ExtHdrHopByHop,
    RouterAlert,
)

from passt.addr import packed
from passt.wire.checksum import checksum
from passt.wire.cursor import Malformed
from passt.wire.igmp import (
    ALLOW,
    BLOCK,
    DONE6_V1,
    IS_EXCLUDE,
    IS_INCLUDE,
    LEAVE_V2,
    RECORDS_MAX,
    REPORT6_V1,
    REPORT_SOURCES_MAX,
    REPORT_V1,
    REPORT_V2,
    SOURCES_MAX,
    TO_EXCLUDE,
    TO_INCLUDE,
    Query,
    Record,
    Report,
    Single,
    packet,
    parse,
)

MDNS4, MDNS6 = packed("224.0.0.251"), packed("ff02::fb")
ONE, TWO = packed("192.0.2.9"), packed("192.0.2.10")
SIX = packed("2001:db8::9")

LITERALS = {
    "16 00 0904 e00000fb": Single(REPORT_V2, MDNS4),
    "17 00 0804 e00000fb": Single(LEAVE_V2, MDNS4),
    "12 00 0d04 e00000fb": Single(REPORT_V1, MDNS4),
    "11 64 ec1e 00000000 02 7d 0000": Query(bytes(4), 100, 2, 125),
    "22 00 f902 0000 0001 04 00 0000 e00000fb": Report(4, (Record(TO_EXCLUDE, MDNS4),)),
    "83 00 0000 0000 0000 ff0200000000000000000000000000fb": Single(REPORT6_V1, MDNS6),
    "84 00 0000 0000 0000 ff0200000000000000000000000000fb": Single(DONE6_V1, MDNS6),
    "8f 00 0000 0000 0001 04 00 0000 ff0200000000000000000000000000fb": Report(16, (Record(TO_EXCLUDE, MDNS6),)),
    "82 00 0000 2710 0000 00000000000000000000000000000000 0a 7d 0000": Query(bytes(16), 10000, 2, 125, True),
}


def size_of(message: Single | Report | Query) -> int:
    return message.size if isinstance(message, Report) else len(message.group)


@pytest.mark.parametrize(("literal", "message"), LITERALS.items())
def test_both_ways(literal: str, message: Single | Report | Query) -> None:
    raw = bytes.fromhex(literal)
    assert message.emit() == raw
    assert parse(raw, size_of(message)) == message


def scapy_of_igmp() -> Any:
    """scapy's module of IGMPv3, which has moved: the former place is there in all versions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from scapy.contrib import igmpv3
    return igmpv3


def test_scapy_agrees_about_igmp() -> None:
    theirs = scapy_of_igmp()
    ours = Report(4, (Record(BLOCK, packed("232.1.1.1"), (ONE, TWO)), Record(TO_EXCLUDE, MDNS4)))
    whole = theirs.IGMPv3mr.fields_desc[0].name == "type"  # in older versions it begins behind the checksum
    report = theirs.IGMPv3mr(ours.emit()[0 if whole else 4 :])
    first, second = report.records
    assert (first.rtype, first.maddr, first.srcaddrs) == (6, "232.1.1.1", ["192.0.2.9", "192.0.2.10"])
    assert (second.rtype, second.maddr, second.srcaddrs) == (4, "224.0.0.251", [])


def test_scapy_agrees_about_packets() -> None:
    whole = packet(packed("192.0.2.1"), packed("224.0.0.1"), Query(bytes(4), 100, 2, 125).emit())
    theirs = IP(whole)
    assert (theirs.ttl, theirs.proto, theirs.ihl, theirs.tos) == (1, 2, 6, 0xC0)
    assert theirs.options[0].option == 20, "Router Alert"
    assert checksum(whole[:24]) == 0
    whole = packet(packed("fe80::1"), packed("ff02::1"), Query(bytes(16), 10000, 2, 125).emit())
    six = IPv6(whole)
    assert six.hlim == 1
    assert next(o for o in six[IPv6ExtHdrHopByHop].options if isinstance(o, RouterAlert)).value == 0
    query = six[ICMPv6MLQuery2]
    assert (query.mladdr, query.mrd, query.QRV, query.QQIC) == ("::", 10000, 2, 125)
    rebuilt = six.copy()
    del rebuilt[ICMPv6MLQuery2].cksum
    assert bytes(rebuilt) == whole


def test_scapy_agrees_about_mld() -> None:
    record = ICMPv6MLDMultAddrRec(rtype=1, dst="ff3e::9", sources=["2001:db8::9"])
    theirs = bytearray(bytes(ICMPv6MLReport2(records=[record])))
    theirs[2:4] = bytes(2)  # theirs has no pseudo-header
    ours = Report(16, (Record(IS_INCLUDE, packed("ff3e::9"), (SIX,)),))
    assert ours.emit() == bytes(theirs)
    assert parse(bytes(theirs), 16) == ours


def test_auxiliary_data_is_passed_over() -> None:
    raw = bytearray(bytes.fromhex("22 00 0000 0000 0002 04 01 0000 e00000fb 01020304 01 00 0000 e00000fc"))
    raw[2:4] = checksum(bytes(raw)).to_bytes(2, "big")
    assert parse(bytes(raw), 4) == Report(4, (Record(TO_EXCLUDE, MDNS4), Record(IS_INCLUDE, packed("224.0.0.252"))))


@pytest.mark.parametrize(
    ("raw", "size", "reason"),
    [
        ("", 4, "truncated"),
        ("16 00 0904 e00000", 4, "truncated"),
        ("16 00 0905 e00000fb", 4, "igmp checksum"),
        ("22 00 ddfe 0000 0001", 4, "truncated"),
        ("22 00 dd00 0000 00ff", 4, "truncated"),
        ("11 00 eeff 0000 0000", 4, "truncated"),  # a query of IGMPv1 or v2
        ("13 00 ecff 0000 0000", 4, "type"),
        ("83 00 0000 0000 0000", 16, "truncated"),
        ("83 00 7cff 0000 0000", 4, "type"),
        ("16 00 0904 e00000fb", 16, "type"),
    ],
)
def test_malformed(raw: str, size: int, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        parse(bytes.fromhex(raw), size)


@pytest.mark.parametrize("size", [4, 16])
def test_bounds(size: int) -> None:
    group = MDNS4 if size == 4 else MDNS6
    most = Report(size, (Record(ALLOW, group),) * RECORDS_MAX)
    assert parse(most.emit(), size) == most
    more = Report(size, (Record(ALLOW, group),) * (RECORDS_MAX + 1))
    assert parse(more.emit(), size) == most, "the first ones count"
    many = Report(size, (Record(ALLOW, group, (group,) * SOURCES_MAX),))
    assert parse(many.emit(), size) == many
    with pytest.raises(Malformed, match="too many"):
        parse(Report(size, (Record(ALLOW, group, (group,) * (SOURCES_MAX + 1)),)).emit(), size)


@pytest.mark.parametrize("size", [4, 16])
def test_sources_of_a_report_are_bounded(size: int) -> None:
    """Records behind too many are not looked at: thousands of sources cost 2 ms."""
    group = MDNS4 if size == 4 else MDNS6
    full = Record(ALLOW, group, (group,) * SOURCES_MAX)
    enough = REPORT_SOURCES_MAX // SOURCES_MAX
    for count, kept in ((enough, enough), (enough + 1, enough + 1), (enough + 2, enough + 1)):
        assert parse(Report(size, (full,) * count).emit(), size) == Report(size, (full,) * kept)


SIZES = st.sampled_from([4, 16])


def addresses(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


def sources(size: int) -> st.SearchStrategy[tuple[bytes, ...]]:
    return st.lists(addresses(size), max_size=5).map(tuple)


def messages(size: int) -> st.SearchStrategy[Single | Report | Query]:
    kinds = [REPORT_V1, REPORT_V2, LEAVE_V2] if size == 4 else [REPORT6_V1, DONE6_V1]
    records = st.builds(Record, st.integers(IS_INCLUDE, BLOCK), addresses(size), sources(size))
    response = st.integers(0, 255 if size == 4 else 65535)
    return st.one_of(
        st.builds(Single, st.sampled_from(kinds), addresses(size)),
        st.builds(Report, st.just(size), st.lists(records, max_size=5).map(tuple)),
        st.builds(
            Query, addresses(size), response, st.integers(0, 7), st.integers(0, 255), st.booleans(), sources(size)
        ),
    )


@given(SIZES.flatmap(lambda size: st.tuples(st.just(size), messages(size))))
def test_parse_reverses_emit(case: tuple[int, Single | Report | Query]) -> None:
    size, message = case
    assert parse(message.emit(), size) == message


@given(st.binary(max_size=80), SIZES, st.booleans())
def test_parses_or_malformed(data: bytes, size: int, sealed: bool) -> None:
    if sealed and len(data) > 4:  # so that the checksum does not stop it
        data = data[:2] + bytes(2) + data[4:]
        data = data[:2] + checksum(data).to_bytes(2, "big") + data[4:]
    try:
        message = parse(data, size)
    except Malformed:
        return
    assert parse(message.emit(), size) == message


def test_kinds_of_records() -> None:
    assert [IS_INCLUDE, IS_EXCLUDE, TO_INCLUDE, TO_EXCLUDE, ALLOW, BLOCK] == [1, 2, 3, 4, 5, 6]
