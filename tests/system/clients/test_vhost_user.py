"""Programs that start `passt --vhost-user` themselves, for real: QEMU by `-netdev passt`, and libvirt by
`<interface type='vhostuser'>`. The machine is emulated, and shares its memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from bench.content import digest

from ..support import alive, wait_for
from ..traffic.servers import bytes_server
from ..traffic.support import GATEWAY, HOST, PEER, Lan, in_thread
from ..vm.conftest import machine_image
from ..vm.image import Image
from ..vm.machine import COMMAND_LINE, Guest, VirtualMachine
from ..vm.newer import over_usr, shared_memory, through
from ..vm.test_vm import TRANSFER_DEADLINE, accept_all, configure, url
from .checks import listeners
from .support import Client

__all__ = ["machine_image"]

pytestmark = pytest.mark.timeout(600)  # the first test downloads QEMU and libvirt
MEMORY = 256
SIZE = 8 << 20
FORWARDED = 2222


def works(guest: Guest, lan: Lan) -> None:
    """It is configured, and moves data both ways with offloads."""
    assert configure(guest)["ip"] == HOST
    features = guest.run("cat /sys/class/net/eth0/device/features").strip()
    assert [bit for bit in (0, 1, 7, 8, 11, 12, 15) if features[bit] != "1"] == [], "not acknowledged"
    with bytes_server(lan.host, "127.0.0.1") as port:
        guest.run(f"wget -q -O /tmp/data {url(GATEWAY, port)}/{SIZE}", deadline=TRANSFER_DEADLINE)
    with lan.peer.listen(PEER) as listener, in_thread(accept_all, listener) as received:
        guest.run(f"nc {PEER} {listener.getsockname()[1]} </tmp/data; rm /tmp/data", deadline=TRANSFER_DEADLINE)
        assert hashlib.sha256(received()).hexdigest() == digest(SIZE)


def is_reached(guest: Guest, lan: Lan) -> None:
    """The forwarded port leads to a server of the machine."""
    guest.run("(echo hello; cat) | nc -l -p 22 >/dev/null 2>&1 & usleep 200000")
    with lan.peer.connect(HOST, FORWARDED) as sock:
        assert sock.recv(6) == b"hello\n"


def passts(client: Client) -> dict[int, str]:
    """PID and command line of each passt that is one of this client's."""
    found = {}
    for directory in Path("/proc").iterdir():
        if directory.name.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                line = (directory / "cmdline").read_bytes().decode().split("\0")
                if f"{client.bin}/passt" in line and alive(int(directory.name)):
                    found[int(directory.name)] = " ".join(line[2:]).strip()
    return found


# QEMU ---------------------------------------------------------------------------------------------------------------


def test_qemu(root_client: Client, lan: Lan, machine_image: Image) -> None:
    """QEMU of root; passt becomes nobody, and ends with QEMU. If it is killed, QEMU does not start it again."""
    machine = VirtualMachine(machine_image, memory=MEMORY)
    netdev = f"passt,id=s,vhost-user=on,path={root_client.bin}/passt,tcp-ports={FORWARDED}:22"
    try:
        machine.start(*shared_memory(MEMORY), "-netdev", netdev, through=lan.host.argv(through(10, 1)))
        works(machine, lan)
        is_reached(machine, lan)
        ((pid, line),) = passts(root_client).items()
        assert "--vhost-user" in line and os.stat(f"/proc/{pid}").st_uid == 65534
        machine.stop()
        wait_for(lambda: not passts(root_client), "passt has ended with QEMU")
    finally:
        machine.close()
    assert listeners(lan.host) == set()


# libvirt ------------------------------------------------------------------------------------------------------------

