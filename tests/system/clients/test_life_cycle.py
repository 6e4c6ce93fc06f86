"""From the first process to the last: inherited state, open descriptors, and the end of pasta and passt.

Most of it is held by every line of the other tests, through `Client.start`. Here is what only some clients do.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support import DEADLINE, User, wait_for
from ..traffic.support import HOST, Lan
from ..vm.client import Client as Machine
from .checks import exchange, listen, listeners
from .support import Bound, Client, Daemon, Site, read_pid, sandbox

PASTA = "pasta --config-net -q -P {dir}/pid -t 2222:22 -u none -T none -U none {pid}"
PASST = "passt -q -P {dir}/pid -s {dir}/socket -t 2222:22"


def in_foreground(line: str) -> str:
    return line.replace("pasta ", "pasta -f ").replace("passt ", "passt -f ")


@pytest.fixture
def site(client: Client) -> Iterator[Site]:
    made = sandbox(client)
    yield made
    made.close()


def null_only(pid: int) -> None:
    """Descriptors 0 to 2 are /dev/null."""
    for fd in range(3):
        assert os.stat(f"/proc/{pid}/fd/{fd}").st_rdev == os.makedev(1, 3)


# Started from ... ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [PASTA, PASST], ids=["pasta", "passt"])
@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_started_with_closed_streams(site: Site, closed: str, line: str) -> None:
    """A file that is opened must not get the number of a standard stream."""
    daemon = site.start(f"sh -c 'exec \"$@\" {closed}' sh {line}")
    assert read_pid(site.client.dir / "pid") == daemon.pid
    null_only(daemon.pid)
    assert daemon.output == ""
    daemon.end()


@pytest.mark.parametrize("line", [PASTA, PASST], ids=["pasta", "passt"])
def test_in_the_foreground_with_closed_streams(site: Site, line: str) -> None:
    daemon = site.stay(f"sh -c 'exec \"$@\" 0<&- 1>&- 2>&-' sh {in_foreground(line)}")
    pid_file = site.client.dir / "pid"
    wait_for(lambda: not daemon.alive() or (pid_file.exists() and pid_file.read_text()), "the PID file")
    assert read_pid(pid_file) == daemon.pid
    null_only(daemon.pid)
    assert daemon.end() == 0


def test_started_by_a_service_manager(site: Site, lan: Lan) -> None:
    """No terminal, /dev/null as input, one end of a stream socket as output, which journald reads to its end."""
    ours, theirs = socket.socketpair()
    with ours:
        process = subprocess.Popen(
            site.client.argv(PASTA.replace("-q ", ""), **site.names), cwd="/", env=site.client.environment(),
            stdin=subprocess.DEVNULL, stdout=theirs.fileno(), stderr=theirs.fileno(), start_new_session=True,
        )  # fmt: skip
        theirs.close()
        ours.settimeout(DEADLINE)
        said = b""
        while data := ours.recv(65536):
            said += data
        assert process.wait(DEADLINE) == 0
    daemon = Daemon(read_pid(site.client.dir / "pid"))
    assert b"Template interface: eth0" in said
    null_only(daemon.pid)
    daemon.end()


def test_started_from_a_pipe(client: Client) -> None:
    """`echo script | pasta -- sh`: the command has the pipe, in the foreground and without it."""
    for option in ("", "-f"):
        words = f"pasta -q --config-net {option} -- sh".split()
        done = subprocess.run(
            client.argv(words), cwd="/", env=client.environment(), input="echo $$; exit 5\n", capture_output=True,
            text=True, timeout=DEADLINE, check=False,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (5, "") and done.stdout.strip().isdecimal()


def test_signals_that_are_ignored_stay_so(site: Site) -> None:
    """A shell without job control starts `pasta &` with SIGINT ignored: a typed Ctrl-C is for others."""
    daemon = site.stay(f'sh -c \'trap "" INT; exec "$@"\' sh {in_foreground(PASTA)}')
    wait_for(lambda: (site.client.dir / "pid").exists() and (site.client.dir / "pid").read_text(), "the PID file")
    os.kill(daemon.pid, signal.SIGINT)
    daemon.stays()
    assert daemon.end() == 0


# The PID file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line", [PASTA, PASST], ids=["pasta", "passt"])
@pytest.mark.parametrize("foreground", [False, True])
def test_pid_file_that_is_there(site: Site, line: str, foreground: bool) -> None:
    """It is written in place: what was there goes, its mode stays, and another name for it sees the same."""
    pid_file, alias = site.client.dir / "pid", site.client.dir / "alias"
    pid_file.write_text("a PID of long ago, and some more\n")
    pid_file.chmod(0o640)
    os.chown(pid_file, site.client.user.uid, site.client.user.gid)
    alias.hardlink_to(pid_file)
    daemon = site.stay(in_foreground(line)) if foreground else site.start(line)
    wait_for(lambda: not daemon.alive() or re.fullmatch(r"\d+\n", pid_file.read_text()), "the PID file")
    assert read_pid(alias) == daemon.pid
    assert stat.S_IMODE(pid_file.stat().st_mode) == 0o640 and pid_file.stat().st_uid == site.client.user.uid
    daemon.end()
    assert read_pid(pid_file) == daemon.pid  # it stays: who made it removes it


def test_pid_file_that_cannot_be(site: Site) -> None:
    said = site.fails(PASTA.replace("{dir}/pid", "/nowhere/pid"))
    assert said == "Couldn't open PID file /nowhere/pid: No such file or directory\n"
    assert len(site.guest.show("link")) == 1


@pytest.mark.parametrize("line", [PASTA, PASST], ids=["pasta", "passt"])
def test_pid_file_without_room_in_the_foreground(site: Site, line: str) -> None:
    """It is written from inside the sandbox: no path can be removed any more, but who waits for the PID is told."""
    said = site.fails(in_foreground(line).replace("{dir}/pid", "/dev/full") + " -c {dir}/control")
    assert said == "PID file write: No space left on device (/dev/full)\n"


def test_pid_to_a_pipe_from_the_background(site: Site) -> None:
    """The daemon's, not that of the process which was started; the pipe ends with it."""
    reader, writer = os.pipe()
    os.fchown(writer, site.client.user.uid, site.client.user.gid)
    with open(reader) as pipe:
        daemon = site.start(PASTA.replace("{dir}/pid", f"/proc/self/fd/{writer}"), pass_fds=[writer])
        os.close(writer)
        assert pipe.read() == f"{daemon.pid}\n"
    daemon.end()


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("line", [PASTA, PASST], ids=["pasta", "passt"])
def test_signal_as_soon_as_the_pid_is_there(site: Site, line: str, number: signal.Signals) -> None:
    """A program that reads the PID may send a signal at once."""
    reader, writer = os.pipe()
    os.fchown(writer, site.client.user.uid, site.client.user.gid)
    with open(reader) as pipe:
        daemon = site.stay(in_foreground(line).replace("{dir}/pid", "/proc/self/fd/1"), stdout=writer)
        os.close(writer)
        assert pipe.readline() == f"{daemon.pid}\n"
        assert daemon.end(number) == 0
    assert daemon.said() == ""


