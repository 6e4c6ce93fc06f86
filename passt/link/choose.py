"""Which back end a guest gets: the one place that names them all.

    the guest has                          back end
    -------------------------------------  ------------------------------
    a tap device with a virtio-net header  link.tap_device.TapLink
    one without                            link.plain_tap.PlainLink
    a machine with a stream socket         link.stream_socket.StreamLink
    a machine with a socket of packets     link.packet_socket.PacketLink
    a machine that shares its memory       link.vhost_user.VhostLink

The latter four import NumPy, which takes 60 ms: only guests that need it wait for it.
"""

from __future__ import annotations

from collections import Counter

from ..drops import Reason
from ..linux.tun import Tap
from .backend import Link
from .tap_device import TapLink


def for_device(device: Tap) -> Link:
    """The back end of an open tap device."""
    drops: Counter[Reason] = Counter()
    if device.vnet:
        return TapLink(device.fd, drops, tso=device.tso, uso=device.uso)
    from .plain_tap import PlainLink

    return PlainLink(device.fd, drops)


def for_machine(*, vhost_user: bool = False, packets: bool = False) -> Link:
    """The back end of a virtual machine that has not connected yet. Raises Fatal."""
    if vhost_user:
        from .vhost_user import VhostLink
        from .vring import check_byte_order

        check_byte_order()
        return VhostLink(Counter())
    if packets:
        from .packet_socket import PacketLink

        return PacketLink(Counter())
    from .stream_socket import StreamLink

    return StreamLink(Counter())


def load_all() -> tuple[type[Link], ...]:
    """Import them all, for what they declare."""
    from .packet_socket import PacketLink
    from .plain_tap import PlainLink
    from .stream_socket import StreamLink
    from .vhost_user import VhostLink

    return TapLink, PlainLink, StreamLink, PacketLink, VhostLink
