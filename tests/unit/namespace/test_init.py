"""The first process of a PID namespace, in parts, in ordinary processes: starting, reaping, reporting."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from passt import log
from passt.linux.inherited import Inherited
from passt.namespace import init as namespace_init
from passt.namespace import supervisor
from passt.namespace.init import Command, login_shell
from passt.namespace.supervisor import shell_status


def run(body: Callable[[], int]) -> tuple[int, bytes]:
    """body() in a forked process: its exit status as a shell has it, and what it wrote to standard error."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the test run has a handler of its own
            os.dup2(writer, 2)
            status = body()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader, "rb") as f:
        text = f.read()
    return shell_status(os.waitpid(pid, 0)[1]), text


def command(*argv: str, **env: str) -> Command:
    return Command(argv[0], argv, Inherited({"PATH": "/usr/bin:/bin", **env}))


# Starting ----------------------------------------------------------------------------------------------------------


def test_login_shell() -> None:
    caller = Inherited({"SHELL": "/bin/dash"}, ignored=(signal.SIGHUP,))
    assert login_shell(caller) == Command("/bin/dash", ("-/bin/dash",), caller)
    assert login_shell(Inherited({"SHELL": ""})).file == "/bin/sh"
    assert login_shell(Inherited()).argv == ("-/bin/sh",)


# Preparing ---------------------------------------------------------------------------------------------------------


def test_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(namespace_init, "mount", lambda *args: done.append(args))
    monkeypatch.setattr(namespace_init, "_allow_ping", lambda: done.append("ping"))
    monkeypatch.setattr(socket, "gethostname", lambda: "h" * 64)
    monkeypatch.setattr(socket, "sethostname", done.append)
    namespace_init._prepare()
    assert done == [
        ("none", "/", "", 0x84000),  # first of all: what is mounted from now on stays here
        ("proc", "/proc", "proc", 0xE),
        "ping",
        "pasta-" + "h" * 58,
    ]


def test_what_cannot_be_prepared_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    done: list[str] = []

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "mount: Operation not permitted")

    monkeypatch.setattr(log, "warn", said.append)
    monkeypatch.setattr(namespace_init, "mount", refuse)
    monkeypatch.setattr(namespace_init, "_allow_ping", refuse)
    monkeypatch.setattr(socket, "sethostname", done.append)
    namespace_init._prepare()
    assert len(said) == 3
    assert said[1] == "Couldn't mount /proc in the namespace: Operation not permitted"
    assert len(done) == 1


def _refuse(*_: object) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


@pytest.mark.parametrize(
    "obstacle",
    [None, (sys, "executable", "/no/such"), (os, "memfd_create", _refuse)],
    ids=["nothing", "interpreter", "file"],
)
@pytest.mark.parametrize("start", [True, False])
def test_init_waits_for_the_start(
    monkeypatch: pytest.MonkeyPatch, start: bool, obstacle: tuple[object, str, object] | None
) -> None:
    """As a program of its own, and where that cannot be executed, or a policy forbids the file with its words."""
    monkeypatch.setattr(namespace_init, "_prepare", lambda: None)
    if obstacle is not None:
        monkeypatch.setattr(*obstacle)
    reader, writer = os.pipe()
    if start:
        os.write(writer, b"\0")
    else:
        os.close(writer)  # the death of pasta
    c = command("sh", "-c", "exit $CODE", CODE="42", BYTES="\udcff")
    assert run(lambda: namespace_init._init(c, reader)) == ((42, b"") if start else (1, b""))
    for fd in (reader, writer) if start else (reader,):
        os.close(fd)


def test_what_the_supervisor_may_not_read_is_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "__file__", "/no/such/file")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("executed"))
    namespace_init._become_supervisor(command("true"), -1)


SAYS_HOW = """
import os, sys
from passt.namespace import init
read, write = os.pipe()
os.execve = lambda path, argv, env: print(argv[1:argv.index(init.supervisor.__file__)])
init._become_supervisor(init.Command("true", ("true",), init.Inherited()), read)
"""


@pytest.mark.parametrize("mode", ["0", "1"])
def test_the_supervisor_takes_text_for_bytes_as_we_do(mode: str) -> None:
    """With PYTHONUTF8=1 and a Latin-1 locale the command's words came to it in Latin-1, or not at all."""
    env = {**os.environ, "PYTHONUTF8": mode}
    done = subprocess.run([sys.executable, "-c", SAYS_HOW], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{['-I', '-S', '-X', f'utf8={mode}']}\n"
