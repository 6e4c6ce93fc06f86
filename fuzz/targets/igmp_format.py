"""Messages of IGMP and MLD.

Invariants: parsing gives a message or `Malformed`; what is emitted is parsed as the same message. The first byte is the
family. The checksum of a message of IGMP is made to be right, so that it stops nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

from passt import addr
from passt.wire import igmp
from passt.wire.checksum import checksum
from passt.wire.cursor import Malformed
from passt.wire.igmp import ALLOW, LEAVE_V2, REPORT6_V1, REPORT_V2, TO_EXCLUDE, Query, Record, Report, Single

GROUP, SOURCE = addr.packed("232.1.2.3"), addr.packed("192.0.2.9")
GROUP6, SOURCE6 = addr.packed("ff3e::9"), addr.packed("2001:db8::9")
V6 = 1


def seeds() -> Iterable[bytes]:
    for group, source, single in ((GROUP, SOURCE, REPORT_V2), (GROUP6, SOURCE6, REPORT6_V1)):
        size = len(group)
        family = bytes((size == 16,))
        yield family + Report(size, (Record(ALLOW, group, (source,)), Record(TO_EXCLUDE, group))).emit()
        yield family + Single(single, group).emit()
        yield family + Query(group, 10, sources=(source,)).emit()
    yield b"\0" + Single(LEAVE_V2, GROUP).emit()


def one(data: bytes) -> None:
    if not data:
        return
    size, message = 16 if data[0] & V6 else 4, data[1:]
    if size == 4 and len(message) > 4:
        message = message[:2] + bytes(2) + message[4:]
        message = message[:2] + checksum(message).to_bytes(2, "big") + message[4:]
    try:
        parsed = igmp.parse(message, size)
    except Malformed:
        return
    assert igmp.parse(parsed.emit(), size) == parsed
