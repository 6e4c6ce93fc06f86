"""One target under atheris: `python -m fuzz.guided NAME [libFuzzer's arguments] DIRECTORY`.

Atheris instruments all modules of a package or names of modules that it leaves out. So everything is imported twice:
the first time to see what there is, the second time with all but the target's own modules left out.
"""

from __future__ import annotations

import sys

import atheris

from .table import BY_NAME

OURS = ("passt", "fuzz.targets", "tests")


def main() -> None:
    target = BY_NAME[sys.argv[1]]
    target.load()
    seen = [name for name in sys.modules if name.startswith(OURS)]
    for name in seen:
        del sys.modules[name]
    others = [name for name in seen if name.startswith("passt") and name not in target.modules]
    with atheris.instrument_imports(include=["passt"], exclude=others):
        one = target.load().one
    from passt import log

    log._level = log.ERR  # what is said of bad input is not the matter here
    atheris.Setup([sys.argv[0], *sys.argv[2:]], one, enable_python_coverage=True)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
