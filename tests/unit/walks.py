"""Finds walks over shared things: loops in which an exception for one would keep the others from being served.

A newcomer needs to know three words.

    shared thing   a value of a type in `SHARED`: a flow, a listener, a client, a callback, ...
    collection     what is annotated as a list, dict, set, ... of shared things: an attribute (`self._x: list[Flow]`), a
                   parameter, a result. Also a local name that such a thing is assigned to, and what is made of one by
                   `.values()`, `list(...)`, `sorted(...)`, a slice, a comprehension
    walk           a call of `each` over anything; or a loop over a collection: `for`, `while` a collection lasts, and
                   comprehensions that call something

mypy sees to it that collections are annotated, so that a new one is found without being listed anywhere. Where the type
is not known (`Any`), an attribute that is assigned from a collection is one.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..sources import parse

# The sources as they are written: tests/mutants.py runs a copy, in which each function has its mutants beside it
PACKAGE = Path(os.environ.get("MUTANTS_OF", Path(__file__).parents[2])) / "passt"

# Folders and modules that hold no flows: they end before there are any, or are programs of their own
LEFT_OUT = ("conf/", "pesto/", "namespace/", "sandbox/", "qrap.py", "seccomp.py", "cli.py", "pasta.py", "policy/rule")

SHARED = {"Flow", "F", "Listener", "Listening", "Client", "Connected", "Query", "Misdelivered", "Closable", "Callable"}
IN_PORTS = {"Rule", "Wanted"}  # in ports/, where a rule has sockets; elsewhere it is text and numbers
COLLECTIONS = {"list", "dict", "set", "frozenset", "deque", "OrderedDict", "Iterable", "Iterator", "Sequence"} | {
    *("Collection", "Mapping")
}
_MAKERS = {"list", "tuple", "set", "frozenset", "sorted", "reversed", "filter", "iter", "enumerate", "zip", "dict"}
_VIEWS = {"values", "items", "keys", "copy", "get", "pop"}
_HARMLESS = {"len", "isinstance", "int", "str", "bool", "min", "max", "zip"}
# Tuples rather than `|`, which is half as fast in isinstance(): there are 200,000 nodes
_Comprehension = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_Assignment = (ast.Assign, ast.AnnAssign)
_Scope = (ast.FunctionDef, ast.ClassDef)
_Walk = (ast.For, ast.While, ast.Call, *_Comprehension)


@dataclass(frozen=True, slots=True)
class Walk:
    """`where` is passt.module.Class.function, `over` what it walks over, as it is written."""

    where: str
    over: str
    is_each: bool
    line: int

    def __str__(self) -> str:
        return f"{self.where} over {self.over}"


def shared_types(trees: dict[str, ast.Module]) -> set[str]:
    """`SHARED`, classes derived from those, and names of such types: `Handler = Callable[...]`."""
    found, before = set(SHARED), 0
    while len(found) != before:
        before = len(found)
        for tree in trees.values():
            for node in tree.body:
                if isinstance(node, ast.ClassDef) and any(_mentions(base, found) for base in node.bases):
                    found.add(node.name)
                elif (
                    isinstance(node, ast.Assign)
                    and isinstance(node.value, ast.Subscript | ast.BinOp)
                    and _mentions(node.value, found)
                ):
                    found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def _mentions(node: ast.AST, names: set[str]) -> bool:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return any(name in node.value for name in names)
    return any(isinstance(n, ast.Name) and n.id in names for n in ast.walk(node))


def _is_collection(annotation: ast.AST | None, shared: set[str]) -> bool:
    """Whether a value of that type is a collection of shared things, or None."""
    if isinstance(annotation, ast.BinOp):
        return _is_collection(annotation.left, shared) or _is_collection(annotation.right, shared)
    if not isinstance(annotation, ast.Subscript) or not isinstance(annotation.value, ast.Name):
        return False
    name = annotation.value.id
    several = name == "tuple" and any(isinstance(n, ast.Constant) and n.value is ... for n in ast.walk(annotation))
    return (name in COLLECTIONS or several) and _mentions(annotation.slice, shared)


class Finder:
    """Walks of one module."""

    def __init__(
        self, module: str, tree: ast.Module, shared: set[str], attributes: set[str], results: set[str]
    ) -> None:
        self._module, self._shared, self._attributes, self._results = module, shared, attributes, results
        self._tree = tree

    def walks(self) -> list[Walk]:
        self._found: list[Walk] = []
        self._inside(self._tree, self._module, set())
        return self._found

    def _inside(self, node: ast.AST, where: str, known: set[str]) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, _Scope):
                inner = f"{where}.{child.name}"
                names = known | self._locals(child) if isinstance(child, ast.FunctionDef) else known
                self._inside(child, inner, names)
                continue
            if isinstance(child, _Walk) and (over := self._walk_over(child, known)) is not None:
                is_each = isinstance(child, ast.Call)
                self._found.append(Walk(where, ast.unparse(over), is_each, child.lineno))
            self._inside(child, where, known)

    def _locals(self, function: ast.FunctionDef) -> set[str]:
        """Names in a function that stand for collections."""
        arguments = function.args.posonlyargs + function.args.args + function.args.kwonlyargs
        names = {a.arg for a in arguments if _is_collection(a.annotation, self._shared)}
        assigned = [node for node in ast.walk(function) if isinstance(node, _Assignment)]
        before = -1
        while len(names) != before:
            before = len(names)
            for node in assigned:
                if isinstance(node, ast.AnnAssign):
                    if isinstance(node.target, ast.Name) and _is_collection(node.annotation, self._shared):
                        names.add(node.target.id)
                else:
                    for target, value in _pairs(node):
                        if isinstance(target, ast.Name) and self._reaches(value, names):
                            names.add(target.id)
        return names

    def _walk_over(self, node: ast.AST, known: set[str]) -> ast.expr | None:
        """The collection that `node` walks over, None if it is no walk."""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "each":
            return node.args[0]
        if isinstance(node, ast.For) and self._reaches(node.iter, known):
            return node.iter
        if isinstance(node, ast.While):
            tested = ast.walk(node.test)
            return node.test if any(isinstance(t, ast.expr) and self._names(t, known) for t in tested) else None
        if isinstance(node, _Comprehension):
            calls = [n for n in ast.walk(node) if isinstance(n, ast.Call) and not _is_harmless(n)]
            overs = [g.iter for g in node.generators if self._reaches(g.iter, known)]
            inside = [n for over in overs for n in ast.walk(over)]
            if overs and any(call not in inside for call in calls):
                return overs[0]
        return None

    def _names(self, node: ast.expr, known: set[str]) -> bool:
        """Whether it is a name or attribute of a collection."""
        return (isinstance(node, ast.Name) and node.id in known) or (
            isinstance(node, ast.Attribute) and node.attr in self._attributes
        )

    def _reaches(self, node: ast.expr, known: set[str]) -> bool:
        """Whether it is a collection, or made of one."""
        if self._names(node, known):
            return True
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute):
                if function.attr in _VIEWS and self._reaches(function.value, known):
                    return True
                return function.attr in self._results
            named = function.id if isinstance(function, ast.Name) else ""
            return named in self._results or (named in _MAKERS and any(self._reaches(a, known) for a in node.args))
        parts: list[ast.expr] = []
        if isinstance(node, ast.Subscript | ast.Starred):
            parts = [node.value]
        elif isinstance(node, ast.BinOp):
            parts = [node.left, node.right]
        elif isinstance(node, ast.BoolOp):
            parts = node.values
        elif isinstance(node, ast.IfExp):
            parts = [node.body, node.orelse]
        elif isinstance(node, ast.Tuple | ast.List):
            parts = [e for e in node.elts if isinstance(e, ast.Starred)]
        elif isinstance(node, _Comprehension):
            parts = [generator.iter for generator in node.generators]
        return any(self._reaches(part, known) for part in parts)


def _pairs(node: ast.Assign) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment; `a, self.b = self.b, []` has two."""
    for target in node.targets:
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value


