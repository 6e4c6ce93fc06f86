"""The first process of a PID namespace, in parts, in ordinary processes: starting, reaping, reporting."""

from __future__ import annotations

import errno
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import passt.lean
from passt import log
from passt.linux.inherited import Inherited
from passt.linux.syscall import PR_SET_PDEATHSIG
from passt.namespace import init as namespace_init
from passt.namespace import supervisor
from passt.namespace.init import Command, login_shell
from passt.namespace.supervisor import shell_status

TIMESTAMP = py_compile.PycInvalidationMode.TIMESTAMP


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
    helper = _ended()
    assert run(lambda: namespace_init._init(c, reader, helper)) == ((42, b"") if start else (1, b""))
    for fd in (reader, writer, helper) if start else (reader, helper):
        os.close(fd)


def _ended() -> int:
    """A descriptor of a process that has ended."""
    process = subprocess.Popen(["true"])
    helper = os.pidfd_open(process.pid)
    process.wait()
    return helper


def test_death_signal_comes_from_the_parent_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for when the helper has ended, or the helper's end would be that of the command."""
    asked: list[object] = []
    monkeypatch.setattr(namespace_init, "prctl", lambda *args: asked.append((args, process.poll())))
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        helper = os.pidfd_open(process.pid)
        assert process.stdin is not None
        threading.Timer(0.1, process.stdin.close).start()
        namespace_init._end_with_pasta(helper)
    os.close(helper)
    assert asked == [((PR_SET_PDEATHSIG, signal.SIGKILL), 0)]


@pytest.mark.parametrize("change", ["none", "newer", "longer", "no bytecode", "unreadable"])
def test_the_supervisor_is_executed_from_bytecode_that_is_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    source = tmp_path / "supervisor.py"
    shutil.copy(supervisor.__file__, source)
    bytecode = Path(py_compile.compile(str(source), doraise=True, invalidation_mode=TIMESTAMP))
    if change == "newer":
        os.utime(source, (1, 1))
    elif change == "longer":
        time = source.stat().st_mtime_ns
        source.write_text(source.read_text() + "# more\n")
        os.utime(source, ns=(time, time))
    elif change == "no bytecode":
        bytecode.unlink()
    elif change == "unreadable":
        bytecode.unlink()
        bytecode.mkdir()
    monkeypatch.setattr(supervisor, "__file__", str(source))
    monkeypatch.setattr(supervisor, "__spec__", SimpleNamespace(cached=str(bytecode)))
    assert namespace_init._program() == str(bytecode if change == "none" else source)


def test_an_interpreter_without_our_finder_compiles_the_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "passt.lean.finder", None)
    monkeypatch.delattr(passt.lean, "finder", raising=False)
    assert namespace_init._program() == supervisor.__file__


def test_what_the_supervisor_may_not_read_is_not_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "__file__", "/no/such/file")
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("executed"))
    namespace_init._become_supervisor(command("true"), -1)


SAYS_HOW = """
import os, sys
from passt.namespace import init
read, write = os.pipe()
os.execve = lambda path, argv, env: print(argv[1:-3])
init._become_supervisor(init.Command("true", ("true",), init.Inherited()), read)
"""


@pytest.mark.parametrize("mode", ["0", "1"])
def test_the_supervisor_takes_text_for_bytes_as_we_do(mode: str) -> None:
    """With PYTHONUTF8=1 and a Latin-1 locale the command's words came to it in Latin-1, or not at all."""
    env = {**os.environ, "PYTHONUTF8": mode}
    done = subprocess.run([sys.executable, "-c", SAYS_HOW], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{['-I', '-S', '-X', f'utf8={mode}']}\n"
