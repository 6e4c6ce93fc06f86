"""Handlers need no system call that the sandbox denies, in either build. A handler that does is detected.

A daemon with every option gets traffic until all handlers that it reports have run in its sandbox (`informer.py`,
`visitors.py`): unchanged, with handlers that fail, without descriptors, and with every kind of end. Then each handler,
one after the other, makes a call that no module declares, which must end the daemon. `inmates.py` has the rest.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from passt import PASST, PASTA

from ..system.support import REPOSITORY, TREE, User
from ..system.traffic.support import Lan, new_lan, root_user
from .visitors import AT_END, LOG_SIZE, SHARING, Inmate, Prison, stay

pytestmark = pytest.mark.timeout(900)  # a way of a daemon takes seconds, and up to DEADLINE on a busy machine

WAYS = {
    PASTA: ("plain", "faulty", "starved", "leaving", "polling", "named", "given", "spawning"),
    PASST: ("plain", "faulty", "starved", *SHARING),
}
# The deletion of a tap that root's pasta has made: it ends the daemon with status 1 (tests/system/test_attach.py)
TAP_LOST = "passt.daemon.pasta.tap_lost"
# Handlers that never run: a machine has no tap device, and no loopback to splice to
NEVER = {
    PASTA: frozenset((TAP_LOST,)),
    PASST: frozenset(
        (
            "passt.link.tap_device.TapLink.readable",
            "passt.splice.lingering.Lingering._look",
            "passt.splice.tcp.TcpSplice.fault",
            "passt.splice.tcp.TcpSplice.sock_handler",
            "passt.splice.udp.UdpSplice.fault",
            "passt.splice.udp.UdpSplice.sock_handler",
        )
    ),
}
ENDING = "passt.daemon.common.End."
AFTER_FAULT = ".fault", "passt.flow.spare.Spare._resume"
TAP_GONE = "passt.daemon.pasta.tap_gone"  # of a given tap
# Handlers that run under conditions that no visitor makes. They call what others call, which do run
LATER = frozenset(
    (
        "passt.splice.refusal.Refusals._resume",  # a second after a refusal: connect(2), as the refusal itself
        "passt.tcp_engine.wheel.Wheel._turn",  # with thousands of connections: that of `Deadlines._look`
        "passt.tcp_engine.reminders.Reminders.timer_handler",  # after a lost frame: sends to the guest
        "passt.tcp_engine.turns.Turns._pause_over",  # of bulk beside an answer that is overdue: asks for the next turn
        "passt.tcp_engine.pace.Pace._over",  # of bulk of the guest beside messages: acknowledges it
        "passt.igmp.Igmp._fired",  # after minutes: sends to the guest, and leaves groups as a report of it does
    )
)
EVERY = 10 if TREE else 5  # handler is tried where the filter is the same as elsewhere
ATTEMPTS = 4
FAULTS = "Handling ", "A request to the control socket failed", "In the network namespace", "The loop failed"


@dataclass
class Record:
    """The state of the handlers of a mode, for a user."""

    prison: Prison
    known: set[str] = field(default_factory=set)
    ran: dict[str, tuple[str, str]] = field(default_factory=dict)  # in which way, by which visit
    statuses: dict[str, int | None] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def never(self) -> frozenset[str]:
        """Handlers that do not run for the mode and the user."""
        never = NEVER[self.prison.mode] | LATER
        return never | {"passt.daemon.pasta.reopen"} if self.prison.user.is_root else never

    def visit(self, way: str) -> None:
        inmate = stay(self.prison, way, lambda inmate: not self._missing(way, inmate))
        self.known |= inmate.known
        for name, visit in inmate.ran.items():
            self.ran.setdefault(name, (way, visit))
        self.statuses[way] = inmate.status
        self.faults += inmate.faults

    def _missing(self, way: str, inmate: Inmate) -> set[str]:
        """Handlers that must run before the end of a way."""
        names = inmate.known - inmate.ran.keys() - self.never
        missing = {name for name in names if not name.startswith(ENDING)}
        afterwards = {name for name in missing if name.endswith(AFTER_FAULT)}
        first, left = missing - afterwards - {TAP_GONE}, missing - self.ran.keys()
        return {"plain": first, "faulty": afterwards, "given": names, "sharing": left}.get(way, set())


@pytest.fixture(scope="module", params=["user"] if TREE else ["user", "root"])
def someone(request: pytest.FixtureRequest) -> User:
    """Root is tried with one build."""
    user: User = request.getfixturevalue("ordinary_user" if request.param == "user" else "root")
    return user


@pytest.fixture(scope="module")
def lan() -> Iterator[Lan]:
    """A laboratory."""
    with new_lan(root_user()) as made:
        yield made


@pytest.fixture(scope="module", params=[PASTA, PASST])
def record(request: pytest.FixtureRequest, lan: Lan, someone: User) -> Iterator[Record]:
    """All handlers, and in which way each of them ran."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, someone.uid, someone.gid)
        os.chmod(name, 0o711)  # the command of a root that became nobody passes
        prison = Prison(lan, someone, request.param, Path(name))
        try:
            found = Record(prison)
            for way in WAYS[request.param]:
                found.visit(way)
            yield found
        finally:
            prison.close()


def test_every_handler_runs(record: Record) -> None:
    said = record.prison.complaints()
    assert record.statuses == dict.fromkeys(WAYS[record.prison.mode], 0), said[-3000:]
    assert record.known - record.ran.keys() - record.never == set()
    assert record.faults == []
    faults = [line for line in said.splitlines() if any(text in line for text in FAULTS)]
    assert [line for line in faults if "Staged(" not in line] == []
    log = (record.prison.directory / "plain").read_bytes()
    assert LOG_SIZE // 2 < len(log) <= LOG_SIZE, "it has rotated"


def test_every_handler_is_held(record: Record) -> None:
    """No handler can make an undeclared call. Root, and the compiled build, have the same filter: a few are enough.

    A handler that waits for a timer may not run in time on a busy machine: the daemon then ends as usual, status 0.
    """
    statuses = {}
    chosen = sorted(record.ran.keys() - LATER)[:: EVERY if TREE or record.prison.user.is_root else 1]
    for name in chosen:
        way, visit = record.ran[name]
        for _ in range(ATTEMPTS):
            inmate = stay(record.prison, way, lambda _, visit=visit: visit == AT_END, name, visit)  # type: ignore[misc]
            statuses[name] = inmate.status
            if inmate.status != 0:
                break
    others = {name: status for name, status in statuses.items() if status != -signal.SIGSYS}
    assert others == {}, record.prison.complaints()[-3000:]


@pytest.mark.skipif(bool(TREE), reason="fakes cannot inherit from compiled classes")
@pytest.mark.parametrize("mode", [PASTA, PASST])
def test_error_paths_and_log_lines(anyone: User, mode: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        os.chown(directory, anyone.uid, anyone.gid)
        log = Path(directory) / "log"
        command = anyone.command([anyone.python, "-m", "tests.security.inmates", mode, str(log)])
        done = subprocess.run(
            command, cwd=REPOSITORY, env=anyone.env, capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert int(done.stdout) > 1000
        text = log.read_text()
    assert text.count("\n") > 1000
    for line in ("(TCP connection): ", "(UDP flow): ", "opened", "closed: "):
        assert line in text
