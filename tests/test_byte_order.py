"""Nothing assumes the host's byte order: where it is used, the kernel's interface is meant, and it stands in this list.

Everything on the wire is "!" (network order). "=" is the order of the running machine, without its alignment.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.test_layers import TREES

NATIVE = {
    ("passt.wire.virtio", "=BBHHHH"),  # struct virtio_net_hdr
    ("passt.udp_engine.flow", "=BBHH"),  # its first half
    ("passt.link.pcap", "=IHHiIII"),  # pcap files: the magic tells the reader
    ("passt.link.pcap", "=IIII"),
    ("passt.linux.inotify", "=iIII"),  # struct inotify_event
    ("passt.linux.mmsg", "@Nii"),  # control messages: struct cmsghdr
    ("passt.linux.mmsg", "=i4s4s"),  # struct in_pktinfo
    ("passt.linux.mmsg", "=16sI"),  # struct in6_pktinfo
    ("passt.linux.mmsg", "=H"),  # struct sockaddr: the family
    ("passt.linux.mmsg", "=I"),  # struct sockaddr_in6: the scope
    ("passt.linux.from_kernel", "=IHHII"),  # netlink, the error of a request
    ("passt.linux.from_kernel", "=i"),
    ("passt.linux.from_kernel", "@ll"),  # struct timeval
    ("passt.linux.multicast", "=HH4s"),  # struct sockaddr_in without a port, sockaddr_in6
    ("passt.linux.multicast", "=HHI16sI"),
    ("passt.linux.multicast", "=4s4si"),  # struct ip_mreqn
    ("passt.linux.multicast", "=i"),
    ("passt.linux.multicast", "@I0P128s"),  # struct group_req and its like
    ("passt.linux.multicast", "@I0P128s128s"),
    ("passt.linux.multicast", "@I0P128sII0P"),
    ("passt.linux.rtnl_messages", "=BxxxiHBB"),  # struct ndmsg, its attributes
    ("passt.linux.rtnl_messages", "=HH"),
    ("passt.linux.rtnl_messages", "=I"),
    ("passt.linux.holders", "=BB2x"),  # sock_diag of UNIX and Internet sockets
    ("passt.linux.holders", "=IH10x"),
    ("passt.linux.holders", "=IHHIIBBBxI"),
    ("passt.linux.holders", "=II"),
    ("passt.linux.ip_rule", "=BBBBBxxBI"),  # struct fib_rule_hdr, its attributes
    ("passt.linux.ip_rule", "=HH"),
    ("passt.linux.ip_rule", "=I"),
    ("passt.linux.mmsg", "=i"),  # traffic classes
    ("passt.linux.ports", "=IHHIIBBBxI48x"),  # sock_diag
    ("passt.linux.ports", "=IHHI"),
    ("passt.linux.ports", "=I"),  # addresses in /proc/net
    ("passt.linux.sockopt", "=IBBBxII"),  # control messages of error queues
    ("passt.linux.sockopt", "=H"),
    ("passt.linux.syscall", "=Ii"),  # capset(2)
    ("passt.linux.syscall", "=6I"),
    ("passt.linux.tcpinfo", "=I"),  # struct tcp_info
    ("passt.linux.tcpinfo", "=Q"),
    ("passt.linux.tcpinfo", "=9I"),  # SO_MEMINFO
    ("passt.linux.tun", "=16sH22x"),  # ioctls
    ("passt.linux.tun", "=i"),
    ("passt.linux.unix", "=iII"),  # struct ucred
    ("passt.tcp_engine.sock", "=ii"),  # struct linger
    ("passt.udp_engine.sock", "=H"),  # UDP_SEGMENT as a control message
    ("passt.udp_engine.sock", "=i"),  # traffic classes
}
LITTLE = {
    ("passt.link.gso", "<H"),  # a checksum, as the sum of little-endian words has it on any host
    ("passt.link.vring", "<QIHH"),  # virtio 1: descriptors
    ("passt.link.vring", "<II"),  # used entries
    ("passt.link.vring_out", "<H"),  # num_buffers
    ("passt.wire.vhost", "<III"),  # vhost-user is in the order of the host, and only little-endian ones are served
    ("passt.wire.vhost", "<II"),
    ("passt.wire.vhost", "<Q"),
    ("passt.wire.vhost", "<QQQQ"),
    ("passt.wire.vhost", "<IIQQQQ"),
    ("passt.wire.vhost", "<QQ"),
    ("passt.linux.tcp_repair", "=II"),  # struct tcp_repair_opt
    ("passt.linux.tcp_repair", "=IIIII"),  # struct tcp_repair_window
    ("passt.linux.tcp_repair", "=I"),
}
CASTS = {
    "passt.linux.mmsg",  # memory that recvmmsg() writes
    "passt.link.vring",  # indices that are read and written as a whole, on little-endian hosts only
}
MAY = {
    "passt.link.vring": {"byteorder", "array"},  # refuses other hosts
    "passt.link.vring_out": {"array"},  # heads of chains; vring refuses other hosts
    "passt.link.vhost_control": {"array"},  # descriptors of SCM_RIGHTS
    "passt.migration.helper": {"array"},
    "passt.repair": {"array"},
    "passt.loop.reactor": {"array"},  # references, which stay in this process
    "passt.loop.timers": {"array"},  # times, likewise
}
SUMS = {
    "passt.flow.batch",
    "passt.link.gso",
    "passt.link.verify",
    "passt.link.vector_sums",
}  # of little-endian words, on any machine: see there

STRUCT_CALLS = frozenset(("Struct", "pack", "unpack", "pack_into", "unpack_from", "iter_unpack", "calcsize"))


def name_of(node: ast.expr) -> str:
    """The last part of what is called."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def literal_start(node: ast.expr) -> str | None:
    """A string, as far as it is literal from its beginning; None for anything else."""
    if isinstance(node, ast.JoinedStr):
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def formats(tree: ast.AST) -> Iterator[str | None]:
    """The formats of all Structs and calls of the struct module; None where it is no literal."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or name_of(node.func) not in STRUCT_CALLS:
            continue
        of_module = isinstance(node.func, ast.Attribute) and name_of(node.func.value) == "struct"
        if name_of(node.func) == "Struct" or of_module:
            yield literal_start(node.args[0])


def orders(tree: ast.AST) -> Iterator[str]:
    """The byte orders that to_bytes and from_bytes are called with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) in ("to_bytes", "from_bytes"):
            values = [*node.args[1:2], *(k.value for k in node.keywords if k.arg == "byteorder")]
            yield str(values[0].value) if values and isinstance(values[0], ast.Constant) else "none"


