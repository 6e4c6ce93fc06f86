"""The DHCP server of the guest (RFC 2131, RFC 2132): one lease, the same for all clients.

    from the guest                  answer                                          not if
    ------------------------------  ----------------------------------------------  ------------------------
    DISCOVER                        OFFER                                           --no-dhcp, or no gateway
    DISCOVER with Rapid Commit      ACK with Rapid Commit (RFC 4039)
    REQUEST of our address, or of   ACK
      none in particular
    REQUEST of any other address    NAK: the client starts again (RFC 2131, 4.3.2)
    INFORM                          ACK without address and lease (4.3.5)
    BOOTP request (no type)         BOOTP reply (RFC 1534, 2)
    DECLINE, RELEASE                none, a line in the log
    with the identifier of another  none
      server, or by a relay agent
      of another subnet
    any other                       none

    destination of the answer (RFC 2131, 4.1), first match          address      port  MAC
    --------------------------------------------------------------  -----------  ----  ----------------------
    a relay agent forwarded the request                             giaddr       67    sender of the frame
    NAK                                                             broadcast    68    broadcast
    the client has an address: ciaddr, or the source of an INFORM   that         68    sender of the frame
    the client set the broadcast flag                               broadcast    68    broadcast
    anything else                                                   the offered  68    chaddr

Options have the order of the client's parameter request list, then all others in ascending order; the message type
comes first unless the list contains it, and the mask before the router (RFC 2132, 3.3). The answer has the client's
identifier (RFC 6842). Classless routes (RFC 3442) make a gateway outside the assigned subnet (for instance, a /32)
reachable. A client that sends or requests the FQDN option gets the name of --fqdn, with the flag for no DNS update (RFC
4702, 4).

The answer is never longer than the client accepts: 300 bytes for BOOTP, 576 for DHCP unless the client allows more (RFC
2131, 2; option 57), within the MTU. Options that do not fit are left out in the order of `DISPENSABLE`.

A new option has its code in `wire/dhcp.py` and its value in `configuration`. If its length varies, it also has a place
in `DISPENSABLE`: all other options together must fit into the 300 bytes of BOOTP.

The lease time is that of `policy/lease.py`: short after a change of the host's network, infinite with --follow off. A
client that has a former address learns of the change when it asks for it again: it gets NAK. With an ACK, or a reply of
BOOTP, it has the address, and clients of the host go there from then on, before it says a word (`flow/neighbours.py`).

Left out: leases in a table, timers, other clients. There is one guest, and nothing happens when its lease ends; no
state of clients is kept, so the number of client identifiers does not matter. A declined address is offered again: it
is the only one. FORCERENEW (RFC 3203) needs authentication (RFC 6704), which no usual client has.
docs/services.md has the requirements of the RFCs one by one.
"""

from __future__ import annotations

import time

from . import addr, log
from .drops import Drop
from .flow.context import Context
from .lean.records import replace
from .policy.config import Config, Ip4
from .policy.lease import Quiet
from .wire import dhcp, domain, ether, ip, udp
from .wire.cursor import Malformed
from .wire.dhcp import Fqdn, Message
from .wire.dhcpv6 import INFINITE

ETHERNET = 1, 6  # hardware type, length of an address
PARAMETERS_MAX = 255  # of a request list: there are no more codes
IP_UDP = ip.HEADER4.size + udp.HEADER.size

# The answer to a message type; None is BOOTP, which has no type
ANSWERS = {dhcp.DISCOVER: dhcp.OFFER, dhcp.REQUEST: dhcp.ACK, dhcp.INFORM: dhcp.ACK, None: None}
NAMES = {dhcp.REQUEST: "request", dhcp.INFORM: "inform"}
NOTED = frozenset((dhcp.DECLINE, dhcp.RELEASE))  # messages without an answer that are logged

# Options that a client can do without, the least important one first; all other options fit into the shortest message
DISPENSABLE = (dhcp.OPT_SEARCH, dhcp.OPT_FQDN, dhcp.OPT_HOSTNAME, dhcp.OPT_MTU, dhcp.OPT_DNS)


