"""The supervisor of a command, in ordinary processes: executing, reaping, passing signals on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from passt.namespace import supervisor
from passt.namespace.init import Command
from passt.namespace.supervisor import shell_status

from .test_init import command, run


def execute(c: Command) -> tuple[int, bytes]:
    return run(lambda: supervisor.execute(c.file, c.argv, c.env))


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
        return run(lambda: supervisor.supervise(c.file, c.argv, c.env, reader))
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
