"""Each guest gets its back end, and only what that needs is imported."""

from __future__ import annotations

import subprocess
import sys

from passt.link import choose
from passt.link.packet_socket import PacketLink
from passt.link.plain_tap import PlainLink
from passt.link.stream_socket import StreamLink
from passt.link.tap_device import TapLink
from passt.link.vhost_user import VhostLink
from passt.linux.tun import Tap


def test_device_with_offloads() -> None:
    link = choose.for_device(Tap(7, "tap0", csum=True, tso=True, uso=False))
    assert type(link) is TapLink
    assert (link.fd, link.tso, link.uso, link.reads_vnet) == (7, True, False, True)


def test_device_without_a_header() -> None:
    link = choose.for_device(Tap(7, "tap0", csum=False, tso=False, uso=False, vnet=False))
    assert type(link) is PlainLink
    assert (link.fd, link.tso, link.uso, link.reads_vnet) == (7, True, True, False), "it cuts frames itself"


def test_machine() -> None:
    link = choose.for_machine()
    assert type(link) is StreamLink
    assert (link.tso, link.uso, link.reads_vnet) == (True, True, False)
    assert type(choose.for_machine(packets=True)) is PacketLink


def test_all_of_them_have_been_imported() -> None:
    assert set(choose.load_all()) == {TapLink, PlainLink, StreamLink, PacketLink, VhostLink}


def test_a_namespace_does_not_wait_for_numpy() -> None:
    code = "import sys; from passt.link import choose; sys.exit('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
