"""A command in a namespace of its own: what it sees, how it ends, signals and terminals."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from passt.namespace.supervisor import GRACE

from .support import (
    DEADLINE,
    Pty,
    Runner,
    User,
    alive,
    by_name,
    command_lines,
    descendants,
    inside,
    wait_for,
)


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("true", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("no-such-command", 127),
        ("kill -9 $$", 137),
        ("kill -15 $$", 143),
    ],
)
def test_exit_status_is_that_of_the_command(pasta: Runner, script: str, status: int) -> None:
    assert pasta.run("--config-net", "--", "sh", "-c", script).returncode == status


def test_command_that_cannot_be_started(pasta: Runner) -> None:
    done = pasta.run("-q", "--", "/no/such/command")
    assert done.returncode == 1
    assert done.stderr == "Failed to start command or shell: /no/such/command: No such file or directory\n" or (
        pasta.user.is_root and done.stderr.endswith("/no/such/command: No such file or directory\n")
    )


def test_script_without_interpreter_line_goes_to_the_shell(pasta: Runner, tmp_path: Path) -> None:
    script = Path("/tmp") / f"pasta-test-script-{os.getpid()}"
    script.write_text('echo "script $1"\n')
    script.chmod(0o755)
    try:
        assert pasta.run("--", str(script), "runs").stdout == "script runs\n"
    finally:
        script.unlink()


def test_standard_streams_and_environment_are_the_commands(pasta: Runner) -> None:
    env = {**pasta.user.env, "COLOUR": "green", "PYTHONHASHSEED": "7"}
    done = pasta.run(
        "--", "sh", "-c", "cat; echo $COLOUR $PYTHONHASHSEED; echo oops >&2", input="typed\n", stdin=None, env=env
    )
    assert done.stdout == "typed\ngreen 7\n"
    assert done.stderr.endswith("oops\n")


def test_huge_pages_are_the_commands(pasta: Runner) -> None:
    """Memory of the daemon would come in steps of 2 MiB where the kernel gives them to all."""
    script = "grep THP_enabled /proc/self/status; read end"
    running = pasta.start("--", "sh", "-c", script, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert running.stdin is not None
    assert running.stdout is not None
    said = running.stdout.readline()
    status = Path(f"/proc/{running.pid}/status").read_text()
    running.stdin.close()
    running.wait(DEADLINE)
    assert said == b"THP_enabled:\t1\n"
    assert "THP_enabled:\t0\n" in status


def test_login_shell_without_a_command(pasta: Runner) -> None:
    done = pasta.run("--config-net", input="echo $0; ip -br link show lo; exit 5\n", stdin=None)
    assert done.stdout.startswith("-/bin/sh\nlo ")
    assert done.returncode == 5


def test_closed_standard_streams(pasta: Runner) -> None:
    command = pasta.user.pasta("--config-net", "--", "sh", "-c", "exit 4")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command], cwd="/", env=pasta.user.env, check=False
    )
    assert done.returncode == 4


def test_pasta_in_pasta(pasta: Runner) -> None:
    python = "import os, sys; os.execv(sys.executable, [sys.executable, '-m', 'passt', *sys.argv[1:]])"
    nested = [
        "/usr/bin/python3",
        "-c",
        python,
        "-q",
        "--config-net",
        "--",
        "sh",
        "-c",
        "ip -br address; hostname; exit 7",
    ]
    done = pasta.run("-q", "--config-net", "-a", "10.1.2.3/24", "-g", "10.1.2.1", "--", *nested)
    assert done.returncode == 7, done.stderr
    assert "10.1.2.3/24" in done.stdout
    assert done.stdout.endswith(f"pasta-pasta-{os.uname().nodename}\n")


def test_ping_that_the_host_forbids_is_a_warning(hosted: Runner) -> None:
    done = hosted.run("--config-net", "-q", "-4", "--", "ping", "-c", "1", "-W", "1", "198.51.100.1")
    assert done.returncode == 1
    assert done.stderr.count("net.ipv4.ping_group_range") == 1


def test_inherited_descriptors_do_not_reach_the_command(pasta: Runner) -> None:
    with open("/etc/passwd") as f:
        done = pasta.run("--", "ls", "/proc/self/fd", pass_fds=[f.fileno()])
    assert done.stdout.split() == ["0", "1", "2", "3"]  # 3 is ls reading the directory


def test_namespace_of_the_command(hosted: Runner) -> None:
    seen = inside(hosted, "--config-net")
    assert (seen["uid"], seen["pid"], seen["ping"]) == (0, 2, ["0", "0"])
    assert seen["host"] == f"pasta-{os.uname().nodename}"
    assert int(seen["caps"], 16).bit_count() > 30
    assert by_name(seen["links"], "lo")["operstate"] != "DOWN"


# Signals and terminals ---------------------------------------------------------------------------------------------

TRAP = "trap 'echo got it; exit 9' TERM HUP USR2 INT QUIT; echo ready; while :; do sleep 0.05; done"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT, signal.SIGQUIT])
def test_signals_are_passed_on(pasta: Runner, number: signal.Signals) -> None:
    process = pasta.start("-q", "--", "sh", "-c", TRAP, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == b"got it\n"
    assert process.wait(DEADLINE) == 9


def test_statistics_on_a_signal_are_not_for_the_command(pasta: Runner) -> None:
    """SIGUSR1 is ours: the command, which has a trap for it, hears nothing."""
    script = "trap 'echo hit' USR1; echo ready; while :; do sleep 0.05; done"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = pasta.start("-q", "--", "sh", "-c", script, **pipes)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        while not process.stderr.readline().startswith(b"Statistics of the last "):
            assert process.poll() is None
    process.terminate()
    assert process.stdout.read() == b""
    assert process.wait(DEADLINE) == 143


def test_command_that_dies_of_a_passed_signal(pasta: Runner) -> None:
    process = pasta.start("-q", "--", "sh", "-c", "echo ready; exec sleep 1000", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.terminate()
    assert process.wait(DEADLINE) == 143


def test_command_that_ignores_the_end_of_pasta(pasta: Runner) -> None:
    """It would go on without a network, or keep pasta from ending."""
    script = "trap '' TERM; sleep 1000 & echo ready; wait"
    process = pasta.start("-q", "--", "sh", "-c", script, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    children = descendants(process.pid)
    process.terminate()
    assert process.wait(DEADLINE) == 143
    assert not any(map(alive, children))


@pytest.mark.parametrize("shell", [(), ("bash", "--norc", "--noprofile", "-i"), ("dash", "-i")])
def test_end_of_an_interactive_shell(ordinary_user: User, shell: tuple[str, ...]) -> None:
    """All of them ignore SIGTERM at their prompt. One without job control on a terminal is killed as above."""
    env = {**ordinary_user.env, "PS1": "in> ", "SHELL": "/bin/bash", "TERM": "dumb"}
    argv = [ordinary_user.python, "-m", "passt", "-q", *(("--", *shell) if shell else ())]
    pty = Pty(ordinary_user.command(argv), env)
    try:
        pty.expect("in> " if shell else r"[$#>] ")
        children = descendants(pty.pid)
        begin = time.monotonic()
        os.kill(pty.pid, signal.SIGTERM)
        assert pty.wait() in (129, 143)
        assert time.monotonic() - begin < GRACE, "it was not waited for in vain"
        assert not any(map(alive, children))
    finally:
        pty.close()


@pytest.mark.parametrize("stopped", [False, True])
def test_everything_dies_with_pasta(pasta: Runner, stopped: bool) -> None:
    """Also if the first process does not come to read its pipe: by the signal that was asked for before its program."""
    process = pasta.start("-q", "--", "sh", "-c", "sleep 1000 & echo ready; sleep 1000", stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    children = descendants(process.pid)
    assert len(children) >= 3
    if stopped:
        (init,) = psutil.Process(process.pid).children()
        init.suspend()
    process.kill()
    process.wait()
    wait_for(lambda: not any(map(alive, children)), "the command's processes end")


def test_everything_dies_with_the_command(pasta: Runner) -> None:
    marker = f"{1000 + os.getpid() % 1000}.{os.getpid()}"
    assert pasta.run("--", "sh", "-c", f"setsid sleep {marker} & exit 0").returncode == 0
    assert marker.encode() not in b"".join(command_lines())


@pytest.fixture
def shell(anyone: User) -> Iterator[Pty]:
    """An interactive shell on a terminal, in which $PASTA runs pasta."""
    env = {**anyone.env, "PS1": "out> ", "TERM": "dumb", "PASTA": " ".join(anyone.pasta("-q", "--config-net"))}
    if not anyone.is_root:
        env["PASTA"] = f"{anyone.python} -m passt -q --config-net"
    pty = Pty(anyone.command(["bash", "--norc", "--noprofile", "--noediting", "-i"]), env)
    pty.expect("out> ")
    yield pty
    pty.close()


def test_interrupt_ends_the_command_and_not_pasta_before_it(shell: Pty) -> None:
    shell.type("$PASTA -- sh -c 'echo up; exec sleep 1000'; echo status=$?.\n")
    shell.expect(r"\nup\r")
    shell.type("\x03")
    shell.expect(r"status=130\.")


def test_command_that_handles_the_interrupt(shell: Pty) -> None:
    script = "trap 'echo caught; exit 6' INT; echo up; while :; do sleep 0.05; done"
    shell.type(f'$PASTA -- sh -c "{script}"; echo status=$?.\n')
    shell.expect(r"\nup\r")
    shell.type("\x03")
    shell.expect("caught")
    shell.expect(r"\nstatus=6\.")


def name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def state(pid: int) -> str:
    """The letter of a process's state (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_stop_and_continue(shell: Pty) -> None:
    shell.type("$PASTA -- sh -c 'echo up; read word; echo \"read $word\"; exit 8'\n")
    shell.expect(r"\nup\r")
    shell.type("\x1a")
    shell.expect("Stopped")
    shell.expect("out> ")
    wait_for(lambda: {state(pid) for pid in descendants(shell.pid) if name(pid) == "sh"} == {"T"}, "read to stop")
    shell.type("fg\n")
    shell.type("again\n")
    shell.expect(r"\nread again\r")
    shell.type("echo status=$?.\n")
    shell.expect(r"status=8\.")


