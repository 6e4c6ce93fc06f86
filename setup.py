"""The compiled build: with PASST_MYPYC=1 in the environment, mypyc makes extension modules of the modules below.

The source is the same, and stays beside them. It needs a C compiler and the headers of Python. PASST_OPT is the level
of optimization (2), PASST_JOBS the number of compilers that run at a time (one on each processor). Without
PASST_MYPYC, which is the default, nothing here takes effect, and pyproject.toml has all of the build.
"""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext

MYPYC = "mypy>=1.15"
NOT_COMPILING = {"egg_info", "dist_info", "sdist"}  # the steps of a build that describe it

# Those that run for each packet, connection or turn of the loop. Modules of the start and of rare events stay as they
# are: an extension module loads no faster. NumPy's and ctypes' work is none of Python's.
HOT = """
    addr icmp tap tcp udp
    flow/batch flow/context flow/half_open flow/idle flow/ip_fields flow/stats flow/table
    link/backend link/gso link/packet link/packet_socket link/plain_tap link/scattered link/stream_socket
    link/tap_device link/vector_sums link/verify link/vhost_user link/vring link/vring_in link/vring_out
    linux/accepting linux/tcpinfo
    loop/busy_poll loop/each loop/reactor loop/timers
    policy/forwarding policy/guest policy/lan policy/resolvers
    ports/listen
    splice/conn splice/pipes splice/tcp splice/udp
    tcp_engine/*
    udp_engine/*
    wire/checksum wire/ether wire/icmp wire/ip wire/tcp wire/udp wire/virtio
""".split()  # noqa: SIM905
AS_IT_IS = ("tcp_engine/pieces",)  # a class of it inherits a type of C


def sources() -> list[str]:
    """The paths of all modules in HOT."""
    package = Path("passt")
    left_out = {package / f"{name}.py" for name in AS_IT_IS}
    found = [path for pattern in HOT for path in sorted(package.glob(f"{pattern}.py"))]
    return [str(path) for path in found if path.name != "__init__.py" and path not in left_out]


class SideBySide(build_ext):
    """Compiles several files at a time."""

    def build_extension(self, ext) -> None:
        compiler, one = self.compiler, self.compiler.compile

        def compile(sources, **options):
            with ThreadPoolExecutor(int(os.environ.get("PASST_JOBS", os.cpu_count() or 1))) as pool:
                made = pool.map(lambda source: one([source], **options), sources)
                return [path for paths in made for path in paths]

        compiler.compile = compile
        try:
            super().build_extension(ext)
        finally:
            compiler.compile = one


def options() -> dict:
    """The arguments of setup()."""
    if not os.environ.get("PASST_MYPYC"):
        return {}
    if NOT_COMPILING & set(sys.argv):
        return {"setup_requires": [MYPYC]}
    from mypy.version import __version__ as version
    from mypyc.build import mypycify

    flags = ["--config-file=", "--strict", "--ignore-missing-imports", "--follow-imports=silent"]
    level = os.environ.get("PASST_OPT", "2")
    named = tuple(map(int, version.split(".")[:2])) >= (1, 18)  # older ones name the shared object by a digest
    name = {"group_name": "passt"} if named else {}
    modules = mypycify([*flags, *sources()], opt_level=level, multi_file=True, **name)
    return {"ext_modules": modules, "cmdclass": {"build_ext": SideBySide}}


setup(**options())
