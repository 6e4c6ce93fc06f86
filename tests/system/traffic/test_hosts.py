"""Hosts that have one family only."""

from __future__ import annotations

import pytest

from ..support import User
from .support import GATEWAY, GATEWAY6, PEER, PEER6, new_lan, root_user


@pytest.mark.parametrize(
    ("families", "bind", "gateway", "peer"),
    [({"v6": False}, "127.0.0.1", GATEWAY, PEER), ({"v4": False}, "::1", GATEWAY6, PEER6)],
    ids=["ipv4", "ipv6"],
)
def test_host_of_one_family(ordinary_user: User, families: dict[str, bool], bind: str, gateway: str, peer: str) -> None:
    with new_lan(root_user(), **families) as lan, lan.pasta(ordinary_user, "--config-net") as guest:
        missing = "IPv6" if "v6" in families else "IPv4"
        assert f"{missing}: no external interface as template (no interface has a usable route)" in guest.said()
        for server, address in ((lan.host.listen(bind), gateway), (lan.peer.listen(peer), peer)):
            with server, guest.connect(address, server.getsockname()[1]) as client:
                accepted, _ = server.accept()
                with accepted:
                    client.sendall(b"x")
                    assert accepted.recv(1) == b"x"
        guest.run("ping", "-n", "-c", "1", "-W", "5", peer)
