"""The guest's configuration, from the options and the host, in the steps that pasta and passt have in common.

It imports the modules that read the host, so it is imported itself when the program is loaded: before the change to a
user that may not be able to read Python's files.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from .. import NEVER, log
from ..conf import decide as conf_decide
from ..conf import follow as conf_follow
from ..conf import outbound
from ..conf.argv import Options
from ..lean.records import replace
from ..linux import host_tables
from ..linux.host_tables import HostTables
from ..policy.config import PASTA
from ..ports import fit
from . import common

if TYPE_CHECKING:
    from ..conf.decide import Decision
    from ..conf.resolv_conf import Follower


def decide(options: Options, names: Follower) -> tuple[Decision, HostTables | None]:
    """Read the host, decide, and try what can be tried before sockets are opened. Raises Fatal or OSError.

    The tables of the host are returned if they are to be followed: they are watched from before they were read.
    """
    log.step("read the host's network configuration")
    have_v6 = os.path.exists(common.IF_INET6)
    tables = host_tables.HostTables() if conf_follow.wanted(options) else None
    host = host_tables.read_host() if tables is None else tables.read(NEVER)
    decision = conf_decide.decide(options, host, names.current, have_v6=have_v6)
    log.step("try the outbound addresses and interfaces")
    outbound.check(decision.config)
    log.step("raise the limit of descriptors")
    common.raise_descriptor_limit()
    log.step("open sockets on the host")
    follows = options.mode == PASTA and not options.no_namespace
    return replace(decision, config=fit.fit(decision.config, follows=follows)), tables
