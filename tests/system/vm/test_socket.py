"""The connection of passt to its client: by a socket of its own, or an inherited descriptor; in the foreground or not;
and its end. Tests of default paths run with a /tmp of their own."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ..support import DEADLINE, REPOSITORY, User, alive, current_user, wait_for
from ..traffic.support import HOST, PEER, Lan, Namespace
from .client import Client
from .machine import VirtualMachine
from .support import ACCEPTED, GONE, Background, Passt, listens, on_host, passt, run, seen_from_here

DEFAULT = "/tmp/passt_{}.socket"


@pytest.fixture
def private(lan: Lan) -> Iterator[Namespace]:
    """The host with a /tmp that has nothing but the program, should that be there."""
    made = Namespace(lan.host.argv(["unshare", "--mount"]), lan.host.user)
    made.run("mkdir", "-p", "/run/tmp")
    made.run("mount", "-t", "tmpfs", "-o", "mode=1777", "tmpfs", "/run/tmp")
    for kept in {str(REPOSITORY), sys.prefix}:
        if kept.startswith("/tmp/"):
            made.run("mkdir", "-p", f"/run{kept}")
            made.run("mount", "--bind", kept, f"/run{kept}")
    made.run("mount", "--move", "/run/tmp", "/tmp")
    yield made
    made.close()


@pytest.fixture
def directory(private: Namespace, anyone: User) -> str:
    """A directory of the user's own, in the private /tmp."""
    private.run("mkdir", "-m", "0700", "/tmp/own")
    private.run("chown", f"{anyone.uid}:{anyone.gid}", "/tmp/own")
    return "/tmp/own"


def client(host: Namespace, path: str) -> Client:
    return Client.at(seen_from_here(host, path))


def fails(host: Namespace, user: User, *options: str, text: str, pass_fds: Sequence[int] = ()) -> None:
    """passt ends with status 1, and the reason on standard error."""
    done = run(host, user, "-f", *options, pass_fds=pass_fds)
    assert done.returncode == 1
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def complaints(server: Background) -> str:
    """Output of a quiet passt, except the warning for root."""
    return re.sub(".* to nobody.*\n", "", server.done.stderr)


# The path -----------------------------------------------------------------------------------------------------------


def test_default_path_is_the_first_free_one(private: Namespace, anyone: User) -> None:
    with Background(private, anyone) as first, Background(private, anyone) as second:
        for n, server in ((1, first), (2, second)):
            path = DEFAULT.format(n)
            assert f"UNIX domain socket bound at {path}\n" in server.done.stderr
            netdev = f"-netdev stream,id=s,server=off,addr.type=unix,addr.path={path}\n"
            assert f"-device virtio-net-pci,netdev=s {netdev}" in server.done.stderr
            with client(private, path) as guest:
                guest.configure().ping(PEER)
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: not alive(first.pid), "the daemon ends")
        with Background(private, anyone) as third:
            assert f"bound at {DEFAULT.format(1)}\n" in third.done.stderr
            with client(private, DEFAULT.format(1)) as guest:
                guest.configure()


def test_quiet_start_says_which_default_path_it_took(private: Namespace, anyone: User) -> None:
    with Background(private, anyone, "-q") as server:
        assert f"UNIX domain socket bound at {DEFAULT.format(1)}\n" in server.done.stderr
        assert "You can now start" not in server.done.stderr and "DHCP:" not in server.done.stderr


@pytest.mark.parametrize("option", ["-s", "--socket"])
def test_given_path(private: Namespace, anyone: User, directory: str, option: str) -> None:
    path = f"{directory}/socket"
    with Background(private, anyone, option, path) as server:
        assert f"UNIX domain socket bound at {path}\n" in server.done.stderr
        with client(private, path) as guest:
            guest.configure().ping(PEER)


def test_only_the_owner_may_connect(private: Namespace, anyone: User, directory: str) -> None:
    with Background(private, anyone, "-s", f"{directory}/socket"):
        status = os.stat(seen_from_here(private, f"{directory}/socket"))
        assert stat.S_ISSOCK(status.st_mode)
        assert stat.S_IMODE(status.st_mode) == 0o700
        assert status.st_uid == anyone.uid


def bound(host: Namespace) -> set[tuple[str, int]]:
    """The ports that are listened on, with their protocol."""
    rows = [line.split() for line in host.run("ss", "-Hltun").stdout.splitlines()]
    return {(row[0], int(row[4].rpartition(":")[2])) for row in rows}


