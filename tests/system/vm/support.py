"""Running passt on the host of the traffic tests, for a machine or for a client that speaks its protocol."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from bench import faulty_link

from ..support import DEADLINE, User, alive, wait_for
from ..traffic.support import AGENT_PYTHON, GATEWAY, GATEWAY6, HOST, HOST6, PEER, PEER6, Lan, Namespace, root_user

PASST = os.environ.get("PASST")  # another passt than ours, to try the tests themselves
_OURS = "import sys; from passt.__main__ import main; sys.exit(main(['passt', *sys.argv[1:]]))"
# Messages of passt about its clients
ACCEPTED = r"(?i)accepted connection"
GONE = r"Client connection closed|The guest.*, (waiting for another|exiting)"
START_DEADLINE = 10.0  # seconds to be ready, or to give up
LISTENS = 0x10000  # in the flags of /proc/net/unix: __SO_ACCEPTCON


def passt_command(user: User, *options: str, before: str = "") -> list[str]:
    """The command line that runs passt as `user`; `before` is Python to be executed first."""
    return user.command([*([PASST] if PASST else [user.python, "-c", before + _OURS]), *options])


def on_host(host: Namespace, user: User, *options: str, before: str = "") -> list[str]:
    """The same in the namespaces of `host`, to be executed by the test. Files are those of `host`."""
    return host.argv(passt_command(user, *options, before=before))


def seen_from_here(host: Namespace, path: Path | str) -> str:
    """The name by which the test finds a file of `host`."""
    return f"/proc/{host.pid}/root{path}"


def listens(host: Namespace, path: Path | str) -> bool:
    """Whether a UNIX socket listens at `path`; asked of the kernel, since to try would be to connect."""
    for line in Path(f"/proc/{host.pid}/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[7:] == [str(path)] and int(fields[3], 16) & LISTENS:
            return True
    return False


Done = subprocess.CompletedProcess[str]


def _without_syslog(said: str) -> str:
    """`said` without what the C original adds where there is no syslog."""
    return re.sub(r"Failed to send \d+ bytes to syslog\n", "", said)


def run(host: Namespace, user: User, *options: str, pass_fds: Sequence[int] = ()) -> Done:
    """passt to its end, or until it is in the background."""
    command = on_host(host, user, *options)
    done = subprocess.run(
        command, cwd="/", env=user.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        timeout=START_DEADLINE, pass_fds=pass_fds,
    )  # fmt: skip
    done.stderr = _without_syslog(done.stderr)
    return done


class Passt:
    """passt in the foreground, at a socket that listens, or on a descriptor."""

    def __init__(
        self, host: Namespace, user: User, options: Sequence[str], path: Path | None, fd: int = -1, before: str = ""
    ) -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with passt
        self.path = path
        where = ["-s", str(path)] if path else ["-F", str(fd)]
        pid = Path(f"/tmp/passt-test-{os.getpid()}-{time.monotonic_ns()}.pid")
        command = on_host(host, user, "-f", "-P", str(pid), *where, *options, before=before)
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command], cwd="/", env=user.env, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=self._stderr, pass_fds=(fd,) if fd >= 0 else (),
        )  # fmt: skip
        try:
            wait_for(lambda: not self.alive() or (pid.exists() and pid.read_text()), "passt is ready")
            assert self.alive(), f"passt ended with {self.process.returncode}: {self.said()}"
            assert pid.read_text() == f"{self.daemon}\n"
        except BaseException:
            self.kill()
            raise
        finally:
            pid.unlink(missing_ok=True)

    @property
    def daemon(self) -> int:
        """PID of passt."""
        return self.process.pid

    def alive(self) -> bool:
        """Whether passt still runs."""
        return self.process.poll() is None

    def said(self) -> str:
        """Output of passt on standard error so far."""
        said = os.pread(self._stderr.fileno(), 1 << 20, 0)  # its position in the file is passt's, too
        return _without_syslog(said.decode(errors="replace"))

    def count(self, pattern: str) -> int:
        """How often passt has said something that matches `pattern`."""
        return len(re.findall(pattern, self.said()))

    def expect(self, pattern: str, times: int = 1) -> None:
        """Wait until passt has said so many times what matches `pattern`."""
        wait_for(lambda: self.count(pattern) >= times, f"passt says {pattern!r} {times} times")

    def expect_end(self) -> None:
        """Wait for it to end by itself, with status 0."""
        status = self.process.wait(DEADLINE)
        assert status == 0, f"passt ended with {status}: {self.said()}"

    def kill(self) -> None:
        """End it at once."""
        self.process.kill()
        self.process.wait()
        self._stderr.close()

    def close(self) -> None:
        """End it as init would: with status 0, and no traceback to show."""
        if self.alive():
            self.process.send_signal(signal.SIGTERM)
        status, said = self.process.wait(DEADLINE), self.said()
        self._stderr.close()
        assert status == 0, f"passt ended with {status}: {said}"
        assert "Traceback" not in said, said


@contextlib.contextmanager
def passt(lan: Lan, user: User, *options: str, before: str = "") -> Iterator[Passt]:
    """passt with a socket in a directory of its own; `before` is Python to be executed first."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        if user.uid != os.geteuid():
            os.chown(name, user.uid, user.gid)
        made = Passt(lan.host, user, options, Path(name, "socket"), before=before)
        try:
            yield made
        except BaseException:
            print(made.said())
            made.kill()
            raise
        made.close()


