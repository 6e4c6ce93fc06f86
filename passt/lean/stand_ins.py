"""Stand-ins: modules that a library names at its top, and that its parts which are used here need in name only.

    place          module                             instead of
    -------------  ---------------------------------  ------------------------------------------------------------------
    seccomp        ctypes.util                        a search for libraries by ldconfig(8) or a compiler
    linux.         pyroute2, pyroute2.config,         the whole library; multiprocessing, platform and what they load;
    rtnl_messages  ...ifinfmsg.plugins,               kinds of links;
                   logging, traceback, pkgutil        a text with source lines, which the sandbox cannot open

The library keeps its stand-ins. Other modules get the real ones.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any


def stand_in(name: str, **contents: Any) -> ModuleType:
    """A module with these contents."""
    made = ModuleType(name)
    vars(made).update(contents)
    return made


@contextmanager
def in_place(*modules: ModuleType) -> Iterator[None]:
    """Let each of `modules` be imported in place of the one with its name. Afterwards all is as before: a later import
    gets the real module. The package of a submodule should be loaded, or a stand-in as well.
    """
    before = {module.__name__: sys.modules.get(module.__name__) for module in modules}
    for module in modules:
        _put(module.__name__, module)
    try:
        yield
    finally:
        for name, original in before.items():
            _put(name, original)


def _put(name: str, module: ModuleType | None) -> None:
    """Make it the module `name`, and that attribute of its package, if that is loaded; None removes both."""
    package, _, attribute = name.rpartition(".")
    holder = vars(sys.modules[package]) if package in sys.modules else {}
    if module is None:
        sys.modules.pop(name, None)
        holder.pop(attribute, None)
    else:
        sys.modules[name] = holder[attribute] = module