def test_all_ports_with_few_descriptors_are_those_of_most_importance(private: Namespace, directory: str) -> None:
    """Root binds ports below 1024 for a machine; a limit of 1024 descriptors has room for some of them."""
    path = f"{directory}/socket"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024)); "
    options = ("-f", "-s", path, "-t", "all", "-u", "~53")
    command = on_host(private, current_user(), *options, before=limit)
    with subprocess.Popen(command, cwd="/", stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            said = server.stderr.readline()
            need = r"-t all, -u ~53: \d+ descriptors are needed, and the limit is 1024 .*: "
            assert re.match(need + r"\d+ of \d+ ports are left out. Listened on are those up to 1\d\d\n", said)
            last = int(said.split()[-1])
            wait_for(lambda: {("tcp", 53), ("udp", last - 1)} <= bound(private), "the ports")
            ports = bound(private)
            assert ("udp", 53) not in ports and last + 1 not in {port for _, port in ports} and len(ports) < 512
        finally:
            server.terminate()


def test_stale_socket_is_taken_over(private: Namespace, anyone: User, directory: str) -> None:
    path = f"{directory}/socket"
    with Background(private, anyone, "-s", path) as first:
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: not alive(first.pid), "the daemon ends")
    with Background(private, anyone, "-s", path), client(private, path) as guest:
        guest.configure()


def test_live_socket_is_not_taken_over(private: Namespace, anyone: User, directory: str) -> None:
    path = f"{directory}/socket"
    with Background(private, anyone, "-s", path):
        with client(private, path) as guest:
            guest.configure()
            fails(private, anyone, "-s", path, text=f"Socket path {path} already in use")
            guest.ping(PEER)
        wait_for(lambda: not connected(private, path), "passt notices")
        fails(private, anyone, "-s", path, text=f"Socket path {path} already in use")


def connected(host: Namespace, path: str) -> bool:
    """Whether there is a connection on the socket at `path`."""
    lines = Path(f"/proc/{host.pid}/net/unix").read_text().splitlines()
    return sum(line.endswith(f" {path}") for line in lines) > 1


def test_other_files_are_not_replaced(private: Namespace, anyone: User, directory: str) -> None:
    path = f"{directory}/letter"
    private.write(path, "dear")
    fails(private, anyone, "-s", path, text=path)
    assert Path(seen_from_here(private, path)).read_text() == "dear"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/no/such/dir/socket", "/no/such/dir/socket"),
        ("/tmp/" + "x" * 103, "Invalid socket path: /tmp/xxx"),
        ("", "Invalid socket path: "),
    ],
)
def test_impossible_path(private: Namespace, anyone: User, path: str, text: str) -> None:
    fails(private, anyone, "-s", path, text=text)


QRAP = "import sys; from passt.qrap import main; sys.exit(main())"
ASK = """
import socket
from passt import qrap
sock = socket.socket(fileno=5)
sock.settimeout(10)
sock.sendall(qrap.probe())
print(len(sock.recv(4096)))
"""


def test_qrap(private: Namespace, anyone: User) -> None:
    """It gives the program a connection to the first passt without a guest."""
    with Background(private, anyone), Background(private, anyone), client(private, DEFAULT.format(1)) as guest:
        guest.configure()
        qrap = [anyone.python, "-c", QRAP, "5", anyone.python, "-c", ASK]
        done = subprocess.run(
            private.argv(anyone.command(qrap)), env=anyone.env, capture_output=True, text=True, timeout=30, check=False
        )
        assert done.stderr == f"Connected to {DEFAULT.format(2)}\n"
        assert int(done.stdout) >= 46
        guest.ping(PEER)


def test_qrap_with_qemu(private: Namespace, root: User, machine: VirtualMachine) -> None:
    """A machine whose network is a descriptor, as QEMU before 7.2 has it."""
    qrap = private.argv(["env", f"PYTHONPATH={REPOSITORY}", sys.executable, "-c", QRAP, "5"])
    with Background(private, root, "-1") as server:
        machine.start("-netdev", "socket,fd=5,id=s", through=qrap)
        machine.run("ip link set eth0 up && udhcpc -i eth0 -n -q -s /dhcp")
        machine.run(f"ping -c 1 -W 5 {PEER}")
        machine.stop()
        wait_for(lambda: not alive(server.pid), "passt goes with the machine")


# The descriptor -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_descriptor(host: Namespace, user: User, *options: str) -> Iterator[tuple[Passt, Client]]:
    """passt on one end of a socket pair, and a client on the other."""
    ours, theirs = socket.socketpair()
    with Client(ours) as guest:
        with theirs:
            server = Passt(host, user, options, None, theirs.fileno())
        try:
            yield server, guest
        except BaseException:
            print(server.said())
            server.kill()
            raise
    server.expect_end()
    server.close()


def test_descriptor(lan: Lan, anyone: User) -> None:
    """The connection is there from the start, and passt goes with it."""
    with on_descriptor(lan.host, anyone) as (server, guest):
        guest.configure().ping(PEER)
        assert server.alive()


def test_descriptor_in_the_background(lan: Lan, anyone: User) -> None:
    """As QEMU does it: standard error is read to its end, status 0 means ready, and the PID file has a number."""
    ours, theirs = socket.socketpair()
    with Client(ours) as guest:
        with theirs:
            fd = theirs.fileno()
            server = Background(lan.host, anyone, "--quiet", "--fd", str(fd), pass_fds=(fd,))
        with server:
            assert complaints(server) == server.done.stdout == ""
            guest.configure().ping(PEER)
            guest.sock.close()
            wait_for(lambda: not alive(server.pid), "passt goes with its client")