@contextlib.contextmanager
def guest_behind(lan: Lan, server: Passt, mtu: int) -> Iterator[tuple[Namespace, str]]:
    """A namespace that is the guest of `server`, with both families and the host's own addresses, as a machine has
    them by DHCP; and the path of the rules of the link (`bench/faulty_link.py`), which has no faults at first.
    """
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        guest = Namespace(lan.host.argv(["unshare", "--net"]), root_user())
        stack.callback(guest.close)
        script = str(Path(faulty_link.__file__).resolve())
        command = [AGENT_PYTHON, script, str(server.path), "tap0", str(mtu), f"{folder}/rule"]
        stack.enter_context(guest.popen(*command))
        wait_for(lambda: all(Path(folder, f"rule.{way}").exists() for way in ("up", "down")), "the link is there")
        wait_for(lambda: "UP" in guest.run("ip", "link", "show", "tap0", check=False).stdout, "tap0 is up")
        for address, router in ((f"{HOST}/24", GATEWAY), (f"{HOST6}/64", GATEWAY6)):
            guest.run("ip", "address", "add", address, "dev", "tap0", *(["nodad"] if ":" in address else []))
            guest.run("ip", "route", "replace", "default", "via", router, "dev", "tap0")
        yield guest, f"{folder}/rule"


class Standing:
    """One passt for many tests, and another one after a test that it did not survive."""

    def __init__(self, lan: Lan, user: User, *options: str) -> None:
        self._start = functools.partial(passt, lan, user, *options)
        self._stack = contextlib.ExitStack()
        self._passt: Passt | None = None

    def passt(self) -> Passt:
        """The one that runs."""
        if self._passt is not None and not self._passt.alive():
            with contextlib.suppress(AssertionError):  # the test that ended it has failed for it
                self._stack.close()
            self._passt = None
        if self._passt is None:
            self._passt = self._stack.enter_context(self._start())
        return self._passt

    def close(self) -> None:
        """End it."""
        self._stack.close()


class Background:
    """passt in the background: the command, its end, and the daemon it leaves, which goes with the context."""

    def __init__(self, host: Namespace, user: User, *options: str, pass_fds: Sequence[int] = ()) -> None:
        path = f"/tmp/passt-test-{os.getpid()}.pid"
        self.done = run(host, user, "-P", path, *options, pass_fds=pass_fds)
        assert self.done.returncode == 0, self.done.stderr
        file = Path(seen_from_here(host, path))
        text = file.read_text()
        file.unlink()
        assert re.fullmatch(r"[1-9]\d*\n", text)
        self.pid = int(text)

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *exception: object) -> None:
        if alive(self.pid):
            os.kill(self.pid, signal.SIGTERM)
            wait_for(lambda: not alive(self.pid), "the daemon ends")


@contextlib.contextmanager
def name_server(lan: Lan) -> Iterator[None]:
    """A name server on the peer, at the port where guests look for one, that knows `name.test`."""
    records = ["--address=/name.test/192.0.2.77", "--address=/name.test/2001:db8::77"]
    flags = ["-k", "--no-resolv", "--no-hosts", "--no-daemon", "--bind-interfaces", "-u", "root", "-x", ""]
    at = [f"--listen-address={PEER}", f"--listen-address={PEER6}"]
    with lan.peer.popen("dnsmasq", *flags, *at, *records, stderr=subprocess.DEVNULL) as server:
        ask = ("dig", "+short", "+time=1", "+tries=1", f"@{PEER}", "name.test")
        wait_for(lambda: server.poll() is None and "192.0.2.77" in lan.peer.run(*ask, check=False).stdout, "dnsmasq")
        yield
