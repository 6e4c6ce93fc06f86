"""The shape of the package: imports go down, no circles, modules that one sitting can read, a test file for each.

Every import counts: one inside a function, since it must work after the file system is gone; and one under
`if TYPE_CHECKING:`, since who reads a module reads what it names.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "passt"
LINES_MAX = 450
TOP_MAX = 24  # files at the top level of the package

# Folders and modules of the top level, from the lowest: each imports from those before it, and from itself
ORDER = (
    *("__init__", "addr", "calls", "drops", "wire", "log", "log_file", "linux"),  # ground
    *("loop", "policy", "link", "flow"),  # what all protocols share
    *("arp", "ndp", "dhcp", "dhcpv6", "icmp"),
    *("tcp_engine", "tcp", "udp_engine", "udp"),
    *("splice", "tap", "ports"),  # ways in
    *("conf", "control"),  # what users say, before and while it runs
    *("sandbox", "seccomp", "namespace", "pasta", "passt"),
    *("daemon", "cli", "__main__", "vm"),
    *("pesto", "qrap"),  # programs of their own
)
PLACE = {name: place for place, name in enumerate(ORDER)}

# Modules that have no test file of their own: where they are tested instead, and why
TESTED_ELSEWHERE = {
    # a few lines that call `main` of a command
    "__main__": "tests/unit/test_cli.py",
    "vm": "tests/unit/test_cli.py",
    "pesto/__main__": "tests/system/traffic/test_control.py",
    # fields, nothing that is done
    "flow/context": "tests/unit/daemon/test_wiring.py",
    "policy/config": "tests/unit/conf/test_decide.py",
    "policy/guest": "tests/unit/test_tap.py",
    # what it tells of itself, as other flows do
    "splice/conn": "tests/unit/test_flow_info.py",
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


def module_name(path: Path) -> str:
    """passt/flow/table.py -> passt.flow.table; passt/flow/__init__.py -> passt.flow"""
    parts = ("passt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def place(name: str) -> int:
    """How high a module stands; LookupError if it has no place yet."""
    first = name.split(".")[1] if "." in name else "__init__"
    if first not in PLACE:
        raise LookupError(f"{name} has no place: give it one in ORDER")
    return PLACE[first]


def _import_nodes(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


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


IMPORTS = {name: imports(name, tree, FILES[name].name == "__init__.py") for name, tree in TREES.items()}


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
    up = {module for module in IMPORTS[name] if place(module) > place(name)}
    assert not up, f"{name} imports {', '.join(sorted(up))}, which is above it"
    unknown = IMPORTS[name] - FILES.keys()
    assert not unknown, f"{name} imports {unknown}, which is not there"


def test_no_circles() -> None:
    assert not circle(IMPORTS), "import circle: " + " -> ".join(circle(IMPORTS))


def test_every_place_is_taken() -> None:
    here = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert here == PLACE.keys() and len(PLACE) == len(ORDER)


def test_the_top_level_is_short() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= TOP_MAX


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name].name == "__init__.py" and name != "passt"])
def test_folders_import_nothing(name: str) -> None:
    """So that a module costs what it imports itself."""
    assert [type(node) for node in TREES[name].body] == [ast.Expr]


@pytest.mark.parametrize("name", FILES)
def test_one_sitting(name: str) -> None:
    lines = FILES[name].read_text().count("\n")
    assert lines <= LINES_MAX, f"{name} has {lines} lines"


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


def test_checker_knows_places() -> None:
    assert place("passt.tcp_engine.conn") == place("passt.tcp_engine") < place("passt.tcp") < place("passt.tap")
    assert place("passt") == 0
    with pytest.raises(LookupError, match="no place"):
        place("passt.surprise")