def message_type(message: Message) -> int | None:
    """The message type option; None for BOOTP."""
    value = message.options.get(dhcp.OPT_TYPE)
    return None if value is None else int.from_bytes(value, "big")


def ignore(request: Message, config: Config) -> bool:
    """Whether `request` gets no answer, and is not noted either. Raises Malformed."""
    ip4 = config.ip4
    if config.no_dhcp or ip4 is None or ip4.gateway is None or request.op != dhcp.BOOTREQUEST:
        return True
    kind = message_type(request)
    if kind not in ANSWERS and kind not in NOTED:
        return True
    if len(request.options.get(dhcp.OPT_CLIENT_ID, b"")) > dhcp.CLIENT_ID_MAX:
        raise Malformed(Drop.DHCP_CLIENT_ID)
    if request.address(dhcp.OPT_SERVER_ID) not in (None, ip4.gateway):
        return True  # the client has chosen another server (RFC 2131, 3.1)
    return any(request.giaddr) and not addr.in_subnet(request.giaddr, ip4.addr, ip4.prefix_len)


def rapid(request: Message) -> bool:
    """Whether the client requests an ACK at once, without an offer (Rapid Commit)."""
    return message_type(request) == dhcp.DISCOVER and dhcp.OPT_RAPID_COMMIT in request.options


def refused(request: Message, assigned: bytes) -> bytes | None:
    """The address that a REQUEST is about, where that is not `assigned` (RFC 2131, 4.3.2). Raises Malformed."""
    if message_type(request) != dhcp.REQUEST:
        return None
    wanted = request.address(dhcp.OPT_REQUESTED) or addr.ANY4
    return next((a for a in (wanted, request.ciaddr) if any(a) and a != assigned), None)


def configuration(ip4: Ip4, gateway: bytes, config: Config) -> dict[int, bytes]:
    """The options that any answer has."""
    options = {dhcp.OPT_MASK: addr.netmask(ip4.prefix_len), dhcp.OPT_ROUTER: gateway}
    if config.advertise_dns and ip4.dns:
        options[dhcp.OPT_DNS] = b"".join(ip4.dns)
    if config.hostname:
        options[dhcp.OPT_HOSTNAME] = config.hostname.encode()
    if config.mtu:
        options[dhcp.OPT_MTU] = config.mtu.to_bytes(2, "big")
    if config.advertise_search and config.dns_search:
        options[dhcp.OPT_SEARCH] = domain.compress_list(config.dns_search)
    if not addr.in_subnet(gateway, ip4.addr, ip4.prefix_len):
        on_link = b"\x20" + gateway + addr.ANY4
        options[dhcp.OPT_ROUTES] = on_link + b"\0" + gateway  # and the default route through it
    return options


def lease(request: Message, gateway: bytes, seconds: int = INFINITE) -> dict[int, bytes]:
    """The options of a DHCP answer; none for BOOTP."""
    kind = dhcp.ACK if rapid(request) else ANSWERS[message_type(request)]
    if kind is None:
        return {}
    options = identity(request, kind, gateway)
    if message_type(request) != dhcp.INFORM:
        options[dhcp.OPT_LEASE] = seconds.to_bytes(4, "big")
    if rapid(request):
        options[dhcp.OPT_RAPID_COMMIT] = b""
    return options


def identity(request: Message, kind: int, gateway: bytes) -> dict[int, bytes]:
    """The options that identify the answer, the server and the client (RFC 6842, 3)."""
    options = {dhcp.OPT_TYPE: bytes((kind,)), dhcp.OPT_SERVER_ID: gateway}
    if dhcp.OPT_CLIENT_ID in request.options:
        options[dhcp.OPT_CLIENT_ID] = request.options[dhcp.OPT_CLIENT_ID]
    return options


