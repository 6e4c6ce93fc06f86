"""Root of a namespace that answers in the kernel's place: `forger.py`, in the user and network namespaces of the guest.

It writes to every netlink socket in the namespace, as fast as it can: answers to all requests that the program may
make, of every kind and with lengths that no message has. It prints a line when it begins, and sends until it is killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
from struct import pack

NLMSG_ERROR, NLMSG_DONE, RTM_NEWLINK, SOCK_DIAG_BY_FAMILY = 2, 3, 16, 20
PROTOCOLS = 0, 4  # route, sock_diag
SEQUENCES = 24  # requests of a start are fewer
LENGTHS = 0, 15, 20, 1 << 31
EIO = pack("=i", -5)


def message(kind: int, sequence: int, length: int) -> bytes:
    return pack("=IHHII", length, kind, 2, sequence, 0) + EIO


FORGED = [
    b"".join(message(kind, sequence, length) for sequence in range(SEQUENCES))
    for length in LENGTHS
    for kind in (NLMSG_ERROR, NLMSG_DONE, RTM_NEWLINK, SOCK_DIAG_BY_FAMILY)
]


def main() -> None:
    ours = {}
    for protocol in PROTOCOLS:
        ours[protocol] = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol)
        ours[protocol].bind((0, 0))
        ours[protocol].setblocking(False)
    own = {sock.getsockname()[0] for sock in ours.values()}
    print("ready", flush=True)
    # The kernel gives a socket the process's number as its port, as soon as that connects
    while True:
        with open("/proc/net/netlink") as table:
            ports = {(int(line.split()[1]), int(line.split()[2])) for line in list(table)[1:]}
        with open("/proc/loadavg") as load:
            last = int(load.read().split()[4])  # the latest process
        guesses = {(protocol, last + i) for protocol in PROTOCOLS for i in range(3)}
        for protocol, port in ports | guesses:
            if protocol in ours and port and port not in own and port != os.getpid():
                for forged in FORGED:
                    with contextlib.suppress(ConnectionRefusedError, BlockingIOError):
                        ours[protocol].sendto(forged, (port, 0))


if __name__ == "__main__":
    main()
