"""The command itself, started: names, what goes where, the hash key."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from passt import __version__, cli, log
from passt.conf.options import Options
from passt.log import Fatal


def python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def start(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "passt", *words], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def test_version_goes_to_standard_output() -> None:
    done = start("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"pasta {__version__}\n")


@pytest.mark.parametrize("words", [["--nonsense"], ["--nonsense\nline"], ["-m", "\udcff"]])
def test_errors_are_one_line_on_standard_error(words: list[str]) -> None:
    done = start(*words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def main(name: str, *words: str) -> subprocess.CompletedProcess[str]:
    return python(f"from passt.cli import main; raise SystemExit(main({[name, *words]!r}))")


@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("pasta", "pasta"),
        ("/usr/bin/pasta", "pasta"),
        ("passt4netns", "pasta"),
        ("/usr/bin/passt4netns.python", "pasta"),
        ("/usr/bin/passt.python", "passt"),
        ("/x/passt/__main__.py", "pasta"),
        ("/x/passt/pasta", "pasta"),
        ("", "pasta"),
        ("passt", "passt"),
        ("/usr/bin/passt", "passt"),
        ("passt.avx2", "passt"),
        ("/opt/my-passt", "passt"),
    ],
)
def test_mode_is_that_of_the_name(name: str, mode: str) -> None:
    assert cli.mode(name) == mode


@pytest.mark.parametrize("name", ["pasta", "passt"])
def test_mode_is_said(name: str) -> None:
    assert main(name, "--version").stdout.startswith(f"{name} {__version__}\n")
    assert main(name, "--help").stdout.startswith(f"Usage: {name} ")
    assert main(name, "--nonsense").stderr == f"{name}: unrecognized option '--nonsense': see {name} --help\n"


def test_module_for_virtual_machines() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "passt.vm", "-f", "extra"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "Extra non-option argument: extra (passt takes options only)\n"


COLLECTIONS = """
import gc, os, sys
frozen = gc.get_freeze_count()  # CPython 3.12 has frozen some objects itself
from passt.daemon import passt as daemon
def about_to_run(*args, **named):
    print(gc.isenabled(), gc.get_freeze_count() > 10_000, flush=True)
    os._exit(0)
def start(*args):
    print(gc.isenabled(), gc.get_freeze_count() - frozen, flush=True)
    return (None,) * 5
daemon.Sandbox = about_to_run
daemon._start = start
from passt.__main__ import main
main(["passt", "-f"])
"""


def test_a_start_is_not_collected_and_what_follows_is() -> None:
    """Later collections leave out all that it has made."""
    done = python(COLLECTIONS)
    assert done.stdout == "False 0\nTrue True\n", done.stderr


INTERRUPTED = """
import os, signal, sys
def hear(event, arguments):
    if event == "import" and arguments[0] == "passt.conf.argv":
        os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(hear)