def full_name(request: Message, name: str) -> bytes | None:
    """The client FQDN option of the answer, in the client's encoding; None if it is not to be sent.

    Raises Malformed.
    """
    sent = request.options.get(dhcp.OPT_FQDN)
    if not name or (sent is None and dhcp.OPT_FQDN not in request.options.get(dhcp.OPT_PARAMETERS, b"")):
        return None
    asked = Fqdn.CANONICAL if sent is None else Fqdn.parse(sent).flags
    flags = Fqdn.NO_UPDATES | (asked & Fqdn.CANONICAL) | (Fqdn.OVERRIDDEN if asked & Fqdn.SERVER_UPDATES else 0)
    return Fqdn(flags, domain.encode(name) if flags & Fqdn.CANONICAL else name.encode()).emit()


def ordered(options: dict[int, bytes], wanted: bytes) -> dict[int, bytes]:
    """`options` in the order of the client's parameter request list, then the others ascending."""
    first = wanted if not wanted or dhcp.OPT_TYPE in wanted else bytes((dhcp.OPT_TYPE,)) + wanted
    codes = list(dict.fromkeys((*first, *sorted(options))))
    if {dhcp.OPT_MASK, dhcp.OPT_ROUTER} <= options.keys() and codes.index(dhcp.OPT_MASK) > codes.index(dhcp.OPT_ROUTER):
        codes.remove(dhcp.OPT_MASK)
        codes.insert(codes.index(dhcp.OPT_ROUTER), dhcp.OPT_MASK)
    return {code: options[code] for code in codes if code in options}


def reply(request: Message, ip4: Ip4, gateway: bytes, config: Config, seconds: int = INFINITE) -> Message:
    """The answer to a request that is not to be ignored, with a lease of so many seconds. Raises Malformed."""
    options = configuration(ip4, gateway, config) | lease(request, gateway, seconds)
    name = full_name(request, config.fqdn)
    if name is not None:
        options[dhcp.OPT_FQDN] = name
    wanted = request.options.get(dhcp.OPT_PARAMETERS, b"")[:PARAMETERS_MAX]
    inform = message_type(request) == dhcp.INFORM
    answer = Message(
        dhcp.BOOTREPLY,
        request.xid,
        flags=request.flags,
        ciaddr=addr.ANY4 if message_type(request) == dhcp.DISCOVER else request.ciaddr,
        yiaddr=addr.ANY4 if inform else ip4.addr,
        siaddr=request.siaddr,
        giaddr=request.giaddr,
        chaddr=request.chaddr,
        sname=request.sname,
        file=request.file,
        htype=request.htype,
        hlen=request.hlen,
        options=ordered(options, wanted),
    )
    return fit(answer, room(request, config), config.dns_search)


def nak(request: Message, gateway: bytes) -> Message:
    """The answer to a request for an address that there is not (RFC 2131, 4.3.1, table 3)."""
    return Message(
        dhcp.BOOTREPLY,
        request.xid,
        flags=request.flags | (dhcp.BROADCAST if any(request.giaddr) else 0),  # for the relay agent (4.3.2)
        giaddr=request.giaddr,
        chaddr=request.chaddr,
        htype=request.htype,
        hlen=request.hlen,
        options=identity(request, dhcp.NAK, gateway) | {dhcp.OPT_MESSAGE: b"not the address of this network"},
    )


def _one_host(dst: bytes) -> bool:
    """Whether a request went to one server: its client knows that one, and accepts NAK from no other."""
    return addr.is_unicast(dst) and dst != addr.BROADCAST4 and not addr.is_unspecified(dst)


def destination(request: Message, answer: Message, src_mac: bytes, src: bytes) -> tuple[bytes, bytes, int]:
    """MAC, address and port that `answer` goes to (RFC 2131, 4.1). The request came from `src_mac` and `src`."""
    if any(request.giaddr):
        return src_mac, request.giaddr, dhcp.SERVER_PORT
    inform = message_type(request) == dhcp.INFORM
    known = src if inform and not any(request.ciaddr) else request.ciaddr
    refusal = message_type(answer) == dhcp.NAK
    if addr.is_unicast(known) and not addr.is_martian(known) and not refusal:
        return src_mac, known, dhcp.CLIENT_PORT
    if request.flags & dhcp.BROADCAST or inform or refusal:
        return addr.BROADCAST_MAC, addr.BROADCAST4, dhcp.CLIENT_PORT
    ethernet = (request.htype, request.hlen) == ETHERNET and any(request.chaddr[:6]) and not request.chaddr[0] & 1
    return request.chaddr[:6] if ethernet else src_mac, answer.yiaddr, dhcp.CLIENT_PORT


