"""A virtual machine under QEMU, whose processor is emulated so that it runs anywhere, and which obeys commands.

The test and guest/init talk over a virtio serial port, a socket pair on this side. Everything has a deadline, and QEMU
goes when the test does, by whatever way.
"""

from __future__ import annotations

import base64
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..support import wait_for
from .image import Image

QEMU = "qemu-system-x86_64"
CONSOLES = "/var/tmp"  # the same directory where a test has another /tmp
BOOT_DEADLINE = 90.0  # seconds; an emulated boot takes 4 on an idle machine
TRANSLATIONS = 32  # MiB; with QEMU's default, those from before a reset make every write near them slow, for minutes
# With one processor and no place for another, QEMU 11.1 empties a full buffer of translations at once, and then links
# the new one to the block before it (`last_tb` of cpu_exec), which was in that buffer. It may die of that when a page
# with code is written, as after a reset. With a place for another, it starts over from its main loop.
PROCESSORS = "1,maxcpus=2"
DEADLINE = 30.0
COMMAND_LINE = "console=ttyS0 quiet nokaslr net.ifnames=0"  # of the kernel
GRACE = 10.0  # seconds for the guest to end a command that took too long


class Guest:
    """A machine that runs `guest/init`, and obeys at its virtio serial port."""

    _port: socket.socket
    _input = b""

    def connect(self, port: socket.socket) -> None:
        """Its virtio serial port is at `port`; returns when it obeys."""
        self._port, self._input = port, b""
        self._until_ready()

    def run(self, command: str, check: bool = True, deadline: float = DEADLINE) -> str:
        """The output of a shell command, with its errors; with `check` it must succeed."""
        status, output = self.call(command, deadline)
        assert not check or status == 0, f"{command}: {status}\n{output}"
        return output

    def call(self, command: str, deadline: float = DEADLINE) -> tuple[int, str]:
        """Status and output of a shell command, which is killed after `deadline` seconds, with status 143."""
        self._order(command, deadline)
        end = time.monotonic() + deadline + GRACE
        status, size = self._line(end, command).split()
        output = self._take(int(size), end, command)
        return int(status), output.decode(errors="replace")

    def ended(self) -> str:
        """How the machine has ended, which closed the port."""
        return "the machine has ended"

    def console(self) -> str:
        """Messages of its kernel, if they are to be had."""
        return ""

    def _order(self, command: str, seconds: float) -> None:
        self._port.sendall(b"%d %s\n" % (seconds, base64.b64encode(command.encode())))

    def _until_ready(self) -> None:
        end = time.monotonic() + BOOT_DEADLINE
        while self._line(end, "boot") != "ready":
            pass

    def _line(self, end: float, what: str) -> str:
        while b"\n" not in self._input:
            self._receive(end, what)
        line, _, self._input = self._input.partition(b"\n")
        return line.decode()

    def _take(self, size: int, end: float, what: str) -> bytes:
        while len(self._input) < size:
            self._receive(end, what)
        taken, self._input = self._input[:size], self._input[size:]
        return taken

    def _receive(self, end: float, what: str) -> None:
        self._port.settimeout(max(0.001, end - time.monotonic()))
        try:
            data = self._port.recv(1 << 16)
        except TimeoutError:
            raise AssertionError(f"guest: {what}: no end in time\n{self.console()[-2000:]}") from None
        if not data:
            raise AssertionError(self.ended())
        self._input += data


