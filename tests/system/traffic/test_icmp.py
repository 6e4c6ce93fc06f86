"""Pings through pasta, by ping(8)."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from ..support import User
from .support import AGENT_PYTHON, GATEWAY, GATEWAY6, PEER, PEER6, Guest, new_lan, root_user

# Once an answer has come, ping(8) waits no longer for others than an interval, or twice as long as for that one. With a
# deadline it goes on, and sends, until it has as many as it is to send; their numbers show whose they are.
PATIENT = ("-w", "10")


@pytest.mark.parametrize("address", [GATEWAY, PEER, GATEWAY6, PEER6])
@pytest.mark.parametrize("size", [0, 56, 1400, 8000])
def test_ping(guest: Guest, address: str, size: int) -> None:
    done = guest.run("ping", "-n", "-c", "3", "-i", "0.02", *PATIENT, "-s", str(size), address)
    assert "3 received" in done.stdout
    assert re.findall(r"seq=(\d)", done.stdout) == ["1", "2", "3"]
    assert "DUP" not in done.stdout


RAW = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)
s.settimeout(10)
s.sendto(bytes.fromhex("0800f7fd00010001"), (sys.argv[1], 0))
reply = s.recv(100)[20:]
print(reply[0], int.from_bytes(reply, "big") % 0xFFFF)
"""


def test_checksum_of_a_reply(guest: Guest) -> None:
    """A raw socket gets it as we wrote it, and ping(8) on one complains of a wrong one."""
    assert guest.run(AGENT_PYTHON, "-c", RAW, PEER).stdout == "0 0\n"


def test_pings_at_once_keep_apart(guest: Guest) -> None:
    """Several identifiers to one target: each ping(8) gets its own answers only."""
    ping = f"ping -n -c 5 -i 0.02 {' '.join(PATIENT)}"
    done = guest.run("sh", "-c", "".join(f"{ping} {address} & " for address in (GATEWAY, GATEWAY6) * 3) + "wait")
    assert done.stdout.count("5 received") == 6
    assert Counter(re.findall(r"seq=(\d)", done.stdout)) == {str(n): 6 for n in range(1, 6)}
    assert "DUP" not in done.stdout


def test_host_that_forbids_ping_sockets(ordinary_user: User) -> None:
    """One warning names the sysctl; everything else goes on."""
    with new_lan(root_user(), pings=False) as lan, lan.pasta(ordinary_user, "--debug", "--config-net") as guest:
        done = guest.run("ping", "-n", "-c", "2", "-i", "0.02", "-W", "1", PEER, check=False)
        assert "0 received" in done.stdout
        with lan.peer.listen(PEER) as listener, guest.connect(PEER, listener.getsockname()[1]):
            pass
        assert guest.said().count("net.ipv4.ping_group_range") == 1
