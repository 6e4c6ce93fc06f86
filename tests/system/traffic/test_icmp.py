"""Pings through pasta, by ping(8)."""

from __future__ import annotations

import re

import pytest

from ..support import User
from .support import GATEWAY, GATEWAY6, PEER, PEER6, Guest, new_lan, root_user


@pytest.mark.parametrize("address", [GATEWAY, PEER, GATEWAY6, PEER6])
@pytest.mark.parametrize("size", [0, 56, 1400, 8000])
def test_ping(guest: Guest, address: str, size: int) -> None:
    done = guest.run("ping", "-n", "-c", "3", "-i", "0.02", "-W", "5", "-s", str(size), address)
    assert "3 received, 0% packet loss" in done.stdout
    assert re.findall(r"seq=(\d)", done.stdout) == ["1", "2", "3"]
    assert "DUP" not in done.stdout


def test_pings_at_once_keep_apart(guest: Guest) -> None:
    """Several identifiers to one target: each ping(8) gets its own answers only."""
    script = "".join(f"ping -n -c 5 -i 0.02 -W 5 {address} & " for address in (GATEWAY, GATEWAY6) * 3) + "wait"
    done = guest.run("sh", "-c", script)
    assert done.stdout.count("5 received, 0% packet loss") == 6
    assert "DUP" not in done.stdout


def test_host_that_forbids_ping_sockets(ordinary_user: User) -> None:
    """One warning names the sysctl; everything else goes on."""
    with new_lan(root_user(), pings=False) as lan, lan.pasta(ordinary_user, "--debug", "--config-net") as guest:
        done = guest.run("ping", "-n", "-c", "2", "-i", "0.02", "-W", "1", PEER, check=False)
        assert "0 received" in done.stdout
        with lan.peer.listen(PEER) as listener, guest.connect(PEER, listener.getsockname()[1]):
            pass
        assert guest.said().count("net.ipv4.ping_group_range") == 1
