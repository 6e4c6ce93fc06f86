"""Floods by a guest, and their effect on the daemon and on a concurrent transfer.

    python -m tests.security.floods [--seconds 30] [--write FILE] [KIND ...]     all floods, unless some are named

Each flood has a daemon of its own, in the laboratory of the traffic tests: a pasta, or a passt with a machine that is
played by `machine_flood.py`. While the flood lasts connections through that daemon carry data at a modest pace: one
each way, for the machine one to it. They must end with every byte in its place. Memory and descriptors of the daemon
are looked at all the time, and at last when what the flood has begun may have timed out.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import os
import platform
import random
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ..system.conftest import TEST_USER, tun_for_all
from ..system.support import REPOSITORY, User, current_user, made_user
from ..system.traffic.support import GATEWAY, GATEWAY6, HOST, HOST6, Guest, Lan, new_lan, root_user

KINDS = {
    "syn": "SYN to random ports and addresses",
    "udp": "UDP to random ports and addresses",
    "ping": "ping of all sizes",
    "neighbour": "ARP and ND for everything",
    "discover": "DHCP DISCOVER",
    "fragment": "fragments",
    "stray": "RST and ACK with random numbers",
    "aimed": "the same, of the connection beside it",
    "windows": "zero windows on a thousand connections",
}
MEMORY_MAX = 256 << 20  # bytes
DESCRIPTORS_LEFT = 140  # more than before, afterwards: timers that wait for the next connections (loop/timers.py)
MEMORY_LEFT = 32 << 20  # more than before, afterwards
SECONDS = 1.5  # of a short flood
CONNECTIONS = 1000  # whose windows are zero
SYN_RETRIES = 1  # of the host's kernel: 3 s until it gives an address up, where the default is two minutes

# Flows of a short flood time out in a short time
HASTE = """
from passt import icmp
from passt.flow import idle
from passt.udp_engine import flow as udp_flow
icmp.PING_TIMEOUT = udp_flow.FLOW_TIMEOUT = udp_flow.DNS_TIMEOUT = 2.0
idle.SWEEP_MIN = 0.5
idle.SWEEP_COST = 0.0
"""
TIMEOUT = 180.0 + 15.0  # s, of UDP without that, and until it is noticed
SETTLED = 30.0  # s, with it
PACE = 0.004  # s between pieces of PIECE bytes: 128 Mbit/s each way
PIECE = 65536
_BLOCK = random.Random(7).randbytes(PIECE + 4096)


def block(at: int) -> bytes:
    """PIECE bytes that differ from those before."""
    start = at // PIECE * 17 % 4096
    return _BLOCK[start : start + PIECE]


@dataclass
class Sample:
    """Resources of the daemon: bytes of memory, descriptors."""

    memory: int
    descriptors: int

    @classmethod
    def of(cls, pid: int) -> Sample:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return cls(pages * resource.getpagesize(), len(os.listdir(f"/proc/{pid}/fd")))


class Watch(threading.Thread):
    """The most that the daemon held."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.peak = Sample(0, 0)
        self._pid, self._over = pid, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._over.wait(0.02):
            with contextlib.suppress(OSError):  # it has ended, which the test will notice
                now = Sample.of(self._pid)
                self.peak.memory = max(self.peak.memory, now.memory)
                self.peak.descriptors = max(self.peak.descriptors, now.descriptors)

    def stop(self) -> Sample:
        self._over.set()
        self.join()
        return self.peak


