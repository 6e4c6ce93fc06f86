"""The shape of the package: imports go down, no circles, modules and functions that one sitting can read, each constant
once, a test file for each module.

Every import counts: one inside a function, since it must work after the file system is gone; and one under
`if TYPE_CHECKING:`, since a reader of a module looks up the names in it.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from passt import NEVER

from .sources import parse

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "passt"
LINES_MAX = 450
FUNCTION_MAX = 50  # lines of a function; most have fewer than ten
TOP_MAX = 24  # files at the top level of the package
FOLDER_MAX = 26  # modules of a folder
FLOORS_MAX = 14  # folders and modules of the top level, each of which imports the one below it

# Folders and modules of the top level, from the lowest: each imports from those before it, and from itself
ORDER = (
    *("__init__", "lean", "addr", "calls", "drops", "wire", "log", "linux", "log_file"),  # ground
    *("loop", "policy", "link", "flow"),  # what all protocols share
    *("arp", "ndp", "dhcp", "dhcpv6", "icmp"),
    *("tcp_engine", "tcp", "udp_engine", "udp", "igmp"),
    *("splice", "tap", "ports"),  # ways in
    *("conf", "control"),  # what users say, before and while it runs
    "migration",  # the way to another host
    *("sandbox", "seccomp", "namespace", "pasta", "passt"),
    *("daemon", "cli", "__main__", "vm"),
    *("pesto", "qrap", "repair", "launch"),  # programs of their own, and the start of all
)
PLACE = {name: place for place, name in enumerate(ORDER)}

# Modules that have no test file of their own: where they are tested instead, and why
TESTED_ELSEWHERE = {
    # a few lines that call `main` of a command
    "__main__": "tests/unit/test_cli.py",
    "vm": "tests/unit/test_cli.py",
    "pesto/__main__": "tests/system/traffic/test_control.py",
    # a list with a number
    "tcp_engine/pieces": "tests/unit/tcp_engine/test_out_of_order.py",
    # fields, nothing that is done
    "flow/context": "tests/unit/daemon/test_wiring.py",
    "policy/config": "tests/unit/conf/test_decide.py",
    "policy/guest": "tests/unit/test_tap.py",
    # what they say is tried with the kernel, or with shells
    "seccomp": "tests/security/test_seccomp.py",
    "daemon/seccomp_table": "tests/security/test_seccomp.py",
    "conf/completion": "tests/test_completions.py",
    # the steps of a start: all of them, in processes of their own
    "daemon/passt": "tests/system/vm/test_socket.py",
    # a command line goes through all of these
    "conf/actions": "tests/unit/conf/test_argv.py",
    "conf/getopt": "tests/unit/conf/test_argv.py",
    "conf/options": "tests/unit/conf/test_argv.py",
    "conf/table": "tests/unit/conf/test_argv.py",
    "conf/values": "tests/unit/conf/test_argv.py",
}

# Functions with more lines: those for each packet, which are loops with everything that they do in them, since a call
# costs more than most of their steps; and a start, whose steps are told in their order
LONG = {
    "passt.tap: _frame": 85,
    "passt.tcp: tap_handler": 110,
    "passt.tcp_engine.output: send_data": 72,
    "passt.daemon.pasta: run": 55,
    "passt.daemon.pasta: build": 55,
}

# Constants of the same name and value that mean different things
ALIKE = {
    "ALL": "words of three options",
    "DESCRIPTOR_SHARE": "each table has its own share",
    "FRONT": "room in two buffers",
    "HOLD": "times of two things",
    "HOST": "where a flow began, and the side of a rule",
    "INFINITE": "of DHCPv6 and of NDP",
    "OPTIONS_MAX": "of DHCPv6 and of NDP",
    "TYPE_CHECKING": "the module typing takes longer to load than all that these modules are to save",
    "SETTLE": "of a file, and of the host's network",
    "SHARE": "each has its own share",
    "SIZE_MAX": "of buffers and files",
    "STEP": "of two random times",
    "VERSION": "of two formats",
    "WAIT": "of two things",
}


def module_name(path: Path) -> str:
    """passt/flow/table.py -> passt.flow.table; passt/flow/__init__.py -> passt.flow"""
    parts = ("passt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: parse(path.read_text()) for name, path in FILES.items()}


def _room(name: str) -> str:
    """The folder or module of the top level that a module is in."""
    return name.split(".")[1] if "." in name else "__init__"


def place(name: str) -> int:
    """How high a module stands; LookupError if it has no place yet."""
    if _room(name) not in PLACE:
        raise LookupError(f"{name} has no place: give it one in ORDER")
    return PLACE[_room(name)]


def _import_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth."""
    return (node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom)))


