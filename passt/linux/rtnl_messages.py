"""Messages of rtnetlink(7): pyroute2's classes, which know every attribute, and the messages that are sent.

Values are those of `routes.py`. Messages about neighbours come all the time: `parse_neighbour` reads the two attributes
that count, in 2 us.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import socket
import sys
import types
from struct import Struct
from typing import Any

from .. import addr, log
from ..lean.stand_ins import in_place, stand_in
from ..lean.tuples import NamedTuple
from ..wire.ether import GROUP
from .from_kernel import DUMP, HEADER
from .ip_rule import RT_TABLE_MAIN
from .routes import Address, Hop, Route

IFA_F_NODAD = 0x02
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
RTM_NEWNEIGH, RTM_GETNEIGH = 28, 30
NDA_DST, NDA_LLADDR, NDA_IFINDEX = 1, 2, 8
# include/uapi/linux/neighbour.h: reachable, stale, delay, probe, no ARP, permanent
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80

_NDMSG = Struct("=BxxxiHBB")  # family, index of the link, state, flags, type
_ATTRIBUTE = Struct("=HH")  # length, type
_INDEX = Struct("=I")
_LENGTHS = {socket.AF_INET: 4, socket.AF_INET6: 16}


def _message_classes() -> tuple[Any, Any, Any]:
    """pyroute2's classes of link, address and route messages, without running pyroute2/__init__.py.

    That file imports the whole library, about 150 ms. A stand-in package with the same path allows the import of the
    few needed modules, and other stand-ins leave out what these need for other purposes, half of the rest. If a release
    of the library needs more of them, it gets the real modules.
    """
    if "pyroute2" in sys.modules:
        return _imported()
    spec = importlib.util.find_spec("pyroute2")
    places = spec.submodule_search_locations if spec is not None else None
    if not places:
        return _imported()  # raises ImportError
    package = stand_in("pyroute2", __path__=list(places))
    package.__spec__ = importlib.machinery.ModuleSpec("pyroute2", None, is_package=True)
    with in_place(package):
        try:
            with in_place(*_needed_in_name()):
                return _imported()
        except (AttributeError, ImportError):
            for name in [name for name in sys.modules if name.startswith("pyroute2.")]:
                del sys.modules[name]
            return _imported()


def _imported() -> tuple[Any, Any, Any]:
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg

    return ifinfmsg, ifaddrmsg, rtmsg


def _needed_in_name() -> tuple[types.ModuleType, ...]:
    """Stand-ins: messages of the library go to the log, and have the exception in place of a traceback."""
    target = dict.fromkeys(("debug", "info", "warning", "error", "exception", "critical"), _logged)
    logger = stand_in("logger", **target)
    return (
        stand_in("logging", getLogger=lambda name: logger, **target),
        stand_in("traceback", format_exc=lambda: repr(sys.exc_info()[1]), format_stack=list),
        stand_in("pkgutil"),  # for more kinds of links, which the configuration would name
        stand_in("pyroute2.config", AF_BRIDGE=socket.AF_BRIDGE, data_plugins_pkgs=[], data_plugins_path=[]),
        _Kinds("pyroute2.netlink.rtnl.ifinfmsg.plugins"),
    )


class _Kinds(types.ModuleType):
    """The library's package with a module for each kind of link, of which nothing is read: their data stay bytes."""

    def __getattr__(self, name: str) -> types.ModuleType:
        if name.startswith("__"):
            raise AttributeError(name)
        from pyroute2.netlink import nlmsg_atoms

        return stand_in(f"{self.__name__}.{name}", **{name: nlmsg_atoms.hex})


def _logged(text: object, *values: object, **_: object) -> None:
    log.debug(f"pyroute2: {str(text) % values if values else text}")


ifinfmsg, ifaddrmsg, rtmsg = _message_classes()


