"""Names: real resolvers that answer, refuse, or are silent, and a resolv.conf that changes while pasta runs.

The host of these tests has an /etc of its own, mounted over the machine's; each resolver is a dnsmasq that tells its
name as the text of `who.test`.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ..support import User, wait_for
from .support import GATEWAY, HOST6, PEER, PEER6, Guest, Lan, Namespace, new_lan, root_user
from .test_configuration import PRIVATE, interface

FORWARD, FORWARD6 = "169.254.1.1", "64:ff9b:1:4b8e:472e:a5c8:a9fe:101"  # as podman and Lix have them
SILENT, CLOSED = "198.51.100.4", "198.51.100.5"  # the peer drops packets to the first; no server listens at the other
SECOND = "198.51.100.6"
DROP = "table inet silent {{ chain input {{ type filter hook input priority 0; ip daddr {address} drop; }}; }}"
DHCLIENT = """#!/bin/sh
echo "$new_domain_name_servers" >> "$0.log"
case "$reason" in BOUND|REBOOT)
    ip address replace "$new_ip_address/$new_subnet_mask" dev "$interface"
    ip route replace default via "$new_routers" ;;
esac
"""


@contextlib.contextmanager
def resolver(where: Namespace, address: str, name: str) -> Iterator[None]:
    """A resolver at port 53 of `address`."""
    records = [f"--txt-record=who.test,{name}", "--address=/name.test/192.0.2.77", "--address=/name.test/2001:db8::77"]
    records += [f"--txt-record=long.test,{str(i) * 200}" for i in range(8)]
    flags = ["-k", "--no-resolv", "--no-hosts", "--no-daemon", "--bind-interfaces", "-u", "root", "-x", ""]
    flags += ["--edns-packet-max=4096"]
    with where.popen("dnsmasq", *flags, "--listen-address", address, *records, stdout=subprocess.DEVNULL) as server:

        def listening() -> bool:
            assert server.poll() is None, f"dnsmasq ended with status {server.returncode}"
            with where.make_socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
                return sock.connect_ex((address, 53)) == 0

        wait_for(listening, "dnsmasq listens")
        yield


@dataclass
class Site:
    """A host with an /etc of its own."""

    lan: Lan
    etc: Path

    def resolv_conf(self, *servers: str) -> None:
        """Replace the file, whatever it was."""
        path = self.etc / "resolv.conf.new"
        path.write_text("".join(f"nameserver {server}\n" for server in servers))
        path.chmod(0o644)
        path.rename(self.etc / "resolv.conf")


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with new_lan(root_user()) as lan, tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as servers:
        os.chmod(name, 0o755)
        subprocess.run(["cp", "-a", "/etc/.", name], check=False, stderr=subprocess.DEVNULL)  # what may be read will do
        (Path(name) / "resolv.conf").unlink(missing_ok=True)
        lan.host.run("mount", "--bind", name, "/etc")
        for address in (SILENT, CLOSED, SECOND):
            lan.peer.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        lan.peer.run("nft", "-f", "-", input=DROP.format(address=SILENT))
        for where, address, server in (
            (lan.peer, PEER, "peer"), (lan.peer, PEER6, "peer6"), (lan.peer, SECOND, "second"),
            (lan.host, "127.0.0.53", "stub"),
        ):  # fmt: skip
            servers.enter_context(resolver(where, address, server))
        yield Site(lan, Path(name))


def dig(guest: Guest, at: str, *question: str) -> str:
    """The output of dig(1) for one query, with the timeout of glibc."""
    where = [f"@{at}"] if at else []
    return guest.run("dig", "+short", "+time=5", "+tries=1", *where, *question).stdout.strip()


def who(guest: Guest, at: str, *options: str) -> str:
    """The name of the resolver that answers."""
    return dig(guest, at, *options, "who.test", "TXT").strip('"')


@contextlib.contextmanager
def forwarding(site: Site, user: User, *options: str) -> Iterator[Guest]:
    """A guest as podman's."""
    usual = ("-q", "--config-net", "--no-map-gw", "-t", "none", "-u", "none", "-T", "none", "-U", "none")
    with site.lan.pasta(user, *usual, "--dns-forward", FORWARD, *options) as guest:
        yield guest


