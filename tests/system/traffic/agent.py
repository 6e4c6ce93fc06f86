"""Creates sockets in its own namespace, for a test outside: a socket stays in its namespace when it is passed on.

Standard input is a SOCK_SEQPACKET socket. Each message on it is a JSON array [family, type, protocol]; the answer is
the descriptor of a new socket, with an empty JSON object, and a second object when the test's copy is the only one: to
close it is the end of the socket then. Or the answer is {"errno": N}. The first message out is {"pid": N}: the process
is there. It ends when the other end closes. Run by path, with the standard library only.
"""

from __future__ import annotations

import json
import os
import signal
import socket


def main() -> None:
    """Serve until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    control = socket.socket(fileno=0)
    control.send(json.dumps({"pid": os.getpid()}).encode())
    while request := control.recv(256):
        family, kind, protocol = json.loads(request)
        try:
            with socket.socket(family, kind, protocol) as made:
                socket.send_fds(control, [b"{}"], [made.fileno()])
            control.send(b"{}")
        except OSError as e:
            control.send(json.dumps({"errno": e.errno}).encode())


if __name__ == "__main__":
    main()
