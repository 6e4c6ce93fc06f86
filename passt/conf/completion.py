"""Completions for bash, zsh and fish, generated from a table of options.

Each is a script for the shell, printed by --completion and installed with the package. The candidates for an argument
depend on the argument's name in the table:

    PATH, FILE      files                         NAME       interfaces of the host
    PATH|NAME       namespaces, files             SPEC       none, auto, all
    UID|UID:GID     users                         SHELL      the shells
    any other       `none` where the help mentions it, else nothing

Options end at the first operand. For pasta that is a command, which is completed by its own rules; for pesto, a file.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..lean.records import dataclass
from ..log import Fatal
from . import getopt
from .getopt import Option

SHELLS = ("bash", "zsh", "fish")
_NOTE = "made from the table of options by --completion"
_NETNS = "$(command ls /run/netns 2>/dev/null)"
_INTERFACES = "$(command ls /sys/class/net 2>/dev/null)"


@dataclass(frozen=True, slots=True)
class Program:
    """A program to complete: names, options, kind of operands ("command", "file", ""), candidates for SPEC."""

    names: tuple[str, ...]
    options: Sequence[Option]
    operands: str = ""
    spec: tuple[str, ...] = ("none", "all")

    def candidates(self, option: Option) -> tuple[str, ...]:
        """Fixed values that the argument can have."""
        if option.arg == "SPEC":
            return self.spec
        if option.arg == "SHELL":
            return SHELLS
        return ("none",) if "'none'" in option.help else ()

    def with_arg(self) -> list[Option]:
        """Options with an argument that may be the next word. An optional argument is never the next word."""
        return [option for option in self.options if option.arg and not option.arg.startswith("[")]


def script(shell: str, program: Program) -> str:
    """The completions of `program` for a shell. Raises Fatal."""
    if shell not in SHELLS:
        near = getopt.suggestion(shell, SHELLS)
        raise Fatal(f"Invalid --completion: {shell} (give {', '.join(SHELLS[:-1])} or {SHELLS[-1]}){near}")
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](program)


def _forms(option: Option) -> list[str]:
    return [*([f"-{option.short}"] if option.short else []), f"--{option.name}"]


# bash --------------------------------------------------------------------------------------------------------------

_BASH = """\
# bash completion of {name}(1), {note}
_{name}() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} option= i word
    COMPREPLY=()
    # --name=value is three words; the words before the one at the cursor tell whether options have ended
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        if [[ $option && $word == = ]]; then
            continue
        elif [[ $option ]]; then
            option=
            continue
        fi
        case $word in
        {with_arg}) option=$word ;;
        --) ((i++)); break ;;
        -?*) ;;
        *) break ;;
        esac
    done
    if [[ $option ]]; then
        [[ $cur == = ]] && cur=
        case $option in
{arguments}
        esac
    elif ((i == COMP_CWORD)) && [[ $cur == -* && ${{COMP_WORDS[COMP_CWORD - 1]}} != -- ]]; then
        mapfile -t COMPREPLY < <(compgen -W "{options}" -- "$cur")
    else
        {operands}
    fi
}}
complete -F _{name} {names}
"""
_BASH_COMMAND = """\
if ((i < COMP_CWORD)) && declare -F _command_offset >/dev/null; then
            _command_offset "$i"
        elif ((i < COMP_CWORD)); then
            compopt -o filenames
            mapfile -t COMPREPLY < <(compgen -f -- "$cur")
        else
            mapfile -t COMPREPLY < <(compgen -c -- "$cur")
        fi"""
_BASH_FILE = """\
compopt -o filenames
        mapfile -t COMPREPLY < <(compgen -f -- "$cur")"""
_BASH_OPERANDS = {"command": _BASH_COMMAND, "file": _BASH_FILE, "": ":"}


_BASH_ACTIONS = {
    "PATH": "-f",
    "FILE": "-f",
    "PATH|NAME": f'-f -W "{_NETNS}"',
    "NAME": f'-W "{_INTERFACES}"',
}


def _bash(program: Program) -> str:
    cases: dict[str, list[str]] = {}  # arguments of compgen -> options
    for option in program.with_arg():
        cases.setdefault(_bash_actions(program, option), []).extend(_forms(option))
    cases.pop("", None)
    lines = []
    for actions, forms in cases.items():
        lines.append(f"        {'|'.join(forms)})")
        if actions.startswith("-f"):
            lines.append("            compopt -o filenames")
        lines.append(f'            mapfile -t COMPREPLY < <(compgen {actions} -- "$cur") ;;')
    return _BASH.format(
        name=program.names[0],
        names=" ".join(program.names),
        note=_NOTE,
        with_arg="|".join(form for option in program.with_arg() for form in _forms(option)),
        arguments="\n".join(lines),
        options=" ".join(form for option in program.options for form in _forms(option)),
        operands=_BASH_OPERANDS[program.operands],
    )


def _bash_actions(program: Program, option: Option) -> str:
    if option.arg.startswith("UID"):
        return "-u"
    values = program.candidates(option)
    return _BASH_ACTIONS.get(option.arg) or (f'-W "{" ".join(values)}"' if values else "")


# zsh ---------------------------------------------------------------------------------------------------------------

_ZSH_ACTIONS = {
    "PATH": "_files",
    "FILE": "_files",
    "PATH|NAME": "_netns",
    "NAME": "_net_interfaces",
}


_ZSH_OPERANDS = {"command": "*:::command:_normal", "file": "*:file:_files", "": "*: :"}


def _zsh(program: Program) -> str:
    lines = [f"#compdef {' '.join(program.names)}", f"# zsh completion of {program.names[0]}(1), {_NOTE}", ""]
    if any(option.arg == "PATH|NAME" for option in program.options):
        lines += ["_netns() {", f"    _alternative 'files:file:_files' 'names:name:({_NETNS})'", "}", ""]
    lines.append("_arguments -s -S -A '-*' \\")
    for option in program.options:
        text = _zsh_quoted(option.help.split("\n")[0])
        short, long, colons = ("+", "=", ":") if option in program.with_arg() else ("-", "=-", "::")
        if not option.arg:
            short = long = ""
        arg = f"{colons}{_zsh_quoted(option.arg)}:{_zsh_action(program, option)}" if option.arg else ""
        if option.short:
            lines.append(f"    '*-{option.short}{short}[{text}]{arg}' \\")
        lines.append(f"    '*--{option.name}{long}[{text}]{arg}' \\")
    lines.append(f"    '{_ZSH_OPERANDS[program.operands]}'")
    return "\n".join(lines) + "\n"


def _zsh_action(program: Program, option: Option) -> str:
    if option.arg.startswith("UID"):
        return "_users"
    values = program.candidates(option)
    return _ZSH_ACTIONS.get(option.arg) or (f"({' '.join(values)})" if values else " ")


def _zsh_quoted(text: str) -> str:
    for character in "\\[]:":
        text = text.replace(character, f"\\{character}")
    return text.replace("'", "'\\''")


# fish --------------------------------------------------------------------------------------------------------------


def _fish(program: Program) -> str:
    lines = [f"# fish completion of {program.names[0]}(1), {_NOTE}"]
    if program.operands != "file":
        lines.append(f"complete -c {program.names[0]} -f")
    if program.operands == "command":
        lines.append(f"complete -c {program.names[0]} -a '(__fish_complete_subcommand)'")
    for option in program.options:
        short = f" -s {option.short}" if option.short else ""
        text = option.help.split("\n")[0].replace("\\", "\\\\").replace("'", "\\'")
        lines.append(f"complete -c {program.names[0]}{short} -l {option.name}{_fish_arg(program, option)} -d '{text}'")
    lines += [f"complete -c {name} -w {program.names[0]}" for name in program.names[1:]]
    return "\n".join(lines) + "\n"


def _fish_arg(program: Program, option: Option) -> str:
    if option.arg in ("PATH", "FILE"):
        return " -r -F"
    if option.arg == "PATH|NAME":
        return " -r -F -a '(command ls /run/netns 2>/dev/null)'"
    if option.arg == "NAME":
        return " -x -a '(command ls /sys/class/net 2>/dev/null)'"
    if option.arg.startswith("UID"):
        return " -x -a '(__fish_complete_users)'"
    values = program.candidates(option)
    if values:
        return f" -x -a '{' '.join(values)}'"
    return " -x" if option in program.with_arg() else ""