def address_message(index: int, a: Address) -> Any:
    """A message about an address of link `index`."""
    message = ifaddrmsg()
    v6 = len(a.addr) == 16
    message["family"] = socket.AF_INET6 if v6 else socket.AF_INET
    message["prefixlen"], message["scope"], message["index"] = a.prefix_len, a.scope, index
    message["flags"] = IFA_F_NODAD if v6 else 0
    attributes = [("IFA_LOCAL", addr.text(a.addr)), ("IFA_ADDRESS", addr.text(a.peer or a.addr))]
    if not v6 and a.prefix_len < 31:  # RFC 3021: no broadcast on 31-bit prefixes
        net = int.from_bytes(a.addr, "big") | (0xFFFFFFFF >> a.prefix_len)
        attributes.append(("IFA_BROADCAST", addr.text(net.to_bytes(4, "big"))))
    message["attrs"] = attributes
    return message


def route_message(index: int, route: Route) -> Any:
    """A message about `route` with its hops through link `index`."""
    message = rtmsg()
    v6 = len(route.dst) == 16
    message["family"] = socket.AF_INET6 if v6 else socket.AF_INET
    message["dst_len"], message["tos"], message["table"] = route.prefix_len, route.tos, RT_TABLE_MAIN
    message["type"], message["proto"], message["scope"] = RTN_UNICAST, route.proto, route.scope
    attributes: list[tuple[str, Any]] = []
    if route.prefix_len:
        attributes.append(("RTA_DST", addr.text(route.dst)))
    if route.metric:
        attributes.append(("RTA_PRIORITY", route.metric))
    if len(route.hops) == 1:
        message["flags"] = RTNH_F_ONLINK if route.hops[0].onlink else 0
        attributes += [("RTA_OIF", index), *_gateway_attributes(route.hops[0], v6)]
    else:
        attributes.append(("RTA_MULTIPATH", [_hop_message(h, index, v6) for h in route.hops]))
    if route.metrics:
        attributes.append(("RTA_METRICS", {"attrs": list(route.metrics)}))
    message["attrs"] = attributes
    return message


def _gateway_attributes(hop: Hop, v6: bool) -> list[tuple[str, Any]]:
    if hop.gateway is None:
        return []
    if (len(hop.gateway) == 16) == v6:
        return [("RTA_GATEWAY", addr.text(hop.gateway))]
    return [("RTA_VIA", {"family": int(addr.family(hop.gateway)), "addr": addr.text(hop.gateway)})]


def _hop_message(hop: Hop, index: int, v6: bool) -> dict[str, Any]:
    return {
        "oif": index,
        "hops": hop.weight - 1,
        "flags": RTNH_F_ONLINK if hop.onlink else 0,
        "attrs": _gateway_attributes(hop, v6),
    }


# Neighbours --------------------------------------------------------------------------------------------------------


class Neighbour(NamedTuple):
    """A host on a link."""

    link: int  # its index
    addr: bytes
    mac: bytes


Table = tuple[socket.AddressFamily, int]  # of neighbours: family, index of the link


def parse_neighbour(message: bytes) -> Neighbour | None:
    """The neighbour of a message, header included; None if it tells no MAC address of a host."""
    if len(message) < HEADER.size + _NDMSG.size:
        return None
    family, index, state, _, _ = _NDMSG.unpack_from(message, HEADER.size)
    found, at = {}, HEADER.size + _NDMSG.size
    while at + _ATTRIBUTE.size <= len(message):
        length, kind = _ATTRIBUTE.unpack_from(message, at)
        if not _ATTRIBUTE.size <= length <= len(message) - at:
            return None
        found[kind] = message[at + _ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    a, mac = found.get(NDA_DST, b""), found.get(NDA_LLADDR, b"")
    if not state & NUD_VALID or len(a) != _LENGTHS.get(family) or len(mac) != 6 or mac[0] & GROUP or not any(mac):
        return None
    return Neighbour(index, a, mac)


def neighbour_request(table: Table) -> bytes:
    """A request for all neighbours of a table. Kernels before Linux 4.4 send those of all links."""
    family, index = table
    body = _NDMSG.pack(family, 0, 0, 0, 0) + _ATTRIBUTE.pack(8, NDA_IFINDEX) + _INDEX.pack(index)
    return HEADER.pack(HEADER.size + len(body), RTM_GETNEIGH, DUMP, 0, 0) + body
