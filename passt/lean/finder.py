"""A finder that loads a submodule from its bytecode in few steps: it reads one file, and asks for the time of another.

The interpreter's own takes more system calls, and some 30 us more for each of the 200 modules of a start. All that is
not usual is left to it: top-level modules, extension modules, packages of several directories, bytecode that is
missing, older than its source, or checked in another way.
"""

from __future__ import annotations

import marshal
import sys
from _frozen_importlib_external import (  # type: ignore[attr-defined]
    MAGIC_NUMBER,
    SourceFileLoader,
    _pack_uint32,
    cache_from_source,
)
from _imp import _fix_co_filename  # type: ignore[attr-defined]
from posix import O_CLOEXEC, O_RDONLY, close, listdir, open, read, stat

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import CodeType, ModuleType
else:
    ModuleSpec = type(sys.__spec__)

BY_TIME = MAGIC_NUMBER + bytes(4)  # bytecode that is valid with one time of modification and one size of its source
_HEADER = 16
USUAL_PLACE, TAG = cache_from_source("stem.py").split("stem")  # "__pycache__/", ".cpython-311.pyc"
_SIZE_MAX = 1 << 16  # of a file: memory for more would be mapped and unmapped each time, at the cost of all the rest

_names: dict[str, tuple[frozenset[str], frozenset[str]]] = {}  # by directory: files, and the stems of extension modules


def install() -> None:
    """Ask this finder first from now on."""
    if Finder not in sys.meta_path and USUAL_PLACE == "__pycache__/":
        sys.meta_path.insert(0, Finder)


class Loader(SourceFileLoader):
    """The usual loader, with the code at hand for one execution."""

    def __init__(self, name: str, path: str, code: CodeType) -> None:
        super().__init__(name, path)
        self._code: CodeType | None = code

    def exec_module(self, module: ModuleType) -> None:
        code, self._code = self._code, None
        if code is None:
            super().exec_module(module)
        else:
            exec(code, vars(module))


class Finder:
    """A finder in the sense of sys.meta_path."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> ModuleSpec | None:
        """Where the submodule `name` of a package with this `path` is; None if another finder has to tell."""
        if type(path) is not list or len(path) != 1:
            return None
        directory, stem = path[0], name[name.rfind(".") + 1 :]
        files, extensions = _listed(directory)
        places = None
        if stem in files:
            directory = f"{directory}/{stem}"
            places, stem = [directory], "__init__"
            files, extensions = _listed(directory)
        source = f"{directory}/{stem}.py"
        if f"{stem}.py" not in files or stem in extensions:
            return None
        bytecode = f"{directory}/__pycache__/{stem}{TAG}"
        code = _code(source, bytecode)
        if code is None:
            return None
        spec = ModuleSpec(name, Loader(name, source, code), origin=source)
        spec.submodule_search_locations = places
        spec.has_location, spec.cached = True, bytecode
        return spec


def _listed(directory: str) -> tuple[frozenset[str], frozenset[str]]:
    """The contents of `directory` when they were asked for first: a file that is new is found by another finder."""
    found = _names.get(directory)
    if found is None:
        try:
            files = listdir(directory)
        except OSError:
            files = []
        stems = frozenset(file.partition(".")[0] for file in files if file.endswith(".so"))
        found = _names[directory] = frozenset(files), stems
    return found


def valid(source: str, bytecode: str) -> bytes | None:
    """The contents of the file `bytecode`, if it is valid for the file `source`."""
    try:
        fd = open(bytecode, O_RDONLY | O_CLOEXEC)
        try:
            data = read(fd, _SIZE_MAX)
        finally:
            close(fd)
        now = stat(source)
    except OSError:
        return None
    return data if data[:_HEADER] == BY_TIME + _pack_uint32(int(now.st_mtime)) + _pack_uint32(now.st_size) else None


def _code(source: str, bytecode: str) -> CodeType | None:
    """The code in the file `bytecode`, if it is valid for the file `source`."""
    data = valid(source, bytecode)
    if data is None:
        return None
    try:
        code: CodeType = marshal.loads(memoryview(data)[_HEADER:])
    except (EOFError, ValueError, TypeError):
        return None
    _fix_co_filename(code, source)  # bytecode may have been made elsewhere
    return code
