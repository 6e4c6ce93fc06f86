"""The language of comments, docstrings, names and documents: the terms of the field, in plain technical English.

Two rules can be checked by machine:

- A sentence has a thing as its subject. It does not begin with a free relative clause ("Who asks is told ...", "What is
  left goes ..."). A question may begin with these words.
- A concept has one term, that of RFCs and of the kernel. `TERMS` lists words that stood for others, each with the term
  to use. Some of them are checked in names of functions, classes, parameters and variables as well.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from .sources import parse

ROOT = Path(__file__).parent.parent
FOLDERS = ("passt", "tests", "bench", "fuzz")  # of modules
# of files with comments after #
SCRIPTS = ("scripts", "contrib/systemd", "contrib/apparmor", "packaging/test", "packaging/debian")
DOCUMENTS = (
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "contrib/README.md"),
    *("packaging", "docs", "passt.1", "pesto.1", "qrap.1", "slirp4netns.1"),
)


class Term(NamedTuple):
    """A word that is not to be used: in prose, and in names if `name` is set."""

    pattern: str
    instead: str
    name: str = ""  # a regular expression for a part of an identifier, between underscores


TERMS = (
    Term(r"some(body|one)", "name the program, user, client or peer", "somebody"),
    Term(r"any(body|one)", "any user, any client, any program", "anybody"),
    Term(r"every(body|one)", "all clients, all users, all nodes", "everybody"),
    Term(r"nobody", "no client, no program, no host; `nobody` for the user", "nobodys"),
    Term(r"who(so)?ever", "the user, client or program that", "whoever"),
    Term(r"(by|so that|than|since|;) who", "the sender, the reader, the program that"),
    Term(r"whom", "the peer, the client; or turn the sentence round", "whom"),
    Term(r"other people('s)?|people", "users, other users"),
    Term(r"heirs?", "successor (listener); later UID (identity)", "heirs?"),
    Term(r"letters? (of|from|to) (strangers|others)|stray letters?", "misdelivered datagrams", "letters"),
    Term(r"rew(ind(s|ing)?|ound)", "go-back-N, retransmit from", "rew(ind|inds|ound)"),
    Term(r"runs? of (equal-sized )?datagrams", "GSO batch, GRO batch"),
    Term(r"early (data|segments?|bytes)", "out-of-order data, out-of-order queue"),
    Term(r"empty room", "sandbox"),
    Term(r"made anew|makes? (it )?anew", "created again", "anew"),
    Term(r"makes? no sense", "invalid"),
)


class Text(NamedTuple):
    """A paragraph of prose, or a name, and the line that it begins at."""

    line: int
    text: str


# Sources -----------------------------------------------------------------------------------------------------------


@cache
def files() -> tuple[Path, ...]:
    """The files to check."""
    modules = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    scripts = [path for folder in SCRIPTS for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    scripts = [path for path in scripts if path.suffix != ".pyc"]  # of a script that a test imports
    documents = [ROOT / name for name in DOCUMENTS if (ROOT / name).is_file()]
    documents += [path for name in DOCUMENTS for path in sorted((ROOT / name).glob("*.md"))]
    return tuple(path for path in (*modules, *scripts, *documents) if path != Path(__file__))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(path: Path) -> Iterator[Text]:
    """The comments, docstrings or text of a file."""
    if path.suffix == ".py":
        source = path.read_text()
        yield from docstrings(parse(source))
        yield from comments(source)
    elif path.suffix == ".md":
        yield from markdown(path.read_text())
    elif re.fullmatch(r"\.[1-8]", path.suffix):
        yield from manual(path.read_text())
    else:
        yield from shell_comments(path.read_text())


def docstrings(tree: ast.Module) -> Iterator[Text]:
    """The docstrings of a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                value = first.value.value
                if isinstance(value, str):
                    yield Text(first.lineno, value)


def comments(source: str) -> Iterator[Text]:
    """The comments of a module; those on consecutive lines are one text."""
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(source).readline) if t.type == tokenize.COMMENT]
    yield from joined((t.start[0], t.start[1], t.string) for t in tokens)


def shell_comments(source: str) -> Iterator[Text]:
    """The comments of a script or of a profile."""
    lines = enumerate(source.splitlines(), 1)
    found = ((n, m.start(), m[0].lstrip()) for n, line in lines if (m := re.search(r"(^|\s)#\s.*", line)))
    yield from joined(found)


def joined(found: Iterator[tuple[int, int, str]] | Iterator[tuple[int, int, str]]) -> Iterator[Text]:
    """Comments (line, column, text), with those of consecutive lines and the same column joined."""
    begin, last, column, parts = 0, 0, 0, list[str]()
    for line, at, text in found:
        if parts and (line, at) != (last + 1, column):
            yield Text(begin, "\n".join(parts))
            parts = []
        if not parts:
            begin = line
        parts.append(text.lstrip("#!:").strip())
        last, column = line, at
    if parts:
        yield Text(begin, "\n".join(parts))


