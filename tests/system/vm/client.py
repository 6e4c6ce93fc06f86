"""A client of the stream protocol without QEMU: it can send any frame, in any pieces.

Each frame goes and comes with its length before it, four bytes, big-endian. Frames are built and read with scapy, which
shares no code with the tested program. `Client` is one connection, and depends on the frames of the server only.
"""

from __future__ import annotations

import random
import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from scapy.layers.dhcp import BOOTP, DHCP
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet

DEADLINE = 10.0
LENGTH = struct.Struct("!I")
GUEST_MAC = "02:00:00:00:00:01"
BROADCAST = "ff:ff:ff:ff:ff:ff"
SYN, FIN, RST, PSH, ACK = 2, 1, 4, 8, 16
GULP = 4 << 20

Answer = TypeVar("Answer")


def framed(frames: Iterable[bytes | Packet]) -> bytes:
    """Frames as they go on the wire."""
    return b"".join(LENGTH.pack(len(frame)) + frame for frame in map(bytes, frames))


def unpadded(frame: bytes) -> bytes:
    """A frame without what makes it 60 bytes long."""
    end = {b"\x08\x00": 14 + int.from_bytes(frame[16:18], "big"), b"\x86\xdd": 54 + int.from_bytes(frame[18:20], "big")}
    return frame[: end.get(frame[12:14], len(frame))]


class Client:
    """A connection to passt, as a guest with the MAC address `mac`."""

    def __init__(self, sock: socket.socket, mac: str = GUEST_MAC) -> None:
        self.sock = sock
        self.mac = mac
        self.address = ""
        self.router_mac = BROADCAST
        self.options: dict[str | int, Any] = {}
        self._input = bytearray()
        self._sport = random.randrange(20000, 60000)  # not that of an earlier client's connection

    @classmethod
    def at(cls, path: str, mac: str = GUEST_MAC) -> Client:
        """A client that is connected to `path`."""
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(path)
        except OSError:
            sock.close()
            raise
        return cls(sock, mac)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exception: object) -> None:
        self.sock.close()

    # Frames ---------------------------------------------------------------------------------------------------------

    def send(self, *frames: bytes | Packet) -> None:
        """Frames in one write."""
        self.sock.settimeout(DEADLINE)
        self.sock.sendall(framed(frames))

    def send_bytes(self, data: bytes, piece: int = 1) -> None:
        """`data` as it is, `piece` bytes in each write."""
        self.sock.settimeout(DEADLINE)
        for at in range(0, len(data), piece):
            self.sock.sendall(data[at : at + piece])

    def frame(self, deadline: float = DEADLINE) -> bytes | None:
        """The next frame; None if there is none in time, EOFError at the end of the stream."""
        end = time.monotonic() + deadline
        while (size := self._size()) is None:
            left = end - time.monotonic()
            if left <= 0:
                return None
            self.sock.settimeout(left)
            try:
                data = self.sock.recv(GULP)
            except TimeoutError:
                return None
            except ConnectionResetError:
                data = b""
            if not data:
                raise EOFError("passt has closed the connection")
            self._input += data
        found = bytes(self._input[4 : 4 + size])
        del self._input[: 4 + size]
        return found

    def _size(self) -> int | None:
        """Length of the frame that is there as a whole."""
        if len(self._input) < 4:
            return None
        (size,) = LENGTH.unpack_from(self._input)
        assert 14 <= size <= 65535, f"a frame of {size} bytes"
        return size if len(self._input) >= 4 + size else None

    def expect(self, wanted: Callable[[Packet], Answer | None], deadline: float = DEADLINE) -> Answer:
        """The result of `wanted` for the first frame for which it is not None; frames before are dropped."""
        end = time.monotonic() + deadline
        while (left := end - time.monotonic()) > 0:
            if frame := self.frame(left):
                found = wanted(Ether(unpadded(frame)))
                if found is not None:
                    return found
        raise AssertionError("no such frame in time")

    def at_end(self, deadline: float = DEADLINE) -> bool:
        """Whether passt ends the connection within `deadline`; frames before are dropped."""
        end = time.monotonic() + deadline
        try:
            while time.monotonic() < end:
                self.frame(end - time.monotonic())
        except EOFError:
            return True
        return False

    # Conversations --------------------------------------------------------------------------------------------------

    def dhcp(self, kind: str, *options: Any, xid: int = 0x12345678, mac: str | None = None) -> Packet:
        """A DHCP message of type `kind`, as discover."""
        source = mac or self.mac
        head = Ether(src=source, dst=BROADCAST) / IP(src="0.0.0.0", dst="255.255.255.255") / UDP(sport=68, dport=67)
        bootp = BOOTP(chaddr=bytes.fromhex(source.replace(":", "")), xid=xid, flags=0x8000)
        return head / bootp / DHCP(options=[("message-type", kind), *options, "end"])

    def configure(self, *, arp: bool = True) -> Client:
        """Get an address: DISCOVER, OFFER, REQUEST, ACK, and then the router's MAC address by `arp`."""
        self.send(self.dhcp("discover"))
        offer = self.expect(lambda p: p if _dhcp_type(p) == 2 else None)
        asked = [("requested_addr", offer[BOOTP].yiaddr), ("server_id", dict_of(offer)["server_id"])]
        self.send(self.dhcp("request", *asked))
        ack = self.expect(lambda p: p if _dhcp_type(p) == 5 else None)
        self.address = ack[BOOTP].yiaddr
        self.options = dict_of(ack)
        if arp:
            self.router_mac = self.arp(self.options["router"])
        return self

    def who_has(self, address: str) -> Packet:
        """An ARP request."""
        source = self.address or "0.0.0.0"
        return Ether(src=self.mac, dst=BROADCAST) / ARP(op=1, hwsrc=self.mac, psrc=source, pdst=address)

    def arp(self, address: str) -> str:
        """The MAC address of `address`."""
        self.send(self.who_has(address))
        mac = self.expect(lambda p: p[ARP].hwsrc if ARP in p and p[ARP].op == 2 and p[ARP].psrc == address else None)
        assert isinstance(mac, str)
        return mac

    def ip(self, address: str, **fields: Any) -> Packet:
        """Ethernet and IPv4 headers to `address`."""
        return Ether(src=self.mac, dst=self.router_mac) / IP(src=self.address, dst=address, **fields)

    def ping(self, address: str, seq: int = 1) -> None:
        """An echo request that has its answer."""
        self.send(self.ip(address) / ICMP(id=77, seq=seq) / b"ping")
        self.expect(lambda p: True if ICMP in p and p[ICMP].type == 0 and p[ICMP].seq == seq else None)

    def udp(self, address: str, port: int, data: bytes, sport: int = 40000) -> Packet:
        """A datagram."""
        return self.ip(address) / UDP(sport=sport, dport=port) / data

    def connect(self, address: str, port: int, window_scale: int = 0) -> Connection:
        """A TCP connection, opened from a port of its own."""
        self._sport += 1
        return Connection(self, address, port, self._sport).open(window_scale)

    def accept(self, port: int) -> Connection:
        """A TCP connection that passt opens to `port`."""
        syn = self.expect(lambda p: p if TCP in p and p[TCP].dport == port and p[TCP].flags == SYN else None)
        connection = Connection(self, syn[IP].src, syn[TCP].sport, port)
        connection.received = (syn[TCP].seq + 1) % 2**32
        connection.send_segment(SYN | ACK, options=[("MSS", 1460)])
        connection.sent += 1
        return connection


