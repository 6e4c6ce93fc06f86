"""The DHCPv6 server of the guest (RFC 8415): one address, the same for all clients.

    from the guest             server identifier   answer      not if
    -------------------------  ------------------  ----------  -----------------------------------------------
    SOLICIT                    none                ADVERTISE   --no-dhcpv6, no address, no client identifier,
      with Rapid Commit        none                REPLY         sent to a unicast address
    CONFIRM                    none                REPLY       the same, or it names no address
    REBIND                     none                REPLY
    REQUEST, RENEW             ours                REPLY       --no-dhcpv6, no address, no client identifier
    RELEASE, DECLINE           ours                REPLY       (to a unicast address: UseMulticast, and no more)
    INFORMATION-REQUEST        ours or none        REPLY       --no-dhcpv6, no address, sent to a unicast
                                                                 address, or it has an identity association
    any other                  any                 none

The address goes to one association: the first IA_NA that names it, or else the first IA_NA. The answer has each
association that the client sent, up to `ASSOCIATIONS_MAX`, and no other:

    message                    association                        its contents in the answer
    -------------------------  ---------------------------------  ---------------------------------------------
    REQUEST                    names an address of another link   status NotOnLink: the client solicits again
    SOLICIT, REQUEST, RENEW,   the one with the address           the address, with its lifetime
      REBIND                   any other IA_NA, or IA_TA          status NoAddrsAvail
                               IA_PD                              status NoPrefixAvail
    RENEW, REBIND              names addresses or prefixes that   these with lifetime 0, beside or instead of the
                                 it does not have                   above: the client stops using them
    RELEASE, DECLINE           does not have the address          status NoBinding

The answer to a CONFIRM is one status: Success if all addresses are on the link, which is the /64 of router
advertisements, or else NotOnLink. RELEASE and DECLINE have status Success, too; the released address is assigned again,
since it is the only one.

The server's identifier is a DUID-LLT of our MAC and the start time. An ADVERTISE has the highest preference, so that
the client does not wait for other servers. Search lists are not compressed. A client that sends or requests the FQDN
option gets the name of --fqdn, with the flag for no DNS update (RFC 4704, 6).

An answer fits into one packet: search domains at the end that do not fit are left out, as are addresses and prefixes to
give up beyond `WITHDRAWN_MAX`.

Lifetimes are those of `policy/lease.py`: short after a change of the host's network, infinite with --follow off. T1 and
T2 are the client's choice (RFC 8415, 14.2) where the lifetime is not infinite. The answer to an INFORMATION-REQUEST has
the same time as the refresh time, if the client asks for that: its default is a day.

Left out: leases in a table, timers, prefixes, temporary addresses, relays, Reconfigure (it needs authentication).
docs/services.md has the requirements of the RFC one by one.
"""

from __future__ import annotations

import time

from . import addr, log
from .flow.context import Context
from .lean.records import dataclass, replace
from .policy.config import Config, Ip6
from .policy.lease import Quiet
from .wire import dhcpv6, domain, ether, ip, udp
from .wire.dhcpv6 import INFINITE, Fqdn, Ia, IaAddress, Message, Prefix

NONE, OURS, EITHER = range(3)  # required server identifier of a message

# Message type -> (server identifier, answer)
RULES = {
    dhcpv6.SOLICIT: (NONE, dhcpv6.ADVERTISE),
    dhcpv6.REQUEST: (OURS, dhcpv6.REPLY),
    dhcpv6.CONFIRM: (NONE, dhcpv6.REPLY),
    dhcpv6.RENEW: (OURS, dhcpv6.REPLY),
    dhcpv6.REBIND: (NONE, dhcpv6.REPLY),
    dhcpv6.RELEASE: (OURS, dhcpv6.REPLY),
    dhcpv6.DECLINE: (OURS, dhcpv6.REPLY),
    dhcpv6.INFORMATION_REQUEST: (EITHER, dhcpv6.REPLY),
}
GIVEN_UP = frozenset((dhcpv6.RELEASE, dhcpv6.DECLINE))  # messages by which the client gives up the address
EXTENDED = frozenset((dhcpv6.RENEW, dhcpv6.REBIND))
LINK_PREFIX = 64  # of the addresses on the link, as router advertisements say
ASSOCIATIONS_MAX = 8  # further ones are ignored
REFRESH_MIN = 600  # s; RFC 8415, 7.6: IRT_MINIMUM
WITHDRAWN_MAX = 8  # so that an answer to any request fits into 1280 bytes
NOW = b"\xff"  # a preference that ends the client's wait for other servers (RFC 8415, 18.2.1)
IP_UDP = ip.HEADER6.size + udp.HEADER.size

