"""The documents: links lead somewhere, commands use options that exist, and the words are plain."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
INDEX = REPOSITORY / "packaging" / "index.md"  # the description on a package index
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((REPOSITORY / "docs").glob("*.md")),
    *(REPOSITORY / name / "README.md" for name in ("contrib", "packaging")),
]
PAGES = [REPOSITORY / name for name in ("passt.1", "passt-repair.1", "pesto.1", "qrap.1", "slirp4netns.1")]
README_LINES_MAX = 160
SCRIPTS = {path.name for path in (REPOSITORY / "commands").iterdir()}
PROGRAMS = {"pasta", "passt", "pesto"}


def ids(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def prose(text: str) -> str:
    """A document without its blocks of code and its spans of code."""
    return re.sub(r"`[^`]*`", "`", re.sub(r"^    .*\n", "\n", text, flags=re.M))


def blocks(text: str) -> str:
    """The blocks of code, their continued lines joined."""
    return "\n".join(re.findall(r"^    +(.*)", text, re.M)).replace("\\\n", " ")


# Commands that do what is said of them -----------------------------------------------------------------------------

CLOSED = {"-t none", "-u none", "-T none", "-U none", "--no-map-gw"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_nothing_at_all_closes_the_loopback_of_the_host_too(path: Path) -> None:
    """The address of the gateway leads there without --no-map-gw."""
    for line in blocks(path.read_text()).splitlines():
        if re.search(r"# nothing\b.* at all", line):
            assert [option for option in CLOSED if option not in line] == [], line


@pytest.mark.parametrize("path", [*DOCUMENTS, *PAGES], ids=ids)
def test_arguments_are_the_same_in_all_shells(path: Path) -> None:
    """zsh refuses a word with a bracket or an asterisk that matches no file, and expands `=` and `~` in front."""
    text = path.read_text()
    shown = re.findall(r"^\.Dl (.*)", text, re.M) if path.suffix == ".1" else blocks(text).splitlines()
    for line in shown:
        command = re.sub(r"""'[^']*'|"[^"]*"|\$\([^)]*\)|(^| )#.*""", "", line)
        if re.match(r"\$? ?(pasta|passt|pesto|podman)\b", command):
            assert re.findall(r"\S*[\[\]*?{}]\S*|\s[~=^]\S*", command) == [], line


# Links -------------------------------------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The headings of a document, as links name them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(path: Path) -> list[str]:
    """Targets of links and pictures within the repository."""
    return [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if "://" not in link]


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path):
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_document_is_linked_from_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links(README)}
    assert set(DOCUMENTS) - {README} <= linked


def test_every_picture_is_shown() -> None:
    shown = {(path.parent / link).resolve() for path in DOCUMENTS for link in links(path)}
    assert {p for p in (REPOSITORY / "docs").iterdir() if p.suffix in (".png", ".svg")} <= shown


# Commands ----------------------------------------------------------------------------------------------------------


@cache
def options(program: str) -> frozenset[str]:
    """Every option that `program --help` has."""
    code = f"import sys; from passt.launch import main; sys.argv[0] = {program!r}; sys.exit(main())"
    command = [sys.executable, "-c", code, "--help"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    return frozenset(re.findall(r"(?<![\w-])--?[A-Za-z0-9][\w-]*", said))


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each call of a program in the blocks of a text, with its own options: those before `--` or a comment."""
    found = []
    for line in blocks(text).splitlines():
        for match in re.finditer(r"(?:^|[\w/]*/bin/|\$ |# )(pasta|passt|pesto) ([^#&|]*)", line):
            words = match[2].split(" -- ")[0].split()
            found.append((match[1], [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z0-9]", word)]))
    return found


@pytest.mark.parametrize("path", [*DOCUMENTS, INDEX], ids=ids)
def test_commands_use_options_that_exist(path: Path) -> None:
    for program, used in commands(path.read_text()):
        assert set(used) <= options(program), f"{program} {used}"


def test_the_readme_has_a_command_of_each_program() -> None:
    """So that the pattern above finds them."""
    found = commands(README.read_text())
    assert {program for program, _ in found} == PROGRAMS
    assert len(found) > 10 and ("pesto", ["--add", "-t", "-u"]) in found


def test_the_readme_names_what_is_installed() -> None:
    text = " ".join(README.read_text().split())
    said = text[text.index("installs the commands") :].partition(", with")[0]
    assert set(re.findall(r"`([\w-]+)`", said)) == SCRIPTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_targets_of_make_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    text = path.read_text()
    named = re.findall(r"`make ([a-z][a-z-]*)`", text) + re.findall(r"^ +make ([a-z][a-z-]*)", text, re.M)
    assert set(named) <= targets


# Requirements of RFCs ----------------------------------------------------------------------------------------------

REQUIREMENTS = [REPOSITORY / "docs" / name for name in ("services.md", "conformance.md")]


def tables(text: str) -> dict[str, str]:
    """The parts of a document by their headings of the second level."""
    return {part.partition("\n")[0]: part for part in re.split(r"^## ", text, flags=re.M)[1:]}


def rows(text: str) -> list[list[str]]:
    """The cells of each row of a part's table, from below its heading."""
    found = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row] for row in found[2:]]


PARTS = [(path, part) for path in REQUIREMENTS for part in tables(path.read_text())]


@pytest.mark.parametrize(("path", "part"), PARTS, ids=[f"{path.stem}: {part}" for path, part in PARTS])
def test_requirements_have_tests_that_exist(path: Path, part: str) -> None:
    """Each row names a test in one of the files that stand above the table, or says that something is left out."""
    text = tables(path.read_text())[part]
    files = [REPOSITORY / name for name in re.findall(r"`(tests/[\w/]+\.py)`", text)]
    tests = {name for file in files for name in re.findall(r"^def (test_\w+)\(", file.read_text(), re.M)}
    assert len(rows(text)) > 5
    for row in rows(text):
        section, _, done, named = row
        assert re.match(r"RFC \d+", section), row
        found = set(re.findall(r"`(test_\w+)`", named))
        assert found or done.startswith("left out: "), row
        assert found <= tests, row


# Words -------------------------------------------------------------------------------------------------------------


def test_the_readme_is_short() -> None:
    assert README.read_text().count("\n") <= README_LINES_MAX


@pytest.mark.parametrize("path", DOCUMENTS, ids=ids)
def test_lines_are_no_longer_than_those_of_the_code(path: Path) -> None:
    lines = [line for line in path.read_text().splitlines() if len(line) > 120 and not line.startswith(("|", "     "))]
    assert lines == []
