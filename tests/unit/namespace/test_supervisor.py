"""The supervisor of a command, in ordinary processes: executing, reaping, passing signals on."""

from __future__ import annotations

import errno
import marshal
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from passt.namespace import supervisor
from passt.namespace.init import Command
from passt.namespace.supervisor import shell_status

from .test_init import command, run


def execute(c: Command) -> tuple[int, bytes]:
    return run(lambda: supervisor.execute(*c.words))


def test_command_gets_argv_and_environment() -> None:
    assert execute(command("sh", "-c", 'echo "$0 $1 $COLOUR" >&2; exit 5', "a", "b", COLOUR="green")) == (
        5,
        b"a b green\n",
    )


def test_command_gets_default_signals() -> None:
    status, text = execute(command("grep", "SigIgn", "/proc/self/status"))
    assert status == 0
    status, text = execute(command("sh", "-c", "grep SigIgn /proc/self/status >&2"))
    ignored = int(text.split()[1], 16)
    assert not ignored >> (signal.SIGPIPE - 1) & 1
    assert not ignored >> (signal.SIGXFSZ - 1) & 1
    assert not ignored >> (signal.SIGCHLD - 1) & 1


@pytest.mark.parametrize(
    ("c", "reason"),
    [
        (command("/no/such/file"), "No such file or directory"),
        (command("no-such-file"), "No such file or directory"),
        (command("no-such-file", PATH=""), "No such file or directory"),
        (command("/etc"), "Permission denied"),
        (command("/etc/passwd/x"), "No such file or directory"),
        (command(""), "No such file or directory"),
    ],
)
def test_command_that_cannot_be_started(c: Command, reason: str) -> None:
    assert execute(c) == (1, f"Failed to start command or shell: {c.file}: {reason}\n".encode())


