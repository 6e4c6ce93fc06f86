"""Ping in both directions and both families. Errors that the kernel reports go to the guest (`flow/errors.py`).

Echo. Each (guest address, destination, identifier) is a flow with a ping socket of its own (SOCK_DGRAM, IPPROTO_ICMP or
IPPROTO_ICMPV6), which needs no privilege if net.ipv4.ping_group_range (for IPv6, too) contains one of our groups.

    guest -> host   the request is sent unchanged: the kernel writes the socket's identifier and the checksum
    host -> guest   the reply gets the guest's identifier back; sequence number and data stay

The socket's identifier is the guest's if no other ping socket of the host has it, else the kernel's choice. A ping
socket receives replies with its identifier from any source: those that are not from the destination are dropped, unless
the destination is a group, where each member answers from its own address. In a namespace, a reply with the sequence
number of the previous one is a duplicate and dropped, until the guest sends a request with that number again.

TTL, traffic class and DF of the requests are those of the guest (`flow/ip_fields.py`), and the traffic class of a reply
is that of its frame: `ping -t`, `ping -Q` and `ping -M do` find what they would find on the host.

A flow ends after 60 s without a request or a reply.

Left out: ICMP messages of the guest other than echo requests; no socket can send them. Errors of the guest about what
it was sent act here (`flow/guest_errors.py`).
"""

from __future__ import annotations

import errno
import random
import socket
from typing import Any, ClassVar

from . import addr, log
from .calls import calls
from .drops import Drop, Failed, Reason
from .flow.context import Context
from .flow.errors import Errors
from .flow.idle import IdleFlow, IdleFlows, flow_limit
from .flow.ip_fields import DF, DF_MESSAGE_MAX, UNSET, apply
from .flow.table import GUEST, Endpoints, TableFull
from .linux.memory import zeros
from .linux.mmsg import CLASS_SPACE, class_in
from .linux.sockopt import RECEIVE_CLASS, RECVERR, creating, path_mtu, read_errors, recverr, setting
from .loop.reactor import EPOLLERR, EPOLLIN, TYPE_PING, ref_data
from .policy.config import PASTA, Config
from .policy.forwarding import Forwarding
from .wire import ether, icmp, ip
from .wire.fragment import fragments
from .wire.virtio import NO_OFFLOAD

PING_TIMEOUT = 60.0  # s
PING_FLOWS_MAX = 1024
DESCRIPTOR_SHARE = 8  # ping flows use at most 1/8 of the process's descriptors
REPLIES_PER_EVENT = 32
NO_SEQUENCE = -1

_SIZE_MAX = 65536

CALLS = (
    creating(socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP),
    creating(socket.AF_INET6, socket.SOCK_DGRAM, socket.IPPROTO_ICMPV6),
    *setting(*RECVERR, *RECEIVE_CLASS),
    *setting((socket.SOL_SOCKET, socket.SO_BINDTODEVICE), (socket.SOL_SOCKET, socket.SO_BROADCAST)),
    *calls("sendto", "recvmsg"),
)


class PingFlow(IdleFlow):
    """Echo requests of one identifier from the guest to one destination."""

    __slots__ = ("dst", "echo_id", "fields", "host", "last_seq", "src")
    kind = "ping"
    label: ClassVar[str] = "ping"
    evicted = Drop.PING_EVICTED
    protocol = "icmp"

    def __init__(self, key: bytes, host: bytes, now: float) -> None:
        super().__init__(key, PING_TIMEOUT, now)
        half = (len(key) - 4) // 2
        self.src = key[:half]
        self.dst = key[half : 2 * half]
        self.host = host
        self.echo_id = key[-4:-2]
        self.last_seq = NO_SEQUENCE  # of the last reply
        self.fields = UNSET  # of the IP headers of what the socket sends

    def endpoints(self) -> Endpoints:
        """The endpoints; the guest's has the identifier in place of a port, the others have none."""
        ident = int.from_bytes(self.echo_id, "big")
        return Endpoints(GUEST, addr.host_port(self.src, ident), addr.text(self.dst), addr.text(self.host))


def refuse(src: bytes, dst: bytes, echo: memoryview) -> Reason | None:
    """The reason why an echo message of the guest is dropped, None if it is not."""
    if len(echo) < icmp.ECHO.size:
        return Drop.PING_TRUNCATED
    if echo[0] != (icmp.ECHO_REQUEST if len(src) == 4 else icmp.ECHO_REQUEST6) or echo[1] != 0:
        return Drop.PING_NO_REQUEST
    if not addr.is_unicast(src) or addr.is_unspecified(dst):
        return Drop.PING_NO_ADDRESS
    if addr.is_martian(src) or addr.is_martian(dst):
        return Drop.PING_MARTIAN
    return None


class PingNotAllowed(Exception):
    """None of our groups is in net.ipv4.ping_group_range."""

    def __str__(self) -> str:
        return (
            "Cannot open ping sockets: echo requests will not be answered. As root, allow them to every group: "
            'sysctl -w net.ipv4.ping_group_range="0 2147483647"'
        )


