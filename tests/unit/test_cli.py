"""The command itself, started: names, what goes where, the hash key."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from passt import __version__, cli, log
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


@pytest.mark.parametrize("name", ["pasta", "/usr/bin/pasta", "passt4netns", "/x/passt/__main__.py"])
def test_names(name: str) -> None:
    assert main(name, "--version").stdout.startswith("pasta ")


def test_virtual_machines_are_for_later() -> None:
    done = main("/usr/bin/passt", "--version")
    assert (done.returncode, done.stdout) == (1, "")
    assert "not part of this version" in done.stderr


def test_nothing_heavy_is_imported_for_help() -> None:
    heavy = "{'ctypes', 'pyroute2', 'scapy', 'asyncio', 'passt.tcp', 'passt.daemon', 'threading', 'subprocess'}"
    done = python(f"import sys, passt.cli; print(*({heavy} & sys.modules.keys()))")
    assert done.stdout == "\n"


@pytest.mark.parametrize("seed", ["0", "7", "4294967295"])
def test_known_hash_key_is_got_rid_of(seed: str) -> None:
    code = (
        "import os, sys; from passt import cli; cli._want_random_hashes()\n"
        "print(os.environ.get('PYTHONHASHSEED'), sys.flags.hash_randomization, hash(b'passt'), "
        "cli._command_environment()['PYTHONHASHSEED'])"
    )
    first, second = (python(code, PYTHONHASHSEED=seed).stdout.split() for _ in range(2))
    assert (first[0], first[1], first[3]) == ("None", "1", seed)
    assert first[2] != second[2]


def test_random_hash_key_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started over"))
    monkeypatch.setenv("PYTHONHASHSEED", "random")
    cli._want_random_hashes()
    assert cli._command_environment()["PYTHONHASHSEED"] == "random"
    monkeypatch.delenv("PYTHONHASHSEED")
    cli._want_random_hashes()


def test_system_errors_are_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(log, "start_stderr", lambda: None)
    monkeypatch.setattr(log, "err", said.append)
    for error in (Fatal("why"), Fatal("first\nline", "second"), OSError(5, "Input/output error"), OSError("just so")):

        def fail(*_: object, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(cli, "parse", fail)
        monkeypatch.setattr(signal, "signal", lambda *_: None)
        assert cli.main(["pasta"]) == 1
    assert said == ["why", "first line", "second", "Input/output error", "just so"]
