"""The holder of the configuration: who is told, in which order, what a fault costs. No copy of it gets stale.

The second half replaces the configuration of everything that `wiring` builds, and looks for what is left of the former
one, in two ways: no object may refer to a part of it, and all objects must have the values that they would have if they
had been made with the new one.
"""

from __future__ import annotations

import gc
import socket
import types
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast
from zlib import crc32

import pytest

from passt import PASST, PASTA, addr, log
from passt.daemon import wiring
from passt.flow.context import Context
from passt.flow.table import Flow
from passt.link import choose
from passt.linux.netns import Namespace
from passt.linux.tun import Tap as Device
from passt.policy.config import Config, Ip4, Ip6
from passt.policy.guest import Guest
from passt.policy.rules import Rule
from passt.policy.settings import Settings
from passt.ports.forwards import Add, Clear, Forwards
from passt.ports.sockets import NO_SOCKETS
from passt.wire.checksum import PROTO_TCP, PROTO_UDP
from tests.unit.support import CONFIG, GUEST_MAC, T0, FakeReactor, FakeTimers

OTHER = replace(CONFIG, mtu=1280)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Warnings."""
    lines: list[str] = []
    monkeypatch.setattr(log, "_held", {})
    monkeypatch.setattr(log, "_write", lambda level, text: lines.append(text))
    return lines


# The holder ----------------------------------------------------------------------------------------------------------


def test_a_cache_is_filled_at_once_and_with_each_change() -> None:
    settings, seen = Settings(CONFIG), list[Config]()
    settings.subscribe(seen.append)
    assert seen == [CONFIG]
    settings.replace(OTHER, T0)
    assert seen == [CONFIG, OTHER] and settings.current is OTHER


def test_an_equal_configuration_is_no_change() -> None:
    settings, seen = Settings(CONFIG), list[Config]()
    settings.subscribe(seen.append)
    settings.react(lambda former, now: seen.append(former))
    settings.replace(replace(CONFIG), T0)
    assert len(seen) == 1 and settings.current is CONFIG


def test_consequences_come_when_all_caches_are_filled() -> None:
    settings, seen = Settings(CONFIG), list[object]()
    settings.react(lambda former, now: seen.append((former, settings.current, now)))
    for _ in range(2):
        settings.subscribe(seen.append)
    seen.clear()
    settings.replace(OTHER, T0 + 1)
    assert seen == [OTHER, OTHER, (CONFIG, OTHER, T0 + 1)]


def test_a_fault_of_one_does_not_keep_the_others_from_being_told(said: list[str]) -> None:
    drops = Counter[str]()
    settings, seen = Settings(CONFIG, drops), list[object]()

    def fail(*args: object) -> None:
        if seen:
            raise ZeroDivisionError("a defect of ours")

    settings.subscribe(fail)
    settings.react(fail)
    settings.subscribe(seen.append)
    settings.react(lambda former, now: seen.append(now))
    settings.replace(OTHER, T0)
    assert seen == [CONFIG, OTHER, T0]
    assert drops == {"fault": 2}
    (line,) = said  # the second one within a second is held back
    assert line.startswith("Handling a change of the configuration by test_a_fault_of_one")
    assert line.endswith("fail failed: ZeroDivisionError('a defect of ours')")


def test_a_fault_at_start_is_raised() -> None:
    settings = Settings(CONFIG)
    with pytest.raises(ZeroDivisionError):
        settings.subscribe(lambda config: [1 // 0])  # type: ignore[arg-type]
    settings.replace(OTHER, T0)  # without a subscriber


def test_a_subscriber_cannot_replace_the_configuration(said: list[str]) -> None:
    """Those told before it would have another one than those told after it."""
    drops = Counter[str]()
    settings, seen = Settings(CONFIG, drops), list[Config]()
    settings.react(lambda former, now: settings.replace(CONFIG, now))
    settings.replace(OTHER, T0)
    assert settings.current is OTHER and drops == {"fault": 1}
    settings.subscribe(seen.append)
    settings.replace(replace(OTHER, mtu=1400), T0)
    assert [config.mtu for config in seen] == [1280, 1400], "and it may be replaced again"


def test_a_subscriber_that_comes_during_a_change_is_called_once() -> None:
    settings, seen = Settings(CONFIG), list[Config]()
    settings.react(lambda former, now: settings.subscribe(seen.append))
    settings.replace(OTHER, T0)
    assert seen == [OTHER]


# Stale copies --------------------------------------------------------------------------------------------------------


def _ip4(n: int) -> Ip4:
    def a(last: int) -> bytes:
        return addr.packed(f"10.0.{n}.{last}")

    return Ip4(a(2), 20 + n, a(1), a(3), a(4), a(5), (a(6), a(7)), a(8), f"eth{n}", n, bool(n & 1), a(9))


def _ip6(n: int) -> Ip6:
    def a(last: int) -> bytes:
        return addr.packed(f"2001:db8:{n}::{last}")

    return Ip6(a(2), 60 + n, a(1), a(3), a(4), a(5), (a(6), a(7)), a(8), f"eth{n}", n, bool(n & 1), a(9))


def _rules(n: int) -> tuple[Rule, ...]:
    """One with a target behind the guest of each family; no sockets are opened for these."""
    targets = addr.packed(f"10.0.{n}.20"), addr.packed(f"2001:db8:{n}::20")
    return tuple(Rule(f"-t {n}", PROTO_TCP, False, n, n, n, target=target) for target in targets)


def _config(n: int) -> Config:
    odd = bool(n & 1)
    return Config(
        mode=PASST if odd else PASTA,
        ip4=_ip4(n),
        ip6=_ip6(n),
        our_mac=bytes((0x9A, 0x55, 0, 0, 0, n)),
        mtu=1300 + n,
        busy_poll=n,
        scope_id=n,
        dns_search=(f"{n}.test",),
        dns_match=(addr.packed(f"10.0.{n}.53"),),
        dns_hosts=(addr.packed(f"10.1.{n}.53"),),
        hostname=f"h{n}",
        fqdn=f"h{n}.test",
        forwards=_rules(n),
        interfaces=((f"eth{n}", n),),
        dns_scopes=((addr.packed("fe80::53"), n),),
        altnames=((f"alternative{n}", f"eth{n}"),),
        **{f.name: odd for f in fields(Config) if f.type == "bool"},
    )


OLD, NEW = (2, 3)


def test_every_field_differs() -> None:
    """A field that is new in `Config` needs values in `_config`."""
    old, new = _config(OLD), _config(NEW)
    for a, b in ((old, new), (old.ip4, new.ip4), (old.ip6, new.ip6)):
        assert a is not None and b is not None
        assert not [f.name for f in fields(a) if getattr(a, f.name) == getattr(b, f.name)]


@dataclass
class Wired:
    """All that `wiring` makes of a configuration."""

    ctx: Context
    forwards: Forwards
    roots: tuple[Any, ...]


Make = Callable[[Config], Wired]


class Timers(FakeTimers):
    """Those of services have numbers that do not depend on who else has one. They never fire."""

    def __init__(self) -> None:
        super().__init__()
        self.services = cast(Any, self)

    def new(self, callback: Callable[[float], None]) -> int:
        return crc32(callback.__qualname__.encode())

    def arm(self, timer: int, deadline: float) -> None: ...


class Chosen:
    """The part of a decision that `wire` reads."""

    def __init__(self, config: Config) -> None:
        self.config = config


@pytest.fixture(params=["pasta", "passt", "splice only"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Make]:
    """Everything, without an epoll instance and timers, so that equal things have equal numbers."""
    monkeypatch.setattr(wiring, "Reactor", FakeReactor)
    monkeypatch.setattr(wiring, "TimerPool", lambda reactor: Timers())
    made: list[Wired] = []
    device, guest = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    def begin(config: Config) -> Wired:
        decision = cast(Any, Chosen(config))
        if request.param == "passt":
            wired = wiring.wire(decision, choose.for_machine(), GUEST_MAC, None, NO_SOCKETS, NO_SOCKETS)
        else:
            tap = Device(device.fileno(), "tap0", csum=True, tso=True, uso=True) if request.param == "pasta" else None
            link = choose.for_device(tap) if tap else None
            wired = wiring.wire(decision, link, GUEST_MAC, Namespace(-1), NO_SOCKETS, NO_SOCKETS)
        made.append(Wired(wired.ctx, wired.forwards, tuple(wired)))
        return made[-1]

    with device, guest:
        yield begin
    for wired in made:
        wired.forwards._listeners.close()
        wired.ctx.reactor.close_retired()


def _named(obj: Any) -> dict[int, str]:
    """Names of what an object refers to by an attribute or a key, by identity."""
    names = {id(v): f".{k}" for k, v in getattr(obj, "__dict__", {}).items()}
    for kind in type(obj).__mro__:
        for slot in getattr(kind, "__slots__", ()):
            name = slot if isinstance(slot, str) else ""
            if hasattr(obj, name):
                names[id(getattr(obj, name))] = f".{name}"
    return names


def _referents(obj: Any) -> list[Any]:
    """Attributes, slots, items, closures, what a method is bound to; not what a module has."""
    if isinstance(obj, types.FunctionType):
        return [obj.__closure__, obj.__defaults__, obj.__kwdefaults__]
    return gc.get_referents(obj)


def reachable(*roots: Any) -> Iterator[tuple[Any, str]]:
    """Every object, and a way to it. Flows keep what they were made with."""
    seen: set[int] = set()
    waiting = deque((root, type(root).__name__) for root in roots)
    while waiting:
        obj, path = waiting.popleft()
        if id(obj) in seen or isinstance(obj, type | types.ModuleType | Flow | None):
            continue
        seen.add(id(obj))
        yield obj, path
        names = _named(obj)
        for other in _referents(obj):
            waiting.append((other, f"{path}{names.get(id(other)) or f' -> {type(other).__name__}'}"))


def parts(config: Config) -> dict[int, str]:
    """By identity: the configuration, and what it consists of, as far as nobody else can have it."""
    found = {id(config): "Config"}
    for owner in (config, config.ip4, config.ip6):
        if owner is not None:
            for f in fields(owner):
                value = getattr(owner, f.name)
                if isinstance(value, tuple | Ip4 | Ip6) and value:
                    found[id(value)] = f"{type(owner).__name__}.{f.name}"
    return found


def left_of(former: Config, *roots: Any) -> list[str]:
    """Ways to what is left of a configuration."""
    sought = parts(former)
    return [f"{path} ({sought[id(obj)]})" for obj, path in reachable(*roots) if id(obj) in sought]


def test_nobody_keeps_the_former_configuration(make: Make) -> None:
    former = _config(OLD)
    wired = make(former)
    settings = wired.ctx.settings
    assert left_of(former, *wired.roots), "it is found as long as it is in force"
    settings.replace(_config(NEW), T0 + 1)
    assert not left_of(former, *wired.roots)
    assert not wired.ctx.drops


def test_nobody_keeps_former_rules(make: Make) -> None:
    """By the way that rules change."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    rule = Rule(f"-t {port}", PROTO_TCP, False, port, port, port, target=addr.packed("10.0.9.20"))
    former = replace(_config(OLD), forwards=(replace(rule, proto=PROTO_UDP),))
    wired = make(former)
    wired.forwards.change([Clear(), Add(rule)], T0 + 1)
    assert wired.ctx.config == replace(former, forwards=(rule,))
    assert not [way for way in left_of(former, *wired.roots) if "forwards" in way.rpartition("(")[2]]
    wired.forwards.change([Clear()], T0 + 2)
    assert wired.ctx.config.forwards == ()


