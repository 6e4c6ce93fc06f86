"""The conversation with the kernel, against a scripted socket; messages against bytes; the real tables, read only."""

from __future__ import annotations

import errno
import os
import socket
import struct
from dataclasses import replace
from typing import Any, cast

import pytest

from passt import addr
from passt.linux import netlink
from passt.linux.from_kernel import NLMSG_DONE, NLMSG_ERROR
from passt.linux.netlink import NLM_F_DUMP_INTR, Rtnetlink, link_local
from passt.linux.routes import Address, Hop, Link, NsPlan, Route


def ip(text: str) -> bytes:
    return addr.packed(text)


class Script:
    """A socket that answers each request with what comes next, `seq` put in."""

    def __init__(self, *answers: list[bytes]) -> None:
        self._answers = list(answers)
        self._queue: list[bytes] = []
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> None:
        self.sent.append(bytes(data))
        seq = data[8:12]
        self._queue += [b"".join(m[:8] + seq + m[12:] for m in split(a)) for a in self._answers.pop(0)]

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        return self._queue.pop(0), (0, 0)

    def connect(self, address: Any) -> None:
        assert address == (0, 0)

    def setsockopt(self, level: int, *args: Any) -> None:
        if level == netlink.SOL_NETLINK:
            raise OSError(errno.ENOPROTOOPT, "old kernel")

    def close(self) -> None:
        pass


def split(data: bytes) -> list[bytes]:
    messages = []
    while data:
        (length,) = struct.unpack_from("=I", data)
        length = (length + 3) & ~3
        messages.append(data[:length])
        data = data[length:]
    return messages


def message(kind: int, body: bytes, flags: int = 2) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), kind, flags, 0, 0) + body


def attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def u32(value: int) -> bytes:
    return struct.pack("=I", value)


DONE = message(NLMSG_DONE, u32(0))
ACK = message(NLMSG_ERROR, u32(0) + bytes(16))


def error(number: int) -> bytes:
    return message(NLMSG_ERROR, struct.pack("=i", -number) + bytes(16))


def scripted(monkeypatch: pytest.MonkeyPatch, *answers: list[bytes]) -> tuple[Rtnetlink, Script]:
    script = Script(*answers)
    monkeypatch.setattr(socket, "socket", lambda *_: script)
    return Rtnetlink(), script


# struct rtmsg: family, dst_len, src_len, tos, table, proto, scope, type, flags
def rtmsg(family: int, dst_len: int, flags: int = 0, table: int = 254, kind: int = 1, scope: int = 0) -> bytes:
    return struct.pack("=BBBBBBBBI", family, dst_len, 0, 0, table, 3, scope, kind, flags)


RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_MULTIPATH, RTA_TABLE, RTA_VIA = 1, 4, 5, 6, 9, 15, 18


def default_via(gateway: str, *, flags: int = 2) -> bytes:
    return message(24, rtmsg(2, 0) + attribute(RTA_GATEWAY, ip(gateway)) + attribute(RTA_OIF, u32(2)), flags)


# Conversation ------------------------------------------------------------------------------------------------------