def _dhcp_type(packet: Packet) -> int | None:
    return dict_of(packet).get("message-type") if DHCP in packet else None


def dict_of(packet: Packet) -> dict[str | int, Any]:
    """The DHCP options of a packet by name, or number where scapy has none; of several values, a tuple."""
    return {o[0]: o[1] if len(o) == 2 else o[1:] for o in packet[DHCP].options if isinstance(o, tuple)}


class Connection:
    """One TCP connection of a `Client`, with no more of TCP than a test needs: no loss, no reordering, no timers."""

    def __init__(self, client: Client, address: str, port: int, sport: int) -> None:
        self.client = client
        self.address = address
        self.ports = {"sport": sport, "dport": port}
        self.sent = 1000  # sequence number of the next byte out
        self.received = 0  # of the next byte in

    def send_segment(self, flags: int, data: bytes = b"", **fields: Any) -> None:
        """A segment at the present sequence numbers."""
        self.client.send(self.segment(flags, data, **fields))

    def segment(self, flags: int, data: bytes = b"", **fields: Any) -> Packet:
        """The same, to be sent."""
        tcp = TCP(**self.ports, flags=flags, seq=self.sent % 2**32, ack=self.received, window=65535, **fields)
        return self.client.ip(self.address) / tcp / data

    def open(self, window_scale: int = 0) -> Connection:
        """The handshake."""
        self.send_segment(SYN, options=[("MSS", 1460), ("WScale", window_scale)])
        answer = self.expect(lambda tcp: tcp if tcp.flags & (SYN | RST) else None)
        assert answer.flags == SYN | ACK, f"refused: {answer.flags}"
        self.sent += 1
        self.received = (answer.seq + 1) % 2**32
        self.send_segment(ACK)
        return self

    def expect(self, wanted: Callable[[Any], Answer | None]) -> Answer:
        """As `Client.expect`, of the segments of this connection; `wanted` gets the TCP layer."""

        ports = self.ports["dport"], self.ports["sport"]

        def of_mine(packet: Packet) -> Answer | None:
            mine = TCP in packet and (packet[TCP].sport, packet[TCP].dport) == ports
            return wanted(packet[TCP]) if mine else None

        return self.client.expect(of_mine)

    def send(self, data: bytes, mss: int = 1400) -> None:
        """Send `data` in one write, unacknowledged: no more than the window."""
        segments = []
        for at in range(0, len(data), mss):
            piece = data[at : at + mss]
            segments.append(self.segment(ACK | PSH, piece))
            self.sent += len(piece)
        self.client.send(*segments)

    def receive(self, size: int) -> bytes:
        """`size` bytes, acknowledged."""
        data = b""
        while len(data) < size:
            data += self.expect(self._next_piece)
            self.send_segment(ACK)
        return data

    def _next_piece(self, tcp: Any) -> bytes | None:
        piece = bytes(tcp.payload)
        if tcp.seq != self.received or not piece:
            return None
        self.received = (self.received + len(piece)) % 2**32
        return piece

    def end(self) -> None:
        """Close both ways, ours first."""
        self.send_segment(FIN | ACK)
        self.sent += 1
        self.expect(lambda tcp: True if tcp.flags & FIN else None)
        self.received = (self.received + 1) % 2**32
        self.send_segment(ACK)
