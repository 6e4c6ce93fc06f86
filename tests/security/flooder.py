"""A hostile guest: sends frames at the highest possible rate for some time, and prints their number.

    python -m tests.security.flooder FD KIND SECONDS MAC GUEST4 GUEST6 GATEWAY4 GATEWAY6 PORT

FD is a packet socket (AF_PACKET, SOCK_RAW) that is bound to the guest's interface, in whatever namespace it was made;
MAC is the guest's, PORT one that is listened on at the gateway, which stands for the host's loopback. The answer is a
line, the number of frames that were sent.

POOL frames are made in advance, from a generator with a fixed seed, and sent repeatedly, BATCH of them with one
sendmmsg(2). Checksums are left out: neither the path to the daemon nor the daemon checks them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from struct import Struct

POOL = 1 << 15
BATCH = 256
BIG = 60000  # bytes of data in the largest ping; frames beyond 2000 bytes are few, or there would be nothing else

ARP, IPV4, IPV6 = 0x0806, 0x0800, 0x86DD
ICMP, TCP, UDP, ICMPV6, FRAGMENT6 = 1, 6, 17, 58, 44
FIN, SYN, RST, ACK = 1, 2, 4, 16
OUR_MAC = bytes.fromhex("9a559a559a55")

_ETHER = Struct("!6s6sH")
_IP4 = Struct("!BBHHHBBH4s4s")
_IP6 = Struct("!IHBB16s16s")
_TCP = Struct("!HHIIHHHH")
_UDP = Struct("!HHHH")
_ECHO = Struct("!BBHHH")
_ARP = Struct("!HHBBH6s4s6s4s")
_BOOTP = Struct("!BBBBIHH4s4s4s4s16s64s128s4s")


@dataclass(frozen=True)
class Net:
    """The addresses that frames are made of."""

    mac: bytes
    guest4: bytes
    guest6: bytes
    gateway4: bytes
    gateway6: bytes
    port: int  # listened on at the gateway

    @classmethod
    def of(cls, mac: str, guest4: str, guest6: str, gateway4: str, gateway6: str, port: int) -> Net:
        v4 = (socket.inet_aton(a) for a in (guest4, gateway4))
        v6 = (socket.inet_pton(socket.AF_INET6, a) for a in (guest6, gateway6))
        (g4, w4), (g6, w6) = v4, v6
        return cls(bytes.fromhex(mac.replace(":", "")), g4, g6, w4, w6, port)


class Frames:
    """Makers of frames: each call of a method is one more."""

    def __init__(self, net: Net, seed: int = 1) -> None:
        self.net = net
        self.rng = random.Random(seed)

    def syn(self) -> bytes:
        """To any address, to closed ports of the host, to its open one."""
        rng = self.rng
        flags, dport = SYN, self._port()
        where = rng.randrange(8)
        if where < 4:
            return self._tcp(self._somewhere(), dport, flags)
        return self._tcp(self._gateway(), self.net.port if where == 7 else dport, flags)

    def udp(self) -> bytes:
        """To any port, of any address or of the host; with any content."""
        rng = self.rng
        data = rng.randbytes(rng.choice((0, 1, 12, 100, 1400)))
        dst = self._somewhere() if rng.randrange(2) else self._gateway()
        return self._ip(dst, UDP, _UDP.pack(self._port(), self._port(), 8 + len(data), 0) + data)

    def ping(self) -> bytes:
        """Of any size, with any identifier."""
        rng = self.rng
        dst = self._somewhere() if rng.randrange(4) == 0 else self._gateway()
        size = rng.randrange(BIG) if rng.randrange(64) == 0 else rng.randrange(2000)
        v4 = len(dst) == 4
        echo = _ECHO.pack(8 if v4 else 128, 0, 0, rng.randrange(65536), rng.randrange(65536))
        return self._ip(dst, ICMP if v4 else ICMPV6, echo + bytes(size))

    def neighbour(self) -> bytes:
        """ARP and neighbour solicitations for every address, that name as many MAC addresses; router solicitations."""
        rng = self.rng
        mac = b"\x02" + rng.randbytes(5)
        if rng.randrange(2):
            asked = _ARP.pack(1, IPV4, 6, 4, 1, mac, self.net.guest4, bytes(6), rng.randbytes(4))
            return _ETHER.pack(b"\xff" * 6, self.net.mac, ARP) + asked
        option = b"\x01\x01" + mac
        if rng.randrange(16) == 0:
            message = b"\x85" + bytes(7) + option
        else:
            message = b"\x87" + bytes(7) + rng.randbytes(16) + option
        head = _IP6.pack(6 << 28, len(message), ICMPV6, 255, self.net.guest6, b"\xff\x02" + bytes(13) + b"\x01")
        return _ETHER.pack(b"\x33\x33" + bytes(3) + b"\x01", self.net.mac, IPV6) + head + message

    def discover(self) -> bytes:
        """DHCP DISCOVER of one client after the other."""
        rng = self.rng
        chaddr = b"\x02" + rng.randbytes(5) + bytes(10)
        name = rng.randbytes(rng.randrange(20))
        options = b"\x35\x01\x01" + b"\x0c" + bytes((len(name),)) + name + b"\x37\x04\x01\x03\x06\x0f\xff"
        blank = bytes(4)
        magic = b"\x63\x82\x53\x63"
        fixed = 1, 1, 6, 0, rng.getrandbits(32), 0, 0, blank, blank, blank, blank, chaddr, bytes(64), bytes(128), magic
        data = _BOOTP.pack(*fixed) + options
        datagram = _UDP.pack(68, 67, 8 + len(data), 0) + data
        head = _IP4.pack(0x45, 0, 20 + len(datagram), 0, 0, 64, UDP, 0, blank, b"\xff" * 4)
        return _ETHER.pack(b"\xff" * 6, self.net.mac, IPV4) + head + datagram

    def fragment(self) -> bytes:
        """Of packets that are never complete: many, large, overlapping, too long."""
        rng = self.rng
        data = rng.randbytes(8 * rng.randrange(1, 180))
        where, more = 8 * rng.choice((0, 1, 2, 185, 370, rng.randrange(8192))), rng.randrange(2)
        ident = rng.randrange(256) if rng.randrange(2) else rng.getrandbits(32)
        if rng.randrange(2):
            size = 20 + len(data)
            addresses = self.net.guest4, self.net.gateway4
            head = _IP4.pack(0x45, 0, size, ident & 0xFFFF, more << 13 | where >> 3, 64, UDP, 0, *addresses)
            return _ETHER.pack(OUR_MAC, self.net.mac, IPV4) + head + data
        head = bytes((UDP, 0)) + (where | more).to_bytes(2, "big") + ident.to_bytes(4, "big")
        return self._ip(self.net.gateway6, FRAGMENT6, head + data)

    def stray(self) -> bytes:
        """RST, ACK and what else there is, with any numbers: of no connection, and of those to the open port."""
        rng = self.rng
        flags = rng.choice((RST, ACK, RST | ACK, SYN | ACK, FIN | ACK))
        dst = self._gateway()
        if rng.randrange(2):
            return self._tcp(dst, self.net.port, flags)
        return self._tcp(dst, self._port(), flags)

    def aimed(self, sport: int) -> Callable[[], bytes]:
        """A maker of RST and ACK with any numbers that all belong to the connection from port `sport`."""

        def make() -> bytes:
            return self._tcp(self.net.gateway4, self.net.port, self.rng.choice((RST, ACK, RST | ACK)), sport)

        return make

    # Parts -----------------------------------------------------------------------------------------------------------

    def _port(self) -> int:
        return self.rng.randrange(1, 65536)

    def _gateway(self) -> bytes:
        return self.net.gateway4 if self.rng.randrange(4) else self.net.gateway6

    def _somewhere(self) -> bytes:
        """An address of the documentation's ranges, which no host has."""
        rng = self.rng
        if rng.randrange(4):
            return bytes((203, 0, 113, rng.randrange(256))) if rng.randrange(2) else b"\xc6\x12" + rng.randbytes(2)
        return bytes.fromhex("20010db8000f") + rng.randbytes(10)

    def _tcp(self, dst: bytes, dport: int, flags: int, sport: int = 0) -> bytes:
        rng = self.rng
        numbers = rng.getrandbits(32), rng.getrandbits(32)
        window = rng.randrange(65536)
        return self._ip(dst, TCP, _TCP.pack(sport or self._port(), dport, *numbers, 5 << 12 | flags, window, 0, 0))

    def _ip(self, dst: bytes, proto: int, rest: bytes) -> bytes:
        if len(dst) == 4:
            head = _IP4.pack(0x45, 0, 20 + len(rest), 0, 0, 64, proto, 0, self.net.guest4, dst)
            return _ETHER.pack(OUR_MAC, self.net.mac, IPV4) + head + rest
        head = _IP6.pack(6 << 28, len(rest), proto, 64, self.net.guest6, dst)
        return _ETHER.pack(OUR_MAC, self.net.mac, IPV6) + head + rest


