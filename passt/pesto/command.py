"""`pesto`: queries a running pasta or passt over its control socket, and changes the ports that it forwards.

All changes of a call are one request, in the order of the options. It is carried out as a whole or not at all:

    -t, -u, -T, -U SPEC    after --add         the ports are added
                           after --delete      the ports are deleted
                           after neither       all ports given with this letter replace the existing ones
    --clear [SIDE]                             the ports of -t and -u (HOST), of -T and -U (SPLICE), or all are deleted

The start must be quick, since clients call it for each container: modules are imported only when needed, and the
server, not the client, parses port specifications.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..conf.getopt import Getopt, suggestion
from ..linux import stdio
from ..log import Fatal
from .connection import Connection, Json

if TYPE_CHECKING:
    from ..conf.completion import Program

PROGRAM = "pesto"
SIDES = ("HOST", "SPLICE", "ALL")
ADD, DELETE, REPLACE = "add", "delete", "replace"


class Request:
    """The parsed command line."""

    def __init__(self) -> None:
        self.mode = REPLACE
        self.changes: list[Json] = []
        self.queries: list[str] = []
        self.top = False
        self.json = False
        self.debug = False
        self.text: str | None = None  # only print this


Action = Callable[[Request, str], None]


class Option(NamedTuple):
    """A row of the table, for `Getopt`, --help and completions; lines of `help` are separated by newlines."""

    name: str
    short: str
    arg: str
    group: str
    action: Action
    help: str

    @property
    def meaning(self) -> Action:
        """Equal for two names of one option."""
        return self.action


def _mode(mode: str) -> Action:
    def action(asked: Request, _: str) -> None:
        asked.mode = mode

    return action


def _ports(letter: str) -> Action:
    return lambda asked, text: asked.changes.append({asked.mode: f"-{letter} {text}"})


def _clear(asked: Request, side: str) -> None:
    if side.upper() not in SIDES:
        near = suggestion(side.upper(), SIDES)
        raise Fatal(f"{PROGRAM}: there are no rules of {side} (give {', '.join(SIDES)}, or nothing){near}")
    asked.changes.append({"clear": side.lower()})


def _query(name: str) -> Action:
    return lambda asked, _: asked.queries.append(name)


def _flag(name: str) -> Action:
    return lambda asked, _: setattr(asked, name, True)


def _help(asked: Request, _: str) -> None:
    asked.text = asked.text or usage()


def _version(asked: Request, _: str) -> None:
    from .. import __version__
    from ..conf import build

    asked.text = asked.text or f"{PROGRAM} {__version__}\n{build.description()}\n"


CHANGES, ASKING, GENERAL = "Changes", "Queries", "General"
GROUPS = (CHANGES, ASKING, GENERAL)
TABLE = (
    Option("add", "A", "", CHANGES, _mode(ADD), "Add the ports that follow"),
    Option("delete", "D", "", CHANGES, _mode(DELETE), "Delete the ports that follow"),
    Option("tcp-ports", "t", "SPEC", CHANGES, _ports("t"),
           "TCP ports of the host\n"
           "SPEC as for passt(1), such as 8080:80\n"
           "without --add or --delete: replace those there are"),
    Option("udp-ports", "u", "SPEC", CHANGES, _ports("u"), "UDP ports of the host"),
    Option("tcp-ns", "T", "SPEC", CHANGES, _ports("T"), "TCP ports of localhost in the namespace"),
    Option("udp-ns", "U", "SPEC", CHANGES, _ports("U"), "UDP ports of localhost in the namespace"),
    Option("clear", "C", "[SIDE]", CHANGES, _clear,
           "Delete all ports of SIDE\n"
           "HOST (-t, -u), SPLICE (-T, -U), or ALL, the default"),
    Option("show", "s", "", ASKING, _query("show"),
           "Show the ports; with changes, before and after them\n"
           "default, if nothing else is asked for"),
    Option("flows", "", "", ASKING, _query("flows"), "List connections and other flows"),
    Option("top", "", "", ASKING, _flag("top"), "Watch the flows, every second; q quits"),
    Option("stats", "", "", ASKING, _query("stats"), "Show counters"),
    Option("metrics", "", "", ASKING, _query("metrics"), "Show counters in the text format of Prometheus"),
    Option("info", "", "", ASKING, _query("info"), "Show version, mode, MTU and addresses"),
    Option("json", "", "", ASKING, _flag("json"), "Print answers as JSON objects, one a line"),
    Option("help", "h", "", GENERAL, _help, "Show this help and exit"),
    Option("version", "", "", GENERAL, _version, "Show the version and exit"),
    Option("debug", "d", "", GENERAL, _flag("debug"), "Print requests and answers on standard error"),
)  # fmt: skip
_HEAD = """\
Usage: pesto [OPTION]... SOCKET

Show and change which ports a running pasta or passt forwards. SOCKET is the
path it was started with, as in pasta -c SOCKET. Either all changes of a call
are made, or none.