@pytest.mark.parametrize("first", [SILENT, CLOSED])
@pytest.mark.parametrize("tcp", [[], ["+tcp"]], ids=["udp", "tcp"])
def test_the_first_resolver_is_dead(site: Site, anyone: User, first: str, tcp: list[str]) -> None:
    site.resolv_conf(first, PEER)
    with forwarding(site, anyone) as guest:
        assert who(guest, FORWARD, *tcp) == "peer"
        assert dig(guest, FORWARD, *tcp, "name.test", "AAAA") == "2001:db8::77"


def test_a_resolver_dies_and_comes_back(site: Site, ordinary_user: User) -> None:
    site.resolv_conf("198.51.100.7", PEER)
    site.lan.peer.run("ip", "address", "add", "198.51.100.7/24", "dev", "eth0")
    with forwarding(site, ordinary_user) as guest:
        with resolver(site.lan.peer, "198.51.100.7", "mortal"):
            assert who(guest, FORWARD) == "mortal"
        assert who(guest, FORWARD) == "peer"


@pytest.mark.parametrize(("at", "server", "name"), [(FORWARD, PEER6, "peer6"), (FORWARD6, PEER, "peer")])
@pytest.mark.parametrize("tcp", [[], ["+tcp"]], ids=["udp", "tcp"])
def test_across_families(site: Site, anyone: User, at: str, server: str, name: str, tcp: list[str]) -> None:
    site.resolv_conf(server)
    with forwarding(site, anyone, "--dns-forward", FORWARD6) as guest:
        assert who(guest, at, *tcp) == name


def test_the_own_family_is_asked_first(site: Site, ordinary_user: User) -> None:
    site.resolv_conf(PEER6, PEER)
    with forwarding(site, ordinary_user, "--dns-forward", FORWARD6) as guest:
        assert who(guest, FORWARD) == "peer"
        assert who(guest, FORWARD6) == "peer6"


def test_a_guest_without_the_family_of_the_only_resolver(site: Site, ordinary_user: User) -> None:
    site.resolv_conf(PEER6)
    with site.lan.pasta(ordinary_user, "-q", "--config-net", "-4") as guest:
        assert who(guest, GATEWAY) == "peer6"


def test_long_answers(site: Site, anyone: User) -> None:
    """In one datagram, in fragments, and by TCP after truncation."""
    site.resolv_conf(CLOSED, PEER)
    expected = [f'"{str(i) * 200}"' for i in range(8)]
    with forwarding(site, anyone, "-m", "1280") as guest:
        for options in (["+bufsize=4096", "+ignore"], ["+bufsize=512"], ["+tcp"]):
            found = dig(guest, FORWARD, *options, "long.test", "TXT")
            assert sorted(found.splitlines()) == expected, options


def test_no_resolver_answers(site: Site, ordinary_user: User) -> None:
    """The guest gets an error at once, and the log a warning."""
    site.resolv_conf(CLOSED)
    with forwarding(site, ordinary_user) as guest:
        client = guest.connect(FORWARD, 53, socket.SOCK_DGRAM)
        client.send(b"\0\7\1\0\0\1\0\0\0\0\0\0\4name\4test\0\0\1\0\1")
        with pytest.raises(ConnectionRefusedError):
            client.recv(512)
        with pytest.raises(ConnectionRefusedError):
            guest.connect(FORWARD, 53)
        wait_for(lambda: f"No resolver of the host answers: {CLOSED} (Connection refused)" in guest.said(), "a warning")


@pytest.mark.parametrize("servers", [(PEER,), (SILENT, PEER), (CLOSED, PEER6)])
def test_glibc_asks_for_both_families_from_one_port(site: Site, anyone: User, servers: tuple[str, ...]) -> None:
    site.resolv_conf(*servers)
    with forwarding(site, anyone) as guest:
        script = 'f=$(mktemp); echo "nameserver $1" > $f; mount --bind $f /etc/resolv.conf; rm $f; '
        script += "getent ahosts name.test"
        done = guest.run("unshare", "--mount", "sh", "-c", script, "sh", FORWARD)
        assert set(re.findall(r"^\S+", done.stdout, re.MULTILINE)) == {"192.0.2.77", "2001:db8::77"}