def maker(frames: Frames, kind: str) -> Callable[[], bytes]:
    """By name: that of a method, or aimed:PORT."""
    name, _, port = kind.partition(":")
    if port:
        return frames.aimed(int(port))
    make: Callable[[], bytes] = getattr(frames, name)
    return make


# Sending -------------------------------------------------------------------------------------------------------------


class Iovec(ctypes.Structure):
    """struct iovec"""

    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class Mmsghdr(ctypes.Structure):
    """struct mmsghdr: struct msghdr and a length."""

    _fields_ = (
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p), ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int), ("len", ctypes.c_uint),
    )  # fmt: skip


class Gun:
    """A socket, and frames that are ready to be sent."""

    def __init__(self, fd: int, frames: list[bytes]) -> None:
        self._fd = fd
        self._count = len(frames)
        self._buffers = [ctypes.create_string_buffer(frame, len(frame)) for frame in frames]
        self._iov = (Iovec * len(frames))()
        self._headers = (Mmsghdr * len(frames))()
        for i, buffer in enumerate(self._buffers):
            self._iov[i].base, self._iov[i].len = ctypes.addressof(buffer), len(buffer)
            self._headers[i].iov, self._headers[i].iovlen = ctypes.addressof(self._iov[i]), 1
        self._sendmmsg = ctypes.CDLL(None, use_errno=True).sendmmsg

    def fire(self, seconds: float) -> int:
        """Send until time is over; returns how many frames went."""
        end = time.monotonic() + seconds
        sent = at = 0
        size, start = ctypes.sizeof(Mmsghdr), ctypes.addressof(self._headers)
        while time.monotonic() < end:
            n = self._sendmmsg(self._fd, ctypes.c_void_p(start + at * size), min(BATCH, self._count - at), 0)
            if n < 0:
                number = ctypes.get_errno()
                if number not in (errno.ENOBUFS, errno.EAGAIN):
                    raise OSError(number, os.strerror(number))
                continue
            sent += n
            at = (at + n) % self._count
        return sent


def main(argv: list[str]) -> None:
    fd, kind, seconds = int(argv[0]), argv[1], float(argv[2])
    mac, guest4, guest6, gateway4, gateway6, port = argv[3:9]
    make = maker(Frames(Net.of(mac, guest4, guest6, gateway4, gateway6, int(port))), kind)
    gun = Gun(fd, [make() for _ in range(POOL)])
    print(gun.fire(seconds))


if __name__ == "__main__":
    main(sys.argv[1:])
