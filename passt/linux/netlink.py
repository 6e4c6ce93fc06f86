"""The kernel's network configuration, by rtnetlink: reading that of the host, and setting up the namespace.

Messages are those of `rtnl_messages.py`. The exchange of messages is implemented here with a socket and a loop: a
request is a dump or is acknowledged, one at a time. The imports of pyroute2's own `IPRoute` (asyncio, multiprocessing,
all of its protocols) would take longer than the rest of the start.

Input and output values are those of `routes.py`, which makes all decisions.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from .. import NEVER, PASTA, addr, log
from ..calls import calls
from ..log import StepError
from . import from_kernel, ip_rule, routes
from .from_kernel import ERROR, HEADER, NLM_F_DUMP, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR
from .ip_rule import RT_TABLE_MAIN
from .routes import METRICS, RT_SCOPE_LINK, Address, Hop, Link, NsPlan, Route, RoutingRule, add_in_passes
from .rtnl_messages import RTN_UNICAST, RTNH_F_ONLINK, address_message, ifaddrmsg, ifinfmsg, route_message, rtmsg

CALLS = calls("sendto", "recvfrom", mode=PASTA)

NLM_F_ACK = 0x4
NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
NLM_F_DUMP_INTR = 0x10

RTM_NEWLINK, RTM_GETLINK, RTM_NEWADDR, RTM_GETADDR, RTM_NEWROUTE, RTM_GETROUTE = 16, 18, 20, 22, 24, 26
RTM_GETRULE = 34

SOL_NETLINK = 270
NETLINK_GET_STRICT_CHK = 12
RTEXT_FILTER_SKIP_STATS = 8

IFF_UP, IFF_LOOPBACK = 0x1, 0x8
IFF_WORKS = IFF_UP | 0x40  # and IFF_RUNNING
IFA_F_TEMPORARY, IFA_F_OPTIMISTIC, IFA_F_DADFAILED = 0x01, 0x04, 0x08  # 0x01 is "secondary" in IPv4
IFA_F_DEPRECATED, IFA_F_TENTATIVE = 0x20, 0x40
RTM_F_CLONED = 0x200  # a cached exception (path MTU, redirect), not configuration
GEN_MODE_EUI64, GEN_MODE_NONE = 0, 1  # enum in6_addr_gen_mode

DUMP_TRIES = 4
ANSWER_TIME = 5.0  # s, for all of the answer to a request
WAIT = 0.5  # s without a datagram
ABANDONED_MAX = 256  # datagrams, of up to 32 KiB
_RECEIVE = 1 << 18


class Rtnetlink:
    """An rtnetlink socket of the network namespace of the calling thread; usable in other threads later.

    The owner of the namespace may be hostile: see `from_kernel.py`.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, 0)
        from_kernel.connect(self._sock)
        from_kernel.limit_wait(self._sock, WAIT)
        self._seq = 0
        self._end = NEVER  # of all requests, by the processor time of the thread
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

    def limit(self, seconds: float) -> None:
        """Let all requests from now on, by this thread, take that much processor time together: a table may be long."""
        self._end = time.thread_time() + seconds

    def abandon(self) -> bool:
        """Discard the answer to a request that was given up, a part of it at a time; returns whether that was all.

        Until then the kernel refuses other dumps (EBUSY).
        """
        for _ in range(ABANDONED_MAX):
            try:
                self._sock.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return True
        return False

    # Requests ------------------------------------------------------------------------------------------------------

    def _send(self, message: Any, kind: int, flags: int) -> None:
        self._seq += 1
        header = message["header"]
        header["type"], header["flags"], header["sequence_number"] = kind, flags | NLM_F_REQUEST, self._seq
        message.encode()
        self._sock.send(message.data)

    def _answers(self) -> Iterator[tuple[int, int, bytes]]:
        """(type, flags, whole message) of the answers to the last request, until its end. Raises OSError."""
        deadline = time.monotonic() + ANSWER_TIME
        while True:
            data = from_kernel.receive(self._sock, _RECEIVE, deadline)
            if time.monotonic() >= deadline or time.thread_time() >= self._end:
                raise OSError(errno.ETIMEDOUT, "netlink: the answer of the kernel takes too long")
            for kind, flags, seq, message in from_kernel.split(data):
                if seq != self._seq:
                    continue  # the rest of an answer that was not read to its end
                if kind == NLMSG_DONE:
                    return
                if kind == NLMSG_ERROR:
                    (error,) = ERROR.unpack_from(message, HEADER.size)
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

    def link(self, index: int) -> Link:
        """Interface `index`. Since Linux 6.8 (rtnl_getlink), the kernel first tells programs of a change of its carrier
        that it would have told up to a second later. Raises OSError.
        """
        request = ifinfmsg()
        request["index"] = index
        request["attrs"] = [("IFLA_EXT_MASK", RTEXT_FILTER_SKIP_STATS)]
        self._send(request, RTM_GETLINK, NLM_F_ACK)
        for kind, _, data in list(self._answers()):
            if kind == RTM_NEWLINK:
                message = ifinfmsg(data)
                message.decode()
                return _link(message)
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    def addresses(self) -> tuple[Address, ...]:
        """All IPv4 and IPv6 addresses of the namespace."""
        return tuple(
            _address(m) for m in self.dump(ifaddrmsg(), RTM_GETADDR) if m["family"] in (socket.AF_INET, socket.AF_INET6)
        )

    def routes(self, v6: bool) -> tuple[Route, ...]:
        """The unicast routes of the main table; none where the kernel does not know the family."""
        return tuple(self._tables(v6, RT_TABLE_MAIN).get(RT_TABLE_MAIN, ()))

    def policy_defaults(self, v6: bool) -> tuple[Route, ...]:
        """The default routes of all tables that routing rules name; none where the kernel has no such rules."""
        try:
            rules = self._rules(v6)
        except OSError as e:
            log.debug(f"netlink: no routing rules: {e.strerror}")
            return ()
        return routes.policy_defaults(rules, self._tables(v6, 0)) if rules else ()

    def _tables(self, v6: bool, table: int) -> dict[int, list[Route]]:
        """The unicast routes of a table, 0: of all, by table."""
        request = rtmsg()
        family = request["family"] = socket.AF_INET6 if v6 else socket.AF_INET
        request["table"] = table
        try:
            messages = self.dump(request, RTM_GETROUTE)
        except OSError as e:
            if e.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return {}
            raise
        found: dict[int, list[Route]] = {}
        for m in messages:
            of = m.get_attr("RTA_TABLE") or m["table"]
            if m["family"] == family and (not table or of == table) and (route := _route(m)) is not None:
                found.setdefault(of, []).append(route)
        return found

    def _rules(self, v6: bool) -> list[RoutingRule]:
        """Rules that name a table other than the main and the local one. Raises OSError."""
        request = rtmsg()
        request["family"] = socket.AF_INET6 if v6 else socket.AF_INET
        self._send(request, RTM_GETRULE, NLM_F_DUMP)
        found = [ip_rule.parse(message[HEADER.size :]) for _, _, message in self._answers()]
        return [rule for rule in found if rule is not None]

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
        self.do(address_message(index, a), RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE)

    def add_route(self, index: int, route: Route) -> None:
        """Add `route` with its hops through link `index`. Raises OSError."""
        self.do(route_message(index, route), RTM_NEWROUTE, NLM_F_CREATE | NLM_F_EXCL)


