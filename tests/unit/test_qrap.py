"""qrap against sockets that behave as passt does, and a QEMU that says what it was given."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Ether

from passt import qrap
from passt.linux import unix

ANSWER = b"\0\0\0\x0f" + b"answer of 15 by"
REPOSITORY = Path(__file__).parents[2]


@contextlib.contextmanager
def passt_at(path: Path, *answers: bytes | None) -> Iterator[None]:
    """A passt that answers one connection after another; None turns it away."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            for answer in answers:
                sock, _ = listener.accept()
                with sock:
                    if answer is None:
                        continue
                    sock.recv(4096)
                    sock.sendall(answer)
                    sock.recv(1)  # until the other end closes

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    return [str(tmp_path / f"passt_{n}.socket") for n in range(3)]


def test_probe() -> None:
    data = qrap.probe()
    size = int.from_bytes(data[:4], "big")
    first, rest = Ether(data[4 : 4 + size]), data[4 + size :]
    assert (first.dst, first[ARP].op, first[ARP].psrc) == ("ff:ff:ff:ff:ff:ff", 1, "0.0.0.0")
    assert int.from_bytes(rest[:4], "big") == len(rest) - 4
    second = Ether(rest[4:])
    assert (second.dst, second[IPv6].dst) == ("33:33:ff:00:00:fe", "ff02::1:ff00:fe")
    assert (second[IPv6].src, second[IPv6].hlim, second[ICMPv6ND_NS].tgt) == ("fe80::ff", 255, "fe80::fe")
    checksum = second[ICMPv6ND_NS].cksum
    del second[ICMPv6ND_NS].cksum
    assert Ether(bytes(second))[ICMPv6ND_NS].cksum == checksum


def test_first_that_answers(paths: list[str]) -> None:
    """The first path has nothing, the second a socket without a listener."""
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(paths[1])
    with passt_at(Path(paths[2]), ANSWER):
        path, sock = qrap.search(paths)
        sock.close()
    assert path == paths[2]


def test_one_frame_is_read_and_no_more(paths: list[str]) -> None:
    with passt_at(Path(paths[0]), ANSWER + b"\0\0\0\x0enext"):
        _, sock = qrap.search(paths)
        with sock:
            assert sock.recv(100) == b"\0\0\0\x0enext"


def test_busy_one_is_passed_over(paths: list[str]) -> None:
    with passt_at(Path(paths[0]), None), passt_at(Path(paths[1]), ANSWER):
        path, sock = qrap.search(paths)
        sock.close()
    assert path == paths[1]


def test_busy_one_that_gets_free(paths: list[str]) -> None:
    with passt_at(Path(paths[0]), None, None, ANSWER):
        _, sock = qrap.search(paths)
        sock.close()


def test_all_are_busy(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap, "TRIES", 2)
    with passt_at(Path(paths[0]), None, None), pytest.raises(qrap.QrapError, match=r"No free passt .*: 1 with"):
        qrap.search(paths)


def test_there_is_none(paths: list[str]) -> None:
    with pytest.raises(qrap.QrapError, match="No passt found"):
        qrap.search(paths)


def test_silent_one_is_passed_over(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap, "TIMEOUT", 0.01)
    with passt_at(Path(paths[0]), b"\0\0"), pytest.raises(qrap.QrapError, match="No passt found"):
        qrap.search(paths)


def test_sockets_of_other_users_are_not_joined(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a byte is sent to them; root's are fine."""
    uids = {"0": 4711, "1": 0}

    def credentials(sock: socket.socket) -> tuple[int, int, int]:
        pid, _, gid = unix.credentials(sock)
        return pid, uids[sock.getpeername()[-8]], gid

    monkeypatch.setattr(qrap, "credentials", credentials)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(paths[0])
        other.listen()
        other.settimeout(10)
        with passt_at(Path(paths[1]), ANSWER):
            path, sock = qrap.search(paths)
            sock.close()
        assert path == paths[1]
        accepted, _ = other.accept()
        with accepted:
            assert accepted.recv(100) == b""
        os.unlink(paths[1])
        with pytest.raises(qrap.QrapError, match=r"not used, .*passt_0\.socket of user 4711"):
            qrap.search(paths)


def test_a_full_backlog_is_not_waited_for(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap, "TRIES", 2)
    with socket.socket(socket.AF_UNIX) as full, contextlib.ExitStack() as stack:
        full.bind(paths[0])
        full.listen(0)
        with contextlib.suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(paths[0])
        with pytest.raises(qrap.QrapError, match=r"No free passt found .*: 1 with a guest"):
            qrap.search(paths)


NETDEV = ["-netdev", "socket,fd=5,id=hostnet0", "-device", "virtio-net-pci,netdev=hostnet0"]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        ([], []),
        (["disk", "-m", "64"], ["disk", "-m", "64"]),
        (["-net", "nic", "-m", "64", "-net", "user"], ["-m", "64"]),
        (["--netdev", "user,id=n", "-device", "e1000,netdev=n"], []),
        (["-device", "virtio-net-pci", "-device", "virtio-rng-pci"], ["-device", "virtio-rng-pci"]),
        (["-device", "e1000e,netdev=n", "-device", "e1000-82544gc"], ["-device", "e1000-82544gc"]),
        (["-device"], ["-device"]),
        (["disk", "-net"], ["disk"]),
    ],
)
def test_patched(args: list[str], kept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap.platform, "machine", lambda: "x86_64")
    assert qrap.patched(args) == [*kept, *NETDEV]