def test_signal_as_soon_as_the_socket_is_there(client: Client) -> None:
    """Nothing of passt is ready then; it ends in good order all the same, and its socket can be taken over."""
    daemon = client.stay("passt -q -f -s {dir}/socket")
    wait_for(lambda: (client.dir / "socket").exists() or not daemon.alive(), "the socket")
    assert daemon.end() == 0
    assert daemon.said() == ""
    client.start(PASST).end()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ports_are_free_when_the_process_is_gone(site: Site, lan: Lan, number: signal.Signals) -> None:
    """A program that waits for the process may bind at once, though a connection was open."""
    daemon = site.stay(in_foreground(PASTA))
    wait_for(lambda: not daemon.alive() or ("tcp", "*:2222") in listeners(lan.host), "the port is open")
    with listen(site.guest, "0.0.0.0", 22) as server:
        wait_for(site.addresses, "the interface has an address")
        exchange(lan.peer, HOST, 2222, server)
        source = lan.peer.make_socket()
        source.connect((HOST, 2222))
        with server.accept()[0]:
            daemon.end(number)
            with listen(lan.host, "0.0.0.0", 2222):
                pass


def test_passt_ends_with_a_machine_connected(client: Client) -> None:
    daemon = client.start(PASST)
    with Machine.at(str(client.dir / "socket")) as machine:
        machine.configure()
        daemon.end()
        assert machine.at_end()


# The namespace ------------------------------------------------------------------------------------------------------


def test_directory_that_cannot_be_watched(client: Client, root: User, lan: Lan) -> None:
    """The original ends with `netns dir open: Permission denied`, for which pod tools look to try --no-netns-quit. Here
    it is no error: the path is polled instead."""
    site = sandbox(client)
    path = "/run/unreadable/netns"
    bind = 'mkdir -m 0711 "${1%/*}" && : > "$1" && mount --bind "$2" "$1"'
    lan.host.run("sh", "-c", bind, "sh", path, site.names["netns"])
    daemon = client.start(f"pasta --config-net -q --userns {{userns}} --netns {path}", **site.names)
    site.close()
    daemon.stays()
    lan.host.run("sh", "-c", 'umount -l "$1" && rm -r "${1%/*}"', "sh", path)
    daemon.expect_end("its namespace is gone")


@pytest.mark.parametrize("path", ["{netns}", "{pid}"])
def test_stays_after_its_namespace(client: Client, path: str) -> None:
    """--no-netns-quit, in the background."""
    site = sandbox(client)
    option = path if path == "{pid}" else f"--userns {{userns}} --netns {path}"
    daemon = site.start(f"pasta --config-net -q --no-netns-quit {option}")
    site.close()
    daemon.stays()
    daemon.end()


def test_other_files_of_the_directory_do_not_matter(engine: Client) -> None:
    """Nor does one of the same name that comes and goes elsewhere, nor a rename of another over nothing."""
    path = f"/run/user/{engine.user.uid}/many/netns-1"
    site = Bound(engine, path)
    daemon = site.start("pasta --config-net -q --netns {netns}")
    engine.place.run("sh", "-c", f"cd {Path(path).parent}; for i in 2 3 4; do : > netns-$i; rm netns-$i; done")
    engine.place.run("sh", "-c", f"cd {Path(path).parent}; mkdir d; : > d/netns-1; mv d/netns-1 netns-11; rm netns-11")
    daemon.stays()
    site.close()
    daemon.expect_end("its namespace is gone")


# --one-off ----------------------------------------------------------------------------------------------------------


def test_one_off_is_not_ended_by_who_looks(client: Client) -> None:
    """Another passt that is to have the same path, and one that looks for a free path: neither is a machine."""
    daemon = client.start(f"{PASST} --one-off")
    assert "already in use" in client.fails("passt -s {dir}/socket")
    daemon.stays()
    with Machine.at(str(client.dir / "socket")) as machine:
        machine.configure()
    daemon.expect_end("the machine is gone")
