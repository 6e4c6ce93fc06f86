"""Rules that change: all of a request or nothing of it, with real sockets; what stays, what ends, what is said."""

from __future__ import annotations

import errno
import re
import resource
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from passt import addr
from passt.conf.ports import parse_spec
from passt.policy.config import Config
from passt.policy.rules import Listener, Rule
from passt.ports import forwards
from passt.ports.forwards import Add, Change, Clear, Delete, DeleteNumber, Forwards, Outcome, Refused
from passt.ports.listen import Listeners
from passt.ports.scan import INTERVAL, Scanner
from passt.ports.sockets import RESERVE, Failure, Wanted, open_ports
from passt.wire.checksum import PROTO_UDP

from ..support import T0, free_ports, make_context, reactor, timers
from .test_listen import Taker


def rules(text: str) -> tuple[Rule, ...]:
    """ "-t 80 -u 53-54" """
    words = text.split()
    return tuple(r for letter, spec in zip(words[::2], words[1::2], strict=True) for r in parse_spec(letter[1], spec))


def add(text: str) -> list[Change]:
    return [Add(rule) for rule in rules(text)]


def delete(text: str) -> list[Change]:
    return [Delete(rule) for rule in rules(text)]


class Namespace:
    """One that is this one, too."""

    def run(self, function: Callable[[], Any]) -> Any:
        return function()


class Bound:
    """Ports that are bound at a side."""

    def __init__(self) -> None:
        self.ports = set[int]()

    def bound(self, proto: int) -> set[int]:
        return self.ports

    def pinned(self, proto: int) -> set[tuple[bytes, int]]:
        return set()


class Rig:
    """Rules as they are at start, listened on."""

    def __init__(self, text: str, *, namespace: bool = True) -> None:
        self.ctx = make_context(forwards=rules(text))
        self.udp_in = Taker()
        opened: list[Listener] = []
        wanted = [(r, p) for r in self.ctx.config.forwards if not r.auto for p in r.ports]
        open_ports(self.ctx.config, wanted, opened)
        self.listeners = Listeners(
            self.ctx,
            tcp=Taker(),  # type: ignore[arg-type]
            tcp_splice=Taker(),  # type: ignore[arg-type]
            udp_in=self.udp_in,  # type: ignore[arg-type]
            namespace=Namespace() if namespace else None,  # type: ignore[arg-type]
            opened=opened,
        )
        self.ns = Bound()
        self.scanner = Scanner(self.ctx, self.listeners, None, self.ns if namespace else None)  # type: ignore[arg-type]
        self.forwards = Forwards(self.ctx, self.listeners, self.scanner)

    def change(self, *changes: Sequence[Change]) -> Outcome:
        return self.forwards.change([c for some in changes for c in some], T0)

    def shown(self) -> dict[int, str]:
        return {number: rule.spec for number, rule in self.forwards.rules.items()}

    def open(self) -> list[str]:
        """The open ports, with the rules that they belong to, as far as the sockets know."""
        found = [li for li in self.listeners._by_index if li is not None]
        assert all(li.sock.getsockname()[1] == li.port and li.to == li.rule.target_port(li.port) for li in found)
        assert all(li.port in self.forwards.ports(li.rule) for li in found)
        return sorted({f"{li.rule.spec[:2]} {li.port}:{li.to}" for li in found})

    def close(self) -> None:
        self.listeners.close()
        reactor(self.ctx).end_turn(T0)


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(text: str = "-t none", **how: Any) -> Rig:
        made.append(Rig(text, **how))
        return made[-1]

    yield make
    for r in made:
        r.close()


@pytest.fixture
def port() -> int:
    """The first of twenty."""
    return free_ports(20)


Make = Callable[..., Rig]


def is_free(port: int, kind: int = socket.SOCK_STREAM) -> bool:
    """Whether the port can be bound in any family, by a program without SO_REUSEADDR."""
    with socket.socket(socket.AF_INET6, kind) as s:
        try:
            s.bind(("::", port))
        except OSError:
            return False
    return True


