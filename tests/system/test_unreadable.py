"""Root starts the program from a folder that no other user may read, as a checkout under /root is.

Root becomes `nobody` on the way. From then on not one module can be read, so each must have been imported before: the
program reports every module that is looked for later (SPY), whether it could be read or not. All options are tried.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from passt import PASST, PASTA
from passt.conf.table import listed
from passt.linux import tun
from passt.linux.syscall import CLONE_NEWNET, setns

from .support import DEADLINE, Host, environment, new_host, wait_for

PACKAGE = Path(__file__).parent.parent.parent / "passt"
SPY = """
import os, sys
class Spy:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if os.geteuid():
            os.write(2, f"late import of {name}\\n".encode())
sys.meta_path.insert(0, Spy)
"""
LATE = "late import"
# options that only print
ENDS_EARLIER = {"help", "version", "doctor", "print-seccomp", "print-capabilities", "completion"}


@pytest.fixture(scope="module")
def private() -> Iterator[Path]:
    """A folder with mode 0700 that holds a copy of the package."""
    with tempfile.TemporaryDirectory(prefix="passt-unreadable-") as name:
        folder = Path(name)
        assert folder.stat().st_mode & 0o777 == 0o700
        shutil.copytree(PACKAGE, folder / "passt", ignore=shutil.ignore_patterns("__pycache__"))
        yield folder


def command(private: Path, program: str, *args: str) -> list[str]:
    """Isolated, and without `site`: its hook for editable installations finds the modules in the readable checkout."""
    paths = [str(private), sysconfig.get_path("purelib")]
    start = f"{SPY}sys.path += {paths}; sys.argv[0] = {program!r}; from passt.__main__ import main; sys.exit(main())"
    return [sys.executable, "-I", "-B", "-S", "-c", start, *args]


def run(private: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(private, "pasta", *args),
        check=False,
        env=environment(),
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--trace",),
        ("-d", "--stats", "1"),
        ("-c", "{}/control.socket"),
        ("--api-socket", "{}/api.socket"),
        ("-p", "{}/capture.pcap", "-l", "{}/log"),
        ("-t", "auto", "-u", "auto", "-T", "auto", "-U", "auto"),
        ("--splice-only",),
        ("-D", "192.0.2.53", "--dns-forward", "192.0.2.99"),
    ],
)
def test_pasta_runs_a_command(private: Path, options: tuple[str, ...]) -> None:
    given = [option.format(private) for option in options]
    done = run(private, "--config-net", *given, "--", "sh", "-c", "ip link show lo >/dev/null && echo served")
    assert (done.returncode, done.stdout) == (0, "served\n"), done.stderr
    assert "Error" not in done.stderr and LATE not in done.stderr, done.stderr


def test_pasta_serves_a_namespace(private: Path) -> None:
    holder = subprocess.Popen(["unshare", "--net", "sleep", str(DEADLINE)])
    try:
        wait_for(
            lambda: Path(f"/proc/{holder.pid}/ns/net").readlink() != Path("/proc/self/ns/net").readlink(),
            "a network namespace",
        )
        pid_file = private / "pid"
        done = run(private, "--config-net", "-P", str(pid_file), str(holder.pid))
        assert done.returncode == 0 and LATE not in done.stderr, done.stderr
        assert int(pid_file.read_text())
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize(
    "options", [(), ("--trace",), ("-c", "{}/control.vm"), ("-t", "20022:22"), ("-d", "--stats", "1")]
)
def test_passt_serves_a_machine(private: Path, options: tuple[str, ...]) -> None:
    path = private / "vm.socket"
    given = [option.format(private) for option in options]
    process = subprocess.Popen(
        command(private, "passt", "-f", "-s", str(path), *given),
        env=environment(),
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            assert LATE not in line
            if "You can now start qemu" in line:
                break
        else:
            pytest.fail("passt ended at start")
        process.send_signal(signal.SIGTERM)
        _, rest = process.communicate(timeout=DEADLINE)
        assert process.returncode == 0 and LATE not in rest, rest
    finally:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


# All options ---------------------------------------------------------------------------------------------------------

COMMON = [
    "-t 20081 -u 20081 --freebind --no-map-gw --map-guest-addr 192.0.2.7",
    "--map-host-loopback 192.0.2.8 -H guest --fqdn guest.example.org -e",
    "-4 -a 192.0.2.5 -n 24 -g 192.0.2.1 -m 1400 -i eth0 -o 198.51.100.7 --outbound-if4 eth0",
    "-6 --outbound-if6 eth0 -M 02:00:00:00:00:02 -D 2001:db8::53 -S example.org --dns-forward 2001:db8::54",
    "--dns-host 2001:db8:1::1 --dns-forward 192.0.2.54",
    "-P {dir}/pid -c {dir}/c --api-socket {dir}/a -l {dir}/log --log-size 100000 -p {dir}/pcap --stats 1,json",
    "-l {dir}/log --log-format json --ready-fd 1 --follow routes --busy-poll 50",
    "--runas 65534:65534 --chroot-fallback",
    "--no-multicast --follow off",
    "--no-tcp --no-udp --no-icmp --no-dhcp --no-dhcpv6 --no-ndp --no-ra",
    "-d --stats 1",
    "--trace",
    "-q",
]
LINES = {
    PASTA: [
        *(f"pasta {line} --config-net -f -- true" for line in COMMON),
        "pasta --dhcp-dns --dhcp-search --config-net -- true",
        "pasta -T 20082 -U 20082 -t auto -u auto --host-lo-to-ns-lo --config-net -- true",
        "pasta --no-splice --config-net --follow-link -- true",
        "pasta --splice-only -- true",
        "pasta -I tap7 --ns-mac-addr 02:00:00:00:00:03 --config-net -- true",
        "pasta --no-copy-routes --no-copy-addrs --config-net -- true",
        "pasta -f --netns {target} --nsrun-dir /run/netns --no-netns-quit --userns /proc/self/ns/user",
        "pasta -f --netns {target} --netns-only",
        "pasta -f -F 9",
    ],
    PASST: [
        *(f"passt {line} -f -1 -s {{dir}}/s" for line in COMMON),
        "passt -f --no-dhcp-dns --no-dhcp-search --socket {dir}/s",
        "passt -f --socket-path {dir}/s",
        "passt -f --vhost-user -s {dir}/s",
        "passt -f --vhost-user -s {dir}/s --repair-path {dir}/r --migrate-exit --migrate-no-linger",
        "passt -f --one-off --socket {dir}/s",
        "passt -f -F 9",
    ],
}
ALL = [line for lines in LINES.values() for line in lines]
FOR_EVER = " -- true"  # lines without this serve until they are ended


@pytest.mark.parametrize("mode", LINES)
def test_all_options_are_in_the_lines(mode: str) -> None:
    """A new option needs a place in one of them."""
    words = {word for line in LINES[mode] for word in line.split()}
    missing = [row.name for row in listed(mode) if not {f"--{row.name}", f"-{row.short}"} & words]
    assert set(missing) == ENDS_EARLIER - ({"print-capabilities"} if mode == PASTA else set())


def descriptor_9(host: Host, mode: str) -> None:
    """In the child: in the namespace of `host`, with a tap or a connected socket as descriptor 9."""
    with open(host.path) as f:
        setns(f.fileno(), CLONE_NEWNET)
    fd = tun.open_tap("tap9").fd if mode == PASTA else socket.socketpair()[0].detach()
    os.dup2(fd, 9, inheritable=True)


@pytest.mark.parametrize("line", ALL)
def test_no_import_is_late(private: Path, host: Host, line: str) -> None:
    with new_host() as target, tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        program, *args = line.format(dir=folder, target=target.name).split()
        process = subprocess.Popen(
            command(private, program, *args), env=environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, text=True, close_fds=False, preexec_fn=lambda: descriptor_9(host, program),  # noqa: PLW1509  # no other thread runs
        )  # fmt: skip
        try:
            if not line.endswith(FOR_EVER):
                wait_for(lambda: process.poll() is not None or in_sandbox(process.pid), "the sandbox")
                process.send_signal(signal.SIGUSR1)  # statistics are made when they are asked for
                process.terminate()
            _, said = process.communicate(timeout=DEADLINE)
            assert process.returncode == 0, said
            assert LATE not in said
        finally:
            process.kill()
            process.wait()


def in_sandbox(pid: int) -> bool:
    """Whether a process has its filter (proc(5), Seccomp)."""
    return "\nSeccomp:\t2\n" in Path(f"/proc/{pid}/status").read_text()
