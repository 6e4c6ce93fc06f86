"""The virtio-net header before a frame: which checksum is left to be completed, and how a super-frame is to be cut.

    struct virtio_net_hdr (include/uapi/linux/virtio_net.h, VIRTIO_NET_HDR_F_* and _GSO_*), native byte order
    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
"""

from __future__ import annotations

from struct import Struct

VNET = Struct("=BBHHHH")
VNET_LEN = VNET.size  # 10
F_NEEDS_CSUM = 1
GSO_NONE = 0
GSO_TCPV4 = 1
GSO_TCPV6 = 4
GSO_UDP_L4 = 5
NO_OFFLOAD = bytes(VNET_LEN)
