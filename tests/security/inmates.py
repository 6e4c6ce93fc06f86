"""Services in the sandbox: `inmates.py MODE LOG` replays the corpora of the stateful fuzzing targets there.

The targets reach the code that a guest, a client of the control sockets or a writer of resolv.conf can reach: error
paths, limits, faults, log lines at every level, which go to a file that was opened before. The filter is the daemon's
own: sockets of the targets are fakes, and their preparation comes before the filter.
"""

from __future__ import annotations

import os
import sys

from fuzz.table import BY_NAME
from passt import PASST, log, log_file, seccomp
from passt.conf.options import Options
from passt.daemon import seccomp_table
from passt.daemon.detach import Sandbox, detach
from passt.sandbox import isolation

TARGETS = "tap", "stack", "tcp", "udp", "icmp", "stream", "reassembly", "control", "resolv_conf", "log_file"
SHARING = "vhost", "migration"  # of a machine that shares its memory


def main() -> None:
    mode, path = sys.argv[1:]
    assert seccomp_table.LOADED
    seccomp.binding()
    log.setup(mode, log.TRACE, syslog=False, file=log_file.opened(mode, path))
    log.stop_stderr()
    names = (*TARGETS, *(SHARING if mode == PASST else ()))
    targets = [(name, BY_NAME[name].load(), BY_NAME[name].corpus()) for name in names]
    for _, target, corpus in targets:
        target.one(corpus[0])  # what a target prepares once
    isolation.become(isolation.choose_identity(None))
    detach(Options(mode=mode, foreground=True), None, Sandbox(mode, False))
    executions = 0
    for name, target, corpus in targets:
        for data in corpus:
            try:
                target.one(data)
            except Exception as e:
                os.write(1, f"{name}: {data.hex()}: {e!r}\n".encode())
                os._exit(1)
            executions += 1
    os.write(1, b"%d\n" % executions)
    os._exit(0)


if __name__ == "__main__":
    main()