def test_dump_in_several_datagrams(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, script = scripted(
        monkeypatch, [default_via("192.0.2.1") + default_via("192.0.2.2"), default_via("192.0.2.3"), DONE]
    )
    assert [r.hops[0].gateway for r in nl.routes(v6=False)] == [ip(f"192.0.2.{i}") for i in (1, 2, 3)]
    assert struct.unpack_from("=HH", script.sent[0], 4) == (26, 0x301)
    assert script.sent[0][16] == socket.AF_INET


def test_interrupted_dump_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    torn = default_via("192.0.2.1", flags=2 | NLM_F_DUMP_INTR)
    nl, script = scripted(monkeypatch, [torn, DONE], [default_via("192.0.2.2"), DONE])
    assert [r.hops[0].gateway for r in nl.routes(v6=False)] == [ip("192.0.2.2")]
    assert len(script.sent) == 2


def test_answers_to_an_earlier_request_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, script = scripted(monkeypatch, [ACK], [ACK])
    nl.set_link(2, mtu=1500)
    script._queue.append(error(errno.EPERM))  # with sequence number 0
    nl.set_link(2, mtu=1500)
    assert script._queue == []


def test_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, _ = scripted(monkeypatch, [error(errno.EPERM)])
    with pytest.raises(PermissionError):
        nl.set_link(2, mtu=1500)


@pytest.mark.parametrize("number", [errno.EAFNOSUPPORT, errno.EOPNOTSUPP])
def test_family_that_the_kernel_lacks_has_no_routes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    nl, _ = scripted(monkeypatch, [error(number)])
    assert nl.routes(v6=True) == ()


def test_routes_of_another_family_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, _ = scripted(monkeypatch, [default_via("192.0.2.1"), DONE])
    assert nl.routes(v6=True) == ()


# Reading -----------------------------------------------------------------------------------------------------------


def one_route(monkeypatch: pytest.MonkeyPatch, body: bytes) -> tuple[Route, ...]:
    nl, _ = scripted(monkeypatch, [message(24, body), DONE])
    return nl.routes(v6=body[0] == socket.AF_INET6)


def test_route_with_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    body = rtmsg(2, 24, flags=4, scope=0) + attribute(RTA_TABLE, u32(254)) + attribute(RTA_DST, ip("203.0.113.0"))
    body += attribute(RTA_PRIORITY, u32(100)) + attribute(RTA_GATEWAY, ip("192.0.2.1")) + attribute(RTA_OIF, u32(3))
    assert one_route(monkeypatch, body) == (
        Route(ip("203.0.113.0"), 24, (Hop(3, ip("192.0.2.1"), onlink=True),), metric=100, proto=3),
    )


def test_multipath(monkeypatch: pytest.MonkeyPatch) -> None:
    hops = b""
    for index, weight, gateway in ((2, 0, "192.0.2.1"), (3, 4, "192.0.2.2")):
        nested = attribute(RTA_GATEWAY, ip(gateway))
        hops += struct.pack("=HBBi", 8 + len(nested), 0, weight, index) + nested
    (route,) = one_route(monkeypatch, rtmsg(2, 0) + attribute(RTA_MULTIPATH, hops))
    assert route.hops == (Hop(2, ip("192.0.2.1"), 1), Hop(3, ip("192.0.2.2"), 5))


def test_ipv4_via_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    body = (
        rtmsg(2, 0)
        + attribute(RTA_VIA, struct.pack("=H", socket.AF_INET6) + ip("fe80::1"))
        + attribute(RTA_OIF, u32(2))
    )
    (route,) = one_route(monkeypatch, body)
    assert route.hops == (Hop(2, ip("fe80::1")),)


@pytest.mark.parametrize(
    "body",
    [
        rtmsg(2, 0, table=255) + attribute(RTA_OIF, u32(2)),  # the local table
        rtmsg(2, 0, table=252) + attribute(RTA_TABLE, u32(1000)) + attribute(RTA_OIF, u32(2)),
        rtmsg(2, 0, kind=7),  # unreachable
        rtmsg(10, 128, flags=0x200) + attribute(RTA_DST, bytes(16)) + attribute(RTA_OIF, u32(2)),  # a cached exception
    ],
)
def test_what_is_no_unicast_route_of_the_main_table(monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    assert one_route(monkeypatch, body) == ()


def test_route_by_nexthop_object_only_goes_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    (route,) = one_route(monkeypatch, rtmsg(2, 0) + attribute(30, u32(10)))
    assert route.hops == (Hop(0),)


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = struct.pack("=BBBBI", 2, 24, 0x80, 0, 2) + attribute(1, ip("192.0.2.2")) + attribute(2, ip("192.0.2.2"))
    peer = struct.pack("=BBBBI", 2, 32, 0x80, 0, 3) + attribute(1, ip("10.0.0.1")) + attribute(2, ip("10.0.0.2"))
    old = struct.pack("=BBBBI", 10, 64, 0x20, 0, 2) + attribute(1, ip("2001:db8::2")) + attribute(8, u32(0x120))
    other = struct.pack("=BBBBI", 28, 8, 0, 0, 1)  # AF_MCTP
    nl, _ = scripted(
        monkeypatch, [message(20, plain) + message(20, peer) + message(20, old) + message(20, other), DONE]
    )
    assert nl.addresses() == (
        Address(2, ip("192.0.2.2"), 24),
        Address(3, ip("10.0.0.2"), 32, peer=ip("10.0.0.1")),
        Address(2, ip("2001:db8::2"), 64, deprecated=True),
    )


@pytest.mark.parametrize(
    ("flags", "state"),
    [
        (0x80, {}),
        (0x20, {"deprecated": True}),
        (0x40, {"tentative": True}),
        (0x44, {}),  # optimistic
        (0x48, {"tentative": True, "duplicate": True}),
        (0x301, {"temporary": True}),
        (0x21, {"temporary": True, "deprecated": True}),
    ],
)
def test_state_of_an_address(monkeypatch: pytest.MonkeyPatch, flags: int, state: dict[str, bool]) -> None:
    six = struct.pack("=BBBBI", 10, 64, flags & 0xFF, 0, 2) + attribute(1, ip("2001:db8::2")) + attribute(8, u32(flags))
    four = struct.pack("=BBBBI", 2, 24, 0x01, 0, 2) + attribute(1, ip("192.0.2.2")) + attribute(8, u32(0x01))
    nl, _ = scripted(monkeypatch, [message(20, six) + message(20, four), DONE])
    assert nl.addresses() == (Address(2, ip("2001:db8::2"), 64, **state), Address(2, ip("192.0.2.2"), 24))


# Writing -----------------------------------------------------------------------------------------------------------


def written(script: Script) -> bytes:
    """The body of the last request."""
    return script.sent[-1][16:]


def test_link_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, script = scripted(monkeypatch, [ACK])
    nl.set_link(7, up=True, mtu=1500, txqlen=9000, address="02:00:00:00:00:01")
    assert struct.unpack_from("=HH", script.sent[0], 4) == (16, 5)
    assert written(script) == (
        struct.pack("=BxHiII", 0, 0, 7, 1, 1)
        + attribute(4, u32(1500))
        + attribute(13, u32(9000))
        + attribute(1, bytes.fromhex("020000000001"))
    )


def test_address_is_added(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, script = scripted(monkeypatch, [ACK], [ACK], [ACK])
    nl.add_address(7, Address(0, ip("192.0.2.2"), 24))
    assert written(script) == struct.pack("=BBBBI", 2, 24, 0, 0, 7) + b"".join(
        attribute(kind, ip(a)) for kind, a in ((2, "192.0.2.2"), (1, "192.0.2.2"), (4, "192.0.2.255"))
    )
    nl.add_address(7, Address(0, ip("10.0.0.2"), 32, peer=ip("10.0.0.1")))
    assert written(script)[8:] == attribute(2, ip("10.0.0.2")) + attribute(1, ip("10.0.0.1"))
    nl.add_address(7, Address(0, ip("2001:db8::2"), 64))
    assert written(script)[:8] == struct.pack("=BBBBI", 10, 64, 2, 0, 7)  # IFA_F_NODAD


def test_routes_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    nl, script = scripted(monkeypatch, *([ACK],) * 3)
    nl.add_route(7, Route(ip("203.0.113.0"), 24, (Hop(2, ip("192.0.2.1"), onlink=True),), metric=9, proto=4))
    assert written(script) == (
        struct.pack("=BBBBBBBBI", 2, 24, 0, 0, 254, 4, 0, 1, 4)
        + attribute(RTA_DST, ip("203.0.113.0"))
        + attribute(RTA_PRIORITY, u32(9))
        + attribute(RTA_OIF, u32(7))
        + attribute(RTA_GATEWAY, ip("192.0.2.1"))
    )
    nl.add_route(7, Route(bytes(4), 0, (Hop(2, ip("fe80::1")),)))
    assert written(script)[12:] == attribute(RTA_OIF, u32(7)) + attribute(
        RTA_VIA, struct.pack("=H", socket.AF_INET6) + ip("fe80::1")
    )
    nl.add_route(7, Route(bytes(16), 0, (Hop(2, ip("fe80::1"), 2), Hop(2, ip("fe80::2")))))
    first, second = attribute(RTA_GATEWAY, ip("fe80::1")), attribute(RTA_GATEWAY, ip("fe80::2"))
    assert written(script)[12:] == attribute(
        RTA_MULTIPATH, struct.pack("=HBBi", 28, 0, 1, 7) + first + struct.pack("=HBBi", 28, 0, 0, 7) + second
    )


def test_metrics_of_a_route_are_read_and_written(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = attribute(8, attribute(2, u32(1400)) + attribute(8, u32(1360)) + attribute(16, b"bbr\0"))
    (route,) = one_route(monkeypatch, rtmsg(2, 0) + attribute(RTA_OIF, u32(2)) + metrics)
    assert route.metrics == (("RTAX_MTU", 1400), ("RTAX_ADVMSS", 1360))
    nl, script = scripted(monkeypatch, [ACK])
    nl.add_route(7, route)
    nested = attribute(2, u32(1400)) + attribute(8, u32(1360))
    assert written(script)[12:] == attribute(RTA_OIF, u32(7)) + attribute(8, nested)


def test_alternative_names(monkeypatch: pytest.MonkeyPatch) -> None:
    names = attribute(53, b"lan\0") + attribute(53, b"a-name-of-more-than-fifteen-characters\0")
    body = struct.pack("=BxHiII", 0, 1, 2, 0, 0) + attribute(3, b"eth0\0") + attribute(0x8000 | 52, names)
    nl, _ = scripted(monkeypatch, [message(16, body), DONE])
    (link,) = nl.links()
    assert (link.name, link.altnames) == ("eth0", ("lan", "a-name-of-more-than-fifteen-characters"))


def test_one_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request for one, not for the table: only that makes the kernel tell of its carrier."""
    body = struct.pack("=BxHiII", 0, 1, 7, 0x41, 0) + attribute(3, b"eth0\0")
    nl, script = scripted(monkeypatch, [message(16, body), ACK], [ACK], [error(errno.ENODEV)])
    link = nl.link(7)
    assert (link.name, link.up) == ("eth0", True)
    assert struct.unpack_from("=HH", script.sent[0], 4) == (18, 0x5), "RTM_GETLINK, NLM_F_REQUEST | NLM_F_ACK"
    assert struct.unpack_from("=i", script.sent[0], 20) == (7,)
    for _ in range(2):
        with pytest.raises(OSError, match="No such device"):
            nl.link(7)


def test_link_local_address_of_a_mac() -> None:
    assert link_local(bytes.fromhex("9a559a559a55")) == ip("fe80::9855:9aff:fe55:9a55")


# Setting up the namespace ------------------------------------------------------------------------------------------


class FakeRtnetlink:
    """Records what is asked of it; a step named in `failures` fails."""

    failures: dict[str, int] = {}  # noqa: RUF012 (set by each test)
    existing: tuple[Link, ...] = (
        Link(1, "lo", bytes(6), 65536, loopback=True),
        Link(2, "eth0", bytes.fromhex("020000000002"), 1500),
    )

    def __init__(self) -> None:
        self.calls: list[str] = []
        FakeRtnetlink.last = self

    last: FakeRtnetlink

    def __enter__(self) -> FakeRtnetlink:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def links(self) -> tuple[Link, ...]:
        return self.existing

    def _do(self, text: str) -> None:
        self.calls.append(text)
        for name, number in self.failures.items():
            if text.startswith(name):
                raise OSError(number, os.strerror(number))

    def set_link(self, index: int, *, up: bool = False, **kw: Any) -> None:
        mode = kw.pop("af_spec", None)
        if mode:
            kw["gen_mode"] = mode["attrs"][0][1]["attrs"][0][1]
        self._do(" ".join(["link", str(index), *(["up"] if up else []), *(f"{k}={v}" for k, v in kw.items())]))

    def add_address(self, index: int, a: Address) -> None:
        self._do(f"address {addr.text(a.addr)}/{a.prefix_len}")

    def add_route(self, index: int, route: Route) -> None:
        self._do(f"route {route}")


PLAN = NsPlan(
    "eth0",
    mtu=1500,
    txqlen=9000,
    configure=True,
    addresses=(Address(0, ip("192.0.2.2"), 24), Address(0, ip("2001:db8::2"), 64)),
    routes=(Route(bytes(4), 0, (Hop(0, ip("192.0.2.1")),)), Route(bytes(16), 0, (Hop(0, ip("fe80::1")),))),
)


def configured(monkeypatch: pytest.MonkeyPatch, plan: NsPlan, **failures: int) -> tuple[bytes, list[str], list[str]]:
    monkeypatch.setattr(FakeRtnetlink, "failures", {k.replace("_", " "): v for k, v in failures.items()})
    mac, problems = netlink.configure(cast(Any, FakeRtnetlink()), plan)
    return mac, problems, FakeRtnetlink.last.calls


def test_configure(monkeypatch: pytest.MonkeyPatch) -> None:
    mac, problems, calls = configured(monkeypatch, PLAN)
    assert (mac, problems) == (bytes.fromhex("020000000002"), [])
    assert calls == [
        "link 1 up",
        "link 2 txqlen=9000",
        "link 2 mtu=1500",
        "link 2 gen_mode=1",  # no link-local address of the kernel's, which would be tentative
        "link 2 up",
        "address fe80::ff:fe00:2/64",
        "address 192.0.2.2/24",
        "address 2001:db8::2/64",
        "link 2 gen_mode=0",
        "route default via 192.0.2.1",
        "route default via fe80::1",
    ]


def test_configure_only_what_is_always_done(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = NsPlan("eth0", mac=bytes.fromhex("020000000009"), mtu=1500, txqlen=9000)
    mac, _, calls = configured(monkeypatch, plan)
    assert mac == bytes.fromhex("020000000009")
    assert calls == ["link 1 up", "link 2 address=02:00:00:00:00:09", "link 2 txqlen=9000"]


def test_loopback_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netlink, "Rtnetlink", FakeRtnetlink)
    monkeypatch.setattr(FakeRtnetlink, "failures", {})
    netlink.loopback_up()
    assert FakeRtnetlink.last.calls == ["link 1 up"]
    monkeypatch.setattr(FakeRtnetlink, "failures", {"link 1 up": errno.EPERM})
    with pytest.raises(OSError, match="Couldn't bring up loopback interface in namespace: Operation not permitted"):
        netlink.loopback_up()


def test_the_loopback_interface_may_have_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """So may another one have that name."""
    lo, eth0 = FakeRtnetlink.existing
    links = Link(3, "lo", bytes(6), 1500), replace(lo, name="foo"), eth0
    monkeypatch.setattr(netlink, "Rtnetlink", FakeRtnetlink)
    monkeypatch.setattr(FakeRtnetlink, "existing", links)
    assert configured(monkeypatch, PLAN)[2][:2] == ["link 1 up", "link 2 txqlen=9000"]
    netlink.loopback_up()
    assert FakeRtnetlink.last.calls == ["link 1 up"]


@pytest.mark.parametrize(("missing", "what"), [(0, "loopback interface"), (1, "interface eth0")])
def test_an_interface_that_is_missing_is_an_error(monkeypatch: pytest.MonkeyPatch, missing: int, what: str) -> None:
    monkeypatch.setattr(FakeRtnetlink, "existing", FakeRtnetlink.existing[1 - missing :][:1])
    with pytest.raises(OSError, match="Couldn't find") as e:
        configured(monkeypatch, PLAN)
    assert (e.value.errno, e.value.strerror) == (errno.ENODEV, f"Couldn't find {what} in namespace: No such device")


def test_what_cannot_be_configured_is_told_and_the_rest_done(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {"address_2001:db8::2": errno.EACCES, "route_default_via_fe80::1": errno.ENETUNREACH}
    _, problems, calls = configured(monkeypatch, PLAN, **failures)
    assert problems == [
        "Couldn't set address 2001:db8::2/64 in namespace: Permission denied",
        "Couldn't set route default via fe80::1 in namespace: Network is unreachable",
    ]
    assert "route default via 192.0.2.1" in calls


@pytest.mark.parametrize("failure", ["link_2_gen", "address_fe80::ff:fe00:2"])
def test_namespace_without_ipv6(monkeypatch: pytest.MonkeyPatch, failure: str) -> None:
    _, problems, calls = configured(monkeypatch, PLAN, **{failure: errno.EACCES})
    assert problems == ["The namespace has no IPv6, or has it disabled: not configuring it there"]
    assert "route default via 192.0.2.1" in calls
    assert not [call for call in calls if "2001:db8" in call or "via fe80" in call]


def test_ipv4_only_does_not_touch_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(PLAN, addresses=PLAN.addresses[:1], routes=PLAN.routes[:1])
    _, _, calls = configured(monkeypatch, plan)
    assert calls[3:] == ["link 2 up", "address 192.0.2.2/24", "route default via 192.0.2.1"]


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("link_1_up", "Couldn't bring up loopback interface in namespace: Operation not permitted"),
        ("link_2_mtu", "Couldn't set MTU 1500 in namespace: Operation not permitted"),
        ("link_2_up", "Couldn't bring up tap interface in namespace: Operation not permitted"),
    ],
)
def test_what_nothing_works_without_is_an_error(monkeypatch: pytest.MonkeyPatch, step: str, text: str) -> None:
    with pytest.raises(OSError, match="Couldn't") as e:
        configured(monkeypatch, PLAN, **{step: errno.EPERM})
    assert e.value.strerror == text