# Changes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["rename", "in place", "link"])
def test_resolv_conf_changes(site: Site, anyone: User, how: str) -> None:
    site.resolv_conf(PEER)
    target = site.etc / "daemon" / "stub.conf"
    target.parent.mkdir(exist_ok=True)
    if how == "link":
        target.write_text(f"nameserver {PEER}\n")
        (site.etc / "resolv.conf").unlink()
        (site.etc / "resolv.conf").symlink_to("daemon/stub.conf")
    with forwarding(site, anyone) as guest:
        assert who(guest, FORWARD) == "peer"
        if how == "rename":
            site.resolv_conf(SECOND)
        elif how == "link":
            new = target.with_name("new")
            new.write_text(f"nameserver {SECOND}\n")
            new.rename(target)
        else:
            (site.etc / "resolv.conf").write_text(f"nameserver {SECOND}\n")
        wait_for(lambda: who(guest, FORWARD) == "second", "the other resolver is asked")
        assert who(guest, FORWARD, "+tcp") == "second"
    target.unlink(missing_ok=True)


def test_resolv_conf_is_of_no_use_any_more(site: Site, ordinary_user: User) -> None:
    site.resolv_conf(PEER)
    with forwarding(site, ordinary_user) as guest:
        (site.etc / "resolv.conf").unlink()
        wait_for(lambda: "keeping its previous contents" in guest.said(), "a warning")
        assert who(guest, FORWARD) == "peer"
        site.resolv_conf(SECOND)
        wait_for(lambda: who(guest, FORWARD) == "second", "the other resolver is asked")


# A resolver on the host's loopback ---------------------------------------------------------------------------------


def test_stub_resolver_told_as_the_gateway(site: Site, anyone: User) -> None:
    site.resolv_conf("127.0.0.53")
    with site.lan.pasta(anyone, "-q", "--config-net") as guest:
        assert who(guest, GATEWAY) == "stub"
        assert who(guest, GATEWAY, "+tcp") == "stub"


def test_stub_resolver_forwarded(site: Site, anyone: User) -> None:
    site.resolv_conf("127.0.0.53")
    with forwarding(site, anyone, "--dns-forward", FORWARD6) as guest:
        for at in (FORWARD, FORWARD6):
            assert who(guest, at) == "stub"
            assert who(guest, at, "+tcp") == "stub"


def test_dhcp_tells_what_works(site: Site, anyone: User) -> None:
    """dhclient(8) is told an address that leads to 127.0.0.53, and after a change, another one."""
    site.resolv_conf("127.0.0.53")
    with tempfile.TemporaryDirectory() as name, site.lan.pasta(anyone, "-q", "--dhcp-dns") as guest:
        os.chmod(name, 0o777)
        script = Path(name) / "script"
        script.write_text(DHCLIENT)
        script.chmod(0o755)
        link = interface(guest)
        guest.run("ip", "link", "set", link, "up")
        dhclient = (
            "dhclient",
            "-4",
            "-1",
            "-d",
            "-sf",
            str(script),
            "-lf",
            f"{name}/lease",
            "-pf",
            f"{name}/pid",
            link,
        )

        def told() -> str:
            with guest.popen("unshare", "-m", "sh", "-c", PRIVATE, "sh", *dhclient, stderr=subprocess.DEVNULL):
                log = Path(f"{script}.log")
                wait_for(lambda: log.exists() and log.read_text().split(), "dhclient has a lease")
                found = log.read_text().split()[-1]
                log.unlink()
            return found

        assert told() == GATEWAY
        assert who(guest, GATEWAY) == "stub"
        site.resolv_conf(SECOND)
        wait_for(lambda: who(guest, GATEWAY) == "second", "what it was told goes on to work")
        assert told() == SECOND


def test_command_on_a_host_with_a_stub_resolver(site: Site, anyone: User) -> None:
    """Without any option about names: what the namespace's resolv.conf says is answered there, too."""
    site.resolv_conf("127.0.0.53")
    with site.lan.pasta(anyone, "-q", "--config-net") as guest:
        found = guest.run("getent", "ahosts", "name.test").stdout
        assert set(re.findall(r"^\S+", found, re.MULTILINE)) == {"192.0.2.77", "2001:db8::77"}
        assert who(guest, "") == "stub"
        assert who(guest, "127.0.0.53", "+tcp") == "stub"


def test_host_addresses_stay_the_hosts(site: Site, ordinary_user: User) -> None:
    """--dns-host may be anything that the host reaches, several times over."""
    site.resolv_conf(PEER)
    with (
        resolver(site.lan.host, HOST6, "host6"),
        forwarding(site, ordinary_user, "--dns-host", CLOSED, "--dns-host", HOST6, "--dns-host", SECOND) as guest,
    ):
        assert who(guest, FORWARD) == "second"
        site.resolv_conf(SILENT)
        assert who(guest, FORWARD) == "second"