def taken(port: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Another program that has the port."""
    s = socket.socket(socket.AF_INET6, kind)
    s.bind(("::", port))
    if kind == socket.SOCK_STREAM:
        s.listen()
    return s


def refused(r: Rig, *changes: Sequence[Change]) -> Refused:
    """A request that must change nothing."""
    before, was_open, fds = r.shown(), r.open(), set(reactor(r.ctx).refs)
    with pytest.raises(Refused) as e:
        r.change(*changes)
    assert (r.shown(), r.open()) == (before, was_open)
    assert set(reactor(r.ctx).refs) == fds or len(reactor(r.ctx).refs) == len(fds)
    return e.value


# Adding and deleting -------------------------------------------------------------------------------------------------


def test_the_beginning(rig: Make, port: int) -> None:
    r = rig(f"-t {port}:80,{port + 1} -u {port}")
    assert r.shown() == {1: f"-t {port}:80", 2: f"-t {port + 1}", 3: f"-u {port}"}


def test_ports_come_and_go(rig: Make, port: int) -> None:
    r = rig()
    done = r.change(add(f"-t {port}:80 -u {port + 1}-{port + 2} -T {port + 3}"))
    assert list(done.added) == [1, 2, 3] and not done.removed and not done.present
    assert r.open() == [f"-T {port + 3}:{port + 3}", f"-t {port}:80", *(f"-u {p}:{p}" for p in (port + 1, port + 2))]
    done = r.change(delete(f"-t {port}:80 -u {port + 1}-{port + 2} -T {port + 3}"))
    assert list(done.removed) == [1, 2, 3]
    assert not r.open() and not r.shown() and is_free(port) and is_free(port + 1, socket.SOCK_DGRAM)


def test_deleting_by_number(rig: Make, port: int) -> None:
    r = rig(f"-t {port},{port + 1}")
    r.change([DeleteNumber(1)])
    assert r.shown() == {2: f"-t {port + 1}"} and is_free(port)
    assert refused(r, [DeleteNumber(1)]).lines == ["There is no rule with the number 1"]


def test_there_already(rig: Make, port: int) -> None:
    r = rig(f"-t {port}-{port + 4}")
    done = r.change(add(f"-t {port}-{port + 4} -t {port + 2} -u {port} -u {port}"))
    assert [rule.spec for rule in done.present] == [f"-t {port}-{port + 4}", f"-t {port + 2}", f"-u {port}"]
    assert list(done.added) == [2] and not done.removed


def test_a_part_of_a_range_goes(rig: Make, port: int) -> None:
    r = rig(f"-t {port}-{port + 2}:80-82 -u {port}-{port + 2}")
    fds = set(reactor(r.ctx).refs)
    r.change(delete(f"-t {port + 1}:81 -u {port + 1}"))
    assert r.shown() == {1: f"-t {port}:80", 2: f"-u {port}", 3: f"-t {port + 2}:82", 4: f"-u {port + 2}"}
    assert r.open() == [f"-t {port}:80", f"-t {port + 2}:82", f"-u {port}:{port}", f"-u {port + 2}:{port + 2}"]
    assert is_free(port + 1) and is_free(port + 1, socket.SOCK_DGRAM)
    assert set(reactor(r.ctx).refs) < fds, "the rest has the sockets that it had"
    assert [what for what in r.udp_in.ports if what[1] == "end"] == [(port + 1, "end")]


def test_what_is_not_there_is_named(rig: Make, port: int) -> None:
    r = rig(f"-t {port}:80")
    assert refused(r, delete(f"-u {port}")).lines == [f"Port {port} of '-u {port}' is not forwarded"]
    (line,) = refused(r, add(f"-t {port + 1}"), delete(f"-t {port}")).lines
    assert line == f"Port {port} of '-t {port}' is not forwarded so: there is '-t {port}:80'"
    assert is_free(port + 1)


def test_clear(rig: Make, port: int) -> None:
    r = rig(f"-t {port} -u {port} -T {port + 1} -U {port + 1}")
    r.change([Clear(outbound=False, proto=PROTO_UDP)])
    assert list(r.shown()) == [1, 3, 4]
    r.change([Clear(outbound=True)])
    assert list(r.shown()) == [1]
    r.change([Clear()])
    assert not r.shown() and not r.open()
    assert r.change([Clear()]) == Outcome()


# One port, another rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["t", "u"])
def test_leading_elsewhere_keeps_the_socket(rig: Make, port: int, letter: str) -> None:
    r = rig(f"-{letter} {port}:80")
    (fd,) = reactor(r.ctx).refs
    r.change(delete(f"-{letter} {port}:80"), add(f"-{letter} {port}:81"))
    assert list(reactor(r.ctx).refs) == [fd] and r.open() == [f"-{letter} {port}:81"]
    assert r.shown() == {2: f"-{letter} {port}:81"}
    what = [] if letter == "t" else ["begin", "end", "begin"]
    assert [w for _, w in r.udp_in.ports] == what, "UDP flows that lead to where it led"


@pytest.mark.parametrize("letter", ["t", "u"])
def test_listening_otherwise(rig: Make, port: int, letter: str) -> None:
    """The old socket is in the way of the new one."""
    r = rig(f"-{letter} 127.0.0.1/{port}")
    r.change([Clear()], add(f"-{letter} {port}"))
    assert r.shown() == {2: f"-{letter} {port}"}
    ((name, *_),) = [li.sock.getsockname() for li in r.listeners._by_index if li]
    assert name == "::"


def test_listening_otherwise_in_vain(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig(f"-t 127.0.0.1/{port},{port + 1}")
    with taken(port + 2):
        lines = refused(r, [Clear()], add(f"-t {port}-{port + 2}")).lines
    assert lines == [f"Failed to bind port {port + 2} (Address already in use) for option '-t {port}-{port + 2}'"]
    with socket.create_connection(("127.0.0.1", port)):
        pass


def test_what_was_in_the_way_may_be_lost(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig(f"-t 127.0.0.1/{port}")
    monkeypatch.setattr(r.listeners, "open", lambda wanted: ([], [Failure(x, p, errno.EADDRINUSE) for x, p in wanted]))
    with pytest.raises(Refused) as e:
        r.change([Clear()], add(f"-t {port}"))
    assert e.value.lines[-1] == (
        f"Meanwhile another program took port {port} of '-t 127.0.0.1/{port}': Address already in use"
    )


# Failure -------------------------------------------------------------------------------------------------------------


def test_all_or_nothing(rig: Make, port: int) -> None:
    r = rig(f"-t {port}")
    with taken(port + 3), taken(port + 5, socket.SOCK_DGRAM):
        e = refused(r, add(f"-t {port + 1}-{port + 3} -u {port + 5} -T {port + 7}"), delete(f"-t {port}"))
    assert e.lines == [
        f"Failed to bind port {port + 3} (Address already in use) for option '-t {port + 1}-{port + 3}'",
        f"Failed to bind port {port + 5} (Address already in use) for option '-u {port + 5}'",
    ]
    assert [(f.port, f.errno) for f in e.failures] == [(port + 3, errno.EADDRINUSE), (port + 5, errno.EADDRINUSE)]
    assert all(is_free(p) for p in (port + 1, port + 2, port + 7))


@pytest.mark.parametrize("letter", ["t", "u"])
def test_nothing_is_given_up_if_what_is_new_cannot_be_watched(
    rig: Make, port: int, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = {"t": socket.SOCK_STREAM, "u": socket.SOCK_DGRAM}[letter]
    r = rig(f"-{letter} {port},{port + 1}:7")
    before, watch = r.open(), r.ctx.reactor.watch
    left = iter((True,))

    def few(*args: int) -> int:
        if not next(left, False):
            raise OSError(errno.ENOSPC, "No space left on device")
        return watch(*args)

    monkeypatch.setattr(r.ctx.reactor, "watch", few)
    error = refused(
        r, delete(f"-{letter} {port}"), delete(f"-{letter} {port + 1}:7"), add(f"-{letter} {port + 2}-{port + 4}")
    )
    assert error.lines == ["Couldn't watch new ports: No space left on device"]
    assert r.open() == before and list(r.shown().values()) == [f"-{letter} {port}", f"-{letter} {port + 1}:7"]
    reactor(r.ctx).end_turn(T0)
    assert all(is_free(port + i, kind) for i in (2, 3, 4))
    monkeypatch.undo()
    r.change(add(f"-{letter} {port + 2}-{port + 4}"))
    assert len(r.open()) == 5


def test_low_ports(rig: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig()

    def denied(config: Config, wanted: Sequence[Wanted], into: list[Listener]) -> list[Failure]:
        return [Failure(rule, port, errno.EACCES) for rule, port in wanted]

    monkeypatch.setattr("passt.ports.listen.open_ports", denied)
    assert refused(r, add("-t 80")).lines == [
        "Failed to bind port 80 (Permission denied) for option '-t 80'",
        "To let all users bind ports from 80 up: sysctl -w net.ipv4.ip_unprivileged_port_start=80",
    ]


def add_one(text: str) -> Wanted:
    """The only port of a rule."""
    (rule,) = rules(text)
    return rule, rule.first


def test_no_descriptors(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig()
    line = f"Can't open enough sockets for port specifier: -t {port} "

    def full(config: Config, wanted: Sequence[Wanted], into: list[Listener]) -> list[Failure]:
        return [Failure(rule, port, errno.EMFILE) for rule, port in wanted]

    with monkeypatch.context() as m:
        m.setattr("passt.ports.listen.open_ports", full)
        assert refused(r, add(f"-t {port}")).lines[0].startswith(line)
        assert refused(r, add(f"-t {port}")).failures == [Failure(*add_one(f"-t {port}"), errno.EMFILE)]
    for limit in (2, 6):
        r.forwards._limit = limit
        (told,) = refused(r, add(f"-t {port}")).lines
        assert told == f"{line}(the limit of descriptors is {limit}: start with a higher one, ulimit -Hn)"
    assert is_free(port), "what is left is for traffic"


@pytest.mark.parametrize("letter", ["t", "u", "T", "U"])
def test_more_ports_than_descriptors_are_refused_before_anything_is_opened(
    rig: Make, letter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rig("-t 5")
    r.forwards._limit = 4096
    for name in ("passt.ports.listen.open_ports", "passt.ports.forwards.Forwards._plan"):
        monkeypatch.setattr(name, lambda *_: pytest.fail("work"))
    (line,) = refused(r, add(f"-{letter} 2000-60000")).lines
    ports = 58001 * (2 if letter in "TU" else 1) + 1
    assert line == (
        f"Can't open enough sockets for port specifier: -{letter} 2000-60000 (needs {ports + RESERVE} "
        "descriptors, the limit is 4096: start with a higher one, ulimit -Hn)"
    )


@pytest.mark.parametrize("spec", ["-t 2000-60000", "-t 1-10000 -u 1-6385"])
def test_one_request_opens_so_many_sockets_at_most(rig: Make, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig()
    r.forwards._limit = resource.RLIM_INFINITY
    monkeypatch.setattr("passt.ports.listen.open_ports", lambda *_: pytest.fail("work"))
    (line,) = refused(r, add(spec)).lines
    assert re.fullmatch(
        r"Ports with (58001|16385) sockets are too many for one request, as traffic would have to wait: "
        r"divide it into requests with 16384 at most",
        line,
    )


def test_as_many_sockets_as_one_request_may_open(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forwards, "OPENED_MAX", 2)
    r = rig()
    assert "divide it into requests with 2 at most" in str(refused(r, add(f"-t {port}-{port + 2}")))
    r.change(add(f"-t {port}-{port + 1}"))
    assert len(r.open()) == 2


def test_a_weak_rule_that_gets_no_port_is_refused(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, _ = add_one(f"-t {port}")
    weak = replace(rule, weak=True)
    failed = [Failure(weak, port, errno.EADDRINUSE)]
    monkeypatch.setattr("passt.ports.listen.open_ports", lambda config, wanted, into: failed if wanted else [])
    why = refused(rig(), [Add(weak)])
    assert why.lines == [f"Failed to bind any port for '-t {port}'"] and why.failures == failed


def test_a_range_around_a_port_that_is_forwarded(rig: Make, port: int) -> None:
    """The rule in force is named as such, whichever begins first."""
    r = rig(f"-t {port + 1}:80")
    assert r.ctx.stats.gauges["forwards"]() == 1
    (line,) = refused(r, add(f"-t {port}-{port + 2}")).lines
    assert line.startswith(
        f"Port {port + 1} is forwarded already, by '-t {port + 1}:80', and asked for by '-t {port}-{port + 2}'"
    )


def test_automatic_ports_whose_side_cannot_be_seen(rig: Make) -> None:
    """The tables of the host are not open; those of the namespace are."""
    (line,) = refused(rig(), add("-T auto")).lines
    assert line == "'-T auto': which ports are bound in the host cannot be found out"


def test_a_refusal_has_its_lines() -> None:
    assert str(Refused(["Port 1 is taken", "Port 2 as well"])) == "Port 1 is taken\nPort 2 as well"


def test_a_given_rule_is_named_before_an_automatic_one(rig: Make, port: int) -> None:
    """Both have the port that is to be deleted with another target."""
    r = rig("-t auto")
    r.change(add(f"-t {port}:81"))
    (line,) = refused(r, delete(f"-t {port}:82")).lines
    assert line.endswith(f"there is '-t {port}:81'")


def test_without_a_namespace(rig: Make) -> None:
    r = rig(namespace=False)
    assert refused(r, add("-T 80")).lines == ["'-T 80' needs a namespace to listen in, and there is none"]
    assert "which ports are bound in the namespace cannot be found out" in str(refused(r, add("-t auto")))


@pytest.mark.parametrize("other", ["127.0.0.1/{}", "{}:81", "%lo/{}"])
def test_overlap_names_both(rig: Make, port: int, other: str) -> None:
    r = rig(f"-t {port}-{port + 3}")
    new = f"-t {other.format(port + 1)}"
    (line,) = refused(r, add(new)).lines
    assert line == (
        f"Port {port + 1} is forwarded already, by '-t {port}-{port + 3}', and asked for by '{new}': "
        f"delete the former, or leave the port out (~{port + 1} excludes it)"
    )


def test_overlap_in_a_request(rig: Make, port: int) -> None:
    (line,) = refused(rig(), add(f"-t {port} -t 127.0.0.1/{port}")).lines
    assert line.startswith(f"Port {port} is asked for twice, by '-t {port}' and by '-t 127.0.0.1/{port}'")


def test_families_do_not_overlap(rig: Make, port: int) -> None:
    r = rig()
    r.change(add(f"-t 0.0.0.0/{port}:80 -t ::/{port}:80"))
    assert len(r.shown()) == 2
    r.change(delete(f"-t ::/{port}:80"))
    assert r.shown() == {1: f"-t 0.0.0.0/{port}:80"}


def test_a_fault_leaves_nothing(rig: Make, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rig(f"-t {port}")
    real = r.listeners.open

    def fail(wanted: Sequence[Wanted]) -> Any:
        if wanted and wanted[0][0].outbound:
            raise ZeroDivisionError
        return real(wanted)

    monkeypatch.setattr(r.listeners, "open", fail)
    with pytest.raises(ZeroDivisionError):
        r.change(add(f"-t {port + 1} -T {port + 2}"))
    assert r.open() == [f"-t {port}:{port}"] and is_free(port + 1)


# Ports that may be left out ------------------------------------------------------------------------------------------


def weak(text: str) -> tuple[Rule, ...]:
    return tuple(replace(rule, weak=True) for rule in rules(text))


def test_weak_rules_take_what_they_get(rig: Make, port: int) -> None:
    r = rig()
    some = weak(f"-t {port}-{port + 2}")
    with taken(port + 1):
        r.change([Add(rule) for rule in some])
        assert r.open() == [f"-t {p}:{p}" for p in (port, port + 2)]
        assert refused(r, [Add(rule) for rule in weak(f"-u {port} -t 0.0.0.0/{port + 1}")])
    r.change([Add(rule) for rule in some])
    assert len(r.open()) == 2, "it is there already"


def test_nothing_of_a_weak_rule(rig: Make, port: int) -> None:
    with taken(port):
        e = refused(rig(), [Add(rule) for rule in weak(f"-t {port}")])
    assert e.lines == [f"Failed to bind any port for '-t {port}'"]


def test_a_part_of_a_weak_rule_goes(rig: Make, port: int) -> None:
    r = rig()
    with taken(port + 1):
        r.change([Add(rule) for rule in weak(f"-t {port}-{port + 2}")])
        r.change(delete(f"-t {port}"))
        assert r.open() == [f"-t {port + 2}:{port + 2}"], "what was left out is not tried again"


def test_a_rule_that_insists_on_what_was_left_out(rig: Make, port: int) -> None:
    r = rig()
    with taken(port + 1):
        r.change([Add(rule) for rule in weak(f"-t {port}-{port + 2}")])
        assert "Address already in use" in refused(r, add(f"-t {port + 1}")).lines[0]
    done = r.change(add(f"-t {port + 1}"))
    assert not done.present and len(r.open()) == 3
    assert not r.change(add(f"-t {port}")).added, "that is there"


# Automatic ones ------------------------------------------------------------------------------------------------------


def test_automatic_rules_come_and_go(rig: Make, port: int) -> None:
    r = rig()
    r.ns.ports = {port}
    r.change(add("-t auto"))
    assert r.open() == [f"-t {port}:{port}"], "at once"
    r.ns.ports = {port + 1}
    timers(r.ctx).services.fire(1, T0 + INTERVAL)
    reactor(r.ctx).end_turn(T0)
    assert r.open() == [f"-t {port + 1}:{port + 1}"]
    r.change(delete("-t auto"))
    assert not r.open() and is_free(port + 1)
    timers(r.ctx).services.fire(1, T0 + 2 * INTERVAL)
    assert timers(r.ctx).services.deadlines[1] is None, "no scan is due"
    r.change(add("-t auto"))
    assert r.open() == [f"-t {port + 1}:{port + 1}"]


def test_automatic_rules_leave_ports_to_others(rig: Make, port: int) -> None:
    r = rig("-t auto")
    r.ns.ports = {port, port + 1}
    r.scanner.start(T0)
    assert len(r.open()) == 2
    r.change(add(f"-t 127.0.0.1/{port}:80"))
    assert r.open() == [f"-t {port}:80", f"-t {port + 1}:{port + 1}"]
    r.change(delete(f"-t 127.0.0.1/{port}:80"))
    assert r.open() == [f"-t {port}:{port}", f"-t {port + 1}:{port + 1}"], "it is automatic again"


def test_an_automatic_rule_that_is_added_again_beside_one_that_takes_its_port(rig: Make, port: int) -> None:
    r = rig("-t auto")
    r.ns.ports |= {port, port + 1}
    r.scanner.start(T0)
    r.change(delete("-t auto"), add("-t auto"), add(f"-t {port}"))
    assert list(r.shown().values()) == ["-t auto", f"-t {port}"]
    assert r.open() == [f"-t {port}:{port}", f"-t {port + 1}:{port + 1}"]


def test_automatic_rules_come_back_after_failure(rig: Make, port: int) -> None:
    r = rig("-t auto")
    r.ns.ports = {port}
    r.scanner.start(T0)
    with taken(port + 1), pytest.raises(Refused):
        r.change(add(f"-t {port}:80,{port + 1}:81"))
    timers(r.ctx).services.fire(1, T0 + INTERVAL)
    assert r.open() == [f"-t {port}:{port}"]


def test_a_part_of_an_automatic_rule(rig: Make, port: int) -> None:
    r = rig("-t auto")
    r.ns.ports = {port, port + 1, port + 2}
    r.scanner.start(T0)
    fds = set(reactor(r.ctx).refs)
    r.change(delete(f"-t auto,{port + 1}"), add(f"-t {port + 2}:80"))
    assert r.open() == [f"-t {port}:{port}", f"-t {port + 2}:80"]
    assert len(fds & set(reactor(r.ctx).refs)) >= 1
    assert list(r.shown().values()) == [f"-t auto,1-{port}", f"-t auto,{port + 2}-65535", f"-t {port + 2}:80"]


def test_unknown_addresses_fail_like_ports(rig: Make, port: int) -> None:
    (line,) = refused(rig(), add(f"-t 192.0.2.77/{port}")).lines
    assert line == f"Failed to bind port {port} (Cannot assign requested address) for option '-t 192.0.2.77/{port}'"
    assert addr.is_unicast(addr.packed("192.0.2.77"))
