"""Without --config-net a guest configures itself from us: DHCP clients, router solicitation, DHCPv6.

The clients' hook scripts are our own, because the packaged ones write to /etc. Clients run with directories of their
own mounted over /run and /var/lib, which is all they need to be root for, and the guest's root may do it.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ..support import User, wait_for
from .support import GATEWAY, GATEWAY6, HOST, HOST6, Guest, Lan, read_all

SCRIPTS = {
    "udhcpc": """#!/bin/sh
case "$1" in bound|renew)
    ip address replace "$ip/$mask" dev "$interface"
    ip link set "$interface" mtu "${mtu:-1500}"
    ip route replace default via "$router" ;;
esac
""",
    "dhclient": """#!/bin/sh
set >> "$0.log"
case "$reason" in BOUND|REBOOT)
    ip address replace "$new_ip_address/$new_subnet_mask" dev "$interface"
    ip link set "$interface" mtu "${new_interface_mtu:-1500}"
    ip route replace default via "$new_routers" ;;
BOUND6)
    ip address replace "$new_ip6_address/128" dev "$interface" ;;
esac
""",
}
PRIVATE = 'mount -t tmpfs tmpfs /run && mount -t tmpfs tmpfs /var/lib && mkdir -p /var/lib/dhcpcd && exec "$@"'
Client = Callable[..., None]
FREE = HOST.rpartition(".")[0] + ".77"  # on the guest's subnet, and no host's
FREE6 = HOST6.rpartition(":")[0] + ":77"


@pytest.fixture
def bare_guest(lan: Lan, anyone: User) -> Iterator[Guest]:
    """A guest whose interface is up and has nothing more."""
    with lan.pasta(anyone, "-q") as guest:
        guest.run("ip", "link", "set", interface(guest), "up")
        yield guest


def interface(guest: Guest) -> str:
    (name,) = [link["ifname"] for link in guest.show("link") if link["ifname"] != "lo"]
    assert isinstance(name, str)
    return name


def addresses(guest: Guest, *args: str) -> list[str]:
    links = guest.show(*args, "address", "show", "dev", interface(guest))
    return [f"{a['local']}/{a['prefixlen']}" for link in links for a in link.get("addr_info", ())]


def script(directory: Path, name: str) -> str:
    path = directory / name
    path.write_text(SCRIPTS[name])
    path.chmod(0o755)
    return str(path)


def check_ipv4(guest: Guest, lan: Lan) -> None:
    """Address, default route and MTU are the ones offered, and data flows."""
    wait_for(lambda: f"{HOST}/24" in addresses(guest, "-4"), "the client configures the address")
    wait_for(lambda: [r for r in guest.show("route") if r["dst"] == "default" and r["gateway"] == GATEWAY], "a route")
    with lan.host.listen("127.0.0.1") as listener, guest.connect(GATEWAY, listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(b"welcome")
        assert read_all(client) == b"welcome"


def mtu(guest: Guest) -> int:
    (link,) = guest.show("link", "show", "dev", interface(guest))
    assert isinstance(link["mtu"], int)
    return link["mtu"]


@pytest.mark.parametrize("more", [(), ("-B",), ("-a",), ("-r", "10.9.9.9")], ids=" ".join)
def test_udhcpc(bare_guest: Guest, lan: Lan, open_dir: Path, more: tuple[str, ...]) -> None:
    """As it is; with the broadcast flag; with a probe for the address; with the wish for another one."""
    flags = ("-i", interface(bare_guest), "-f", "-q", "-n", "-t", "5", "-T", "1", "-O", "mtu", *more)
    bare_guest.run("busybox", "udhcpc", *flags, "-s", script(open_dir, "udhcpc"))
    check_ipv4(bare_guest, lan)
    assert mtu(bare_guest) == 65520


def test_dhclient(bare_guest: Guest, lan: Lan, open_dir: Path) -> None:
    files = ("-lf", f"{open_dir}/leases", "-pf", f"{open_dir}/pid", "-sf", script(open_dir, "dhclient"))
    with bare_guest.popen("dhclient", "-4", "-d", "-1", *files, interface(bare_guest)):
        check_ipv4(bare_guest, lan)
        assert mtu(bare_guest) == 65520


def test_dhclient_with_a_lease_from_elsewhere(bare_guest: Guest, lan: Lan, open_dir: Path) -> None:
    """It asks for that address (INIT-REBOOT), has a NAK at once, and begins anew."""
    name = interface(bare_guest)
    times = "renew never; rebind never; expire never;"
    lease = f'lease {{ interface "{name}"; fixed-address 10.9.9.9; option subnet-mask 255.0.0.0; {times} }}\n'
    (open_dir / "leases").write_text(lease)
    files = ("-lf", f"{open_dir}/leases", "-pf", f"{open_dir}/pid", "-sf", script(open_dir, "dhclient"))
    with (
        (open_dir / "said").open("w") as said,
        bare_guest.popen("dhclient", "-4", "-d", "-1", *files, name, stderr=said),
    ):
        check_ipv4(bare_guest, lan)
    text = (open_dir / "said").read_text()
    assert re.search(r"DHCPREQUEST for 10\.9\.9\.9.*\n.*DHCPNAK from [^\n]*\n.*DHCPDISCOVER", text, re.S), text


def test_dhclient_for_ipv6(bare_guest: Guest, open_dir: Path) -> None:
    guest = bare_guest
    wait_for(lambda: "tentative" not in guest.run("ip", "-6", "address").stdout, "link-local address")
    files = ("-lf", f"{open_dir}/leases", "-pf", f"{open_dir}/pid", "-sf", script(open_dir, "dhclient"))
    with guest.popen("dhclient", "-6", "-d", "-1", *files, interface(guest)):
        wait_for(lambda: f"{HOST6}/128" in addresses(guest, "-6"), "an address by DHCPv6")


def test_dhclient_for_a_prefix_as_well(bare_guest: Guest, open_dir: Path) -> None:
    """There is none, which does not keep the client from its address."""
    guest = bare_guest
    wait_for(lambda: "tentative" not in guest.run("ip", "-6", "address").stdout, "link-local address")
    files = ("-lf", f"{open_dir}/leases", "-pf", f"{open_dir}/pid", "-sf", script(open_dir, "dhclient"))
    with guest.popen("dhclient", "-6", "-N", "-P", "-d", "-1", *files, interface(guest)):
        wait_for(lambda: f"{HOST6}/128" in addresses(guest, "-6"), "an address by DHCPv6")


def test_dhcpcd(bare_guest: Guest, lan: Lan) -> None:
    """Both families by one client; its drop of privileges needs users that a guest of one user does not have."""
    flags = ("-B", "-f", "/dev/null", "-c", "/bin/true", "--noipv4ll", "--option", "interface_mtu")
    command = ("unshare", "--mount", "sh", "-c", PRIVATE, "sh", "dhcpcd", *flags, interface(bare_guest))
    with bare_guest.popen(*command):
        check_ipv4(bare_guest, lan)


def test_static_address_by_dhcpcd(bare_guest: Guest) -> None:
    """It probes for the address first, and takes it only if no other station answers (RFC 5227)."""
    flags = ("-B", "-4", "-f", "/dev/null", "-c", "/bin/true", "--noipv4ll", "-S", f"ip_address={FREE}/24")
    command = ("unshare", "--mount", "sh", "-c", PRIVATE, "sh", "dhcpcd", *flags, interface(bare_guest))
    with bare_guest.popen(*command):
        wait_for(lambda: f"{FREE}/24" in addresses(bare_guest, "-4"), "the client takes the address")


def test_inform_by_dhcpcd(bare_guest: Guest) -> None:
    """A client with an address asks for the rest: the router is what only the answer can tell."""
    flags = ("-B", "-4", "-f", "/dev/null", "-c", "/bin/true", "--noipv4ll", f"--inform={FREE}/24")
    command = ("unshare", "--mount", "sh", "-c", PRIVATE, "sh", "dhcpcd", *flags, interface(bare_guest))
    with bare_guest.popen(*command):
        wait_for(lambda: [r for r in bare_guest.show("route") if r.get("gateway") == GATEWAY], "a route")
        assert addresses(bare_guest, "-4") == [f"{FREE}/24"]


def test_arping(bare_guest: Guest) -> None:
    """Duplicate address detection: free addresses are free, the gateway's is not, nor is any for other requests."""
    arping = ("busybox", "arping", "-I", interface(bare_guest), "-c", "2", "-w", "3")
    for address in (FREE, HOST, "169.254.3.4"):
        assert "Received 0 " in bare_guest.run(*arping, "-D", address, check=False).stdout
    assert "Received 0 " not in bare_guest.run(*arping, "-D", GATEWAY, check=False).stdout
    bare_guest.run("ip", "address", "add", f"{FREE}/24", "dev", interface(bare_guest))
    for address in (GATEWAY, "198.51.100.200"):
        assert "Received 0 " not in bare_guest.run(*arping, address, check=False).stdout


