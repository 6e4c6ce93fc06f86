"""The interpreter's own habits, changed for the sandbox: it must not make system calls at moments that no module knows.

    moment                                       the interpreter would                     instead
    -------------------------------------------  ----------------------------------------  --------------------------
    a socket is collected that was not closed,   ask for both ends (getpeername(2)) to     a name without system calls
    or is put into a message                     name it
    a warning, as that about such a socket       read the source line (open(2))            nothing
    an exception in a finalizer or a callback    read the source lines of a traceback      a line in the log
    an exception that ends a thread              likewise                                  likewise

A system call that is not declared ends the process.
"""

from __future__ import annotations

import socket
import sys
import threading
import time
import warnings
from typing import Any

from .. import log


def prepare() -> None:
    """Make these changes, for the rest of the process's life."""
    socket.socket.__repr__ = _name  # type: ignore[method-assign]
    warnings.simplefilter("ignore")
    sys.unraisablehook = _ignored
    threading.excepthook = _ignored


def _name(sock: Any) -> str:
    return f"<socket {sock.fileno()}>"


def _ignored(what: Any) -> None:
    text = f"An exception that could not be handled: {what.exc_value!r}"
    log.warn_ratelimited(f"interpreter {what.exc_type.__name__}", text, time.monotonic(), 1.0)
