"""`Tap.batch`: frames of any content in one batch, with services that only note what they were called with.

Invariants: nothing is raised; every frame is handed on, kept as a fragment, or counted as a drop: exactly one of them;
what the services get is the same whatever lies in memory around the frames.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from fuzz import frames
from fuzz.steps import Steps
from passt.link.packet import FRAME_ROOM
from passt.link.reassembly import Reassembly
from passt.policy.guest import Guest
from passt.tap import Tap
from passt.wire import dhcp, dhcpv6, icmp, ndp
from passt.wire.ether import TYPE_ARP
from tests.unit.support import GUEST4, GUEST6, GUEST_LL, GUEST_MAC, T0, make_context

POOL = 1 << 14
FILLS = bytes(POOL + FRAME_ROOM), bytes(b"\xff\x11\x45\x86\xdd" * (POOL + FRAME_ROOM))[: POOL + FRAME_ROOM]
BATCH_MAX = POOL - 5000


class Service:
    """Any of them."""

    def __init__(self, name: str) -> None:
        self.name = name

    def tap_handler(self, *args: Any) -> None:
        CALLS.append((self.name, *(bytes(a) if isinstance(a, memoryview) else a for a in args)))

    def fault_key(self, key: bytes) -> None:
        raise AssertionError("a fault")


class Flows(Service):
    """TCP and UDP: offsets are replaced by what lies there. `width`: numbers for each segment."""

    def __init__(self, name: str, width: int) -> None:
        super().__init__(name)
        self.width = width

    def tap_handler(self, *args: Any) -> None:
        key, flat, *more = args
        for i in range(0, len(flat), self.width):
            CALLS.append((self.name, key, CTX.pool.copy(flat[i], flat[i + 1]), *flat[i + 2 : i + self.width], *more))

    def set_class(self, key: bytes) -> None:
        CLASSES.append((key, CTX.classes[key]))

    def forget_class(self, key: bytes) -> None:
        assert key in CTX.classes, "it was set"

    def fault_key(self, key: bytes) -> None:
        raise AssertionError(f"{self.name} did not fail")


CALLS: list[tuple[Any, ...]] = []
CLASSES: list[tuple[bytes, int]] = []
CTX = make_context(pool_size=POOL)
TAP = Tap(CTX, udp=cast(Any, Flows("udp", 3)), tcp=cast(Any, Flows("tcp", 2)))


def register() -> None:
    """As the services do themselves."""
    take = CTX.services
    take.take_ethertype(TYPE_ARP, Service("arp").tap_handler)
    take.take_port(True, dhcp.SERVER_PORT, Service("dhcp").tap_handler)
    take.take_port(False, dhcpv6.SERVER_PORT, Service("dhcpv6").tap_handler)
    take.take_icmp(True, (icmp.ECHO_REQUEST,), Service("icmp").tap_handler, fragments=True)
    take.take_icmp(False, (icmp.ECHO_REQUEST6,), Service("icmp").tap_handler, fragments=True)
    take.take_icmp(False, ndp.TYPES, Service("ndp").tap_handler)


register()


def fault(what: str, e: Exception, now: float) -> None:
    raise e


TAP._fault = fault  # type: ignore[method-assign]


def seeds() -> Iterable[bytes]:
    for first in range(0, len(frames.VALID), 3):
        yield frames.program(*(w for w in range(first, first + 3) if w < len(frames.VALID)))
    fragments = range(len(frames.VALID) - 16, len(frames.VALID))
    yield frames.program(*fragments)
    yield bytes((frames.RAW, 30)) + bytes(30)


def outcome(batch: list[bytes], fill: bytes) -> tuple[Any, ...]:
    pool, guest = CTX.pool, CTX.guest
    pool.buf[:] = fill
    CTX.drops.clear()
    TAP._reassembly = Reassembly(CTX.drops)
    fresh = Guest(mac=GUEST_MAC, addr4=GUEST4, addr6=GUEST6, addr6_ll=GUEST_LL)
    for name in fresh.__slots__:
        setattr(guest, name, getattr(fresh, name))
    CTX.neighbours._several = False
    TAP._sent_by(GUEST_MAC)
    CALLS.clear()
    CLASSES.clear()
    CTX.classes.clear()
    flat: list[int] = []
    at = 16
    for frame in batch:
        pool.buf[at : at + len(frame)] = frame
        flat += (at, at + len(frame))
        at += len(frame)
    TAP.batch(flat, T0)
    kept = {key: (p.parts, p.spoiled) for key, p in TAP._reassembly._packets.items()}
    seen = (guest.mac, guest.addr4, guest.addr6, guest.addr6_ll)
    return list(CALLS), list(CLASSES), dict(guest.macs), dict(CTX.drops), kept, seen


def one(data: bytes) -> None:
    steps = Steps(data)
    batch: list[bytes] = []
    size = 0
    while steps.left > 0 and len(batch) < 24 and size < BATCH_MAX:
        batch.append(frames.frame(steps))
        size += len(batch[-1])
    if not batch:
        return
    found = outcome(batch, FILLS[0])
    calls, classes, _, drops, kept, _ = found
    assert found == outcome(batch, FILLS[1]), "what lies outside the frames made a difference"
    if not drops:
        assert {key for key, _ in classes} <= {c[1] for c in calls if c[0] == "tcp"}, "a class of no connection"
    if not kept and not any(reason.startswith("fragment") for reason in drops):
        whole = [c for c in calls if c[0] not in ("udp", "icmp")]  # those may be of several fragments
        assert len(whole) <= len(batch)
        assert len(calls) + sum(drops.values()) <= len(batch)