def imports(name: str, tree: ast.AST, is_package: bool) -> set[str]:
    """The modules of the package that module `name` imports."""
    found = set()
    for node in _import_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = node.module or ""
        if node.level:
            parts = name.split(".")
            parts = parts[: len(parts) - node.level + is_package]
            base = ".".join([*parts, *([node.module] if node.module else [])])
        # `from .wire import dhcp` means the module passt.wire.dhcp, `from .addr import text` the module passt.addr
        found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base for alias in node.names}
    return {module for module in found if module == "passt" or module.startswith("passt.")} - {name}


@cache
def all_imports() -> dict[str, set[str]]:
    """Of each module."""
    return {name: imports(name, tree, FILES[name].name == "__init__.py") for name, tree in TREES.items()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other, each the one before it; empty if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        found: list[str] = e.args[1]
        return found
    return []


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    up = {module for module in all_imports()[name] if place(module) > place(name)}
    assert not up, f"{name} imports {', '.join(sorted(up))}, which is above it"
    unknown = all_imports()[name] - FILES.keys()
    assert not unknown, f"{name} imports {unknown}, which is not there"


def test_no_circles() -> None:
    found = circle(all_imports())
    assert not found, "import circle: " + " -> ".join(found)


def test_every_place_is_taken() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert here == PLACE.keys() and len(PLACE) == len(ORDER)


# The map, in the docstring of the package -------------------------------------------------------------------------


MAP = ast.get_docstring(TREES["passt"]) or ""


def rows_of_map() -> list[set[str]]:
    """The folders and modules of each row of the list, from the top."""
    text = MAP[MAP.index("Where a change goes") : MAP.index("    to add ")]
    heads = re.findall(r"^    (\S+(?:,? \S+)*)  +\S", text, re.M)
    return [set(re.findall(r"\w+", head)) for head in heads]


def test_the_map_has_every_folder_and_module() -> None:
    found = [name for row in rows_of_map() for name in row]
    assert len(found) == len(set(found)) and {*found, "__init__"} == PLACE.keys()


def test_each_row_of_the_map_is_above_its_imports() -> None:
    row = {name: number for number, names in enumerate(rows_of_map()) for name in names} | {"__init__": NEVER}
    rooms = {(_room(name), _room(other)) for name in FILES for other in all_imports()[name]}
    assert {(room, other) for room, other in rooms if row[other] < row[room]} == set()


def test_modules_that_the_map_names_are_there() -> None:
    folders = "|".join(
        path.parent.name for path in FILES.values() if path.name == "__init__.py" and path.parent != PACKAGE
    )
    named = re.findall(rf"(?<![\w.])((?:{folders})\.[a-z]\w+)(?:\.([A-Z]\w+))?", MAP)
    assert len(named) > 40
    for module, member in named:
        classes = {node.name for node in TREES[f"passt.{module}"].body if isinstance(node, ast.ClassDef)}
        assert not member or member in classes, f"{module}.{member}"


def test_the_top_level_is_short() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_MAX


def test_folders_are_short() -> None:
    folders = [path for path in PACKAGE.rglob("*") if (path / "__init__.py").exists()]
    modules = {path.name: len(list(path.glob("*.py"))) - 1 for path in folders}
    assert {name: n for name, n in modules.items() if n > FOLDER_MAX} == {}


def floors(graph: dict[str, set[str]]) -> int:
    """The length of the longest chain of imports."""

    @cache
    def floor(name: str) -> int:
        return 1 + max(map(floor, graph[name]), default=0)

    return max(map(floor, graph))


def test_there_are_few_floors() -> None:
    rooms: dict[str, set[str]] = {name: set() for name in ORDER if name != "__init__"}
    for name, imported in all_imports().items():
        room = _room(name)
        if room in rooms:
            rooms[room] |= {_room(other) for other in imported} & rooms.keys() - {room}
    assert floors(rooms) <= FLOORS_MAX


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].name == "__init__.py" and name != "passt"])
def test_folders_import_nothing(name: str) -> None:
    """So that a module costs what it imports itself."""
    assert [type(node) for node in TREES[name].body] == [ast.Expr]


@pytest.mark.parametrize("name", FILES)
def test_one_sitting(name: str) -> None:
    lines = FILES[name].read_text().count("\n")
    assert lines <= LINES_MAX, f"{name} has {lines} lines"


