"""Code of an attacker in the daemon: `intruder.py ATTACKS PROGRAM OPTIONS...` starts pasta or passt with these options,
in the foreground, and acts in place of its loop, after the lock-down, with all descriptors and rights of the daemon.

ATTACKS is a JSON object: the names of the attacks to make, and what they need to know. The answer is a line of JSON
with the errnos of all attempts of each attack, 0 for one that succeeded. An attack tries every descriptor, since an
attacker knows what each of them is.
"""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Callable
from functools import cache
from struct import pack, unpack_from
from typing import Any, NoReturn

from passt import cli
from passt.daemon import common

OUR_PID = os.getpid()  # the system call is not left later
LAST = 512  # descriptors up to here are tried
ROUTE, SOCK_DIAG = 0, 4
HOST_ID = 4711  # the number that the attacker gives to the host's network namespace
SO_MARK = 36

Told = dict[str, Any]


def attribute(kind: int, data: bytes) -> bytes:
    return pack("=HH", len(data) + 4, kind) + data + bytes(-len(data) % 4)


def message(kind: int, body: bytes, flags: int = 0) -> bytes:
    return pack("=IHHII", 16 + len(body), kind, 1 | 4 | flags, 99, 0) + body  # NLM_F_REQUEST | NLM_F_ACK


def link_message(kind: int, index: int, *attributes: bytes, flags: int = 0) -> bytes:
    return message(kind, pack("=BxHiII", 0, 0, index, 0, 0) + b"".join(attributes), flags)


@cache  # the objects own the descriptors
def netlink_sockets(protocol: int) -> list[Any]:
    found = []
    for fd in range(LAST):
        try:
            sock = socket.SocketType(fileno=fd)
        except OSError:
            continue
        if sock.family == socket.AF_NETLINK and sock.proto == protocol:
            found.append(sock)
        else:
            sock.detach()
    return found


def say(protocol: int, *requests: bytes) -> list[int]:
    """The errno of the last request, for every socket of that protocol; 0: done."""
    return [[_errno(sock, request) for request in requests][-1] for sock in netlink_sockets(protocol)]


def _errno(sock: Any, request: bytes) -> int:
    try:
        sock.sendto(request, (0, 0))
        while True:
            data = sock.recv(65536, socket.MSG_DONTWAIT)
            _, kind, _, sequence, _ = unpack_from("=IHHII", data)
            if (kind, sequence) == (2, 99):
                return -int(unpack_from("=i", data, 16)[0])
    except OSError as e:
        return e.errno or -1


def name_the_host() -> bytes:
    """Give our own network namespace, the host's, a number in that of the socket."""
    return message(88, bytes(4) + attribute(1, pack("=i", HOST_ID)) + attribute(2, pack("=I", OUR_PID)))  # RTM_NEWNSID


def delete_link(told: Told) -> list[int]:
    there = attribute(46, pack("=i", HOST_ID)), attribute(3, told["victim"].encode() + b"\0")  # TARGET_NETNSID, IFNAME
    return say(ROUTE, name_the_host(), link_message(17, 0, *there)) + say(ROUTE, link_message(17, 0, there[1]))


def link_on_nic(told: Told) -> list[int]:
    """A device in the guest on top of the host's interface."""
    tried = []
    for kind, data in (("macvlan", b""), ("ipvlan", b""), ("vlan", attribute(1, pack("=H", 7)))):
        info = attribute(1, kind.encode()) + (attribute(2, data) if data else b"")
        on = attribute(5, pack("=I", told["nic"])), attribute(37, pack("=i", HOST_ID))  # LINK, LINK_NETNSID
        new = link_message(16, 0, attribute(3, b"tapped\0"), *on, attribute(18, info), flags=0x600)
        tried += say(ROUTE, name_the_host(), new)
    return tried


def move_link(told: Told) -> list[int]:
    """The guest's interface into the host's namespace."""
    return say(ROUTE, link_message(16, told["bait"], attribute(19, pack("=I", OUR_PID))))  # IFLA_NET_NS_PID


def destroy_socket(told: Told) -> list[int]:
    ports = pack("!HH", *told["connection"])
    ends = socket.inet_aton("127.0.0.1") + bytes(12)
    sock_id = ports + ends + ends + pack("=III", 0, 0xFFFFFFFF, 0xFFFFFFFF)  # no cookie
    return say(SOCK_DIAG, message(21, pack("=BBBxI", socket.AF_INET, 6, 0, 0xFFF) + sock_id))


def mark_in_control_message(told: Told) -> list[int]:
    tried = []
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        sock: Any = socket.SocketType(family, socket.SOCK_DGRAM)
        control = [(socket.SOL_SOCKET, SO_MARK, pack("=I", 1))]
        try:
            sock.sendmsg([b"x"], control, 0, (address, told["udp"]))
            tried.append(0)
        except OSError as e:
            tried.append(e.errno or -1)
    return tried


def mark_by_option(told: Told) -> list[int]:
    socket.SocketType(socket.AF_INET, socket.SOCK_DGRAM).setsockopt(socket.SOL_SOCKET, SO_MARK, 1)
    return [0]


ATTACKS: dict[str, Callable[[Told], list[int]]] = {
    f.__name__: f
    for f in (delete_link, link_on_nic, move_link, destroy_socket, mark_in_control_message, mark_by_option)
}


def main() -> int:
    told: Told = json.loads(sys.argv[1])

    def attack(*_: object) -> NoReturn:
        outcome = {name: ATTACKS[name](told) for name in told["attacks"]}
        os.write(1, f"{json.dumps(outcome)}\n".encode())
        os._exit(0)

    common.run = attack  # type: ignore[assignment]
    return cli.main([sys.argv[2], "--foreground", *sys.argv[3:]])


if __name__ == "__main__":
    sys.exit(main())