Example: pesto --add -t 8080:80 /run/user/1000/pasta.sock"""


def completed() -> Program:
    """The program that shells complete."""
    from ..conf.completion import Program

    return Program((PROGRAM,), TABLE, operands="file", spec=("none", "auto", "all"))


def usage() -> str:
    """The text of --help."""
    from ..conf import help as conf_help

    return conf_help.text(_HEAD, TABLE, GROUPS)


# The command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[Request, list[str]]:
    """The request, and the operands, which may stand anywhere. Raises Fatal."""
    asked, operands = Request(), list[str]()
    left = list(_with_sides(argv))
    while left:
        parsed: Getopt[Option] = Getopt(PROGRAM, TABLE, left)
        for option, argument in parsed:
            option.action(asked, argument)
        ended = len(left) > len(parsed.operands) and left[-len(parsed.operands) - 1] == "--"
        operands += parsed.operands if ended else parsed.operands[:1]
        left = [] if ended else parsed.operands[1:]
    return asked, operands


def _with_sides(argv: Sequence[str]) -> Iterator[str]:
    """The arguments, with --clear and its optional argument joined."""
    rest = iter(argv)
    for word in rest:
        if word == "-C" or (len(word) > 2 and "--clear".startswith(word)):
            following = next(rest, None)
            if following is None or following.upper() in SIDES:
                yield f"--clear={following or 'ALL'}"
            else:
                yield "--clear=ALL"
                yield following
        else:
            yield word
            if word == "--":
                yield from rest


def main(argv: Sequence[str] | None = None) -> int:
    """Run, return the exit status. `argv` is sys.argv by default."""
    arguments = (sys.argv if argv is None else argv)[1:]
    try:
        stdio.fill()
        asked, operands = parse(arguments)
        if asked.text is not None:
            stdio.write_out(asked.text)
            return 0
        if len(operands) != 1:
            what = "too many operands:" if operands else "which control socket?"
            raise Fatal(f"{PROGRAM}: {what} Give the path that pasta or passt was started with: {PROGRAM} ... SOCKET")
        with stdio.text_out(), Connection(operands[0], debug=asked.debug) as connection:
            run(asked, connection)
    except Fatal as e:
        for line in e.args:
            stdio.write_error(line)
        return 1
    except stdio.ReaderGone:
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def run(asked: Request, connection: Connection) -> None:
    """Carry out the request. Raises Fatal."""
    if asked.top:
        from . import top

        top.run(connection)
        return
    queries = asked.queries
    if asked.changes:
        if "show" in queries:
            _print(asked, "show", connection.ask({"command": "show"}))
        answer = connection.ask({"command": "change", "changes": asked.changes})
        if asked.json:
            print(json.dumps(answer))
        for rule in answer["present"]:
            stdio.write_error(f"'{rule['rule']}' is there already")
    elif not queries:
        queries = ["show"]
    for query in queries:
        _print(asked, query, connection.ask({"command": query}))


# Output ------------------------------------------------------------------------------------------------------------


def _print(asked: Request, query: str, answer: Json) -> None:
    if asked.json:
        print(json.dumps(answer))
    elif query == "metrics":
        print(answer["metrics"], end="")
    elif query == "show":
        _print_lines(rule_lines(answer["rules"]))
        if answer.get("network"):
            _print_lines(network_lines(answer["network"]))
    elif query == "info":
        _print_lines(info_lines(answer["info"]))
    else:
        from . import text as pesto_text

        width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
        lines = pesto_text.flow_lines(answer["flows"], width) if query == "flows" else pesto_text.stat_lines(answer)
        _print_lines(lines)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def rule_lines(rules: Sequence[Json]) -> Iterator[str]:
    """A line for each rule: its number, the option that stands for it, and its open ports."""
    width = max([24, *(len(rule["rule"]) for rule in rules)])
    yield f"{'#':>4}  {'RULE':<{width}}  LISTENING"
    for rule in rules:
        yield f"{rule['number']:>4}  {rule['rule']:<{width}}  {_listening(rule)}".rstrip()


def _listening(rule: Json) -> str:
    spans = rule["listening"]
    count = sum(last - first + 1 for first, last in spans)
    if count == rule["last"] - rule["first"] + 1:
        return "yes"
    if not rule["auto"]:
        return f"{count} of {rule['last'] - rule['first'] + 1} ports"
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in spans[:8]]
    more = ["..."] if len(spans) > 8 else []
    return ", ".join(shown + more) or "nothing now"


def network_lines(network: Json) -> Iterator[str]:
    """From where the guest's view of the network is, and how often it has changed since the start."""
    yield f"network: --follow {network['follow']}, {network['changes']} changes"
    for family in network["view"].split("; "):
        yield f"    {family}"


def info_lines(info: Json, indent: str = "") -> Iterator[str]:
    """Names and values, aligned."""
    for name, value in info.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from info_lines(value, indent + "    ")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else value
            yield f"{indent}{name + ':':<12} {'-' if text is None else text}"
