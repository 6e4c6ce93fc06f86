"""Completions: the files are those that the table gives, and shells take them and complete by them."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from passt.conf.completion import SHELLS, script
from passt.conf.table import completed, listed
from passt.log import Fatal
from passt.pesto import command as pesto
from passt.policy.config import PASST, PASTA
from tests.system.support import Pty, environment

COMPLETIONS = Path(__file__).parent.parent / "completions"
PESTO = "pesto"
FILES = {
    "bash/pasta": ("bash", PASTA),
    "bash/passt4netns": ("bash", PASTA),
    "bash/passt": ("bash", PASST),
    "zsh/_pasta": ("zsh", PASTA),
    "zsh/_passt": ("zsh", PASST),
    "fish/pasta.fish": ("fish", PASTA),
    "fish/passt.fish": ("fish", PASST),
    "bash/pesto": ("bash", PESTO),
    "zsh/_pesto": ("zsh", PESTO),
    "fish/pesto.fish": ("fish", PESTO),
}


def run(*argv: str) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    assert done.stderr == ""
    return done.stdout


@pytest.mark.parametrize("path", FILES)
def test_files_are_up_to_date(path: str) -> None:
    """If not: scripts/completions."""
    shell, mode = FILES[path]
    program = pesto.completed() if mode == PESTO else completed(mode)
    assert (COMPLETIONS / path).read_text() == script(shell, program)


def test_every_file_is_installed() -> None:
    project = (COMPLETIONS.parent / "pyproject.toml").read_text()
    for path in COMPLETIONS.rglob("*"):
        if path.is_file():
            assert f'"{path.relative_to(COMPLETIONS.parent)}"' in project


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_every_option_is_there(shell: str, mode: str) -> None:
    text = script(shell, completed(mode))
    for option in listed(mode):
        assert re.search(rf"(-l |--){option.name}(?![\w-])", text)
    assert "{guest}" not in text


def test_unknown_shell() -> None:
    with pytest.raises(Fatal, match=r"^Invalid --completion: tcsh \(give bash, zsh or fish\)$"):
        script("tcsh", completed(PASTA))


# bash --------------------------------------------------------------------------------------------------------------


def complete(name: str, *words: str) -> list[str]:
    """The completions of bash for the last of `words`; it takes `=` for a word of its own."""
    line = " ".join(map(shlex.quote, (name, *words)))
    code = f"""
    compopt() {{ :; }}  # which works in the middle of a completion only
    source {COMPLETIONS}/bash/{name}
    complete -p {name} >/dev/null
    COMP_WORDS=({line}); COMP_CWORD={len(words)}
    _{"pasta" if name == "passt4netns" else name}
    printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    return sorted(set(filter(None, run("bash", "--norc", "-c", code).splitlines())))


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["--map"], ["--map-guest-addr", "--map-host-loopback"]),
        (["-q", "--config"], ["--config-net"]),
        (["--one"], []),
        (["-m", "1500", "--config"], ["--config-net"]),
        (["--mtu", "=", "1500", "--config"], ["--config-net"]),
        (["-t", ""], ["all", "auto", "none"]),
        (["--tcp-ports", "="], ["all", "auto", "none"]),
        (["--tcp-ports", "=", "a"], ["all", "auto"]),
        (["-D", "n"], ["none"]),
        (["-m", ""], []),
        (["--completion", ""], ["bash", "fish", "zsh"]),
        (["-i", "l"], ["lo"]),
        (["--runas", "roo"], ["root"]),
        (["-P", "/etc/hostn"], ["/etc/hostname"]),
        (["--", "--config"], []),
        (["--", "mkfif"], ["mkfifo"]),
        (["-f", "mkfif"], ["mkfifo"]),
        (["cat", "/etc/hostn"], ["/etc/hostname"]),
        (["cat", "--config"], []),
        (["-t", "none", "cat", "--config"], []),
    ],
)
@pytest.mark.parametrize("name", ["pasta", "passt4netns"])
def test_bash_completes_pasta(name: str, words: list[str], offered: list[str]) -> None:
    assert complete(name, *words) == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["--one"], ["--one-off"]),
        (["--config"], []),
        (["-u", ""], ["all", "none"]),
        (["-s", "/etc/hostn"], ["/etc/hostname"]),
        (["mkfif"], []),
    ],
)
def test_bash_completes_passt(words: list[str], offered: list[str]) -> None:
    assert complete("passt", *words) == offered


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["--del"], ["--delete"]),
        (["-A", "-t", ""], ["all", "auto", "none"]),
        (["--clear", "--sh"], ["--show"]),  # its argument, which it can do without, is never the next word
        (["-s", "/etc/hostn"], ["/etc/hostname"]),
    ],
)
def test_bash_completes_pesto(words: list[str], offered: list[str]) -> None:
    assert complete("pesto", *words) == offered


# zsh and fish ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["_pasta", "_passt", "_pesto"])
def test_zsh_takes_it(name: str) -> None:
    run("zsh", "-f", "-n", str(COMPLETIONS / "zsh" / name))


def test_zsh_completes() -> None:
    shell = Pty(["zsh", "-f", "-i"], environment(TERM="dumb"))
    try:
        shell.type(f"PS1=; fpath=({COMPLETIONS}/zsh $fpath); autoload -U compinit; compinit -u -D; print REA''DY\n")
        shell.expect("READY")
        for typed, wanted in (("--config-n", "--config-net"), ("-q --map-g", "--map-guest-addr"), ("-t aut", "auto")):
            shell.type(f"true; pasta {typed}\t")
            shell.expect(wanted)
            shell.type("\x15")  # which empties the line
        shell.type("true; passt --one\t")
        shell.expect("--one-off")
        shell.type("\x15true; pesto --metr\t")
        shell.expect("--metrics")
    finally:
        shell.close()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("pasta --config-", ["--config-net"]),
        ("passt4netns --config-", ["--config-net"]),
        ("pasta -t a", ["auto", "all"]),
        ("passt --one", ["--one-off"]),
        ("passt --config-", []),
        ("passt -u a", ["all"]),
        ("pesto --metr", ["--metrics"]),
    ],
)
def test_fish_completes(line: str, offered: list[str]) -> None:
    sources = "; ".join(f"source {path}" for path in sorted((COMPLETIONS / "fish").iterdir()))
    lines = run("fish", "--no-config", "-c", f"{sources}; complete -C {shlex.quote(line)}").splitlines()
    assert sorted(word.split("\t")[0] for word in lines) == sorted(offered)
