"""The distributions that scripts/dist builds: complete, described as package indexes read it, and reproducible."""

from __future__ import annotations

import email
import email.message
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import readme_renderer.markdown
import trove_classifiers
from packaging.requirements import Requirement

from passt import __version__

REPOSITORY = Path(__file__).parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
SDIST, WHEEL = f"passt-{__version__}.tar.gz", f"passt-{__version__}-py3-none-any.whl"
SBOM = f"passt-{__version__}.cdx.json"
LOCKED = re.compile(r"^([a-z0-9-]+)==(\S+)(?: ; (.*?))? \\\n    --hash=sha256:", re.M)
OF_THE_BUILD = {"PKG-INFO", "setup.cfg"}  # and passt.egg-info: made by setuptools

pytestmark = pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="the list of files is that of git")


def build(folder: Path, umask: int, tree: Path = REPOSITORY, **env: str) -> Path:
    """A folder with both distributions of `tree`, built in another environment of the shell."""
    temporary = folder / "tmp"
    temporary.mkdir(parents=True)
    variables = {"PATH": os.environ["PATH"], "PYTHON": sys.executable, "TMPDIR": str(temporary), **env}
    command = [tree / "scripts" / "dist", folder / "dist"]
    subprocess.run(command, env=variables, umask=umask, timeout=120, check=True)
    assert not list(temporary.iterdir())
    return folder / "dist"


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("one"), 0o022, HOME="/", TZ="UTC", PYTHONHASHSEED="1")


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """All files of the repository, with those that are to be added."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split("\0")
    return {name for name in listed if name and (REPOSITORY / name).exists()}


@pytest.fixture(scope="module")
def metadata(dist: Path) -> email.message.Message:
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        return email.message_from_bytes(wheel.read(f"passt-{__version__}.dist-info/METADATA"))


def test_two_builds_are_equal(dist: Path, tmp_path: Path) -> None:
    again = build(tmp_path, 0o077, HOME=str(tmp_path), TZ="Asia/Tokyo", PYTHONHASHSEED="2", LC_ALL="C")
    assert sorted(path.name for path in again.iterdir()) == [WHEEL, SBOM, SDIST]
    for name in (WHEEL, SBOM, SDIST):
        assert (again / name).read_bytes() == (dist / name).read_bytes(), name


def test_the_source_distribution_builds_itself(dist: Path, tmp_path: Path) -> None:
    """A packager who has only that gets the same bytes; what was made there stays out."""
    subprocess.run(["tar", "-xzf", dist / SDIST, "-C", tmp_path], check=True)
    tree = tmp_path / SDIST.removesuffix(".tar.gz")
    (tree / "build").mkdir()
    (tree / "build" / "made").write_text("made")
    again = build(tmp_path / "again", 0o022, tree, HOME="/", TZ="UTC")
    for name in (WHEEL, SBOM, SDIST):
        assert (again / name).read_bytes() == (dist / name).read_bytes(), name


def test_the_source_distribution_has_every_file(dist: Path, tracked: set[str]) -> None:
    with tarfile.open(dist / SDIST) as archive:
        members = {m.name.partition("/")[2]: m for m in archive.getmembers() if not m.isdir()}
    made = {name for name in members if name in OF_THE_BUILD or name.startswith("passt.egg-info/")}
    assert set(members) - made == tracked
    for name in tracked:
        path, member = REPOSITORY / name, members[name]
        if path.is_symlink():
            assert member.linkname == os.readlink(path), name
        else:
            assert (member.size, bool(member.mode & 0o111)) == (path.stat().st_size, os.access(path, os.X_OK)), name
        assert (member.uid, member.uname) == (0, "") and not member.mode & 0o022, name


def test_no_file_is_left_of_an_editor_or_a_merge(tracked: set[str]) -> None:
    assert [name for name in sorted(tracked) if re.search(r"(\.orig|\.rej|\.bak|\.swp|~)$", name)] == []


def test_the_wheel_has_the_package_and_its_commands(dist: Path, tracked: set[str]) -> None:
    with zipfile.ZipFile(dist / WHEEL) as wheel:
        names = set(wheel.namelist())
        modes = {info.filename: info.external_attr >> 16 for info in wheel.infolist()}
    data = f"passt-{__version__}.data/"
    commands = {name.removeprefix("commands/") for name in tracked if name.startswith("commands/")}
    shared = {name for name in tracked if re.match(r"[\w-]+\.1$|completions/|contrib/systemd/", name)}
    of_package = {name for name in names if not name.startswith((data, f"passt-{__version__}.dist-info/"))}
    assert of_package == {name for name in tracked if name.startswith("passt/")}
    assert {name for name in names if name.startswith(f"{data}scripts/")} == {f"{data}scripts/{c}" for c in commands}
    assert all(modes[f"{data}scripts/{command}"] & 0o111 == 0o111 for command in commands)
    rest = sorted(Path(name).name for name in names if name.startswith(f"{data}data/"))
    assert rest == sorted(Path(name).name for name in shared)


def test_the_wheel_installs_commands_that_run(dist: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    # Without --ignore-installed, pip removes the package of the environment that the tests run in
    subprocess.run([*pip, "--ignore-installed", "--prefix", tmp_path, dist / WHEEL], timeout=120, check=True)
    for name in ("pasta", "passt", "pesto"):
        command = [tmp_path / "bin" / name, "--version"]
        said = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=60, check=True).stdout
        assert said.startswith(f"{name} {__version__}\n")
    assert (tmp_path / "share" / "man" / "man1" / "passt.1").exists()
    assert (tmp_path / "lib" / "systemd" / "user" / "passt@.service").exists()


def test_the_description_is_complete(metadata: email.message.Message) -> None:
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "GPL-2.0-or-later"
    assert metadata.get_all("License-File") == ["LICENSE"]
    assert metadata.get_all("Project-URL")
    required = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    assert {r.name for r in required if not r.marker} == {"pyroute2", "psutil", "pyseccomp", "scapy", "numpy"}


def test_classifiers_are_known(metadata: email.message.Message) -> None:
    classifiers = metadata.get_all("Classifier") or []
    assert classifiers == PROJECT["classifiers"] and set(classifiers) <= trove_classifiers.classifiers
    assert not [c for c in classifiers if c.startswith("License ::")]  # an expression takes their place


def test_the_description_renders_on_a_package_index(metadata: email.message.Message) -> None:
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload()
    assert isinstance(text, str)
    html = readme_renderer.markdown.render(text)
    assert html is not None and html.count("<h2") >= 4 and "<pre" in html
    targets = re.findall(r"""(?:href|src)=["']([^"'#][^"']*)""", html)
    assert targets and all(target.startswith("https://") for target in targets)  # others lead nowhere there


# Versions and hashes -------------------------------------------------------------------------------------------------


def locked(name: str) -> dict[str, set[str]]:
    """The packages of a file of requirements with a hash at least, and their versions."""
    text = (REPOSITORY / "requirements" / name).read_text()
    found: dict[str, set[str]] = {}
    for package, version, _ in LOCKED.findall(text):
        found.setdefault(package, set()).add(version)
    assert len(re.findall(r"^\S", text, re.M)) == sum(map(len, found.values())), "an entry has no hash"
    return found


@pytest.mark.parametrize(("name", "extras"), [("run.txt", []), ("test.txt", ["test", "bench", "fuzz"])])
def test_the_locked_versions_are_those_that_are_required(name: str, extras: list[str]) -> None:
    """If this fails, scripts/lock writes the files."""
    versions = locked(name)
    for line in sum((PROJECT["optional-dependencies"][extra] for extra in extras), PROJECT["dependencies"]):
        requirement = Requirement(line)
        assert all(requirement.specifier.contains(version) for version in versions[requirement.name]), line


def test_the_bill_of_materials_has_all_packages_of_an_installation(dist: Path) -> None:
    bill = json.loads((dist / SBOM).read_text())
    component = bill["metadata"]["component"]
    assert (component["name"], component["version"]) == ("passt", __version__)
    listed = {(c["name"], c["version"]) for c in bill["components"] if c.get("purl", "").startswith("pkg:pypi/")}
    of_linux = {(name, version) for name, versions in locked("run.txt").items() for version in versions}
    assert listed == of_linux - {("win-inet-pton", v) for v in locked("run.txt").get("win-inet-pton", ())}
    references = {c["bom-ref"] for c in bill["components"]}
    assert set(bill["dependencies"][0]["dependsOn"]) == references
