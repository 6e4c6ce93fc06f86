"""Capture file and trace of the traffic; and an idle process that does not wake up."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..support import User, wait_for
from .support import GATEWAY, GATEWAY6, PEER, Guest, Lan, in_thread, read_all, refused

CHECKS = ("ip.check_checksum", "tcp.check_checksum", "udp.check_checksum", "icmp.check_checksum")
LAYERS = ("ip", "tcp", "udp", "icmp", "icmpv6")


def echoed(client: socket.socket, server: socket.socket, size: int) -> bool:
    """Whether a datagram comes back whole. It is sent again as any client does it: what is under way while an automatic
    port makes way for its flow may be lost.
    """
    for sock in (client, server):
        sock.settimeout(2.0)
    for _ in range(3):
        try:
            client.send(b"u" * size)
            server.sendto(*server.recvfrom(2000))
            return len(client.recv(2000)) == size
        except TimeoutError:
            continue
    return False


def converse(guest: Guest, lan: Lan) -> None:
    """Some of everything: streams and datagrams both ways and of both families, pings, refusals."""
    for bind, address in (("127.0.0.1", GATEWAY), ("::1", GATEWAY6)):
        with lan.host.listen(bind) as listener, guest.connect(address, listener.getsockname()[1]) as client:
            server, _ = listener.accept()
            with server, in_thread(read_all, server) as received, in_thread(read_all, client):
                client.sendall(bytes(range(256)) * 2000)
                client.shutdown(socket.SHUT_WR)
                assert len(received()) == 512_000
                server.sendall(bytes(range(256)) * 3001)
                server.shutdown(socket.SHUT_WR)
        with lan.host.listen(bind, socket.SOCK_DGRAM) as server:
            client = guest.connect(address, server.getsockname()[1], socket.SOCK_DGRAM)
            for size in (0, 1, 1399, 1400, 1400, 1400, 7):
                assert echoed(client, server, size)
            port = server.getsockname()[1]
        client.send(b"gone?")
        assert refused(lambda client=client: client.recv(1))  # type: ignore[misc]
        assert refused(lambda address=address, port=port: guest.connect(address, port))  # type: ignore[misc]
        guest.run("ping", "-n", "-c", "2", "-i", "0.02", "-W", "5", address)


def tshark(capture: Path, *args: str) -> list[str]:
    """Lines that tshark prints, with checksums checked."""
    command = ["tshark", "-n", "-r", str(capture)]
    for name in (*CHECKS[:3],):
        command += ["-o", f"{name}:TRUE"]
    done = subprocess.run([*command, *args], check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()


def test_capture_has_correct_checksums(lan: Lan, anyone: User, open_dir: Path) -> None:
    capture = open_dir / "pasta.pcap"
    with lan.pasta(anyone, "-q", "--config-net", "-m", "1500", "-p", str(capture)) as guest:
        converse(guest, lan)
    bad = " || ".join(f'{layer}.checksum.status == "Bad"' for layer in LAYERS)
    assert tshark(capture, "-Y", f"{bad} || _ws.malformed") == []
    for layer in LAYERS:
        assert len(tshark(capture, "-Y", f'{layer}.checksum.status == "Good"')) >= 4, layer
    assert len(tshark(capture, "-Y", "tcp.flags.syn == 1 && tcp.flags.ack == 1")) == 2
    assert len(tshark(capture, "-Y", "tcp.flags.reset == 1")) >= 2
    assert tshark(capture, "-Y", "tcp.analysis.retransmission") == []


def test_a_full_disk_ends_the_capture_and_nothing_else(lan: Lan, anyone: User) -> None:
    """The log file is there, too: it loses lines."""
    lan.host.run("mount", "-t", "tmpfs", "-o", "size=64k,mode=1777", "none", "/mnt")
    try:
        with lan.pasta(anyone, "--config-net", "-p", "/mnt/pcap", "--log-file", "/mnt/log") as guest:
            for _ in range(2):
                converse(guest, lan)
            said = guest.said()
        assert said.count("Packet capture") == 1
        assert "Packet capture to /mnt/pcap ends: No space left on device\n" in said
    finally:
        lan.host.run("umount", "/mnt")


def test_a_reader_that_stops_and_goes_costs_the_capture_and_nothing_else(
    lan: Lan, anyone: User, open_dir: Path
) -> None:
    fifo = open_dir / "fifo"
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    with (
        in_thread(os.open, fifo, os.O_RDONLY) as reader,
        lan.pasta(anyone, "--config-net", "-p", str(fifo)) as guest,
    ):
        assert len(os.read(reader(), 24)) == 24, "a capture begins"
        converse(guest, lan)  # which is more than a pipe takes
        assert "Packet capture" not in guest.said()
        os.close(reader())
        for _ in range(2):
            converse(guest, lan)
        said = guest.said()
        assert said.count("Packet capture") == 1
        assert f"Packet capture to {fifo} ends: Broken pipe\n" in said


def test_trace_has_a_line_for_each_packet(lan: Lan, ordinary_user: User) -> None:
    with lan.pasta(ordinary_user, "--trace", "-f", "--config-net") as guest:
        guest.run("ping", "-n", "-c", "1", "-W", "5", PEER)
        with lan.host.listen("127.0.0.1") as listener:
            port = listener.getsockname()[1]
            with guest.connect(GATEWAY, port) as client, listener.accept()[0] as server:
                client.sendall(b"question")
                assert server.recv(64) == b"question"
        flow = re.escape(f"[{GATEWAY}]:{port}")
        for pattern in (
            rf"guest -> host \[\S+\]:\d+ -> {flow} TCP \d+: .* S",
            rf"host -> guest {flow} -> \[\S+\]:\d+ TCP \d+: .* SA",
            rf"guest -> host \[\S+\]:\d+ -> {flow} TCP \d+: .* PA",
            r"guest -> host \[\S+\] -> \[\S+\] ICMP \d+: .*echo-request",
            r"host -> guest \[\S+\] -> \[\S+\] ICMP \d+: .*echo-reply",
            r"guest -> host \d+: .*ARP who has",
        ):
            wait_for(lambda pattern=pattern: re.search(pattern, guest.said()), pattern, 10)  # type: ignore[misc]


def sleeps(pid: int) -> int | None:
    """How often a process has waited for something; None while it runs, or waits for a processor."""
    text = Path(f"/proc/{pid}/status").read_text()
    (count,) = re.findall(r"^voluntary_ctxt_switches:\s*(\d+)$", text, re.M)
    return int(count) if re.search(r"^State:\s*S", text, re.M) else None


@pytest.fixture
def known_peer(lan: Lan) -> Iterator[None]:
    """The host knows the MAC of its neighbour: pasta is told of each change of one.

    The neighbour has two addresses, and looks for the host with its first one as the sender.
    """
    (link,) = lan.peer.show("link", "show", "eth0")
    for family in ("-4", "-6"):
        lan.host.run("ip", family, "neighbour", "flush", "dev", "eth0")  # of the tests before

    def known(state: str) -> None:
        for address in (GATEWAY, PEER):
            lan.host.run("ip", "neighbour", "replace", address, "lladdr", link["address"], "dev", "eth0", "nud", state)

    known("permanent")
    yield
    known("stale")


@pytest.fixture
def fixed_guest(lan: Lan, anyone: User, known_peer: None) -> Iterator[Guest]:
    """A guest with a port forwarded, and none that must be looked for every 0.8 s: servers of the host are."""
    ports = "-t", "7099", "-u", "7099", "-T", "none", "-U", "none"
    with lan.pasta(anyone, "-q", "--config-net", *ports) as made:
        yield made


def test_idle_means_idle(fixed_guest: Guest, lan: Lan) -> None:
    """With a connection, a datagram flow and a listener open: no timer wakes it up every now and then."""
    guest = fixed_guest
    with lan.host.listen("127.0.0.1") as listener, guest.connect(GATEWAY, listener.getsockname()[1]) as client:
        server, _ = listener.accept()
        with server, guest.connect(PEER, 9, socket.SOCK_DGRAM) as datagrams:
            client.sendall(b"x")
            assert server.recv(1) == b"x"
            datagrams.send(b"x")

            def quiet() -> bool:
                """Four seconds without a wake-up: those that follow the exchange, and frames of the guest, are over."""
                before = state(guest)
                time.sleep(4)
                return state(guest) == before

            wait_for(quiet, "four seconds without a wake-up", 40)


def state(guest: Guest) -> tuple[int, int]:
    """Frames that the guest has sent, and wake-ups of pasta.

    Both are of a time when it slept: a frame counts when it is read, and the wake-up for it when pasta sleeps again,
    which may be much later on a busy machine.
    """
    while True:
        before = sleeps(guest.daemon)
        (link,) = [link for link in guest.show("-s", "link") if link["ifname"] != "lo"]
        if before is not None and before == sleeps(guest.daemon):
            return link["stats64"]["tx"]["packets"], before
