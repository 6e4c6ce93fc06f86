"""The DHCPv6 server of the guest (RFC 8415): one address, the same for whoever asks, and for ever.

    from the guest       server identifier   answer      not if
    -------------------  ------------------  ----------  --------------------------------------------------
    SOLICIT              none                ADVERTISE   --no-dhcpv6, no address, no client identifier,
    REQUEST, RENEW       ours                REPLY         sent to a unicast address (RFC 8415, 18.4)
    CONFIRM, REBIND      none                REPLY
    INFORMATION-REQUEST  ours or none        REPLY       the same, or it has an identity association
    others               any                 none

An answer to a REQUEST, RENEW or CONFIRM for any other address than ours has, instead of the address and the DNS
options, the identity association with status NotOnLink: the client solicits again. REBIND is answered with what is
right. The association in the answer has the IAID of the client's first one; a client that asked for none is given
one all the same, since it was told by our router advertisement that addresses are managed here, except in answer to an
INFORMATION-REQUEST.

The server's identifier is a DUID-LLT of our MAC and the time at which we started. Search lists are not compressed. A
client that tells its name, or asks for it, is told ours for it (--fqdn), and that we update no DNS (RFC 4704, 6).

An answer is no longer than the link takes in one packet: search domains at the end that do not fit, and refused
associations beyond `REFUSED_MAX`, are left out.

Left out: leases and their timers (nothing ends), prefixes, temporary addresses, Rapid Commit, relays, Reconfigure.
"""

from __future__ import annotations

import time
from dataclasses import replace

from . import addr, log
from .flow.context import Context
from .policy.config import MTU_MAX, Config, Ip6
from .wire import dhcpv6, domain, ether, ip, udp
from .wire.dhcpv6 import Fqdn, Ia, IaAddress, Message

NONE, OURS, EITHER = range(3)  # what the server identifier of a message must be

# Message type -> (server identifier, answer)
RULES = {
    dhcpv6.SOLICIT: (NONE, dhcpv6.ADVERTISE),
    dhcpv6.REQUEST: (OURS, dhcpv6.REPLY),
    dhcpv6.RENEW: (OURS, dhcpv6.REPLY),
    dhcpv6.CONFIRM: (NONE, dhcpv6.REPLY),
    dhcpv6.REBIND: (NONE, dhcpv6.REPLY),
    dhcpv6.INFORMATION_REQUEST: (EITHER, dhcpv6.REPLY),
}
CHECKED = frozenset((dhcpv6.REQUEST, dhcpv6.RENEW, dhcpv6.CONFIRM))  # the addresses in these must be right
DEFAULT_IAID = 1
REFUSED_MAX = 16  # associations with status in an answer: they fit into 1280 bytes, whatever the client asks for
IP_UDP = ip.HEADER6.size + udp.HEADER.size


def associations(message: Message) -> tuple[Ia, ...]:
    """All identity associations for addresses. Raises Malformed."""
    return tuple(Ia.parse(o) for o in message.options if o[0] in (dhcpv6.OPT_IA_NA, dhcpv6.OPT_IA_TA))


def ignore(message: Message, dst: bytes, server_id: bytes, config: Config) -> bool:
    """Whether a message to `dst` gets no answer (RFC 8415, 16)."""
    if config.no_dhcpv6 or config.ip6 is None or config.ip6.addr is None or message.kind not in RULES:
        return True
    client_id = dhcpv6.find(message.options, dhcpv6.OPT_CLIENT_ID)
    if not addr.is_multicast(dst) or client_id is None or len(client_id) > dhcpv6.DUID_MAX:
        return True
    if message.kind == dhcpv6.INFORMATION_REQUEST and associations(message):
        return True
    theirs = dhcpv6.find(message.options, dhcpv6.OPT_SERVER_ID)
    allowed = {NONE: (None,), OURS: (server_id,), EITHER: (None, server_id)}
    return theirs not in allowed[RULES[message.kind][0]]


def off_link(message: Message, assigned: bytes) -> tuple[Ia, ...]:
    """The associations with an address that is not `assigned`, where that is to be refused. Raises Malformed."""
    if message.kind not in CHECKED:
        return ()
    return tuple(ia for ia in associations(message) if any(a != assigned for a in ia.addresses))


