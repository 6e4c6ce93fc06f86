"""The kernel's network configuration, by rtnetlink: reading that of the host, and setting up the namespace.

Messages are pyroute2's classes, which know every attribute. The exchange of messages is implemented here with a socket
and a loop: at start a request is a dump or is acknowledged, one at a time. The imports of pyroute2's own `IPRoute`
(asyncio, multiprocessing, all of its protocols) would take longer than the rest of the start.

Input and output values are those of `routes.py`, which makes all decisions.
"""

from __future__ import annotations

import errno
import importlib.machinery
import importlib.util
import os
import socket
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from struct import Struct
from typing import Any

from .. import PASTA, addr, log
from ..calls import calls
from .routes import RT_SCOPE_LINK, Address, Hop, Host, Link, NsPlan, Route, add_in_passes

CALLS = calls("sendto", "recvfrom", mode=PASTA)


def _message_classes() -> tuple[Any, Any, Any]:
    """pyroute2's classes of link, address and route messages, without running pyroute2/__init__.py.

    That file imports the whole library, about 150 ms. A stand-in package with the same path allows the import of the
    few needed modules, about 25 ms. The stand-in is removed afterwards, so that a later `import pyroute2` gets the real
    package.
    """
    stand_in = None
    if "pyroute2" not in sys.modules:
        spec = importlib.util.find_spec("pyroute2")
        if spec is not None and spec.submodule_search_locations:
            stand_in = types.ModuleType("pyroute2")
            stand_in.__path__ = list(spec.submodule_search_locations)
            stand_in.__spec__ = importlib.machinery.ModuleSpec("pyroute2", None, is_package=True)
            sys.modules["pyroute2"] = stand_in
    try:
        from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
        from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
        from pyroute2.netlink.rtnl.rtmsg import rtmsg
    finally:
        if stand_in is not None:
            del sys.modules["pyroute2"]
    return ifinfmsg, ifaddrmsg, rtmsg


ifinfmsg, ifaddrmsg, rtmsg = _message_classes()

_HEADER = Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port
_ERROR = Struct("=i")
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP = 0x1, 0x4, 0x300
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP_INTR = 0x10

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 16, 18, 20, 22, 24, 26

SOL_NETLINK = 270
NETLINK_GET_STRICT_CHK = 12
RTEXT_FILTER_SKIP_STATS = 8

IFF_UP, IFF_LOOPBACK = 0x1, 0x8
IFA_F_NODAD, IFA_F_DEPRECATED = 0x02, 0x20
RT_TABLE_MAIN = 254
RTN_UNICAST = 1
RTNH_F_ONLINK = 4
RTM_F_CLONED = 0x200  # a cached exception (path MTU, redirect), not configuration
GEN_MODE_EUI64, GEN_MODE_NONE = 0, 1  # enum in6_addr_gen_mode

DUMP_TRIES = 4


