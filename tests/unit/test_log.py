"""Messages: levels, targets, rate limits."""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

import pytest

from passt import NEVER, __version__, log
from passt.log_file import LogFile, opened


@pytest.fixture
def stderr(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """The file that stands for standard error; the module as it is at start."""
    path = tmp_path / "stderr"
    with path.open("w") as f:
        set_up(monkeypatch, f)
        yield path


def set_up(monkeypatch: pytest.MonkeyPatch, stderr: TextIO | None) -> None:
    start = {
        "_level": log.INFO,
        "_ident": "pasta",
        "_stderr": stderr,
        "_stderr_level": log.TRACE,
        "_timestamps": False,
        "_as_json": None,
        "_syslog": None,
        "_in_journal": False,
        "_file": None,
    }
    rate_limits = {"_held": {}, "_flush_at": NEVER, "on_held": None}
    for name, value in {**start, "debug_on": False, "trace_on": False, **rate_limits}.items():
        monkeypatch.setattr(log, name, value)


def say_everything() -> None:
    for say in (log.err, log.warn, log.info, log.debug, log.trace):
        say(say.__name__)


@pytest.mark.parametrize(
    ("level", "said"),
    [
        (log.ERR, ["err"]),
        (log.WARNING, ["err", "warn"]),
        (log.INFO, ["err", "warn", "info"]),
        (log.DEBUG, ["err", "warn", "info", "debug"]),
        (log.TRACE, ["err", "warn", "info", "debug", "trace"]),
    ],
)
def test_levels(stderr: Path, level: int, said: list[str]) -> None:
    log.setup("pasta", level, syslog=False)
    say_everything()
    assert [line.split()[-1] for line in stderr.read_text().splitlines()] == said
    assert (log.debug_on, log.trace_on) == (level >= log.DEBUG, level >= log.TRACE)


def test_before_setup(stderr: Path) -> None:
    say_everything()
    assert stderr.read_text() == "err\nwarn\ninfo\n"


def test_debug_has_the_time(stderr: Path) -> None:
    log.setup("pasta", log.DEBUG, syslog=True)
    log.info("text")
    assert re.fullmatch(r"\d+\.\d{4}: text\n", stderr.read_text())
    assert log._syslog is None  # and nothing goes to syslog


def test_stderr_left(stderr: Path) -> None:
    log.stop_stderr()
    log.err("nobody hears")
    assert stderr.read_text() == ""


def test_stderr_shared_with_a_command(stderr: Path) -> None:
    log.quiet_stderr()
    say_everything()
    assert stderr.read_text() == "err\nwarn\n"


def test_stderr_again(monkeypatch: pytest.MonkeyPatch, stderr: Path, tmp_path: Path) -> None:
    log.stop_stderr()
    with (tmp_path / "again").open("w") as f:
        monkeypatch.setattr(sys, "stderr", f)
        log.start_stderr()
        log.err("why it ended")
    assert (tmp_path / "again").read_text() == "why it ended\n"
    assert stderr.read_text() == ""


def test_no_stderr_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    set_up(monkeypatch, None)
    log.err("nobody hears")


def test_broken_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that went away does not take the program with it: Python ignores SIGPIPE, EPIPE is swallowed."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as f:
        set_up(monkeypatch, f)
        log.err("nobody hears")


def test_any_text(stderr: Path) -> None:
    log.err("name \udcff")
    assert stderr.read_text() == "name \\udcff\n"


# syslog ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def syslog(monkeypatch: pytest.MonkeyPatch, stderr: Path) -> Iterator[socket.socket]:
    """The daemon's end of a connected syslog socket."""
    daemon, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    daemon.setblocking(False)
    ours.setblocking(False)
    monkeypatch.setattr(log, "_open_syslog", lambda: ours)
    with daemon, ours:
        yield daemon


def test_syslog(syslog: socket.socket, stderr: Path) -> None:
    log.setup("passt", log.INFO, syslog=True)
    log.err("bad")
    log.warn("odd")
    log.info("fine")
    assert [syslog.recv(100) for _ in range(3)] == [b"<3> passt: bad", b"<4> passt: odd", b"<6> passt: fine"]
    assert stderr.read_text() == "bad\nodd\nfine\n"


def test_journal_has_a_line_once(syslog: socket.socket, stderr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error leads there, and so does syslog: that is used when the daemon has no standard error any more."""
    status = stderr.stat()
    monkeypatch.setenv("JOURNAL_STREAM", f"{status.st_dev}:{status.st_ino}")
    log.setup("passt", log.INFO, syslog=True)
    log.info("starting")
    log.stop_stderr()
    log.info("running")
    assert stderr.read_text() == "starting\n"
    assert syslog.recv(100) == b"<6> passt: running"


def test_stream_that_was_the_journal(syslog: socket.socket, stderr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A service that starts us may have redirected it, and left the variable."""
    monkeypatch.setenv("JOURNAL_STREAM", "8:1")
    log.setup("passt", log.INFO, syslog=True)
    log.info("starting")
    assert syslog.recv(100) == b"<6> passt: starting"


def test_syslog_that_stalls(syslog: socket.socket) -> None:
    """A full queue loses lines; it does not stop us."""
    log.setup("passt", log.INFO, syslog=True)
    for _ in range(5000):
        log.err("again")
    assert syslog.recv(100) == b"<3> passt: again"


def test_syslog_that_went_away(syslog: socket.socket) -> None:
    log.setup("passt", log.INFO, syslog=True)
    syslog.close()
    log.err("nobody hears")


def test_no_syslog_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(socket.socket):
        def connect(self, address: object) -> None:
            assert address == "/dev/log"
            raise ConnectionRefusedError

    monkeypatch.setattr(socket, "socket", Refused)
    assert log._open_syslog() is None


# Log file ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def log_file(stderr: Path, tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "log"
    if log._file is not None:
        log._file.close()


def test_log_file(log_file: Path, stderr: Path) -> None:
    log_file.write_text("of the run before\n")
    log.setup("pasta", log.DEBUG, syslog=True, file=opened("pasta", str(log_file)))
    say_everything()
    first, *lines = log_file.read_text().splitlines()
    assert re.fullmatch(rf"pasta \S+: {re.escape(sys.executable)} \({os.getpid()}\)", first)
    assert all(re.match(r"\d+\.\d{4}: ", line) for line in lines)
    assert [line.split(": ", 1)[1] for line in lines] == [
        "ERROR:   err",
        "WARNING: warn",
        "info:    info",
        f"{'':9}debug",
    ]
    assert len(stderr.read_text().splitlines()) == 4
    assert log._syslog is None, "a file takes the place of syslog"


def test_lines_of_json(log_file: Path, stderr: Path) -> None:
    log.setup("pasta", log.DEBUG, syslog=False, file=opened("pasta", str(log_file), as_json=True), as_json=True)
    said = 'quotes ", a newline \n, \u2192, and a byte that is no UTF-8: \udcff'
    begin = datetime.datetime.now(datetime.UTC)
    log.warn(said)
    log.debug("more")
    header, *lines = map(json.loads, log_file.read_text().splitlines())
    assert header == {"program": "pasta", "version": __version__, "python": sys.executable, "pid": os.getpid()}
    times = [datetime.datetime.fromisoformat(line.pop("time")) for line in lines]
    assert begin <= times[0] <= times[1] <= datetime.datetime.now(datetime.UTC)
    assert lines == [
        {"level": "warning", "program": "pasta", "message": said},
        {"level": "debug", "program": "pasta", "message": "more"},
    ]
    assert [json.loads(line)["message"] for line in stderr.read_text().splitlines()] == [said, "more"]


def test_log_file_is_private(log_file: Path) -> None:
    log.setup("pasta", log.INFO, syslog=False, file=opened("pasta", str(log_file)))
    assert log_file.stat().st_mode & 0o777 == 0o600


def test_log_file_that_cannot_be_opened(stderr: Path, tmp_path: Path) -> None:
    with pytest.raises(log.Fatal, match=r"^Couldn't open log file .*/no/log: No such file or directory$"):
        opened("pasta", str(tmp_path / "no" / "log"))


def test_full_disk(stderr: Path, log_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log.setup("pasta", log.INFO, syslog=False, file=opened("pasta", str(log_file)))

    def full(_: LogFile, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(LogFile, "write", full)
    log.err("still on standard error")
    assert stderr.read_text() == "still on standard error\n"


def test_log_file_keeps_its_size(log_file: Path) -> None:
    log.setup("pasta", log.INFO, syslog=False, file=opened("pasta", str(log_file), 1000))
    for number in range(100):
        log.info(f"line {number}")
    assert log_file.stat().st_size <= 1000
    first, *_, last = log_file.read_text().splitlines()
    assert first.startswith("pasta ") and last.endswith("line 99")


def test_reports_go_everywhere(log_file: Path, stderr: Path) -> None:
    """They were requested: neither --quiet nor a command on the same terminal suppresses them."""
    log.setup("pasta", log.WARNING, syslog=False, file=opened("pasta", str(log_file)))
    log.quiet_stderr()
    log.info("nobody asked")
    log.report(["one", "two"])
    assert stderr.read_text() == "one\ntwo\n"
    lines = log_file.read_text().splitlines()[1:]
    assert [line.split(": ", 1)[1] for line in lines] == ["info:    one", "info:    two"]


def test_reports_of_a_daemon(log_file: Path, stderr: Path) -> None:
    log.setup("pasta", log.INFO, syslog=False, file=opened("pasta", str(log_file)))
    log.stop_stderr()
    log.report(["one"])
    assert stderr.read_text() == ""
    assert log_file.read_text().endswith("info:    one\n")


# Rate limit --------------------------------------------------------------------------------------------------------


def test_rate_limit(stderr: Path) -> None:
    for now in (0.0, 1.0, 9.9, 10.0, 10.1, 30.0):
        log.warn_ratelimited("fragments", "no fragments", now)
    log.warn_ratelimited("other", "something else", 10.2)
    assert stderr.read_text().splitlines() == [
        "no fragments",
        "no fragments (2 similar messages held back)",
        "no fragments (1 similar message held back)",
        "something else",
    ]


def test_rate_limit_tells_whether_it_spoke(stderr: Path) -> None:
    said = [log.info_ratelimited("dhcp", "asked", now) for now in (0.0, 1.0, 10.0, 10.1)]
    assert said == [True, False, True, False]
    assert stderr.read_text().splitlines() == ["asked", "asked (1 similar message held back)"]


def test_what_was_held_back_is_told_when_nothing_follows(stderr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[float] = []
    monkeypatch.setattr(log, "on_held", asked.append)
    log.warn_ratelimited("one", "first", 0.0)
    assert asked == []
    for now in (1.0, 2.0):
        log.warn_ratelimited("one", "last", now)
    log.warn_ratelimited("two", "other", 3.0, 1.0)
    log.warn_ratelimited("two", "other", 3.5, 1.0)
    assert asked == [10.0, 4.0]  # the earlier one: it asks for the other when it comes
    log.flush_held(4.0)
    assert asked == [10.0, 4.0, 10.0]
    log.warn_ratelimited("two", "other", 4.5, 1.0)  # what was told was a message, too
    log.flush_held(10.0)
    assert stderr.read_text().splitlines() == [
        "first",
        "other",
        "other (1 similar message held back)",
        "last (2 similar messages held back)",
        "other (1 similar message held back)",
    ]
    log.flush_held(30.0)
    assert log._held == {}
    assert len(stderr.read_text().splitlines()) == 5


def test_what_was_held_back_is_told_at_the_end(stderr: Path) -> None:
    for _ in range(3):
        log.warn_ratelimited("one", "again", 0.0)
    log.flush_held(NEVER)
    log.flush_held(NEVER)
    assert stderr.read_text().splitlines() == ["again", "again (2 similar messages held back)"]


def test_keys_do_not_add_up(stderr: Path) -> None:
    for i in range(10 * log.KEYS_MAX):
        log.warn_ratelimited(f"key {i}", f"text {i}", i / 1000)
        log.warn_ratelimited(f"key {i}", f"text {i}", i / 1000)
    assert len(log._held) == log.KEYS_MAX
    log.flush_held(NEVER)
    assert len(stderr.read_text().splitlines()) == 20 * log.KEYS_MAX, "none is lost"


def test_quiet_holds_back_for_good(stderr: Path) -> None:
    log.setup("pasta", log.WARNING, syslog=False)
    for _ in range(3):
        log.info_ratelimited("dhcp", "asked", 0.0)
    log.flush_held(NEVER)
    assert stderr.read_text() == ""


def test_fatal_is_a_line_or_several() -> None:
    assert str(log.Fatal("cannot open X: no such file: create it")) == "cannot open X: no such file: create it"
    assert str(log.Fatal("X", OSError("Y"))) == "X\nY"


def test_what_a_fatal_line_quotes_stays_in_the_line() -> None:
    e = log.Fatal("unrecognized option '--x\n\x1b[2J\udcff'", "größer")
    assert str(e) == "unrecognized option '--x \\x1b[2J\\udcff'\ngrößer"
