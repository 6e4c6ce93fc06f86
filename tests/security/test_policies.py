"""The AppArmor and SELinux policies in contrib/, compiled by the distributions' tools. Neither needs the kernel's part.

Their rules were derived from enforced runs (contrib/README.md). These tests check that they compile, as installed, that
they cover all commands, and that they agree with the steps of the sandbox.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from passt.sandbox import isolation

from ..system.support import REPOSITORY

APPARMOR = REPOSITORY / "contrib" / "apparmor"
SELINUX = REPOSITORY / "contrib" / "selinux"
ETC = Path("/etc/apparmor.d")
MAKEFILE = "/usr/share/selinux/devel/Makefile"
COMMANDS = {path.name for path in (REPOSITORY / "commands").iterdir()}

PROFILES = ["passt_python", "passt_repair_python", "pasta_python", "pesto_python", "qrap_python"]
# The relevant part of libvirt's profiles, by their names in Debian
MACHINE = """
include <tunables/global>
profile libvirt-machine flags=(attach_disconnected) {
  /usr/bin/passt Cx -> passt,
  profile passt {
    /usr/bin/passt r,
    include if exists <abstractions/passt>
  }
  include if exists <abstractions/libvirt-qemu.d>
}
profile libvirtd {
  /** rwmkl,
  /usr/bin/* PUx,
  include <abstractions/passt_python_libvirtd>
}
"""


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)


# AppArmor ------------------------------------------------------------------------------------------------------------


def knows_userns() -> bool:
    """Whether the parser is of AppArmor 4."""
    return (ETC / "abi" / "4.0").exists()


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """/etc/apparmor.d with the policy in it, as contrib/README.md says it is installed."""
    base = tmp_path / "apparmor.d"
    for name in ("abi", "abstractions", "tunables"):
        shutil.copytree(ETC / name, base / name, symlinks=True)
    for name in ("abstractions", "tunables"):
        shutil.copytree(APPARMOR / name, base / name, dirs_exist_ok=True)
    shutil.copy(APPARMOR / "passt_python", base)
    if not knows_userns():
        (base / "abstractions/passt_python.d/userns").unlink()
    return base


def compiled(base: Path, name: str) -> str:
    """The profile file `name` below `base` compiles; the names of the profiles in it."""
    for what in ("--skip-kernel-load", "--names"):
        done = run("apparmor_parser", "--skip-cache", what, "--base", base, base / name)
        assert done.returncode == 0, done.stderr
    return done.stdout


def site(base: Path, text: str) -> None:
    """An administrator's addition to where the commands are."""
    directory = base / "tunables" / "passt_python.d"
    directory.mkdir()
    (directory / "site").write_text(text)


PLACES = [
    "",
    "@{passt_python}+=/usr\n",
    "@{passt_python}+=@{HOME}/.local /srv/a/venv\n",
    "@{passt_python}+=/usr @{HOME}/.local\n",
]
PLACES_NAMES = ["as it is", "usr", "home and venv", "usr and home"]


@pytest.mark.parametrize("places", PLACES, ids=PLACES_NAMES)
def test_profiles_compile(installed: Path, places: str) -> None:
    site(installed, places)
    assert compiled(installed, "passt_python").split() == PROFILES


@pytest.mark.parametrize("places", PLACES, ids=PLACES_NAMES)
def test_profiles_of_libvirt_compile_with_ours(installed: Path, places: str) -> None:
    """Two rules of the same rank for one path would make the profiles of all machines invalid, or the daemon's."""
    site(installed, places)
    (installed / "machine").write_text(MACHINE)
    assert compiled(installed, "machine").split() == ["libvirt-machine", "libvirt-machine//passt", "libvirtd"]


def test_the_childs_profile_in_libvirt_can_be_ours(installed: Path) -> None:
    (installed / "machine").write_text(MACHINE)
    abstraction = installed / "abstractions" / "passt"
    abstraction.unlink(missing_ok=True)  # the C program's
    abstraction.symlink_to("passt_python")
    compiled(installed, "machine")


def test_profile_that_only_allows_user_namespaces_compiles(installed: Path) -> None:
    """A parser before AppArmor 4 has to take the rest of it."""
    text = (APPARMOR / "unconfined" / "passt_python").read_text()
    userns = (APPARMOR / "abstractions/passt_python.d/userns").read_text()
    assert "\n  userns,\n" in text and "\n  userns,\n" in userns
    if not knows_userns():
        text = text.replace("abi/4.0", "abi/3.0").replace("  userns,\n", "  capability sys_admin,\n")
    (installed / "passt_python").write_text(text)
    assert compiled(installed, "passt_python").split() == ["passt_python"]


def test_a_mistake_would_be_noticed(installed: Path) -> None:
    path = installed / "abstractions" / "passt_python"
    path.write_text(path.read_text() + "  capability net_bind_servce,\n")
    done = run("apparmor_parser", "--skip-cache", "--skip-kernel-load", "--base", installed, installed / "passt_python")
    assert done.returncode != 0


def test_all_commands_have_a_profile() -> None:
    attached = re.findall(r"^profile \S+ @\{passt_python\}/bin/(\S+)", (APPARMOR / "passt_python").read_text(), re.M)
    assert {name for glob in attached for name in glob.strip("{}").split(",")} == COMMANDS


def test_empty_root_may_be_where_the_sandbox_wants_it() -> None:
    text = (APPARMOR / "abstractions" / "passt_python").read_text()
    places = {place.strip("/") for place in isolation.MOUNT_POINTS}
    for rule in (
        r"mount fstype=tmpfs .*-> /\{,(.*)\},",
        r"pivot_root oldroot=/\{(.*?)\}/",
        r"pivot_root .* /\{([^{]*)\}/,",
        r"mount options=\(rw, move\) /\{(.*)\}/ -> /,",
    ):
        found = re.search(rule, text)
        assert found and {place.strip("/") for place in found[1].split(",")} == places, rule


# SELinux -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Path:
    """A directory to compile in."""
    for suffix in ("te", "if", "fc"):
        shutil.copy(SELINUX / f"passt_python.{suffix}", tmp_path)
    return tmp_path


def make(directory: Path, target: str) -> subprocess.CompletedProcess[str]:
    return run("make", "-f", MAKEFILE, target, cwd=directory)


def test_module_compiles(module: Path) -> None:
    done = make(module, "passt_python.pp")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (module / "passt_python.pp").stat().st_size > 0


def test_interfaces_compile_in_other_modules(module: Path) -> None:
    text = (module / "passt_python.if").read_text()
    names = re.findall(r"^interface\(`(\w+)'", text, re.M)
    with_role = {name for name in names if name.endswith("_run")}
    calls = [f"{name}(caller_t, caller_r)" if name in with_role else f"{name}(caller_t)" for name in names]
    lines = ["policy_module(caller, 1.0)", "type caller_t;", "domain_type(caller_t)", "role caller_r;", *calls]
    (module / "caller.te").write_text("\n".join(lines) + "\n")
    done = make(module, "caller.pp")
    assert done.returncode == 0, done.stdout + done.stderr
    expanded = (module / "tmp" / "caller.tmp").read_text()
    assert [name for name in names if f"{name}(" in re.sub("#.*", "", expanded)] == []


def test_a_mistake_in_the_module_would_be_noticed(module: Path) -> None:
    with (module / "passt_python.te").open("a") as f:
        f.write("allow passt_python_t self:tcp_socket no_such_permission;\n")
    assert make(module, "passt_python.pp").returncode != 0


CONTEXTS = {
    "/usr/local/bin/passt": "passt_python_exec_t",
    "/usr/local/bin/pasta": "pasta_python_exec_t",
    "/usr/local/bin/passt4netns": "pasta_python_exec_t",
    "/usr/local/bin/slirp4netns": "pasta_python_exec_t",
    "/opt/passt/bin/passt": "passt_python_exec_t",
    "/opt/x/venv/bin/pasta": "pasta_python_exec_t",
    "/opt/passt/lib/python3.11/site-packages/numpy/x.so": "lib_t",
    "/usr/local/lib/python3.13/dist-packages/passt/cli.py": "lib_t",
    "/run/passt/vm.sock": "passt_python_runtime_t",
    "/run/pasta/blue.pid": "passt_python_runtime_t",
    "/var/log/passt/vm.log": "passt_python_log_t",
    "/usr/bin/passt": None,
    "/opt/passt/bin/pip": None,
    "/usr/local/bin/passt.avx2": None,
}


@pytest.mark.parametrize("path", CONTEXTS)
def test_file_contexts(path: str) -> None:
    lines = re.findall(
        r"^(/\S+)\s.*gen_context\(system_u:object_r:(\w+),", (SELINUX / "passt_python.fc").read_text(), re.M
    )
    assert {kind for pattern, kind in lines if re.fullmatch(pattern, path)} == {CONTEXTS[path]} - {None}
