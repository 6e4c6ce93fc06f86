"""The site of documents: it is made without a network, has all of them, and its links lead somewhere."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

REPOSITORY = Path(__file__).parent.parent
SCRIPT = REPOSITORY / "scripts" / "site"


@pytest.fixture(scope="module")
def site() -> ModuleType:
    """The script, as a module."""
    loader = importlib.machinery.SourceFileLoader("passt_site", str(SCRIPT))
    spec = importlib.util.spec_from_loader("passt_site", loader)
    assert spec is not None
    made = importlib.util.module_from_spec(spec)
    loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made where nothing is reached: not even the loopback interface is up."""
    out = tmp_path_factory.mktemp("site") / "out"
    command = ["unshare", "--net", "--user", "--map-root-user", sys.executable, SCRIPT, out]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd="/")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return out


def test_every_document_has_its_page(built: Path) -> None:
    made = {str(path.relative_to(built)) for path in built.rglob("*.html")}
    for path in (REPOSITORY / "docs").glob("*.md"):
        assert f"{path.stem}.html" in made
    for path in REPOSITORY.glob("*.1"):
        assert f"man/{path.stem}.html" in made
    for path in (REPOSITORY / "passt").iterdir():
        assert not (path / "__init__.py").exists() or f"reference/{path.name}.html" in made
    assert {"index.html", "tutorial.html", "changelog.html", "search.html"} <= made
    assert "--tcp-ports" in re.sub(r"<[^>]*>", "", (built / "man" / "passt.html").read_text())
    assert "passt.link.stream_socket" in (built / "reference" / "link.html").read_text()


def test_a_browser_fetches_nothing_from_elsewhere(built: Path) -> None:
    for path in built.rglob("*.html"):
        text = path.read_text()
        assert re.findall(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^"]*"', text) == [], path
    for path in built.rglob("*.css"):
        assert "url(http" not in path.read_text() and "@import" not in path.read_text(), path


def test_links_lead_somewhere(built: Path) -> None:
    anchors: dict[Path, set[str]] = {}
    for path in built.rglob("*.html"):
        anchors[path] = set(re.findall(r'\bid="([^"]+)"', path.read_text()))
    for path in anchors:
        if path.name == "404.html":
            continue
        for link in re.findall(r'\bhref="([^"]+)"', path.read_text()):
            name, _, anchor = unquote(link).partition("#")
            if "://" in name:
                continue
            target = Path(os.path.normpath(path.parent / name)) if name else path
            assert target.exists(), f"{path.name}: {link}"
            assert not anchor or target.suffix != ".html" or anchor in anchors[target], f"{path.name}: {link}"


def test_a_link_to_a_file_without_a_page_is_an_error(site: ModuleType) -> None:
    assert site.linked("[a](ports.md#recipes), `[b](c)`", "docs/follow.md") == "[a](ports.md#recipes), `[b](c)`"
    assert site.linked("[a](docs/ports.md) [b](https://x)", "README.md") == "[a](ports.md) [b](https://x)"
    assert site.linked("[a](../docs/ports.md)", "contrib/README.md") == "[a](ports.md)"
    assert site.linked("[passt(1)](../passt.1)", "docs/follow.md") == "[passt(1)](man/passt.md)"
    assert site.linked("    [as it is](nowhere)", "README.md") == "    [as it is](nowhere)"
    with pytest.raises(LookupError, match=r"^docs/ports\.md: nowhere\.md has no page$"):
        site.linked("[a](nowhere.md)", "docs/ports.md")
