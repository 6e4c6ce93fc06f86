"""Changes of ports while pasta runs: the port drivers of podman 6 and rootlesskit 3.1, by their command lines."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ..traffic.support import HOST6, Lan
from .checks import forwards, forwards_udp, listeners
from .support import Bound, Client, Daemon, Site, sandbox

ROOTLESSKIT = (
    "pasta --stderr --ns-ifname=tap0 --mtu=65520 --config-net --address=10.0.2.100 --netmask=24 --gateway=10.0.2.2 "
    "--dns-forward=10.0.2.3 --no-map-gw --tcp-ports=none --udp-ports=none --conf-path={dir}/pasta.sock {pid}"
)
PODMAN = (
    "pasta --config-net --pid {run}/rootless-netns-conn.pid -c {run}/pasta.sock --dns-forward 169.254.1.1 -t none "
    "-u none -T none -U none --no-map-gw --quiet --netns {netns} --map-guest-addr 169.254.1.2"
)


def silently(client: Client, line: str, **names: str) -> None:
    """A call of pesto that works: status 0, and nothing to show."""
    done = client.run(line, **names)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr


def tcp(lan: Lan) -> set[str]:
    return {local for protocol, local in listeners(lan.host) if protocol == "tcp"}


@pytest.fixture
def rootlesskit(client: Client) -> Iterator[tuple[Site, Daemon]]:
    site = sandbox(client)
    yield site, site.start(ROOTLESSKIT)
    site.close()


def test_rootlesskit_probes(client: Client) -> None:
    done = client.run("pesto --version")
    assert done.returncode == 0 and done.stdout


def test_rootlesskit(rootlesskit: tuple[Site, Daemon], lan: Lan) -> None:
    """Ports are there when pesto has ended, and gone when the next one has."""
    site, daemon = rootlesskit
    client = site.client
    silently(client, "pesto -A --tcp-ports=0.0.0.0/8080:80 {dir}/pasta.sock")
    silently(client, "pesto -A --tcp-ports=::/8080:80 {dir}/pasta.sock")
    silently(client, "pesto -A --udp-ports=0.0.0.0/5353:53 {dir}/pasta.sock")
    assert tcp(lan) == {"0.0.0.0:8080", "[::]:8080"}
    forwards(8080, 80)(site, daemon, lan)
    forwards(8080, 80, at=HOST6)(site, daemon, lan)
    forwards_udp(5353, 53)(site, daemon, lan)
    silently(client, "pesto -D --tcp-ports=0.0.0.0/8080:80 {dir}/pasta.sock")
    assert tcp(lan) == {"[::]:8080"}
    silently(client, "pesto -D --tcp-ports=::/8080:80 {dir}/pasta.sock")
    silently(client, "pesto -D --udp-ports=0.0.0.0/5353:53 {dir}/pasta.sock")
    assert listeners(lan.host) == set()


def test_port_that_is_taken(rootlesskit: tuple[Site, Daemon], lan: Lan) -> None:
    """The driver shows what pesto says; nothing has changed."""
    site, daemon = rootlesskit
    with lan.host.listen("0.0.0.0") as taken:
        port = taken.getsockname()[1]
        said = site.client.fails(f"pesto -A --tcp-ports=0.0.0.0/{port}:80 {{dir}}/pasta.sock")
        assert str(port) in said and "Address already in use" in said
    assert daemon.alive() and listeners(lan.host) == set()


def test_pasta_is_gone(client: Client) -> None:
    said = client.fails("pesto -D --tcp-ports=0.0.0.0/8080:80 {dir}/pasta.sock")
    assert f"{client.dir}/pasta.sock" in said


def test_podman(engine: Client, lan: Lan) -> None:
    """One pasta for all bridges; containers come and go."""
    run = f"/run/user/{engine.user.uid}/containers/networks/rootless-netns"
    site = Bound(engine, f"{run}/rootless-netns")
    site.names["run"] = run
    daemon = site.start(PODMAN)
    silently(engine, "pesto --add -t 0.0.0.0/8080 -t [::]/8080 -u 0.0.0.0/5353 {run}/pasta.sock", run=run)
    silently(engine, "pesto --add -t 127.0.0.1/9000 {run}/pasta.sock", run=run)
    assert tcp(lan) == {"0.0.0.0:8080", "[::]:8080", "127.0.0.1:9000"}
    forwards(8080, 8080)(site, daemon, lan)
    forwards(8080, 8080, at=HOST6)(site, daemon, lan)
    forwards(9000, 9000, at="127.0.0.1", source="host")(site, daemon, lan)
    silently(engine, "pesto --delete -t 0.0.0.0/8080 -t [::]/8080 -u 0.0.0.0/5353 {run}/pasta.sock", run=run)
    assert listeners(lan.host) == {("tcp", "127.0.0.1:9000")}
    site.close()
    daemon.expect_end("its namespace is gone")
    assert listeners(lan.host) == set()