def room(request: Message, config: Config) -> int:
    """The maximum size of the answer, in bytes of UDP payload."""
    if message_type(request) is None:
        return dhcp.BOOTP_SIZE
    asked = int.from_bytes(request.options.get(dhcp.OPT_MAX_SIZE, b""), "big")
    return max(dhcp.SIZE_MIN, min(asked, config.mtu or ip.MTU_MAX)) - IP_UDP


def fit(answer: Message, limit: int, names: tuple[str, ...]) -> Message:
    """`answer` in `limit` bytes. The search list, of `names`, is shortened from its end; other options are removed."""
    options = dict(answer.options)
    answer = replace(answer, options=options)
    while len(answer.emit()) > limit:
        code = next(code for code in DISPENSABLE if code in options)
        names = names[:-1] if code == dhcp.OPT_SEARCH else names
        if code == dhcp.OPT_SEARCH and names:
            options[code] = domain.compress_list(names)
        else:
            del options[code]
    return answer


def describe(request: Message) -> str:
    """The log message about the answer to a request."""
    if rapid(request):
        return "DHCP: ack to discover (Rapid Commit)"
    kind = message_type(request)
    if kind is None:
        return "BOOTP: ack to request"
    return "DHCP: offer to discover" if kind == dhcp.DISCOVER else f"DHCP: ack to {NAMES[kind]}"


def note(request: Message, now: float) -> None:
    """Tell of a client that gives up the address (RFC 2131, 4.3.3 and 4.3.4). Raises Malformed."""
    if message_type(request) == dhcp.DECLINE:
        declined = addr.text(request.address(dhcp.OPT_REQUESTED) or addr.ANY4)
        log.warn_ratelimited("DHCP decline", f"DHCP: the guest declines {declined}: another station uses it", now)
    else:
        log.info_ratelimited("DHCP release", f"DHCP: release of {addr.text(request.ciaddr)}", now)


def gives(request: Message, answer: Message, src_mac: bytes) -> bool:
    """Whether the sender of a request has its address by the answer: not by an offer, nor for others (relay agents)."""
    final = message_type(answer) in (None, dhcp.ACK) and any(answer.yiaddr)
    return final and not any(request.giaddr) and request.chaddr[:6] == src_mac


class Dhcp:
    """Answers DHCP and BOOTP requests."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._quiet = Quiet(time.monotonic())
        ctx.settings.react(self._changed)
        ctx.services.take_port(True, dhcp.SERVER_PORT, self.tap_handler)

    def _changed(self, former: Config, now: float) -> None:
        self._quiet.changed(former, self._ctx.config, now)

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, sport: int, payload: bytes, now: float
    ) -> bytes | None:
        """A UDP payload from the guest to the server's port of any address. Raises Malformed.

        Returns the address that is the guest's now, None if none was given: it may be silent for long.
        """
        config = self._ctx.config
        request = Message.parse(payload)
        ip4 = config.ip4
        if ignore(request, config) or ip4 is None or ip4.gateway is None:
            return None
        if message_type(request) in NOTED:
            note(request, now)
            return None
        wrong = refused(request, ip4.addr)
        if wrong is None:
            answer = reply(request, ip4, ip4.gateway, config, self._quiet.lease(config, now))
        else:
            answer = nak(request, dst if _one_host(dst) else ip4.gateway)
        what = describe(request) if wrong is None else "DHCP: nak to request"
        if log.info_ratelimited(what, what if wrong is None else f"{what} for {addr.text(wrong)}", now):
            log.info(f"    from {addr.mac_text(request.chaddr[:6])}")
        mac, to, port = destination(request, answer, src_mac, src)
        ends = ip4.our_addr or ip4.gateway, to, dhcp.SERVER_PORT, port
        self._ctx.link.send_frame(ether.udp_frame(mac, self._ctx.lan.mac_of(ends[0]), *ends, answer.emit()))
        return ip4.addr if gives(request, answer, src_mac) else None
