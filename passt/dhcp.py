"""The DHCP server of the guest (RFC 2131, RFC 2132): one lease, the same for whoever asks, and for ever.

    from the guest                  answer                                          not if
    ------------------------------  ----------------------------------------------  ------------------------
    DISCOVER                        OFFER                                           --no-dhcp, or no gateway
    DISCOVER with Rapid Commit      ACK with Rapid Commit (RFC 4039)
    REQUEST, for any address        ACK with the address there is to give
    BOOTP request (no type)         BOOTP reply (RFC 1534, 2)
    DECLINE, RELEASE, INFORM, ...   none

There is never a NAK: a client that asks for another address than ours is told ours, and takes it.

An answer goes to the assigned address at the client's MAC, or to everybody if the client set the broadcast flag.
Options stand in the order of the client's parameter request list, the rest behind it in ascending order; the message
type comes first unless the list says where. A gateway outside the assigned subnet (a /32, say) is made reachable by
classless routes (RFC 3442). A client that tells its name, or asks for it, is told ours for it (--fqdn), and that we
update no DNS (RFC 4702, 4).

The answer is never longer than the client takes: 300 bytes for BOOTP, 576 for DHCP unless the client says more (RFC
2131, 2; option 57) and the link takes it. What does not fit is left out in the order of `DISPENSABLE`.

Left out: leases in a table, timers, other clients. The guest is one, and keeps what it got; nothing is remembered of
those who ask, however many they say they are.
"""

from __future__ import annotations

from dataclasses import replace

from . import addr, log
from .flow.context import Context
from .policy.config import MTU_MAX, Config, Ip4
from .wire import dhcp, domain, ether, ip, udp
from .wire.dhcp import Fqdn, Message

INFINITE = b"\xff" * 4  # of lease times (RFC 2131, 3.3)
IP_UDP = ip.HEADER4.size + udp.HEADER.size

# The answer to a message type; None stands for BOOTP, which has no type.
ANSWERS = {dhcp.DISCOVER: dhcp.OFFER, dhcp.REQUEST: dhcp.ACK, None: None}

# What a client can do without, first what it needs least; the rest fits into the shortest of messages.
DISPENSABLE = (dhcp.OPT_SEARCH, dhcp.OPT_FQDN, dhcp.OPT_HOSTNAME, dhcp.OPT_MTU, dhcp.OPT_DNS)


def message_type(message: Message) -> int | None:
    """The message type option; None for BOOTP."""
    value = message.options.get(dhcp.OPT_TYPE)
    return None if value is None else int.from_bytes(value, "big")


def ignore(request: Message, config: Config) -> bool:
    """Whether `request` gets no answer."""
    if config.no_dhcp or config.ip4 is None or config.ip4.gateway is None:
        return True
    return request.op != dhcp.BOOTREQUEST or message_type(request) not in ANSWERS


def rapid(request: Message) -> bool:
    """Whether the client wants to be told at once, without an offer."""
    return message_type(request) == dhcp.DISCOVER and dhcp.OPT_RAPID_COMMIT in request.options


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
        options[dhcp.OPT_ROUTES] = on_link + b"\0" + gateway  # and the default route by way of it
    return options


def lease(request: Message, gateway: bytes) -> dict[int, bytes]:
    """The options that make it an answer of DHCP, not BOOTP."""
    kind = dhcp.ACK if rapid(request) else ANSWERS[message_type(request)]
    if kind is None:
        return {}
    options = {dhcp.OPT_TYPE: bytes((kind,)), dhcp.OPT_LEASE: INFINITE, dhcp.OPT_SERVER_ID: gateway}
    return options | {dhcp.OPT_RAPID_COMMIT: b""} if rapid(request) else options


def full_name(request: Message, name: str) -> bytes | None:
    """The client FQDN option of the answer, encoded as the client does it; None if it is not to be sent.

    Raises Malformed.
    """
    told = request.options.get(dhcp.OPT_FQDN)
    if not name or (told is None and dhcp.OPT_FQDN not in request.options.get(dhcp.OPT_PARAMETERS, b"")):
        return None
    asked = Fqdn.CANONICAL if told is None else Fqdn.parse(told).flags
    flags = Fqdn.NO_UPDATES | (asked & Fqdn.CANONICAL) | (Fqdn.OVERRIDDEN if asked & Fqdn.SERVER_UPDATES else 0)
    return Fqdn(flags, domain.encode(name) if flags & Fqdn.CANONICAL else name.encode()).emit()


def ordered(options: dict[int, bytes], wanted: bytes) -> dict[int, bytes]:
    """`options` as the client's parameter request list wants them, then the others ascending."""
    first = wanted if not wanted or dhcp.OPT_TYPE in wanted else bytes((dhcp.OPT_TYPE,)) + wanted
    codes = dict.fromkeys((*first, *sorted(options)))
    return {code: options[code] for code in codes if code in options}


def reply(request: Message, ip4: Ip4, gateway: bytes, config: Config) -> Message:
    """The answer to a request that is not to be ignored. Raises Malformed."""
    options = configuration(ip4, gateway, config) | lease(request, gateway)
    name = full_name(request, config.fqdn)
    if name is not None:
        options[dhcp.OPT_FQDN] = name
    wanted = request.options.get(dhcp.OPT_PARAMETERS, b"")
    answer = Message(
        dhcp.BOOTREPLY,
        request.xid,
        flags=request.flags,
        ciaddr=request.ciaddr,
        yiaddr=ip4.addr,
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


def room(request: Message, config: Config) -> int:
    """Bytes that an answer may have, as UDP payload."""
    if message_type(request) is None:
        return dhcp.BOOTP_SIZE
    asked = int.from_bytes(request.options.get(dhcp.OPT_MAX_SIZE, b""), "big")
    return max(dhcp.SIZE_MIN, min(asked, config.mtu or MTU_MAX)) - IP_UDP


def fit(answer: Message, limit: int, names: tuple[str, ...]) -> Message:
    """`answer` in `limit` bytes. The search list, of `names`, goes name by name from its end, others go as a whole."""
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
    """What is done about a request that is not ignored, for the log."""
    if rapid(request):
        return "DHCP: ack to discover (Rapid Commit)"
    kind = message_type(request)
    if kind is None:
        return "BOOTP: ack to request"
    return "DHCP: offer to discover" if kind == dhcp.DISCOVER else "DHCP: ack to request"


class Dhcp:
    """Answers DHCP and BOOTP requests."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx

    def tap_handler(self, src_mac: bytes, src: bytes, dst: bytes, payload: bytes, now: float) -> None:
        """A UDP payload from the guest to port 67, whatever address. Raises Malformed."""
        config = self._ctx.config
        request = Message.parse(payload)
        ip4 = config.ip4
        if ignore(request, config) or ip4 is None or ip4.gateway is None:
            return
        answer = reply(request, ip4, ip4.gateway, config).emit()
        what = describe(request)
        if log.info_ratelimited(what, what, now):
            log.info(f"    from {addr.mac_text(request.chaddr[:6])}")
        to = addr.BROADCAST4 if request.flags & dhcp.BROADCAST else ip4.addr
        source = ip4.our_addr or ip4.gateway
        ports = dhcp.SERVER_PORT, dhcp.CLIENT_PORT
        self._ctx.link.send_frame(ether.udp_frame(src_mac, config.our_mac, source, to, *ports, answer))