def test_duplicate_address_detection(bare_guest: Guest) -> None:
    """The kernel's own: an address that is free becomes one of the guest, that of the gateway does not."""
    name = interface(bare_guest)
    free = FREE6 + "/64"
    bare_guest.run("ip", "address", "add", free, "dev", name)
    bare_guest.run("ip", "address", "add", f"{GATEWAY6}/64", "dev", name)
    flags = {free: "tentative", f"{GATEWAY6}/64": "tentative"}

    def settled() -> bool:
        (link,) = bare_guest.show("-6", "address", "show", "dev", name)
        for a in link["addr_info"]:
            flags[f"{a['local']}/{a['prefixlen']}"] = next((f for f in ("dadfailed", "tentative") if a.get(f)), "")
        return "tentative" not in flags.values()

    wait_for(settled, "the kernel has found out")
    assert (flags[free], flags[f"{GATEWAY6}/64"]) == ("", "dadfailed")


def test_router_solicitation(lan: Lan, anyone: User) -> None:
    """The kernel's own: an address of the prefix, a default route, the MTU (it takes none above the link's)."""
    with lan.pasta(anyone, "-q", "-m", "1400") as guest:
        guest.run("ip", "link", "set", interface(guest), "up")
        check_ipv6(guest, lan)


def check_ipv6(guest: Guest, lan: Lan) -> None:
    """Address, default route and MTU are the ones advertised, and data flows."""
    prefix = ipaddress.ip_interface(f"{HOST6}/64").network
    wait_for(lambda: [a for a in addresses(guest, "-6") if ipaddress.ip_interface(a).network == prefix], "an address")
    wait_for(lambda: [r for r in guest.show("-6", "route") if r["dst"] == "default"], "a default route")
    wait_for(lambda: "tentative" not in guest.run("ip", "-6", "address").stdout, "the address is not a duplicate")
    conf = f"/proc/sys/net/ipv6/conf/{interface(guest)}/mtu"
    assert guest.run("cat", conf).stdout == "1400\n"
    with lan.host.listen("::1") as listener, guest.connect(GATEWAY6, listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        with server:
            client.sendall(b"x")
            assert server.recv(1) == b"x"


def test_rdisc6(bare_guest: Guest) -> None:
    guest = bare_guest
    wait_for(lambda: "tentative" not in guest.run("ip", "-6", "address").stdout, "link-local address")
    said = guest.run("rdisc6", "-1", "-w", "5000", interface(guest)).stdout
    assert re.search(rf"Prefix\s*: {HOST6.removesuffix('2')}(2)?/64", said)
    assert re.search(r"MTU\s*:\s*65520 bytes", said)
    assert re.search(r"Source link-layer address\s*: 9A:55:9A:55:9A:55", said)


@pytest.mark.parametrize("option", ["-4", "-6"])
def test_one_family_only(lan: Lan, ordinary_user: User, option: str) -> None:
    with lan.pasta(ordinary_user, "-q", "--config-net", option) as guest:
        assert bool([a for a in addresses(guest, "-4") if a.startswith(HOST)]) == (option == "-4")
        assert bool([a for a in addresses(guest, "-6") if a.startswith(HOST6)]) == (option == "-6")
        bind, address = ("127.0.0.1", GATEWAY) if option == "-4" else ("::1", GATEWAY6)
        with lan.host.listen(bind) as listener, guest.connect(address, listener.getsockname()[1]):
            pass
