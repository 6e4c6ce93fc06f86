"""Messages that are sent, against bytes; the classes come without the rest of their library."""

from __future__ import annotations

import ast
import struct
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

from passt import addr
from passt.linux import rtnl_messages
from passt.linux.routes import Address, Hop, Route
from passt.linux.rtnl_messages import address_message, ifinfmsg, route_message

from .test_netlink import RTA_GATEWAY, RTA_OIF, attribute, u32


def test_address() -> None:
    message = address_message(7, Address(0, addr.packed("2001:db8::2"), 64))
    message["attrs"].append(("IFA_CACHEINFO", {"ifa_preferred": 0, "ifa_valid": 7200, "cstamp": 0, "tstamp": 0}))
    message.encode()
    body = bytes(message.data)[16:]
    assert body[:8] == struct.pack("=BBBBI", 10, 64, 2, 0, 7)  # IFA_F_NODAD
    assert body.endswith(attribute(6, u32(0) + u32(7200) + u32(0) + u32(0)))


def test_route() -> None:
    message = route_message(7, Route(bytes(4), 0, (Hop(2, addr.packed("192.0.2.1")),)))
    message.encode()
    gateway = attribute(RTA_GATEWAY, addr.packed("192.0.2.1"))
    assert bytes(message.data)[16 + 12 :] == attribute(RTA_OIF, u32(7)) + gateway


HEAVY = "'asyncio', 'logging', 'multiprocessing', 'pkgutil', 'platform', 'pyroute2', 'pyroute2.ndb', 'traceback'"


def alone(code: str) -> str:
    """The output of `code` in an interpreter of its own."""
    options = "-I", "-S"  # site may load some of these modules itself
    prelude = f"import sys; sys.path += {sys.path!r}\n"
    done = subprocess.run([sys.executable, *options, "-c", prelude + code], capture_output=True, text=True, check=True)
    return done.stdout


def test_message_classes_come_without_the_rest_of_the_library() -> None:
    assert ifinfmsg.__module__ == "pyroute2.netlink.rtnl.ifinfmsg"
    assert alone(f"from passt.linux import netlink; print(*({{{HEAVY}}} & sys.modules.keys()))") == "\n"


def test_library_that_needs_more_gets_the_real_modules() -> None:
    code = """
        from passt.lean.stand_ins import stand_in
        from passt.linux import rtnl_messages
        for name in [name for name in sys.modules if name.startswith("pyroute2.")]:
            del sys.modules[name]
        rtnl_messages._needed_in_name = lambda: [stand_in("logging"), stand_in("traceback")]
        classes = rtnl_messages._message_classes()
        print(*(c.__name__ for c in classes), "pyroute2" in sys.modules, "logging" in sys.modules)
    """
    assert alone(dedent(code)) == "ifinfmsg ifaddrmsg rtmsg False True\n"


def test_data_of_a_kind_of_link_stay_bytes() -> None:
    """The library knows VLANs; their number is read by no program here."""
    code = """
        from passt.linux.rtnl_messages import ifinfmsg
        message = ifinfmsg()
        data = [("IFLA_INFO_KIND", "vlan"), ("IFLA_INFO_DATA", bytes([1, 2, 3]))]
        message["attrs"] = [("IFLA_LINKINFO", {"attrs": data})]
        message.encode()
        read = ifinfmsg(message.data)
        read.decode()
        info = read.get_attr("IFLA_LINKINFO")
        print(info.get_attr("IFLA_INFO_KIND"), info.get_attr("IFLA_INFO_DATA"))
        print(*(name for name in sys.modules if "plugins" in name))
    """
    assert alone(dedent(code)) == "vlan 01:02:03\n\n"


def test_error_in_the_library_is_a_line_of_the_log_and_opens_no_source_file() -> None:
    code = """
        from passt import log
        from passt.linux import rtnl_messages
        library = sys.modules["pyroute2.netlink"]
        log.debug_on, log._write = True, lambda level, text: print(text)
        sys.addaudithook(lambda event, _: print(event) if event == "open" else None)
        try:
            1 / 0
        except ZeroDivisionError:
            library.log.warning("decoding %s", "a cell")
            library.log.warning(library.traceback.format_exc())
    """
    said = "pyroute2: decoding a cell\npyroute2: ZeroDivisionError('division by zero')\n"
    assert alone(dedent(code)) == said


def test_stand_ins_have_all_that_the_library_uses() -> None:
    have = {module.__name__.rpartition(".")[2]: vars(module).keys() for module in rtnl_messages._needed_in_name()}
    del have["pkgutil"]  # of functions that nothing calls
    del have["plugins"]  # has any kind
    for name, module in list(sys.modules.items()):
        if name.startswith("pyroute2."):
            assert module.__file__ is not None
            for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in have:
                    assert node.attr in have[node.value.id], f"{name}: {node.value.id}.{node.attr}"
