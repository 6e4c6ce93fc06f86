"""The installed commands: isolated from the caller's Python settings, by whatever path they are executed."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from passt import __version__

from ..system.support import DEBIAN_PYTHON, REPOSITORY

SOURCE = REPOSITORY / "commands"
NAMES = sorted(path.name for path in SOURCE.iterdir())
INSTALLED = Path(sysconfig.get_path("scripts"))
SAID = {"pasta": "pasta", "passt4netns": "pasta", "passt": "passt", "pesto": "pesto"}
PATH = "/usr/bin:/bin"
VERSION = "import sys; print('%d.%d' % sys.version_info[:2])"


@pytest.fixture(scope="module")
def commands() -> Path:
    """The folder with the commands of this source tree."""
    for name in NAMES:
        installed = INSTALLED / name
        assert installed.read_text() == (SOURCE / "pasta").read_text(), f"{installed} is another one: scripts/setup"
    return INSTALLED


def run(*argv: str | Path, cwd: Path | str = "/", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, cwd=cwd, env={"PATH": PATH, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def test_commands_are_one_file() -> None:
    assert NAMES == ["passt", "passt-repair", "passt4netns", "pasta", "pesto", "qrap", "slirp4netns"]
    assert {(SOURCE / name).resolve() for name in NAMES} == {SOURCE / "pasta"}


@pytest.mark.parametrize("name", SAID)
def test_version(commands: Path, name: str) -> None:
    done = run(commands / name, "--version")
    assert (done.returncode, done.stdout.splitlines()[0], done.stderr) == (0, f"{SAID[name]} {__version__}", "")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with modules that end the program when they are imported."""
    folder = tmp_path_factory.mktemp("modules")
    for name in ("socket", "os", "re", "signal", "passt", "site", "sitecustomize", "usercustomize", "encodings"):
        (folder / f"{name}.py").write_text(f"raise SystemExit('the caller has a {name}.py')\n")
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_variables_of_python_have_no_effect(commands: Path, hostile: Path, name: str) -> None:
    variables = {
        "PYTHONHOME": "/nonexistent", "PYTHONPATH": str(hostile), "PYTHONSTARTUP": str(hostile / "os.py"),
        "PYTHONHASHSEED": "7", "PYTHONDEVMODE": "1", "PYTHONINSPECT": "1", "PYTHONUNBUFFERED": "1",
        "PYTHONWARNINGS": "error", "PYTHONPLATLIBDIR": "none", "PYTHONPROFILEIMPORTTIME": "1", "PYTHONDUMPREFS": "1",
        "PYTHONUSERBASE": str(hostile), "PYTHONEXECUTABLE": "/bin/false", "PYTHONVERBOSE": "1",
    }  # fmt: skip
    done = run(commands / name, "--help", cwd=hostile, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Usage: ")


def test_hash_key_is_random(commands: Path) -> None:
    """Without a second start: the interpreter does not see the variable."""
    code = "import sys; sys.argv[0] = 'pasta'; from passt import cli; cli._want_random_hashes(); print('ok')"
    command = [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(REPOSITORY)!r}); {code}"]
    assert run(*command, PYTHONHASHSEED="0").stdout == "ok\n"


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("path", ["/proc/self/fd/{}", "/dev/fd/{}"])
def test_by_descriptor(commands: Path, name: str, path: str) -> None:
    with open(commands / name) as f:
        for argv in ([path.format(f.fileno())], [sys.executable, path.format(f.fileno())]):
            done = subprocess.run(
                [*argv, "--version"], pass_fds=[f.fileno()], capture_output=True, text=True, timeout=60, check=False
            )
            assert (done.stderr, done.stdout.splitlines()[:1]) == ("", [f"{SAID[name]} {__version__}"])


