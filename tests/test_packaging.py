"""Packages of distributions: their version, and the names that they have beside those of the programs in C.

The packages themselves are built and tried by `make test-deb`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from passt import __version__

REPOSITORY = Path(__file__).parent.parent
PACKAGING = REPOSITORY / "packaging"
COMMANDS = sorted(path.name for path in (REPOSITORY / "commands").iterdir())
WITH_COMPLETION = [name for name in COMMANDS if name not in ("qrap", "passt-repair", "slirp4netns")]
PLACE = "usr/lib/passt-python"
UNITS = ["system/netns-python@", "system/passt-python@", "system/pasta-python@", "user/passt-python@"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that packaging/beside installs, by a user whose new files are private."""
    root = tmp_path_factory.mktemp("root")
    command = [PACKAGING / "beside", root, "/usr/share/zsh/site-functions"]
    subprocess.run(command, umask=0o077, cwd="/", timeout=60, check=True)
    return root


def run(*command: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def versions(tree: Path) -> set[str | None]:
    """The versions in all files that have one."""
    changelog = (tree / "packaging" / "debian" / "changelog").read_text()
    spec = (tree / "packaging" / "rpm" / "passt-python.spec").read_text()
    program = (tree / "passt" / "__init__.py").read_text()
    found = [
        re.match(r"passt-python \((.*)-\w+\) ", changelog),
        re.search(r"^Version: +(.*)$", spec, re.M),
        re.search(r'^__version__ = "(.*)"$', program, re.M),
    ]
    pages = [page for page in tree.glob("*.1") if not page.read_text().startswith(".so ")]
    assert len(pages) == 5
    found += [re.search(r'^\.Os "passt (.*)"$', page.read_text(), re.M) for page in pages]
    return {match and match[1] for match in found}


def test_all_files_have_the_version_of_the_program() -> None:
    assert versions(REPOSITORY) == {__version__}


def test_a_new_version_is_written_into_all_files(tmp_path: Path) -> None:
    named = [REPOSITORY / name for name in ("CHANGELOG.md", "packaging", "passt/__init__.py", "scripts/version")]
    for path in (*named, *REPOSITORY.glob("*.1")):
        target = tmp_path / path.relative_to(REPOSITORY)
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if path.is_dir() else shutil.copy2)(path, target)
    done = run(tmp_path / "scripts" / "version", "98.7.65", SOURCE_DATE_EPOCH="1700000000")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert versions(tmp_path) == {"98.7.65"}
    assert "\n## [Unreleased]\n\n## [98.7.65] - 2023-11-14\n" in (tmp_path / "CHANGELOG.md").read_text()
    assert ".Dd November 14, 2023\n" in (tmp_path / "passt.1").read_text()
    debian = run("dpkg-parsechangelog", "-l", tmp_path / "packaging" / "debian" / "changelog", "-S", "Timestamp")
    assert debian.stdout == "1700000000\n"
    again = run(tmp_path / "scripts" / "version", "98.7.65")
    assert (again.returncode, again.stderr) == (1, "CHANGELOG.md has version 98.7.65 already\n")
    assert run(tmp_path / "scripts" / "version", "1.2").returncode == 2


def test_the_rpm_has_all_files(root: Path) -> None:
    """rpmbuild refuses files that belong to no package, and lines that match no file."""
    spec = (PACKAGING / "rpm" / "passt-python.spec").read_text()
    macros = {"bindir": "usr/bin", "prefix": "usr", "mandir": "usr/share/man", "datadir": "usr/share"}
    listed = re.search(r"^%files\n((?:.+\n)+)", spec, re.M)
    assert listed is not None
    patterns = [
        re.sub(r"%\{_(\w+)\}", lambda found: macros[found[1]], line)
        for line in listed[1].splitlines()
        if not line.startswith(("%license", "%doc"))
    ]
    files = {path.relative_to(root) for path in root.rglob("*") if not path.is_dir() and "apparmor" not in str(path)}
    for pattern in patterns:
        matched = {file for file in files if file.match(pattern) or str(file).startswith(f"{pattern}/")}
        assert matched, f"%files: {pattern} is nothing"
        files -= matched
    assert files == set()