class VirtualMachine(Guest):
    """One machine with one network interface. `start` may follow `stop`, for the next power-on."""

    def __init__(self, image: Image, memory: int = 256) -> None:
        """`memory` is in MiB."""
        self._image = image
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._console = tempfile.NamedTemporaryFile("r", errors="replace", dir=CONSOLES)  # noqa: SIM115 - closed by `close`

    def start(self, *netdev: str, through: Sequence[str] = (), device: str = "") -> None:
        """Power on with the network of QEMU's arguments `netdev`, whose id is `s`; returns when the guest obeys.

        `through` is a command that becomes QEMU, if there is one; `device` are more properties of the interface.
        """
        assert self._process is None, "it runs already"
        self._process, port, self._monitor = self._launch(*netdev, through=through, device=device)
        self.connect(port)

    def _launch(
        self, *arguments: str, through: Sequence[str], device: str
    ) -> tuple[subprocess.Popen[bytes], socket.socket, socket.socket]:
        """QEMU, and our ends of the guest's port and of its monitor."""
        ours, theirs = socket.socketpair()
        monitor, its_monitor = socket.socketpair()
        command = [*through, QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-m", str(self._memory)]
        command += ["-accel", f"tcg,tb-size={TRANSLATIONS}", "-smp", PROCESSORS]
        command += ["-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)]
        command += ["-append", COMMAND_LINE, "-serial", f"file:{self._console.name}"]
        command += ["-chardev", f"socket,id=c,fd={theirs.fileno()}", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=c"]
        command += ["-device", f"virtio-net-pci,netdev=s,romfile={device}", *arguments]
        command += ["-chardev", f"socket,id=q,fd={its_monitor.fileno()}", "-mon", "chardev=q,mode=control"]
        with theirs, its_monitor:
            process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(), its_monitor.fileno()),
            )  # fmt: skip
        return process, ours, monitor

    def migrate(self, *netdev: str, through: Sequence[str] = (), device: str = "") -> None:
        """Move to another QEMU with the network of `netdev`, while it runs. The former one is ended."""
        with tempfile.TemporaryDirectory(dir=CONSOLES) as directory:
            uri = f"unix:{directory}/migration"
            arguments = [*netdev, "-incoming", uri]
            process, port, monitor = self._launch(*arguments, through=through, device=device)
            try:
                target = Monitor(monitor)
                target.wait_for_status("inmigrate")
                source = Monitor(self._monitor)
                source.execute("migrate", uri=uri)
                source.wait_for_migration()
                target.wait_for_status("running")
            except BaseException:
                process.kill()
                print(process.communicate()[0].decode(errors="replace"))
                raise
        self.stop()
        self._process, self._port, self._monitor = process, port, monitor

    def start_on(self, path: Path | str) -> None:
        """Power on with the stream socket at `path`."""
        self.start("-netdev", f"stream,id=s,server=off,addr.type=unix,addr.path={path}")

    def monitor(self) -> Monitor:
        """The monitor of this run; ask for it once."""
        return Monitor(self._monitor)

    def reboot(self) -> None:
        """As if the reset button was pressed; returns when the guest obeys again."""
        self._order("reboot -f", DEADLINE)
        self._until_ready()

    def stop(self) -> None:
        """Power off at once; nothing if it is off."""
        if self._process is None:
            return
        self._process.kill()
        self._process.communicate()
        self._process = None
        self._port.close()
        self._monitor.close()

    def close(self) -> None:
        """Power off for good."""
        self.stop()
        self._console.close()

    def console(self) -> str:
        """Messages of the kernel and QEMU."""
        self._console.seek(0)
        return self._console.read()

    def ended(self) -> str:
        """How QEMU has ended."""
        process, self._process = self._process, None
        assert process is not None
        self._port.close()
        said, _ = process.communicate()
        return f"QEMU ended with status {process.returncode}: {said.decode(errors='replace')}"


class Monitor:
    """QEMU's monitor, by its protocol (QMP)."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.settimeout(BOOT_DEADLINE)
        self._file = sock.makefile("rwb")
        self._read("QMP")
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: object) -> Any:
        """The result of a command."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        return self._read("return")

    def wait_for_status(self, status: str) -> None:
        """Wait until the machine is in this state."""
        wait_for(lambda: self.execute("query-status")["status"] == status, f"machine: {status}", BOOT_DEADLINE)

    def wait_for_migration(self) -> None:
        """Wait until the migration is complete."""

        def complete() -> bool:
            info = self.execute("query-migrate")
            assert info.get("status") not in ("failed", "cancelled"), info
            return bool(info.get("status") == "completed")

        wait_for(complete, "migration", BOOT_DEADLINE)

    def _read(self, wanted: str) -> Any:
        while line := self._file.readline():
            message = json.loads(line)
            assert "error" not in message, message["error"]
            if wanted in message:
                return message[wanted]
        raise EOFError("QEMU has closed its monitor")
