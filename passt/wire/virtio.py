"""The virtio-net header before a frame: which checksum is left to be completed, and how a super-frame is to be cut.

    struct virtio_net_hdr (include/uapi/linux/virtio_net.h, VIRTIO_NET_HDR_F_* and _GSO_*), native byte order
    flags u8 | gso_type u8 | hdr_len u16 | gso_size u16 | csum_start u16 | csum_offset u16
"""

from __future__ import annotations

from struct import Struct
from typing import Final

VNET: Final = Struct("=BBHHHH")
VNET_LEN: Final = VNET.size  # 10
F_NEEDS_CSUM: Final = 1
F_DATA_VALID: Final = 2  # the checksum is verified
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
GSO_UDP_L4: Final = 5
NO_OFFLOAD: Final = bytes(VNET_LEN)
