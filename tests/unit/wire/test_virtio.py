"""The virtio-net header, as the kernel has it."""

from __future__ import annotations

import sys

from passt.wire.virtio import F_NEEDS_CSUM, GSO_TCPV4, NO_OFFLOAD, VNET, VNET_LEN


def test_vnet_header_is_native() -> None:
    order = sys.byteorder
    wanted = bytes((1, 1)) + b"".join(n.to_bytes(2, order) for n in (54, 1460, 34, 16))
    assert VNET.pack(F_NEEDS_CSUM, GSO_TCPV4, 54, 1460, 34, 16) == wanted
    assert bytes(10) == NO_OFFLOAD and VNET_LEN == 10
