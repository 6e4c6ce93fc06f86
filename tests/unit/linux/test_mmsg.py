from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passt import addr
from passt.linux.mmsg import COUNT, SLOT, AddressReceiver, Envelope, Receiver
from passt.linux.sockopt import IP_PKTINFO, RECEIVE_CLASS, SOL_UDP, TRAFFIC_CLASS, UDP_GRO, UDP_SEGMENT

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """(receiver, sender), connected over the loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        a.bind(("127.0.0.1", 0))
        b.connect(a.getsockname())
        yield a, b


def datagrams(r: Receiver, lengths: list[int]) -> list[bytes]:
    return [bytes(r.mv[i * SLOT : i * SLOT + n]) for i, n in enumerate(lengths)]


def test_sizes_of_all_kinds_in_one_call(pair: Pair) -> None:
    a, b = pair
    sent = [os.urandom(n) for n in (1, 0, 1400, 65507, 7)]
    for d in sent:
        b.send(d)
    r = Receiver()
    lengths, sizes = r.receive(a.fileno())
    assert lengths == [1, 0, 1400, 65507, 7]
    assert sizes == [0] * 5
    assert datagrams(r, lengths) == sent


def test_no_more_than_there_are_slots(pair: Pair) -> None:
    a, b = pair
    for i in range(COUNT + 3):
        b.send(bytes((i,)))
    r = Receiver()
    lengths, _ = r.receive(a.fileno())
    assert datagrams(r, lengths) == [bytes((i,)) for i in range(COUNT)]
    lengths, _ = r.receive(a.fileno())
    assert datagrams(r, lengths) == [bytes((COUNT + i,)) for i in range(3)]


def test_few_slots(pair: Pair) -> None:
    a, b = pair
    for _ in range(3):
        b.send(b"x")
    assert Receiver(2).receive(a.fileno()) == ([1, 1], [0, 0])


def test_nothing_waits(pair: Pair) -> None:
    with pytest.raises(BlockingIOError):
        Receiver().receive(pair[0].fileno())


def test_errors_carry_their_errno() -> None:
    with pytest.raises(OSError, match="recvmmsg: ") as e:
        Receiver().receive(-1)
    assert e.value.errno == errno.EBADF


def test_joined_datagrams_tell_their_size_and_the_next_call_forgets_it(pair: Pair) -> None:
    a, b = pair
    a.setsockopt(SOL_UDP, UDP_GRO, 1)
    b.setsockopt(SOL_UDP, UDP_SEGMENT, 1000)
    payload = os.urandom(4500)
    b.send(payload)
    r = Receiver()
    assert r.receive(a.fileno()) == ([4500], [1000])
    assert datagrams(r, [4500]) == [payload]
    b.send(b"single")
    assert r.receive(a.fileno()) == ([6], [0])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_traffic_classes(family: int) -> None:
    """Beside the size of joined datagrams, and without."""
    v6 = family == socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as a, socket.socket(family, socket.SOCK_DGRAM) as b:
        a.bind(("::1" if v6 else "127.0.0.1", 0))
        b.connect(a.getsockname())
        a.setsockopt(*RECEIVE_CLASS[v6], 1)
        r = Receiver()
        for gro in (0, 1):
            a.setsockopt(SOL_UDP, UDP_GRO, gro)
            for tos in (0, 0xFF, 0x01, 0):
                b.setsockopt(*TRAFFIC_CLASS[v6], tos)
                b.setsockopt(SOL_UDP, UDP_SEGMENT, 1000 if tos != 1 else 0)
                b.send(bytes(900 if tos == 1 else 2000))
            lengths, sizes = r.receive(a.fileno())
            if gro:
                assert (lengths, sizes) == ([2000, 2000, 900, 2000], [1000, 1000, 0, 1000])
                assert r.classes == [0, 0xFF, 1, 0]
            else:
                assert (lengths, sizes) == ([1000, 1000, 1000, 1000, 900, 1000, 1000], [0] * 7)
                assert r.classes == [0, 0, 0xFF, 0xFF, 1, 0, 0]
            b.setsockopt(SOL_UDP, UDP_SEGMENT, 0)
            b.send(b"x")
            assert (r.receive(a.fileno()), r.classes) == (([1], [0]), [])


# Addresses -----------------------------------------------------------------------------------------------------------


def listening(family: int, host: str, *, v6only: bool = False) -> socket.socket:
    """A socket as listeners are: not connected, and told the destinations."""
    s = socket.socket(family, socket.SOCK_DGRAM)
    s.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    if family == socket.AF_INET6:
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6only)
        s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    s.bind((host, 0))
    return s


def received_from(s: socket.socket, count: int = COUNT) -> list[tuple[bytes, Envelope]]:
    r = AddressReceiver(count)
    lengths, envelopes = r.receive_from(s.fileno())
    return list(zip(datagrams(r, lengths), map(Envelope.parse, envelopes), strict=True))


@pytest.mark.parametrize(
    ("family", "bound", "source", "destination"),
    [
        (socket.AF_INET, "", "127.0.0.1", "127.0.0.1"),
        (socket.AF_INET, "127.0.0.3", "127.0.0.9", "127.0.0.3"),
        (socket.AF_INET, "", "127.8.8.8", "127.255.255.254"),
        (socket.AF_INET6, "::", "::1", "::1"),
        (socket.AF_INET6, "::1", "::1", "::1"),
        (socket.AF_INET6, "::", "127.0.0.4", "127.0.0.5"),
    ],
)
def test_source_and_destination(family: int, bound: str, source: str, destination: str) -> None:
    client_family = socket.AF_INET6 if ":" in source else socket.AF_INET
    with listening(family, bound) as a, socket.socket(client_family, socket.SOCK_DGRAM) as b:
        b.bind((source, 0))
        for data in (b"one", b""):
            b.sendto(data, (destination, a.getsockname()[1]))
        envelope = Envelope(addr.packed(source), b.getsockname()[1], addr.packed(destination), 0)
        assert received_from(a) == [(b"one", envelope), (b"", envelope)]


@pytest.mark.parametrize(("family", "bound"), [(socket.AF_INET, ""), (socket.AF_INET6, "::")])
@pytest.mark.parametrize("source", ["127.0.0.1", "::1"])
def test_traffic_class_of_a_first_datagram(family: int, bound: str, source: str) -> None:
    v6 = ":" in source
    if v6 and family == socket.AF_INET:
        return
    own = socket.AF_INET6 if v6 else socket.AF_INET
    with listening(family, bound) as a, socket.socket(own, socket.SOCK_DGRAM) as b:
        a.setsockopt(*RECEIVE_CLASS[0], 1)
        if family == socket.AF_INET6:
            a.setsockopt(*RECEIVE_CLASS[1], 1)
        b.setsockopt(*TRAFFIC_CLASS[v6], 0xB8)
        b.sendto(b"x", (source, a.getsockname()[1]))
        ((_, envelope),) = received_from(a)
        assert (envelope.tos, envelope.local) == (0xB8, addr.packed(source))


def test_without_ip_pktinfo_a_mapped_destination_is_known_too() -> None:
    with listening(socket.AF_INET6, "::") as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        a.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 0)
        b.sendto(b"x", ("127.0.0.5", a.getsockname()[1]))
        ((_, envelope),) = received_from(a)
        assert envelope.local == addr.packed("127.0.0.5")


def test_without_control_messages_the_destination_is_unspecified(pair: Pair) -> None:
    a, b = pair
    b.send(b"x")
    ((_, envelope),) = received_from(a)
    assert envelope == Envelope(addr.LOOPBACK4, b.getsockname()[1], addr.ANY4, 0)


def test_a_broadcast_is_answered_from_an_address_of_ours() -> None:
    with listening(socket.AF_INET, "") as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        b.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        b.bind(("127.0.0.1", 0))
        b.sendto(b"x", ("127.255.255.255", a.getsockname()[1]))
        ((_, envelope),) = received_from(a)
        assert envelope.local == addr.LOOPBACK4


def test_equal_envelopes_are_equal_bytes() -> None:
    clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2)]
    with listening(socket.AF_INET6, "::") as a, clients[0], clients[1]:
        for i in (0, 1, 1, 0):
            clients[i].sendto(b"x", ("127.0.0.1", a.getsockname()[1]))
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as c:
            c.sendto(b"x", ("::1", a.getsockname()[1]))
        r = AddressReceiver()
        _, envelopes = r.receive_from(a.fileno())
        assert [envelopes.index(e) for e in envelopes] == [0, 1, 1, 0, 4]
        clients[0].sendto(b"x", ("127.0.0.1", a.getsockname()[1]))
        assert r.receive_from(a.fileno()) == ([1], envelopes[:1])  # nothing of the last call is left
        with pytest.raises(BlockingIOError):
            r.receive_from(a.fileno())


SOCKADDR6 = struct.Struct("=HHI16sI4x")
LINK_LOCAL, GLOBAL6 = addr.packed("fe80::9"), addr.packed("2001:db8::9")


def envelope6(peer: bytes, scope: int, destination: bytes, interface: int) -> bytes:
    """The envelope of an IPv6 datagram, as the kernel writes it."""
    name = SOCKADDR6.pack(socket.AF_INET6, socket.htons(5000), 0, peer, scope)
    info = struct.pack("@Nii", socket.CMSG_LEN(20), socket.IPPROTO_IPV6, socket.IPV6_PKTINFO)
    return (name + info + struct.pack("=16sI", destination, interface)).ljust(32 + 40 + 32, b"\0")


@pytest.mark.parametrize(
    ("peer", "scope", "destination", "expected"),
    [
        (LINK_LOCAL, 7, addr.packed("fe80::1"), Envelope(LINK_LOCAL, 5000, addr.packed("fe80::1"), 7)),
        (LINK_LOCAL, 7, addr.packed("ff02::fb"), Envelope(LINK_LOCAL, 5000, addr.ANY6, 7)),
        (GLOBAL6, 0, addr.packed("fe80::1"), Envelope(GLOBAL6, 5000, addr.packed("fe80::1"), 3)),
        (GLOBAL6, 0, addr.packed("2001:db8::1"), Envelope(GLOBAL6, 5000, addr.packed("2001:db8::1"), 0)),
        (GLOBAL6, 0, addr.packed("ff0e::1"), Envelope(GLOBAL6, 5000, addr.ANY6, 0)),
    ],
)
def test_scopes_and_groups(peer: bytes, scope: int, destination: bytes, expected: Envelope) -> None:
    assert Envelope.parse(envelope6(peer, scope, destination, 3)) == expected


KINDS = (0, IP_PKTINFO), (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO), (socket.SOL_SOCKET, 29), (0, socket.IP_TTL)


@given(
    st.sampled_from((socket.AF_INET, socket.AF_INET6)),
    st.binary(min_size=30, max_size=30),
    st.lists(st.sampled_from(KINDS), max_size=2),
    st.binary(min_size=20, max_size=20),
)
def test_any_envelope_of_a_kernel(family: int, name: bytes, kinds: list[tuple[int, int]], data: bytes) -> None:
    """For any addresses in it, the results are of one family."""
    padded = data.ljust(socket.CMSG_SPACE(20) - 16, b"\0")
    control = b"".join(struct.pack("@Nii", socket.CMSG_LEN(20), *kind) + padded for kind in kinds)
    envelope = struct.pack("=H", family) + name + control.ljust(2 * socket.CMSG_SPACE(20), b"\0")
    found = Envelope.parse(envelope)
    assert len(found.peer) in (4, 16)
    assert len(found.local) in (4, 16)
    assert 0 <= found.port <= 0xFFFF
    assert found.peer == addr.unmapped(found.peer)
    assert found.scope == 0 or len(found.peer) == 16
