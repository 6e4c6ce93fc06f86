"""Reasons of drops: each once, with its text, which is the name of a counter.

    ctx.drops[Drop.TCP_ENDPOINT] += 1            a reason by its name
    ctx.drops[Failed.UDP_SEND.of(e)] += count    a system call failed: the text ends in the name of the errno
    raise Malformed(Drop.UDP_LENGTH)             likewise, counted where it is caught

The texts are labels of a metric (`passt_drops_total{reason="..."}`), rows of the statistics and of `pesto --top`: they
have nothing of the guest in them, and they stay as they are. `docs/drops.md` lists them, checked by a test.

Members are plain class attributes, and strings: a drop costs one increment in a dict.
"""

from __future__ import annotations

import errno


class Reason(str):
    """The text of a counter."""

    __slots__ = ()


class Prefix:
    """Reasons that differ in an errno."""

    __slots__ = ("_by_errno", "text")

    def __init__(self, text: str) -> None:
        self.text = text
        self._by_errno: dict[int | None, Reason] = {}

    def of(self, e: OSError | int) -> Reason:
        """`text: EPERM`"""
        number = e if isinstance(e, int) else e.errno
        reason = self._by_errno.get(number)
        if reason is None:
            name = errno.errorcode.get(number or 0, str(number))
            reason = self._by_errno[number] = Reason(f"{self.text}: {name}")
        return reason