def markdown(text: str) -> Iterator[Text]:
    """The lines of a document, without blocks and spans of code."""
    text = re.sub(r"^    [^\n]*$|^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    yield Text(1, re.sub(r"`[^`\n]*`", "`code`", text))


def manual(text: str) -> Iterator[Text]:
    """The lines of a manual page, without requests."""
    yield Text(1, re.sub(r"^[.'].*$", "", text, flags=re.M))


def names(tree: ast.Module) -> Iterator[Text]:
    """Names that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield Text(node.lineno, node.name)
        elif isinstance(node, ast.arg):
            yield Text(node.lineno, node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield Text(node.lineno, node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield Text(node.lineno, node.attr)


# Rules -------------------------------------------------------------------------------------------------------------

_BEGIN = r"(?:\A|(?<=[.!?:;)]\s)|(?<=\n))\s*(?:[-*] )?"
_FREE = re.compile(_BEGIN + r"(Who|Whose|Whom|Whoever|What|Whatever|Whichever)\b(?!')")
_END = re.compile(r"[.?!](?:\s|\Z)|\n\s*\n|\Z")


def free_relatives(text: str) -> Iterator[tuple[int, str]]:
    """Offset and beginning of sentences that begin with a free relative clause; questions are left out."""
    for m in _FREE.finditer(text):
        end = _END.search(text, m.end())
        assert end is not None
        if not end[0].startswith("?"):
            yield m.start(1), " ".join(text[m.start(1) : m.start(1) + 60].split())


def terms(text: str) -> Iterator[tuple[int, str]]:
    """Offset of each word that is not to be used, with the term to use."""
    for term in TERMS:
        for m in re.finditer(rf"(?<![\w`])({term.pattern})(?![\w`])", text, re.I):
            if m[1] == "nobody" and re.search(r"\b(user|as|to|becomes?|became) \Z", text[: m.start()]):
                continue  # the user of that name
            yield m.start(), f'"{m[1]}": use "{term.instead}"'


def bad_names(name: str) -> Iterator[str]:
    """The term to use for each part of a name that is not to be used."""
    for term in TERMS:
        if term.name and re.search(rf"(?:^|_)(?:{term.name})(?:_|$)", name):
            yield f'{name}: use "{term.instead}"'


@pytest.mark.parametrize("path", files(), ids=relative)
def test_words(path: Path) -> None:
    found = []
    for line, text in prose(path):
        for offset, beginning in free_relatives(text):
            reason = f'"{beginning} ...": begin the sentence with its subject, not with a relative clause'
            found.append((line + text[:offset].count("\n"), reason))
        for offset, reason in terms(text):
            found.append((line + text[:offset].count("\n"), reason))
    if path.suffix == ".py":
        for line, name in names(parse(path.read_text())):
            found += [(line, reason) for reason in bad_names(name)]
    assert not found, "\n" + "\n".join(f"{relative(path)}:{line}: {reason}" for line, reason in sorted(found))


# The rules themselves ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "What is left goes to the next one.",
        "A queue. Who asks first is served.",
        "A table:\n\n    Whoever comes    nothing",
        "First.\nWhose turn it is, is said.",
        "(see there). Whatever comes, goes.",
        "Two of them:\n\n- What comes\n- nothing",
    ],
)
def test_free_relatives_are_found(text: str) -> None:
    assert list(free_relatives(text))


@pytest.mark.parametrize(
    "text",
    [
        "What does the guest see? Its own address.",
        "Who answers?",
        "The client, whose address is known, says what it wants.",
        "What's new is elsewhere.",
        'It prints "What" and ends.',
    ],
)
def test_other_clauses_are_not_found(text: str) -> None:
    assert not list(free_relatives(text))


@pytest.mark.parametrize("text", ["It is for somebody.", "the heir\nof it", "Nobody listens.", "a run of datagrams"])
def test_terms_are_found(text: str) -> None:
    assert list(terms(text))


@pytest.mark.parametrize("text", ["It runs as `nobody`.", "root becomes nobody", "their own", "the user nobody's"])
def test_other_words_are_not_found(text: str) -> None:
    assert not list(terms(text))


def test_names_are_checked_by_their_parts() -> None:
    assert list(bad_names("_deliver_letters")) and list(bad_names("heir")) and not list(bad_names("their_heirloom"))


def test_prose_is_found_with_its_lines(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text('"""First."""\n\nx = 1  # one\n# two\n# three\n\n\ndef f() -> None:\n    """Four. # not one"""\n')
    assert set(prose(module)) == {Text(1, "First."), Text(9, "Four. # not one"), Text(3, "one"), Text(4, "two\nthree")}
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n# one\n# two\necho '#'  # three\n")
    assert set(prose(script)) == {Text(2, "one\ntwo"), Text(4, "three")}
    document = tmp_path / "text.md"
    document.write_text("One `two`\n\n    three\n\nFour\n")
    (text,) = prose(document)
    assert (text.line, text.text.split()) == (1, ["One", "`code`", "Four"])
    page = tmp_path / "text.1"
    page.write_text(".SH ONE\nTwo\n")
    assert [t.text.strip() for t in prose(page)] == ["Two"]
