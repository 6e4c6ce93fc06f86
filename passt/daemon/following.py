"""The service of --follow: after a change of the host's network, the guest's view follows (`conf/follow.py`).

    kernel -> monitor -> (timer) -> tables read -> policy -> namespace, flows, forwarded ports -> another Config
                                                                                                 -> DHCP, NDP, names

    event                        consequence
    ---------------------------  -------------------------------------------------------------------------------------
    the kernel tells of a        the monitor is not watched any more, and the timer is armed: however much there is to
      change                       tell, it costs one wake-up
    timer "settle"               what has come is discarded, the monitor is watched again, and the tables are read. If
                                   the view is another one, it is put into force, and the log gets one line
    tables changed meanwhile     they need not fit together: a link that was down, with routes that it has since it is
                                   up. No flow ends by them, up to TORN_MAX times running, and they are read again
    the tables cannot be read    a line in the log, counted; they are read again after RETRY
    online again after it was    only one family is: the other one may follow in a moment, with the addresses of before.
      offline                      Its flows are left alone, and the tables are read again after PATIENCE
    timer "link", --follow-link  the link goes down when the guest is assigned another address, and up when programs in
                                   the namespace have been told: that is looked at at once, which makes the kernel tell
                                   them (Linux 6.8), and every LINK_STEP. LINK_DOWN later at the latest, or where we
                                   cannot look
    timer "release"              former addresses that no flow has any more are removed, every RELEASE while there are
                                   some

    timer "settle"               value
    ---------------------------  -------------------------------------------------------------------------------------
    usually                      SETTLE: interfaces, addresses and routes change one after the other
    after a change of the view   twice the last value, up to SETTLE_MAX: the network flaps. SETTLE again after CALM
      within CALM                  without a change
    in any case                  SHARE times as long as the last reading took, so that it takes one in SHARE of the
                                   processor's time at most

A view is put into force in this order: addresses and routes in the namespace (pasta with --config-net), which programs
there need first; the configuration, which services and translation read; forwarded ports; flows whose address on the
host is gone, unless the host is offline: it may get the address back. A host that is online without a family of the
address has lost that.

Without CAP_NET_ADMIN over the namespace (root attaches pasta to one; an inherited tap) addresses and routes there stay,
and a line in the log says so. DHCP and router advertisements tell the new ones, and the old ones go on to work.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from .. import addr, log
from ..conf import follow as policy
from ..conf.follow import STAYS, View
from ..flow.context import Context
from ..flow.source import Sources
from ..linux import tap_change, tun
from ..linux.host_tables import HostTables
from ..linux.routes import Host, NsPlan
from ..loop.reactor import EPOLLIN, TYPE_HOST
from ..policy.config import Config
from ..policy.rules import Rule
from ..ports.forwards import Add, Delete, Forwards, Refused
from .lan import LanNeighbours

if TYPE_CHECKING:
    from ..conf.decide import Decision
    from ..conf.options import Options
    from ..conf.resolv_conf import Follower
    from ..pasta import Interface

SETTLE = 0.1  # s
SETTLE_MAX = 1.0  # s
CALM = 5.0  # s
SHARE = 20
RETRY = 30.0  # s
PATIENCE = 10.0  # s; by then a host that joins a network has both a router advertisement and an address by DHCP
TORN_MAX = 8  # readings
RELEASE = 10.0  # s
FORMER_MAX = 16  # addresses that stay for their flows
LINK_STEP = 0.05  # s; the kernel tells of a link at once, since we ask
LINK_DOWN = 1.1  # s; before Linux 6.8 it may keep it for a second, if another link changed in that time (link_watch.c)
CHANGE_TIME = 0.5  # s of processor time, in which the loop stands still


class NsTap:
    """The addresses and routes of the tap in the namespace, as far as pasta has made them."""

    def __init__(self, interface: Interface) -> None:
        self._interface = interface
        self._made = tap_change.made_by(interface.plan)

    @property
    def changes(self) -> bool:
        """Whether they may be changed."""
        return self._interface.plan.configure and self._interface.netlink is not None

    @property
    def configured(self) -> bool:
        """Whether pasta has made them."""
        return self._interface.plan.configure

    def has(self, plan: NsPlan) -> bool:
        """Whether they are those of `plan`."""
        mine = self._interface.plan
        return (mine.addresses, mine.routes) == (plan.addresses, plan.routes)

    def set_carrier(self, *, on: bool) -> None:
        """Plug the cable in, or pull it out. Raises OSError."""
        tun.set_carrier(self._interface.device.fd, on=on)

    def told_down(self) -> bool:
        """Whether the kernel has told programs in the namespace that the link is down; False if that is not known. The
        question makes a newer kernel tell them.
        """
        interface = self._interface
        nl = interface.netlink or interface.reader
        if nl is None:
            return False
        nl.limit(CHANGE_TIME)
        try:
            return tap_change.told_down(nl, interface.plan.ifname, interface.mac)
        except OSError:
            return False

    def change(self, plan: NsPlan) -> list[str]:
        """Carry out `plan`; returns a line for each step that failed. Raises OSError."""
        interface = self._interface
        nl = interface.netlink
        assert nl is not None, "`changes` says so"
        nl.limit(CHANGE_TIME)
        name = interface.plan.ifname
        self._made, problems = tap_change.change(nl, name, interface.mac, self._made, plan)
        old = self._made.former[:-FORMER_MAX]
        if old:
            self._made = tap_change.release(nl, name, interface.mac, self._made, old)
        interface.plan = plan
        return problems

    def release(self, unused: set[bytes]) -> None:
        """Remove former addresses. Raises OSError."""
        interface = self._interface
        if interface.netlink is not None and unused & set(self._made.former):
            interface.netlink.limit(CHANGE_TIME)
            self._made = tap_change.release(interface.netlink, interface.plan.ifname, interface.mac, self._made, unused)


class Following:
    """Follows the host's network from its creation on. `tap` is None where there is no namespace that is configured."""

    def __init__(
        self, ctx: Context, options: Options, decision: Decision, tables: HostTables, names: Follower,
        forwards: Forwards, tap: NsTap | None,
    ) -> None:  # fmt: skip
        self._ctx, self._options, self._tables = ctx, options, tables
        self._names, self._forwards, self._tap = names, forwards, tap
        self._have_v6 = ctx.config.ip6 is not None
        self.view = View(decision)
        self._homes: dict[bytes, tuple[int, bool]] = {}  # of addresses that rules listen on
        self._sources = Sources(ctx)
        self._lan = LanNeighbours(ctx, tables.neighbours)
        policy.note_homes(filter(_bound, ctx.config.forwards), self._homes, tables.last)
        self._settle, self._changed_at, self._cost = SETTLE, -CALM, 0.0
        self._offline, self._patient_until = False, 0.0
        self._torn = 0  # readings running during which the tables changed
        self._told_stuck = False
        self.reads = self.changes = self.failures = 0
        self._watching = True
        services = ctx.timers.services
        self._timer, self._release_timer = services.new(self._look), services.new(self._release)
        self._link_timer = services.new(self._link_up) if options.follow_link else -1
        self._link_due = 0.0  # when it goes up at the latest
        ctx.reactor.handle(TYPE_HOST, self._event)
        ctx.reactor.watch(tables.monitor.fd, TYPE_HOST, 0, EPOLLIN)
        ctx.stats.network = self.figures
        self._lan.follow(decision.template4, decision.template6, time.monotonic())

    def figures(self) -> dict[str, Any]:
        """For statistics and for `pesto --show`."""
        return {
            "follow": self._options.follow,
            "view": self.view.describe(),
            "changes": self.changes,
            "reads": self.reads,
            "failures": self.failures + self._lan.failures,
            "ended": self._sources.ended,
            "neighbours": self._ctx.lan.count,
        }

    # Events --------------------------------------------------------------------------------------------------------

    def _event(self, ref: int, events: int, now: float) -> None:
        """The host's tables have changed, and may go on to change."""
        self._ctx.reactor.forget(self._tables.monitor.fd)
        self._watching = False
        if now - self._changed_at > CALM:
            self._settle = SETTLE
        self._ctx.timers.services.arm(self._timer, now + max(self._settle, SHARE * self._cost))

    def _look(self, now: float) -> None:
        """Read the tables, and follow."""
        monitor = self._tables.monitor
        monitor.drain()
        if not self._watching:
            self._ctx.reactor.watch(monitor.fd, TYPE_HOST, 0, EPOLLIN)
            self._watching = True
        began = time.thread_time()
        try:
            host = self._tables.read()
        except OSError as e:
            self.failures += 1
            text = f"Couldn't read the host's addresses and routes, and do not follow them for {RETRY:.0f} s: {e}"
            log.warn_ratelimited("follow", text, now)
            self._ctx.timers.services.arm(self._timer, now + RETRY)
            return
        finally:
            self._cost = time.thread_time() - began
        self.reads += 1
        self._torn = self._torn + 1 if monitor.drain() else 0
        if self._torn:
            self._ctx.timers.services.arm(self._timer, now + max(self._settle, SHARE * self._cost))
        self._follow(host, now)

    def _follow(self, host: Host, now: float) -> None:
        former, current = self.view, self._ctx.config
        view = policy.follow(self._options, former, current, host, self._names.current, have_v6=self._have_v6)
        self.view = view
        config = view.decision.config
        told = _key(former, current) != _key(view, config)
        if told:
            self.changes += 1
            self._settle = min(2 * self._settle, SETTLE_MAX) if now - self._changed_at <= CALM else SETTLE
            self._changed_at = now
            log.info(f"The host's network has changed: {view.describe()}")
        moved = self._change_namespace(view.decision.plan)
        self._ctx.settings.replace(config, now)
        self._move_guest(current, config, moved, now)
        self._lan.follow(view.template(False), view.template(True), now)
        if any(verdict != STAYS for verdict in view.verdicts):
            self._ctx.reactor.between_turns(partial(self._move_ports, host))
        self._end_flows(host, now)

    def _end_flows(self, host: Host, now: float) -> None:
        """Those whose address on the host is gone for good."""
        if 0 < self._torn < TORN_MAX:
            return
        taken, lost = policy.settled(self.view, host)
        if taken or lost:
            if self._offline:
                self._patient_until = now + PATIENCE
            if lost and now < self._patient_until:
                self._ctx.timers.services.arm(self._timer, self._patient_until)
                lost = set()
            self._sources.check(_alive(host), _lengths(taken | lost), now, _lengths(lost))
        self._offline = not taken

    # Consequences --------------------------------------------------------------------------------------------------

    def _change_namespace(self, plan: NsPlan | None) -> bool:
        """Carry out the plan in the namespace; returns whether the guest has its new addresses."""
        tap = self._tap
        if tap is None or plan is None or not tap.configured or tap.has(plan):
            return False
        if not tap.changes:
            if not self._told_stuck:
                self._told_stuck = True
                log.info(
                    "Addresses and routes in the namespace stay as they are: pasta has no right to change them there. "
                    "They go on to work; DHCP and router advertisements tell the new ones"
                )
            return False
        try:
            problems = tap.change(plan)
        except OSError as e:
            problems = [f"Couldn't change addresses and routes in namespace: {e.strerror}"]
        for problem in problems:
            self.failures += 1
            log.warn_ratelimited(problem, problem, time.monotonic())
        return not problems

    def _move_guest(self, former: Config, config: Config, done: bool, now: float) -> None:
        """Where the guest has another address now, clients of the host are led there."""
        others = False
        for was, ip in ((former.ip4, config.ip4), (former.ip6, config.ip6)):
            before, after = was and was.addr, ip and ip.addr
            others = others or before != after
            if before and after and before != after:
                self._ctx.neighbours.moves(before, after, done=done)
        if others and self._options.follow_link and self._tap is not None and self._set_carrier(on=False):
            self._tap.told_down()
            self._link_due = now + LINK_DOWN
            self._ctx.timers.services.arm(self._link_timer, now + LINK_STEP)
        if self._ctx.neighbours.given_up:
            self._ctx.timers.services.arm(self._release_timer, now + RELEASE)

    def _set_carrier(self, *, on: bool) -> bool:
        if self._tap is None:
            return False
        try:
            self._tap.set_carrier(on=on)
        except OSError as e:
            self.failures += 1
            text = f"Couldn't take the link {'up' if on else 'down'} in namespace: {e.strerror}"
            log.warn_ratelimited(text, text, time.monotonic())
            return False
        return True

    def _link_up(self, now: float) -> None:
        """Take the link up, unless programs may not know yet that it is down: they would miss both."""
        if now < self._link_due and self._tap is not None and not self._tap.told_down():
            self._ctx.timers.services.arm(self._link_timer, min(now + LINK_STEP, self._link_due))
        elif self._set_carrier(on=True):
            self._ctx.neighbours.link_up(now)

    def _release(self, now: float) -> None:
        """Former addresses without flows are of no use any more."""
        former = self._ctx.neighbours.given_up
        unused = set(former) - self._sources.in_use(former)
        self._ctx.neighbours.release(unused)
        if self._tap is not None and self._tap.changes:
            try:
                self._tap.release(unused)
            except OSError as e:
                log.debug(f"Former addresses in the namespace stay: {e.strerror}")
        if self._ctx.neighbours.given_up:
            self._ctx.timers.services.arm(self._release_timer, now + RELEASE)

    def _move_ports(self, host: Host, now: float) -> None:
        """Rules that listen on an address which the host has no more listen on the one that took its place."""
        rules = [rule for rule in self._forwards.rules.values() if _bound(rule)]
        for old, new in policy.moved(rules, self._homes, host).items():
            try:
                self._forwards.change([Delete(old), Add(new)], now)
            except Refused as e:
                log.warn_ratelimited(f"moved {old.option}", f"Ports of '{old.option}' do not follow: {e}", now)
            else:
                log.info(f"'{old.option}' listens on {addr.text(new.addr or b'')} now")
        policy.note_homes(filter(_bound, self._forwards.rules.values()), self._homes, host)