class Transfer:
    """One direction of one connection: paced bytes until it is told to end, and a digest at both ends."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self._source, self._sink = source, sink
        for end in source, sink:
            end.settimeout(60)
        self._over = threading.Event()
        self.sent = self.received = 0
        self._digests = hashlib.blake2b(), hashlib.blake2b()
        self._threads = [threading.Thread(target=body, daemon=True) for body in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def _send(self) -> None:
        while not self._over.wait(PACE):
            piece = block(self.sent)
            self._source.sendall(piece)
            self._digests[0].update(piece)
            self.sent += len(piece)
        self._source.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        while data := self._sink.recv(1 << 20):
            self._digests[1].update(data)
            self.received += len(data)

    def finish(self) -> bool:
        """End it; whether all that was sent has come."""
        self._over.set()
        for thread in self._threads:
            thread.join(120)
        alive = any(thread.is_alive() for thread in self._threads)
        first, second = self._digests
        return not alive and self.sent == self.received > 0 and first.digest() == second.digest()


@dataclass
class Result:
    """The result of a flood."""

    kind: str
    seconds: float
    frames: int  # sent by the flooder
    taken: int  # of these, and of the transfer: what came to the daemon
    before: Sample
    peak: Sample
    after: Sample
    finished: bool
    carried: float  # bytes per second that came through beside the flood, as long as it lasted
    said: str  # by the daemon
    notes: list[str] = field(default_factory=list)

    def row(self) -> str:
        """Of the table."""
        samples = self.before, self.peak, self.after
        memory = " / ".join(f"{s.memory / (1 << 20):.0f}" for s in samples)
        descriptors = " / ".join(str(s.descriptors) for s in samples)
        rate = f"{self.frames / self.seconds:,.0f}", f"{self.taken / self.seconds:,.0f}"
        intact = f"yes, {self.carried * 8 / 1e6:.0f} Mbit/s" if self.finished else "no"
        return f"| {KINDS[self.kind]} | {' | '.join((*rate, memory, descriptors, intact))} |"


HEAD = """| flood | sent per second | taken | MiB before / peak / after | descriptors, likewise | transfer intact |
|---|---:|---:|---:|---:|---|"""


@dataclass
class Stage:
    """A pasta, and a transfer beside it each way."""

    lan: Lan
    guest: Guest
    listener: socket.socket
    transfers: list[Transfer]
    sport: int  # of the guest's, of one of them

    @property
    def port(self) -> int:
        found: int = self.listener.getsockname()[1]
        return found


@contextlib.contextmanager
def stage(lan: Lan, user: User, *, haste: bool, descriptors: int = 0) -> Iterator[Stage]:
    """Everything but the flood."""
    with (
        lan.pasta(user, "-q", "--config-net", before=HASTE if haste else "", descriptors=descriptors) as guest,
        lan.host.listen("127.0.0.1") as listener,
    ):
        port = listener.getsockname()[1]
        near, far = [], []
        for _ in range(2):
            near.append(guest.connect(GATEWAY, port))
            far.append(listener.accept()[0])
        transfers = [Transfer(near[0], far[0]), Transfer(far[1], near[1])]
        yield Stage(lan, guest, listener, transfers, near[1].getsockname()[1])
        for end in (*near, *far):
            end.close()


def flood(stage: Stage, kind: str, seconds: float) -> int:
    """Let the guest flood; returns how many frames were sent."""
    guest = stage.guest
    (link,) = (link for link in guest.show("link") if link["ifname"] != "lo")
    gun = guest.make_socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    gun.bind((link["ifname"], 0))
    gun.setblocking(True)
    what = f"aimed:{stage.sport}" if kind == "aimed" else kind
    addresses = [link["address"], HOST, HOST6, GATEWAY, GATEWAY6, str(stage.port)]
    command = [sys.executable, "-m", "tests.security.flooder", str(gun.fileno()), what, str(seconds), *addresses]
    done = subprocess.run(
        command, pass_fds=(gun.fileno(),), cwd=REPOSITORY, capture_output=True, text=True, check=False,
        timeout=seconds + 120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    gun.close()
    return int(done.stdout)


def windows(stage: Stage, seconds: float) -> int:
    """The guest opens connections and reads nothing, while the host sends what it can; returns how many bytes wait.

    At last it reads all of it, which must be what was sent.
    """
    near, far, sent = [], [], []
    end = time.monotonic() + seconds
    for _ in range(CONNECTIONS):
        made = stage.guest.make_socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        made.connect((GATEWAY, stage.port))
        near.append(made)
        other, _ = stage.listener.accept()
        other.setblocking(False)
        far.append(other)
        sent.append(0)
    while time.monotonic() < end:
        for i, sock in enumerate(far):
            with contextlib.suppress(BlockingIOError):
                sent[i] += sock.send(_BLOCK)
        time.sleep(0.05)
    for count, ours, theirs in zip(sent, near, far, strict=True):
        theirs.shutdown(socket.SHUT_WR)
        got = 0
        while data := ours.recv(1 << 20):
            got += len(data)
        assert got == count, f"{got} of {count} bytes came"
        ours.close()
        theirs.close()
    return sum(sent)


def taken(guest: Guest) -> int:
    """Frames that the device gave to the daemon."""
    (link,) = (link for link in guest.show("-s", "link") if link["ifname"] != "lo")
    packets: int = link["stats64"]["tx"]["packets"]
    return packets


def run(lan: Lan, user: User, kind: str, seconds: float, *, haste: bool, descriptors: int = 0) -> Result:
    """One flood of a namespace, from before it to when nothing is left of it.

    The daemon may have so many `descriptors`, 0: as many as we.
    """
    with stage(lan, user, haste=haste, descriptors=descriptors) as scene:
        guest = scene.guest
        before, count = Sample.of(guest.daemon), taken(guest)
        watch = Watch(guest.daemon)
        notes, begun = [], time.monotonic()
        already = sum(transfer.received for transfer in scene.transfers)
        if kind == "windows":
            frames, waited = 0, windows(scene, seconds)
            notes.append(f"{waited >> 20} MiB waited for {CONNECTIONS} windows to open, and came when they did.")
        else:
            frames = flood(scene, kind, seconds)
        came = taken(guest) - count
        came_through = sum(transfer.received for transfer in scene.transfers) - already
        carried = came_through / (time.monotonic() - begun)
        outcomes = [transfer.finish() for transfer in scene.transfers]
        peak = watch.stop()
        assert guest.alive(), guest.said()
        after = settled(guest.daemon, before, SETTLED if haste else TIMEOUT)
        return Result(kind, seconds, frames, came, before, peak, after, all(outcomes), carried, guest.said(), notes)


def settled(pid: int, before: Sample, deadline: float) -> Sample:
    """Resources when the flows of the flood have timed out, or at the deadline."""
    end = time.monotonic() + deadline
    while (now := Sample.of(pid)).descriptors > before.descriptors + DESCRIPTORS_LEFT and time.monotonic() < end:
        time.sleep(0.1)
    return now


# The long form -------------------------------------------------------------------------------------------------------

MARK = "<!-- written by scripts/security: -->\n"


def main() -> None:
    """All floods, and the tables."""
    from .machine_flood import MACHINE_KINDS, run_machine  # which needs what is above

    parser = argparse.ArgumentParser(prog="scripts/security", description="Floods, and what becomes of the daemon.")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each flood (30)")
    parser.add_argument("--write", type=Path, help="a file whose end is replaced by the tables")
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"one of {', '.join(KINDS)}")
    options = parser.parse_args()
    kinds = options.kinds or list(KINDS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    date = datetime.date.today()
    machine = f"Linux {platform.release()}, {os.cpu_count()} processors, Python {platform.python_version()}"
    lines = [f"{options.seconds:.0f} seconds each, {date}, {machine}.\n"]
    failed = False
    ordinary = made_user(TEST_USER) if os.geteuid() == 0 else contextlib.nullcontext(current_user())
    with tun_for_all(), ordinary as user, new_lan(root_user()) as lan:
        lan.host.write("/proc/sys/net/ipv4/tcp_syn_retries", str(SYN_RETRIES))
        of_machine = [kind for kind in kinds if kind in MACHINE_KINDS]
        for title, of in (("A namespace (pasta)", kinds), ("A machine (passt)", of_machine)):
            lines += [f"{title}:\n", HEAD]
            notes = []
            for kind in of:
                body = run_machine if title.startswith("A machine") else run
                result = body(lan, user, kind, options.seconds, haste=False)
                lines.append(result.row())
                notes += result.notes
                failed |= not result.finished or result.peak.memory > MEMORY_MAX
                print(lines[-1], *result.notes, result.said, flush=True)
            lines += ["", *notes, ""]
    if options.write is not None:
        head, mark, _ = options.write.read_text().partition(MARK)
        assert mark, f"{options.write} does not say {MARK!r}"
        options.write.write_text(head + mark + "\n" + "\n".join(lines).rstrip() + "\n")
    sys.exit(failed)


if __name__ == "__main__":
    main()