@pytest.mark.parametrize("hide", ["slot", "closure", "partial", "method", "container"])
def test_the_search_finds_copies(hide: str) -> None:
    """Wherever they are."""
    former = _config(OLD)
    ip4 = former.ip4

    class Holder:
        __slots__ = ("kept",)
        kept: Any

        def method(self) -> None: ...

    inner, holder = Holder(), Holder()
    inner.kept = ip4
    holder.kept = {
        "slot": inner,
        "closure": lambda: ip4,
        "partial": partial(print, ip4),
        "method": inner.method,
        "container": {1: [({"x": ip4},)]},
    }[hide]
    (found,) = (way for way in left_of(former, holder) if way.endswith("(Config.ip4)"))
    assert found.startswith("Holder.kept")


# Derived values ------------------------------------------------------------------------------------------------------

# Attributes that do not follow the configuration, by class
APART = {
    ("Ndp", "_timer"): "goes on when there is nothing to advertise any more, and finds nothing to do",
    ("Dhcpv6", "server_id"): "stays the same when the link-layer address changes (RFC 8415, 11.2)",
    ("Forwards", "_table"): "the rules' writer, which numbers them",
}
SKIPPED = (type, types.ModuleType, Flow, Guest, memoryview, bytearray)  # a guest is where it was last seen
PLAIN = (bool, int, float, str, bytes, frozenset, set, type(None))