# Status -> text for it
TEXTS = {
    dhcpv6.SUCCESS: "",
    dhcpv6.NO_ADDRS_AVAIL: "No more addresses.",
    dhcpv6.NO_BINDING: "No such binding.",
    dhcpv6.NOT_ON_LINK: "Prefix not appropriate for link.",
    dhcpv6.USE_MULTICAST: "Unicast not allowed.",
    dhcpv6.NO_PREFIX_AVAIL: "No prefixes here.",
}


def status(code: int) -> dhcpv6.Option:
    """A status, with its text."""
    return dhcpv6.status(code, TEXTS[code])


@dataclass(frozen=True, slots=True)
class Asked:
    """An association of a message, with its addresses, parsed once."""

    ia: Ia
    addresses: tuple[bytes, ...] = ()
    wrong: bytes | None = None  # the first address that is of another link


def associations(message: Message, assigned: bytes) -> tuple[Asked, ...]:
    """The first ASSOCIATIONS_MAX associations, on the link of `assigned`. Raises Malformed."""
    found = []
    for option in [o for o in message.options if o[0] in dhcpv6.IA_CODES][:ASSOCIATIONS_MAX]:
        ia = Ia.parse(option)
        addresses = ia.addresses
        wrong = next((a for a in addresses if not addr.in_subnet(a, assigned, LINK_PREFIX)), None)
        found.append(Asked(ia, addresses, wrong))
    return tuple(found)


def ignore(message: Message, src: bytes, dst: bytes, server_id: bytes, config: Config) -> bool:
    """Whether a message from `src` to `dst` gets no answer (RFC 8415, 16)."""
    if config.no_dhcpv6 or config.ip6 is None or config.ip6.addr is None or message.kind not in RULES:
        return True
    information = message.kind == dhcpv6.INFORMATION_REQUEST
    client_id = dhcpv6.find(message.options, dhcpv6.OPT_CLIENT_ID)
    if not (information if client_id is None else 0 < len(client_id) <= dhcpv6.DUID_MAX):
        return True
    allowed = RULES[message.kind][0]
    if not (addr.is_multicast(dst) or allowed == OURS) or not addr.is_unicast(src):
        return True
    if information and any(code in dhcpv6.IA_CODES for code, _ in message.options):
        return True
    theirs = dhcpv6.find(message.options, dhcpv6.OPT_SERVER_ID)
    return theirs not in {NONE: (None,), OURS: (server_id,), EITHER: (None, server_id)}[allowed]


def first_wrong(asked: tuple[Asked, ...]) -> bytes | None:
    """The first address that is of another link."""
    return next((a.wrong for a in asked if a.wrong is not None), None)


def refused(asked: Asked, message: Message) -> bool:
    """Whether a REQUEST has an association that is for another link."""
    return message.kind == dhcpv6.REQUEST and asked.wrong is not None


def holder(message: Message, asked: tuple[Asked, ...], assigned: bytes) -> Asked | None:
    """The association that gets the address."""
    if message.kind not in (dhcpv6.SOLICIT, dhcpv6.REQUEST, *EXTENDED):
        return None
    able = [a for a in asked if a.ia.code == dhcpv6.OPT_IA_NA and not refused(a, message)]
    return next((a for a in able if assigned in a.addresses), able[0] if able else None)


def withdrawn(asked: Asked, kept: bytes | None) -> dhcpv6.Options:
    """Addresses and prefixes other than `kept`, for the client to give up at once. Raises Malformed."""
    addresses = (IaAddress(a, 0, 0).emit() for a in asked.addresses if a != kept)
    prefixes = (Prefix(prefix, prefix_len, 0, 0).emit() for prefix, prefix_len in asked.ia.prefixes)
    return (*addresses, *prefixes)


