"""The service of the host's neighbours: the guest sees their MAC addresses, and sees them change (`policy/lan.py`).

    kernel -> linux.host_tables -> policy.lan -> headers of flows, ARP and neighbour advertisements to the guest

    event                          consequence
    -----------------------------  ---------------------------------------------------------------------------------
    the start, another template    the neighbours of the former link are forgotten, and the tables of both families
      (`following.py`)               are asked for
    neighbours have come, and one  headers of flows are written again (`flow/headers.py`), and the guest is told of
      has another MAC address        addresses that it was told another MAC address of. The guest learns of no others:
                                     it asks first
    another configuration          the same, if an address maps the host now, or does not any more
    no flow needs them, and the    the socket is not watched: a host's neighbours change all the time. Their messages
      guest was told of none         are read before the next look-up (`Lan.before_use`), or discarded by the kernel,
                                     and the table is asked for
    more than one reading takes    the socket is not watched for PAUSE, in which the kernel may discard what it wants
    the table cannot be read       a line in the log, counted; the tables are asked for again after ASK_AGAIN

    bound                          value
    -----------------------------  ---------------------------------------------------------------------------------
    one reading                    NEIGHBOURS_READ_MAX of `host_tables.py`: 2 ms, so a flood takes a fiftieth of a
                                     processor
    announcements                  ANNOUNCED, every PAUSE
"""

from __future__ import annotations

import socket
import time

from .. import NEVER, log
from ..flow.context import Context
from ..linux.host_tables import NeighbourTable
from ..linux.routes import Link
from ..loop.each import each, record
from ..loop.reactor import EPOLLIN, TYPE_NEIGHBOUR
from ..policy.config import Config
from ..policy.lan import settings_of

PAUSE = 0.1  # s
ASK_AGAIN = 30.0  # s
ANNOUNCED = 64

FAMILIES = ((socket.AF_INET, 4), (socket.AF_INET6, 16))
NO_LINK = 0


class LanNeighbours:
    """Reads the table from `follow` on."""

    def __init__(self, ctx: Context, table: NeighbourTable) -> None:
        self._ctx, self._table = ctx, table
        self._links = [NO_LINK, NO_LINK]  # index of the template of each family
        self.failures = 0
        self._watched = False
        self._changed = False  # and the guest and the headers of flows do not have it yet
        self._timer = -1
        self._due = self._retry_at = NEVER
        ctx.reactor.handle(TYPE_NEIGHBOUR, self._event)
        ctx.settings.react(self._reconfigured)
        ctx.services.on_forget.append(ctx.lan.guest_gone)

    def follow(self, template4: Link | None, template6: Link | None, now: float) -> None:
        """These links of the host are the templates of the families."""
        links = [NO_LINK if link is None else link.index for link in (template4, template6)]
        if links == self._links:
            return
        for i, (_, length) in enumerate(FAMILIES):
            if links[i] != self._links[i]:
                self._ctx.lan.forget(length)
        self._links = links
        self._changed = True
        self._ask(now)
        self._watch()

    def _ask(self, now: float) -> None:
        try:
            self._table.ask([(family, i) for (family, _), i in zip(FAMILIES, self._links, strict=True) if i])
        except OSError as e:
            self._failed(e, now)

    def _failed(self, e: OSError, now: float) -> None:
        self.failures += 1
        text = f"Couldn't read the host's neighbours, the guest may see ours instead of their MAC addresses: {e}"
        log.warn_ratelimited("neighbours", text, now)
        self._retry_at = now + ASK_AGAIN
        self._arm(self._retry_at)

    # Events --------------------------------------------------------------------------------------------------------

    def _event(self, ref: int, events: int, now: float) -> None:
        """Neighbours to read."""
        self._read(now)
        self._show_all(now)
        if self._table.more:
            self._unwatch()
            self._arm(now + PAUSE)
        elif not self._wanted():
            self._unwatch()
            self._ctx.lan.before_use = self._catch_up

    def _read(self, now: float) -> None:
        try:
            found = self._table.read()
        except OSError as e:
            found = []
            self._failed(e, now)
        lan, (link4, link6) = self._ctx.lan, self._links
        for index, a, mac in found:
            if index == (link4 if len(a) == 4 else link6) and lan.note(a, mac):
                self._changed = True

    def _wanted(self) -> bool:
        """Whether a change would have a consequence."""
        return self._ctx.flows.count > 0 or self._table.asking or self._ctx.lan.told_of_others()

    def _catch_up(self) -> None:
        """The neighbours are needed again. Headers and announcements follow when this turn is over."""
        self._watch()
        self._read(time.monotonic())
        if self._changed:
            self._ctx.reactor.between_turns(self._show_all)

    def _unwatch(self) -> None:
        self._ctx.reactor.forget(self._table.fd)
        self._watched = False

    def _watch(self) -> None:
        self._ctx.lan.before_use = None
        if not self._watched:
            self._ctx.reactor.watch(self._table.fd, TYPE_NEIGHBOUR, 0, EPOLLIN)
            self._watched = True

    def _arm(self, at: float) -> None:
        if self._timer < 0:
            self._timer = self._ctx.timers.services.new(self._fired)
        self._due = min(self._due, at)
        self._ctx.timers.services.arm(self._timer, self._due)

    def _fired(self, now: float) -> None:
        """Go on with what had to wait."""
        self._due = NEVER
        self._watch()
        if self._retry_at <= now:
            self._retry_at = NEVER
            self._ask(now)
        if not self._changed:
            self._announce(now)
        if self._retry_at < NEVER:
            self._arm(self._retry_at)

    def _reconfigured(self, former: Config, now: float) -> None:
        if settings_of(former) != settings_of(self._ctx.config):
            if self._ctx.lan.before_use is not None and self._wanted():
                self._catch_up()
            self._show(now)

    # Consequences --------------------------------------------------------------------------------------------------

    def _show(self, now: float) -> None:
        """Let the guest see MAC addresses that have changed."""
        self._changed = False
        self._ctx.headers.rewrite(now)
        self._announce(now)

    def _show_all(self, now: float) -> None:
        """The same, if there are any, and no others are on their way."""
        if self._changed and not self._table.asking:
            self._show(now)

    def _announce(self, now: float) -> None:
        outdated = self._ctx.lan.outdated()
        each(outdated[:ANNOUNCED], self._tell, self._fault_at)
        if len(outdated) > ANNOUNCED:
            self._arm(now + PAUSE)

    def _tell(self, a: bytes) -> None:
        """Announce an address; it counts as told in any case."""
        self._ctx.lan.tell(a)
        announce = self._ctx.services.announce4 if len(a) == 4 else self._ctx.services.announce6
        if announce is not None:
            announce(a)

    def _fault_at(self, a: bytes, e: Exception) -> None:
        record(self._ctx.drops, "an announcement", e)
