"""Listeners, automatic ports, changing rules and UDP flows together, against a model of two kernels' ports.

The host and the namespace have ports that programs of theirs bind and give up; rules are added and deleted; clients and
the guest send datagrams; time passes. Sockets are those of a small kernel here, which knows what one port allows. After
each step

    what is listened on     is what the rules ask for: fixed ports always, automatic ones after a look, as far as they
                            can be had
    automatic ports         lead to what others have bound, never to what we have
    flows                   belong to a listener that is there, or to the guest
    descriptors             are those of listeners and flows, all of them watched; nothing else is open
    a refused request       was right to be refused, and changes nothing
    other programs          get every port that is free
"""

from __future__ import annotations

import errno
import os
import socket
import types
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from passt import addr
from passt.conf.ports import parse_spec
from passt.linux import nspool
from passt.policy.rule_table import Meaning, meaning
from passt.policy.rules import Listener, Rule
from passt.ports import sockets
from passt.ports.forwards import Add, Change, Clear, Delete, Forwards, Refused
from passt.ports.listen import Listeners
from passt.ports.scan import INTERVAL, Scanner
from passt.ports.udp_in import UdpIn
from passt.udp import Udp
from passt.udp_engine import sock as udp_sock
from passt.udp_engine.flow import FLOW_TIMEOUT
from passt.udp_engine.sock import Client
from passt.wire.checksum import PROTO_TCP, PROTO_UDP

from ..support import GATEWAY4, GUEST4, T0, make_context, reactor, timers
from .test_listen import Taker

HOST, NS = "host", "ns"
PORTS = range(8000, 8004)
EPHEMERAL = range(40000, 50000)
PINNED = "127.0.0.53"  # where a server of the host is found that wants no other address
PROTO = {socket.SOCK_STREAM: PROTO_TCP, socket.SOCK_DGRAM: PROTO_UDP}
KIND = {proto: kind for kind, proto in PROTO.items()}

# Two kernels ---------------------------------------------------------------------------------------------------------


class Kernel:
    """Open sockets of both sides, and what one may bind beside others."""

    def __init__(self) -> None:
        self.open: dict[int, Sock] = {}
        self.side = HOST  # of the calling thread

    def socket(self, family: int, kind: int, *_: int) -> Sock:
        return self.make(self.side, family, kind)

    def make(self, side: str, family: int, kind: int, *, ours: bool = True) -> Sock:
        fd = next(n for n in range(1000, 2000) if n not in self.open)  # the lowest, as kernels do
        self.open[fd] = Sock(self, fd, side, family, kind & ~(socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC), ours)
        return self.open[fd]

    def in_the_way(self, new: Sock, host: str, port: int) -> list[Sock]:
        """Sockets beside which `new` cannot have a port."""
        return [s for s in self.open.values() if s is not new and s.port == port and s.excludes(new, host)]

    def bound(self, side: str, proto: int) -> list[Sock]:
        """The sockets that the tables of bound ports list."""
        return [
            s
            for s in self.open.values()
            if (s.side, PROTO[s.kind]) == (side, proto) and s.port and (s.listens or s.kind == socket.SOCK_DGRAM)
            if s.peer is None
        ]