def answered(message: Message, asked: tuple[Asked, ...], assigned: bytes, seconds: int = INFINITE) -> dhcpv6.Options:
    """The associations of a message that asks for the address, as they are in the answer: it is the client's for so
    many seconds. Raises Malformed.
    """
    room = WITHDRAWN_MAX
    chosen = holder(message, asked, assigned)
    found = []
    for one in asked:
        ia = one.ia
        held = (IaAddress(assigned, seconds, seconds).emit(),) if one is chosen else ()
        gone = withdrawn(one, assigned if held else None)[:room] if message.kind in EXTENDED else ()
        room -= len(gone)
        none = dhcpv6.NO_PREFIX_AVAIL if ia.code == dhcpv6.OPT_IA_PD else dhcpv6.NO_ADDRS_AVAIL
        why = dhcpv6.NOT_ON_LINK if refused(one, message) else none
        life = INFINITE if held and seconds == INFINITE else 0  # 0: when the client likes
        found.append(Ia(ia.iaid, (*held, *gone) or (status(why),), life, life, ia.code).emit())
    return tuple(found)


def unknown(asked: tuple[Asked, ...], assigned: bytes) -> dhcpv6.Options:
    """The associations that a client gives up without having had them."""
    others = (a.ia for a in asked if a.ia.code != dhcpv6.OPT_IA_NA or assigned not in a.addresses)
    return tuple(Ia(ia.iaid, (status(dhcpv6.NO_BINDING),), 0, 0, ia.code).emit() for ia in others)


def names(message: Message, ip6: Ip6, config: Config) -> dhcpv6.Options:
    """The options with resolvers and the client's name, if they are to be sent. Raises Malformed."""
    options = []
    if config.advertise_dns and ip6.dns:
        options.append((dhcpv6.OPT_DNS, b"".join(ip6.dns)))
    sent = dhcpv6.find(message.options, dhcpv6.OPT_FQDN)
    if config.fqdn and (sent is not None or dhcpv6.requests(message.options, dhcpv6.OPT_FQDN)):
        asked = 0 if sent is None else Fqdn.parse(sent).flags
        flags = Fqdn.NO_UPDATES | (Fqdn.OVERRIDDEN if asked & Fqdn.SERVER_UPDATES else 0)
        options.append(Fqdn(flags, domain.encode(config.fqdn)).emit())
    return tuple(options)


def refresh(message: Message, seconds: int) -> dhcpv6.Options:
    """The option by which a client without a lease asks again as early as one with it. Raises Malformed."""
    wanted = message.kind == dhcpv6.INFORMATION_REQUEST and dhcpv6.requests(message.options, dhcpv6.OPT_REFRESH)
    if not wanted or seconds == INFINITE:
        return ()
    return ((dhcpv6.OPT_REFRESH, max(seconds, REFRESH_MIN).to_bytes(4, "big")),)


def search(domains: tuple[str, ...], room: int) -> dhcpv6.Options:
    """The option with the leading domains that fit into `room` bytes with its header."""
    fitting = domain.leading(domains, room - dhcpv6.OPTION.size)
    return ((dhcpv6.OPT_SEARCH, domain.encode_list(fitting)),) if fitting else ()


def reply(
    message: Message, asked: tuple[Asked, ...], dst: bytes, server_id: bytes, ip6: Ip6, assigned: bytes, config: Config,
    seconds: int = INFINITE,
) -> Message:  # fmt: skip
    """The answer to a message that is not to be ignored. Raises Malformed."""
    client_id = dhcpv6.find(message.options, dhcpv6.OPT_CLIENT_ID)
    server = (dhcpv6.OPT_SERVER_ID, server_id)
    client = () if client_id is None else ((dhcpv6.OPT_CLIENT_ID, client_id),)
    if not addr.is_multicast(dst):
        return _reply(message, server, *client, status(dhcpv6.USE_MULTICAST))
    if message.kind in GIVEN_UP:
        return _reply(message, server, *unknown(asked, assigned), *client, status(dhcpv6.SUCCESS))
    if message.kind == dhcpv6.CONFIRM:
        right = first_wrong(asked) is None
        return _reply(message, server, *client, status(dhcpv6.SUCCESS if right else dhcpv6.NOT_ON_LINK))
    given = (server, *answered(message, asked, assigned, seconds), *client)
    if rapid(message):
        answer = _reply(message, *given, (dhcpv6.OPT_RAPID_COMMIT, b""), *names(message, ip6, config))
    elif message.kind == dhcpv6.SOLICIT:
        rest = (dhcpv6.OPT_PREFERENCE, NOW), *names(message, ip6, config)
        answer = Message(dhcpv6.ADVERTISE, message.transaction, (*given, *rest))
    else:
        answer = _reply(message, *given, *refresh(message, seconds), *names(message, ip6, config))
    if not config.advertise_search:
        return answer
    room = (config.mtu or ip.MTU_MAX) - IP_UDP - len(answer.emit())
    return replace(answer, options=(*answer.options, *search(config.dns_search, room)))