class Rtnetlink:
    """An rtnetlink socket of the network namespace of the calling thread; usable in other threads later."""

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        self._sock.bind((0, 0))
        self._seq = 0
        try:
            self._sock.setsockopt(SOL_NETLINK, NETLINK_GET_STRICT_CHK, 1)
        except OSError:
            log.debug("netlink: no strict checking (before Linux 4.20): dumps are filtered here only")

    def __enter__(self) -> Rtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._sock.close()

    # Requests ------------------------------------------------------------------------------------------------------

    def _send(self, message: Any, kind: int, flags: int) -> None:
        self._seq += 1
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"] = kind, flags | NLM_F_REQUEST, self._seq
        message.encode()
        self._sock.send(message.data)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, whole message) of the answers to the last request, until its end. Raises OSError."""
        while True:
            data = self._sock.recv(1 << 18)
            pos = 0
            while pos + _HEADER.size <= len(data):
                length, kind, flags, seq, _ = _HEADER.unpack_from(data, pos)
                message = data[pos : pos + length]
                pos += (length + 3) & ~3
                if seq != self._seq:
                    continue  # the rest of an answer that was not read to its end
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    (error,) = _ERROR.unpack_from(message, _HEADER.size)
                    if error:
                        raise OSError(-error, os.strerror(-error))
                    return
                yield kind, flags, message

    def do(self, message: Any, kind: int, flags: int = 0) -> None:
        """Send a request and wait for its acknowledgement. Raises OSError."""
        self._send(message, kind, flags | NLM_F_ACK)
        for _ in self._answers():
            pass

    def dump(self, request: Any, kind: int) -> list[Any]:
        """All messages of a dump, decoded; the dump is repeated if the table has changed meanwhile."""
        for _ in range(DUMP_TRIES):
            self._send(request, kind, NLM_F_DUMP)
            messages, interrupted = [], False
            for _, flags, data in self._answers():
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                message = type(request)(data)
                message.decode()
                messages.append(message)
            if not interrupted:
                break
        return messages

    # Reading -------------------------------------------------------------------------------------------------------

    def links(self) -> tuple[Link, ...]:
        """All interfaces of the namespace."""
        request = ifinfmsg()
        request["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS)]
        return tuple(_link(m) for m in self.dump(request, RTM_GETLINK))

    def addresses(self) -> tuple[Address, ...]:
        """All IPv4 and IPv6 addresses of the namespace."""
        return tuple(
            _address(m) for m in self.dump(ifaddrmsg(), RTM_GETADDR) if m["family"] in (socket.AF_INET, socket.AF_INET6)
        )

    def routes(self, v6: bool) -> tuple[Route, ...]:
        """The unicast routes of the main table; none where the kernel does not know the family."""
        request = rtmsg()
        family = request["family"] = socket.AF_INET6 if v6 else socket.AF_INET
        request["table"] = RT_TABLE_MAIN
        try:
            messages = self.dump(request, RTM_GETROUTE)
        except OSError as e:
            if e.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return ()
            raise
        return tuple(r for m in messages if m["family"] == family and (r := _route(m)) is not None)

    # Writing -------------------------------------------------------------------------------------------------------

    def set_link(self, index: int, *, up: bool = False, **attributes: Any) -> None:
        """Bring link `index` up, set attributes: address=, mtu=, txqlen=, af_spec=. Raises OSError."""
        message = ifinfmsg()
        message["index"] = index
        if up:
            message["flags"] = message["change"] = IFF_UP
        message["attrs"] = [(f"IFLA_{name.upper()}", value) for name, value in attributes.items()]
        self.do(message, RTM_NEWLINK)

    def add_address(self, index: int, a: Address) -> None:
        """Give link `index` an address, without duplicate address detection. Raises OSError."""
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
        self.do(message, RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)

    def add_route(self, index: int, route: Route) -> None:
        """Add `route` with its hops through link `index`. Raises OSError."""
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
        message["attrs"] = attributes
        self.do(message, RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL)


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


def _link(m: Any) -> Link:
    mac = m.get_attr("IFLA_ADDRESS") or ""
    return Link(
        index=m["index"],
        name=m.get_attr("IFLA_IFNAME"),
        mac=bytes.fromhex(mac.replace(":", "")) if len(mac) == 17 else b"",
        mtu=m.get_attr("IFLA_MTU") or 0,
        loopback=bool(m["flags"] & IFF_LOOPBACK),
    )


def _address(m: Any) -> Address:
    far = addr.packed(m.get_attr("IFA_ADDRESS"))
    local = addr.packed(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS"))
    flags = m.get_attr("IFA_FLAGS") or m["flags"]
    peer = far if far != local else None
    return Address(m["index"], local, m["prefixlen"], m["scope"], peer, bool(flags & IFA_F_DEPRECATED))


def _route(m: Any) -> Route | None:
    """The value of a route message; None if it is not a unicast route of the main table."""
    if m["type"] != RTN_UNICAST or (m.get_attr("RTA_TABLE") or m["table"]) != RT_TABLE_MAIN:
        return None
    if m["flags"] & RTM_F_CLONED:
        return None
    dst = m.get_attr("RTA_DST")
    v6 = m["family"] == socket.AF_INET6
    multipath = m.get_attr("RTA_MULTIPATH")
    if multipath:
        hops = tuple(_hop(h, h["oif"], h["hops"] + 1, h["flags"]) for h in multipath)
    else:
        hops = (_hop(m, m.get_attr("RTA_OIF") or 0, 1, m["flags"]),)
    return Route(
        dst=addr.packed(dst) if dst else bytes(16 if v6 else 4),
        prefix_len=m["dst_len"],
        hops=hops,
        metric=m.get_attr("RTA_PRIORITY") or 0,
        scope=m["scope"],
        proto=m["proto"],
        tos=m["tos"],
    )


def _hop(m: Any, index: int, weight: int, flags: int) -> Hop:
    via = m.get_attr("RTA_VIA")
    gateway = via["addr"] if via else m.get_attr("RTA_GATEWAY")
    return Hop(index, addr.packed(gateway) if gateway else None, weight, bool(flags & RTNH_F_ONLINK))


def read_host() -> Host:
    """Links, addresses and routes of the calling thread's namespace. A family that the kernel lacks has none."""
    with Rtnetlink() as nl:
        return Host(nl.links(), nl.addresses(), nl.routes(v6=False), nl.routes(v6=True))


