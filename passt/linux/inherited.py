"""Inherited from the caller: the program's name, its environment, ignored and blocked signals.

A command that the program starts gets these as a shell would pass them on. The program itself gets:

    state                      reason
    -------------------------  --------------------------------------------------------------------------------------
    no signal blocked          a blocked SIGTERM would keep it from ending, a blocked SIGCHLD its wait for children
    SIGCHLD not ignored        wait4(2) finds no child otherwise. Nor is it ignored for the command, as in dash(1)
    SIGTERM not ignored        it ends a daemon in any case; the command gets it as it was
    others ignored as before   nohup(1), and the jobs of a shell without job control

The interpreter changes some of it before any of our code runs. It ignores SIGPIPE and SIGXFSZ: their former state is
known if the launcher (`commands/pasta`) noted it, else the default is taken. In the C locale it sets LC_CTYPE
(PEP 538): /proc/self/environ has the original.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterable, Mapping

from ..lean.records import dataclass, field

ENVIRON = "/proc/self/environ"
KEPT = "PASST_ENVIRON"  # variables noted by the launcher
SET_BY_SHELLS = "PWD", "OLDPWD", "SHLVL", "_", KEPT
LC_CTYPE = "LC_CTYPE"
WORDS = "pasta", "passt", "pesto", "qrap", "slirp4netns"  # one of them is in the name of a program
OF_PYTHON = frozenset((signal.SIGPIPE, signal.SIGXFSZ))  # ignored by the interpreter itself


@dataclass(frozen=True, slots=True)
class Inherited:
    """The state that a command gets from the caller of the program."""

    env: Mapping[str, str] = field(default_factory=dict)
    ignored: tuple[int, ...] = ()
    blocked: tuple[int, ...] = ()

    def restore(self) -> None:
        """Restore the signals in this process, for execve(2)."""
        for number in {*OF_PYTHON, *self.ignored}:
            signal.signal(number, signal.SIG_IGN if number in self.ignored else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, self.blocked)


def take() -> Inherited:
    """Note the state, and change that of the process as in the table above."""
    mask = _noted_signals()
    ignored = [n for n in signal.valid_signals() - OF_PYTHON if signal.getsignal(n) == signal.SIG_IGN]
    ignored += [n for n in OF_PYTHON if mask >> (n - 1) & 1]
    for number in (signal.SIGCHLD, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    blocked = signal.pthread_sigmask(signal.SIG_SETMASK, ())
    kept = (set(map(int, numbers)) - {signal.SIGCHLD} for numbers in (ignored, blocked))
    return Inherited(environment(), *(tuple(sorted(numbers)) for numbers in kept))


def _noted_signals() -> int:
    """The mask of ignored signals that the launcher noted."""
    noted = sys._xoptions.get("passt")
    return int(noted) if isinstance(noted, str) and noted.isdecimal() else 0


def environment(path: str = ENVIRON) -> dict[str, str]:
    """The environment as the caller gave it."""
    env = dict(os.environ)
    if LC_CTYPE in env:
        env.pop(LC_CTYPE)
        env.update((name, value) for name, value in _initial(path) if name == LC_CTYPE)
    if "passt" in sys._xoptions and KEPT in env:
        noted = _unescaped(env[KEPT])
        for name in SET_BY_SHELLS:
            env.pop(name, None)
        env.update(_variables(noted.split(b"\0$")))
    return env


def _initial(path: str) -> list[tuple[str, str]]:
    """The environment at execve(2); what Python has of it if that cannot be read."""
    try:
        with open(path, "rb") as f:
            return _variables(f.read().split(b"\0"))
    except OSError:
        return list(os.environ.items())


def _variables(entries: Iterable[bytes]) -> list[tuple[str, str]]:
    parts = (entry.partition(b"=") for entry in entries)
    return [(os.fsdecode(name), os.fsdecode(value)) for name, equals, value in parts if equals]


def _unescaped(text: str) -> bytes:
    r"""The bytes that sed's command `l` printed: \n, \\, \ooo."""
    return text.encode("latin-1", "replace").decode("unicode_escape").encode("latin-1", "replace")


def program_name(path: str) -> str:
    """The name of the program that was executed as `path`.

    It is the last part of the path; or, if that is none of the names, as with a descriptor (/dev/fd/5, execveat(2)) or
    a link, that of the file which the path leads to.
    """
    for known in (path, os.path.realpath(path)) if path else ():
        name = os.path.basename(known)
        if any(word in name for word in WORDS):
            return name
    return WORDS[0]