@pytest.mark.parametrize("name", SAID)
def test_by_execveat(commands: Path, name: str) -> None:
    """fexecve(3), with an argv that says nothing."""
    code = "import os, sys; fd = os.open(sys.argv[1], os.O_RDONLY); os.set_inheritable(fd, True); "
    code += "os.execve(fd, ['x', '--version'], os.environ)"
    assert run(sys.executable, "-c", code, commands / name).stdout.startswith(f"{SAID[name]} {__version__}\n")


@pytest.mark.parametrize(
    ("link", "to", "said"),
    [
        ("pasta", "passt", "pasta"), ("passt", "pasta", "passt"), ("passt.avx2", "passt", "passt"),
        ("tap", "passt", "passt"), ("net", "pasta", "pasta"), ("control", "pesto", "pesto"),
    ],
)  # fmt: skip
def test_by_link(commands: Path, tmp_path: Path, link: str, to: str, said: str) -> None:
    """A name that says which program it is, else that of the file behind it. The interpreter is beside that file."""
    (tmp_path / "python3").symlink_to("/bin/false")
    (tmp_path / link).symlink_to(commands / to)
    assert run(tmp_path / link, "--version").stdout.startswith(f"{said} {__version__}\n")


def test_name_of_the_process() -> None:
    code = "from passt import launch; launch._show('passt-test'); print(open('/proc/self/comm').read(), end='')"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout == "passt-test\n"


@pytest.mark.parametrize("name", ["pasta", "passt", "pesto"])
def test_first_line_that_names_the_interpreter(commands: Path, hostile: Path, name: str) -> None:
    """As policies need it (contrib/README.md). The file lies beside the others: packages are found from there."""
    command = commands / f"{name}-test"
    text = (SOURCE / "pasta").read_text().partition("\n")[2]
    try:
        command.write_text(f"#!{commands}/python3 -IS\n{text}")
        command.chmod(0o755)
        done = run(command, "--version", PYTHONHOME="/nonexistent", PYTHONPATH=str(hostile))
        assert (done.stdout.splitlines()[:1], done.stderr) == ([f"{name} {__version__}"], "")
    finally:
        command.unlink()


def test_package_that_is_not_there(tmp_path: Path) -> None:
    """A copy without its package: one line."""
    command = tmp_path / "bin" / "pasta"
    command.parent.mkdir()
    command.write_text((SOURCE / "pasta").read_text())
    command.chmod(0o755)
    (command.parent / "python3").symlink_to("/usr/bin/python3")
    done = run(command, "--version")
    if done.returncode == 0:
        pytest.skip("passt is installed for /usr/bin/python3")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "has no package passt: install it for this Python" in done.stderr