def _reply(message: Message, *options: dhcpv6.Option) -> Message:
    return Message(dhcpv6.REPLY, message.transaction, options)


def rapid(message: Message) -> bool:
    """Whether the client wants to be given the address at once."""
    return message.kind == dhcpv6.SOLICIT and dhcpv6.find(message.options, dhcpv6.OPT_RAPID_COMMIT) is not None


def has_address(message: Message, asked: tuple[Asked, ...], answer: Message, dst: bytes, assigned: bytes) -> bool:
    """Whether the guest has the address after this answer."""
    if answer.kind != dhcpv6.REPLY or not addr.is_multicast(dst):
        return False
    if message.kind == dhcpv6.CONFIRM:
        return first_wrong(asked) is None and any(assigned in a.addresses for a in asked)
    return holder(message, asked, assigned) is not None


def tell(message: Message, asked: tuple[Asked, ...], answer: Message, assigned: bytes, now: float) -> None:
    """Log a message and its answer."""
    wrong = None if message.kind == dhcpv6.SOLICIT or message.kind in GIVEN_UP else first_wrong(asked)
    if wrong is not None:
        log.info_ratelimited("DHCPv6 link", f"DHCPv6: requested address {addr.text(wrong)} not on link", now)
    if message.kind == dhcpv6.DECLINE:
        text = f"DHCPv6: the guest declines {addr.text(assigned)}: another station uses it"
        log.warn_ratelimited("DHCPv6 decline", text, now)
    what = f"DHCPv6: received {dhcpv6.NAMES[message.kind]}, sending {dhcpv6.NAMES[answer.kind]}"
    log.info_ratelimited(what, what, now)


class Dhcpv6:
    """Answers DHCPv6 clients."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.server_id = dhcpv6.duid_llt(ctx.config.our_mac, time.time())
        self._quiet = Quiet(time.monotonic())
        ctx.settings.react(self._changed)
        ctx.services.take_port(False, dhcpv6.SERVER_PORT, self.tap_handler)

    def _changed(self, former: Config, now: float) -> None:
        self._quiet.changed(former, self._ctx.config, now)

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, sport: int, payload: bytes, now: float
    ) -> bytes | None:
        """A UDP payload from the guest to the server's port. Raises Malformed.

        Returns the assigned address, None if none was assigned. The caller may use it as the guest's address before the
        first packet from it.
        """
        config = self._ctx.config
        message = Message.parse(payload)
        ip6 = config.ip6
        if ignore(message, src, dst, self.server_id, config) or ip6 is None or ip6.addr is None:
            return None
        asked = associations(message, ip6.addr)
        if message.kind == dhcpv6.CONFIRM and not any(a.addresses for a in asked):
            return None  # nothing to confirm (RFC 8415, 18.3.3)
        seconds = self._quiet.lease(config, now)
        answer = reply(message, asked, dst, self.server_id, ip6, ip6.addr, config, seconds)
        tell(message, asked, answer, ip6.addr, now)
        frame = ether.udp_frame(
            src_mac,
            self._ctx.lan.mac_of(ip6.our_ll),
            ip6.our_ll,
            src,
            dhcpv6.SERVER_PORT,
            dhcpv6.CLIENT_PORT,
            answer.emit(),
            flow_label=int.from_bytes(message.transaction, "big"),
        )
        self._ctx.link.send_frame(frame)
        return ip6.addr if has_address(message, asked, answer, dst, ip6.addr) else None
