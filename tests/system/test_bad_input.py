"""Errors at start: status 1, one line, nothing left behind."""

from __future__ import annotations

import os
import subprocess
import tempfile

import pytest

from .support import (
    DEADLINE,
    Host,
    Runner,
    User,
    leftovers,
    new_host,
)


def fails(done: subprocess.CompletedProcess[str], text: str) -> None:
    """Status 1 and one line."""
    assert done.returncode == 1
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--no-such-option"], "pasta: unrecognized option '--no-such-option'"),
        (["999999999"], "Couldn't find process 999999999"),
        (["--netns", "no-such-name"], "Couldn't open network namespace /run/netns/no-such-name: No such file"),
        (["--netns", "/etc/passwd"], "Couldn't open network namespace /etc/passwd: not a namespace"),
        (["--netns", "/proc/self/ns/uts"], "not a namespace of that kind"),
        (["-m", "65536", "true"], "Invalid MTU: 65536"),
        (["-m", "67", "true"], "Invalid MTU: 67"),
        (["-t", "99999", "true"], "Invalid port specifier -t 99999: '99999' at character 1: the last port is 65535"),
        (["-t80-70", "true"], "Invalid port specifier -t 80-70: '70' at character 4: the range ends before it begins"),
        (["--tcp-ports=22,", "true"], "Invalid port specifier -t 22,: '' at character 4: a port is missing"),
        (["-u", "53:0", "true"], "Invalid port specifier -u 53:0: '0' at character 4: port 0 can't be forwarded"),
        (["-t", "", "true"], "Invalid port specifier -t : '' at character 1: a port is missing"),
        (["-t", "80\nERROR", "true"], "Invalid port specifier -t 80\\nERROR: '80\\nERROR' at character 1: not a port"),
        (["-t", "\udcff", "true"], "Invalid port specifier -t \\udcff: '\\udcff' at character 1: not a port"),
        (["-t", "~1-65535", "true"], "Invalid port specifier -t ~1-65535: '~1-65535' at character 1: every port is"),
        (["-t", "%a/b/80", "true"], "Invalid port specifier -t %a/b/80: 'b/80' at character 4: not a port"),
        (["-t", "fe80::1/80", "true"], "'fe80::1' at character 1: a link-local address needs its interface"),
        (["-T", "127.0.0.1/80", "true"], "-T and -U listen on the loopback of the namespace: leave out address"),
        (["-t", "80:127.0.0.1", "true"], "'127.0.0.1' is a loopback address, which only connections from the host's"),
        (["-t", "80", "-t", "70-90", "true"], "Port 80 is asked for twice, by '-t 70-90' and by '-t 80'"),
        (["-t", "80", "-t", "none", "true"], "Port forwarding mode 'none' conflicts with previous mode: '-t 80' and"),
        (["-t", "auto", "-t", "80", "true"], "Specific ports cannot be specified together with all/none/auto: '"),
        (["-t", "~20-30,~25", "true"], "Overlapping excluded ranges -t ~20-30,~25: '~25' at character 8: port 25 is"),
        (["--no-tcp", "-t", "80", "true"], "TCP port forwarding requested but TCP is disabled: -t 80"),
        (["--no-udp", "-U", "53", "true"], "UDP port forwarding requested but UDP is disabled: -U 53"),
        (["-4", "-t", "::1/80", "true"], "Invalid port specifier -t ::1/80: ::1, but IPv6 is off"),
        (["--no-splice", "--splice-only", "true"], "Both --splice-only and --no-splice given"),
        (["-a", "300.0.0.1", "true"], "Invalid address: 300.0.0.1"),
        (["-i", "nosuch0", "true"], "Invalid interface name nosuch0: No such device"),
        (["-P", "/no/such/dir/pid", "true"], "Couldn't open PID file /no/such/dir/pid: No such file or directory"),
        (["-p", "/no/such/dir/p", "true"], "Couldn't open capture file /no/such/dir/p: No such file or directory"),
        (["-l", "/no/such/dir/l", "true"], "Couldn't open log file /no/such/dir/l: No such file or directory"),
        (["--runas", "no-such-user", "true"], "Invalid --runas option: no-such-user"),
    ],
)
def test_bad_input(pasta: Runner, args: list[str], text: str) -> None:
    fails(pasta.run(*args), text)


def test_interface_without_addresses_is_unusable(hosted: Runner, host: Host) -> None:
    host.veth("eth9")
    fails(hosted.run("-i", "eth9", "true"), "Interface eth9 is not usable: no address")
    fails(hosted.run("--outbound-if4", "eth9", "true"), "External interface not usable: eth9 has no IPv4 address")
    fails(hosted.run("--outbound-if4", "eth8", "true"), "External interface not usable: eth8: No such device")


def test_outbound_address_that_the_host_does_not_have(hosted: Runner) -> None:
    """One rule for all protocols: it is applied, or refused at start."""
    for address in "198.51.100.99", "2001:db8:5::8":
        message = f"Couldn't bind sockets to outbound address {address}: Cannot assign requested address (--outbound; "
        fails(hosted.run("-o", address, "true"), message)
    assert hosted.run("-o", "198.51.100.7", "true").returncode == 0


