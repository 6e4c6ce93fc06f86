"""The caller's environment and signals, in processes of their own; the names of programs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from passt.linux.inherited import Inherited, environment, program_name

from ...system.support import REPOSITORY

TAKE = """
import json, signal
from passt.linux import inherited
caller = inherited.take()
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
print(json.dumps([caller.ignored, caller.blocked, list(blocked), signal.getsignal(signal.SIGCHLD)]))
"""


def python(code: str, *options: str, env: dict[str, str] | None = None, prepare: object = None) -> str:
    variables = {"PATH": "/usr/bin:/bin", **(env or {})}
    return subprocess.run(
        [sys.executable, *options, "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n{code}"],
        env=variables, preexec_fn=prepare, restore_signals=False, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def odd_signals() -> None:
    for number in (signal.SIGHUP, signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR2})


OF_LIBC = 1 << 31 | 1 << 32  # glibc's own signals, 32 and 33: a make(1) that uses posix_spawn(3) leaves them ignored


def test_signals_are_noted_and_changed() -> None:
    ignored, blocked = [signal.SIGHUP, signal.SIGTERM], [signal.SIGUSR2, signal.SIGTERM]
    expected = f"[{list(map(int, ignored))}, {list(map(int, blocked))}, [], 0]\n"
    assert python(TAKE, prepare=odd_signals) == expected


@pytest.mark.parametrize(("noted", "ignored"), [("4096", [13]), ("16777216", [25]), ("0", []), ("x", []), ("", [])])
def test_signals_that_the_interpreter_ignores_are_those_of_the_launcher(noted: str, ignored: list[int]) -> None:
    assert python(TAKE, "-X", f"passt={noted}").startswith(f"[{ignored}, ")


def test_signals_are_restored() -> None:
    code = (
        "import os\nfrom passt.linux.inherited import Inherited\n"
        "Inherited(ignored=(1, 13), blocked=(12,)).restore()\n"
        "os.execv('/bin/grep', ['grep', '-E', 'Sig(Ign|Blk)', '/proc/self/status'])"
    )
    lines = dict(line.split() for line in python(code).splitlines())
    assert int(lines["SigIgn:"], 16) & ~OF_LIBC == 1 << 0 | 1 << 12
    assert int(lines["SigBlk:"], 16) == 1 << 11


ENVIRONMENT = "from passt.linux import inherited; print(inherited.environment())"


@pytest.mark.parametrize(
    "env",
    [
        {},
        {"LC_CTYPE": "C"},
        {"LC_CTYPE": "POSIX", "LANG": "C"},
        {"LC_ALL": "C"},
        {"LANG": "de_DE", "PYTHONHASHSEED": "1"},
        {"PASST_ENVIRON": "mine"},
    ],
)
def test_environment_is_that_of_the_caller(env: dict[str, str]) -> None:
    """In the C locale, the interpreter sets LC_CTYPE."""
    assert eval(python(ENVIRONMENT, env=env)) == {"PATH": "/usr/bin:/bin", **env}


def test_environment_that_a_shell_passed_on() -> None:
    noted = r"PWD=/there\000$f.g=a\nb\\\tc\303\274$\000$"
    env = {"PASST_ENVIRON": noted, "PWD": "/here", "SHLVL": "3", "_": "/x", "OLDPWD": "/o", "A": "b"}
    found = eval(python(ENVIRONMENT, "-X", "passt=0", env=env))
    assert found == {"PATH": "/usr/bin:/bin", "A": "b", "PWD": "/there", "f.g": "a\nb\\\tcü$"}


def test_environment_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_CTYPE", "C.UTF-8")
    assert environment("/no/such/file") == dict(os.environ)


def test_nothing_is_inherited_by_default() -> None:
    assert Inherited() == Inherited({}, (), ())


def test_names_of_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = tmp_path / "passt"
    real.touch()
    (tmp_path / "pasta").symlink_to(real)
    (tmp_path / "net").symlink_to(real)
    with open(real) as f:
        descriptors = [f"/dev/fd/{f.fileno()}", f"/proc/self/fd/{f.fileno()}", f"/proc/{os.getpid()}/fd/{f.fileno()}"]
        assert [program_name(path) for path in descriptors] == ["passt"] * 3
    assert program_name(str(tmp_path / "pasta")) == "pasta"
    assert program_name(str(tmp_path / "net")) == "passt"
    assert program_name("/x/passt.avx2") == "passt.avx2"
    assert program_name("pesto") == "pesto"
    assert program_name("/x/__main__.py") == "pasta"
    (tmp_path / "of passt").mkdir()
    monkeypatch.chdir(tmp_path / "of passt")
    assert program_name("") == "pasta"