def _bound(rule: Rule) -> bool:
    return not rule.outbound and rule.addr is not None and any(rule.addr) and not addr.is_loopback(rule.addr)


def _key(view: View, config: Config) -> tuple[object, ...]:
    """A change of this is a change for the guest, or for the user who wants to know where it comes from."""
    links = [(link.index, link.name) if link else None for link in (view.template(False), view.template(True))]
    ips = [(ip.addr, ip.prefix_len, ip.gateway) if ip else None for ip in (config.ip4, config.ip6)]
    return *links, *ips, view.verdicts


def _lengths(families: set[bool]) -> list[int]:
    """The lengths of addresses of these families; True is IPv6."""
    return [16 if v6 else 4 for v6 in families]


def _alive(host: Host) -> list[bytes]:
    """The addresses of the host that packets can leave from: those of links that are up."""
    down = {link.index for link in host.links if not link.up}
    return [a.addr for a in host.addresses if a.index not in down]


def start(
    ctx: Context, options: Options, decision: Decision, tables: HostTables | None, names: Follower,
    forwards: Forwards, interface: Interface | None = None,
) -> None:  # fmt: skip
    """Follow the host's network from now on, if `tables` are watched."""
    if tables is not None:
        tap = NsTap(interface) if interface is not None else None
        Following(ctx, options, decision, tables, names, forwards, tap)