def test_other_peoples_namespaces(user_pasta: Runner, root: User) -> None:
    fails(user_pasta.run("1"), "Couldn't open network namespace /proc/1/ns/net: Permission denied")


def test_own_namespace(pasta: Runner) -> None:
    named = [str(os.getpid())] if pasta.user.is_root else ["--netns", "/proc/self/ns/net"]
    fails(pasta.run(*named), "is the network namespace that pasta runs in: give another one")


def test_name_that_is_taken(root_pasta: Runner) -> None:
    with new_host("veth eth5") as target:
        before = target.show("link")
        fails(root_pasta.run("--netns", target.name, "-I", "eth5"), "Failed to create tap device eth5")
        assert target.show("link") == before


def test_runas_needs_root(user_pasta: Runner) -> None:
    fails(
        user_pasta.run("--runas", "65534", "true"), "Couldn't change to UID 65534, GID 65534: Operation not permitted"
    )


def test_no_tun_device(root: User, pasta: Runner) -> None:
    """In a mount namespace where /dev/net is empty."""
    command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /dev/net && exec "$@"', "sh"]
    done = subprocess.run(
        [*command, *pasta.user.pasta("--config-net", "true")], cwd="/", env=pasta.user.env,
        capture_output=True, text=True, check=False, timeout=DEADLINE,
    )  # fmt: skip
    fails(done, "Failed to open /dev/net/tun: No such file or directory")
    assert not leftovers("-m\0passt")


def test_forbidden_user_namespaces(user_pasta: Runner) -> None:
    """In a user namespace that may not have any below it."""
    script = 'echo 0 > /proc/sys/user/max_user_namespaces && exec "$@"'
    command = [
        "unshare",
        "--user",
        "--map-root-user",
        "sh",
        "-c",
        script,
        "sh",
        user_pasta.user.python,
        "-m",
        "passt",
        "true",
    ]
    done = subprocess.run(
        user_pasta.user.command(command), cwd="/", env=user_pasta.user.env, capture_output=True, text=True, check=False,
        timeout=DEADLINE,
    )  # fmt: skip
    fails(done, "Couldn't create namespaces: No space left on device (user namespaces are forbidden or used up")


def test_help_and_version(pasta: Runner) -> None:
    done = pasta.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--map-host-loopback" in done.stdout
    done = pasta.run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("pasta ")


# Both commands, as they are typed ------------------------------------------------------------------------------------

TYPED = [
    ("pasta --map-guest-address 1.2.3.4",
     "pasta: unrecognized option '--map-guest-address': did you mean --map-guest-addr? See pasta --help"),
    ("pasta --host-lo-to-ns-lo --no-such --version", "pasta: unrecognized option '--no-such': see pasta --help"),
    ("pasta --one-off", "--one-off is for passt mode only: pasta always ends with its command or namespace"),
    ("passt -T 5 -s {dir}/s", "passt: invalid option -- 'T': -T (--tcp-ns) is for pasta mode only: a virtual machine "
     "reaches the host's loopback at the address of --map-host-loopback"),
    ("pasta -P {dir}/pid --netns {dir}/none",
     "Couldn't open network namespace {dir}/none: No such file or directory"),
    ("pasta --nsrun-dir {dir} --netns none",
     "Couldn't open network namespace {dir}/none: No such file or directory"),
    ("pasta -c {dir}/s --api-socket {dir}/s true", "Both --conf-path and --api-socket are {dir}/s: give each a path of "
     "its own"),
    ("pasta --no-copy-routes true", "--no-copy-routes needs --config-net"),
    ("passt extra -s {dir}/s", "Extra non-option argument: extra (passt takes options only)"),
    ("passt -s {dir}/s -c {dir}/s", "Both --socket and --conf-path are {dir}/s: give each a path of its own"),
    ("passt -s {dir}/s -i nosuch0", "Invalid interface name nosuch0: No such device"),
    ("passt -s {dir}/s -P {dir}/none/pid", "Couldn't open PID file {dir}/none/pid: No such file or directory"),
    ("passt -s {dir}/none/s", "Couldn't bind UNIX socket {dir}/none/s: No such file or directory"),
    ("passt -F 77", "Invalid --fd: 77 (it is not open)"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "message"), TYPED)
def test_typed(pasta: Runner, line: str, message: str) -> None:
    """Status 1, the line, and nothing is left: no process, and no file but a PID file that was being opened."""
    with tempfile.TemporaryDirectory(prefix=f"passt-{os.getpid()}-") as directory:
        os.chmod(directory, 0o777)
        program, *args = line.format(dir=directory).split()
        module = "passt.vm" if program == "passt" else "passt"
        done = subprocess.run(
            pasta.user.command([pasta.user.python, "-m", module, *args]), cwd="/", env=pasta.user.env,
            capture_output=True, text=True, check=False, timeout=DEADLINE,
        )  # fmt: skip
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == message.format(dir=directory) + "\n"
        assert set(os.listdir(directory)) <= {"pid"}
        assert not leftovers(directory)