class Sock:
    """A socket as far as ports matter."""

    def __init__(self, kernel: Kernel, fd: int, side: str, family: int, kind: int, ours: bool) -> None:
        self.kernel, self.fd, self.side, self.family, self.kind, self.ours = kernel, fd, side, family, kind, ours
        self.options: dict[tuple[int, int], Any] = {}
        self.host, self.port = "", 0
        self.peer: tuple[Any, ...] | None = None
        self.listens = self.closed = False

    def _set(self, option: int) -> bool:
        return bool(self.options.get((socket.SOL_SOCKET, option)))

    def addresses(self, host: str) -> set[str]:
        """Families of which it has all addresses, and the address it has."""
        if host == "0.0.0.0":
            return {"4"}
        if host == "::":
            return {"6"} if self.options.get((socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) else {"4", "6"}
        return {host}

    def excludes(self, new: Sock, host: str) -> bool:
        if (self.side, self.kind) != (new.side, new.kind):
            return False
        mine, theirs = self.addresses(self.host), new.addresses(host)
        covered = any(a in theirs or ("6" if ":" in a else "4") in theirs for a in mine if len(a) > 1)
        covered |= any(a in mine or ("6" if ":" in a else "4") in mine for a in theirs if len(a) > 1)
        if not covered and not mine & theirs:
            return False
        if self.ours == new.ours and self._set(socket.SO_REUSEPORT) and new._set(socket.SO_REUSEPORT):
            return False
        return self.listens or not (self._set(socket.SO_REUSEADDR) and new._set(socket.SO_REUSEADDR))

    def fileno(self) -> int:
        return self.fd

    def bind(self, address: tuple[Any, ...]) -> None:
        assert not self.closed
        host, port = address[:2]
        if not port:
            port = next(p for p in EPHEMERAL if not self.kernel.in_the_way(self, host, p))
        if self.kernel.in_the_way(self, host, port):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        self.host, self.port = host, port

    def listen(self, backlog: int) -> None:
        self.listens = True

    def connect(self, address: tuple[Any, ...]) -> None:
        assert not self.closed and self.port
        self.peer = address[:2]

    def getsockname(self) -> tuple[Any, ...]:
        return self.host, self.port

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        assert not self.closed
        self.options[level, option] = value

    def getsockopt(self, level: int, option: int, length: int = 0) -> Any:
        return self.options.get((level, option), 0)

    def recv(self, n: int) -> bytes:
        raise BlockingIOError

    def recvfrom(self, n: int) -> Any:
        raise BlockingIOError

    def recvmsg(self, *_: int) -> Any:
        raise BlockingIOError

    def recvmsg_into(self, *_: Any) -> Any:
        raise BlockingIOError

    def close(self) -> None:
        assert not self.closed, "closed twice"
        self.closed = True
        del self.kernel.open[self.fd]


class Namespace:
    """Runs what is to be done in the namespace."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def run(self, function: Callable[[], Any]) -> Any:
        self._kernel.side = NS
        try:
            return function()
        finally:
            self._kernel.side = HOST

    def take(self, family: int, kind: int) -> Sock:
        return self._kernel.make(NS, family, kind)


class Tables:
    """The bound ports of one side."""

    def __init__(self, kernel: Kernel, side: str) -> None:
        self._kernel, self._side = kernel, side

    def bound(self, proto: int) -> set[int]:
        return {s.port for s in self._kernel.bound(self._side, proto) if s.host != PINNED}

    def pinned(self, proto: int) -> set[tuple[bytes, int]]:
        return {(addr.packed(s.host), s.port) for s in self._kernel.bound(self._side, proto) if s.host == PINNED}


# Rules that may be asked for -----------------------------------------------------------------------------------------

SPECS = (
    "-t 8000", "-t 8001-8002:8002-8003", "-t 127.0.0.1/8000", "-t 127.0.0.2/8003:8000",
    "-u 8000", "-u 8001-8002:8002-8003", "-u 8001-8002", "-u 127.0.0.1/8003:8000", "-u 8003:8000",
    "-T 8002", "-T 8000-8001", "-U 8001-8002", "-U 8001:8000",
    "-u auto,8000-8002",
)  # fmt: skip
AUTOS = "-t auto,7000-9000", "-u auto,7000-9000", "-T auto,7000-9000", "-U auto,7000-9000"


def asked_by(spec: str) -> list[Rule]:
    letter, words = spec[1], spec[3:]
    return list(parse_spec(letter, words))


def _part(r: Rule, which: str) -> Rule:
    """All of a rule, or one port of it."""
    if which == "first" and not r.auto:
        return replace(r, last=r.first)
    if which == "last" and not r.auto:
        return replace(r, first=r.last, to=r.target_port(r.last))
    return r


class Ports(RuleBasedStateMachine):
    """The listening half of the program, between two kernels."""

    @initialize(
        specs=st.lists(st.sampled_from(SPECS), max_size=1),
        autos=st.lists(st.sampled_from(AUTOS), max_size=2, unique=True),
    )
    def start(self, specs: list[str], autos: list[str]) -> None:
        self.kernel = kernel = Kernel()
        self.now = T0
        patched = types.SimpleNamespace(**{**vars(socket), "socket": kernel.socket})
        self._patches = [
            mock.patch.object(udp_sock, "socket", patched),
            mock.patch.object(sockets, "new_socket", kernel.socket),
            mock.patch.object(nspool, "open_socket", lambda family, kind: kernel.make(HOST, family, kind)),
            mock.patch.object(os, "writev", lambda fd, views: sum(map(len, views))),
        ]
        for patch in self._patches:
            patch.start()
        self.ctx = make_context()
        namespace: Any = Namespace(kernel)
        self.ctx.ns = namespace
        self.udp = Udp(self.ctx)
        self.udp_in = UdpIn(self.ctx, self.udp)
        tcp: Any = Taker()
        self.listeners = Listeners(
            self.ctx, tcp=tcp, tcp_splice=tcp, udp_in=self.udp_in, namespace=namespace
        )  # fmt: skip
        host: Any = Tables(kernel, HOST)
        ns: Any = Tables(kernel, NS)
        self.scanner = Scanner(self.ctx, self.listeners, host, ns)
        self.forwards = Forwards(self.ctx, self.listeners, self.scanner)
        self.others: list[Sock] = []
        self.asked: dict[Meaning, set[int]] = {}
        self.looked = True  # nothing was bound or given up since the last look
        for spec in (*autos, *specs):
            self.request([], asked_by(spec))

    # Rules ---------------------------------------------------------------------------------------------------------

    @rule(
        delete=st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["rule", "first", "last"])), max_size=2),
        add=st.lists(st.sampled_from(SPECS + AUTOS), max_size=2, unique=True),
    )
    def change(self, delete: list[tuple[int, str]], add: list[str]) -> None:
        """A request of a control socket, between two turns: rules that are there are deleted, in whole or in part."""
        there = list(self.forwards.rules.values())
        deleted = [_part(there[at % len(there)], which) for at, which in delete if there]
        added = [r for spec in add for r in asked_by(spec)]
        self.request(deleted, added)

    @rule(spec=st.sampled_from(SPECS + AUTOS))
    def delete_what_may_not_be_there(self, spec: str) -> None:
        self.request(asked_by(spec), [])

    def request(self, deleted: list[Rule], added: list[Rule]) -> None:
        changes: list[Change] = [*map(Delete, deleted), *map(Add, added)]
        before, rules, flows = self.fixed(), dict(self.forwards.rules), self.guest_flows()
        asked = self.after(deleted, added)
        refused: Refused | None = None
        try:
            self.forwards.change(changes, self.now)
        except Refused as e:
            refused = e
        if refused is None:
            assert asked is not None, "what was not there was deleted, or what was there was asked for again"
            self.asked = asked
        else:
            assert self.forwards.rules == rules and self.fixed() == before
            for failure in refused.failures:
                assert self.taken(failure.rule, failure.port), f"{refused}: nobody has it"
            if not refused.failures:
                assert asked is None or self.conflicts(asked), f"{refused}: it could have been done"
                assert flows == self.guest_flows()
            self.looked = False  # automatic listeners that were in the way come back with a look
        self.turn_ends()

    def after(self, deleted: list[Rule], added: list[Rule]) -> dict[Meaning, set[int]] | None:
        """Ports by what is said of them, after a request; None: what it deletes is not there, or what it adds is there
        in part.
        """
        asked = {m: set(ports) for m, ports in self.asked.items()}
        for r in deleted:
            if not asked.get(meaning(r), set()).issuperset(r.ports):
                return None
            asked[meaning(r)] -= set(r.ports)
        for r in added:
            have = asked.setdefault(meaning(r), set())
            if not have.isdisjoint(r.ports) and not have.issuperset(r.ports):
                return None
            have.update(r.ports)
        return {m: ports for m, ports in asked.items() if ports}

    def conflicts(self, asked: dict[Meaning, set[int]]) -> bool:
        """Whether two of these want one port."""
        whole = [
            Rule("", m[0], m[1], min(ports), max(ports), 0, addr=m[2], auto=m[6])  # type: ignore[arg-type]
            for m, ports in asked.items()
        ]
        return any(
            a.auto == b.auto and any(p in asked[m] and p in asked[n] for p in a.overlaps(b))
            for i, (a, m) in enumerate(zip(whole, asked, strict=True))
            for b, n in list(zip(whole, asked, strict=True))[i + 1 :]
        )

    # Others ----------------------------------------------------------------------------------------------------------

    @rule(
        side=st.sampled_from([HOST, NS]),
        proto=st.sampled_from([PROTO_TCP, PROTO_UDP]),
        port=st.sampled_from(PORTS),
        host=st.sampled_from(["::", "::", "::1", PINNED]),
        look=st.booleans(),
    )
    def a_program_binds(self, side: str, proto: int, port: int, host: str, look: bool) -> None:
        self.turn_ends()
        made = self.kernel.make(side, socket.AF_INET6 if ":" in host else socket.AF_INET, KIND[proto], ours=False)
        obstacles = self.kernel.in_the_way(made, host, port)
        try:
            made.bind((host, port))
        except OSError:
            made.close()
            assert all(s in self.others or s.fd in self.owners() for s in obstacles), "nobody has it"
            return
        if proto == PROTO_TCP:
            made.listen(1)
        self.others.append(made)
        self.looked = False
        if look:
            self.a_look()

    @rule(at=st.integers(0, 9), look=st.booleans())
    def a_program_closes(self, at: int, look: bool) -> None:
        if self.others:
            self.others.pop(at % len(self.others)).close()
            self.looked = False
            if look:
                self.a_look()

    # Traffic -------------------------------------------------------------------------------------------------------

    @rule(
        at=st.integers(0, 9),
        peer=st.sampled_from(["127.0.0.1", "203.0.113.9", "::1", "2001:db8:9::9"]),
        port=st.sampled_from([50000, 8000, 53]),
        ends=st.booleans(),
    )
    def a_client_sends(self, at: int, peer: str, port: int, ends: bool) -> None:
        """To a listener that can hear it."""
        found = [li for li in self.open() if li.rule.proto == PROTO_UDP]
        if not found:
            return
        listener = found[at % len(found)]
        source = addr.packed(peer)
        sock: Any = listener.sock
        reached = sock.addresses(sock.host)
        if listener.rule.outbound and not addr.is_loopback(source):
            return
        if ("6" if len(source) == 16 else "4") in reached:
            local = addr.packed(peer) if addr.is_loopback(source) else GATEWAY4 if len(source) == 4 else b"\xfe" * 16
            local = local if len(local) == len(source) else source
        elif len(reached) == 1 and len(addr.packed(sock.host)) == len(source):
            local = addr.packed(sock.host)
        else:
            return
        client = Client(listener, source, port, local)
        self.udp_in._dispatch(client, memoryview(b"question"), [0, 8, 0], self.now)
        if ends:
            self.turn_ends()

    @rule(
        sport=st.sampled_from(PORTS),
        to=st.sampled_from(["203.0.113.9", "2001:db8:9::9"]),
        dport=st.sampled_from([9, 50000]),
    )
    def the_guest_sends(self, sport: int, to: str, dport: int) -> None:
        peer = addr.packed(to)
        guest = GUEST4 if len(peer) == 4 else self.ctx.guest.addr6
        key = guest + peer + sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
        before = key in self.udp._by_key
        leading = {li.port for li in self.open() if self.leads(li) and li.to == sport}
        self.ctx.pool.buf[64:68] = b"ping"
        self.udp.tap_handler(key, [64, 68, 0], self.now)
        flow = self.udp._by_key.get(key)
        assert flow is not None
        if leading and not before:
            assert flow.sock.port in leading, "from the port that a listener leads to, it is seen at the listener's"

    def leads(self, listener: Listener) -> bool:
        """Whether it can be where what the guest sends to others comes from."""
        r = listener.rule
        return r.proto == PROTO_UDP and not r.outbound and r.addr is None and r.target is None

    # Time ----------------------------------------------------------------------------------------------------------

    @rule()
    def a_look(self) -> None:
        """The tables are read, and read again: what was given up by one rule may be what another wants.

        The guest's flows make way for listeners that open, and for nothing else.
        """
        flows = {f for f in self.guest_flows() if self.now < f.last + FLOW_TIMEOUT - 4 * INTERVAL}
        before = {li for li in self.open() if li.rule.proto == PROTO_UDP and not li.rule.outbound}
        for _ in range(3):
            self.pass_time(INTERVAL)
        self.looked = True
        after = {li for li in self.open() if li.rule.proto == PROTO_UDP and not li.rule.outbound}
        made_way_for = {li.port for li in after} | {li.to for li in before - after}
        assert {f.sport for f in flows - self.guest_flows()} <= made_way_for

    @rule(seconds=st.sampled_from([1.0, 40.0, FLOW_TIMEOUT + 1]))
    def time_passes(self, seconds: float) -> None:
        self.pass_time(seconds)

    def pass_time(self, seconds: float) -> None:
        end = self.now + seconds
        services = timers(self.ctx).services
        for _ in range(400):
            due = min((d for d in services.deadlines if d is not None), default=end + 1)
            if due > end:
                break
            self.now = max(self.now, due)
            services.fire(services.deadlines.index(due), self.now)
            self.turn_ends()
        self.now = end

    @rule()
    def the_turn_ends(self) -> None:
        self.turn_ends()

    def turn_ends(self) -> None:
        reactor(self.ctx).end_turn(self.now)

    @rule()
    def the_guest_is_gone(self) -> None:
        self.udp.forget()

    # Listeners, flows and descriptors --------------------------------------------------------------------------------

    def open(self) -> list[Listener]:
        return [li for li in self.listeners._by_index if li is not None]

    def fixed(self) -> set[tuple[Rule, int, int]]:
        return {(li.rule, li.port, li.to) for li in self.open() if not li.rule.auto}

    def guest_flows(self) -> set[Any]:
        return {flow for flow in self.udp._by_key.values() if flow.client is None}

    def owners(self) -> dict[int, object]:
        """The owner of each of our descriptors, of those that stay open."""
        found: dict[int, object] = {li.fd: li for li in self.open()}
        for flow in self.ctx.flows.by_index:
            for fd, _ in flow.sockets() if flow is not None else ():  # type: ignore[attr-defined]
                assert fd not in found, "one descriptor of two"
                found[fd] = flow
        return found

    def taken(self, r: Rule, port: int) -> bool:
        """Whether a port in the way of a rule is bound, and not by a flow of the guest that has to make way."""
        hosts = [addr.text(r.addr)] if r.addr is not None else ["127.0.0.1", "::1"] if r.outbound else ["::"]
        side = NS if r.outbound else HOST
        for host in hosts:
            probe = Sock(self.kernel, -1, side, socket.AF_INET6 if ":" in host else socket.AF_INET, KIND[r.proto], True)
            making_way = {f.fd for f in self.guest_flows() if f.sport == port and not r.outbound}
            if any(s.fd not in making_way for s in self.kernel.in_the_way(probe, host, port)):
                return True
        return False

    # Invariants ------------------------------------------------------------------------------------------------------

    @invariant()
    def rules_are_what_was_asked_for(self) -> None:
        found: dict[Meaning, set[int]] = {}
        for r in self.forwards.rules.values():
            assert not found.get(meaning(r), set()) & set(r.ports)
            found.setdefault(meaning(r), set()).update(r.ports)
        assert found == self.asked

    @invariant()
    def fixed_ports_are_listened_on(self) -> None:
        wanted = {
            (r, port, r.target_port(port)) for r in self.forwards.rules.values() if not r.auto for port in r.ports
        }
        assert self.fixed() == wanted
        for li in self.open():
            sock: Any = li.sock
            assert sock.port == li.port and not sock.closed and sock.side == (NS if li.rule.outbound else HOST)
            assert li.port in self.listeners.ports(li.rule)
            assert self.listeners.has(li.rule.proto, li.rule.outbound, li.port)
        held = {(li.rule.proto, li.rule.outbound, li.port) for li in self.open()}
        assert held == set(self.listeners._held)
        assert len(self.listeners._by_index) == len(self.open()) + len(self.listeners._free)
        leading = [li for listeners in self.udp_in._outbound.leading.values() for li in listeners]
        assert len(leading) == len(set(leading)) and set(leading) <= set(self.open())

    @invariant()
    def automatic_ports_are_followed(self) -> None:
        if not self.looked:
            return
        rules = list(self.forwards.rules.values())
        for li in self.open():
            if li.rule.auto:
                assert self.bound_by_others(li.rule, li.port), f"{li.rule} {li.port}: nobody is there"
                assert not self.left_to_others(li.rule, li.port, rules), f"{li.rule} {li.port}: another rule has it"
        for r in rules:
            if r.auto:
                for port in set(PORTS) & set(r.ports):
                    if self.bound_by_others(r, port) and not self.left_to_others(r, port, rules):
                        assert port in self.listeners.ports(r) or self.taken(r, port), f"{r} {port}: not followed"

    def bound_by_others(self, r: Rule, port: int) -> bool:
        """Whether a program of the other side has what a port of an automatic rule leads to."""
        pinned = r.addr is not None
        side, target = HOST if r.outbound else NS, r.target_port(port)
        protos = {r.proto}
        if any(o.auto and o.outbound == r.outbound and o.proto == PROTO_TCP for o in self.forwards.rules.values()):
            protos.add(PROTO_TCP)
        theirs = {PROTO[s.kind] for s in self.others if (s.side, s.port, s.host == PINNED) == (side, target, pinned)}
        ours = {li.rule.proto for li in self.open() if li.port == target and (NS if li.rule.outbound else HOST) == side}
        followed = not pinned and not r.outbound and r.proto == PROTO_UDP and self.tcp_is_led(target)
        return r.proto not in ours and (bool(theirs & protos - ours) or followed)

    def tcp_is_led(self, port: int) -> bool:
        """Whether a rule leads from this TCP port to one that a program in the namespace listens on."""
        led = {o.target_port(port) for o in self.forwards.rules.values() if self.leads_tcp(o) and port in o.ports}
        ours = {li.port for li in self.open() if li.rule.proto == PROTO_TCP and li.rule.outbound}
        there = {s.port for s in self.others if (s.side, PROTO[s.kind]) == (NS, PROTO_TCP) and s.host != PINNED}
        return bool(led & there - ours)

    def leads_tcp(self, r: Rule) -> bool:
        return r.proto == PROTO_TCP and not r.auto and not r.outbound and r.target is None

    def left_to_others(self, r: Rule, port: int, rules: Iterable[Rule]) -> bool:
        """A rule that was derived for an address of 127/8 is not in the way of the one that it comes from."""
        base = replace(r, addr=None, target=None) if r.addr is not None else r
        span = (base.first, base.last, base.to) if r.addr is not None else ()
        others = [o for o in rules if not o.auto and (o.first, o.last, o.to) != span]
        return any(port in base.overlaps(other) for other in others)

    @invariant()
    def flows_belong_to_a_listener_or_to_the_guest(self) -> None:
        listeners = set(self.open())
        for flow in self.udp._by_key.values():
            if flow.client is None:
                leading = {li.port for li in self.udp_in._outbound.leading.get(flow.sport, ())}
                kept = flow.sock.port not in leading | {flow.sport} and flow.sock.port not in EPHEMERAL
                assert not kept, "it keeps the port of one that is gone"
            assert flow.client is None or flow.client.listener in listeners
            assert flow.client is None or flow.client.listener.to == flow.sport, "it leads elsewhere now"
        for spliced in self.udp_in.splice._flows.by_key.values():
            assert spliced.client.listener in listeners
            assert spliced.ends[1].sock.peer[1] == spliced.client.listener.to, "it leads elsewhere now"

    @invariant()
    def descriptors_are_owned_and_watched(self) -> None:
        owners = self.owners()
        retired = {sock.fileno() for sock in reactor(self.ctx).retired}  # type: ignore[attr-defined]
        ours = {fd for fd, sock in self.kernel.open.items() if sock.ours}
        assert ours == set(owners) | retired and not set(owners) & retired
        assert set(reactor(self.ctx).refs) == set(owners)

    def teardown(self) -> None:
        try:
            if hasattr(self, "forwards"):
                self.forwards.change([Clear()], self.now)
                self.pass_time(2 * FLOW_TIMEOUT)
                self.listeners.close()
                self.turn_ends()
                assert all(not sock.ours for sock in self.kernel.open.values()), "a descriptor is left"
                assert self.ctx.flows.count == 0 and not reactor(self.ctx).refs
        finally:
            for patch in self._patches:
                patch.stop()


TestPorts = Ports.TestCase
TestPorts.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
