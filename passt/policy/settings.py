"""The configuration in force: the only place of values that may change at run time.

A `Config` is frozen. A change is another `Config` that takes its place (`replace`). These functions make one:

    writer                     fields                                            when
    -------------------------  ------------------------------------------------  ------------------------------
    `conf.names.follow`        `dns` of both families, `dns_search`,             resolv.conf has changed
                               `dns_match`, `dns_hosts`
    `ports.forwards.Forwards`  `forwards`                                        a client changes the rules
    `passt.Clients`            `mtu`                                             a machine whose buffers are small
    `daemon.following`         what depends on the host's tables: both           they have changed (`conf/follow.py`)
                               families, `scope_id`, interfaces, names

All other fields keep their values.

There are three interfaces. No object keeps a `Config`, or a part of one, by other means.

    interface           purpose                                   effect of a change
    ------------------  ----------------------------------------  ----------------------------------------------
    `current`           the control plane reads it each time      at once
    `subscribe(adopt)`  values that the data plane keeps, since   adopt(config): now, which fills them, and again
                        a look-up for each packet costs too much    with each change
    `react(act)`        actions after a change                    act(former, now): when all caches are filled

A cache has one function that fills it, and one line that subscribes this function:

    settings.subscribe(self._adopt)

A fault of one subscriber does not affect the other ones. It is logged, and counted as "fault".

A flow keeps its initial values until its end: the longest segment or datagram (from the MTU), the address and interface
that its socket is bound to, the host that it connects to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..drops import Reason
from ..loop.each import each, record
from .config import Config

Adopt = Callable[[Config], None]
Act = Callable[[Config, float], None]


class Settings:
    """Holds the `Config` in force. Only `replace` writes `current`."""

    __slots__ = ("_acts", "_caches", "_drops", "_replacing", "current")

    def __init__(self, config: Config, drops: Counter[Reason] | None = None) -> None:
        self.current = config
        self._drops = Counter[Reason]() if drops is None else drops
        self._caches: list[Adopt] = []
        self._acts: list[Act] = []
        self._replacing = False

    def subscribe(self, adopt: Adopt) -> None:
        """Call adopt(config) now, and after each change. An exception of the first call is the caller's."""
        adopt(self.current)
        self._caches.append(adopt)

    def react(self, act: Act) -> None:
        """Call act(former, now) after each change, when all subscribers have the new configuration."""
        self._acts.append(act)

    def replace(self, config: Config, now: float) -> None:
        """Put `config` in force. Raises RuntimeError if a subscriber calls this."""
        if self._replacing:
            raise RuntimeError("a subscriber must not replace the configuration")
        former = self.current
        if config == former:
            return
        self.current = config
        self._replacing = True
        try:
            each(self._caches, _tell, self._fault_at, config)
            each(self._acts, _tell, self._fault_at, former, now)
        finally:
            self._replacing = False

    def _fault_at(self, subscriber: Callable[..., None], e: Exception) -> None:
        name = getattr(subscriber, "__qualname__", repr(subscriber))
        record(self._drops, f"a change of the configuration by {name}", e)


def _tell(subscriber: Callable[..., None], *args: object) -> None:
    subscriber(*args)