def refused(ia: Ia) -> dhcpv6.Option:
    """The association in an answer that says: that address is not for this link."""
    status = dhcpv6.status(dhcpv6.STATUS_NOT_ON_LINK, "Prefix not appropriate for link.")
    return Ia(ia.iaid, (status,), ia.t1, ia.t2, ia.temporary).emit()


def granted(message: Message, assigned: bytes) -> dhcpv6.Option:
    """The association in an answer that gives the address, never to expire."""
    asked = (ia.iaid for ia in associations(message) if not ia.temporary)
    return Ia(next(asked, DEFAULT_IAID), (IaAddress(assigned).emit(),)).emit()


def names(message: Message, ip6: Ip6, config: Config) -> dhcpv6.Options:
    """Resolvers and the client's name, as far as they are to be told. Raises Malformed."""
    options = []
    if config.advertise_dns and ip6.dns:
        options.append((dhcpv6.OPT_DNS, b"".join(ip6.dns)))
    told = dhcpv6.find(message.options, dhcpv6.OPT_FQDN)
    if config.fqdn and (told is not None or dhcpv6.requests(message.options, dhcpv6.OPT_FQDN)):
        asked = 0 if told is None else Fqdn.parse(told).flags
        flags = Fqdn.NO_UPDATES | (Fqdn.OVERRIDDEN if asked & Fqdn.SERVER_UPDATES else 0)
        options.append(Fqdn(flags, domain.encode(config.fqdn)).emit())
    return tuple(options)


def search(domains: tuple[str, ...], room: int) -> dhcpv6.Options:
    """The search list, as far as it and its header fit into `room` bytes."""
    told = domain.leading(domains, room - dhcpv6.OPTION.size)
    return ((dhcpv6.OPT_SEARCH, domain.encode_list(told)),) if told else ()


def reply(message: Message, server_id: bytes, ip6: Ip6, assigned: bytes, config: Config) -> Message:
    """The answer to a message that is not to be ignored. Raises Malformed."""
    wrong = off_link(message, assigned)[:REFUSED_MAX]
    if wrong:
        given: tuple[dhcpv6.Option, ...] = tuple(map(refused, wrong))
    elif message.kind == dhcpv6.INFORMATION_REQUEST:
        given = ()
    else:
        given = (granted(message, assigned),)
    client_id = dhcpv6.find(message.options, dhcpv6.OPT_CLIENT_ID) or b""
    identities = (dhcpv6.OPT_SERVER_ID, server_id), (dhcpv6.OPT_CLIENT_ID, client_id)
    rest = () if wrong else names(message, ip6, config)
    kind = RULES[message.kind][1]
    answer = Message(kind, message.transaction, (identities[0], *given, identities[1], *rest))
    if wrong or not config.advertise_search:
        return answer
    room = (config.mtu or MTU_MAX) - IP_UDP - len(answer.emit())
    return replace(answer, options=(*answer.options, *search(config.dns_search, room)))


class Dhcpv6:
    """Answers DHCPv6 clients."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.server_id = dhcpv6.duid_llt(ctx.config.our_mac, time.time())

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, sport: int, payload: bytes, now: float
    ) -> bytes | None:
        """A UDP payload from the guest to port 547. Raises Malformed.

        Returns the address that the guest was given, None without an answer: it is the guest's from now on, and the
        caller may take it as seen before the first packet comes from it.
        """
        config = self._ctx.config
        message = Message.parse(payload)
        ip6 = config.ip6
        if ignore(message, dst, self.server_id, config) or ip6 is None or ip6.addr is None:
            return None
        answer = reply(message, self.server_id, ip6, ip6.addr, config)
        for ia in off_link(message, ip6.addr)[:1]:
            wrong = next(a for a in ia.addresses if a != ip6.addr)
            log.info_ratelimited("DHCPv6 link", f"DHCPv6: requested address {addr.text(wrong)} not on link", now)
        what = f"DHCPv6: received {dhcpv6.NAMES[message.kind]}, sending {dhcpv6.NAMES[answer.kind]}"
        log.info_ratelimited(what, what, now)
        frame = ether.udp_frame(
            src_mac,
            config.our_mac,
            ip6.our_ll,
            src,
            dhcpv6.SERVER_PORT,
            dhcpv6.CLIENT_PORT,
            answer.emit(),
            flow_label=int.from_bytes(message.transaction, "big"),
        )
        self._ctx.link.send_frame(frame)
        return ip6.addr
