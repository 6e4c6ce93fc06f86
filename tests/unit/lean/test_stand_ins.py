"""Stand-ins are imported in place of other modules for a while, and leave nothing behind."""

from __future__ import annotations

import sys
from importlib import import_module

import pytest

from passt.lean.stand_ins import in_place, stand_in


def test_stand_in_is_imported() -> None:
    with in_place(stand_in("colorsys", answer=42)):
        from colorsys import answer  # type: ignore[attr-defined]
    assert answer == 42


@pytest.mark.parametrize("loaded", [False, True])
def test_afterwards_a_module_is_what_it_was(loaded: bool) -> None:
    import xml.dom

    sys.modules.pop("xml.dom.minidom", None)
    vars(xml.dom).pop("minidom", None)
    before = import_module("xml.dom.minidom") if loaded else None
    with in_place(stand_in("xml.dom.minidom")):
        assert not hasattr(xml.dom.minidom, "parse")
    assert sys.modules.get("xml.dom.minidom") is before
    assert getattr(xml.dom, "minidom", None) is before
    assert hasattr(import_module("xml.dom.minidom"), "parse")


def test_package_and_submodule_stand_in_together() -> None:
    package = stand_in("passt_pretended", __path__=[])
    with in_place(package, stand_in("passt_pretended.part", answer=42)):
        from passt_pretended import part  # type: ignore[import-not-found]
    assert part.answer == 42
    assert not {"passt_pretended", "passt_pretended.part"} & set(sys.modules)
