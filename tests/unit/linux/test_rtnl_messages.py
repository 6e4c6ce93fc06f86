"""Messages that are sent, against bytes; the classes come without the rest of their library."""

from __future__ import annotations

import struct
import subprocess
import sys

from passt import addr
from passt.linux.routes import Address, Hop, Route
from passt.linux.rtnl_messages import address_message, ifinfmsg, route_message

from .test_netlink import RTA_GATEWAY, RTA_OIF, attribute, u32


def test_address() -> None:
    message = address_message(7, Address(0, addr.packed("2001:db8::2"), 64))
    message["attrs"].append(("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": 7200, "cstamp": 0, "tstamp": 0}))
    message.encode()
    body = bytes(message.data)[16:]
    assert body[:8] == struct.pack("=BBBBI", 10, 64, 2, 0, 7)  # IFA_F_NODAD
    assert body.endswith(attribute(6, u32(0) + u32(7200) + u32(0) + u32(0)))


def test_route() -> None:
    message = route_message(7, Route(bytes(4), 0, (Hop(2, addr.packed("192.0.2.1")),)))
    message.encode()
    gateway = attribute(RTA_GATEWAY, addr.packed("192.0.2.1"))
    assert bytes(message.data)[16 + 12 :] == attribute(RTA_OIF, u32(7)) + gateway


def test_message_classes_come_without_the_rest_of_the_library() -> None:
    assert ifinfmsg.__module__ == "pyroute2.netlink.rtnl.ifinfmsg"
    heavy = "{'asyncio', 'pyroute2', 'pyroute2.ndb'}"
    code = f"import sys; from passt.linux import netlink; print(*({heavy} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