def _lengths(name: str, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The functions of a module, and their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{name}: {node.name}", node.end_lineno - node.lineno + 1


def test_functions_are_short() -> None:
    """`LONG` has those that are not, and how long they may get."""
    long = {f: lines for name, tree in TREES.items() for f, lines in _lengths(name, tree) if lines > FUNCTION_MAX}
    assert long.keys() == LONG.keys()
    assert {f: lines for f, lines in long.items() if lines > LONG[f]} == {}


def _tool(value: ast.expr) -> bool:
    """A value that is no fact: a parser or the like, of which any module has its own."""
    return isinstance(value, ast.Call) and ast.unparse(value.func) in ("Struct", "itemgetter", "np.dtype", "TypeVar")


def constants(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Name, without underscores in front, and value of each constant that a module defines."""
    for node in tree.body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target, value = node.target, node.value
        else:
            continue
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        for name, fact in pairs:
            if isinstance(name, ast.Name) and re.fullmatch(r"[A-Z_\d]+", name.id) and not _tool(fact):
                yield name.id.lstrip("_"), ast.unparse(fact)


def test_constants_stand_once() -> None:
    """Where two modules need one, it is in the lower one, or in a module below both. CALLS are about their module."""
    places = defaultdict[tuple[str, str], list[str]](list)
    for module, tree in TREES.items():
        for name, value in constants(tree):
            if name != "CALLS":
                places[name, value].append(module)
    twice = {name: modules for (name, _), modules in places.items() if len(modules) > 1}
    assert {name: modules for name, modules in twice.items() if name not in ALIKE} == {}
    assert ALIKE.keys() <= twice.keys(), "these do not stand twice any more"


@pytest.mark.parametrize("name", FILES)
def test_has_docstring(name: str) -> None:
    assert ast.get_docstring(TREES[name]), f"{name} does not say what it is about"


def test_wire_is_pure() -> None:
    """Formats know no sockets, no clock, no log, nothing of the system."""
    banned = {"socket", "time", "os", "select", "random", "ctypes", "subprocess"}
    for name, tree in TREES.items():
        if name.startswith("passt.wire"):
            found = {alias.name for node in _import_nodes(tree) if isinstance(node, ast.Import) for alias in node.names}
            assert not found & banned, f"{name} imports {found & banned}"


# A test file for each module ---------------------------------------------------------------------------------------


def _own_test(path: Path) -> Path:
    """passt/flow/table.py -> tests/unit/flow/test_table.py"""
    inside = path.relative_to(PACKAGE)
    return ROOT / "tests/unit" / inside.parent / f"test_{inside.name}"


@pytest.mark.parametrize("path", [p for p in FILES.values() if p.name != "__init__.py"], ids=module_name)
def test_modules_have_tests(path: Path) -> None:
    name = path.relative_to(PACKAGE).with_suffix("").as_posix()
    elsewhere = TESTED_ELSEWHERE.get(name)
    if elsewhere is None:
        assert _own_test(path).exists(), f"{name} has no {_own_test(path).relative_to(ROOT)}"
    else:
        assert (ROOT / elsewhere).exists() and not _own_test(path).exists()


def test_exceptions_are_modules() -> None:
    assert all((PACKAGE / f"{name}.py").exists() for name in TESTED_ELSEWHERE)


def test_folders_of_tests_are_those_of_modules() -> None:
    folders = {path.parent.relative_to(ROOT / "tests/unit") for path in (ROOT / "tests/unit").rglob("test_*.py")}
    assert all((PACKAGE / folder).is_dir() for folder in folders)


# The checker itself ------------------------------------------------------------------------------------------------


def _imports_of(source: str, name: str = "passt.flow.table", is_package: bool = False) -> set[str]:
    return imports(name, ast.parse(source), is_package)


def test_checker_resolves_relative_imports() -> None:
    assert _imports_of("from .. import addr, log") == {"passt.addr", "passt.log"}
    assert _imports_of("from ..wire.cursor import Malformed") == {"passt.wire.cursor"}
    assert _imports_of("from .idle import IdleFlow, flow_limit") == {"passt.flow.idle"}
    assert _imports_of("from .. import __version__") == {"passt"}
    assert _imports_of("from . import idle", "passt.flow", is_package=True) == {"passt.flow.idle"}
    assert _imports_of("import passt.addr, os") == {"passt.addr"}
    assert _imports_of("from os import path") == set()


def test_checker_sees_lazy_imports() -> None:
    assert _imports_of("def f():\n    if x:\n        from ..log import err") == {"passt.log"}


def test_checker_sees_imports_of_types() -> None:
    source = "if TYPE_CHECKING:\n    from ..log import err\nelse:\n    from .. import addr"
    assert _imports_of(source) == {"passt.log", "passt.addr"}


def test_checker_sees_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}


def test_checker_counts_floors() -> None:
    assert floors({"a": {"b", "c"}, "b": {"c"}, "c": set(), "d": {"c"}}) == 3


def test_checker_sees_constants() -> None:
    source = "A = 1\n_B: Final = 2\nC, _D = 3, 4\nE = Struct('=I')\nf = 5\ng: int\nfor i in range(3):\n    H = i"
    assert list(constants(ast.parse(source))) == [("A", "1"), ("B", "2"), ("C", "3"), ("D", "4")]


def test_checker_measures_functions() -> None:
    source = "class A:\n    @property\n    def f(self):\n        return 1\n\n\ndef g(): ..."
    assert dict(_lengths("m", ast.parse(source))) == {"m: f": 2, "m: g": 1}


def test_checker_knows_places() -> None:
    assert place("passt.tcp_engine.conn") == place("passt.tcp_engine") < place("passt.tcp") < place("passt.tap")
    assert place("passt") == 0
    with pytest.raises(LookupError, match="no place"):
        place("passt.surprise")
