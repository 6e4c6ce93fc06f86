"""Namespaces that exist: joined, watched, left; the background; captures."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import struct
import subprocess
import time
from pathlib import Path

import pytest

from .support import (
    DEADLINE,
    Runner,
    User,
    alive,
    enter,
    handles,
    new_host,
    wait_for,
)


def test_attach_to_a_pid_and_end_with_it(pasta: Runner) -> None:
    target = pasta.namespace()
    daemon = pasta.daemon("--config-net", str(target))
    link = json.loads(enter(target, "ip", "-j", "address"))
    assert {a["scope"] for a in link[1]["addr_info"]} >= {"global"}
    assert alive(daemon)
    os.kill(target, signal.SIGKILL)
    wait_for(lambda: not alive(daemon), "the end of pasta")


def test_target_that_ends_during_the_start(pasta: Runner) -> None:
    """As soon as the namespace is pinned, nothing of the process is needed any more."""
    target = pasta.namespace()
    namespace = os.stat(f"/proc/{target}/ns/net")
    process = pasta.start("-f", "--config-net", str(target), stderr=subprocess.PIPE)

    def pinned() -> bool:
        with contextlib.suppress(FileNotFoundError):
            fds = [os.stat(path) for path in Path(f"/proc/{process.pid}/fd").iterdir()]
            return any(os.path.samestat(fd, namespace) for fd in fds)
        return False

    wait_for(pinned, "the namespace is open")
    os.kill(target, signal.SIGKILL)
    pasta.processes[0].wait()
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, errors
    assert errors.endswith(f"Namespace /proc/{target}/ns/net is gone, exiting\n".encode())


def test_target_that_has_ended_before_the_modules_are_loaded(user_pasta: Runner) -> None:
    """An interpreter that is slow to load them, as from a cold disk."""
    target = user_pasta.namespace()
    slow = (
        "import os, signal, sys, passt.__main__ as main; from passt.namespace import pin; sys.argv[0] = 'pasta'; "
        f"hold = pin.hold; pin.hold = lambda argv: (hold(argv), os.kill({target}, signal.SIGKILL)); main.main()"
    )
    command = user_pasta.user.command([user_pasta.user.python, "-c", slow, "-f", "--config-net", str(target)])
    done = subprocess.run(
        command, cwd="/", env=user_pasta.user.env, capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith(f"Namespace /proc/{target}/ns/net is gone, exiting\n")


@pytest.mark.alone
@pytest.mark.parametrize("kind", ["pid", "link", "mount"])
def test_end_is_noticed_at_once(root_pasta: Runner, tmp_path: Path, kind: str) -> None:
    """Within 0.2 s of the end of the last process, or of the removal of the name, in the best of a few attempts."""
    lags = []
    for _ in range(5):
        target = root_pasta.namespace(userns=False)
        directory = tmp_path / str(target)
        directory.mkdir(mode=0o700)
        path = directory / "ns"
        if kind == "link":
            path.symlink_to(f"/proc/{target}/ns/net")
        elif kind != "pid":
            path.touch()
            subprocess.run(["mount", "--bind", f"/proc/{target}/ns/net", str(path)], check=True)
        daemon = root_pasta.daemon(*([str(target)] if kind == "pid" else ["--netns", str(path)]))
        process = os.pidfd_open(daemon)
        if kind in ("pid", "link"):
            os.kill(target, signal.SIGKILL)
        else:
            subprocess.run(["umount", str(path)], check=True)
            path.unlink()
        begin = time.monotonic()
        assert select.select([process], [], [], DEADLINE)[0]
        lags.append(time.monotonic() - begin)
        os.close(process)
        if lags[-1] < 0.2:
            return
    raise AssertionError(f"it took {lags} s")


def test_background_process_keeps_nothing(pasta: Runner) -> None:
    target = pasta.namespace()
    process = pasta.start(
        "--config-net",
        "-P",
        f"/tmp/pasta-test-{os.getpid()}.pid",
        str(target),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    pid_file = Path(f"/tmp/pasta-test-{os.getpid()}.pid")
    output, _ = process.communicate(timeout=DEADLINE)  # reads to the end: a descriptor left open would hang it
    try:
        daemon = int(pid_file.read_text())
    finally:
        pid_file.unlink(missing_ok=True)
    pasta.daemons.append(daemon)
    assert process.returncode == 0
    assert b"Namespace interface: " in output
    assert {os.readlink(f"/proc/{daemon}/fd/{fd}") for fd in range(3)} == {"/dev/null"}
    assert os.readlink(f"/proc/{daemon}/cwd") == "/"
    assert os.getsid(daemon) == daemon


def test_log_file(pasta: Runner) -> None:
    path = Path(f"/tmp/pasta-test-{os.getpid()}.log")
    try:
        target = pasta.namespace()
        daemon = pasta.daemon("-l", str(path), str(target))
        os.kill(target, signal.SIGKILL)
        wait_for(lambda: not alive(daemon), "the end of pasta")
        lines = path.read_text().splitlines()
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        path.unlink(missing_ok=True)
    assert re.fullmatch(r"pasta \d+\.\d+\.\d+: /.*python.* \(\d+\)", lines[0])
    assert re.fullmatch(
        r"\d+\.\d{4}: info:    Namespace interface: .*", next(x for x in lines if "Namespace interface" in x)
    )
    assert lines[-1].endswith(f"info:    Namespace /proc/{target}/ns/net is gone, exiting")


def test_namespace_without_ipv6(pasta: Runner) -> None:
    target = pasta.namespace()
    for name in ("all", "default"):
        enter(target, "sh", "-c", f"echo 1 > /proc/sys/net/ipv6/conf/{name}/disable_ipv6")
    pasta.daemon("--config-net", "-a", "10.1.2.3/24", "-a", "2001:db8::3", str(target))
    assert "The namespace has no IPv6, or has it disabled" in pasta.said
    assert b"10.1.2.3" in enter(target, "ip", "address")


def test_print_out(hosted: Runner) -> None:
    target = hosted.namespace()
    process = hosted.start("-f", "-4", "-o", "198.51.100.8", str(target), stderr=subprocess.PIPE)
    assert process.stderr is not None
    lines = [process.stderr.readline().decode().rstrip() for _ in range(13 + hosted.user.is_root)]
    if hosted.user.is_root:
        assert lines.pop(0) == "Started as root, will change to nobody."
    wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
    process.terminate()
    assert process.wait(DEADLINE) == 0
    assert lines == [
        "Template interface: eth0 (IPv4)",
        "    IPv4: the default route",
        "Outbound address: 198.51.100.8",
        "Namespace interface: eth0",
        "Addresses in the namespace:",
        "    198.51.100.7: the namespace itself",
        "    198.51.100.1: 127.0.0.1 of the host",
        "MAC:",
        "    host: 9a:55:9a:55:9a:55",
        "DHCP:",
        "    assign: 198.51.100.7",
        "    mask: 255.255.255.0",
        "    router: 198.51.100.1",
    ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_attached_ends_well_by_signal(pasta: Runner, number: signal.Signals) -> None:
    target = pasta.namespace()
    process = pasta.start("-f", "-q", "--config-net", str(target))
    wait_for(lambda: b"default" in enter(target, "ip", "route"), "the configuration")
    wait_for(lambda: handles(process.pid, number), "the loop")
    process.send_signal(number)
    assert process.wait(DEADLINE) == 0


def test_netns_by_name_and_its_end(root_pasta: Runner) -> None:
    with new_host() as target:
        daemon = root_pasta.daemon("--config-net", "--netns", target.name)
        assert len(target.show("address")) == 2
        assert alive(daemon)
    wait_for(lambda: not alive(daemon), "the end of pasta")


def test_netns_by_name_in_another_directory(root_pasta: Runner, tmp_path: Path) -> None:
    """As --nsrun-dir of 2021 and 2022 had it."""
    file = tmp_path / "green"
    file.touch()
    with new_host() as target:
        subprocess.run(["mount", "--bind", target.path, str(file)], check=True)
        try:
            daemon = root_pasta.daemon("--config-net", "--nsrun-dir", str(tmp_path), "--netns", "green")
            assert len(target.show("address")) == 2
        finally:
            subprocess.run(["umount", str(file)], check=True)
            file.unlink()
        wait_for(lambda: not alive(daemon), "the end of pasta")


def test_netns_that_is_a_pid(pasta: Runner) -> None:
    """As in the script that replaces slirp4netns(1): the user namespace of the process is joined, too."""
    target = pasta.namespace()
    daemon = pasta.daemon("-q", "--ipv4-only", "-a", "10.0.2.0", "-n", "24", "-g", "10.0.2.2", "--dns-forward",
                          "10.0.2.3", "-m", "1500", "--no-ndp", "--no-dhcpv6", "--no-dhcp", "--config-net",
                          "--no-map-gw", "-I", "tap0", "-t", "none", "--netns", str(target))  # fmt: skip
    assert b"10.0.2.0/24" in enter(target, "ip", "-4", "address", "show", "dev", "tap0")
    os.kill(target, signal.SIGKILL)
    wait_for(lambda: not alive(daemon), "the end of pasta")


def test_netns_by_path_stays_with_no_netns_quit(root_pasta: Runner) -> None:
    with new_host() as target:
        process = root_pasta.start("-f", "-q", "--no-netns-quit", "--config-net", "--netns", target.path)
        wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.terminate()
    assert process.wait(DEADLINE) == 0


def test_userns_and_netns_by_path(user_pasta: Runner) -> None:
    target = user_pasta.namespace()
    user_pasta.daemon("--config-net", "--userns", f"/proc/{target}/ns/user", "--netns", f"/proc/{target}/ns/net")
    assert b"default" in enter(target, "ip", "route")


def test_namespaces_by_inherited_descriptors(user_pasta: Runner) -> None:
    target = user_pasta.namespace()
    reader, writer = os.pipe()
    os.fchown(writer, user_pasta.user.uid, user_pasta.user.gid)  # the file behind /proc/self/fd/1 is opened anew
    with open(f"/proc/{target}/ns/net") as net, open(f"/proc/{target}/ns/user") as user, open(reader) as pipe:
        process = user_pasta.start(
            "--config-net", "--netns", f"/proc/self/fd/{net.fileno()}", "--userns", f"/proc/self/fd/{user.fileno()}",
            "--no-netns-quit", "-P", "/proc/self/fd/1", stdout=writer, pass_fds=[net.fileno(), user.fileno()],
        )  # fmt: skip
        os.close(writer)
        assert process.wait(DEADLINE) == 0
        user_pasta.daemons.append(int(pipe.read()))
    assert b"default" in enter(target, "ip", "route")


def test_command_in_a_given_user_namespace(user_pasta: Runner) -> None:
    target = user_pasta.namespace()
    done = user_pasta.run("--userns", f"/proc/{target}/ns/user", "--config-net", "--", "readlink", "/proc/self/ns/user")
    assert done.stdout.strip() == os.readlink(f"/proc/{target}/ns/user")


def test_root_that_stays_root(root_pasta: Runner) -> None:
    with new_host() as target:
        process = root_pasta.start("-f", "--runas", "0", "--config-net", "--netns", target.name)
        wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
        assert os.stat(f"/proc/{process.pid}").st_uid == 0


def test_root_becomes_nobody(root_pasta: Runner, ordinary_user: User) -> None:
    with new_host() as target:
        assert os.stat(f"/proc/{root_pasta.daemon('--netns', target.name)}").st_uid == 65534
        runas = f"{ordinary_user.uid}:{ordinary_user.gid}"
        daemon = root_pasta.daemon("--netns", target.name, "-I", "tap1", "--runas", runas)
        assert os.stat(f"/proc/{daemon}").st_uid == ordinary_user.uid


def test_deleted_interface_comes_back_with_its_address(pasta: Runner) -> None:
    script = """
        before=$(ip -br link show up | grep -v LOOPBACK); name=${before%% *}
        ip link delete "$name"
        until [ "$(ip -br link show up | grep -v LOOPBACK)" = "$before" ]; do sleep 0.05; done
        ip route | grep -c default
    """
    done = pasta.run("--config-net", "--", "sh", "-c", script)
    assert (done.returncode, done.stdout) == (0, "1\n")


def ip_in(user: User, pid: int, *words: str) -> str:
    """ip(8) as root of the namespaces of `pid`, a process of `user`."""
    nsenter = ["nsenter", f"--target={pid}", "--user", "--preserve-credentials", "--net", "--", "ip", *words]
    return subprocess.run(user.command(nsenter), check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("more", [[], ["--runas", "0"]])
@pytest.mark.parametrize("whose", ["root's", "a user's"])
def test_root_has_no_right_to_bring_a_deleted_interface_back(
    root_pasta: Runner, user_pasta: Runner, whose: str, more: list[str]
) -> None:
    """It would be a right over the whole machine."""
    with new_host() as target:
        pid = user_pasta.namespace()
        guest = ["--netns", target.name] if whose == "root's" else [str(pid)]
        options = "-f", "-q", "--config-net", "-I", "tap9", *more, *guest
        process = root_pasta.start(*options, stderr=subprocess.PIPE)
        wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
        if whose == "root's":
            target.ip("link", "del", "tap9")
        else:
            ip_in(user_pasta.user, pid, "link", "del", "tap9")
        _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert (
        b"Interface tap9 was deleted and can't be created again, exiting: "
        b"pasta that root starts for a namespace keeps no right to do so\n"
    ) in errors


def test_loopback_interface_with_another_name(user_pasta: Runner) -> None:
    """It was renamed before we came; the tap comes back nevertheless."""
    target = user_pasta.namespace()

    def link(*words: str) -> str:
        return ip_in(user_pasta.user, target, *words)

    link("link", "set", "lo", "down")
    link("link", "set", "lo", "name", "foo")
    user_pasta.daemon("--config-net", "-I", "tap9", str(target))
    assert ",UP" in link("link", "show", "foo")
    link("link", "set", "foo", "down")
    link("link", "del", "tap9")
    wait_for(lambda: ",UP" in link("link", "show", "up", "type", "tun"), "the interface comes back, and up")
    assert ",UP" in link("link", "show", "foo")


def test_deleted_interface_that_cannot_come_back(user_pasta: Runner) -> None:
    target = user_pasta.namespace()
    process = user_pasta.start("-f", "-q", "-I", "tap9", str(target), stderr=subprocess.PIPE)
    wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
    process.send_signal(signal.SIGSTOP)
    ip_in(user_pasta.user, target, "link", "del", "tap9")
    ip_in(user_pasta.user, target, "link", "add", "tap9", "type", "veth", "peer", "name", "tap8")
    process.send_signal(signal.SIGCONT)
    _, errors = process.communicate(timeout=DEADLINE)
    assert process.returncode == 1
    assert b"Interface tap9 was deleted and can't be created again, exiting: " in errors


# Captures ----------------------------------------------------------------------------------------------------------


def test_pcap_file(pasta: Runner) -> None:
    path = Path(f"/tmp/pasta-test-{os.getpid()}.pcap")
    try:
        done = pasta.run("-p", str(path), "--config-net", "--", "ping", "-c", "1", "-W", "1", "169.254.7.7")
        data = path.read_bytes()
        assert done.returncode == 1  # no host is there
        assert path.stat().st_mode & 0o777 == 0o600
    finally:
        path.unlink(missing_ok=True)
    assert struct.unpack_from("=IHH", data) == (0xA1B2C3D4, 2, 4)
    assert len(data) > 24 + 16 + 42


def test_trace_names_direction_and_flow(pasta: Runner) -> None:
    done = pasta.run(
        "--trace", "--config-net", "-a", "10.8.8.2/24", "-g", "10.8.8.1", "--", "ping", "-c", "1", "-W", "1", "10.8.8.9"
    )
    assert "guest -> host" in done.stderr
    assert "host -> guest" in done.stderr
    assert "[10.8.8.2] -> [10.8.8.9] ICMP" in done.stderr
    assert "Ether / ARP" in done.stderr
