"""Both builds say which they are."""

from __future__ import annotations

import pytest

from passt import addr
from passt.conf import build


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("/x/passt/addr.py", "In pure Python. "),
        ("/x/passt/addr.cpython-313-x86_64-linux-gnu.so", "Compiled from Python. "),
    ],
)
def test_the_build_shows_by_the_file_of_a_compiled_module(
    monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    monkeypatch.setattr(addr, "__file__", file)
    assert build.description().startswith(said)
    assert build.is_compiled() == said.startswith("Compiled")
