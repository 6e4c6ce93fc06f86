"""The configuration in force: the one place of every value that may change while we run.

A `Config` is frozen. A change is another `Config` that takes its place (`replace`). These modules make one:

    writer                     fields                                            when
    -------------------------  ------------------------------------------------  ------------------------------
    `conf.names.follow`          `dns` of both families, `dns_search`,             resolv.conf says something else
                               `dns_match`, `dns_hosts`
    `ports.forwards.Forwards`        `forwards`                                        a client changes the rules

There are three ways to use it. No object keeps a `Config`, or a part of one, in any other way.

    way                 for                                       sees a change
    ------------------  ----------------------------------------  ----------------------------------------------
    `current`           the control plane reads it each time      at once
    `subscribe(adopt)`  values that the data plane keeps, since   adopt(config): now, which fills them, and again
                        a look-up for each packet costs too much    with each change
    `react(act)`        what a change makes necessary             act(former, now): when all caches are filled

A cache has one function that fills it, and one line that subscribes this function:

    settings.subscribe(self._adopt)

A fault of one subscriber does not keep the others from being told. It is logged, and counted as "fault".

A flow keeps the values that it began with as long as it lasts: our MAC in its pre-cooked header, the longest segment
or datagram (from the MTU), the address and interface that its socket is bound to, the host that it leads to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ..loop.each import each, record
from .config import Config

Adopt = Callable[[Config], None]
Act = Callable[[Config, float], None]


class Settings:
    """Holds the `Config` in force. Only `replace` writes `current`."""

    __slots__ = ("_acts", "_caches", "_drops", "_replacing", "current")

    def __init__(self, config: Config, drops: Counter[str] | None = None) -> None:
        self.current = config
        self._drops = Counter[str]() if drops is None else drops
        self._caches: list[Adopt] = []
        self._acts: list[Act] = []
        self._replacing = False

    def subscribe(self, adopt: Adopt) -> None:
        """Call adopt(config) now, and whenever another one is in force. A fault of this first call is the caller's."""
        adopt(self.current)
        self._caches.append(adopt)

    def react(self, act: Act) -> None:
        """Call act(former, now) whenever another configuration is in force, and all subscribers have it."""
        self._acts.append(act)

    def replace(self, config: Config, now: float) -> None:
        """`config` is in force from now on. Raises RuntimeError when a subscriber tries that."""
        if self._replacing:
            raise RuntimeError("the configuration is replaced while subscribers are told of another one")
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
