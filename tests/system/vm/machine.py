"""A virtual machine under QEMU, whose processor is emulated so that it runs anywhere, and which obeys commands.

The test and guest/init talk over a virtio serial port, a socket pair on this side. Everything has a deadline, and QEMU
goes when the test does, by whatever way.
"""

from __future__ import annotations

import base64
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from .image import Image

QEMU = "qemu-system-x86_64"
BOOT_DEADLINE = 90.0  # seconds; an emulated boot takes 4 on an idle machine
TRANSLATIONS = 32  # MiB; with QEMU's default, those from before a reset make every write near them slow, for minutes
DEADLINE = 30.0
GRACE = 10.0  # seconds for the guest to end a command that took too long


class VirtualMachine:
    """One machine with one network interface. `start` may follow `stop`, for the next power-on."""

    def __init__(self, image: Image, memory: int = 256) -> None:
        """`memory` is in MiB."""
        self._image = image
        self._memory = memory
        self._process: subprocess.Popen[bytes] | None = None
        self._console = tempfile.NamedTemporaryFile("r", errors="replace")  # noqa: SIM115 - closed by `close`

    def start(self, *netdev: str, through: Sequence[str] = ()) -> None:
        """Power on with the network of QEMU's arguments `netdev`, whose id is `s`; returns when the guest obeys.

        `through` is a command that becomes QEMU, if there is one.
        """
        assert self._process is None, "it runs already"
        ours, theirs = socket.socketpair()
        command = [*through, QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-m", str(self._memory)]
        command += ["-accel", f"tcg,tb-size={TRANSLATIONS}"]
        command += ["-kernel", str(self._image.kernel), "-initrd", str(self._image.initrd)]
        command += ["-append", "console=ttyS0 quiet nokaslr net.ifnames=0", "-serial", f"file:{self._console.name}"]
        command += ["-chardev", f"socket,id=c,fd={theirs.fileno()}", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=c", "-device", "virtio-net-pci,netdev=s,romfile=", *netdev]
        with theirs:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, pass_fds=(theirs.fileno(),),
            )  # fmt: skip
        self._port = ours
        self._input = b""
        self._until_ready()

    def start_on(self, path: Path | str) -> None:
        """Power on with the stream socket at `path`."""
        self.start("-netdev", f"stream,id=s,server=off,addr.type=unix,addr.path={path}")

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

    def close(self) -> None:
        """Power off for good."""
        self.stop()
        self._console.close()

    def console(self) -> str:
        """Messages of the kernel and QEMU."""
        self._console.seek(0)
        return self._console.read()

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
            process, self._process = self._process, None
            assert process is not None
            self._port.close()
            said, _ = process.communicate()
            raise AssertionError(f"QEMU ended with status {process.returncode}: {said.decode(errors='replace')}")
        self._input += data
