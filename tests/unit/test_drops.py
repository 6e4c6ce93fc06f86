"""Reasons of drops: each is used, each use is one of them, and docs/drops.md lists them with where they are counted."""

from __future__ import annotations

import ast
import errno
import re
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from passt.drops import PREFIXES, REASONS, Drop, Failed, Prefix, Reason

from ..sources import parse

ROOT = Path(__file__).parent.parent.parent
SOURCES = {
    path.relative_to(ROOT / "passt").with_suffix("").as_posix().replace("/", "."): parse(path.read_text())
    for path in sorted((ROOT / "passt").rglob("*.py"))
    if path.name != "drops.py"
}


def uses(tree: ast.AST) -> Iterator[str]:
    """`Drop.NAME` and `Failed.NAME` in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("Drop", "Failed"):
            yield f"{node.value.id}.{node.attr}"


@cache
def where() -> dict[str, list[str]]:
    """The modules that each is used in."""
    found: dict[str, list[str]] = {}
    for module, tree in SOURCES.items():
        for use in sorted(set(uses(tree))):
            found.setdefault(use, []).append(module)
    return found


def members() -> Iterator[tuple[str, str]]:
    """(name in the source, text) of all; an errno is `...`."""
    yield from ((f"Drop.{name}", value) for name, value in vars(Drop).items() if isinstance(value, Reason))
    for name, value in vars(Failed).items():
        if isinstance(value, Prefix):
            yield f"Failed.{name}", f"{value.text}: ERRNO"


def markdown() -> str:
    """The document."""
    rows = [f"| {text} | {' '.join(where()[name])} |" for name, text in members()]
    return "\n".join(
        (
            "# Why something is dropped",
            "",
            "Made from the code (`make docs-drops`), and compared with it by a test. The texts are the label `reason`",
            "of the metric `passt_drops_total`, and rows of `--stats` and `pesto --top`. ERRNO is the name of what the",
            "kernel answered, as ENETUNREACH.",
            "",
            "| reason | counted, or found, in |",
            "|---|---|",
            *rows,
            "",
        )
    )


def test_every_reason_is_used() -> None:
    assert {name for name, _ in members()} == where().keys()


def test_texts_are_different() -> None:
    texts = Counter(text for _, text in members())
    assert len(texts) == len(REASONS) + len(PREFIXES) and set(texts.values()) == {1}


def test_texts_are_labels() -> None:
    assert all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9:, -]*", text) for text in (*REASONS, *(p.text for p in PREFIXES)))


def keys(tree: ast.AST) -> Iterator[ast.expr]:
    """The keys that are counted in `drops`, and the arguments of `Malformed`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("drops"):
            yield node.slice
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "Malformed":
            yield from node.args


def is_reason(key: ast.expr) -> bool:
    """Whether an expression is a member; a name or an attribute is one by its type, which mypy has seen to."""
    if isinstance(key, ast.IfExp):
        return is_reason(key.body) and is_reason(key.orelse)
    if isinstance(key, ast.Call) and ast.unparse(key.func).endswith(".get"):
        return is_reason(key.args[1])
    if isinstance(key, ast.Call):
        return re.fullmatch(r"Failed\.\w+\.of", ast.unparse(key.func)) is not None
    return isinstance(key, ast.Name | ast.Attribute)


@pytest.mark.parametrize("module", SOURCES)
def test_every_use_is_one_of_them(module: str) -> None:
    wrong = [ast.unparse(key) for key in keys(SOURCES[module]) if not is_reason(key)]
    assert not wrong


def test_checker_sees_texts() -> None:
    for source in ('drops["x"] += 1', 'drops[f"x {e}"] += 1', 'raise Malformed("x")', 'a.drops["x" if a else B] += 1'):
        assert not all(map(is_reason, keys(ast.parse(source)))), source


def test_errnos_have_names() -> None:
    reason = Failed.UDP_SEND.of(OSError(errno.EPERM, "no"))
    assert reason == "udp: send: EPERM" == Failed.UDP_SEND.of(errno.EPERM)
    assert Failed.UDP_SEND.of(errno.EPERM) is reason
    assert Failed.UDP_SEND.of(OSError()) == "udp: send: None" and Failed.UDP_SEND.of(12345) == "udp: send: 12345"


def test_a_reason_is_its_text() -> None:
    drops: Counter[str] = Counter()
    drops[Drop.FAULT] += 1
    assert drops == {"fault": 1} and f"{Drop.FAULT}" == "fault"


def test_document() -> None:
    assert (ROOT / "docs/drops.md").read_text() == markdown(), "run `make docs-drops`"


if __name__ == "__main__":
    sys.stdout.write(markdown())