def _attributes(obj: Any) -> dict[str, Any]:
    found = dict(getattr(obj, "__dict__", {}))
    for kind in type(obj).__mro__:
        for slot in getattr(kind, "__slots__", ()):
            if hasattr(obj, slot):
                found[slot] = getattr(obj, slot)
    return found


def _inside(obj: Any) -> dict[str, Any] | None:
    """The parts of an object by name, None if it is compared as a whole."""
    if isinstance(obj, PLAIN):
        return None
    if isinstance(obj, dict):
        return {f"[{key!r}]": value for key, value in obj.items()}
    if isinstance(obj, list | tuple | deque):
        return {f"[{i}]": value for i, value in enumerate(obj)}
    if isinstance(obj, types.FunctionType):
        cells = (cell.cell_contents for cell in obj.__closure__ or ())
        return {f".{name}": value for name, value in zip(obj.__code__.co_freevars, cells, strict=True)}
    if isinstance(obj, types.MethodType):
        return {".__self__": obj.__self__}
    if isinstance(obj, partial):
        return {".func": obj.func, ".args": obj.args, ".keywords": obj.keywords}
    kind = type(obj).__name__
    return {f".{k}": v for k, v in _attributes(obj).items() if (kind, k) not in APART}


def differences(a: Any, b: Any) -> dict[str, str]:
    """Where two things that were made alike differ: how, by way."""
    found: dict[str, str] = {}
    seen: set[tuple[int, int]] = set()
    waiting = deque([(a, b, type(a).__name__)])
    while waiting:
        a, b, path = waiting.popleft()
        if a is b or (id(a), id(b)) in seen or isinstance(a, SKIPPED):
            continue
        seen.add((id(a), id(b)))
        inside, other = _inside(a), _inside(b)
        if type(a) is not type(b) or inside is None or other is None:
            if a != b:
                found[path] = f"{a!r} and {b!r}"
            continue
        if inside.keys() != other.keys():
            found[path] = f"{inside.keys() ^ other.keys()}"
        waiting.extend((inside[k], other[k], path + k) for k in inside.keys() & other.keys())
    return found


@pytest.mark.parametrize("how", [{}, {"ip4": None}, {"ip6": None}, {"mtu": 0}, {"ip6": None, "mtu": 0}])
@pytest.mark.parametrize("from_none", [False, True])
def test_all_is_as_if_it_had_been_so_from_the_start(make: Make, how: dict[str, Any], from_none: bool) -> None:
    """Also what was derived from the configuration: numbers, flags, sets."""
    before, after = _config(OLD), replace(_config(NEW), **how)
    if from_none:
        before = replace(before, ip4=None, ip6=None)
    wired, twin, other = make(before), make(after), make(after)
    chance = differences(twin.roots, other.roots)  # random numbers, descriptors, addresses in memory
    assert differences(wired.roots, twin.roots).keys() - chance.keys(), "they differ to begin with"
    wired.ctx.settings.replace(after, T0)
    assert not wired.ctx.drops
    found = differences(wired.roots, twin.roots)
    assert not found.keys() - chance.keys(), {path: found[path] for path in found.keys() - chance.keys()}
