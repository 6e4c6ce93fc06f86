"""A process in the sandbox whose interpreter has something to say: `absent_minded.py MODE`, which prints `done`."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import warnings

from passt import log, seccomp
from passt.conf.options import Options
from passt.daemon import seccomp_table
from passt.daemon.detach import Sandbox, detach
from passt.sandbox import isolation


class Careless:
    def __del__(self) -> None:
        raise ValueError("in a finalizer")


def forget_sockets() -> None:
    """Of every kind; the connected ones have a peer that their name would tell."""
    server = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(server.getsockname())
    ring: list[object] = [server, client, server.accept()[0], socket.socket(socket.AF_INET, socket.SOCK_DGRAM)]
    ring.append(ring)


def main() -> None:
    mode = sys.argv[1]
    assert seccomp_table.LOADED
    seccomp.binding()
    log.setup(mode, log.DEBUG, syslog=False)
    gc.disable()
    forget_sockets()
    isolation.become(isolation.choose_identity(None))
    detach(Options(mode=mode, foreground=True), None, Sandbox(mode, False))
    gc.collect()
    log.err(f"{socket.socket(socket.AF_INET, socket.SOCK_DGRAM)!r}, collected at once")
    Careless()
    warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    threading.excepthook(threading.ExceptHookArgs((OSError, OSError("in a thread"), None, None)))
    os.write(1, b"done\n")
    os._exit(0)


if __name__ == "__main__":
    main()
