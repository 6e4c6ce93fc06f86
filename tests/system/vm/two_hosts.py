"""Two hosts with the same addresses, as before and after a migration, and a peer that reaches one of them."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

from ..support import wait_for
from ..traffic.support import GATEWAY, GATEWAY6, HOST, HOST6, PEER6, Lan, Namespace, new_lan, root_user
from .support import Passt

REPAIR = os.environ.get("PASST_REPAIR")  # another passt-repair than ours, to try that either serves
HELPER = "import sys; sys.argv[0] = 'passt-repair'; from passt.repair import main; sys.exit(main())"


class TwoHosts:
    """`first` and `second` are the same peer, each with its host. Until `switch`, packets go to the first."""

    def __init__(self, first: Lan, second: Lan) -> None:
        self.first, self.second = first, second
        self.peer = first.peer

    def switch(self) -> None:
        """The addresses are at the second host from now on."""
        self.peer.run("ip", "route", "add", f"{HOST}/32", "dev", "eth1")
        self.peer.run("ip", "-6", "route", "add", f"{HOST6}/128", "dev", "eth1")

    def switch_back(self) -> None:
        """For the next test."""
        self.peer.run("ip", "route", "del", f"{HOST}/32", "dev", "eth1", check=False)
        self.peer.run("ip", "-6", "route", "del", f"{HOST6}/128", "dev", "eth1", check=False)


@contextlib.contextmanager
def two_hosts(address: str = HOST, address6: str = HOST6) -> Iterator[TwoHosts]:
    """`address` and `address6` are those of the second host."""
    with new_lan(root_user()) as first:
        second = Namespace(first.host.argv(["unshare", "--net"]), root_user())
        try:
            peer = first.peer
            peer.run("ip", "link", "add", "eth1", "type", "veth", "peer", "name", "eth0", "netns", str(second.pid))
            for name in ("all", "eth1"):
                peer.write(f"/proc/sys/net/ipv4/conf/{name}/rp_filter", "0")
            peer.run("ip", "link", "set", "eth1", "up")
            second.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
            second.run("ip", "address", "add", f"{address6}/64", "dev", "eth0", "nodad")
            second.run("ip", "link", "set", "lo", "up")
            second.run("ip", "link", "set", "eth0", "up")
            (far,) = peer.show("link", "show", "eth1")
            for known in (GATEWAY6, PEER6):  # they are on the peer's other interface, which alone answers for them
                second.run("ip", "neighbour", "add", known, "lladdr", far["address"], "dev", "eth0", "nud", "permanent")
            second.run("ip", "route", "add", "default", "via", GATEWAY)
            second.run("ip", "-6", "route", "add", "default", "via", GATEWAY6)
            wait_for(lambda: "tentative" not in second.run("ip", "-6", "address").stdout, "link-local address")
            yield TwoHosts(first, Lan(second, peer))
        finally:
            second.close()


@contextlib.contextmanager
def helper(lan: Lan, server: Passt) -> Iterator[None]:
    """passt-repair beside `server`, until it ends by itself with status 0."""
    program = (REPAIR,) if REPAIR else (sys.executable, "-c", HELPER)
    with lan.host.popen(*program, f"{server.path}.repair") as process:
        server.expect("A helper .* is connected")
        yield
        wait_for(lambda: process.poll() is not None, "passt-repair ends")
        assert process.returncode == 0