# Setting up the namespace ------------------------------------------------------------------------------------------


def configure(nl: Rtnetlink, plan: NsPlan) -> tuple[bytes, list[str]]:
    """Carry out `plan` in the namespace of `nl`, where the tap exists already.

    Returns the tap's MAC address and a line for each optional step that failed; raises OSError, naming the step, for a
    required step. The owner of the namespace may have renamed its interfaces.
    """
    links = nl.links()
    _loopback_up(nl, links)
    tap = _find(links, lambda link: link.name == plan.ifname, f"interface {plan.ifname}")
    if plan.mac is not None:
        _step("set MAC address in namespace", nl.set_link, tap.index, address=addr.mac_text(plan.mac))
    _step("set queue length in namespace", nl.set_link, tap.index, txqlen=plan.txqlen)
    problems = _configure_tap(nl, tap.index, plan.mac or tap.mac, plan) if plan.configure else []
    return plan.mac or tap.mac, problems


def loopback_up() -> None:
    """Bring up the loopback interface of the calling thread's namespace. Raises OSError, naming the step."""
    with Rtnetlink() as nl:
        _loopback_up(nl, nl.links())


def _loopback_up(nl: Rtnetlink, links: Sequence[Link]) -> None:
    lo = _find(links, lambda link: link.loopback, "loopback interface")
    _step("bring up loopback interface in namespace", nl.set_link, lo.index, up=True)


def _find(links: Iterable[Link], wanted: Callable[[Link], bool], what: str) -> Link:
    found = next(filter(wanted, links), None)
    if found is None:
        raise OSError(errno.ENODEV, f"Couldn't find {what} in namespace: {os.strerror(errno.ENODEV)}")
    return found


def _step(what: str, function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except OSError as e:
        raise OSError(e.errno, f"Couldn't {what}: {e.strerror}") from None


def _configure_tap(nl: Rtnetlink, index: int, mac: bytes, plan: NsPlan) -> list[str]:
    """MTU, up, addresses, routes; a failure becomes a line.

    Duplicate address detection would leave addresses tentative for a second or two, and clients use them at once.
    Configured addresses are added without it. For the link-local address the kernel has no such flag, so its generation
    is turned off and the same address added; the mode is restored afterwards, for a link that goes down and up later.
    """
    if plan.mtu:
        _step(f"set MTU {plan.mtu} in namespace", nl.set_link, index, mtu=plan.mtu)
    addresses, routes, problems = plan.addresses, plan.routes, []
    v6 = any(len(a.addr) == 16 for a in addresses) or any(len(r.dst) == 16 for r in routes)
    own_ll = v6 and _gen_mode(nl, index, GEN_MODE_NONE)
    _step("bring up tap interface in namespace", nl.set_link, index, up=True)
    if v6 and not (own_ll and not _try_address(nl, index, Address(index, link_local(mac), 64, RT_SCOPE_LINK))):
        problems.append("The namespace has no IPv6, or has it disabled: not configuring it there")
        addresses = tuple(a for a in addresses if len(a.addr) == 4)
        routes = tuple(r for r in routes if len(r.dst) == 4)
    problems += [p for a in addresses if (p := _try_address(nl, index, a))]
    if own_ll:
        _gen_mode(nl, index, GEN_MODE_EUI64)
    failed = add_in_passes(routes, lambda route: nl.add_route(index, route))
    problems += [f"Couldn't set route {route} in namespace: {e.strerror}" for route, e in failed]
    return problems


def _gen_mode(nl: Rtnetlink, index: int, mode: int) -> bool:
    """Set how the kernel generates link-local addresses on a link; False if the link has no IPv6."""
    inet6 = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", mode)]}
    try:
        nl.set_link(index, af_spec={"attrs": [("AF_INET6", inet6)]})
    except OSError as e:
        log.debug(f"Couldn't set IPv6 address generation mode: {e.strerror}")
        return False
    return True


def link_local(mac: bytes) -> bytes:
    """The link-local address of an Ethernet interface (RFC 4291, appendix A)."""
    return b"\xfe\x80" + bytes(6) + bytes((mac[0] ^ 2,)) + mac[1:3] + b"\xff\xfe" + mac[3:]


def _try_address(nl: Rtnetlink, index: int, a: Address) -> str:
    try:
        nl.add_address(index, a)
    except OSError as e:
        if e.errno != errno.EEXIST:
            return f"Couldn't set address {addr.text(a.addr)}/{a.prefix_len} in namespace: {e.strerror}"
    return ""