DOMAIN = """
<domain type='qemu'>
  <name>vm</name>
  <memory unit='MiB'>{memory}</memory>
  <memoryBacking><source type='memfd'/><access mode='shared'/></memoryBacking>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{dir}/kernel</kernel><initrd>{dir}/initrd</initrd><cmdline>{line}</cmdline>
  </os>
  <devices>
    <controller type='usb' model='none'/>
    <controller type='virtio-serial'><address type='pci' slot='2'/></controller>
    <channel type='unix'><source mode='bind' path='{dir}/port'/><target type='virtio' name='port'/></channel>
    <interface type='vhostuser'>
      <backend type='passt' logFile='{dir}/passt.log'/>
      <source dev='eth0'/>
      <portForward proto='tcp'><range start='{port}' to='22'/></portForward>
      <model type='virtio'/>
      <address type='pci' slot='3'/>
    </interface>
    <memballoon model='none'/>
  </devices>
</domain>
"""


class Libvirt:
    """libvirt of a user on the host, whose daemon runs while the context lasts."""

    def __init__(self, client: Client, lan: Lan) -> None:
        self._client = client
        self._in = [*lan.host.argv(over_usr("libvirt")), *client.user.command([])]
        self._env = client.environment({"PATH": f"{client.bin}:{client.user.env['PATH']}", "HOME": str(client.dir)})
        for name in ("runtime", "config", "cache", "data"):
            kind = "DIR" if name == "runtime" else "HOME"
            self._env[f"XDG_{name.upper()}_{kind}"] = str(client.dir / name)
            (client.dir / name).mkdir(mode=0o700)
            os.chown(client.dir / name, client.user.uid, client.user.gid)
        settings = client.dir / "config/libvirt/qemu.conf"
        settings.parent.mkdir()
        settings.write_text('stdio_handler = "file"\n')  # else a virtlogd stays for two minutes
        os.chown(settings.parent, client.user.uid, client.user.gid)
        self._log = client.dir / "libvirtd.log"

    def __enter__(self) -> Libvirt:
        with self._log.open("wb") as log:
            self._daemon = subprocess.Popen(
                [*self._in, "libvirtd"], cwd="/", env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_for(lambda: (self._client.dir / "runtime/libvirt/libvirt-sock").exists() or self._over(), "libvirtd")
        return self

    def __exit__(self, *exception: object) -> None:
        for name in self.virsh("list", "--name").split():
            self.virsh("destroy", name)
        self._daemon.terminate()
        self._daemon.wait()

    def _over(self) -> bool:
        assert self._daemon.poll() is None, self._log.read_text()
        return False

    def virsh(self, *arguments: str) -> str:
        """Output of virsh(1), which must succeed."""
        command = [*self._in, "virsh", "--connect", "qemu:///session", *arguments]
        done = subprocess.run(command, cwd="/", env=self._env, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{done.stderr}{self._log.read_text()}"
        return done.stdout


def test_libvirt(client: Client, lan: Lan, machine_image: Image) -> None:
    """`qemu:///session`: libvirt starts passt, and again when it was killed; it ends with the machine."""
    domain = client.dir / "domain.xml"
    domain.write_text(DOMAIN.format(memory=MEMORY, dir=client.dir, port=FORWARDED, line=COMMAND_LINE))
    for source, name in ((machine_image.kernel, "kernel"), (machine_image.initrd, "initrd")):
        shutil.copyfile(source, client.dir / name)  # the cache is of who runs the tests
    guest = Guest()
    with Libvirt(client, lan) as libvirt, socket.socket(socket.AF_UNIX) as port:
        libvirt.virsh("create", str(domain))
        port.connect(f"{client.dir}/port")
        guest.connect(port)
        works(guest, lan)
        ((pid, line),) = passts(client).items()
        assert "--vhost-user" in line
        is_reached(guest, lan)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: list(passts(client).values()) == [line] and pid not in passts(client), "another passt")
        assert configure(guest)["ip"] == HOST  # QEMU connects again, after up to five seconds
        is_reached(guest, lan)
        libvirt.virsh("destroy", "vm")
        wait_for(lambda: not passts(client), "passt has ended with the machine")
    assert listeners(lan.host) == set()