@pytest.mark.parametrize("streams", ["stdin", "stdin stdout stderr"])
def test_descriptor_of_a_standard_stream(lan: Lan, anyone: User, streams: str) -> None:
    """As inetd(8) starts a program: with one connection as all of its streams, in which no message may stand."""
    ours, theirs = socket.socketpair()
    command = ["setpriv", "--pdeathsig", "KILL", *on_host(lan.host, anyone, "-f", "--fd", "0")]
    with theirs:
        files: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        files |= dict.fromkeys(streams.split(), theirs)
        process = subprocess.Popen(command, cwd="/", env=anyone.env, **files)
    with Client(ours) as guest:
        guest.configure().ping(PEER)
    assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize("fd", ["-1", "x", "", "4294967296"])
def test_invalid_descriptor(lan: Lan, anyone: User, fd: str) -> None:
    fails(lan.host, anyone, "-F", fd, text=f"Invalid --fd: {fd}")


@pytest.mark.parametrize("kind", ["closed", "file"])
def test_descriptor_that_is_no_socket(lan: Lan, anyone: User, kind: str) -> None:
    with open("/dev/null") as file:
        fd = 99 if kind == "closed" else file.fileno()
        fails(lan.host, anyone, "-F", str(fd), text=str(fd), pass_fds=() if kind == "closed" else (fd,))


# The end ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["-1", "--one-off"])
def test_one_off(lan: Lan, anyone: User, option: str) -> None:
    with passt(lan, anyone, option) as server:
        with Client.at(str(server.path)) as guest:
            guest.configure().ping(PEER)
            assert server.alive()
        server.expect_end()
        assert server.count(GONE) == 1 and "exiting" in server.said()


def test_one_off_ends_on_a_length_that_lies(lan: Lan, ordinary_user: User) -> None:
    with passt(lan, ordinary_user, "-1") as server:
        with Client.at(str(server.path)) as guest:
            guest.configure().send_bytes(b"\xff\xff\xff\xff", 4)
            assert guest.at_end()
        server.expect_end()


def test_without_one_off_it_stays(lan: Lan, anyone: User) -> None:
    with passt(lan, anyone) as server:
        for n in range(3):
            with Client.at(str(server.path)) as guest:
                guest.configure().ping(PEER)
            server.expect(GONE, n + 1)
        assert server.count(ACCEPTED) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT])
@pytest.mark.parametrize("with_client", [True, False])
def test_signals(lan: Lan, ordinary_user: User, number: signal.Signals, with_client: bool) -> None:
    with passt(lan, ordinary_user) as server, contextlib.ExitStack() as stack:
        if with_client:
            stack.enter_context(Client.at(str(server.path))).configure()
        server.process.send_signal(number)
        server.expect_end()


# Foreground and background ------------------------------------------------------------------------------------------


def test_background_lets_go_of_its_terminal(private: Namespace, anyone: User, directory: str) -> None:
    """The command has ended, with the PID file written and the socket listening, and the daemon leads a session."""
    path = f"{directory}/socket"
    with Background(private, anyone, "-s", path) as server:
        assert listens(private, path)
        assert os.getsid(server.pid) == server.pid
        assert {os.readlink(f"/proc/{server.pid}/fd/{fd}") for fd in range(3)} == {"/dev/null"}


def test_pid_file_that_is_there(lan: Lan, anyone: User, open_dir: Path) -> None:
    """QEMU makes it with mkstemp(3), and it must stay that file."""
    file = open_dir / "pid"
    file.touch(0o600)
    os.chown(file, anyone.uid, anyone.gid)
    before = file.stat().st_ino
    done = run(lan.host, anyone, "-s", f"{open_dir}/socket", "-P", str(file))
    assert done.returncode == 0, done.stderr
    pid = int(file.read_text())
    assert alive(pid)
    os.kill(pid, signal.SIGTERM)
    wait_for(lambda: not alive(pid), "the daemon ends")
    assert file.stat().st_ino == before


def test_what_it_says(lan: Lan, anyone: User) -> None:
    """The lines that programs look for."""
    with passt(lan, anyone) as server:
        server.expect(f"DHCP:\n    assign: {HOST}\n    mask: 255.255.255.0\n    router: 198.51.100.1\n")
        server.expect(f"UNIX domain socket bound at {server.path}\n")


def test_quiet(private: Namespace, anyone: User, directory: str) -> None:
    with Background(private, anyone, "-q", "-s", f"{directory}/socket") as server:
        assert complaints(server) == server.done.stdout == ""


def test_log_file(private: Namespace, anyone: User, directory: str) -> None:
    log = f"{directory}/log"
    with Background(private, anyone, "-l", log, "-s", f"{directory}/socket"):
        with client(private, f"{directory}/socket") as guest:
            guest.configure()
        file = Path(seen_from_here(private, log))
        wait_for(lambda: re.search(GONE, file.read_text()), "the end of the client is logged")
        assert re.search(ACCEPTED, file.read_text())
