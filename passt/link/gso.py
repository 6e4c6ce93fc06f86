"""Checksum and segmentation offload in software, as the kernel does them for a tap device.

Frames are written into a buffer, each with its length in front (4 bytes, big-endian). That length takes the last 4 of
the 10 bytes of the vnet header, so a pre-cooked header is copied in one piece:

    pre-cooked      | vnet  6 | vnet 4 | Ethernet | IP | TCP, UDP, ICMP | payload
    in the buffer             | length | Ethernet | IP | TCP, UDP, ICMP | payload |
                              '- `at`             '- start              '- + hdr  '- next `at`

A checksum field comes with the folded sum of the pseudo-header in it, so the checksum is that of everything from the
transport header on, just as it lies in the buffer: addresses and protocols need not be known. The sum is taken of
little-endian words, and so its complement is written as one (RFC 1071, 2 B). A value of zero is sent as 0xffff, which
UDP demands and other protocols permit: the sum modulo 0xffff is below that. UDP over IPv4 goes without (RFC 768).

A super-frame is laid out as a matrix: a row for each segment but the last, which may be shorter and keeps the flags.
So are TCP segments of more payload than an IP packet has (`rows`).

    | length | Ethernet | IP, its id and checksum      | TCP: seq, checksum | gso_size bytes | x (segments - 1)
      one header for all rows, broadcast                 columns: arithmetic  one strided copy (and padding)

A frame is at least FRAME_MIN bytes long, as on a wire: shorter ones are padded with zeros (RFC 894), which no sum sees.

Lengths, partial sums and numbers follow from those of the super-frame, as in the kernel's own segmentation: PSH and FIN
stay with the last segment; the id of IPv4 counts up from that of the header, as far as it goes.

Prices (us, CPython 3.11, NumPy 2.4): a frame of 54 bytes 0.9, of 1500 bytes 1.7, of 64 KiB 7; TCP segments of 64 KiB 24
at MTU 1500 and at 9000, 90 at MTU 68, those of 256 KiB 50 at MTU 1500; a UDP super-frame of 64 KiB 12. Up to SCALAR_MAX
bytes the sum is cheaper without NumPy. Most of it is the sums (5 for 64 KiB) and some twenty calls into NumPy. Payload
that was received in its place (`laid_out`) is not copied, which costs 1 for 64 KiB that are in the cache, and several
that are not.

NumPy is imported with this module, which only a virtual machine's link needs: it takes 60 ms.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from struct import Struct
from typing import Final

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # read on import: no idle threads beside us, no linear algebra here
import numpy as np

from ..wire import ether, ip
from ..wire.checksum import ones_sum
from ..wire.virtio import VNET, VNET_LEN
from .backend import Buffer

LENGTH: Final = Struct("!I")
SCALAR_MAX: Final = 2048  # bytes
FRAME_MIN: Final = 60  # bytes of an Ethernet frame without its check sequence (IEEE 802.3, 3.2.8)
PADDING: Final = bytes(FRAME_MIN)
FRONT: Final = VNET_LEN - LENGTH.size  # of a vnet header: what does not go into the buffer

_U16: Final = Struct("!H")
_U16_LITTLE: Final = Struct("<H")  # the checksum of little-endian words
_U32: Final = Struct("!I")
_LE16: Final = np.dtype("<u2")
_LE32: Final = np.dtype("<u4")
_BE16: Final = np.dtype(">u2")
_BE32: Final = np.dtype(">u4")
_SUM: Final = np.dtype(np.uint64)  # that of any number of 32-bit words
_SUM_OF_ROW: Final = np.dtype(np.uint32)  # that of the 16-bit words of a message
_add: Final = np.add.reduce
_CSUM_TCP: Final = 16  # offset of the checksum in the transport header, which tells the protocol
_CSUM_UDP: Final = 6
# Places in a pre-cooked header; those of TCP and UDP count from the transport header
_IP: Final = VNET_LEN + ether.HEADER_LEN
_IP4_LENGTH: Final = _IP + 2
_IP4_ID: Final = _IP + 4
_IP4_CSUM: Final = _IP + 10
_IP6_LENGTH: Final = _IP + 4
_START4: Final = _IP + ip.HEADER4.size
_TCP_SEQ: Final = 4
_TCP_FLAGS: Final = 13
_UDP_LENGTH: Final = 4
_PSH_FIN: Final = 0x09


class Gso:
    """Writes frames into `out`, at places that the caller knows to be large enough."""

    def __init__(self, out: memoryview) -> None:
        self._out = out
        self._bytes = np.frombuffer(out, np.uint8)
        self._words = [np.frombuffer(out, _LE32, (len(out) - i) // 4, i) for i in range(4)]  # from each alignment on

    def frame(self, at: int, length: int, parts: Sequence[Buffer]) -> int:
        """Write one frame of `length` bytes, made of `parts`, of which the first starts with the vnet header.

        Returns where it ends.
        """
        out = self._out
        if length < FRAME_MIN:
            parts = (*parts, PADDING[length:])
            length = FRAME_MIN
        end = at + LENGTH.size + length
        flags, _, _, _, start, offset = VNET.unpack_from(parts[0])
        start += VNET_LEN
        if length <= SCALAR_MAX:
            frame = b"".join(parts)
            out[at:end] = frame[FRONT:]
            LENGTH.pack_into(out, at, length)
            if flags:
                without = offset == _CSUM_UDP and start == _START4
                total = 0xFFFF if without else int.from_bytes(frame[start:], "little") % 0xFFFF
                _U16_LITTLE.pack_into(out, at - FRONT + start + offset, 0xFFFF - total)
            return end
        base = at - FRONT
        place = base + len(parts[0])
        out[at:place] = memoryview(parts[0])[FRONT:]
        for part in parts[1:]:
            following = place + len(part)
            out[place:following] = part
            place = following
        self._complete(at, parts[0], length)
        return end

    def laid_out(self, at: int, hdr: bytearray, length: int) -> int:
        """Write the headers of a frame of `length` bytes whose payload is in its place; returns where it ends."""
        end = at + LENGTH.size + length
        self._out[at : at + len(hdr) - FRONT] = memoryview(hdr)[FRONT:]
        if length < FRAME_MIN:
            self._out[end : end + FRAME_MIN - length] = PADDING[length:]
            end += FRAME_MIN - length
            length = FRAME_MIN
        self._complete(at, hdr, length)
        return end

    def _complete(self, at: int, hdr: Buffer, length: int) -> None:
        """Write the length of the frame, and its checksum. All else is in its place."""
        out = self._out
        LENGTH.pack_into(out, at, length)
        flags, _, _, _, start, offset = VNET.unpack_from(hdr)
        if not flags:
            return
        first = at + LENGTH.size + start
        if offset == _CSUM_UDP and start + VNET_LEN == _START4:
            _U16.pack_into(out, first + offset, 0)
            return
        words = (length - start) >> 2
        total = int(_add(self._words[first & 3][first >> 2 : (first >> 2) + words], 0, _SUM))
        total += int.from_bytes(out[first + 4 * words : at + LENGTH.size + length], "little")
        _U16_LITTLE.pack_into(out, first + offset, 0xFFFF - total % 0xFFFF)

    def cut(self, at: int, hdr: Buffer, payload: Buffer) -> int:
        """Write the segments of a super-frame with some payload; returns where the last one ends."""
        size: int = VNET.unpack_from(hdr)[3]
        n = len(payload)
        rows = (n - 1) // size
        whole = rows * size
        if rows:
            at = self.rows(at, _segment(hdr, 0, size, n), rows, size, payload)
        length = len(hdr) - VNET_LEN + n - whole
        return self.frame(at, length, (_segment(hdr, rows, size, n), memoryview(payload)[whole:]))

    def rows(self, at: int, hdr: bytearray, rows: int, size: int, payload: Buffer) -> int:
        """Write `rows` segments of `size` bytes of payload; returns where the last one ends.

        `hdr` is the header of the first. Its virtio-net header is of no use after that.
        """
        start, offset = VNET.unpack_from(hdr)[4:]
        start += VNET_LEN
        head = len(hdr) - FRONT
        stride = max(head + size, LENGTH.size + FRAME_MIN)
        end = at + rows * stride
        base, out, step = at - FRONT, self._out, (stride,)
        LENGTH.pack_into(hdr, FRONT, stride - LENGTH.size)
        matrix = self._bytes[at:end].reshape(rows, stride)
        matrix[:, :head] = np.frombuffer(hdr, np.uint8, -1, FRONT)
        matrix[:, head : head + size] = np.frombuffer(payload, np.uint8, rows * size).reshape(rows, size)
        if head + size < stride:
            matrix[:, head + size :] = 0
        if start == _START4:
            self._idents(base, hdr, rows, step)
        if offset == _CSUM_TCP:
            (seq,) = _U32.unpack_from(hdr, start + _TCP_SEQ)
            seqs = np.arange(seq, seq + rows * size, size)
            np.ndarray((rows,), _BE32, out, base + start + _TCP_SEQ, step)[:] = seqs & 0xFFFFFFFF
            self._bytes[base + start + _TCP_FLAGS : end : stride] = hdr[start + _TCP_FLAGS] & ~_PSH_FIN
        if offset == _CSUM_UDP and start == _START4:
            np.ndarray((rows,), _BE16, out, base + start + offset, step)[:] = 0
        else:
            self._checksums(base + start, len(hdr) - start + size, offset, rows, stride)
        return end

    def _idents(self, base: int, hdr: bytearray, rows: int, step: tuple[int]) -> None:
        """Let the ids of `rows` IPv4 headers count up from that of the first, which is in `hdr`."""
        (ident,), (csum,) = _U16.unpack_from(hdr, _IP4_ID), _U16.unpack_from(hdr, _IP4_CSUM)
        idents = np.arange(ident, ident + rows) & 0xFFFF
        csums = csum + ident - idents
        if not rows <= csum < 0xFFFF or ident + rows > 0x10000:  # else all of these are in range
            csums %= 0xFFFF
        np.ndarray((rows,), _BE16, self._out, base + _IP4_ID, step)[:] = idents
        np.ndarray((rows,), _BE16, self._out, base + _IP4_CSUM, step)[:] = csums

    def _checksums(self, start: int, width: int, offset: int, rows: int, stride: int) -> None:
        """Complete `rows` messages of `width` bytes, the first of them at `start` of the buffer."""
        out = self._out
        # 32 bits hold the sum of what 16-bit lengths allow. Little-endian words have a little-endian checksum.
        sums = _add(np.ndarray((rows, width >> 1), _LE16, out, start, (stride, 2)), 1, _SUM_OF_ROW)
        if width & 1:
            sums += np.ndarray((rows,), np.uint8, out, start + width - 1, (stride,))
        np.ndarray((rows,), _LE16, out, start + offset, (stride,))[:] = 0xFFFF - sums % 0xFFFF


def _segment(hdr: Buffer, number: int, size: int, total: int) -> bytearray:
    """The header of segment `number` (0..) of a super-frame with `total` bytes of payload, `size` in a segment.

    PSH and FIN are left alone. Lengths and the partial sum shrink by what the other segments have.
    """
    out = bytearray(hdr)
    start, offset = VNET.unpack_from(out)[4:]
    start += VNET_LEN
    less = total - min(size, total - number * size)
    if start == _START4:
        _U16.pack_into(out, _IP4_LENGTH, _U16.unpack_from(out, _IP4_LENGTH)[0] - less)
        _U16.pack_into(out, _IP4_ID, _U16.unpack_from(out, _IP4_ID)[0] + number & 0xFFFF)
        _U16.pack_into(out, _IP4_CSUM, 0)
        _U16.pack_into(out, _IP4_CSUM, 0xFFFF - ones_sum(out[_IP:_START4]))
    else:
        _U16.pack_into(out, _IP6_LENGTH, _U16.unpack_from(out, _IP6_LENGTH)[0] - less)
    if offset == _CSUM_TCP:
        (seq,) = _U32.unpack_from(out, start + _TCP_SEQ)
        _U32.pack_into(out, start + _TCP_SEQ, seq + number * size & 0xFFFFFFFF)
    else:
        _U16.pack_into(out, start + _UDP_LENGTH, _U16.unpack_from(out, start + _UDP_LENGTH)[0] - less)
    _U16.pack_into(out, start + offset, (_U16.unpack_from(out, start + offset)[0] - less) % 0xFFFF)
    return out
