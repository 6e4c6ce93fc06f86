"""Which back end a guest gets: the one place that names them all.

    the guest has                          back end
    -------------------------------------  ------------------------------
    a tap device with a virtio-net header  link.tap_device.TapLink
    one without                            link.plain_tap.PlainLink
    a machine with a stream socket         link.stream_socket.StreamLink

The latter two import NumPy, which takes 60 ms: only those who need it wait for it.
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


def for_machine() -> Link:
    """The back end of a virtual machine that has not connected yet."""
    from .stream_socket import StreamLink

    return StreamLink(Counter())


def load_all() -> tuple[type[Link], ...]:
    """Import them all, for what they declare."""
    from .plain_tap import PlainLink
    from .stream_socket import StreamLink

    return TapLink, PlainLink, StreamLink