def fails(number: int) -> Callable[..., NoReturn]:
    def function(*_: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return function


def test_no_more_processes() -> None:
    def body() -> int:
        os.fork = fails(errno.EAGAIN)
        return supervisor.supervise(0, *command("true").words)

    assert run(body) == (1, b"Failed to start command or shell: true: Resource temporarily unavailable\n")


def test_no_shell_for_a_script(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("exit 6\n")
    script.chmod(0o755)

    def body() -> None:
        execve = os.execve
        os.execve = lambda path, *more: execve(path.replace("/bin/sh", "/none"), *more)
        supervisor.execute(*command(str(script)).words)

    assert run(body) == (1, f"Failed to start command or shell: {script}: No such file or directory\n".encode())


def test_error_of_the_supervisor() -> None:
    def body() -> None:
        reader, writer = os.pipe()
        os.write(writer, bytes((supervisor.START,)))
        words = os.memfd_create("command")
        os.write(words, marshal.dumps(command("true").words))
        os.lseek(words, 0, os.SEEK_SET)
        sys.argv = ["supervisor", str(reader), str(words)]
        supervisor.supervise = fails(errno.EIO)
        supervisor.main()

    assert run(body) == (1, b"Failed to supervise the command: [Errno 5] Input/output error\n")


def test_forbidden_file_in_path_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "true").mkdir()
    assert execute(command("true", PATH=f"{tmp_path}:/usr/bin:/bin")) == (0, b"")
    assert b"Permission denied" in execute(command("true", PATH=f"{tmp_path}"))[1]


def test_script_without_interpreter_line_goes_to_the_shell(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("echo $0 $1 >&2; exit 6\n")
    script.chmod(0o755)
    assert execute(command(str(script), "x")) == (6, f"{script} x\n".encode())


def supervise(script: str, *values: int, close: bool = False) -> tuple[int, bytes]:
    """The supervisor of `sh -c script`, told `values`; `close` is the death of pasta."""
    reader, writer = os.pipe()
    os.write(writer, bytes(values))
    if close:
        os.close(writer)
    try:
        c = command("sh", "-c", script)
        return run(lambda: supervisor.supervise(reader, *c.words))
    finally:
        os.close(reader)
        if not close:
            os.close(writer)


@pytest.mark.parametrize(
    ("script", "status"), [("exit 0", 0), ("exit 3", 3), ("exit 255", 255), ("kill -KILL $$", 137), ("kill $$", 143)]
)
def test_status(script: str, status: int) -> None:
    assert supervise(script) == (status, b"")


def test_orphans_are_reaped_and_do_not_count() -> None:
    assert supervise("(sh -c 'exit 9' &) ; (exit 8) & wait; exit 4")[0] == 4


def test_signals_are_passed_on() -> None:
    assert supervise("exec sleep 1000", signal.SIGTERM) == (143, b"")
    assert supervise("exec sleep 1000", signal.SIGUSR1) == (138, b"")


# SIGTERM ends it in any case --------------------------------------------------------------------------------------


def told_when_ready(script: str, *values: int, grace: float = 60.0) -> tuple[int, bytes]:
    """The supervisor of `sh -c script`, told `values` when the script has written a line to descriptor 3."""
    reader, writer = os.pipe()
    ready, says = os.pipe()
    os.set_inheritable(says, True)

    def body() -> int:
        os.dup2(says, 9)
        os.close(writer)
        os.close(says)
        supervisor.GRACE = grace
        c = command("sh", "-c", script)
        status = supervisor.supervise(reader, *c.words)
        for child in Path("/proc/thread-self/children").read_text().split():
            os.kill(int(child), signal.SIGKILL)  # as the kernel does after PID 1
        return status

    def tell() -> None:
        os.read(ready, 1)
        os.write(writer, bytes(values))

    teller = threading.Thread(target=tell)
    teller.start()
    try:
        return run(body)
    finally:
        os.close(says)
        teller.join()
        for fd in (reader, writer, ready):
            os.close(fd)


IGNORING = "trap '' TERM; echo >&9; exec sleep 1000 9>&-"
TRAPPING = "trap 'echo trapped >&2' TERM; echo >&9; exec 9>&-; while :; do sleep 0.05; done"


def test_command_that_ignores_it_is_killed_at_once() -> None:
    begin = time.monotonic()
    assert told_when_ready(IGNORING, signal.SIGTERM) == (143, b"")
    assert time.monotonic() - begin < 30


def test_command_that_only_says_something_is_killed_later() -> None:
    assert told_when_ready(TRAPPING, signal.SIGTERM, grace=0.5) == (143, b"trapped\n")


def test_command_has_time_for_its_end() -> None:
    script = "trap 'sleep 0.3; exit 7' TERM; echo >&9; exec 9>&-; while :; do sleep 0.05; done"
    assert told_when_ready(script, signal.SIGTERM) == (7, b"")


def test_stopped_command_goes_on_to_its_end() -> None:
    script = "trap 'exit 7' TERM; echo >&9; exec 9>&-; kill -STOP $$; while :; do sleep 0.05; done"
    assert told_when_ready(script, signal.SIGTERM) == (7, b"")


def test_other_signals_leave_it_to_the_command() -> None:
    script = f"trap '' HUP INT QUIT; {TRAPPING}"
    assert told_when_ready(script, signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, grace=0.5)[0] == 143


def test_ignored_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(["sh", "-c", "trap '' TERM USR2; echo; exec sleep 1000"], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        assert {signal.SIGTERM, signal.SIGUSR2} <= supervisor.ignored(process.pid)
        assert signal.SIGHUP not in supervisor.ignored(process.pid)
        monkeypatch.setattr(os, "getpid", lambda: 1)
        assert supervisor.ignored(process.pid) == set(), "the PIDs of /proc are not ours"
    finally:
        process.kill()
        process.communicate()
    assert supervisor.ignored(process.pid) == set()


def test_death_of_pasta_ends_it() -> None:
    assert supervise("exec sleep 3 2>&-", close=True) == (1, b"")


def test_reap_tells_only_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = [(11, 0), (10, 5 << 8), (12, 9), (0, 0)]
    monkeypatch.setattr(os, "waitpid", lambda pid, options: ended.pop(0))
    assert supervisor.reap(10) == 5
    ended[:] = [(11, 0), (0, 0)]
    assert supervisor.reap(10) is None


def test_shell_status() -> None:
    assert (shell_status(0), shell_status(3 << 8), shell_status(9), shell_status(15 | 0x80)) == (0, 3, 137, 143)


LOADS = """
import os, sys
space = {}
exec(open(sys.argv[1]).read(), space)
os._exit = lambda status: print(*sys.modules)
sys.argv = ["supervisor", "0", "0"]
space["main"]()
"""


def test_the_program_loads_little() -> None:
    argv = [sys.executable, "-I", "-S", "-c", LOADS, supervisor.__file__]
    loaded = subprocess.run(argv, input=marshal.dumps([]), capture_output=True, check=True).stdout.decode().split()
    assert "marshal" in loaded
    assert not {"ctypes", "enum", "json", "passt", "re", "signal", "typing"} & set(loaded)