def _link(m: Any) -> Link:
    mac = m.get_attr("IFLA_ADDRESS") or ""
    properties = m.get_attr("IFLA_PROP_LIST")
    return Link(
        index=m["index"],
        name=m.get_attr("IFLA_IFNAME"),
        mac=bytes.fromhex(mac.replace(":", "")) if len(mac) == 17 else b"",
        mtu=m.get_attr("IFLA_MTU") or 0,
        loopback=bool(m["flags"] & IFF_LOOPBACK),
        altnames=tuple(properties.get_attrs("IFLA_ALT_IFNAME")) if properties is not None else (),
        up=m["flags"] & IFF_WORKS == IFF_WORKS,
    )


def _address(m: Any) -> Address:
    far = addr.packed(m.get_attr("IFA_ADDRESS"))
    local = addr.packed(m.get_attr("IFA_LOCAL") or m.get_attr("IFA_ADDRESS"))
    flags = m.get_attr("IFA_FLAGS") or m["flags"]
    peer = far if far != local else None
    return Address(
        m["index"],
        local,
        m["prefixlen"],
        m["scope"],
        peer,
        deprecated=bool(flags & IFA_F_DEPRECATED),
        tentative=flags & (IFA_F_TENTATIVE | IFA_F_OPTIMISTIC) == IFA_F_TENTATIVE,  # RFC 4429 allows the use of both
        temporary=len(local) == 16 and bool(flags & IFA_F_TEMPORARY),
        duplicate=bool(flags & IFA_F_DADFAILED),
    )


def _route(m: Any) -> Route | None:
    """The value of a route message; None if it is not a unicast route."""
    if m["type"] != RTN_UNICAST or m["flags"] & RTM_F_CLONED:
        return None
    dst = m.get_attr("RTA_DST")
    v6 = m["family"] == socket.AF_INET6
    multipath, metrics = m.get_attr("RTA_MULTIPATH"), m.get_attr("RTA_METRICS")
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
        metrics=tuple((name, value) for name, value in metrics["attrs"] if name in METRICS) if metrics else (),
    )


def _hop(m: Any, index: int, weight: int, flags: int) -> Hop:
    via = m.get_attr("RTA_VIA")
    gateway = via["addr"] if via else m.get_attr("RTA_GATEWAY")
    return Hop(index, addr.packed(gateway) if gateway else None, weight, bool(flags & RTNH_F_ONLINK))


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
        raise StepError(errno.ENODEV, f"Couldn't find {what} in namespace: {os.strerror(errno.ENODEV)}")
    return found


def _step(what: str, function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        function(*args, **kwargs)
    except OSError as e:
        raise StepError(e.errno, f"Couldn't {what}: {e.strerror}") from None


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