def test_formats_say_their_order() -> None:
    found = {(name, f) for name, tree in TREES.items() for f in formats(tree)}
    other = {(name, f) for name, f in found if f is None or not f.startswith("!")}
    assert other == NATIVE | LITTLE


def test_integers_say_their_order() -> None:
    for name, tree in TREES.items():
        assert set(orders(tree)) <= ({"big", "little"} if name in SUMS else {"big"}), name


def test_nobody_asks_for_the_order_or_reads_memory_in_it() -> None:
    for name, tree in TREES.items():
        called = {name_of(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)}
        named = {name_of(n) for n in ast.walk(tree) if isinstance(n, ast.Attribute | ast.Name)}
        asking = named & {"byteorder", "htons", "htonl", "ntohs", "ntohl", "array"}
        assert asking <= MAY.get(name, set()), name
        if name not in CASTS and "ctypes" in named | called:
            # a stand-in of ctypes.util; madvise(2); connect(2) with AF_UNSPEC; accept4(2), whose address is bytes
            assert name in (
                "passt.linux.accepting",
                "passt.linux.syscall",
                "passt.seccomp",
                "passt.linux.memory",
                "passt.splice.refusal",
            ), name
        # typing.cast is a name, memoryview.cast an attribute
        casts = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr == "cast"]
        assert not casts or name in CASTS, name


# The checker itself ------------------------------------------------------------------------------------------------


def test_checker_sees_formats() -> None:
    source = 'Struct("!H"); struct.Struct("H"); struct.pack("=I", 1); Struct(f"<{n}Q"); Struct(fmt); x.pack("none")'
    assert list(formats(ast.parse(source))) == ["!H", "H", "=I", "<", None]


def test_checker_sees_orders() -> None:
    source = 'n.to_bytes(2, "big"); int.from_bytes(b, byteorder="little"); n.to_bytes(2); n.to_bytes(2, sys.byteorder)'
    assert list(orders(ast.parse(source))) == ["big", "little", "none", "none"]
