"""The shape of the package: imports go down the layers, no cycles, modules that one sitting can read.

An import inside a function counts like any other, since it must work after the file system is gone; one under
`if TYPE_CHECKING:` does not, since it never happens.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "passt"
LINES_MAX = 600

# First part of a module's name below the package, up to an underscore -> its layer
LAYERS = {
    "__init__": 0,
    "addr": 0,
    "wire": 0,
    "supervisor": 0,
    "linux": 1,
    "log": 1,
    "core": 2,
    "arp": 3,
    "dhcp": 3,
    "dhcpv6": 3,
    "ndp": 3,
    "icmp": 3,
    "dns": 3,
    "udp": 3,
    "tcp": 3,
    "tap": 4,
    "listen": 4,
    "scan": 4,
    "forwards": 4,
    "metrics": 4,
    "stream": 4,
    "passt": 5,
    "control": 5,
    "qrap": 5,
    "pasta": 5,
    "isolation": 5,
    "seccomp": 5,
    "terminal": 5,
    "resolv": 5,
    "trace": 5,
    "control_api": 6,
    "slirp": 6,
    "conf": 6,
    "daemon": 6,
    "wiring": 6,
    "cli": 7,
    "pesto": 7,
    "__main__": 8,
    "vm": 8,
}


def module_name(path: Path) -> str:
    """passt/flow/table.py -> passt.flow.table; passt/core/__init__.py -> passt.core"""
    parts = ("passt", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in FILES.items()}


def layer(name: str) -> int:
    """The layer of a module; LookupError if it has no place yet."""
    first = name.split(".")[1] if "." in name else "__init__"
    for known in (first, first.split("_")[0]):
        if known in LAYERS:
            return LAYERS[known]
    raise LookupError(f"{name} has no layer: give it one in LAYERS")


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _import_nodes(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but for those that only the type checker follows."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and _is_type_checking(child):
            for other in child.orelse:
                yield from _import_nodes(ast.Module([other], []))
        else:
            yield from _import_nodes(child)


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


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down(name: str) -> None:
    up = {module for module in IMPORTS[name] if layer(module) > layer(name)}
    assert not up, f"{name} (layer {layer(name)}) imports {', '.join(sorted(up))}, which is above it"
    unknown = IMPORTS[name] - FILES.keys()
    assert not unknown, f"{name} imports {unknown}, which is not there"


def test_no_cycles() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as e:
        pytest.fail("import cycle: " + " -> ".join(e.args[1]))


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


# The checker itself ------------------------------------------------------------------------------------------------


def _imports_of(source: str, name: str = "passt.flow.table", is_package: bool = False) -> set[str]:
    return imports(name, ast.parse(source), is_package)


def test_checker_resolves_relative_imports() -> None:
    assert _imports_of("from .. import addr, log") == {"passt.addr", "passt.log"}
    assert _imports_of("from ..wire.cursor import Malformed") == {"passt.wire.cursor"}
    assert _imports_of("from .config import Config, Ip4") == {"passt.policy.config"}
    assert _imports_of("from .. import __version__") == {"passt"}
    assert _imports_of("from . import config", "passt.core", is_package=True) == {"passt.policy.config"}
    assert _imports_of("import passt.addr, os") == {"passt.addr"}
    assert _imports_of("from os import path") == set()


def test_checker_sees_lazy_imports() -> None:
    assert _imports_of("def f():\n    if x:\n        from ..log import err") == {"passt.log"}


def test_checker_spares_type_checking() -> None:
    source = "if TYPE_CHECKING:\n    from ..log import err\nelse:\n    from .. import addr"
    assert _imports_of(source) == {"passt.addr"}
    assert _imports_of("if typing.TYPE_CHECKING:\n    from ..log import err") == set()


def test_checker_knows_layers_by_prefix() -> None:
    assert layer("passt.tcp_engine.conn") == layer("passt.tcp") == 3
    assert layer("passt.wire.tcp") == 0
    assert layer("passt") == 0
    with pytest.raises(LookupError, match="no layer"):
        layer("passt.surprise")