@pytest.fixture
def launched(tmp_path: Path) -> Path:
    """A copy of the commands, whose package is a folder without modules beside them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    shutil.copytree(SOURCE, folder, symlinks=True, dirs_exist_ok=True)
    (folder / "python3").symlink_to(DEBIAN_PYTHON)
    version = subprocess.run([DEBIAN_PYTHON, "-c", VERSION], capture_output=True, text=True, check=True).stdout.strip()
    (tmp_path / "lib" / f"python{version}" / "site-packages" / "passt").mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_interrupted_while_modules_are_loaded(launched: Path, name: str) -> None:
    """No traceback, and the parent sees the signal; unless the caller ignores interrupts."""
    (package,) = launched.parent.glob("lib/*/site-packages/passt")
    (package / "launch.py").write_text("import os, signal\nos.kill(0, signal.SIGINT)\nmain = lambda: 7\n")
    for prepare, status in ((None, -signal.SIGINT), (lambda: signal.signal(signal.SIGINT, signal.SIG_IGN), 7)):
        done = subprocess.run(
            [launched / name], preexec_fn=prepare, start_new_session=True, capture_output=True, text=True, timeout=60,
            check=False,
        )  # fmt: skip
        assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


# The command in the namespace ----------------------------------------------------------------------------------------

ODD = {
    "PYTHONHOME": "/nonexistent", "PYTHONPATH": "/x", "PYTHONHASHSEED": "7", "PYTHONINSPECT": "1",
    "BASH_FUNC_f%%": "() {  echo \"a\tb\\\";\n}", "a.b": "c$\n", "1": "2", "PASST_ENVIRON": "mine",
}  # fmt: skip


def usable() -> bool:
    """Whether this user may have a namespace of its own."""
    return subprocess.run(["unshare", "--user", "--net", "true"], capture_output=True, check=False).returncode == 0


SHELLS = ["dash", "bash", "bash --posix", "busybox sh"]


@pytest.mark.parametrize("shell", SHELLS)
def test_any_shell_is_silent(commands: Path, shell: str) -> None:
    """/bin/sh is bash on Fedora, Arch and openSUSE, and busybox on Alpine."""
    if not shutil.which(shell.split()[0]):
        pytest.skip(f"{shell} is missing")
    odd = {"PWD": "/", "SHLVL": "2", "BASH_FUNC_f%%": "() {  echo $;\n}", "a.b": "c$\n", "1": "2"}
    done = run(*shell.split(), commands / "pasta", "--version", **odd)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("more", [{}, {"PWD": "/elsewhere", "SHLVL": "5", "_": "x", "OLDPWD": "/y", "LC_CTYPE": "C"}])
def test_command_has_the_variables_of_the_caller(commands: Path, more: dict[str, str], shell: str) -> None:
    if not usable() or not shutil.which(shell.split()[0]):
        pytest.skip("needs namespaces, and that shell")
    env = {"PATH": PATH, **ODD, **more}
    command = [*shell.split(), commands / "pasta", "-q", "--splice-only", "--", "env", "-0"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert dict(entry.split("=", 1) for entry in done.stdout.split("\0")[:-1]) == env, done.stderr


OF_LIBC = 1 << 31 | 1 << 32  # glibc's own signals, 32 and 33: a make(1) that uses posix_spawn(3) leaves them ignored
IGNORED = signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGXFSZ


@pytest.mark.parametrize("numbers", [(), *((number,) for number in IGNORED), (*IGNORED, signal.SIGCHLD)])
def test_command_has_the_signals_of_the_caller(commands: Path, numbers: tuple[int, ...]) -> None:
    """All but an ignored SIGCHLD, with which no program could wait for its children; nor does it disturb the start."""
    if not usable():
        pytest.skip("needs namespaces")

    def prepare() -> None:
        for number in (*IGNORED, signal.SIGCHLD):
            signal.signal(number, signal.SIG_IGN if number in numbers else signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, signal.SIGUSR2, signal.SIGTERM})

    command = [commands / "pasta", "-q", "--splice-only", "--", "grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]
    done = subprocess.run(
        command, preexec_fn=prepare, restore_signals=False, capture_output=True, text=True, timeout=60, check=False
    )
    lines = dict(line.split() for line in done.stdout.splitlines())
    ignored, blocked = (int(lines[name], 16) for name in ("SigIgn:", "SigBlk:"))
    ignored &= ~OF_LIBC
    assert ignored == sum(1 << number - 1 for number in numbers if number != signal.SIGCHLD), done.stderr
    assert blocked in (0, 1 << signal.SIGUSR2 - 1 | 1 << signal.SIGTERM - 1)  # some shells unblock all


def test_daemon_ends_by_a_signal_that_the_caller_ignored_and_blocked(commands: Path, tmp_path: Path) -> None:
    def prepare() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGCHLD})

    command = [commands / "passt", "-f", "-s", tmp_path / "s", "-P", tmp_path / "pid"]
    process = subprocess.Popen(
        command,
        preexec_fn=prepare,  # noqa: PLW1509  # no other thread runs
        restore_signals=False,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if "You can now start qemu" in line:
            break
    comm = Path(f"/proc/{process.pid}/comm").read_text()
    process.send_signal(signal.SIGTERM)
    try:
        assert (process.wait(10), comm) == (0, "passt\n"), lines
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
