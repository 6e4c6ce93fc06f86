"""podman beyond one command line: restarts, the network of its bridges, and its handling of failures."""

from __future__ import annotations

import contextlib
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support import wait_for
from ..traffic.support import HOST, Lan
from .checks import exchange, listen, listeners
from .support import Bound, Client, read_pid

DEFAULTS = "-u none -T none -U none --no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2"
ONE_PORT = f"pasta --config-net -t 2222-2222:22-22 --dns-forward 169.254.1.1 {DEFAULTS}"


def bound(engine: Client) -> Bound:
    return Bound(engine, f"/run/user/{engine.user.uid}/netns/netns-{uuid.uuid4()}")


def test_restart_on_the_same_port(engine: Client, lan: Lan) -> None:
    """`podman restart`: the old namespace goes, the new pasta binds the port at once, with connections left behind."""
    site = bound(engine)
    daemon = site.start(ONE_PORT)
    with contextlib.ExitStack() as connections:
        for _ in range(4):
            server = listen(site.guest, site.address(), 22)
            exchange(lan.peer, HOST, 2222, server)
            source = lan.peer.make_socket()
            source.connect((HOST, 2222))  # open when its end comes
            connections.enter_context(server.accept()[0])
            site.close()
            daemon.expect_end("its namespace is gone")
            site = bound(engine)
            daemon = site.start(ONE_PORT)  # or it fails: Address already in use
    site.close()
    daemon.expect_end("its namespace is gone")


def test_kubernetes_stops_many_at_once(engine: Client) -> None:
    """Each looks at its own name in the directory that they share."""
    sites = [bound(engine) for _ in range(3)]
    daemons = [site.start(f"pasta --config-net -t none {DEFAULTS}") for site in sites]
    sites[1].close()
    daemons[1].expect_end("its namespace is gone")
    assert daemons[0].alive() and daemons[2].alive()
    for site, daemon in ((sites[0], daemons[0]), (sites[2], daemons[2])):
        site.close()
        daemon.expect_end("its namespace is gone")


@pytest.fixture
def rootless_netns(engine: Client) -> Iterator[Bound]:
    """The namespace of podman's bridges, and its directory."""
    made = Bound(engine, f"/run/user/{engine.user.uid}/containers/networks/rootless-netns/rootless-netns")
    made.names["pid_file"] = f"{Path(made.path).parent}/rootless-netns-conn.pid"
    yield made
    made.close()
    engine.place.run("rm", "-rf", str(Path(made.path).parent))


ROOTLESS = f"pasta --config-net --pid {{pid_file}} --dns-forward 169.254.1.1 -t none {DEFAULTS}"


def _pid(site: Bound) -> int:
    """As podman reads it."""
    return read_pid(Path(f"/proc/{site.client.place.pid}/root{site.names['pid_file']}"))


def test_rootless_netns_and_its_end(rootless_netns: Bound) -> None:
    """The namespace is unmounted and removed, then its pasta gets SIGTERM, which may come too late: ESRCH is fine."""
    daemon = rootless_netns.start(ROOTLESS)
    assert _pid(rootless_netns) == daemon.pid
    os.kill(daemon.pid, 0)
    rootless_netns.close()
    try:
        os.kill(daemon.pid, signal.SIGTERM)
    except ProcessLookupError:
        pass  # gone already, as podman knows
    daemon.expect_end("its namespace is gone")


def test_rootless_netns_has_lost_its_pasta(rootless_netns: Bound, lan: Lan) -> None:
    """`rootless netns program no longer running, trying to start it again`: the same line, the same namespace, the same
    PID file."""
    rootless_netns.start(ROOTLESS).end(signal.SIGKILL)
    wait_for(lambda: len(rootless_netns.guest.show("link")) == 1, "the interface has gone with it")
    second = rootless_netns.start(ROOTLESS)
    assert _pid(rootless_netns) == second.pid
    assert len(rootless_netns.addresses()) == 2
    second.end()
    assert listeners(lan.host) == set()


def test_port_that_is_taken(engine: Client, lan: Lan) -> None:
    """podman's and cockpit's tests look for the port and `ddress already in use` in what podman shows."""
    site = bound(engine)
    with listen(lan.host, "0.0.0.0", 2222):
        said = site.fails(ONE_PORT)
    first, second = said.splitlines()
    assert first == "Failed to bind port 2222 (Address already in use) for option '-t 2222-2222:22-22'"
    assert second.startswith("TCP port 2222 is held by ")
    assert len(site.guest.show("link")) == 1
    site.start(ONE_PORT).end()
    site.close()


def test_option_that_podman_does_not_see(engine: Client) -> None:
    """`--net=pasta:-t8080` is no `-t` for podman, which adds its own: the original and we refuse to guess."""
    site = bound(engine)
    said = site.fails(f"pasta --config-net -t8080 --dns-forward 169.254.1.1 -t none {DEFAULTS}")
    assert said.startswith("Port forwarding mode 'none' conflicts with previous mode")
    site.close()


def test_namespace_that_is_no_more(engine: Client) -> None:
    said = engine.fails(f"pasta --config-net -t none {DEFAULTS}", netns="/run/user/1/netns/gone")
    assert "/run/user/1/netns/gone" in said and "No such file or directory" in said
