"""The table of options of a mode, for the parser, --help and completions.

It has the rows of `options.py` and, from here, the rows that set no field. An option of the other mode is in the table
as well, as an error that names the alternative. The original accepts the long names of some of these; here they cause a
warning.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from ..log import Fatal
from ..policy.config import PASST, PASTA
from . import actions
from .actions import Done, Fields, Row
from .options import Options
from .row import BASIC, GROUPS, MACHINE, RARE, Only, Option, option

if TYPE_CHECKING:
    from .completion import Program

GUEST = {PASTA: "namespace", PASST: "guest"}
_TERMS = {
    PASTA: {"guest": "namespace", "link": "a tap device", "ports": "'auto'",
            "auto": "'auto' (ports with a listener in the namespace) "},
    PASST: {"guest": "guest", "link": "a socket", "ports": "'none'", "auto": ""},
}  # fmt: skip

_HEADS = {
    PASTA: """\
Usage: pasta [OPTION]... [COMMAND [ARG]...]
       pasta [OPTION]... PID
       pasta [OPTION]... --netns PATH|NAME

Connect a network namespace to the network of the host, without privileges: the
namespace of process PID, the one of --netns, or a new one with COMMAND or a
login shell in it.

Example: pasta --config-net -t 8080:80 -- python3 -m http.server 80

An option for addresses counts once for IPv4 and once for IPv6. Of options that
contradict each other, the last one counts. See passt(1) for details.""",
    PASST: """\
Usage: passt [OPTION]...

Connect a virtual machine to the network of the host, without privileges. passt
listens on a UNIX domain socket, to which QEMU connects by -netdev stream, or
with --vhost-user by -netdev vhost-user.

Example: passt -t 2222:22

An option for addresses counts once for IPv4 and once for IPv6. Of options that
contradict each other, the last one counts. See passt(1) for details.""",
}


def _help(fields: Fields, _: str, __: Row) -> None:
    raise Done(usage(fields["mode"]))


def _version(fields: Fields, _: str, __: Row) -> None:
    from .. import __version__
    from . import build

    raise Done(f"{fields['mode']} {__version__}\n{build.description()}\n")


def _capabilities(_: Fields, __: str, ___: Row) -> None:
    raise Done('{\n  "type": "net"\n}\n')


def _completion(fields: Fields, text: str, _: Row) -> None:
    from . import completion

    raise Done(completion.script(text, completed(fields["mode"])))


TABLE = (
    *Options.ROWS,
    option("-h, --help", BASIC, "Show this help and exit", _help),
    option("--version", BASIC, "Show the version and exit", _version),
    option(
        "--print-capabilities",
        MACHINE,
        "Print what the back end of --vhost-user can do, as JSON, and exit",
        _capabilities,
        only=Only(PASST),
    ),
    option("--completion SHELL", RARE, "Print completions for bash, zsh or fish, and exit", _completion),
    option("-e, --stderr", RARE, "No effect; accepted for compatibility", actions.nothing),
)


@cache
def table(mode: str) -> tuple[Option, ...]:
    """The options that the parser knows in a mode, PASTA or PASST."""
    here = [row if row.is_in(mode) else _elsewhere(row) for row in TABLE]
    short = [_letter_elsewhere(row) for row in TABLE if row.short and not row.is_in(mode)]
    return (*here, *short)


def _elsewhere(row: Option) -> Option:
    """The row in the mode that does not have the option."""
    if row.only.inert:
        return row._replace(short="", help="", action=actions.nothing)

    def action(_: Fields, __: str, ___: Row) -> None:
        raise Fatal(f"--{row.name} {_where(row)}")

    return row._replace(short="", help="", action=action)


def _letter_elsewhere(row: Option) -> Option:
    """The row of its short option in the other mode: an error, with or without an argument."""

    def action(fields: Fields, _: str, __: Row) -> None:
        raise Fatal(f"{fields['mode']}: invalid option -- '{row.short}': -{row.short} (--{row.name}) {_where(row)}")

    return row._replace(name="", arg="", help="", action=action)


def _where(row: Option) -> str:
    return f"is for {row.only.mode} mode only" + (f": {row.only.instead}" if row.only.instead else "")


def without_effect(row: Option) -> str:
    """The warning about an option of the other mode that is accepted for compatibility."""
    return f"--{row.name} is for {row.only.mode} mode only, it has no effect: {row.only.instead}"


def named(field: str) -> str:
    """The option that sets a field, as messages name it."""
    return next(f"--{row.name}" for row in TABLE if row.field == field)


def listed(mode: str) -> list[Option]:
    """The options that a mode has, in the order of --help, with their texts for that mode."""
    rows = sorted((row for row in TABLE if row.help and row.is_in(mode)), key=lambda row: GROUPS.index(row.group))
    return [row._replace(help=row.help.format(**_TERMS[mode])) for row in rows]


def completed(mode: str) -> Program:
    """The program that shells complete."""
    from .completion import Program

    if mode == PASTA:
        return Program(("pasta", "passt4netns"), listed(mode), operands="command", spec=("none", "auto", "all"))
    return Program(("passt",), listed(mode))


def usage(mode: str) -> str:
    """The text of --help."""
    from . import help as conf_help

    return conf_help.text(_HEADS[mode], listed(mode), GROUPS)