signal.signal(signal.SIGINT, {})
from passt.__main__ import main
raise SystemExit(main(["pasta", "--version"]))
"""


def test_interrupted_at_start() -> None:
    """During imports: no output, and the parent sees a signal."""
    done = python(INTERRUPTED.format("signal.default_int_handler"))
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


def test_interrupts_stay_ignored() -> None:
    """Those that a shell started in the background are not meant."""
    assert python(INTERRUPTED.format("signal.SIG_IGN")).returncode == 0


def test_descriptor_must_be_open() -> None:
    done = main("passt", "--fd", "77")
    assert (done.returncode, done.stderr) == (1, "Invalid --fd: 77 (it is not open)\n")


def test_descriptor_of_the_guest_is_not_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[object] = []

    def run(options: Options, inherited: list[int]) -> None:
        told.append((options.fd, inherited))
        raise Fatal("far enough")

    reader, writer = os.pipe()
    monkeypatch.setattr(cli, "inherited_fds", lambda: [reader, writer])
    monkeypatch.setattr(log, "setup", lambda *_, **__: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr("passt.daemon.passt.run", run)
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    try:
        assert cli.main(["passt", "-F", str(reader)]) == 1
    finally:
        os.close(reader)
        os.close(writer)
    assert told == [(reader, [writer])]


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = {"ctypes", "pyroute2", "scapy", "asyncio", "threading", "subprocess", "dataclasses", "inspect"}
    heavy |= {f"passt.{name}" for name in ("tcp", "daemon")}
    heavy |= {f"passt.conf.{name}" for name in ("completion", "ports", "forwards", "decide")}
    done = python(f"import sys, passt.cli; print(*({heavy} & sys.modules.keys()))")
    assert done.stdout == "\n"


@pytest.mark.parametrize("seed", ["0", "7", "4294967295"])
def test_known_hash_key_is_got_rid_of(seed: str) -> None:
    code = (
        "import os, sys; from passt import cli; cli._want_random_hashes()\n"
        "print(os.environ.get('PYTHONHASHSEED'), sys.flags.hash_randomization, hash(b'passt'), "
        "cli._command_environment(os.environ)['PYTHONHASHSEED'])"
    )
    first, second = (python(code, PYTHONHASHSEED=seed).stdout.split() for _ in range(2))
    assert (first[0], first[1], first[3]) == ("None", "1", seed)
    assert first[2] != second[2]


def test_random_hash_key_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started over"))
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    cli._want_random_hashes()
    assert cli._command_environment(os.environ)["PYTHONHASHSEED"] == "random"
    monkeypatch.delenv("PYTHONHASHSEED")
    cli._want_random_hashes()


def test_system_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the step, and the file if there is one."""
    said: list[str] = []
    monkeypatch.setattr(log, "start_stderr", lambda: None)
    monkeypatch.setattr(log, "err", said.append)
    step = "Couldn't parse the command line: "
    expected = [
        (Fatal("why"), ["why"]),
        (Fatal("first\nline", "second"), ["first line", "second"]),
        (OSError(5, "Input/output error"), [f"{step}Input/output error"]),
        (OSError("just so"), [f"{step}just so"]),
        (FileNotFoundError(2, "No such file or directory", "/x"), [f"{step}/x: No such file or directory"]),
        (FileNotFoundError(2, "No such file or directory", b"/x"), [f"{step}/x: No such file or directory"]),
        (log.StepError(5, "Couldn't do that: Input/output error"), ["Couldn't do that: Input/output error"]),
        (
            OSError(errno.EMFILE, "No more"),
            [f"{step}No more (raise the limit of open files: ulimit -n, or LimitNOFILE= of the unit)"],
        ),
        (
            MemoryError(),
            [f"{step}Cannot allocate memory (raise the limit of memory: ulimit -v, or MemoryMax= of the unit)"],
        ),
    ]
    for error, lines in expected:

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        said.clear()
        monkeypatch.setattr(cli, "parse", fail)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert cli.main(["pasta"]) == 1
        assert said == lines


def test_missing_proc_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    e = FileNotFoundError(2, "No such file or directory", "/proc/self/fd")
    assert log.where(e) == "/proc/self/fd: No such file or directory"
    monkeypatch.setattr(os.path, "exists", lambda _: False)
    assert log.where(e) == "/proc/self/fd: No such file or directory (mount it first: mount -t proc proc /proc)"


MISSING = """
import sys
sys.modules[{!r}] = None
from passt import cli
sys.exit(cli.main([{!r}, *{!r}]))
"""


@pytest.mark.parametrize(
    ("module", "program", "words", "said"),
    [
        ("pyroute2", "pasta", ["-q", "true"], "pip install pyroute2; Debian: python3-pyroute2"),
        ("pyroute2", "passt", ["-f"], "pip install pyroute2; Debian: python3-pyroute2"),
        ("scapy", "pasta", ["--trace", "true"], "pip install scapy; Debian: python3-scapy"),
        ("ctypes", "pasta", ["true"], "it belongs to "),
        ("passt.tcp", "passt", ["-f"], "the installation is incomplete: install passt again"),
    ],
)
def test_missing_modules(module: str, program: str, words: list[str], said: str) -> None:
    """One line, with the cure."""
    done = python(MISSING.format(module, program, words))
    line = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert line.startswith(f"Couldn't load the Python module {module}") or program == "pasta", done.stderr
    assert said in line
    assert "Traceback" not in done.stderr
