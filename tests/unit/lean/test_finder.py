"""The finder that reads bytecode, against that of the interpreter: the same modules, and nothing that is unusual."""

from __future__ import annotations

import importlib
import os
import py_compile
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from passt.lean.finder import Finder, Loader, install


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of an imported package `found_here` with compiled modules `part` and `sub.part`."""
    directory = tmp_path / "found_here"
    for place in (directory, directory / "sub"):
        place.mkdir()
        for name in ("__init__.py", "part.py"):
            (place / name).write_text("value = 1\n")
            py_compile.compile(str(place / name))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("passt.lean.finder._names", {})
    importlib.import_module("found_here")
    yield directory
    for name in [name for name in sys.modules if name.startswith("found_here")]:
        del sys.modules[name]


def finds(directory: Path, name: str = "found_here.part") -> bool:
    return Finder.find_spec(name, [str(directory)]) is not None


@pytest.mark.parametrize("name", ["found_here.part", "found_here.sub"])
def test_module_is_as_that_of_the_usual_finder(package: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    usual = vars(importlib.import_module(name))
    del sys.modules[name]
    with monkeypatch.context() as patch:
        patch.setattr(sys, "meta_path", [Finder])
        ours = vars(importlib.import_module(name))
    assert isinstance(ours["__loader__"], Loader)
    different = {"__builtins__", "__loader__", "__spec__", "part"}
    assert {k: v for k, v in ours.items() if k not in different} == {
        k: v for k, v in usual.items() if k not in different
    }
    for attribute in ("name", "origin", "cached", "parent", "has_location", "submodule_search_locations"):
        assert getattr(ours["__spec__"], attribute) == getattr(usual["__spec__"], attribute), attribute


def test_module_is_loaded_again_from_its_source(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [Finder])
    module = importlib.import_module("found_here.part")
    (package / "part.py").write_text("value = 22\n")
    assert module.value == 1
    module.__loader__.exec_module(module)
    assert module.value == 22


def test_bytecode_that_was_made_elsewhere_has_the_name_of_the_source(package: Path) -> None:
    source = package / "part.py"
    source.write_text("def function(): pass\n")
    py_compile.compile(str(source), dfile="/elsewhere/part.py")
    spec = Finder.find_spec("found_here.part", [str(package)])
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.function.__code__.co_filename == str(source)


def test_unusual_modules_are_left_to_the_usual_finder(package: Path) -> None:
    assert finds(package)
    assert Finder.find_spec("found_here", None) is None
    assert Finder.find_spec("found_here.part", [str(package), str(package)]) is None
    assert not finds(package, "found_here.none")
    assert not finds(package / "none")


@pytest.mark.parametrize("what", ["changed", "touched", "no source", "no bytecode", "hash", "cut", "other", "long"])
def test_invalid_bytecode_is_left_to_the_usual_finder(package: Path, what: str) -> None:
    source = package / "part.py"
    (bytecode,) = (package / "__pycache__").glob("part.*")
    data = bytecode.read_bytes()
    if what == "changed":
        times = os.stat(source)
        source.write_text("value = 1000\n")
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif what == "touched":
        os.utime(source, (1, 1))
    elif what == "no source":
        source.unlink()
    elif what == "no bytecode":
        bytecode.unlink()
    elif what == "hash":
        py_compile.compile(str(source), invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    elif what == "cut":
        bytecode.write_bytes(data[:-9])
    elif what == "other":
        bytecode.write_bytes(b"\0\0\r\n" + data[4:])
    elif what == "long":
        source.write_text(f"value = {'x' * 300000!r}\n")
        py_compile.compile(str(source))
    assert not finds(package)


@pytest.mark.parametrize("name", ["part", "sub/__init__"])
def test_extension_module_comes_before_the_source(package: Path, name: str) -> None:
    (package / f"{name}.cpython-399-any.so").touch()
    assert not finds(package, "found_here." + name.partition("/")[0])


def test_directory_without_a_source_is_no_package(package: Path) -> None:
    (package / "sub" / "__init__.py").unlink()
    assert not finds(package, "found_here.sub")


def test_it_is_installed_once_and_not_where_bytecode_is_elsewhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "meta_path", [])
    install()
    install()
    assert sys.meta_path == [Finder]
    code = "import sys; from passt.lean import finder; finder.install(); print(finder.Finder in sys.meta_path)"
    argv = [sys.executable, "-X", f"pycache_prefix={tmp_path}", "-c", code]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "False\n"


def test_every_command_asks_it_first() -> None:
    code = """
        import sys
        from passt.__main__ import main
        main(["pasta", "--version"])
        print(sys.meta_path[0].__module__)
    """
    done = subprocess.run([sys.executable, "-c", dedent(code)], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("\npasst.lean.finder\n")