def probe() -> None:
    """Warn if ping sockets are not allowed. A daemon calls this at start, since later warnings may not be seen."""
    for family, proto in ((socket.AF_INET, socket.IPPROTO_ICMP), (socket.AF_INET6, socket.IPPROTO_ICMPV6)):
        try:
            socket.socket(family, socket.SOCK_DGRAM, proto).close()
        except PermissionError:
            log.warn(str(PingNotAllowed()))
            return
        except OSError:
            continue  # the host lacks this family
        else:
            return


def open_socket(fwd: Forwarding, host: bytes, ident: int) -> socket.socket:
    """A non-blocking ping socket connected to `host`, with identifier `ident` if it is free.

    Raises OSError, PingNotAllowed.
    """
    v4 = len(host) == 4
    family = addr.family(host)
    proto = socket.IPPROTO_ICMP if v4 else socket.IPPROTO_ICMPV6
    try:
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, proto)
    except PermissionError:
        raise PingNotAllowed from None
    try:
        sock.setsockopt(*recverr(family), 1)
        sock.setsockopt(*RECEIVE_CLASS[not v4], 1)
        source, interface = fwd.source(host)
        if interface is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
        if source is None:
            source = addr.ANY4 if v4 else addr.ANY6
        try:
            sock.bind(fwd.sockaddr(source, ident))
        except OSError as e:
            if e.errno != errno.EADDRINUSE:
                raise
            sock.bind(fwd.sockaddr(source, 0))
        if v4:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.connect(fwd.sockaddr(host, 0))
    except BaseException:
        sock.close()
        raise
    return sock


