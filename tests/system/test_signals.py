"""SIGTERM ends the programs within a second, in every state: each step of the start, and of the run, that may wait.

The second is one of sleep: time that a program ran, or was ready to and had no processor, does not count.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from passt.wire import arp, vhost
from passt.wire.ether import HEADER, TYPE_ARP
from passt.wire.vhost import Message, StateTransfer

from ..front_end import RECEIVE, FrontEnd
from .support import Runner, User, handles, wait_for

GUEST_MAC = bytes.fromhex("020000000001")
GUEST_ASKS = (
    HEADER.pack(b"\xff" * 6, GUEST_MAC, TYPE_ARP)
    + arp.Packet(arp.REQUEST, GUEST_MAC, bytes(4), bytes(6), bytes(4)).emit()
)
WITHIN = 1.0  # s asleep
PATIENCE = 60  # s, however busy the machine is
NO_REQUEST = 250
PASTA, PASST = "passt", "passt.vm"
REPAIR = "import sys; from passt import repair; sys.exit(repair.main())"


@dataclass
class Stage:
    """Where programs are started and get stuck."""

    user: User
    directory: Path
    stack: contextlib.ExitStack

    def start(self, module: str, *args: str, **kw: Any) -> subprocess.Popen[bytes]:
        program = ["-c", REPAIR] if module == "passt.repair" else ["-m", module]
        command = self.user.command([self.user.python, *program, *args])
        kw.setdefault("stdin", subprocess.DEVNULL)
        kw.setdefault("stdout", subprocess.DEVNULL)
        kw.setdefault("stderr", subprocess.DEVNULL)
        process = subprocess.Popen(command, env=self.user.env, cwd="/", **kw)
        self.stack.callback(process.wait)
        self.stack.callback(process.kill)
        return process

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def fifo(self, name: str) -> str:
        """A pipe that no program reads."""
        os.mkfifo(self.path(name), 0o666)
        os.chmod(self.path(name), 0o666)
        os.chown(self.path(name), self.user.uid, self.user.gid)
        return self.path(name)

    def pipe(self) -> tuple[int, int]:
        """Its ends: the reader, the writer."""
        ends = os.pipe2(os.O_CLOEXEC)
        for end in ends:
            self.stack.callback(os.close, end)
        return ends

    def full_pipe(self) -> int:
        """The end of a pipe that takes no byte."""
        _, writer = self.pipe()
        fill(writer)
        return writer


def fill(writer: int) -> None:
    flags = fcntl.fcntl(writer, fcntl.F_GETFL)
    fcntl.fcntl(writer, fcntl.F_SETFL, flags | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        for size in (65536, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(writer, bytes(size))
    fcntl.fcntl(writer, fcntl.F_SETFL, flags)


@pytest.fixture
def stage(anyone: User) -> Iterator[Stage]:
    directory = Path(f"/tmp/hostd-{os.getpid()}-{time.monotonic_ns()}")
    directory.mkdir(0o777)
    directory.chmod(0o777)
    with contextlib.ExitStack() as stack:
        stack.callback(subprocess.run, ["rm", "-rf", str(directory)], check=True)
        yield Stage(anyone, directory, stack)


def is_quiet(pid: int) -> bool:
    """Whether it sleeps, and slept a moment ago already."""

    def counters() -> list[str]:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return [line for line in lines if "ctxt_switches" in line or line.startswith("State")]

    before = counters()
    time.sleep(0.2)
    return before == counters() and "State:\tS (sleeping)" in before


def asleep(pid: int) -> float:
    """A clock that stands still while the process runs, or waits for a processor: /proc/PID/schedstat has both."""
    ran, waited, _ = map(int, Path(f"/proc/{pid}/schedstat").read_text().split())
    return time.monotonic() - (ran + waited) / 1e9


# States: each starts a program, and returns it when it waits ----------------------------------------------------------

State = Callable[[Stage], "subprocess.Popen[bytes]"]
STATES: dict[str, State] = {}


def state(function: State) -> State:
    STATES[function.__name__.replace("_", " ")] = function
    return function


def pasta_opens(option: str) -> None:
    STATES[f"pasta opens {option}"] = lambda stage: stage.start(PASTA, "-f", option, stage.fifo("fifo"), "--", "true")


def passt_opens(option: str) -> None:
    STATES[f"passt opens {option}"] = lambda stage: stage.start(
        PASST, "-f", "-s", stage.path("socket"), option, stage.fifo("fifo")
    )


for file in ("--log-file", "--pid", "--pcap"):
    pasta_opens(file)
    passt_opens(file)


@state
def passt_waits_for_a_machine(stage: Stage) -> subprocess.Popen[bytes]:
    process = stage.start(PASST, "-f", "-s", stage.path("socket"))
    wait_for(lambda: os.path.exists(stage.path("socket")) and is_quiet(process.pid), "the loop")
    return process


@state
def passt_has_a_machine_that_says_nothing(stage: Stage) -> subprocess.Popen[bytes]:
    process = passt_waits_for_a_machine(stage)
    sock = stage.stack.enter_context(socket.socket(socket.AF_UNIX))
    sock.connect(stage.path("socket"))
    return process


@state
def pasta_speaks_at_start_to_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return stage.start(PASTA, "-f", "-d", "--", "sleep", "60", stderr=stage.full_pipe())


@state
def passt_speaks_at_start_to_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return stage.start(PASST, "-f", "-d", "-s", stage.path("socket"), stderr=stage.full_pipe())


def unheard(stage: Stage, module: str, *args: str) -> subprocess.Popen[bytes]:
    """It runs, and its standard error is a pipe without room, which nothing reads."""
    _, writer = stage.pipe()
    process = stage.start(module, "-f", *args, stderr=writer)
    wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
    wait_for(lambda: is_quiet(process.pid), "the start is over")
    fill(writer)
    return process


def speaks_later(stage: Stage, module: str, *args: str) -> subprocess.Popen[bytes]:
    process = unheard(stage, module, *args)
    process.send_signal(signal.SIGUSR1)
    return process


@state
def passt_reports_to_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return speaks_later(stage, PASST, "-s", stage.path("socket"))


@state
def pasta_reports_to_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    runner = Runner(stage.user)
    stage.stack.callback(runner.close)
    return speaks_later(stage, PASTA, str(runner.namespace()))


def has_statistics_to_tell(stage: Stage, module: str, *args: str) -> subprocess.Popen[bytes]:
    """At its end, when nothing reads what it says."""
    return unheard(stage, module, "--stats", "3600", *args)


@state
def passt_has_statistics_for_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return has_statistics_to_tell(stage, PASST, "-s", stage.path("socket"))


@state
def pasta_has_statistics_for_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    runner = Runner(stage.user)
    stage.stack.callback(runner.close)
    return has_statistics_to_tell(stage, PASTA, str(runner.namespace()))


def is_ready_for_a_full_pipe(stage: Stage, module: str, *args: str) -> subprocess.Popen[bytes]:
    writer = stage.full_pipe()
    process = stage.start(module, "-f", "--ready-fd", str(writer), *args, pass_fds=(writer,))
    wait_for(lambda: handles(process.pid, signal.SIGTERM), "the loop")
    return process


@state
def passt_is_ready_for_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return is_ready_for_a_full_pipe(stage, PASST, "-s", stage.path("socket"))


@state
def pasta_is_ready_for_a_full_pipe(stage: Stage) -> subprocess.Popen[bytes]:
    return is_ready_for_a_full_pipe(stage, PASTA, "--", "sleep", "60")


def machine(stage: Stage, **kw: Any) -> tuple[subprocess.Popen[bytes], FrontEnd]:
    """passt with a front end that shares its memory, and has said nothing."""
    addresses = ("-a", "192.0.2.2", "-g", "192.0.2.1")
    process = stage.start(PASST, "-f", "-s", stage.path("socket"), "--vhost-user", *addresses, **kw)
    wait_for(lambda: os.path.exists(stage.path("socket")) and is_quiet(process.pid), "the loop")
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(stage.path("socket"))
    return process, stage.stack.enter_context(FrontEnd(sock))


@state
def passt_calls_a_machine_whose_counter_is_full(stage: Stage) -> subprocess.Popen[bytes]:
    process, front_end = machine(stage)
    front_end.set_up()
    counter = os.eventfd(0, os.EFD_CLOEXEC)
    stage.stack.callback(os.close, counter)
    os.eventfd_write(counter, 2**64 - 2)
    front_end.tell(vhost.SET_VRING_CALL, vhost.emit_u64(RECEIVE), [counter])
    front_end.send(GUEST_ASKS)
    wait_for(front_end.rings[RECEIVE].used, "the answer, of which it tells next")
    return process


@state
def passt_writes_to_a_pipe_that_has_just_been_filled(stage: Stage) -> subprocess.Popen[bytes]:
    """After the event, that it can be written, and before the call: the event before that one waits at standard error,
    for a refusal is told there.
    """
    reader, said = stage.pipe()
    process, front_end = machine(stage, stderr=said)
    front_end.introduce()
    state, writer = stage.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, select.PIPE_BUF)
    fill(writer)
    front_end.tell(vhost.SET_DEVICE_STATE_FD, StateTransfer(vhost.SAVE, vhost.STOPPED).emit(), [writer])
    front_end.answer()
    process.send_signal(signal.SIGSTOP)
    wait_for(lambda: "State:\tT" in Path(f"/proc/{process.pid}/status").read_text(), "it is stopped")
    fill(said)
    front_end.tell(NO_REQUEST, flags=vhost.VERSION | vhost.NEED_REPLY)
    os.read(state, select.PIPE_BUF)
    process.send_signal(signal.SIGCONT)
    wait_for(lambda: is_quiet(process.pid), "it waits at standard error")
    fill(writer)
    os.set_blocking(reader, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.read(reader, 1 << 16)
    assert front_end.answer().request == NO_REQUEST
    return process


@state
def passt_has_a_front_end_that_never_stops_talking(stage: Stage) -> subprocess.Popen[bytes]:
    process, front_end = machine(stage)
    talk = Message(vhost.SET_OWNER, vhost.VERSION).emit() * 1000

    def go_on() -> None:
        with contextlib.suppress(OSError):
            while True:
                front_end.sock.sendall(talk)

    thread = threading.Thread(target=go_on)
    thread.start()
    stage.stack.callback(thread.join)
    stage.stack.callback(process.kill)
    return process


@state
def passt_waits_for_a_port_in_use(stage: Stage) -> subprocess.Popen[bytes]:
    server = stage.stack.enter_context(socket.create_server(("0.0.0.0", 0)))
    process = stage.start(PASST, "-f", "-s", stage.path("socket"), "-t", str(server.getsockname()[1]))
    wait_for(lambda: os.path.exists(stage.path("socket")) or process.poll() is not None, "the socket")
    return process


@state
def pesto_waits_for_an_answer(stage: Stage) -> subprocess.Popen[bytes]:
    silent = stage.stack.enter_context(socket.socket(socket.AF_UNIX))
    silent.bind(stage.path("control"))
    os.chmod(stage.path("control"), 0o777)
    silent.listen()
    return stage.start("passt.pesto", stage.path("control"))


@state
def passt_repair_waits_for_a_socket(stage: Stage) -> subprocess.Popen[bytes]:
    return stage.start("passt.repair", str(stage.directory))


@state
def passt_repair_waits_for_a_command(stage: Stage) -> subprocess.Popen[bytes]:
    passt = stage.start(PASST, "-f", "-s", stage.path("socket"), "--vhost-user")
    wait_for(lambda: os.path.exists(stage.path("socket.repair")) and is_quiet(passt.pid), "the loop")
    return stage.start("passt.repair", stage.path("socket.repair"))


@pytest.mark.parametrize("name", STATES)
def test_sigterm_ends_every_state(stage: Stage, name: str) -> None:
    process = STATES[name](stage)
    busy = "port in use" in name or "talking" in name
    wait_for(lambda: process.poll() is not None or busy or is_quiet(process.pid), "it waits")
    assert process.poll() is None, "it does not get into that state"
    began = asleep(process.pid)
    process.send_signal(signal.SIGTERM)
    end = os.pidfd_open(process.pid)
    stage.stack.callback(os.close, end)
    assert select.select([end], [], [], PATIENCE)[0], "it goes on"
    assert asleep(process.pid) - began < WITHIN
    process.wait()
    if "repair" not in name:
        assert not os.path.exists(stage.path("socket")) or process.returncode == 0
    assert process.returncode in (0, -signal.SIGTERM, 128 + signal.SIGTERM)  # the last one is the command's