def test_mypyc_has_the_same_seed_in_each_build(tmp_path: Path) -> None:
    """Its C code depends on the order of sets, as far as mypy 1.15 goes: two builds of a package were not equal."""
    rules = (PACKAGING / "debian" / "rules").read_text().partition("\n%:")[0]
    (tmp_path / "rules").write_text(f"{rules}\nprint:\n\t@echo seed $$PYTHONHASHSEED.\n")
    done = run("make", "--file", tmp_path / "rules", "print")
    assert "seed 0.\n" in done.stdout, done


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="a clone of the repository is needed")
@pytest.mark.parametrize(
    ("tag", "said"),
    [
        (None, f"no release: this commit has no tag (git tag -s v{__version__})\n"),
        ("v99", f"no release: the tag is v99, and passt/__init__.py has version {__version__}\n"),
        (f"v{__version__}", f"no release: CHANGELOG.md has no section '## [{__version__}] - DATE'\n"),
    ],
)
def test_a_release_that_is_not_ready_is_refused(tmp_path: Path, tag: str | None, said: str) -> None:
    clone = tmp_path / "clone"
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@localhost", "-c", "commit.gpgsign=false"]
    assert run(*git, "clone", "--quiet", "--depth", "1", "--no-tags", f"file://{REPOSITORY}", clone).returncode == 0
    changelog = clone / "CHANGELOG.md"
    changelog.write_text(re.sub(rf"(?m)^## \[{re.escape(__version__)}\].*$", "", changelog.read_text()))
    shutil.copy(REPOSITORY / "scripts" / "release", clone / "scripts" / "release")
    assert run(*git, "-C", clone, "add", "--all").returncode == 0
    assert run(*git, "-C", clone, "commit", "--quiet", "--allow-empty", "-m", "x").returncode == 0
    if tag is not None:
        assert run(*git, "-C", clone, "tag", tag).returncode == 0
    done = run(clone / "scripts" / "release", CHECK_ONLY="1", HOME=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", said)


def test_no_name_is_that_of_a_program_in_c(root: Path) -> None:
    files = [path for path in root.rglob("*") if not path.is_dir() and PLACE not in str(path)]
    assert len(files) > 30
    assert [path for path in files if not re.search("python", path.name) and "apparmor" not in str(path)] == []


def test_commands_and_pages(root: Path) -> None:
    for name in COMMANDS:
        command = root / "usr" / "bin" / f"{name}.python"
        assert command.resolve() == root / PLACE / "bin" / name and not (root / PLACE / "bin" / name).is_symlink()
        assert command.stat().st_mode & 0o777 == 0o755
        page = (root / "usr" / "share" / "man" / "man1" / f"{name}.python.1").read_text()
        assert page.startswith(".so man1/passt.python.1\n") or ".Sh NAME" in page


@pytest.mark.parametrize("name", WITH_COMPLETION)
def test_completions_are_for_these_names_only(root: Path, name: str) -> None:
    file = root / "usr" / "share" / "bash-completion" / "completions" / f"{name}.python"
    said = run("bash", "-c", '. "$1"; complete -p', "bash", file)
    completed = sorted(line.split()[-1] for line in said.stdout.splitlines())
    pasta = ["passt4netns.python", "pasta.python"]
    assert (completed, said.stderr) == (pasta if "pasta.python" in completed else [f"{name}.python"], "")
    assert f"{name}.python" in completed
    function = said.stdout.split("-F ")[1].split()[0]
    assert run("bash", "-c", f'. "$1"; declare -F {function}', "bash", file).stdout == f"{function}\n"
    if shutil.which("fish"):
        fish = root / "usr" / "share" / "fish" / "vendor_completions.d" / f"{name}.python.fish"
        plain = run("fish", "--no-config", "-c", f"source {fish}; complete", HOME=str(root), XDG_CONFIG_HOME=str(root))
        assert f"{name}.python" in plain.stdout and not re.search(rf"(^| |'){name}($| |')", plain.stdout, re.M)


def test_zsh_completes_these_names(root: Path) -> None:
    folder = root / "usr" / "share" / "zsh" / "site-functions"
    first = {path.name: path.read_text().splitlines()[0] for path in folder.iterdir()}
    assert first == {
        "_pasta.python": "#compdef pasta.python passt4netns.python",
        "_passt.python": "#compdef passt.python",
        "_pesto.python": "#compdef pesto.python",
    }


def test_units_name_each_other_and_the_commands(root: Path) -> None:
    units = {name: (root / "usr" / "lib" / "systemd" / f"{name}.service").read_text() for name in UNITS}
    for name, text in units.items():
        assert not re.search(r"\b(passt|pasta|netns)@", text), name
        started = re.findall(r"^ExecStart=(\S+)", text, re.M)
        assert started == [f"/{PLACE}/bin/{name.split('/')[1].split('-')[0]}"] or "netns" in name
    assert "Requires=netns-python@%i.service" in units["system/pasta-python@"]


def test_profiles_are_for_this_place(root: Path) -> None:
    tunables = (root / "etc" / "apparmor.d" / "tunables" / "home.d" / "passt_python").read_text()
    assert re.findall(r"^@\{passt_python\}=(.*)$", tunables, re.M) == [f"/{PLACE}"]
    assert (root / "usr" / "share" / "passt-python" / "apparmor" / "userns").exists()
    assert not (root / "etc" / "apparmor.d" / "abstractions" / "passt_python.d").exists()