def test_patched_on_s390x(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap.platform, "machine", lambda: "s390x")
    assert qrap.patched(["-device", "virtio-net-ccw,netdev=n"])[-1] == "virtio-net-ccw,netdev=hostnet0"


def test_command_as_given() -> None:
    assert qrap.command(["7", "kvm", "-net", "socket,fd=7"]) == (7, ["kvm", "-net", "socket,fd=7"])


@pytest.mark.parametrize("fd", ["0", "2", "99999999999"])
def test_impossible_descriptor(fd: str) -> None:
    with pytest.raises(qrap.QrapError, match=f"Invalid file descriptor: {fd}"):
        qrap.command([fd, "kvm"])


def test_qemu_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "qemu-kvm"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    fd, argv = qrap.command(["disk"])
    assert (fd, argv[:2]) == (5, [str(program), "disk"])


def test_qemu_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qrap.shutil, "which", lambda name: None)
    with pytest.raises(qrap.QrapError, match="Couldn't find QEMU: none of kvm, qemu-kvm, "):
        qrap.command(["disk"])


# As a program -------------------------------------------------------------------------------------------------------


def run(path: str, *args: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from passt import qrap; qrap.PATHS = ({path!r},); sys.exit(qrap.main())"
    command = [sys.executable, "-c", code, *args]
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=30, check=False)


def test_becomes_qemu(paths: list[str]) -> None:
    """Which writes to the descriptor it was promised, and has the arguments as they were."""
    script = "import os, sys; os.write(9, b'x'); print(sys.argv[1:])"
    with passt_at(Path(paths[0]), ANSWER):
        done = run(paths[0], "9", sys.executable, "-c", script, "-net", "socket,fd=9")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "['-net', 'socket,fd=9']\n"
    assert done.stderr == f"Connected to {paths[0]}\n"


def test_qemu_gets_variables_and_signals_of_the_caller(paths: list[str]) -> None:
    """SIGPIPE has its default action, which the interpreter had taken away."""
    script = "grep SigIgn /proc/self/status; echo $LC_CTYPE."
    with passt_at(Path(paths[0]), ANSWER):
        done = run(paths[0], "5", "sh", "-c", script)
    ignored, variable = done.stdout.splitlines()
    assert not int(ignored.split()[1], 16) >> (signal.SIGPIPE - 1) & 1
    assert variable == f"{os.environ.get('LC_CTYPE', '')}."


def test_nothing_to_become(paths: list[str]) -> None:
    with passt_at(Path(paths[0]), ANSWER):
        done = run(paths[0], "5", "/no/such/qemu")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.endswith("\nqrap: Couldn't run /no/such/qemu: No such file or directory\n")


def test_no_passt(paths: list[str]) -> None:
    done = run(paths[0], "5", "true")
    assert done.returncode == 1
    assert done.stderr == "qrap: No passt found at /tmp/passt_N.socket: start passt first\n"


def test_help_fits_a_terminal() -> None:
    assert max(map(len, qrap.USAGE.splitlines())) <= 80


def test_usage(capfd: pytest.CaptureFixture[str]) -> None:
    assert qrap.main(["qrap", "--help"]) == 0
    assert capfd.readouterr() == (f"{qrap.USAGE}\n", "")
    assert qrap.main(["qrap"]) == 1
    assert capfd.readouterr() == ("", f"{qrap.USAGE}\n")
