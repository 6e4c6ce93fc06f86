"""The compiled build (`setup.py`), as far as it shows without a compiler. `make test-compiled` builds and runs it."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools

from .sources import parse

REPOSITORY = Path(__file__).parent.parent
MODULES = {str(path.relative_to(REPOSITORY)): path for path in sorted((REPOSITORY / "passt").rglob("*.py"))}
NODES = {name: list(ast.walk(parse(path.read_text()))) for name, path in MODULES.items()}
CLASSES = {(name, n.name): n for name, nodes in NODES.items() for n in nodes if isinstance(n, ast.ClassDef)}


def described(monkeypatch: pytest.MonkeyPatch, **variables: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The names in setup.py, and the arguments that it gives to setup()."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.delenv("PASST_MYPYC", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(REPOSITORY)
    return runpy.run_path("setup.py"), given


def bases(name: str, node: ast.ClassDef) -> Iterator[str]:
    """The modules that the base classes of a class of module `name` may come from."""
    imports = [n for n in NODES[name] if isinstance(n, ast.ImportFrom)]
    package = Path(name).parent
    for base in node.bases:
        text = ast.unparse(base).partition("[")[0]
        if (name, text) in CLASSES:
            yield name
        for node_of_import in imports:
            if any((alias.asname or alias.name) == text for alias in node_of_import.names) and node_of_import.level:
                folder = package.joinpath(*[".."] * (node_of_import.level - 1))
                path = folder.joinpath(*(node_of_import.module or "").split(".")).with_suffix(".py")
                yield str((REPOSITORY / path).resolve().relative_to(REPOSITORY))


def test_nothing_is_compiled_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    assert described(monkeypatch)[1] == {}


def test_the_compiler_is_a_requirement_of_the_compiled_build_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["setup.py", "egg_info"])
    has, given = described(monkeypatch, PASST_MYPYC="1")
    assert given == {"setup_requires": [has["MYPYC"]]}


def test_all_patterns_name_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    has, _ = described(monkeypatch)
    compiled = has["sources"]()
    assert len(compiled) == len(set(compiled)) and set(compiled) <= set(MODULES)
    for pattern in (*has["HOT"], *has["AS_IT_IS"]):
        assert list((REPOSITORY / "passt").glob(f"{pattern}.py")), pattern


def test_no_compiled_module_asks_where_an_object_keeps_its_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a compiled class are neither in slots nor in a dictionary: `fields` of dataclasses knows them."""
    for name in described(monkeypatch)[0]["sources"]():
        for node in NODES[name]:
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                assert node.attr not in ("__slots__", "__dict__"), f"{name}:{node.lineno}"
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id != "vars", f"{name}:{node.lineno}"


def test_no_class_inherits_across_the_border(monkeypatch: pytest.MonkeyPatch) -> None:
    """mypyc lets no interpreted class inherit from a compiled one, which shows when its module is imported only."""
    compiled = set(described(monkeypatch)[0]["sources"]())
    seen = 0
    for (name, class_name), node in CLASSES.items():
        for base in bases(name, node):
            seen += 1
            assert (base in compiled) <= (name in compiled), f"{name}: {class_name} inherits from a class of {base}"
    assert seen > 15