def _is_harmless(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Name) and call.func.id in _HARMLESS


def _attributes(trees: dict[str, ast.Module], shared: dict[str, set[str]]) -> set[str]:
    """Names of attributes that hold collections, wherever."""
    found: set[str] = set()
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.AnnAssign) and _is_collection(node.annotation, shared[module]):
                if isinstance(node.target, ast.Attribute):
                    found.add(node.target.attr)
            elif isinstance(node, ast.ClassDef):
                found |= {
                    field.target.id
                    for field in node.body
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
                    if _is_collection(field.annotation, shared[module])
                }
    assigned: list[tuple[list[str], str]] = []  # attributes, from an attribute
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, _Assignment) and isinstance(node.value, ast.Attribute):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                assigned.append(([t.attr for t in targets if isinstance(t, ast.Attribute)], node.value.attr))
    before = -1
    while len(found) != before:  # self._by_key = self._flows.by_key
        before = len(found)
        for names, value in assigned:
            if value in found:
                found.update(names)
    return found


def find(sources: dict[str, str]) -> list[Walk]:
    """All walks of modules, by name and source."""
    trees = {module: parse(source) for module, source in sources.items()}
    everywhere = shared_types(trees)
    in_ports = everywhere | IN_PORTS
    shared = {m: in_ports if m.startswith("passt.ports.") else everywhere for m in trees}
    attributes = _attributes(trees, shared)
    functions = [n for tree in trees.values() for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    found: list[Walk] = []
    for types in (everywhere, in_ports):
        results = {f.name for f in functions if _is_collection(f.returns, types)}
        for module, tree in trees.items():
            if shared[module] is types:
                found += Finder(module, tree, types, attributes, results).walks()
    return found


def sources() -> dict[str, str]:
    """Modules in which walks are looked for."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE).as_posix()
        if not inside.startswith(LEFT_OUT):
            found["passt." + inside.removesuffix(".py").removesuffix("/__init__").replace("/", ".")] = path.read_text()
    return found