def test_interactive_shell_inside_has_job_control(shell: Pty) -> None:
    shell.type("PS1='i''n> ' $PASTA -- bash --norc --noprofile --noediting -i\n")
    shell.expect("in> ")
    shell.type("sh -c 'echo up; exec sleep 1000'\n")
    shell.expect(r"\nup\r")
    shell.type("\x1a")
    shell.expect("Stopped")
    shell.type("jobs\n")
    shell.expect(r"Stopped.*sleep 1000")
    shell.type("exit 3\n")  # after `jobs`, there is no warning about them
    shell.expect("out> ")
    shell.type("echo status=$?.\n")
    shell.expect(r"\nstatus=3\.")


def test_terminal_is_given_back_by_a_shell_inside(anyone: User) -> None:
    """A script has no job control: unless pasta took the terminal back, its next read would fail."""
    pasta = f"{anyone.python} -m passt -q -- bash --norc --noprofile --noediting -i"
    script = f'{pasta}; echo status=$?.; read line; echo "read $line"'
    pty = Pty(anyone.command(["sh", "-c", script]), {**anyone.env, "PS1": "in> ", "TERM": "dumb"})
    try:
        pty.expect("in> ")
        pty.type("exit 2\n")
        pty.expect(r"status=2\.")
        pty.type("after\n")
        pty.expect("read after")
    finally:
        pty.close()