class Icmp:
    """Ping flows."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._flows: IdleFlows[PingFlow] = IdleFlows(ctx, TYPE_PING, flow_limit(PING_FLOWS_MAX, DESCRIPTOR_SHARE))
        self._errors = Errors(ctx)
        self._warned = False
        self._ident = random.getrandbits(32)  # of the next fragmented reply
        self._buf = zeros(_SIZE_MAX)
        self._mv = memoryview(self._buf)
        ctx.services.take_icmp(True, (icmp.ECHO_REQUEST,), self.tap_handler, fragments=True)
        ctx.services.take_icmp(False, (icmp.ECHO_REQUEST6,), self.tap_handler, fragments=True)
        ctx.services.on_forget.append(self.forget)
        ctx.services.take_end(PingFlow.label, self._flows.end)
        ctx.reactor.handle(TYPE_PING, self.sock_handler)
        ctx.settings.subscribe(self._adopt)

    def _adopt(self, config: Config) -> None:
        self._mtu, self._disabled = config.mtu, config.no_icmp
        self._deduplicate = config.mode == PASTA

    def tap_handler(
        self, src_mac: bytes, src: bytes, dst: bytes, echo: memoryview, now: float, fields: int = 0
    ) -> None:
        """An echo request of the guest, from its type byte on. `fields` are those of its IP header."""
        ctx = self._ctx
        reason = Drop.PING_DISABLED if self._disabled else refuse(src, dst, echo)
        if reason is not None:
            ctx.drops[reason] += 1
            return
        flow = self._flows.by_key.get(src + dst + bytes(echo[4:6]) + b"\0\0") or self._new_flow(src, dst, echo, now)
        if flow is None:
            return
        flow.last = now
        if int.from_bytes(echo[6:8], "big") == flow.last_seq:
            flow.last_seq = NO_SEQUENCE
        try:
            if len(echo) > DF_MESSAGE_MAX[len(dst)]:
                fields &= ~DF
            if fields != flow.fields:
                flow.fields = apply(flow.sock, flow.host, flow.fields, fields)
            try:
                flow.sock.send(echo)
            except OSError:
                self._report(flow, now)  # clears a pending error of an earlier request, which may be the reason
                flow.sock.send(echo)
            flow.to_host += len(echo)
        except BlockingIOError:
            ctx.drops[Drop.PING_BUFFER_FULL] += 1
        except OSError as e:
            mtu = path_mtu(flow.sock, len(dst) == 16) if e.errno == errno.EMSGSIZE else 0
            self._refused(e, src, dst, echo, now, mtu)

    def _new_flow(self, src: bytes, dst: bytes, echo: memoryview, now: float) -> PingFlow | None:
        """A flow for a request that passed `refuse`; on failure None, with a drop counted and an error to the guest."""
        ctx = self._ctx
        if ctx.fwd.family(dst) is None:
            ctx.drops[Drop.PING_FAMILY_OFF] += 1
            return None
        host = ctx.fwd.outbound(dst)
        ident = int.from_bytes(echo[4:6], "big")
        try:
            sock = self._flows.open(lambda: open_socket(ctx.fwd, host, ident), now)
        except PingNotAllowed as e:
            self._not_allowed(e)
            return None
        except OSError as e:
            self._refused(e, src, dst, echo, now)
            return None
        flow = PingFlow(src + dst + bytes(echo[4:6]) + b"\0\0", host, now)
        try:
            self._flows.add(flow, sock, now)
        except (TableFull, OSError) as e:
            sock.close()
            ctx.drops[Failed.PING_NO_FLOW.of(e) if isinstance(e, OSError) else Drop.PING_TABLE_FULL] += 1
            return None
        return flow

    def _refused(self, e: OSError, src: bytes, dst: bytes, echo: memoryview, now: float, mtu: int = 0) -> None:
        """Opening, connecting or sending failed: send the guest the ICMP error that a router would send.

        `mtu` would fit it.
        """
        self._ctx.drops[Failed.PING.of(e)] += 1
        if addr.is_unicast(dst):
            packet = icmp.quote(src, dst, icmp.protocol(dst), bytes(echo))
            self._errors.refused(e.errno or 0, src, dst, packet, now, mtu)

    def _not_allowed(self, e: PingNotAllowed) -> None:
        """Ping sockets are not allowed: warn once, with advice, and go on without them."""
        self._ctx.drops[Drop.PING_NO_SOCKETS] += 1
        if not self._warned:
            self._warned = True
            log.warn(str(e))

    def sock_handler(self, ref: int, events: int, now: float) -> None:
        """Handle errors first: they are about requests that precede the replies to be read."""
        flow: Any = self._ctx.flows.by_index[ref & 0xFFFFFFFF]
        if events & EPOLLERR:
            self._report(flow, now)
        if events & EPOLLIN:
            self._receive(flow, now)

    def forget(self) -> None:
        """The guest is gone: end all flows."""
        self._flows.close_all("guest gone")

    def fault(self, ref: int) -> None:
        """A handler failed on flow ref_data(ref): end that flow only."""
        self._flows.fault(ref_data(ref))

    def _report(self, flow: PingFlow, now: float) -> None:
        """Send the errors in the queue to the guest, each quoting the request with the guest's identifier."""
        for error, quoted in read_errors(flow.sock):
            if log.debug_on:
                log.debug(f"Flow {flow.index} (ping): error on socket {flow.fd}: {error}")
            if addr.is_unicast(flow.dst) and not error.too_big_here:
                request = quoted[:4] + flow.echo_id + quoted[6:]
                packet = icmp.quote(flow.src, flow.dst, icmp.protocol(flow.dst), request)
                self._errors.reported(error, flow.src, flow.dst, flow.host, packet, now)

    def _receive(self, flow: PingFlow, now: float) -> None:
        """Replies of the socket, a bounded number, to the guest."""
        for _ in range(REPLIES_PER_EVENT):
            try:
                n, control, _, sender = flow.sock.recvmsg_into((self._buf,), CLASS_SPACE)
            except BlockingIOError:
                return
            except OSError:
                self._report(flow, now)
                return
            self._reply(flow, addr.packed(sender[0]), n, class_in(control), now)

    def _reply(self, flow: PingFlow, sender: bytes, n: int, tos: int, now: float) -> None:
        """One reply: `n` bytes in the buffer."""
        buf, ctx = self._buf, self._ctx
        if n < icmp.ECHO.size or buf[0] != (icmp.ECHO_REPLY if len(flow.src) == 4 else icmp.ECHO_REPLY6):
            ctx.drops[Drop.PING_NO_REPLY] += 1
            return
        group = not addr.is_unicast(flow.host)
        if not group and sender != flow.host:
            ctx.drops[Drop.PING_ELSEWHERE] += 1
            return
        sequence = int.from_bytes(buf[6:8], "big")
        if self._deduplicate and sequence == flow.last_seq and not group:
            ctx.drops[Drop.PING_DUPLICATE] += 1
            return
        flow.last_seq, flow.last = sequence, now
        flow.to_guest += n
        buf[2:4] = b"\0\0"
        buf[4:6] = flow.echo_id
        self._send_reply(sender if group else flow.dst, flow.src, self._mv[:n], tos)

    def _send_reply(self, src: bytes, dst: bytes, message: memoryview, tos: int) -> None:
        """Frame an echo reply, in fragments if necessary, with its checksum: the guest's kernel does not complete a
        partial one for a raw socket, such as that of root's ping(8).
        """
        ctx = self._ctx
        proto, mtu = icmp.protocol(src), self._mtu
        ip_header = ip.header(src, dst, proto, len(message), tos=tos)
        ethertype = ether.TYPE_IPV4 if len(src) == 4 else ether.TYPE_IPV6
        ether_header = ether.HEADER.pack(ctx.guest.mac_of(dst), ctx.lan.mac_of(src), ethertype)
        whole = icmp.complete(src, dst, bytes(message))
        if mtu and len(ip_header) + len(message) > mtu:
            self._ident += 1
            for packet in fragments(src, dst, proto, whole, mtu, self._ident, tos=tos):
                ctx.link.send_frame(ether_header + packet)
            return
        ctx.link.send_payload((NO_OFFLOAD + ether_header + ip_header, whole))
