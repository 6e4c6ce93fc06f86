"""Supervisors: --ready-fd, and a service manager that listens at $NOTIFY_SOCKET; --doctor on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from .support import DEADLINE, Runner, alive, wait_for

WATCHDOG_USEC = "200000"


@pytest.fixture
def manager() -> Iterator[socket.socket]:
    """The socket of a service manager."""
    with (
        tempfile.TemporaryDirectory() as directory,  # pytest's own are for its user only
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock,
    ):
        os.chmod(directory, 0o777)
        sock.bind(f"{directory}/notify")
        os.chmod(f"{directory}/notify", 0o777)
        sock.settimeout(DEADLINE)
        yield sock


def told(manager: socket.socket) -> dict[str, str]:
    return dict(line.split("=", 1) for line in manager.recv(4096).decode().splitlines())


def test_ready_while_the_command_waits(pasta: Runner) -> None:
    """The command does not have the descriptor."""
    reader, writer = os.pipe()
    script = f"read line; test ! -e /proc/self/fd/{writer}"
    flags = ("--config-net", "--ready-fd", str(writer))
    process = pasta.start(*flags, "--", "sh", "-c", script, pass_fds=(writer,), stdin=subprocess.PIPE)
    os.close(writer)
    assert os.read(reader, 10) == b"1\n"
    assert os.read(reader, 10) == b""
    os.close(reader)
    process.communicate(b"\n", DEADLINE)
    assert process.returncode == 0


def test_ready_in_the_background(pasta: Runner) -> None:
    reader, writer = os.pipe()
    target = pasta.namespace()
    daemon = pasta.daemon("--config-net", "--ready-fd", str(writer), str(target), pass_fds=(writer,))
    os.close(writer)
    assert os.read(reader, 10) == b"1\n"
    assert os.read(reader, 10) == b"", "the daemon has it open"
    os.close(reader)
    assert alive(daemon)


def test_a_service_manager_sees_the_life_of_a_service(pasta: Runner, manager: socket.socket) -> None:
    target = pasta.namespace()
    env = {**pasta.user.env, "NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": WATCHDOG_USEC}
    process = pasta.start("-f", "--config-net", str(target), env=env)
    assert told(manager)["READY"] == "1"
    assert told(manager) == {"WATCHDOG": "1"}
    os.kill(process.pid, signal.SIGSTOP)
    manager.setblocking(False)
    wait_for(lambda: "T" in Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0], "the stop")
    while True:
        try:
            manager.recv(4096)
        except BlockingIOError:
            break
    manager.settimeout(3 * int(WATCHDOG_USEC) / 1e6)
    with pytest.raises(TimeoutError):  # a loop that does not turn gives no sign of life
        manager.recv(4096)
    manager.settimeout(DEADLINE)
    os.kill(process.pid, signal.SIGCONT)
    assert told(manager) == {"WATCHDOG": "1"}
    process.terminate()
    while told(manager) != {"STOPPING": "1"}:
        pass
    assert process.wait(DEADLINE) == 0


def test_a_change_of_rules_is_a_reload(pasta: Runner, manager: socket.socket) -> None:
    """From the sandbox, by a client of the control socket."""
    target = pasta.namespace()
    with tempfile.TemporaryDirectory() as directory:
        os.chmod(directory, 0o777)
        control = f"{directory}/control"
        env = {**pasta.user.env, "NOTIFY_SOCKET": manager.getsockname()}
        process = pasta.start("-f", "--config-net", "-t", "none", "-c", control, str(target), env=env)
        assert told(manager)["READY"] == "1"
        change = pasta.user.command([pasta.user.python, "-m", "passt.pesto", "--add", "-T", "22222", control])
        subprocess.run(change, env=pasta.user.env, cwd="/", timeout=DEADLINE, check=True)
        reload = told(manager)
        assert (reload.pop("RELOADING"), int(reload.pop("MONOTONIC_USEC")) > 0, reload) == ("1", True, {})
        assert told(manager)["READY"] == "1"
        process.terminate()
        assert told(manager) == {"STOPPING": "1"}
        assert process.wait(DEADLINE) == 0


def test_a_command_speaks_for_itself(pasta: Runner, manager: socket.socket) -> None:
    """The variable is left to it, and pasta says nothing in its place."""
    env = {**pasta.user.env, "NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": WATCHDOG_USEC}
    done = pasta.run("--config-net", "--", "printenv", "NOTIFY_SOCKET", "WATCHDOG_USEC", env=env)
    assert done.stdout.split() == [manager.getsockname(), WATCHDOG_USEC]
    manager.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.recv(4096)


def test_lines_of_json_from_the_sandbox(pasta: Runner) -> None:
    target = pasta.namespace()
    flags = ("-f", "--config-net", "--log-format", "json", str(target))
    reader, writer = os.pipe()
    process = pasta.start("--ready-fd", str(writer), *flags, stderr=subprocess.PIPE, pass_fds=(writer,))
    os.close(writer)
    assert os.read(reader, 10) == b"1\n"
    os.close(reader)
    process.send_signal(signal.SIGUSR1)
    process.terminate()
    _, said = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, said
    messages = [json.loads(line) for line in said.splitlines()]
    assert all(message.keys() == {"time", "level", "program", "message"} for message in messages)
    assert any(message["message"].startswith("Statistics") for message in messages)


def test_doctor(pasta: Runner) -> None:
    """The tests run here, so nothing that is needed is missing."""
    done = pasta.run("--doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Namespaces of users, networks and mounts can be created" in done.stdout
    assert "/dev/net/tun" in done.stdout
    assert "pasta can run here" in done.stdout


def test_doctor_without_the_right_to_namespaces(pasta: Runner) -> None:
    """The limit of a user namespace stands for the sysctl of a machine."""
    script = 'echo 0 >/proc/sys/user/max_net_namespaces && exec "$@"'
    user = pasta.user
    within = ["unshare", "--user", "--map-root-user", "sh", "-c", script, "sh", user.python, "-m", "passt", "--doctor"]
    done = subprocess.run(user.command(within), cwd="/", env=user.env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAIL  Couldn't create namespaces: No space left on device" in done.stdout
    assert "user.max_" in done.stdout
