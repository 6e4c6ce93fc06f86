"""The benchmark of many connections: its command line, and what goes into its machine."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from bench.contenders import CONTENDERS, peer
from bench.lab import PROGRAMS
from bench.scale import COLUMNS, FORMATS, arguments, numbers_of
from bench.scale_machine import files
from tests.system.vm.image import File, _cpio

ROOT = Path(__file__).parent.parent


def test_numbers_rise() -> None:
    assert numbers_of("1000,5000,50000") == [1000, 5000, 50000]
    assert arguments(["--connections", "7"]).connections == [7]


@pytest.mark.parametrize("text", ["0,5", "5,5", "7,3", "-1"])
def test_numbers_that_do_not(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="give rising numbers"):
        numbers_of(text)


@pytest.mark.parametrize("text", ["", "x", "5,"])
def test_what_is_no_number(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        numbers_of(text)


def test_each_column_has_a_format_as_wide_as_its_name() -> None:
    for name, form in zip(COLUMNS, FORMATS, strict=True):
        assert len(form.format(0)) == len(name)


def test_the_machine_has_all_that_runs_in_it(tmp_path: Path) -> None:
    for name in ("pasta", "passt"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libc.so.6").write_text("another one")
    before = peer(f"before={ROOT}")
    found = files([CONTENDERS[0], before, peer(f"new={tmp_path}")])
    needed = [
        *(ROOT / name for name in ("passt/__main__.py", "bench/scale.py", "tests/system/vm/machine.py")),
        *(tmp_path / name for name in ("pasta", "passt", "lib/libc.so.6")),
        *(Path("/usr/bin", program) for program in PROGRAMS),
        *(Path(name) for name in (sys.executable, sys.exec_prefix + "/pyvenv.cfg")),
    ]
    assert [path for path in needed if path.exists() and str(path)[1:] not in found] == []
    assert any(name.endswith("/libseccomp.so.2") for name in found)
    assert any(name.endswith("/pyroute2/__init__.py") for name in found)
    assert any("ld-linux" in name for name in found)
    assert found[f"{tmp_path}/pasta"[1:]].mode & 0o777 == 0o755
    assert sum(len(file.content) for file in found.values()) < 200 << 20


def test_times_of_files_are_kept() -> None:
    """Otherwise all of Python's library would be compiled again, by an emulated processor."""
    archive = b"".join(_cpio({"a": File(b"text", 0o100644, 0x12345678)}))
    assert archive[:6] == b"070701" and b"12345678" in archive[6:110]