class Drop:
    """The reasons that are one text."""

    # Frames of the guest
    TRUNCATED = Reason("truncated")
    OVERSIZED_FRAME = Reason("oversized frame")
    ETHERTYPE = Reason("ethertype")
    VLAN = Reason("vlan")
    IPV4_DISABLED = Reason("ipv4 disabled")
    IPV6_DISABLED = Reason("ipv6 disabled")
    IPV4_HEADER = Reason("ipv4 header")
    IPV4_LENGTH = Reason("ipv4 length")
    IPV4_CHECKSUM = Reason("ipv4 checksum")
    IPV6_HEADER = Reason("ipv6 header")
    IPV6_LENGTH = Reason("ipv6 length")
    IPV6_NO_NEXT_HEADER = Reason("IPv6 no next header")
    IPV6_EXTENSION_TRUNCATED = Reason("IPv6 extension header truncated")
    IPV6_EXTENSIONS = Reason("IPv6 too many extension headers")
    IP_PROTOCOL = Reason("ip protocol")
    ICMP_TRUNCATED = Reason("icmp truncated")
    ICMP_TYPE = Reason("icmp type")
    ICMP_CHECKSUM = Reason("icmp checksum")
    NDP_HOP_LIMIT = Reason("ndp hop limit")
    MEMBERSHIP_TRUNCATED = Reason("group membership: truncated")
    MEMBERSHIP_TYPE = Reason("group membership: type")
    MEMBERSHIP_HOPS = Reason("group membership: ttl or hop limit")
    MEMBERSHIP_SOURCE = Reason("group membership: source address")
    MEMBERSHIP_TOO_MANY = Reason("group membership: too many sources")
    IGMP_CHECKSUM = Reason("igmp checksum")
    UDP_TRUNCATED = Reason("udp truncated")
    UDP_LENGTH = Reason("udp length")
    UDP_CHECKSUM = Reason("udp checksum")
    UDP_DATAGRAMS = Reason("udp: too many datagrams in a frame")
    TCP_TRUNCATED = Reason("tcp truncated")
    TCP_CHECKSUM = Reason("tcp checksum")
    FAULT = Reason("fault")
    FRAGMENT_BAD = Reason("fragment: bad")
    FRAGMENT_DUPLICATE = Reason("fragment: duplicate")
    FRAGMENT_OVERLAP = Reason("fragment: overlap")
    FRAGMENT_PROTOCOL = Reason("fragment: protocol")
    FRAGMENT_QUEUE_FULL = Reason("fragment: queue full")
    FRAGMENT_TIMEOUT = Reason("fragment: timeout")

    # Frames to the guest
    NO_TAP = Reason("no tap")
    NO_GUEST = Reason("no guest")
    STREAM_FULL = Reason("stream full")
    STREAM_FRAME_TOO_LONG = Reason("stream: frame too long")
    VRING_FULL = Reason("vring full")
    VRING_BROKEN = Reason("vring broken")
    TAP_FRAME_TOO_LONG = Reason("tap write: frame too long")
    CAPTURE_TOO_SLOW = Reason("capture: reader too slow")
    GUEST_NO_DESCRIPTOR = Reason("guest: no descriptor")

    # Configuration services
    ARP_FORMAT = Reason("ARP not for IPv4 over Ethernet")
    ARP_TRUNCATED = Reason("ARP truncated")
    NDP_PROBE = Reason("NDP probe not to solicited-node address")
    NDP_TOO_MANY = Reason("NDP too many options")
    NDP_TRUNCATED = Reason("NDP truncated")
    NDP_TRAILING = Reason("NDP trailing bytes")
    NDP_TYPE = Reason("NDP type or code")
    NDP_OPTION_LENGTH = Reason("NDP option of length zero")
    NDP_TARGET = Reason("NDP target multicast")
    NDP_NO_SOURCE = Reason("NDP link-layer address without source")
    DHCP_TOO_MANY = Reason("DHCP too many options")
    DHCP_ADDRESS_LENGTH = Reason("DHCP address option length")
    DHCP_CLIENT_ID = Reason("DHCP client identifier length")
    DHCP_TRUNCATED = Reason("DHCP truncated")
    DHCP_HARDWARE_ADDRESS = Reason("DHCP hardware address length")
    DHCP_OPTION_TRUNCATED = Reason("DHCP option truncated")
    DHCP_FQDN_TRUNCATED = Reason("DHCP client FQDN truncated")
    DHCPV6_TOO_MANY = Reason("DHCPv6 too many options")
    DHCPV6_PREFIX_TRUNCATED = Reason("DHCPv6 IA prefix truncated")
    DHCPV6_TRUNCATED = Reason("DHCPv6 truncated")
    DHCPV6_RELAYED = Reason("DHCPv6 relayed")
    DHCPV6_IA_TRUNCATED = Reason("DHCPv6 IA truncated")
    DHCPV6_ADDR_TRUNCATED = Reason("DHCPv6 IA address truncated")
    DHCPV6_ORO_TRUNCATED = Reason("DHCPv6 option request truncated")
    DHCPV6_FQDN_TRUNCATED = Reason("DHCPv6 client FQDN truncated")
    NAME_TRUNCATED = Reason("domain name truncated")
    NAME_COMPRESSED = Reason("domain name compressed")
    NAME_POINTER = Reason("domain name pointer not backwards")
    NAME_LABEL = Reason("domain name label type")
    NAME_TOO_LONG = Reason("domain name too long")
    NAME_NOT_TEXT = Reason("domain name not text")
    NAME_POINTERS = Reason("domain name too many pointers")

    # Pings, and errors that are told by ICMP
    GUEST_ERROR_QUOTE = Reason("icmp error of the guest: quote")
    GUEST_ERROR_STRANGE = Reason("icmp error of the guest: about nothing")
    PING_DISABLED = Reason("icmp: disabled")
    PING_TRUNCATED = Reason("icmp: truncated")
    PING_NO_REQUEST = Reason("icmp: not an echo request")
    PING_NO_ADDRESS = Reason("icmp: no address to answer or to ask")
    PING_MARTIAN = Reason("icmp: martian address")
    PING_FAMILY_OFF = Reason("icmp: address family is off")
    PING_TABLE_FULL = Reason("icmp: no flow: table full")
    PING_NO_SOCKETS = Reason("icmp: no ping sockets")
    PING_BUFFER_FULL = Reason("icmp: send buffer full")
    PING_NO_REPLY = Reason("icmp: not an echo reply")
    PING_ELSEWHERE = Reason("icmp: reply from elsewhere")
    PING_DUPLICATE = Reason("icmp: duplicate reply")
    PING_EVICTED = Reason("ping: closed to make room")
    EXTENDED_ERROR_TRUNCATED = Reason("extended error truncated")
    ICMP_ERROR_NOT_SENT = Reason("icmp: error not sent")

    # TCP
    TCP_DISABLED = Reason("tcp disabled")
    TCP_HEADER_LENGTH = Reason("tcp header length")
    TCP_OPTION_LENGTH = Reason("tcp option length")
    TCP_ENDPOINT = Reason("tcp endpoint")
    TCP_RESET_OUT_OF_WINDOW = Reason("tcp reset out of window")
    TCP_NO_SOCKET = Reason("tcp socket")
    TCP_EVICTED = Reason("tcp: half open: closed to make room")
    TCP_CLOSING_EVICTED = Reason("tcp: reset, not delivered: closed to make room")
    TCP_TIMED_OUT = Reason("tcp: connection has timed out")
    TCP_TABLE_FULL = Reason("flow table full")
    TCP_OUT_OF_ORDER = Reason("tcp early: no room")
    TCP_INBOUND_NO_GUEST = Reason("tcp inbound: no guest")
    TCP_INBOUND_EVICTED = Reason("tcp inbound: half open: closed to make room")
    TCP_INBOUND_HALF_OPEN = Reason("tcp inbound: too many half open")
    TCP_INBOUND_NO_ADDRESS = Reason("tcp inbound: no address")
    TCP_INBOUND_IN_USE = Reason("tcp inbound: endpoints in use")
    TCP_INBOUND_NO_DESCRIPTOR = Reason("tcp inbound: no descriptor")

    # UDP
    UDP_DISABLED = Reason("udp: disabled")
    UDP_FAMILY_OFF = Reason("udp: address family is off")
    UDP_NO_ADDRESS = Reason("udp: no address to answer or to send to")
    UDP_MARTIAN = Reason("udp: martian address")
    UDP_PORT_0 = Reason("udp: port 0")
    UDP_TABLE_FULL = Reason("udp: no flow: table full")
    UDP_EVICTED = Reason("UDP flow: closed to make room")
    UDP_SOURCE = Reason("udp: source is not unicast")
    UDP_SOURCE_PORT_0 = Reason("udp: source port 0")
    UDP_TOO_MUCH = Reason("udp: too much for one event")
    UDP_NOT_FROM_LOOPBACK = Reason("udp: not from loopback")
    UDP_NO_GUEST = Reason("udp: no guest")
    UDP_NO_TARGET = Reason("udp: no address to deliver to or from")

    # Multicast
    MULTICAST_DISABLED = Reason("multicast: disabled")
    GROUPS_TOO_MANY = Reason("multicast: too many groups")
    GROUP_HOSTS_TOO_MANY = Reason("multicast: too many hosts in a group")
    GROUP_RECEIVERS = Reason("multicast: too many receivers")
    GROUP_JOINS_TOO_FAST = Reason("multicast: joins too fast")

    # Queries
    DNS_NO_QUERY = Reason("dns: not a query")
    DNS_TOO_LONG = Reason("dns: query too long")
    DNS_TOO_MANY = Reason("dns: too many queries")
    DNS_NOT_REPEATED = Reason("dns: query not repeated")
    DNS_TABLE_FULL = Reason("dns: no flow: table full")
    DNS_NO_DESCRIPTOR = Reason("dns: no descriptor")
    DNS_NO_ANSWER = Reason("dns: no answer")
    DNS_NOT_AN_ANSWER = Reason("dns: not an answer")
    DNS_ANSWER_TO_NONE = Reason("dns: answer to no query")
    DNS_EVICTED = Reason("DNS flow: closed to make room")
    DNS_RESOLVER_SILENT = Reason("dns: resolver failed: no answer")
    DNS_ALL_FAILED = Reason("dns: all resolvers failed")

    # Loopback to loopback
    SPLICE_TABLE_FULL = Reason("splice: table full")
    UDP_SPLICE_NO_TARGET = Reason("udp splice: no address to deliver to")
    UDP_SPLICE_TABLE_FULL = Reason("udp splice: no flow: table full")
    UDP_SPLICE_EVICTED = Reason("spliced UDP flow: closed to make room")

    # Ports and the control socket
    LISTEN_NOT_FROM_LOOPBACK = Reason("listen: not from loopback")
    LISTEN_NO_DESCRIPTOR = Reason("listen: no descriptor")
    LISTEN_DESTROYED = Reason("listen: socket destroyed")
    AUTO_TOO_MANY = Reason("auto: too many ports")
    CONTROL_TOO_MANY = Reason("control: too many clients")
    CONTROL_NO_DESCRIPTOR = Reason("control: no descriptor")
    CONTROL_NOT_ALLOWED = Reason("control: peer not allowed")
    CONTROL_GARBAGE = Reason("control: garbage")
    CONTROL_TOO_SLOW = Reason("control: too slow")


class Failed:
    """Those that end in the name of an errno."""

    TAP_WRITE = Prefix("tap write")
    PING = Prefix("icmp")
    PING_NO_FLOW = Prefix("icmp: no flow")
    UDP_SEND = Prefix("udp: send")
    UDP_RECEIVE = Prefix("udp: receive")
    UDP_NO_SOCKET = Prefix("udp: no socket")
    UDP_NO_FLOW = Prefix("udp: no flow")
    GROUP_JOIN = Prefix("multicast: join")
    DNS_SEND = Prefix("dns: send")
    DNS_RESOLVER = Prefix("dns: resolver failed")
    SPLICE = Prefix("splice")
    UDP_SPLICE = Prefix("udp splice")
    UDP_SPLICE_SEND = Prefix("udp splice: send")
    UDP_SPLICE_NO_FLOW = Prefix("udp splice: no flow")
    UDP_SPLICE_NO_SERVER = Prefix("udp splice: no server")


REASONS = tuple(reason for reason in vars(Drop).values() if isinstance(reason, Reason))
PREFIXES = tuple(prefix for prefix in vars(Failed).values() if isinstance(prefix, Prefix))
